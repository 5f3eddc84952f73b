"""Marks what does not belong, having learned to tell anomalies that were drawn into healthy scans from the rest.

No ill scan is needed: healthy training scans get random anomalies (`medgen.nets.anomalies`), and a small perceptron
learns from single voxels whether they lie in one. Learning from drawn anomalies is as in Zavrtanik et al. 2021
("DRAEM"), Tan et al. 2020 ("Detecting outliers with foreign patch interpolation") and Schlueter et al. 2022 ("Natural
synthetic anomalies"); this kind of method won the MOOD challenges.

Anatomy that is roughly in the same place in every scan need not be learned by heart. At each voxel the perceptron sees
local features at several scales (Gaussian means, spreads, gradients) held against healthy ones at the same place:

    z = (f - m) / s,    f - m,    m,    log s,    s^2 = (n0 * mean variance around + (n - 1) * variance) / (n0 + n - 1)

While learning, a scan's own part is taken out of m and s, as it is not in them when new scans are marked.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from medgen.data.dataset import Batch
from medgen.log import track
from medgen.metrics.image import smoothed
from medgen.models.abilities import Ability
from medgen.models.base import Loss, Model, ModelConfig, Player
from medgen.nets.anomalies import KINDS, Spoilt, spoilt

# Of a scan: standard deviations, voxels, of the Gaussians of which means, spreads and gradients are taken.
_MEANS, _SPREADS, _GRADIENTS = (0.0, 1.0, 2.0, 4.0), (1.0, 2.0), (0.0, 1.5)
_FEATURES = len(_MEANS) + len(_SPREADS) + len(_GRADIENTS)
# A z beyond this tells no more.
_MOST_Z = 8.0
# Scans that the neighbourhood's variance counts for beside a voxel's own, and how far it reaches, voxels.
_AROUND, _REACH = 8, 2.0
# What is darker is air, of which hardly anything needs to be learned.
_AIR = 0.05
# Scans that anomalies are drawn into, at most: more scans get fewer each.
_MOST_SCANS = 4096
_ROWS_A_STEP = 4096


class Segmenter(Model):
    """Marks anomalies.

    Example:
        >>> model = Segmenter(Segmenter.Config(shape=(16, 16), draws=2, steps=10))
        >>> model.finalise([Batch(torch.rand(4, 1, 16, 16))])
        >>> model.mark(torch.rand(3, 1, 16, 16)).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(ModelConfig):
        """A segmenter.

        Args:
            kind: 'segmenter'.
            width: of the perceptron's two hidden layers.
            kinds: of anomalies to learn from.
            most: anomalies a scan has at most while learning.
            draws: scans with anomalies to learn from.
            voxels: to learn from in all; a third of them in anomalies.
            steps: of learning.
            smooth: standard deviation, voxels, of the Gaussian mean taken of what the perceptron says.
        """

        kind: Literal["segmenter"] = "segmenter"
        width: int = Field(default=96, ge=1)
        kinds: tuple[str, ...] = KINDS
        most: int = Field(default=8, ge=1)
        draws: int = Field(default=240, ge=1)
        voxels: int = Field(default=1_440_000, ge=30)
        steps: int = Field(default=8000, ge=1)
        smooth: float = Field(default=1.5, ge=0)

        @field_validator("kinds")
        @classmethod
        def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
            if not kinds or set(kinds) - set(KINDS):
                raise ValueError(f"kinds are some of {', '.join(KINDS)}")
            return kinds

    config: "Segmenter.Config"
    mean: Tensor
    variance: Tensor
    around: Tensor
    count: Tensor

    def __init__(self, config: "Segmenter.Config") -> None:
        super().__init__()
        self.config = config
        features = _FEATURES * config.channels
        first, second, last = (nn.Linear(a, b) for a, b in pairwise((4 * features, config.width, config.width, 1)))
        self.net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last).requires_grad_(False)
        for name in ("mean", "variance", "around"):
            self.register_buffer(name, torch.zeros(features, *config.shape))
        self.register_buffer("count", torch.zeros(()))

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """A segmenter marks anomalies, and nothing else."""
        return frozenset[Ability]({"marks"})

    # -- learning ----------------------------------------------------------------------------------

    def players(self) -> list[Player]:
        """Nobody: `finalise` does it all, as voxels of a few scans are learned from again and again."""
        return []

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """Cross-entropy of what is said of voxels of scans with drawn anomalies, nats a scan."""
        drawn = spoilt(batch.x, self.config.kinds, most=self.config.most)
        odds = self._odds(_features(drawn.x))
        crossed = functional.binary_cross_entropy_with_logits(odds, drawn.mask.to(odds), reduction="none")
        total = crossed.flatten(1).sum(1)
        return Loss(total, {"cross-entropy": total})

    def finalise(self, batches: Iterable[Batch]) -> None:
        """Learn what is healthy at each place, draw anomalies, and learn to tell them."""
        scans = [scan for batch in batches for scan in batch.x.split(1)]
        kept = scans[:: -(-len(scans) // _MOST_SCANS)]
        with torch.no_grad():
            self._learn_healthy(scans)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            with torch.no_grad():
                rows, ill = self._drawn(kept)
            self._learn_to_tell(rows, ill)

    def _learn_healthy(self, scans: list[Tensor]) -> None:
        total, squares = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        for scan in track(scans, "Learning what is healthy"):
            found = _features(scan)[0]
            total += found
            squares += found.square()
        self.count.fill_(len(scans))
        self.mean.copy_(total / len(scans))
        self.variance.copy_((squares / len(scans) - self.mean.square()).clamp(min=0))
        self.around.copy_(smoothed(self.variance[None], _REACH)[0])

    def _drawn(self, scans: list[Tensor]) -> tuple[Float[Tensor, "n f"], Bool[Tensor, " n"]]:
        """What is seen of voxels of scans with anomalies, and which lie in one."""
        config, rows, ill = self.config, [], []
        counts = [config.draws * (n + 1) // len(scans) - config.draws * n // len(scans) for n in range(len(scans))]
        for n, scan in enumerate(track(scans, "Drawing anomalies")):
            own = _features(scan) if counts[n] else None
            pair = torch.cat([scan, scans[(n + 1) % len(scans)]])
            for _ in range(counts[n]):
                drawn = spoilt(pair, config.kinds, most=config.most, least=1, only_first=True)
                places, inside = _picked(drawn, max(1, config.voxels // config.draws))
                seen = self._held_against(_features(drawn.x), own)[0]
                rows.append(seen.flatten(1)[:, places].T)
                ill.append(inside)
        return torch.cat(rows), torch.cat(ill)

    def _learn_to_tell(self, rows: Float[Tensor, "n f"], ill: Bool[Tensor, " n"]) -> None:
        optimizer = torch.optim.AdamW(self.net.parameters(), 4e-3)
        steps = self.config.steps
        rising = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(2, steps))
        target = ill.to(rows)
        self.net.requires_grad_(True)
        for _ in track(range(steps), "Learning to tell them"):
            chosen = torch.randint(len(rows), (_ROWS_A_STEP,), device=rows.device)
            odds = self.net(rows[chosen])[:, 0]
            loss = functional.binary_cross_entropy_with_logits(odds, target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rising.step()
        self.net.requires_grad_(False)

    # -- marking -----------------------------------------------------------------------------------

    @torch.no_grad()
    def mark(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b 1 *space"]:
        """Log-odds that each voxel belongs to an anomaly, as if a third of all voxels did; smoothed."""
        return torch.cat([smoothed(self._odds(_features(one)), self.config.smooth) for one in x.split(1)])

    def _odds(self, found: Float[Tensor, "b f *space"]) -> Float[Tensor, "b 1 *space"]:
        """What the perceptron says of each voxel."""
        return self.net(self._held_against(found).movedim(1, -1)).movedim(-1, 1)

    def _held_against(self, found: Tensor, own: Tensor | None = None) -> Float[Tensor, "b f *space"]:
        """Features held against healthy ones, without the part that `own` has in those."""
        mean, variance, n = self.mean, self.variance, self.count.clamp(min=3)
        if own is not None and bool(self.count > 2):
            shift, rest = own[0] - mean, n / (n - 1)
            mean, variance = mean - shift / (n - 1), (rest * (variance - shift.square() / (n - 1))).clamp(min=0)
        least = 0.01 * self.variance.flatten(1).mean(1).reshape(-1, *[1] * (found.ndim - 2)) + 1e-6
        spread = ((_AROUND * self.around + (n - 1) * variance) / (_AROUND + n - 1) + least).sqrt()
        away = found - mean
        z = (away / spread).clamp(-_MOST_Z, _MOST_Z)
        given = torch.stack([mean, spread.log()]).flatten(0, 1).expand(len(found), *[-1] * (found.ndim - 1))
        return torch.cat([z / 3, away, given], 1)


def _features(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b f *space"]:
    """Local features of every voxel."""
    means = {sigma: smoothed(x, sigma) for sigma in _MEANS}
    spreads = [(smoothed(x.square(), s) - means[s].square()).clamp(min=0).sqrt() for s in _SPREADS]
    axes = range(2, x.ndim)
    fine = smoothed(x, 0.7)
    steepness = torch.stack([torch.gradient(fine, dim=axis)[0].square() for axis in axes]).sum(0).sqrt()
    return torch.cat([*means.values(), *spreads, *(smoothed(steepness, s) for s in _GRADIENTS)], 1)


def _picked(drawn: Spoilt, count: int) -> tuple[Tensor, Bool[Tensor, " n"]]:
    """`count` random voxels of the first scan, flat, and which lie in an anomaly: a third of them, where there are."""
    inside, clear = drawn.mask[0, 0].flatten(), drawn.clear[0, 0].flatten()
    body = drawn.x[0].amax(0).flatten() > _AIR
    ill, well = (inside & clear).nonzero()[:, 0], (~inside & clear & body).nonzero()[:, 0]
    anywhere = (~inside & clear).nonzero()[:, 0]
    kinds = [(ill, count // 3), (well, count // 2), (anywhere, count)]
    picked: list[Tensor] = []
    for places, most in kinds:
        wanted = min(most, count - sum(map(len, picked))) if len(places) else 0
        picked.append(places[torch.randint(max(1, len(places)), (wanted,), device=places.device)])
    chosen = torch.cat(picked)
    return chosen, inside[chosen]


__all__ = ["Segmenter"]
