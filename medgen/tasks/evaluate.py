"""`medgen evaluate`: how good a bundle is on scans it has not learned from."""

from pathlib import Path
from typing import Any, Literal

import torch

from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset
from medgen.data.manifest import index
from medgen.errors import DataError
from medgen.io.source import ReadOptions
from medgen.tasks.conditions import told_of
from medgen.tasks.quality import quality


def evaluate(
    data: str | Path,
    bundle: str | Path | Bundle,
    *,
    split: Literal["test", "all"] = "test",
    label: str | None = None,
    domain: str | None = None,
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
) -> dict[str, Any]:
    """Bits per dimension, reconstruction and classification of scans, whichever the model is able to.

    Args:
        data: a folder, zip, CSV or .npz of scans.
        bundle: made by `train`.
        split: 'test' takes the scans that training with the bundle's seed set aside; 'all' takes every scan.
        label, domain: take these scans only, as in training.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.

    Returns:
        Names and numbers (see `medgen.tasks.quality.quality`), with the bundle's hash and the split.

    Raises:
        BundleError, DataError.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    bundle.model.to("cuda" if device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    with io.opened(data) as place:
        rows = index(place, options, seed=int(bundle.training.get("seed", 0))).where(label=label, domain=domain)
        chosen = rows if split == "all" else rows.split(split)
        if not len(chosen):
            raise DataError(
                f"None of {len(rows)} scans is in the split '{split}'. Pass --split all to take every scan."
            )
        scans = ScanDataset(chosen, bundle.recipe, **told_of(bundle.model.config), options=options)
        found = quality(bundle.model, scans, temperature=bundle.calibration.get("temperature"))
    return {"weights_sha256": bundle.weights_sha256, "split": split, **found}


__all__ = ["evaluate"]
