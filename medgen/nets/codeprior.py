"""Probabilities of code maps, code by code in raster order, the last axis fastest: p(z) = prod_n p(z_n | z_<n).

Two networks say p(z_n | z_<n): gated causal convolutions (van den Oord et al. 2016, "Conditional image generation with
PixelCNN decoders"), which see what lies near, and a decoder-only transformer (Esser et al. 2021, section 3.2), which
sees all that came before. Both start at equal chances, and are told where they are: scans lie alike.
"""

from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medgen.nets.causal import CausalStack, Style
from medgen.nets.transformer import CausalTransformer, Past

# Channels of the learned map of places that causal convolutions are told.
_PLACES = 16

# Says log p(z_n | z_<n), (b, k), of codes (b, n) up to a position; positions must come in raster order.
Step = Callable[[Tensor, int], Tensor]


class CodePrior(nn.Module):
    """log p(z_n | z_<n) everywhere at once, or position by position.

    Args:
        codes: how many there are.
        positions: along each axis of the map.
        numbers: of what is told of a scan, 0 for none.
    """

    def __init__(self, codes: int, positions: tuple[int, ...], numbers: int) -> None:
        super().__init__()
        self.codes, self.positions, self.numbers = codes, positions, numbers

    def forward(
        self, codes: Int[Tensor, "b *positions"], told: Float[Tensor, "b numbers"] | None = None
    ) -> Float[Tensor, "b k *positions"]:
        """Log probabilities of every code at every position, given the codes before it, nats."""
        raise TypeError(f"{type(self).__name__} says nothing about codes")

    def step(self, count: int, told: Float[Tensor, "b numbers"] | None = None) -> Step:
        """The same of `count` maps position by position, at the price of one pass for all of them."""
        raise TypeError(f"{type(self).__name__} says nothing about codes")

    @property
    def bias(self) -> Tensor:
        """Log chances of the codes where nothing else is known."""
        raise TypeError(f"{type(self).__name__} says nothing about codes")


