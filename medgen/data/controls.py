"""Inputs that no score may find healthier than healthy scans: made from a prepared healthy scan, and no body's."""

from collections.abc import Iterator

import numpy as np

from medgen.data.lesions import filled_body
from medgen.scan import Scan

CONTROLS = ("constant", "blurred", "noise", "flipped", "inverted")
# Of a scan's range: how much a constant one rises across, for a scan without any contrast is refused.
_RAMP = 1e-2
_BLUR = 2.0


def constant(scan: Scan) -> Scan:
    """The body's mean everywhere, but for a rise by a hundredth of the scan's range along i."""
    body = filled_body(scan)
    ramp = np.linspace(-0.5, 0.5, scan.grid.shape[0])[:, None, None]
    values = _values(scan)
    flat = [np.full_like(one, one[body].mean()) + _RAMP * np.ptp(one) * ramp for one in values]
    return _held(scan, np.stack(flat))


def blurred(scan: Scan) -> Scan:
    """The scan through a Gaussian of 2 voxels."""
    from scipy.ndimage import gaussian_filter

    width = [_BLUR if n > 1 else 0 for n in scan.grid.shape]
    return _held(scan, np.stack([gaussian_filter(one, width, mode="nearest") for one in _values(scan)]))


def noise(scan: Scan, rng: np.random.Generator) -> Scan:
    """White noise with the scan's histogram: its voxels in any order."""
    order = rng.permutation(int(np.prod(scan.grid.shape)))
    return _held(scan, np.stack([one.reshape(-1)[order].reshape(one.shape) for one in _values(scan)]))


def flipped(scan: Scan) -> Scan:
    """Upside down: along the axis nearest to inferior-superior, or the rows of an image."""
    codes = scan.grid.axcodes
    axis = 1 if scan.is_planar else next(n for n, code in enumerate(codes) if code in "IS")
    return scan.with_voxels(np.flip(scan.voxels, axis + 1).copy()).with_header(synthetic=True)


def inverted(scan: Scan) -> Scan:
    """Bright for dark inside the body, a stand-in for another modality.

    value -> p1 + p99 - value there, of the body's percentiles, kept within the scan's range.
    """
    body, turned = filled_body(scan), []
    for values in _values(scan):
        ends = np.percentile(values[body], [1, 99]).sum()
        turned.append(np.where(body, np.clip(ends - values, values.min(), values.max()), values))
    return _held(scan, np.stack(turned))


def controls(scan: Scan, rng: np.random.Generator) -> Iterator[tuple[str, Scan]]:
    """Every control of a scan, by name."""
    yield "constant", constant(scan)
    yield "blurred", blurred(scan)
    yield "noise", noise(scan, rng)
    yield "flipped", flipped(scan)
    yield "inverted", inverted(scan)


def _values(scan: Scan) -> np.ndarray:
    """Stored values as numbers that can be added, those not measured the lowest."""
    values = scan.voxels.astype(np.float64)
    known = np.isfinite(values) if scan.valid is None else np.isfinite(values) & scan.valid
    return np.where(known, values, values[known].min())


def _held(scan: Scan, values: np.ndarray) -> Scan:
    """The scan with other stored values, in its own type."""
    kind = scan.voxels.dtype
    held = values.round().astype(kind) if kind.kind in "iub" else values.astype(kind)
    return scan.with_voxels(held).with_header(synthetic=True)


__all__ = ["CONTROLS", "blurred", "constant", "controls", "flipped", "inverted", "noise"]
