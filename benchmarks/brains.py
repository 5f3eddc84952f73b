"""A 3D VAE on 44 T1 brains, five folds by subject: reconstruction of unseen brains, and samples' spectra.

python benchmarks/brains.py                # five folds, at most ten minutes each
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import keep, peak_mb, shared_data, table

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import model_view
from medgen.seeds import derived_seed


def folds(subjects: list[str], count: int, seed: int) -> list[list[str]]:
    order = np.random.default_rng(derived_seed(seed, 7)).permutation(len(subjects))
    return [[subjects[i] for i in sorted(order[k::count])] for k in range(count)]


def psnr(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> float:
    return float(-10 * np.log10(((x - y)[mask] ** 2).mean()))


def pca_reconstructions(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Every principal component the training fold has."""
    mean = train.mean(0)
    centred = (train - mean).reshape(len(train), -1)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[values > 1e-6 * values[0]]
    codes = (test - mean).reshape(len(test), -1) @ directions.T
    return (codes @ directions).reshape(test.shape) + mean


def spectrum(volume: np.ndarray, bins: int = 20) -> np.ndarray:
    """Mean power in `bins` shells of spatial frequency from 0 to Nyquist, under a Hann window."""
    for axis, n in enumerate(volume.shape):
        volume = volume * np.hanning(n).reshape([-1 if a == axis else 1 for a in range(3)])
    power = np.abs(np.fft.fftn(volume)) ** 2
    axes = np.meshgrid(*[np.fft.fftfreq(n) for n in volume.shape], indexing="ij")
    shell = (np.sqrt(sum(a**2 for a in axes)) / 0.5 * bins).astype(int).ravel()
    inside = shell < bins
    return np.bincount(shell[inside], power.ravel()[inside], bins) / np.bincount(shell[inside], minlength=bins)


def one_fold(files: dict[str, Path], held: list[str], minutes: float, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as work:
        listed = Path(work) / "cohort.csv"
        rest = [s for s in files if s not in held]
        # Two training subjects decide when to stop; the held-out fold takes no part in training.
        stop = set(np.random.default_rng(seed).permutation(rest)[:2])
        with listed.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["path", "case", "patient", "split"])
            for subject, path in files.items():
                split = "test" if subject in held else "val" if subject in stop else "train"
                writer.writerow([path, subject, subject, split])
        started = time.monotonic()
        medgen.train(listed, Path(work) / "model", minutes=minutes, seed=seed)
        took = (time.monotonic() - started) / 60
        bundle = Bundle.load(Path(work) / "model")
    prepared = {s: model_view(bundle.recipe(io.read(path))).numpy() for s, path in files.items()}
    train = np.concatenate([prepared[s] for s in rest])
    test = np.concatenate([prepared[s] for s in held])
    mask = (train > 0).mean(0) > 0.5
    twins = np.concatenate([bundle.model.reconstruct(torch.from_numpy(x)[None, None])[0].numpy() for x in test])
    linear = pca_reconstructions(train, test)
    samples = bundle.model.sample(8, seed=seed)[:, 0].numpy()
    ratio = np.mean([spectrum(s) for s in samples], 0) / np.mean([spectrum(x) for x in test], 0)
    return {
        "mean image": float(np.mean([psnr(x, train.mean(0), mask) for x in test])),
        "PCA, all components": float(np.mean([psnr(x, y, mask) for x, y in zip(test, linear, strict=True)])),
        "medgen VAE": float(np.mean([psnr(x, y, mask) for x, y in zip(test, twins, strict=True)])),
        "minutes": took,
        "peak_mb": peak_mb(),
        "spectrum_ratio": ratio.tolist(),
        "images_seen": bundle.training["images_seen"],
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--folds", type=int, default=5)
    options.add_argument("--minutes", type=float, default=10)
    options = options.parse_args()
    began = time.monotonic()
    folder = shared_data() / "brain_t1_ds002748" / "mni2mm"
    files = {path.name.split("_")[0]: path for path in sorted(folder.glob("*.nii.gz"))}
    found = []
    for number, held in enumerate(folds(list(files), options.folds, 0)):
        found.append(one_fold(files, held, options.minutes, number))
        last = found[-1]
        half = last["spectrum_ratio"][:10]
        shown = ("mean image", "PCA, all components", "medgen VAE", "minutes")
        print(f"fold {number}: " + ", ".join(f"{k} {last[k]:.2f}" for k in shown), flush=True)
        print(f"  spectrum of samples over real, up to half Nyquist: {min(half):.2f} to {max(half):.2f}", flush=True)
    names = ("mean image", "PCA, all components", "medgen VAE")
    rows = [(n, float(np.mean([f[n] for f in found])), float(np.std([f[n] for f in found], ddof=1))) for n in names]
    table(rows, ("reconstruction of unseen brains", "PSNR in the brain, dB", "sd over folds"))
    ratio = np.mean([f["spectrum_ratio"] for f in found], 0)
    print(
        f"spectrum ratio up to half Nyquist: {ratio[:10].min():.2f} to {ratio[:10].max():.2f}; "
        f"minutes a fold {max(f['minutes'] for f in found):.1f}; peak {max(f['peak_mb'] for f in found):.0f} MB"
    )
    keep("brains", {"folds": found, "psnr": {row[0]: row[1] for row in rows}, "spectrum_ratio": ratio.tolist()}, began)


if __name__ == "__main__":
    main()
