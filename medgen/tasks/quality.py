"""How good a model is, measured on scans it has not seen."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from medgen.data.dataset import Batch, ScanDataset
from medgen.metrics.classification import (
    accuracy,
    best_temperature,
    expected_calibration_error,
    log_loss,
    one_versus_rest_auroc,
    tempered,
)
from medgen.metrics.image import psnr, ssim_map
from medgen.models.abilities import Classifies, Reconstructs
from medgen.models.base import Model, can, class_indices
from medgen.scores.likelihoods import bits_per_dim, density_kind, given

# An estimate takes hundreds of evaluations a scan.
_MOST_ESTIMATES = 32


@torch.no_grad()
def quality(model: Model, data: ScanDataset, *, temperature: float | None = None) -> dict[str, float]:
    """Numbers about scans the model has not learned from; only those that its abilities allow.

    psnr_db, ssim: of reconstructions.
    bits_per_dim: what a grey level costs, of an exact density; ..._bound, ..._estimate (with ..._standard_error)
    where that is what there is.
    accuracy, auroc, log_loss, calibration_error: of p(class | x); and, given the `temperature` found on other
    scans, log_loss_tempered and calibration_error_tempered.
    """
    told: dict[str, float] = {"scans": len(data)}
    columns: dict[str, list[Tensor]] = {}
    kind, estimated = density_kind(model), 0
    for found in data.batches(8):
        batch = found.to(model.device)
        parts = _reconstructed(model, batch) if can(model, "reconstructs") else {}
        if kind and (kind != "estimate" or estimated < _MOST_ESTIMATES):
            parts["bits"], parts["error"] = bits_per_dim(model, batch)
            estimated += len(batch.x)
        for name, values in parts.items():
            columns.setdefault(name, []).append(values.cpu().double())
    means = {name: float(torch.cat(values).mean()) for name, values in columns.items()}
    if "psnr" in means:
        told |= {"psnr_db": round(means["psnr"], 2), "ssim": round(means["ssim"], 4)}
    if kind:
        name = "bits_per_dim" if kind == "exact" else f"bits_per_dim_{kind}"
        told[name] = round(means["bits"], 4)
        if kind == "estimate":
            errors = torch.cat(columns["error"])
            told[f"{name}_standard_error"] = round(float(errors.square().sum().sqrt()) / len(errors), 4)
    if can(model, "classifies"):
        told |= _as_classifier(*chances(model, data), temperature)
    return told


@torch.no_grad()
def chances(model: Model, data: ScanDataset) -> tuple[np.ndarray, np.ndarray]:
    """log p(class | x) (n, k) of every scan whose class is known, and that class (n,)."""
    found, true = [], []
    for unmoved in data.batches(8):
        batch = unmoved.to(model.device)
        classes = class_indices(model.config, batch.cond)
        if classes is None:
            continue
        found.append(cast(Classifies, model).class_log_prob(batch.x, batch.cond, **given(batch)).cpu().double())
        true.append(classes.cpu())
    if not found:
        return np.zeros((0, len(model.config.classes))), np.zeros(0, dtype=np.int64)
    return torch.cat(found).numpy(), torch.cat(true).numpy()


def temperature_of(model: Model, data: ScanDataset) -> float | None:
    """The temperature that makes p(class | x) mean most on these scans; None where the model does not classify."""
    if not can(model, "classifies"):
        return None
    found, true = chances(model, data)
    return best_temperature(found, true) if len(np.unique(true)) > 1 else None


def _as_classifier(found: np.ndarray, true: np.ndarray, temperature: float | None) -> dict[str, float]:
    if not len(true):
        return {}
    told = {"accuracy": accuracy(found, true), "auroc": one_versus_rest_auroc(found, true)}
    for name, values in (("", found), ("_tempered", None if temperature is None else tempered(found, temperature))):
        if values is not None:
            told[f"log_loss{name}"] = log_loss(values, true)
            told[f"calibration_error{name}"] = expected_calibration_error(values, true)
    return {name: round(value, 4) for name, value in told.items() if np.isfinite(value)}


def _reconstructed(model: Model, batch: Batch) -> dict[str, Tensor]:
    told: dict[str, Any] = given(batch)
    twin = cast(Reconstructs, model).reconstruct(batch.x, batch.cond, **told).clamp(0, 1)
    # Of pairs the scans alone: a mask is no picture.
    twin, x = (values[:, : model.config.images] for values in (twin, batch.x))
    return {"psnr": psnr(twin, x), "ssim": ssim_map(twin, x).flatten(1).mean(1)}


__all__ = ["chances", "quality", "temperature_of"]
