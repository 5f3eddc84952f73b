"""Do synthetic radiographs help to tell opacities from normal chests?

Learns two classes of radiographs, writes new ones of each as DICOM, and trains the same simple classifier
on real scans alone, on synthetic scans alone, and on both; all are tested on scans nobody has seen. Runs
in about a minute on the sample scans:

    python pipelines/chest_augment.py
    python pipelines/chest_augment.py --data my_radiographs --per-class 100 --minutes 20
"""

import argparse
from pathlib import Path

import numpy as np
from skimage.feature import hog
from skimage.transform import resize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import medgen

samples = Path(__file__).resolve().parents[1] / "data_samples"
options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--data", default=samples / "xray", help="folder with one sub-folder a class")
options.add_argument("--out", type=Path, default=Path("chest_augment"), help="folder for everything that is written")
options.add_argument("--per-class", type=int, default=12, help="synthetic scans of each class")
options.add_argument("--minutes", type=float, default=0.5, help="training time")
options = options.parse_args()


def features(manifest: medgen.Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Histograms of oriented gradients and the class of every scan."""
    found = []
    for row in manifest.rows:
        image = medgen.read(manifest.locate(row.path)).physical()[0, :, :, 0].T
        image = resize((image - image.min()) / max(np.ptp(image), 1e-6), (64, 64))
        found.append(hog(image, orientations=8, pixels_per_cell=(16, 16), cells_per_block=(1, 1)))
    return np.stack(found), np.asarray([row.label for row in manifest.rows])


# 1. The real scans, split by patient.
real = medgen.index(options.data)
print(real.summary())

# 2. New scans of each class, in the format of the real ones. None is a copy of a training scan.
done = medgen.augment(options.data, options.out / "synthetic", per_class=options.per_class, minutes=options.minutes)
print(f"{sum(done.written.values())} synthetic scans; draws left out: {done.rejected or 'none'}. {done.said}")

# 3. The same learner on real, synthetic, and both.
synthetic = medgen.index(options.out / "synthetic" / "manifest.csv")
train_x, train_y = features(real.split("train"))
more_x, more_y = features(synthetic)
unseen = [features(real.split(name)) for name in ("val", "calibration", "test") if len(real.split(name))]
test_x, test_y = np.concatenate([x for x, _ in unseen]), np.concatenate([y for _, y in unseen])
for name, x, y in (
    ("real", train_x, train_y),
    ("synthetic", more_x, more_y),
    ("real and synthetic", np.concatenate([train_x, more_x]), np.concatenate([train_y, more_y])),
):
    learner = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y)
    ill = learner.predict_proba(test_x)[:, 1]
    print(f"trained on {name:20s} ({len(y):3d} scans): AUROC {roc_auc_score(test_y == learner.classes_[1], ill):.3f}")

print(f"Look at {options.out / 'synthetic' / 'contact_sheet.png'}. Research use only, not a medical device.")
