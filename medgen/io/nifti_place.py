"""Where a NIfTI header says the voxels are, and how to say so: two forms, three units, no guessing."""

import math

import numpy as np
from jaxtyping import Float
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError

from medgen import log
from medgen.errors import GeometryError
from medgen.grid import Grid
from medgen.io.source import ReadOptions

_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_AGREE_MM = 0.01


def grid_of(
    head: Nifti1Header, shape: tuple[int, int, int], name: str, options: ReadOptions = ReadOptions()
) -> tuple[Grid, int]:
    """The grid of `shape` that a header describes, and the code of the form (sform or qform) that says so.

    Raises:
        GeometryError: no form, two that disagree and no word on which to take, an unknown unit of
            length, or an impossible affine.
    """
    millimetres = _millimetres(head, name)
    codes = {"sform": int(head["sform_code"]), "qform": int(head["qform_code"])}
    if max(codes.values()) <= 0:
        raise GeometryError(
            f"{name}: expected an orientation; found sform_code and qform_code 0, so nobody knows which side is left. "
            "If you know, write it: nibabel's image.set_sform(affine, 1), or convert from the original DICOM."
        )
    wanted = [options.xform] if codes.get(options.xform, 0) > 0 else [form for form in codes if codes[form] > 0]
    found = {form: np.diag([*[millimetres] * 3, 1.0]) @ _form(head, form, name) for form in wanted}
    if len(found) == 2:
        apart = _apart(found["sform"], found["qform"], shape)
        if not apart <= _AGREE_MM + _rounding(head, found["sform"], shape):
            raise GeometryError(
                f"{name}: expected sform and qform to agree within {_AGREE_MM} mm; they are {apart:.3g} mm apart. "
                "Pass xform='sform' or xform='qform' to choose."
            )
    try:
        return Grid(shape, found[wanted[0]]), codes[wanted[0]]
    except GeometryError as error:
        raise GeometryError(f"{name}: {error}") from None


def place(head: Nifti1Header, grid: Grid, name: str) -> None:
    """Write a grid into a header as both forms alike; a sheared one as sform only, because a qform cannot shear."""
    code = int(head["sform_code"]) or 1
    head.set_xyzt_units("mm", "sec")
    head.set_sform(grid.affine, code)
    head.set_qform(grid.affine, code)
    if _apart(head.get_qform(), grid.affine, grid.shape) > _AGREE_MM + _rounding(head, grid.affine, grid.shape):
        head["qform_code"] = 0
        log.note(f"{name}: its axes are not at right angles, so only the sform says where it is (qform_code 0).")


def _millimetres(head: Nifti1Header, name: str) -> float:
    unit = int(head["xyzt_units"]) & 7
    if unit not in _MILLIMETRES:
        raise GeometryError(f"{name}: expected metres, millimetres or microns; found NIfTI space unit {unit}.")
    if unit == 0:
        log.note(f"{name}: states no unit of length; taken as millimetres.")
    return _MILLIMETRES[unit]


def _form(head: Nifti1Header, form: str, name: str) -> Float[np.ndarray, "4 4"]:
    """The affine of one form, in the header's unit of length."""
    if form == "sform":
        return head.get_sform()
    head = head.copy()
    # The standard reads a left-out handedness as right.
    head["pixdim"][0] = head["pixdim"][0] or 1
    try:
        return head.get_qform()
    except (HeaderDataError, ValueError) as error:
        raise GeometryError(
            f"{name}: its qform is no rotation ({error}). Pass xform='sform' if the sform is right."
        ) from error


def _apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The furthest apart, in millimetres, that two affines put one voxel; inf where either is not finite."""
    # One voxel beyond the last, so that a singleton axis shows its direction too.
    corners = np.array(np.meshgrid(*[(0, n) for n in shape], [1], indexing="ij")).reshape(4, -1)
    apart = np.linalg.norm(((one - other) @ corners)[:3], axis=0).max()
    return float(apart) if np.isfinite(apart) else math.inf


def _rounding(head: Nifti1Header, affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far off, in millimetres, a voxel may be because a qform stores three float32 and derives the fourth.

    Near half a turn the fourth is the root of a difference that rounding has eaten: 0.3 mm in a head.
    """
    square = max(0.0, 1.0 - sum(float(head[f"quatern_{part}"]) ** 2 for part in "bcd"))
    lost = 2e-7  # three roundings of numbers below 1, doubled by squaring
    radians = 2 * (math.sqrt(square + lost) - math.sqrt(max(0.0, square - lost)))
    return radians * float(np.linalg.norm(affine[:3, :3], axis=0) @ np.asarray(shape))


__all__ = ["grid_of", "place"]
