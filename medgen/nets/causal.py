"""Stacks of masked convolutions: the output at a position depends on strictly earlier positions, and on all of those.

Positions are in raster order, the last axis fastest. One stack a axis (van den Oord et al. 2016b, "Conditional image
generation with PixelCNN decoders", section 2.2, there vertical and horizontal): the stack of axis a sees what lies
before along axis a, everything within its kernel along later axes, and its own place along earlier ones; every layer
of it is told the stack before it. In volumes: slices before, rows before, voxels before. So no earlier position is
hidden (a single masked convolution, repeated, has a blind spot), and only the last stack's output is used.

Blocks are gated (ibid., equation 2) or those of PixelCNN++ (Salimans et al. 2017, section 2.4 and figure 2), where
stacks are also halved and doubled again: a coarse position stands at the first of its voxels, and sees no more.
Convolutions along the first axis may be dilated (van den Oord et al. 2016c, "WaveNet", section 2.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.blocks import ConditionBias, channels_last, conv, from_blocks, lopsided

# Slope below zero. PixelCNN++ has exponential linear units, which take a fifth of the time of all on CPUs.
_LEAK = 0.05


@dataclass(frozen=True)
class Style:
    """How stacks are built.

    Args:
        block: 'gated' (tanh times sigmoid) or 'resnet' (PixelCNN++: rectifiers, dropout, a gate).
        kernel: width of convolutions, of which the half that lies before is used along a stack's axis.
        dropout: part of a block's features dropped in training.
        levels: halvings and doublings of the stacks, with skips between them.
        dilations: of successive blocks along the first axis, over and over.
        first: the first axis that has a stack; positions along axes before it do not see each other.
    """

    block: Literal["gated", "resnet"] = "gated"
    kernel: int = 3
    dropout: float = 0.0
    levels: int = 0
    dilations: tuple[int, ...] = (1,)
    first: int = 0


class CausalStack(nn.Module):
    """A feature map from earlier positions alone.

    Args:
        dims: 2 or 3.
        inside, outside: channels.
        width: features of every stack.
        depth: blocks a stack; with levels, each way and a level.
        conditions: numbers of a condition that every block is told, 0 for none.
        given: channels of a feature map that every block is told, all of which may be seen; 0 for none.
        style: how wide convolutions are, gated or residual, flat or with levels, dilated or not.

    Example:
        >>> stack = CausalStack(2, 1, 5, width=8, depth=2)
        >>> stack(torch.zeros(3, 1, 6, 7)).shape
        torch.Size([3, 5, 6, 7])
    """

    def __init__(
        self, dims: int, inside: int, outside: int, width: int, depth: int, *, conditions: int = 0, given: int = 0,
        style: Style = Style(),
    ) -> None:  # fmt: skip
        super().__init__()
        kernel, dropout = style.kernel, style.dropout
        assert kernel % 2 == 1
        assert depth > 0
        self.dims, self.inside, self.width, self.style = dims, inside, width, style
        self.plan = _plan(depth, style.levels)
        self.margin = (kernel // 2 + 1) * max(style.dilations) + 1
        self.axes = range(style.first, dims)
        steps, count = [], 0
        for op in self.plan:
            dilation = style.dilations[count % len(style.dilations)]
            count += op.kind == "block"
            row: list[nn.Module] = []
            for axis in self.axes:
                if op.kind == "stem":
                    row.append(_Look(dims, axis, inside, width, kernel, strict=True))
                elif op.kind == "down":
                    row.append(_Look(dims, axis, width, width, kernel, stride=2))
                elif op.kind == "up":
                    row.append(conv(dims, width, width * 2**dims, 1))
                else:
                    look = _Look(
                        dims, axis, width, width * (2 if style.block == "gated" else 1), kernel,
                        dilation=dilation if axis == 0 else 1,
                    )  # fmt: skip
                    others = (axis > style.first) + (op.skip is not None)
                    row.append(_Block(look, width, others, conditions, given, dropout))
            steps.append(nn.ModuleList(row))
        self.steps = nn.ModuleList(steps)
        self.act = nn.LeakyReLU(_LEAK) if style.block == "resnet" else nn.SiLU()
        self.last = conv(dims, width, outside, 1)
        channels_last(self, dims)

    def forward(
        self, features: Float[Tensor, "b inside *space"], cond: Tensor | None = None, given: Tensor | None = None
    ) -> Float[Tensor, "b outside *space"]:
        """The output everywhere.

        Args:
            features: (b, inside, *space).
            cond: class indices (b,) or a table (b, conditions).
            given: (b or 1, given, *space).
        """
        found = self.act(self.features(features, self.told(cond, given))[-1][-1])
        # Rounded to eight bits of mantissa, outputs would be off by a grey level.
        with torch.autocast(found.device.type, enabled=False):
            return self.last(found.to(self.last.weight.dtype))

    def features(self, seen: Tensor, told: list[list[Tensor | None]]) -> list[list[Tensor]]:
        """What every step of every stack comes to."""
        found: list[list[Tensor]] = []
        for number, op in enumerate(self.plan):
            row: list[Tensor] = []
            for stack, module in enumerate(self.modules_of(number)):
                before = seen if op.kind == "stem" else found[-1][stack]
                if isinstance(module, _Look):
                    row.append(module(before))
                elif isinstance(module, _Block):
                    others = row[-1:] if op.skip is None else [*row[-1:], found[op.skip][stack]]
                    row.append(module.settle(module.look(module.act(before)), before, others, told[number][stack]))
                else:
                    size = found[op.like][stack].shape[2:]
                    row.append(_cropped(from_blocks(module(before).movedim(1, -1), (2,) * self.dims), size))
            found.append(row)
        return found

    def walk(self, space: Sequence[int], count: int, cond: Tensor | None = None, given: Tensor | None = None) -> "Walk":
        """The same output position by position, as sampling needs it: each stack is computed once."""
        return Walk(self, tuple(space), count, self.told(cond, given))

    def modules_of(self, number: int) -> "list[_Look | _Block | nn.Module]":
        """What a step of the plan does, stack by stack."""
        return list(cast("nn.ModuleList", self.steps[number]))

    def told(self, cond: Tensor | None, given: Tensor | None) -> list[list[Tensor | None]]:
        """What every block of every stack is told; coarse blocks are told the mean of what they stand for."""
        maps = [given]
        for _ in range(self.style.levels):
            maps.append(None if maps[-1] is None else _halved(maps[-1]))
        return [
            [
                module.told(cond, maps[op.level]) if isinstance(module, _Block) else None
                for module in self.modules_of(number)
            ]
            for number, op in enumerate(self.plan)
        ]


class Walk:
    """The output of a `CausalStack` at one position after another, in raster order.

    `at` a position needs what was `put` at all positions before it.
    """

    def __init__(self, stack: CausalStack, space: tuple[int, ...], count: int, told: list[list[Tensor | None]]) -> None:
        self.stack, self.space, self.told = stack, space, told
        weight = next(stack.parameters())

        def empty(channels: int, axis: int, level: int) -> Tensor:
            sizes = [-(-n // 2**level) + (stack.margin if a == axis else 0) for a, n in enumerate(space)]
            return weight.new_zeros(count, channels, *sizes)

        self.seen = [empty(stack.inside, axis, 0) for axis in stack.axes]
        self.found = [[empty(stack.width, axis, op.level) for axis in stack.axes] for op in stack.plan]

    @torch.no_grad()
    def fill(self, features: Float[Tensor, "b inside *space"]) -> None:
        """Say what is everywhere; from then on one may begin anywhere, and put other features from there on."""
        for axis, held in zip(self.stack.axes, self.seen, strict=True):
            held.narrow(2 + axis, self.stack.margin, features.shape[2 + axis]).copy_(features)
        for row, rows in zip(self.found, self.stack.features(features, self.told), strict=True):
            for axis, held, value in zip(self.stack.axes, row, rows, strict=True):
                held.narrow(2 + axis, self.stack.margin, value.shape[2 + axis]).copy_(value)

    @torch.no_grad()
    def put(self, index: Sequence[int], features: Float[Tensor, "b inside"]) -> None:
        """Say what is at a position."""
        for axis, held in zip(self.stack.axes, self.seen, strict=True):
            self._slab(held, axis, tuple(index), after=False).copy_(
                features.reshape(*features.shape, *[1] * len(index))
            )

    @torch.no_grad()
    def at(self, index: Sequence[int]) -> Float[Tensor, "b outside *one"]:
        """The output at a position."""
        for stack, axis in enumerate(self.stack.axes):
            # A stack's features are the same for everything that begins here.
            if not any(index[axis + 1 :]):
                self._update(stack, axis, tuple(index[: axis + 1]))
        here = self._slab(self.found[-1][-1], self.stack.axes[-1], tuple(index))
        return self.stack.last(self.stack.act(here))

    def _update(self, stack: int, axis: int, index: tuple[int, ...]) -> None:
        for number, op in enumerate(self.stack.plan):
            scale = 2**op.level
            if any(n % scale for n in index):
                continue
            here = tuple(n // scale for n in index)
            module = self.stack.modules_of(number)[stack]
            before = self.seen[stack] if op.kind == "stem" else self.found[number - 1][stack]
            if isinstance(module, _Look):
                value = module.at(before, here, self.stack.margin)
            elif isinstance(module, _Block):
                others = [] if stack == 0 else [self._slab(self.found[number][stack - 1], axis - 1, here)]
                if op.skip is not None:
                    others.append(self._slab(self.found[op.skip][stack], axis, here))
                told = self.told[number][stack]
                told = None if told is None else _part(told, here)
                seen = module.look.at(before, here, self.stack.margin, module.act)
                value = module.settle(seen, self._slab(before, axis, here), others, told)
            else:
                coarse = self._slab(before, axis, tuple(n // 2 for n in here))
                fine = from_blocks(module(coarse).movedim(1, -1), (2,) * self.stack.dims)
                fine = _part(fine, tuple(n % 2 for n in here))
                value = _cropped(fine, self._slab(self.found[op.like][stack], axis, here).shape[2:])
            self._slab(self.found[number][stack], axis, here).copy_(value)

    def _slab(self, held: Tensor, axis: int, index: tuple[int, ...], *, after: bool = True) -> Tensor:
        """What is held at an index of the first axes; `held` has a margin along `axis`."""
        for a, n in enumerate(index):
            held = held.narrow(2 + a, n + (self.stack.margin if a == axis else 0), 1)
        return held


# -- parts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Op:
    """A step of all stacks: what it does, at which level, and whose output it takes besides or has the size of."""

    kind: Literal["stem", "block", "down", "up"]
    level: int
    skip: int | None = None
    like: int = 0


def _plan(depth: int, levels: int) -> list[_Op]:
    ops, ways, firsts = [_Op("stem", 0)], [], [0]
    for level in range(levels + 1):
        ways.append(list(range(len(ops), len(ops) + depth)))
        ops += [_Op("block", level)] * depth
        if level < levels:
            firsts.append(len(ops))
            ops.append(_Op("down", level + 1))
    for level in reversed(range(levels + 1) if levels else ()):
        ops += [_Op("block", level, skip=skip) for skip in reversed(ways[level])]
        if level:
            ops.append(_Op("up", level - 1, like=firsts[level - 1]))
    return ops


class _Look(nn.Module):
    """A convolution over what lies before along `axis`, and around along later axes.

    `strict` excludes the position itself. Output p reads positions p * stride - left to p * stride - left + span - 1.
    """

    def __init__(
        self, dims: int, axis: int, inside: int, outside: int, kernel: int, *, strict: bool = False, dilation: int = 1,
        stride: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        taps = kernel // 2 + 1
        self.dims, self.axis, self.outside, self.stride = dims, axis, outside, stride
        self.span = (taps - 1) * dilation + 1
        self.left = self.span if strict else self.span - 1
        later = dims - axis - 1
        self.conv = lopsided(
            dims, inside, outside, (*[1] * axis, taps, *[kernel] * later), stride=stride,
            padded=(*[False] * (axis + 1), *[True] * later), dilations=(*[1] * axis, dilation, *[1] * later),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Everywhere."""
        along, last = 2 + self.axis, (-(-x.shape[2 + self.axis] // self.stride) - 1) * self.stride
        sides = [0, 0] * (x.ndim - 1 - along) + [self.left, 0]
        return self.conv(functional.pad(x, sides).narrow(along, 0, last + self.span))

    def at(self, held: Tensor, index: tuple[int, ...], margin: int, act: nn.Module | None = None) -> Tensor:
        """At one index of the first axes; `held` has a margin along the axis."""
        for a, n in enumerate(index[:-1]):
            held = held.narrow(2 + a, n * self.stride, 1)
        window = held.narrow(2 + self.axis, margin + index[-1] * self.stride - self.left, self.span)
        return self.conv(window if act is None else act(window))


class _Block(nn.Module):
    """Adds to a stack what its convolution, the stack before it, a skip and what is told make of it together."""

    def __init__(self, look: _Look, width: int, others: int, conditions: int, given: int, dropout: float) -> None:
        super().__init__()
        dims, inner = look.dims, look.outside
        self.look, self.gated = look, inner == 2 * width
        self.act = nn.Identity() if self.gated else nn.LeakyReLU(_LEAK)
        self.others = nn.ModuleList([conv(dims, width, inner, 1) for _ in range(others)])
        self.condition = ConditionBias(conditions, inner)
        self.given = conv(dims, given, inner, 1) if given else None
        self.dropout = nn.Dropout(dropout)
        self.out = conv(dims, width, width if self.gated else 2 * width, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)
        self.none = (1, inner, *[1] * dims)

    def told(self, cond: Tensor | None, given: Tensor | None) -> Tensor | None:
        """What it adds for a condition and a given map."""
        told = self.given(given) if self.given is not None and given is not None else None
        if self.condition.table is None or cond is None:
            return told
        bias = self.condition(next(self.parameters()).new_zeros(len(cond), *self.none[1:]), cond)
        return bias if told is None else told + bias

    def settle(self, seen: Tensor, here: Tensor, others: list[Tensor], told: Tensor | None) -> Tensor:
        """The stack's next features from the convolution's."""
        for module, other in zip(self.others, others, strict=True):
            seen = seen + module(self.act(other))
        seen = seen if told is None else seen + told
        if self.gated:
            value, gate = seen.chunk(2, 1)
            return here + self.out(self.dropout(torch.tanh(value) * torch.sigmoid(gate)))
        value, gate = self.out(self.dropout(functional.leaky_relu(seen, _LEAK))).chunk(2, 1)
        return here + value * torch.sigmoid(gate)


def _cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` positions."""
    for axis, n in enumerate(size):
        x = x.narrow(2 + axis, 0, n)
    return x


def _part(x: Tensor, index: tuple[int, ...]) -> Tensor:
    """One index of the first axes, where they have more than one."""
    for axis, n in enumerate(index):
        x = x.narrow(2 + axis, n, 1) if x.shape[2 + axis] > 1 else x
    return x


def _halved(x: Tensor) -> Tensor:
    """The mean of blocks of two, of what there is of them."""
    pool = functional.avg_pool2d if x.ndim == 4 else functional.avg_pool3d
    return pool(x, tuple(min(2, n) for n in x.shape[2:]), ceil_mode=True, count_include_pad=False)


__all__ = ["CausalStack", "Style", "Walk"]
