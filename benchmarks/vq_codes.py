"""Codes of volumes: how many are in use, what they reconstruct, and what the prior makes of them, on held-out scans.

python benchmarks/vq_codes.py      # hippocampi and brains, with a PixelCNN and with a transformer

Splits are by patient; training and its stopping see the train and val splits alone, everything told is of the rest.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from brains import pca_reconstructions, psnr
from measure import keep, peak_mb, shared_data, table
from torch import Tensor

from medgen.data.dataset import Batch, ScanDataset, collate
from medgen.models import build
from medgen.models.vqvae import VQVAE
from medgen.tasks.plan import Choices, Plan, plan_training
from medgen.training.fit import fit

FOLDERS = {"hippocampus": "hippocampus_msd/images", "brain": "brain_t1_ds002748/mni2mm"}
# What is trained on which scans, and images to see: at most eight minutes of one thread each.
RUNS = (
    ("hippocampus", "vqvae3d", 1500),
    ("brain", "vqvae3d", 300),
    ("hippocampus", "gpt3d", 1500),
    ("brain", "gpt3d", 300),
)


def scans_of(plan: Plan, *splits: str) -> ScanDataset:
    kept = tuple(row for row in plan.manifest.rows if row.split in splits)
    return ScanDataset(replace(plan.manifest, rows=kept), plan.recipe)


def whole(data: ScanDataset) -> Batch:
    return collate([data[n] for n in range(len(data))])


def singly(batch: Batch) -> Iterator[Batch]:
    for n in range(len(batch.x)):
        yield Batch(batch.x[n : n + 1])


def told(model: VQVAE, held: Batch, used: Tensor) -> dict:
    """What the codes of held-out scans are worth; `used`: how often training scans use each."""
    codes = torch.cat([model.code_map(one.x) for one in singly(held)])
    counts = torch.bincount(codes.flatten(), minlength=model.config.codes).double()
    shares = counts / counts.sum()
    code = ((used + 0.5) / (used + 0.5).sum()).log()
    bits = math.log(2) * codes[0].numel()
    prior = torch.cat([model.code_log_prob(one.x) for one in singly(held)])
    bound = torch.cat([model.elbo(one.x) for one in singly(held)])
    health = model.health(singly(held))
    return {
        "codes alive": health["codes_used"] / health["codes"],
        "perplexity": health["code_perplexity"],
        "codes a scan": codes[0].numel(),
        "entropy of codes, bits": float(torch.special.entr(shares).sum() / math.log(2)),
        "by frequency in training, bits a code": float(-(code * shares).sum() / math.log(2)),
        "by the prior, bits a code": float(-prior.mean() / bits),
        "bound, nats a voxel": float(bound.mean() / held.x[0].numel()),
    }


def one_run(name: str, preset: str, images: int, seed: int) -> dict:
    folder = shared_data() / FOLDERS[name]
    plan = plan_training(folder, Choices(preset, minutes=None, seed=seed))
    train, val, held = (scans_of(plan, *splits) for splits in (("train",), ("val",), ("calibration", "test")))
    torch.manual_seed(seed)
    model = build(plan.model)
    assert isinstance(model, VQVAE)
    settings = plan.fit.model_copy(update={"images": images})
    x, y = whole(train).x[:, 0].numpy(), whole(held)
    mask = (x > 0).mean(0) > 0.5
    start = build(plan.model)
    start.initialise(whole(train).first(64))
    assert isinstance(start, VQVAE)
    started, worked = time.monotonic(), time.process_time()
    reached = fit(model, train, val, settings, seed=seed, device="cpu")
    took, worked = (time.monotonic() - started) / 60, (time.process_time() - worked) / 60
    used = sum(
        torch.bincount(model.code_map(one.x).flatten(), minlength=model.config.codes) for one in singly(whole(train))
    )
    begun = time.monotonic()
    model.sample(1, seed=seed)
    drawing = time.monotonic() - begun

    def quality(twins: list) -> float:
        return float(sum(psnr(a, b, mask) for a, b in zip(y.x[:, 0].numpy(), twins, strict=True)) / len(twins))

    def twins(one: VQVAE) -> list:
        return [one.eval().reconstruct(scan.x)[0, 0].numpy() for scan in singly(y)]

    return {
        "scans": {"train": len(train), "val": len(val), "held out": len(held)},
        "PSNR, dB": {
            "mean image": quality([x.mean(0)] * len(y.x)),
            "PCA, all components": quality(list(pca_reconstructions(x, y.x[:, 0].numpy()))),
            "VQ-VAE before training (k-means)": quality(twins(start)),
            "VQ-VAE": quality(twins(model)),
        },
        **told(model, y, used if isinstance(used, Tensor) else torch.zeros(model.config.codes)),
        "images seen": reached.seen,
        "best after": reached.best_seen,
        "minutes": took,
        "processor minutes": worked,
        "seconds a sample": drawing,
        "peak_mb": peak_mb(),
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--runs", type=int, nargs="*", default=list(range(len(RUNS))))
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    began, found = time.monotonic(), {}
    for name, preset, images in (RUNS[n] for n in options.runs):
        found[f"{name}, {preset}"] = one_run(name, preset, images, options.seed)
        print(name, preset, found[f"{name}, {preset}"], flush=True)
        keep("vq_codes", {"runs": found}, began)
    shown = ("codes alive", "perplexity", "by the prior, bits a code", "entropy of codes, bits", "processor minutes")
    rows = [(name, *[one[key] for key in shown], one["PSNR, dB"]["VQ-VAE"]) for name, one in found.items()]
    table(rows, ("scans, preset", *shown, "PSNR, dB"))


if __name__ == "__main__":
    main()
