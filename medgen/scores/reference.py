"""What a score keeps of the healthy scans it learned from, such that it can leave one of them out.

A scan that a score learned from looks more usual than it is: it lies at distance zero from itself. So a score knows
its scans again by a pair of numbers and scores them as though it had not seen them. That makes healthy scores honest
where there are no others to learn from than the training scans.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.errors import DataError
from medgen.metrics.image import smoothed
from medgen.scores.base import Known

# A voxel's variance is drawn towards its neighbourhood's, a Gaussian of this width in voxels, as if so many scans
# had shown that; and its sd is at least this share of the typical one.
_NEAR, _NEAR_SCANS, _LEAST_SHARE = 1.5, 8.0, 0.1
_LEAST_SD = 1e-3


def fingerprints(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b 2"]:
    """Two numbers, double precision, that tell scans apart and say nothing of them."""
    flat = x.detach().cpu().double().flatten(1)
    phase = torch.arange(flat.shape[1], dtype=torch.float64).square() * 0.618
    return torch.stack([flat @ phase.cos(), flat @ phase.sin()], 1) / flat.shape[1] ** 0.5


def own_rows(x: Float[Tensor, "b c *space"], known: Float[Tensor, "n 2"]) -> Int[Tensor, " b"]:
    """Which of the scans with these fingerprints each scan is; -1 where it is none of them."""
    mine, known = fingerprints(x), known.cpu()
    if not len(known):
        return torch.full((len(x),), -1)
    apart = (mine[:, None] - known[None]).abs().amax(2)
    nearest = apart.min(1)
    same = nearest.values <= 1e-7 * (1 + mine.abs().amax(1))
    return torch.where(same, nearest.indices, -1)


def enough(count: int, least: int, score: str) -> None:
    """Refuse to learn from too few scans.

    Raises:
        DataError: there are fewer than `least`.
    """
    if count < least:
        raise DataError(f"The score {score!r} learns from {least} healthy scans or more; there are {count}. Add scans.")


# -- vectors -------------------------------------------------------------------------------------------


def nearest_mean(
    rows: Float[Tensor, "b d"], bank: Float[Tensor, "n d"], own: Int[Tensor, " b"], k: int
) -> Float[Tensor, " b"]:
    """Mean distance of each row to the `k` nearest of the bank, its own row left out."""
    apart = torch.cdist(rows, bank, compute_mode="donot_use_mm_for_euclid_dist")
    seen = own >= 0
    apart[seen, own[seen]] = torch.inf
    k = min(k, len(bank) - 1)
    return apart.topk(k, largest=False).values.mean(1)


def learned_gaussian(rows: Float[Tensor, "n d"]) -> dict[str, Tensor]:
    """A Gaussian of standardised numbers with the covariance a S + r I (Ledoit & Wolf 2004), by its directions."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    rows = rows.double()
    mean, scale = rows.mean(0), rows.std(0)
    scale = scale.clamp(min=max(1e-3 * float(scale.max()), 1e-9))
    scaled = (rows - mean) / scale
    shrinkage = float(ledoit_wolf_shrinkage(scaled.numpy(), assume_centered=True))
    rest = max(shrinkage * float(scaled.square().mean()), 1e-6)
    lengths, directions = torch.linalg.svd(scaled, full_matrices=False)[1:]
    kept = lengths > 1e-6 * lengths[:1]
    variances = (1 - shrinkage) * lengths[kept].square() / len(rows)
    found = {"mean": mean, "scale": scale, "directions": directions[kept], "variances": variances}
    told = torch.tensor([rest, 1 - shrinkage, float(len(rows))])
    return {name: tensor.float() for name, tensor in (found | {"shrinkage": told}).items()}


