"""`medgen evaluate`: how good a bundle is on scans it has not learned from."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset
from medgen.data.manifest import Row, index
from medgen.errors import DataError, MedgenError
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.tasks.conditions import told_of
from medgen.tasks.intake import taken_in, training_scans
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
        split: 'test' takes the scans that training set aside; 'all' takes every scan.
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
        rows = index(place, options).where(label=label, domain=domain)
        if split == "test":
            known = training_scans(bundle, place, options)
            if known is None:
                raise DataError(
                    "The bundle did not learn from this folder as it is, so which of its scans were set aside cannot "
                    "be told. Pass --split all if it has learned from none of them."
                )
            rows = known.where(label=label, domain=domain, split="test")
        chosen = replace(
            rows, rows=tuple(row for row in rows.rows if _fits(bundle, row, rows.locate(row.path), options))
        )
        if not len(chosen):
            raise DataError(f"None of {len(rows)} scans is left to evaluate on.")
        scans = ScanDataset(chosen, bundle.recipe, **told_of(bundle.model.config), options=options)
        found = quality(bundle.model, scans, temperature=bundle.calibration.get("temperature"))
    left_out = len(rows) - len(chosen)
    return {"weights_sha256": bundle.weights_sha256, "split": split, "left_out": left_out, **found}


def _fits(bundle: Bundle, row: Row, path: str, options: ReadOptions) -> bool:
    """Whether a scan is of the kind that the bundle was trained on; says why not."""
    classes = bundle.model.config.classes
    if classes and row.label not in classes:
        note(f"{row.case} is left out: the model knows {', '.join(classes)}; found {row.label or 'no class'}.")
        return False
    try:
        for warning in taken_in(bundle, path, options).warnings:
            note(f"{row.case}: {warning}.")
    except MedgenError as error:
        note(f"{row.case} is left out: {error}")
        return False
    return True


__all__ = ["evaluate"]
