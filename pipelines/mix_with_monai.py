"""Does it help a MONAI classifier to see synthetic radiographs, too?

Learns two classes of radiographs, then trains the same small MONAI network for the same number of steps on real scans
alone, and on real scans mixed with as many that are drawn while it trains; both are tested on scans nobody has seen.
Nothing but the line with `mixed_with` differs from a MONAI script without medgen. Runs in about a minute on the sample
scans:

    python pipelines/mix_with_monai.py
    python pipelines/mix_with_monai.py --data my_radiographs --steps 2000 --ratio 2
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader, Dataset
from monai.metrics import ROCAUCMetric
from monai.networks.nets import DenseNet
from monai.transforms import Compose, EnsureTyped, LoadImaged, RandFlipd, RandGaussianNoised, Resized, ScaleIntensityd

import medgen
from medgen.data.dataset import ScanReader

samples = Path(__file__).resolve().parents[1] / "data_samples"
options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--data", default=samples / "xray", help="folder with one sub-folder for each of two classes")
options.add_argument("--out", type=Path, default=Path("mix_with_monai"), help="folder for everything that is written")
options.add_argument("--preset", default="gaussian", help="what learns to draw; `medgen models` lists them")
options.add_argument("--ratio", type=float, default=1.0, help="synthetic scans for each real one")
options.add_argument("--steps", type=int, default=60, help="training steps of the classifier")
options.add_argument("--minutes", type=float, default=5, help="training time of what draws, if it needs any")
options = options.parse_args()

# 1. What draws scans, and the real scans with the splits it was trained with: nobody held out was learned from.
bundle = medgen.train(options.data, options.out / "bundle", preset=options.preset, minutes=options.minutes)
manifest = medgen.index(options.data)
classes = medgen.Bundle.load(bundle).model.config.classes


def real(*splits: str) -> CacheDataset:
    """Scans of these splits, as MONAI loads them."""
    rows = [row for split in splits for row in manifest.split(split).rows]
    files = [{"image": manifest.locate(row.path), "label": classes.index(row.label)} for row in rows]
    load = LoadImaged("image", reader=ScanReader(), image_only=True, ensure_channel_first=False)
    return CacheDataset(files, Compose([load, planar, *same_size]), progress=False)


def planar(item: dict) -> dict:
    """An image (c, i, j) of a planar volume (c, i, j, 1)."""
    return item | {"image": item["image"][..., 0]}


same_size = [Resized("image", (64, 64)), ScaleIntensityd("image"), EnsureTyped("image", track_meta=False)]
training, unseen = real("train"), real("val", "calibration", "test")

# 2. Synthetic scans, drawn when they are asked for; those that copy a patient are drawn again.
drawn = medgen.SyntheticDataset(
    bundle, n=max(1, round(options.ratio * len(training))), data=options.data, transform=Compose(same_size)
)
mixed = drawn.mixed_with(training, ratio=options.ratio)

# 3. The same network, the same steps, on both.
augment = Compose([RandFlipd("image", prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=0.5, std=0.05)])
held = next(iter(DataLoader(unseen, batch_size=len(unseen))))
for name, data in (("real", training), ("real and synthetic", mixed)):
    torch.manual_seed(0)
    loader = DataLoader(Dataset(data, augment.set_random_state(0)), batch_size=8, shuffle=True, drop_last=True)
    network = DenseNet(2, 1, 2, init_features=8, growth_rate=8, block_config=(2, 2, 2))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    # As many steps on either, whatever the length of a pass.
    for batch in islice(chain.from_iterable(repeat(loader)), options.steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
        optimizer.step()
    with torch.no_grad():
        score = network.eval()(held["image"]).softmax(1)[:, 1]
    area = ROCAUCMetric()
    area(score, held["label"])
    print(f"trained on {name:18s} ({len(data):3d} scans): AUROC {area.aggregate():.3f}")

print("Research use only, not a medical device.")
