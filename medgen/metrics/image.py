"""How far one scan is from another, as numbers and as maps."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def psnr(
    x: Float[Tensor, "b c *space"],
    y: Float[Tensor, "b c *space"],
    mask: Bool[Tensor, "*space"] | None = None,
    *,
    peak: float = 1.0,
) -> Float[Tensor, " b"]:
    """Peak signal to noise ratio in dB, 10 log10(peak^2 / mean squared error), inside `mask`.

    >>> float(psnr(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1)).round())
    20.0
    """
    squared = (x - y).square()
    error = squared.flatten(1).mean(1) if mask is None else squared[..., mask].flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / error.clamp(min=1e-20))


def ssim_map(
    x: Float[Tensor, "b c *space"],
    y: Float[Tensor, "b c *space"],
    *,
    window: int = 7,
    sigma: float | None = None,
    peak: float = 1.0,
) -> Float[Tensor, "b 1 *space"]:
    """Structural similarity at every voxel, mean over channels, in [-1, 1].

    Wang et al. 2004, equation 13, with a uniform window whose borders are mirrored, or a Gaussian one.

    Args:
        x, y: images or volumes, values up to `peak`.
        window: odd edge length of the uniform window in voxels, shortened along axes that are smaller.
        sigma: standard deviation of a Gaussian window in voxels (1.5 in the paper); None for the uniform one.
        peak: the range of values.
    """

    def mean(values: Tensor) -> Tensor:
        return local_mean(values, window) if sigma is None else smoothed(values, sigma)

    mean_x, mean_y = mean(x), mean(y)
    var_x = (mean(x * x) - mean_x**2).clamp(min=0)
    var_y = (mean(y * y) - mean_y**2).clamp(min=0)
    cov = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean(1, keepdim=True)


def local_mean(values: Float[Tensor, "b c *space"], window: int) -> Float[Tensor, "b c *space"]:
    """Mean over a cube of `window` voxels around each voxel, mirrored at the border; one axis at a time."""
    dims = values.ndim - 2
    pool = functional.avg_pool2d if dims == 2 else functional.avg_pool3d
    for axis in range(dims):
        half = min(window // 2, values.shape[2 + axis] - 1)
        if half == 0:
            continue
        padding = [0, 0] * dims
        padding[2 * (dims - 1 - axis)] = padding[2 * (dims - 1 - axis) + 1] = half
        kernel = [1] * dims
        kernel[axis] = 2 * half + 1
        values = pool(functional.pad(values, padding, mode="reflect"), kernel, stride=1)
    return values


def smoothed(x: Float[Tensor, "b c *space"], sigma: float) -> Float[Tensor, "b c *space"]:
    """Gaussian mean over the scan's own voxels: weights exp(-d^2 / 2 sigma^2), normalised also at the border.

    Args:
        x: images or volumes.
        sigma: in voxels; 0 changes nothing.

    >>> smoothed(torch.ones(1, 1, 5, 7), 2.0).allclose(torch.ones(1, 1, 5, 7))
    True
    """
    if sigma <= 0:
        return x
    for axis in range(2, x.ndim):
        place = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)
        weights = torch.softmax(-0.5 * ((place[:, None] - place[None, :]) / sigma).square(), 1)
        x = (x.movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return x


__all__ = ["local_mean", "psnr", "smoothed", "ssim_map"]
