"""The masked multilayer perceptron: every output from earlier inputs alone, in one pass.

Germain et al. 2015 ("MADE: masked autoencoder for distribution estimation", equations 8 to 10): each hidden unit has a
number m and sees inputs 0 to m; output d sees hidden units with m < d. Here numbers are spread evenly instead of drawn,
and begin at -1, so that some units see the condition alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.blocks import ConditionBias


class MaskedLinear(nn.Linear):
    """A linear map with a fixed part of its weights only."""

    mask: Tensor

    def __init__(self, mask: Float[Tensor, "outside inside"]) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    @property
    def kept(self) -> Float[Tensor, "outside inside"]:
        """The weights that there are."""
        return self.weight * self.mask

    def forward(self, x: Float[Tensor, "b inside"]) -> Float[Tensor, "b outside"]:
        """Same as ever, without what is masked."""
        return functional.linear(x, self.kept, self.bias)


class MaskedMLP(nn.Module):
    """Numbers for each place of a row from the places before it.

    Args:
        size: places.
        outside: numbers a place.
        width: hidden units a layer.
        depth: hidden layers.
        told: numbers that every place may see, such as a code or a given image; 0 for none.
        conditions: numbers of a condition, 0 for none.
        dropout: part of the hidden units dropped in training.
        direct: also a linear prediction of each place from all before it, which shifts the place's numbers along one
            learned direction (direct input-output connections, Germain et al. 2015, section 6).

    Example:
        >>> MaskedMLP(6, 3, width=16, depth=2)(torch.zeros(4, 6)).shape
        torch.Size([4, 6, 3])
    """

    def __init__(
        self, size: int, outside: int, width: int, depth: int, *, told: int = 0, conditions: int = 0,
        dropout: float = 0.0, direct: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        assert depth > 0
        self.size, self.outside = size, outside
        places = torch.arange(size)
        sees = torch.linspace(-1, size - 2, width).round()
        self.first = MaskedLinear((sees[:, None] >= places).float())
        self.inner = nn.ModuleList([MaskedLinear((sees[:, None] >= sees).float()) for _ in range(depth - 1)])
        self.last = MaskedLinear((places[:, None] > sees).float().repeat_interleave(outside, 0))
        self.told = nn.Linear(told, width) if told else None
        self.condition = ConditionBias(conditions, width)
        self.dropout = nn.Dropout(dropout)
        self.direct = MaskedLinear((places[:, None] > places).float()) if direct else None
        self.direction = nn.Parameter(0.1 * torch.randn(outside)) if direct else None
        for layer in (self.last, *([self.direct] if self.direct is not None else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "b size"], cond: Tensor | None = None, told: Float[Tensor, "b told"] | None = None
    ) -> Float[Tensor, "b size outside"]:
        """Numbers of every place."""
        hidden = self.first(x) + self.known(len(x), cond, told)
        for layer in self.inner:
            hidden = hidden + layer(self.dropout(functional.silu(hidden)))
        found = self.last(self.dropout(functional.silu(hidden))).reshape(len(x), self.size, self.outside)
        if self.direct is not None and self.direction is not None:
            found = found + self.direct(x)[..., None] * self.direction
        return found

    def known(self, count: int, cond: Tensor | None, told: Tensor | None) -> Float[Tensor, "b width"]:
        """What the hidden units are told before anything is seen."""
        known = self.first.weight.new_zeros(count, len(self.first.weight))
        if self.told is not None and told is not None:
            known = known + self.told(told)
        return self.condition(known, cond)

    def walk(self, count: int, cond: Tensor | None = None, told: Tensor | None = None) -> "MaskedWalk":
        """The same place by place."""
        return MaskedWalk(self, self.known(count, cond, told))


class MaskedWalk:
    """The output of a `MaskedMLP` at one place after another: the first layer is a sum that grows."""

    def __init__(self, net: MaskedMLP, known: Float[Tensor, "b width"]) -> None:
        self.net = net
        self.sum = known + net.first.bias
        self.first = net.first.kept.T.contiguous()
        layers = [layer for layer in net.inner if isinstance(layer, MaskedLinear)]
        self.inner = [(layer.kept, layer.bias) for layer in layers]
        self.last = net.last.kept.reshape(net.size, net.outside, -1)
        self.line = None if net.direct is None else net.direct.bias.expand(len(known), -1).clone()
        self.direct = None if net.direct is None else net.direct.kept.T.contiguous()

    def at(self, place: int) -> Float[Tensor, "b outside"]:
        """The numbers of a place."""
        hidden = self.sum
        for weight, bias in self.inner:
            hidden = hidden + functional.linear(functional.silu(hidden), weight, bias)
        bias = self.net.last.bias.reshape(self.net.size, self.net.outside)[place]
        found = functional.linear(functional.silu(hidden), self.last[place], bias)
        if self.line is not None and self.net.direction is not None:
            found = found + self.line[:, place, None] * self.net.direction
        return found

    def put(self, place: int, value: Float[Tensor, " b"]) -> None:
        """Say what is at a place."""
        self.sum = self.sum + value[:, None] * self.first[place]
        if self.line is not None and self.direct is not None:
            self.line += value[:, None] * self.direct[place]


__all__ = ["MaskedLinear", "MaskedMLP", "MaskedWalk"]