class PixelPrior(CodePrior):
    """Gated causal convolutions over embedded codes.

    Args:
        codes, positions, numbers: as above.
        width: features.
        depth: layers.
        kernel: width of convolutions.
        dropout: part of the features left out in training.

    Example:
        >>> PixelPrior(5, (2, 3), numbers=0, width=4, depth=1)(torch.zeros(1, 2, 3, dtype=torch.long)).shape
        torch.Size([1, 5, 2, 3])
    """

    def __init__(
        self, codes: int, positions: tuple[int, ...], *, numbers: int, width: int, depth: int, kernel: int = 3,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(codes, positions, numbers)
        self.embedding = nn.Embedding(codes, width)
        self.places = nn.Parameter(0.1 * torch.randn(1, _PLACES, *positions))
        # Along leading axes with one position there is nothing to see.
        first = next((axis for axis, n in enumerate(positions) if n > 1), len(positions) - 1)
        self.stack = CausalStack(
            len(positions), width, codes, width, depth, conditions=numbers, given=_PLACES,
            style=Style(kernel=kernel, dropout=dropout, first=first),
        )  # fmt: skip
        for parameter in self.stack.last.parameters():
            nn.init.zeros_(parameter)

    @property
    def bias(self) -> Tensor:
        """Log chances of the codes where nothing else is known."""
        found = self.stack.last.bias
        assert isinstance(found, Tensor)
        return found

    def forward(
        self, codes: Int[Tensor, "b *positions"], told: Float[Tensor, "b numbers"] | None = None
    ) -> Float[Tensor, "b k *positions"]:
        """Log probabilities, all at once."""
        features = self.embedding(codes).movedim(-1, 1)
        return self.stack(features, told, self.places).float().log_softmax(1)

    def step(self, count: int, told: Float[Tensor, "b numbers"] | None = None) -> Step:
        """Log probabilities, position by position."""
        walk = self.stack.walk(self.positions, count, told, self.places)
        places = list(product(*map(range, self.positions)))
        done = 0

        def log_p(codes: Tensor, position: int) -> Tensor:
            nonlocal done
            found = codes.new_zeros(0)
            for n in range(done, position + 1):
                if n:
                    walk.put(places[n - 1], self.embedding(codes[:, n - 1]))
                found = walk.at(places[n])
            done = position + 1
            return found.flatten(1).float().log_softmax(1)

        return log_p


class SequencePrior(CodePrior):
    """A decoder-only transformer: embedded codes, where they are and what is told of the scan, summed.

    Args:
        codes, positions, numbers: as above.
        width: features, a multiple of `heads`.
        depth: layers.
        heads: of attention.
        dropout: part of the features left out in training.

    Example:
        >>> SequencePrior(5, (2, 3), numbers=0, width=4, depth=1, heads=2)(torch.zeros(1, 2, 3, dtype=torch.long)).shape
        torch.Size([1, 5, 2, 3])
    """

    def __init__(
        self, codes: int, positions: tuple[int, ...], *, numbers: int, width: int, depth: int, heads: int,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(codes, positions, numbers)
        # One more than there are codes: what the first position is told.
        self.embedding = nn.Embedding(codes + 1, width)
        self.places = nn.ParameterList(0.1 * torch.randn(n, width) for n in positions)
        self.condition = nn.Linear(numbers, width, bias=False) if numbers else None
        self.body = CausalTransformer(width, depth, heads, dropout)
        self.head = nn.Linear(width, codes)
        nn.init.normal_(self.embedding.weight, std=0.1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    @property
    def bias(self) -> Tensor:
        """Log chances of the codes where nothing else is known."""
        return self.head.bias

    def forward(
        self, codes: Int[Tensor, "b *positions"], told: Float[Tensor, "b numbers"] | None = None
    ) -> Float[Tensor, "b k *positions"]:
        """Log probabilities, all at once."""
        flat = codes.flatten(1)
        x = self._embedded(flat, 0, flat.shape[1], told)
        log_p = self.head(self.body(x)).float().log_softmax(-1)
        return log_p.movedim(-1, 1).unflatten(2, self.positions)

    def step(self, count: int, told: Float[Tensor, "b numbers"] | None = None) -> Step:
        """Log probabilities, position by position; keys and values are kept."""
        past = Past(self._placed().shape[0])

        def log_p(codes: Tensor, position: int) -> Tensor:
            x = self._embedded(codes, past.seen, position + 1, told)
            return self.head(self.body(x, past)[:, -1]).float().log_softmax(-1)

        return log_p

    def _placed(self) -> Float[Tensor, "n w"]:
        """A vector for every position: the sum of one for its place along each axis."""
        total = self.places[0]
        for along in list(self.places)[1:]:
            total = (total[:, None] + along).flatten(0, 1)
        return total

    def _embedded(self, flat: Int[Tensor, "b n"], first: int, after: int, told: Tensor | None) -> Tensor:
        """What the positions from `first` to before `after` are told: the code before each, its place, the scan."""
        before = torch.cat([torch.full_like(flat[:, :1], self.codes), flat[:, : after - 1]], 1)[:, first:]
        x = self.embedding(before) + self._placed()[first:after]
        return x if told is None or self.condition is None else x + self.condition(told)[:, None]


@torch.no_grad()
def redrawn(
    prior: CodePrior, codes: Int[Tensor, "b *positions"], free: Bool[Tensor, "b *positions"],
    uniform: Float[Tensor, "b *positions"], told: Float[Tensor, "b numbers"] | None = None,
) -> Int[Tensor, "b *positions"]:  # fmt: skip
    """Codes drawn anew where `free`, in raster order, each given all before it.

    Args:
        prior: in evaluation mode.
        codes: what there is; where free, it does not matter.
        free: which to draw.
        uniform: noise on (0, 1), one number a position.
        told: of every scan.
    """
    flat, drawn, noise = codes.flatten(1).clone(), free.flatten(1), uniform.flatten(1).double()
    step = prior.step(len(codes), told)
    for position in drawn.any(0).nonzero().flatten().tolist():
        cumulated = step(flat, position).double().exp().cumsum(1)
        # The last code has what rounding leaves of 1.
        found = (cumulated[:, :-1] < noise[:, position, None]).sum(1)
        flat[:, position] = torch.where(drawn[:, position], found, flat[:, position])
    return flat.reshape(codes.shape)


__all__ = ["CodePrior", "PixelPrior", "SequencePrior", "Step", "redrawn"]
