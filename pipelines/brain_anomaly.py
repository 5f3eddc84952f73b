"""Which of these brains do not look like the healthy ones, and where?

Learns a folder of healthy heads, scores a folder of new ones, and compares the anomaly maps with the
lesion masks where there are any. Runs in about a minute on the sample scans:

    python pipelines/brain_anomaly.py
    python pipelines/brain_anomaly.py --healthy my_controls --new my_patients --minutes 20
"""

import argparse
from pathlib import Path

import numpy as np

import medgen

samples = Path(__file__).resolve().parents[1] / "data_samples"
options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--healthy", default=samples / "heads", help="folder of healthy scans to learn")
options.add_argument("--new", default=samples / "heads_ill", help="folder of scans to score")
options.add_argument("--out", type=Path, default=Path("brain_anomaly"), help="folder for everything that is written")
options.add_argument("--minutes", type=float, default=0.5, help="training time")
options.add_argument("--fpr", type=float, default=0.05, help="false-alarm rate of flags and masks")
options = options.parse_args()

# 1. What is there? One patient never lands in two splits; a fifth is held out to calibrate.
healthy = medgen.index(options.healthy)
print(healthy.summary())

# 2. Learn the healthy scans. The bundle is a folder of weights and values; nothing in it can run.
bundle = medgen.train(options.healthy, options.out / "bundle", minutes=options.minutes)
facts = medgen.Bundle.load(bundle)
print(f"held-out reconstruction: {facts.metrics['held_out_psnr_db']} dB in {facts.training['minutes']} minutes")

# 3. Score the new scans: a p-value among held-out healthy scans, and a map on each scan's own grid.
result = medgen.score(options.new, bundle, options.out / "scores", rate=options.fpr)
for scan in result.scans:
    mark = "UNUSUAL" if scan.flagged else ""
    print(f"{scan.case:20s} score {scan.score:8.3f}  p = {scan.p:.3f}  highest z {scan.z_max:5.1f}  {mark}")

# 4. Where a mask says what is ill, how much higher is the map there than elsewhere in the head?
new = medgen.index(options.new)
for row in new.rows:
    if not row.mask:
        continue
    z_map = medgen.read(options.out / "scores" / "maps" / f"{row.case}_map.nii.gz", medgen.ReadOptions(on_nan="zero"))
    mask = medgen.read(new.locate(row.mask)).onto(z_map.grid, outside=0)
    lesion = mask.voxels[0] > 0
    head = medgen.read(new.locate(row.path)).physical()[0]
    rest = (head > 0.2 * np.percentile(head, 99)) & ~lesion
    inside, outside = z_map.voxels[0][lesion], z_map.voxels[0][rest]
    chance = np.mean([np.mean(value > outside) for value in inside])
    volume = lesion.sum() * mask.grid.voxel_volume / 1000
    print(f"{row.case:20s} lesion {volume:.1f} mL: mean z {inside.mean():.1f} inside,")
    print(f"{'':20s} {outside.mean():.1f} elsewhere; a lesion voxel is above {chance:.0%} of the others")

print(f"Look at {options.out / 'scores' / 'pictures'}. Research use only, not a medical device.")