def gaussian_distance(rows: Float[Tensor, "b d"], known: Known, own: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Mahalanobis distance over sqrt(d); of a row that was learned from, with mean and covariance of the others.

    Without row x the scatter is S - n/(n-1) (x - m)(x - m)'; its inverse follows by Sherman & Morrison (1950).
    """
    known = {name: tensor.to(rows.device, torch.float64) for name, tensor in known.items()}
    rest, share, count = known["shrinkage"].tolist()
    centred = (rows.double() - known["mean"]) / known["scale"]
    codes = centred @ known["directions"].T
    beyond = (centred.square().sum(1) - codes.square().sum(1)).clamp(min=0)
    squared = (codes.square() / (known["variances"] + rest)).sum(1) + beyond / rest
    return (left_out(squared, own.to(rows.device) >= 0, share, count) / rows.shape[1]).sqrt().float()


def left_out(
    squared: Float[Tensor, "b *places"], own: Bool[Tensor, " b"], share: float, count: float
) -> Float[Tensor, "b *places"]:
    """Squared Mahalanobis distances, those of `own` rows as if mean and covariance were the others'.

    Args:
        squared: under the covariance `share` S + what does not depend on the scans.
        own: which rows are among the `count` that mean and S are of.
        share: of S in the covariance.
        count: rows.
    """
    away = count / (count - 1)
    without = away**2 * squared / (1 - share / (count - 1) * squared).clamp(min=1e-6)
    return torch.where(own.reshape(-1, *[1] * (squared.ndim - 1)), without, squared)


# -- places --------------------------------------------------------------------------------------------


def learned_places(maps: Iterable[tuple[Float[Tensor, "b f *space"], Batch]], score: str) -> dict[str, Tensor]:
    """Mean and variance of each feature at each place, the variance drawn towards its neighbourhood's.

        v = (n v_own + 8 G v_own) / (n + 8)

    Padding counts for nothing. A place that fewer than two scans have is like the others.

    Args:
        maps: features of batches, NaN where there are none, and the batches themselves.
        score: who asks, for the refusal.

    Returns:
        mean, variance (f, *space), count (*space), least sd (f,) and the scans' fingerprints.
    """
    sums: list[Tensor] = []
    prints: list[Tensor] = []
    for features, batch in maps:
        weight = _seen(features, batch)
        filled = torch.where(weight, features, 0).cpu()
        wide = torch.float64
        new = [filled.sum(0, dtype=wide), filled.square().sum(0, dtype=wide), weight[:, 0].sum(0).to("cpu", wide)]
        sums = [one + more for one, more in zip(sums, new, strict=True)] if sums else new
        prints.append(fingerprints(batch.x))
    enough(sum(map(len, prints)), 3, score)
    total, squares, count = sums
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
    usual = count >= 2
    typical = torch.stack([one[usual].mean() if bool(usual.any()) else one.mean() for one in variance])
    shape = (-1, *[1] * usual.ndim)
    mean = torch.where(usual, mean, torch.stack([one[usual].mean() for one in mean]).reshape(shape))
    variance = torch.where(usual, variance, typical.reshape(shape))
    near = smoothed(variance[None].float(), _NEAR)[0]
    variance = (count * variance + _NEAR_SCANS * near) / (count + _NEAR_SCANS)
    least = _LEAST_SHARE * typical.sqrt() + _LEAST_SD
    found = {"mean": mean, "variance": variance, "count": count, "least": least}
    return {name: tensor.float() for name, tensor in found.items()} | {"own": torch.cat(prints)}


def place_z(
    features: Float[Tensor, "b f *space"], known: Known, own: Bool[Tensor, " b"]
) -> Float[Tensor, "b f *space"]:
    """How many healthy standard deviations each feature lies above the healthy mean at its place.

    Scans in `own` were learned from; mean and spread are the other scans' for them.
    """
    mean, variance, count, least = (known[name].to(features) for name in ("mean", "variance", "count", "least"))
    least = least.reshape(-1, *[1] * (features.ndim - 2))
    away = features - mean
    z = away / variance.sqrt().maximum(least)
    if not bool(own.any()):
        return z
    # The sum of squares without a scan is S - n/(n-1) a^2, a its way from the mean; smoothing is linear.
    one, two, most = (count - 1).clamp(min=1), (count - 2).clamp(min=1), count + _NEAR_SCANS - 1
    squares = away[own].nan_to_num().square()
    spread = (one * squares + _NEAR_SCANS * smoothed(squares, _NEAR)) / most
    without = (one * variance - count / one * spread).clamp(min=0) / two
    z[own] = away[own] * count / one / without.sqrt().maximum(least)
    return z


def _seen(features: Tensor, batch: Batch) -> Tensor:
    """Where features count, (b, f, *space)."""
    seen = features.isfinite()
    return seen if batch.real is None else seen & batch.real[:, None].to(seen.device)


__all__ = [
    "enough", "fingerprints", "gaussian_distance", "learned_gaussian", "learned_places", "left_out", "nearest_mean",
    "own_rows", "place_z",
]  # fmt: skip
