"""A codebook: vectors that stand for what an encoder says, learned as running means of what they stand for.

van den Oord et al. 2017 ("Neural discrete representation learning", appendix A.1, equations 6 to 8), Razavi et al. 2019
("Generating diverse high-fidelity images with VQ-VAE-2"): with n_k of a batch's vectors nearest to code k,

    N_k <- d N_k + (1 - d) n_k,    m_k <- d m_k + (1 - d) sum of those vectors,    e_k = m_k / N_k

Codes that nothing is near any more begin anew at vectors of the batch (Williams et al. 2020, "Hierarchical quantized
autoencoders"; Dhariwal et al. 2020, "Jukebox", section 3.1).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Lloyd's steps at the start, and vectors a code they look at: more changes little.
_STEPS, _ROWS_A_CODE = 10, 32
# Below this a count is left alone: it would fall to zero, and its code with it to 0 / 0.
_LEAST_COUNT = 1e-12


class Codebook(nn.Module):
    """`codes` vectors of `width` numbers.

    Only N and m are kept, and e follows from them. `fit` averages weights over training: where a code has begun
    anew, the average of m over the average of N is the new place, as the old one's N was next to nothing, while an
    average of e would lie between the two.

    Args:
        codes: how many vectors.
        width: numbers in each.
        decay: d, the part of N and m that a step keeps.
        revive: a code begins anew when its N is below this part of an equal share; 0: never.

    Example:
        >>> book = Codebook(8, 3)
        >>> book(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 4, 4])
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, codes: int, width: int, *, decay: float = 0.99, revive: float = 0.02) -> None:
        super().__init__()
        self.decay, self.revive = decay, revive
        self.register_buffer("sums", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))

    @property
    def vectors(self) -> Float[Tensor, "k d"]:
        """e."""
        return self.sums / self.counts[:, None]

    def forward(self, z: Float[Tensor, "b d *positions"]) -> Int[Tensor, "b *positions"]:
        """The nearest code of every position."""
        return nearest(z.detach().movedim(1, -1), self.vectors)[0]

    def look_up(self, indices: Int[Tensor, "b *positions"]) -> Float[Tensor, "b d *positions"]:
        """The vectors of codes."""
        return self.vectors[indices].movedim(-1, 1)

    @torch.no_grad()
    def initialise(self, rows: Float[Tensor, "n d"]) -> None:
        """Means of clusters of `rows` (Lloyd 1982), which start at spread-out rows; always the same."""
        generator = torch.Generator().manual_seed(0)
        codes = len(self.counts)
        rows = rows.detach().float()
        if len(rows) > codes * _ROWS_A_CODE:
            rows = rows[torch.randperm(len(rows), generator=generator)[: codes * _ROWS_A_CODE].to(rows.device)]
        # Half at random, half where those are far off: scans have much air, which needs few codes.
        first = rows[torch.randperm(len(rows), generator=generator)[: (codes + 1) // 2].to(rows.device)]
        vectors = torch.cat([first, _far_off(rows, nearest(rows, first)[1], codes - len(first), generator)])
        counts = rows.new_zeros(codes)
        for _ in range(_STEPS):
            chosen, error = nearest(rows, vectors)
            sums, counts = _gathered(rows, chosen, codes)
            vectors = sums / counts.clamp(min=1)[:, None]
            empty = counts == 0
            vectors[empty] = _far_off(rows, error, int(empty.sum()), generator)
        # One a code on average, and enough of each to keep it from beginning anew at once.
        share = (counts / counts.mean()).clamp(min=0.5)
        self.counts.copy_(share)
        self.sums.copy_(vectors * share[:, None])

    @torch.no_grad()
    def update(self, z: Float[Tensor, "b d *positions"], indices: Int[Tensor, "b *positions"]) -> None:
        """One step towards what a batch said; randomness is torch's own, which `fit` seeds."""
        rows, chosen = z.detach().float().movedim(1, -1).flatten(0, -2), indices.flatten()
        sums, counts = _gathered(rows, chosen, len(self.counts))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Of the batch on all machines together, so that all have the same codebook.
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        kept = torch.where((self.counts < _LEAST_COUNT) & (counts == 0), 1.0, self.decay)
        self.counts.mul_(kept).add_((1 - kept) * counts)
        self.sums.mul_(kept[:, None]).add_((1 - kept)[:, None] * sums)
        share = self.counts.mean()
        dead = self.counts < self.revive * share
        if bool(dead.any()):
            error = (rows - self.vectors[chosen]).square().sum(1)
            begun = _far_off(rows, error, int(dead.sum()))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast(begun, 0)
            self.counts[dead] = share
            self.sums[dead] = share * begun


def nearest(
    rows: Float[Tensor, "*b d"], vectors: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Index of the nearest vector, the first of equals, and the squared distance to it; in full precision."""
    with torch.autocast(rows.device.type, enabled=False):
        rows, vectors = rows.float(), vectors.float()
        closeness = rows @ vectors.T - 0.5 * vectors.square().sum(1)
        best, index = closeness.max(-1)
        return index, (rows.square().sum(-1) - 2 * best).clamp(min=0)


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """`quantised` forwards, `z` backwards (Bengio et al. 2013): the gradient passes as if nothing were rounded."""
    return z + (quantised - z).detach()


def _gathered(rows: Float[Tensor, "n d"], chosen: Int[Tensor, " n"], codes: int) -> tuple[Tensor, Tensor]:
    """Sums (k, d) and counts (k,) of the rows of each code."""
    sums = rows.new_zeros(codes, rows.shape[1]).index_add_(0, chosen, rows)
    return sums, torch.bincount(chosen, minlength=codes).to(rows)


def _far_off(
    rows: Float[Tensor, "n d"], error: Float[Tensor, " n"], count: int, generator: torch.Generator | None = None
) -> Float[Tensor, "count d"]:
    """`count` rows drawn in proportion to their squared distance from their code.

    As in k-means++ (Arthur & Vassilvitskii 2007): a random row would mostly be air once more.
    """
    weights = error.cpu().double() + 1e-9 * error.max().cpu().double() + 1e-12
    most = min(count, len(rows))
    picked = torch.multinomial(weights, most, generator=generator) if most else torch.zeros(0, dtype=torch.long)
    if count > most:
        picked = torch.cat([picked, torch.randint(len(rows), (count - most,), generator=generator)])
    return rows[picked.to(rows.device)]


__all__ = ["Codebook", "nearest", "straight_through"]
