"""Rungs of a ladder of codes: what is said of a scan from coarse to fine, each rung about what is left to say."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from medgen.nets.blocks import ConditionBias, conv, from_blocks, squeezed

# Codes are what they are up to so many standard deviations from what is expected, and never beyond the second number.
_USUAL, _MOST = 5.0, 8.0


class Bottleneck(nn.Module):
    """x + f(x) with f narrow inside and zero at first (Child 2021, "Very deep VAEs", figure 3)."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        last = conv(dims, inner, width, 1)
        self.body = nn.Sequential(
            nn.SiLU(), conv(dims, width, inner, 1), nn.SiLU(), conv(dims, inner, inner), nn.SiLU(), last
        )
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b w *space"]:
        """Same shape out as in."""
        return x + self.body(x)


class Entrance(nn.Module):
    """Features on a finer lattice: those of the coarser one, what is known of each place, and the picture so far.

    Args:
        dims: 2 or 3.
        width: features.
        positions: of this lattice.
        voxels: numbers of the picture that belong to a position.
        conditions: numbers of a scan's condition.
        position: learn features for each place.
    """

    def __init__(
        self, dims: int, width: int, positions: Sequence[int], voxels: int, *, conditions: int, position: bool
    ):
        super().__init__()
        self.positions = tuple(positions)
        self.above = conv(dims, width, width, 1)
        self.look = conv(dims, voxels, width, 1)
        self.condition = ConditionBias(conditions, width)
        self.place = nn.Parameter(torch.zeros(1, width, *self.positions)) if position else None

    def forward(self, above: Tensor, picture: Tensor, cond: Tensor | None) -> Float[Tensor, "b w *positions"]:
        """Features from those above (b, width, *coarser) and the picture's blocks (b, voxels, *positions)."""
        finer = nn.functional.interpolate(self.above(above), size=self.positions, mode="nearest")
        found = self.condition(finer + self.look(picture), cond)
        return found if self.place is None else found + self.place


class Rung(nn.Module):
    """One map of codes z = mu_p + sigma_p u, where u is N(0, 1) before a scan is seen.

    mu_p, sigma_p come from the features of the rungs above. Seen the scan, u is N(shift, spread): its code relative
    to the prior, as in Vahdat & Kautz 2020 ("NVAE", equation 2), so that KL depends on shift and spread alone.
    The shift is a linear gain times the innovation, which is the scan minus what the rungs above expect of it, plus
    what a network makes of both.

    Args:
        dims: 2 or 3.
        width: features.
        latent: channels of the map.
        block: voxels along each axis that a position stands for.
        channels: of the scan.
        depth: residual blocks of inference, and as many of generation.
    """

    def __init__(self, dims: int, width: int, latent: int, block: Sequence[int], *, channels: int, depth: int) -> None:
        super().__init__()
        self.block, self.latent = tuple(block), latent
        voxels = channels * prod(block)
        self.prior = conv(dims, width, 2 * latent, 1)
        self.look = conv(dims, voxels, width, 1)
        self.infer = nn.Sequential(*[Bottleneck(dims, width) for _ in range(depth)], nn.SiLU())
        self.to_code = conv(dims, width, 2 * latent, 1)
        self.gain = nn.Linear(voxels, latent, bias=False)
        self.show = nn.Linear(latent, voxels, bias=False)
        self.tell = conv(dims, latent, width, 1)
        self.body = nn.Sequential(*[Bottleneck(dims, width) for _ in range(depth)])
        self.head = conv(dims, width, voxels, 1)
        for part in (self.prior, self.to_code, self.gain, self.show, self.head):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)

    def expected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mu_p and sigma_p (b, latent, *positions), and what mu_p adds to the picture."""
        mean, log_scale = self.prior(nn.functional.silu(h)).float().chunk(2, dim=1)
        mean = _within(mean)
        return mean, log_scale.clamp(-7, 3).exp(), self.shown(mean)

    def shown(self, z: Float[Tensor, "b latent *positions"]) -> Float[Tensor, "b c *space"]:
        """What codes add to the picture, linearly."""
        return from_blocks(self.show(z.movedim(1, -1)).float(), self.block)

    def posterior(self, h: Tensor, innovation: Float[Tensor, "b c *space"]) -> Independent:
        """q(u | x, rungs above)."""
        rows = squeezed(innovation, self.block)
        learned = self.to_code(self.infer(h + self.look(rows))).float()
        shift, log_scale = learned.chunk(2, dim=1)
        loc = _within(self.gain(rows.movedim(1, -1)).float().movedim(-1, 1) + shift)
        return Independent(Normal(loc, log_scale.clamp(-7, 3).exp(), validate_args=False), loc.ndim - 1)

    def forward(self, h: Tensor, z: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Features and picture once the code is known."""
        h = self.body(h + self.tell(z))
        learned = self.head(nn.functional.silu(h)).float()
        return h, picture + self.shown(z) + from_blocks(learned.movedim(1, -1), self.block)


def _within(code: Tensor) -> Tensor:
    """Codes that stay finite: each rung hears the one above, and a scan like no other must not set them off."""
    usual, room = code.clamp(-_USUAL, _USUAL), _MOST - _USUAL
    return usual + room * torch.tanh((code - usual) / room)


__all__ = ["Bottleneck", "Entrance", "Rung"]
