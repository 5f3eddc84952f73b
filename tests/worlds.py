"""Fixtures: small worlds of nobody's scans, bundles trained on them for a moment, and the command line."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen import io
from medgen.grid import Grid

SAMPLES = Path(__file__).resolve().parents[1] / "data_samples"
# What makes a training run last a second: few images, a narrow network, exact arithmetic.
QUICK_3D = ("fit.images=48", "fit.batch_size=8", "fit.precision=float32", "model.width=4", "model.latent=4")
QUICK_2D = ("fit.images=256", "fit.batch_size=32", "model.width=4", "model.latent=6")


def quick(overrides: tuple[str, ...]) -> list[str]:
    """The same overrides for the command line."""
    return [part for override in overrides for part in ("--set", override)] + ["--minutes", "1000"]


def small_chest(seed: int, size: int = 24) -> torch.Tensor:
    """Nobody's chest in microseconds, (1, size, size) on [0, 1]: a trunk with two lungs, of many shapes."""
    rng = np.random.default_rng(seed)
    i, j = np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij")
    shown = 0.1 + 0.5 / (1 + np.exp(20 * ((i / rng.uniform(0.8, 1)) ** 4 + (j / rng.uniform(0.85, 1)) ** 4 - 1)))
    for side in (-1, 1):
        middle, tall, wide = side * rng.uniform(0.35, 0.48), rng.uniform(0.45, 0.7), rng.uniform(0.2, 0.32)
        off = ((i - middle) / wide) ** 2 + ((j - rng.uniform(-0.15, 0.15)) / tall) ** 2
        shown -= rng.uniform(0.25, 0.4) / (1 + np.exp(12 * (off - 1)))
    slopes = rng.normal(0, 0.06, 2)
    shown += (
        slopes[0] * i + slopes[1] * j + 0.05 * np.cos(rng.uniform(8, 14) * j + rng.uniform(0, 6)) * (np.abs(i) < 0.8)
    )
    shown += rng.normal(0, 0.02, shown.shape)
    return torch.from_numpy(shown.clip(0, 1).astype(np.float32))[None]


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 heads as NIfTI, 16 x 16 x 16 voxels of 11 mm, uint16, one a patient."""
    folder = tmp_path_factory.mktemp("worlds") / "heads"
    affine = np.diag([11.0, 11.0, 11.0, 1.0])
    affine[:3, 3] = np.array([0, -18, 16]) - 11 * 7.5
    for path in sorted((SAMPLES / "heads").glob("*.nii.gz")):
        scan = io.read(path).onto(Grid((16, 16, 16), affine), outside=0)
        io.write(scan.with_voxels(scan.voxels.round().astype(np.uint16)), folder / path.name)
    return folder


@pytest.fixture(scope="session")
def ill_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One head with a lesion, on the finer grid of the samples: 32 x 40 x 32 voxels of 5.5 mm."""
    folder = tmp_path_factory.mktemp("ill")
    shutil.copy(SAMPLES / "heads_ill" / "sub-101_T1w.nii.gz", folder)
    return folder / "sub-101_T1w.nii.gz"


@pytest.fixture(scope="session")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 chest radiographs of two classes as 8-bit PNG, 16 x 16 pixels: normal/ and opacity/."""
    folder = tmp_path_factory.mktemp("worlds") / "xrays"
    for path in sorted((SAMPLES / "xray").glob("*/*.dcm")):
        pixels = io.read(path).voxels[0, :, :, 0].T.astype(np.float32)
        small = pixels.reshape(16, 4, 16, 4).mean((1, 3)) / 16
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(small.round().astype(np.uint8)).save(folder / path.parent.name / f"{path.stem}.png")
    return folder


@pytest.fixture(scope="session")
def heads_bundle(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained on `heads` for a moment; calibrated on 19 held-out ones."""
    from medgen.tasks.learn import train

    return train(heads, tmp_path_factory.mktemp("bundles") / "heads", minutes=None, overrides=QUICK_3D)


@pytest.fixture(scope="session")
def xray_bundle(xrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained on both classes of `xrays` for a moment."""
    from medgen.tasks.learn import train

    return train(xrays, tmp_path_factory.mktemp("bundles") / "xrays", minutes=None, overrides=QUICK_2D)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run `medgen ARGUMENTS` in this process: (exit code, stdout, stderr), just as a shell would see them."""
    from medgen.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medgen", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run
