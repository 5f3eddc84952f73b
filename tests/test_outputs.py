"""What was made becomes a dataset of the same build as the user's own, which medgen and others read back."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen import io
from medgen.data.manifest import index
from medgen.data.phantoms import Lesion, chest_xray, head
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.scan import Scale, Scan
from medgen.tasks.outputs.files import Facts, Output
from medgen.tasks.outputs.layout import Layout
from medgen.tasks.ways.base import Made

COLOUR = ReadOptions(colour=True)
FACTS = Facts("a small VAE", "5e" * 32, 7)


@cache
def _phantoms() -> tuple[Scan, Scan, Scan]:
    lesion = Lesion((20.0, -20.0, 20.0), 14.0, 215.0)
    return *head(0, shape=(14, 17, 12), spacing=11.0, lesions=[lesion]), chest_xray(0, size=24)


def brain(n: int, *, label: str = "", masked: bool = True, **more) -> Made:
    scan, mask, _ = _phantoms()
    # Oblique, so that a transposed axis or a lost rotation cannot hide.
    turn = np.eye(4)
    turn[:3, :3] = [[0.0, -0.8, 0.6], [1.0, 0.0, 0.0], [0.0, 0.6, 0.8]]
    grid = Grid(scan.grid.shape, turn @ scan.grid.affine)
    scan = replace(scan, grid=grid, voxels=scan.voxels + np.uint16(n))
    scan = scan.with_header(modality="MR", body_part="HEAD", synthetic=True)
    mask = replace(mask, grid=grid, voxels=np.roll(mask.voxels, n, 1))
    told = {"age": str(30 + n), "sex": "F"}
    return Made(torch.zeros(1, 4, 4, 4), scan, label, mask if masked else None, told, **more)


def chest(n: int, *, label: str = "", masked: bool = False) -> Made:
    scan = _phantoms()[2]
    mask = scan.with_voxels(np.roll(scan.voxels > np.median(scan.voxels), n, 1).astype(np.uint8), scale=Scale())
    scan = scan.with_voxels(np.minimum(scan.voxels, 200) + np.uint8(n))
    return Made(torch.zeros(1, 4, 4), scan, label, replace(mask, is_label=True) if masked else None)


def several(made, labels=("a", "b b"), **more) -> dict[str, Made]:
    return {f"SYN-{n:04d}": made(n, label=labels[n % len(labels)], **more) for n in range(1, 7)}


def written(folder: Path, layout: Layout, made: dict[str, Made], facts: Facts = FACTS) -> list[dict]:
    output = Output(folder, layout, facts)
    rows = [output.write(name, one) for name, one in made.items()]
    scores = ({"r_voxel": 1.25, "p_label": 0.5} for _ in rows)
    return output.finish(
        [{**json.loads(json.dumps(row)), "scores": score} for row, score in zip(rows, scores, strict=True)]
    )


def same_voxels(folder: Path, path: str, scan: Scan, *, millimetres: float | None = 1e-3) -> None:
    """The numbers are exact, and every voxel lies where it lay, whichever way the axes run."""
    read = io.read(
        str(folder / path) if ";" not in path else ";".join(str(folder / p) for p in path.split(";")), COLOUR
    )
    if millimetres is None:
        np.testing.assert_array_equal(read.physical(), scan.physical())
        return
    back = read.onto(scan.grid, outside=-1)
    np.testing.assert_array_equal(back.physical(), scan.physical())
    corners = np.sort(read.grid.corners(), axis=0) - np.sort(scan.grid.corners(), axis=0)
    assert np.abs(corners).max() <= millimetres


NNUNET = Layout("nnunet", "nifti", ("MR",), {"background": 0, "lesion": 1}, apart=True)
LAYOUTS = {
    "flat nifti": (Layout("flat", "nifti"), partial(several, brain, ("",))),
    "flat nifti, no masks": (Layout("flat", "nifti"), partial(several, brain, ("",), masked=False)),
    "classes nifti": (Layout("classes", "nifti"), partial(several, brain)),
    "classes nifti, no masks": (Layout("classes", "nifti"), partial(several, brain, masked=False)),
    "images+labels nifti": (Layout("images+labels", "nifti"), partial(several, brain)),
    "table nifti": (Layout("table", "nifti"), partial(several, brain)),
    "classes dicom": (Layout("classes", "dicom", ending=""), partial(several, brain)),
    "flat dicom, no masks": (Layout("flat", "dicom", ending=""), partial(several, brain, ("",), masked=False)),
    "images+labels dicom": (Layout("images+labels", "dicom", ending=""), partial(several, brain, ("",))),
    "classes png": (Layout("classes", "png", ending=".png"), partial(several, chest)),
    "images+labels png": (Layout("images+labels", "png", ending=".png"), partial(several, chest, masked=True)),
    "classes dicom, X-rays": (Layout("classes", "dicom", ending=""), partial(several, chest, masked=True)),
    "npz": (Layout("npz", "npz", ending=".npz"), partial(several, chest, ("0", "1"))),
    "npz of volumes": (Layout("npz", "npz", ending=".npz"), partial(several, brain, ("0", "1"), masked=False)),
    "nnunet": (NNUNET, partial(several, brain, ("",))),
    "nnunet png": (
        Layout("nnunet", "png", ("X-ray",), {"background": 0, "dark": 1}, ending=".png", apart=True),
        partial(several, chest, ("",), masked=True),
    ),
    "bids": (Layout("bids", "nifti", suffixes=("T1w",)), partial(several, brain, ("",))),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_reads_back_as_it_was_made(name, tmp_path):
    layout, make = LAYOUTS[name]
    made = make()
    rows = written(tmp_path, layout, made)
    table, found = index(tmp_path / "manifest.csv"), index(tmp_path)
    assert {row.case for row in table.rows} == set(made)
    assert {row.split for row in table.rows} == {"train"}
    in_folder = {row.path: row for row in found.rows}
    for row in table.rows:
        one = made[row.case]
        assert (row.label, bool(row.mask)) == (one.label, one.mask is not None)
        assert dict(row.covariates) == dict(one.covariates)
        kept = layout.format in ("nifti",) or (layout.format == "dicom" and one.scan.header.modality == "MR")
        same_voxels(tmp_path, row.path, one.scan, millimetres=1e-3 if kept else None)
        assert row.path in in_folder, sorted(in_folder)
        alike = in_folder[row.path]
        assert (alike.mask, alike.kind) == (row.mask, row.kind)
        assert alike.label == one.label
        if one.mask is not None:
            mask = io.read(tmp_path / row.mask)
            scan = io.read(";".join(str(tmp_path / part) for part in row.path.split(";")), COLOUR)
            assert mask.grid.shape == scan.grid.shape
            if layout.format != "png":
                np.testing.assert_allclose(mask.grid.affine, scan.grid.affine, atol=1e-4)
                assert mask.is_label
            assert mask.voxels.dtype.kind in "ui"
            same_voxels(tmp_path, row.mask, one.mask, millimetres=1e-3 if kept else None)
    assert len(found.rows) == len(made)
    assert [row["case"] for row in rows] == list(made)
