"""Self-attention over positions, to all others or by the sparse patterns of local steps."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.adversarial.base import spectral
from medgen.nets.blocks import conv

AttentionName = Literal["none", "full", "local"]
_MASKS = 4  # patterns of 'local', one a head


class Attention(nn.Module):
    """What every position gathers from others, weighted by likeness, times a weight that starts at zero.

        o_i = sum_j softmax_j( q(x_i) . k(x_j) ) v(x_j),    y_i = x_i + gamma W o_i

    Zhang et al. 2019, "Self-attention generative adversarial networks", equations 1 to 3. Kind 'local' lets each head
    look along one of the patterns of `local_masks` only (Daras et al. 2020, "Your local GAN").

    Args:
        dims: 2 or 3.
        width: features.
        space: positions along each axis.
        kind: 'full' or 'local'.
        normed: divide weights by their largest singular value.
    """

    mask: Tensor | None

    def __init__(
        self, dims: int, width: int, space: tuple[int, ...], kind: Literal["full", "local"], *, normed: bool
    ) -> None:
        super().__init__()
        self.heads = _MASKS if kind == "local" else 1
        small = max(self.heads, width // 8 // self.heads * self.heads)
        half = max(self.heads, width // 2 // self.heads * self.heads)
        self.query, self.key = (spectral(conv(dims, width, small, 1), normed) for _ in range(2))
        self.value, self.out = (
            spectral(conv(dims, width, half, 1), normed),
            spectral(conv(dims, half, width, 1), normed),
        )
        self.gamma = nn.Parameter(torch.zeros(1))
        mask = torch.stack(local_masks(space)) if kind == "local" else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b w *space"]:
        """Same shape out as in."""
        query, key, value = (self._rows(part(x)) for part in (self.query, self.key, self.value))
        gathered = _attended(query, key, value, self.mask)
        gathered = gathered.transpose(2, 3).reshape(len(x), -1, *x.shape[2:])
        return x + self.gamma * self.out(gathered)

    def _rows(self, x: Tensor) -> Float[Tensor, "b heads n d"]:
        return x.reshape(len(x), self.heads, -1, x[0, 0].numel()).transpose(2, 3)


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Written out, because fused kernels have no second derivatives, which gradient penalties take."""
    likeness = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if mask is not None:
        likeness = likeness.masked_fill(~mask, -torch.inf)
    return functional.softmax(likeness, -1) @ value


def local_masks(space: tuple[int, ...]) -> list[Bool[Tensor, "n n"]]:
    """Who (row) may look at whom (column): four patterns, two steps from left to right and two from right to left.

    Daras et al. 2020, sections 3 and 4: positions are put in a row by their (Manhattan) distance from a corner, ties in
    the order of rows, so that neighbours in the row are neighbours in space; the row is cut into blocks of sqrt(n).
    Left to right, a position sees itself and what is before it in its block (step one), or itself and the last
    position of every block (step two). The last of a block has heard of all the block, so after both steps every
    position has heard of every other, at O(n sqrt(n)). Right to left it sees what is behind it in its block, and the
    first position of every block.

    >>> one, two, *_ = local_masks((4, 4))
    >>> bool((two.float() @ one.float() > 0).all()), int(one.sum() + two.sum())
    (True, 116)
    """
    axes = torch.meshgrid(*[torch.arange(n) for n in space], indexing="ij")
    order = torch.stack(axes).sum(0).flatten().argsort(stable=True)
    count = len(order)
    rank = order.argsort()
    size = max(1, round(count**0.5))
    last, first = (rank % size == size - 1) | (rank == count - 1), rank % size == 0
    same = rank[:, None] // size == rank[None, :] // size
    before = rank[None, :] <= rank[:, None]
    itself = torch.eye(count, dtype=torch.bool)
    return [same & before, last[None, :] | itself, same & before.T, first[None, :] | itself]


__all__ = ["Attention", "AttentionName", "local_masks"]
