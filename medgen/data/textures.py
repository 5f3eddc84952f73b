"""What a lesion may be made of besides brightness: textures with random phases, and tissue that moves."""

from typing import cast

import numpy as np
from jaxtyping import Bool, Float

from medgen.data.painting import Field, indices

# The width, in voxels, of the neighbourhood that has a mean and a spread.
_NEAR = 2.0

Values = Float[np.ndarray, "i j k"]
Voxels = Bool[np.ndarray, "i j k"]


def local_moments(values: Field, body: Voxels) -> tuple[Values, Values]:
    """Mean and standard deviation about each voxel (Gaussian window of 2 voxels), of the body's voxels alone."""
    weight = _near(body.astype(np.float64))
    weight = np.maximum(weight, 1e-6)
    mean = _near(np.where(body, values, 0.0)) / weight
    rest = np.where(body, values - mean, 0.0)
    return mean, np.sqrt(_near(rest**2) / weight)


def texture(values: Field, body: Voxels, rng: np.random.Generator) -> Values:
    """Noise with the body's own fine structure, of mean 0 and spread 1.

    What the body's values are beyond their local mean, in local spreads, keeps its spectrum and loses its phases
    (Theiler et al. 1992, surrogate data by phase randomisation): as fine as the tissue, and of no place in it.
    """
    mean, spread = local_moments(values, body)
    rest = np.where(body, (values - mean) / np.maximum(spread, 1e-6 * (float(np.ptp(values)) or 1.0)), 0.0)
    waves = np.fft.rfftn(rng.normal(size=values.shape))
    amplitude = np.abs(np.fft.rfftn(rest))
    drawn = np.fft.irfftn(amplitude * waves / np.maximum(np.abs(waves), 1e-12), s=values.shape, axes=(0, 1, 2))
    return drawn / max(float(drawn.std()), 1e-12)


def warped_about(values: Field, shape: Voxels, strength: float) -> Values:
    """Values moved away from (towards, if negative) the middle of each connected part of the shape.

    new(p) = old(p - u(p)) with u = strength w (p - middle); w is 1 deep inside and falls smoothly to 0 at the edge, so
    that nothing outside moves and nothing folds for strengths below 0.6.
    """
    from scipy.ndimage import distance_transform_edt, label, map_coordinates

    at = indices(values.shape)
    named, count = cast("tuple[np.ndarray, int]", label(shape, np.ones((3, 3, 3))))
    # Beyond the border there is room, too: a lesion at the edge of the image does not end there.
    inner = np.pad(shape, [(1, 1) if n > 1 else (0, 0) for n in shape.shape])
    depth = np.asarray(distance_transform_edt(inner))
    depth = depth[tuple(slice(1, -1) if n > 1 else slice(None) for n in shape.shape)]
    moved = np.zeros_like(at)
    for one in range(1, count + 1):
        part = named == one
        ramp = np.clip(depth[part] / max(float(depth[part].max()), 1.0), 0, 1)
        moved[part] = strength * (ramp**2 * (3 - 2 * ramp))[:, None] * (at[part] - at[part].mean(0))
    return map_coordinates(values, np.moveaxis(at - moved, -1, 0), order=1, mode="nearest")


def _near(values: Field) -> Values:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, [_NEAR if n > 1 else 0 for n in values.shape], mode="constant")


__all__ = ["local_moments", "texture", "warped_about"]
