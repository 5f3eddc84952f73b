"""Where a NIfTI header says the voxels are, and how to say so: two forms, three units, no guessing."""

import math

import numpy as np
from jaxtyping import Float
from nibabel.nifti1 import Nifti1Header
from nibabel.quaternions import mat2quat, quat2mat
from nibabel.spatialimages import HeaderDataError

from medgen import log
from medgen.errors import GeometryError
from medgen.grid import Grid
from medgen.io.source import ReadOptions

_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_AGREE_MM = 0.01
_ROUNDING = 3e-7  # of a quaternion's part in float32, and of the sform it is compared with


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
        apart = _apart(found["sform"], _as_near(found["qform"], head, found["sform"]), shape)
        if apart > _AGREE_MM:
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
    if _apart(_as_near(np.asarray(head.get_qform()), head, grid.affine), grid.affine, grid.shape) > _AGREE_MM:
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
        return np.asarray(head.get_sform())
    head = head.copy()
    # The standard reads a left-out handedness as right.
    head["pixdim"][0] = head["pixdim"][0] or 1
    try:
        return np.asarray(head.get_qform())
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


def _as_near(qform: Float[np.ndarray, "4 4"], head: Nifti1Header, other: Float[np.ndarray, "4 4"]) -> np.ndarray:
    """The qform, turned as `other` is turned where three float32 cannot tell the two turns apart.

    A qform stores three parts of a quaternion and derives the fourth as the root of a difference; near
    half a turn rounding eats it, which is up to 0.3 mm in a head and nobody's disagreement.
    """
    handed = [1.0, 1.0, np.sign(np.linalg.det(qform[:3, :3]))]
    spacing = np.linalg.norm(other[:3, :3], axis=0)
    if not np.isfinite(qform).all() or not (np.isfinite(other).all() and spacing.all()):
        return qform
    turn = mat2quat(other[:3, :3] / spacing * handed)
    held = np.array([float(head[f"quatern_{part}"]) for part in "bcd"])
    half_a_turn = turn[0] < 1e-3  # where a quaternion and its negative are the same turn, nearly
    if np.abs(held - turn[1:]).max() > _ROUNDING and not (half_a_turn and np.abs(held + turn[1:]).max() < _ROUNDING):
        return qform
    near = qform.copy()
    near[:3, :3] = quat2mat(turn) * handed * np.linalg.norm(qform[:3, :3], axis=0)
    return near


__all__ = ["grid_of", "place"]
