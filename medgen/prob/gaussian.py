"""The straight path from noise to a Gaussian field, in closed form: where flow matching begins."""

from math import log, pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

# How many scans the spectrum's average over directions counts for.
_SPECTRAL_SCANS = 8.0
# How many scans a voxel's spread is drawn towards the mean spread as if they had shown that.
_SPREAD_SCANS = 2.0
_LEAST_VARIANCE = 1e-6


class GaussianPath(nn.Module):
    """y_t = (1 - t) e + t y for noise e and y ~ N(m, C' diag(p) C), C the cosine transform.

    y is a scan x standardised voxel by voxel. Such scans have nearly this covariance: neighbours are alike and
    places much the same, which cosines diagonalise (Ahmed et al. 1974, "Discrete cosine transform"). A frequency
    of power p then has, at time t, the variance s^2 = t^2 p + (1 - t)^2, and the best velocity is linear:

        v(y, t) = m + (t p - (1 - t)) / s^2 * (y - t m)

    Along it the coordinates w = C (y - t m) / s stand still. Mean and power are parameters, begun by `fit`.

    Args:
        channels: values per voxel.
        space: voxels along each axis.
        conditions: numbers of a scan's condition, each of which moves the mean; 0 for none.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, channels: int, space: tuple[int, ...], conditions: int = 0) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(1, channels, *space))
        self.register_buffer("spread", torch.ones(1, channels, *space))
        self.mean = nn.Parameter(torch.zeros(1, channels, *space))
        self.log_power = nn.Parameter(torch.zeros(channels, *space))
        self.offsets = nn.Parameter(torch.zeros(conditions, channels, *space)) if conditions else None
        for axis, size in enumerate(space):
            self.register_buffer(f"cosines{axis}", _cosines(size), persistent=False)
        self._axes = len(space)

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n c *space"], cond: Float[Tensor, "n numbers"] | None = None) -> None:
        """Everything from scans: centre and spread of voxels, mean given the condition, power of frequencies.

        Few scans suffice: a voxel's spread is drawn towards the mean spread, so that voxels that are the same in all
        scans, such as background, do not become infinitely important; a frequency's power towards the average over
        directions; and the condition's effect towards none (ridge regression).
        """
        count = len(x)
        self.centre.copy_(x.mean(0, keepdim=True))
        variance = (x - self.centre).square().mean(0, keepdim=True)
        variance = (count * variance + _SPREAD_SCANS * variance.mean()) / (count + _SPREAD_SCANS)
        self.spread.copy_(variance.clamp(min=_LEAST_VARIANCE).sqrt())
        y = self.standardised(x)
        if self.offsets is not None and cond is not None:
            centred = cond - cond.mean(0)
            inner = centred.T @ centred + torch.eye(cond.shape[1]).to(cond)
            self.offsets.copy_(torch.linalg.solve(inner, centred.T @ y.flatten(1)).reshape(self.offsets.shape))
            self.mean.copy_(-torch.tensordot(cond.mean(0), self.offsets, 1)[None])
        raw = self._turned(y - self.mean_for(cond)).square().sum(0) / max(1, count - 1)
        rings = _rings(tuple(x.shape[2:])).to(x.device).flatten()
        sums = raw.new_zeros(len(raw), int(rings.max()) + 1).index_add(1, rings, raw.flatten(1))
        average = (sums / torch.bincount(rings))[:, rings].reshape(raw.shape)
        power = (count * raw + _SPECTRAL_SCANS * average) / (count + _SPECTRAL_SCANS)
        self.log_power.copy_(power.clamp(min=_LEAST_VARIANCE).log())

    def standardised(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        """y of scans x."""
        return (x - self.centre) / self.spread

    def scan(self, y: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        """x of standardised scans y."""
        return self.centre + self.spread * y

    def mean_for(self, cond: Float[Tensor, "b numbers"] | None) -> Float[Tensor, "b c *space"]:
        """The mean under each scan's condition (one row for all of them without any)."""
        if self.offsets is None or cond is None:
            return self.mean
        with torch.autocast(cond.device.type, enabled=False):
            return self.mean + torch.tensordot(cond, self.offsets, 1)

    def velocity(
        self, y: Float[Tensor, "b c *space"], time: Float[Tensor, " b"], mean: Float[Tensor, "m c *space"]
    ) -> Float[Tensor, "b c *space"]:
        """The best velocity at `y`, for the Gaussian with this mean."""
        t = _over(time, y)
        power = self.log_power.exp()
        gain = (t * power - (1 - t)) / self._variance(t)
        return mean + self._turned(gain * self._turned(y - t * mean), back=True)

    def whiten(
        self, y: Float[Tensor, "b c *space"], time: Float[Tensor, " b"], mean: Float[Tensor, "m c *space"]
    ) -> Float[Tensor, "b c *space"]:
        """The coordinates w of scans at a time."""
        t = _over(time, y)
        return self._turned(y - t * mean) / self._variance(t).sqrt()

    def whitened(
        self, y: Float[Tensor, "b c *space"], time: Float[Tensor, " b"], mean: Float[Tensor, "m c *space"]
    ) -> Float[Tensor, "b c *space"]:
        """`whiten`, turned back to space: the noise at time 0 from which the Gaussian's path leads to `y`."""
        return self._turned(self.whiten(y, time, mean), back=True)

    def colour(
        self, w: Float[Tensor, "b c *space"], time: Float[Tensor, " b"], mean: Float[Tensor, "m c *space"]
    ) -> Float[Tensor, "b c *space"]:
        """The inverse of `whiten`."""
        t = _over(time, w)
        return t * mean + self._turned(w * self._variance(t).sqrt(), back=True)

    def carried(self, extra: Float[Tensor, "b c *space"], time: Float[Tensor, " b"]) -> Float[Tensor, "b c *space"]:
        """How fast w moves where the velocity is the Gaussian's plus `extra`."""
        return self._turned(extra) / self._variance(_over(time, extra)).sqrt()

    def scaled(self, raw: Float[Tensor, "b c *space"], time: Float[Tensor, " b"]) -> Float[Tensor, "b c *space"]:
        """`raw` times how far, about, the best velocity of scans of this spectrum may be from the Gaussian's.

        It is sqrt(p) / s, the spread of y given y_t over 1 - t, times t sqrt(p) / s and (1 - t) / s: little is known
        of a frequency early, and late there is little left to know where the density is smooth.
        """
        t = _over(time, raw)
        gain = t * (1 - t) * self.log_power.exp() * self._variance(t) ** -1.5
        return self._turned(gain * self._turned(raw), back=True)

    @torch.no_grad()
    def emerging(self, chances: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Times at which a frequency, any of them, emerges from the noise: t^2 p / s^2 is uniform."""
        which = torch.randint(self.log_power.numel(), chances.shape).to(chances.device)
        return torch.sigmoid(0.5 * (torch.logit(chances, eps=1e-6) - self.log_power.flatten()[which]))

    @torch.no_grad()
    def emergence(self, time: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The density of `emerging`: the mean over frequencies of 2 t (1 - t) p / s^4."""
        t = _over(time, self.log_power[None])
        rate = 2 * t * (1 - t) * self.log_power.exp() * self._variance(t) ** -2
        return rate.flatten(1).mean(1)

    def log_prob(self, w: Float[Tensor, "b c *space"]) -> Float[Tensor, " b"]:
        """log density, nats, of scans x that have coordinates `w` at time 1, where `w` is standard normal."""
        volume = 0.5 * self.log_power.sum() + self.spread.log().sum()
        return -0.5 * (w.square() + log(2 * pi)).flatten(1).sum(1) - volume

    def _variance(self, t: Tensor) -> Tensor:
        return t.square() * self.log_power.exp() + (1 - t).square()

    def _turned(self, y: Tensor, *, back: bool = False) -> Tensor:
        """The orthonormal cosine transform over space, or its inverse."""
        with torch.autocast(y.device.type, enabled=False):
            for axis in range(self._axes):
                cosines = getattr(self, f"cosines{axis}")
                y = (y.movedim(2 + axis, -1) @ (cosines if back else cosines.T)).movedim(-1, 2 + axis)
        return y


def _cosines(size: int) -> Float[Tensor, "n n"]:
    """Rows are the orthonormal cosines of the second kind."""
    place = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(pi / size * (place[None, :] + 0.5) * place[:, None]) * sqrt(2 / size)
    waves[0] /= sqrt(2)
    return waves.float()


def _rings(space: tuple[int, ...]) -> Tensor:
    """Which frequencies are about equally high, as indices on a grid of `space`."""
    axes = torch.meshgrid(*[torch.arange(n) / n for n in space], indexing="ij")
    return (torch.stack([axis.square() for axis in axes]).sum(0).sqrt() * max(space)).round().long()


def _over(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.ndim - 1))


__all__ = ["GaussianPath"]
