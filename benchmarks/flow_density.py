"""Bits per dimension of normal chests: lossless WebP, a ridge Gaussian, and medgen's exact densities.

PneumoniaMNIST at 28 x 28, 8 bit, uniform dequantisation of one grey level. Ridge and checkpoint are chosen on
a tenth of the train split; the official val and test normals are only reported.

    python benchmarks/flow_density.py --presets glow2d,nsf2d --minutes 10 --seeds 3
"""

import io
import math
import time

import numpy as np
from densities import REPORTED, Report, density_options, normals
from PIL import Image


def webp_bits(levels: np.ndarray) -> np.ndarray:
    """Bits a voxel of each scan's lossless WebP file, without the container's header of 20 bytes."""

    def size(one: np.ndarray) -> int:
        held = io.BytesIO()
        Image.fromarray(one).save(held, "WEBP", lossless=True, quality=100, method=6)
        return held.tell() - 20

    return np.asarray([8 * size(one) / one.size for one in levels])


class RidgeGaussian:
    """N(mean, S + ridge I) of dequantised grey levels v + u, u ~ U(0, 1); S is that of the training scans.

    E_u log p(v + u) has a closed form, so no noise is drawn: the quadratic at v + 1/2, and trace(P) / 12.
    """

    def __init__(self, levels: np.ndarray, ridge: float) -> None:
        flat = levels.reshape(len(levels), -1) + 0.5
        self.mean = flat.mean(0)
        self.values, self.vectors = np.linalg.eigh(np.cov(flat.T, bias=True) + (1 / 12 + ridge) * np.eye(flat.shape[1]))

    def bits(self, levels: np.ndarray) -> np.ndarray:
        turned = (levels.reshape(len(levels), -1) + 0.5 - self.mean) @ self.vectors
        quadratic = (turned**2 / self.values).sum(1) + (1 / self.values).sum() / 12
        size = len(self.values)
        nats = 0.5 * (quadratic + np.log(self.values).sum() + size * math.log(2 * math.pi))
        return nats / (size * math.log(2))


def gaussian(scans: dict[str, np.ndarray]) -> tuple[RidgeGaussian, float]:
    """The ridge is chosen on the tenth; mean and covariance then come from all of the train split."""
    ridges = np.geomspace(1e-3, 1e3, 37)
    held = [RidgeGaussian(scans["train"], ridge).bits(scans["tenth"]).mean() for ridge in ridges]
    best = float(ridges[int(np.argmin(held))])
    return RidgeGaussian(np.concatenate([scans["train"], scans["tenth"]]), best), best


def main() -> None:
    options, began, scans = density_options("flow_density"), time.monotonic(), normals()
    report = Report(scans)
    report.add("lossless WebP", {split: webp_bits(scans[split]) for split in REPORTED})
    density, ridge = gaussian(scans)
    report.add("ridge Gaussian", {split: density.bits(scans[split]) for split in ("val", "test", "ill")}, ridge=ridge)
    report.train(options)
    report.keep(options.name, began)


if __name__ == "__main__":
    main()
