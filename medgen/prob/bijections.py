"""Invertible maps of images and volumes, with the log of how much they stretch space at every position.

Every bijection maps x (b, c, *space) to y of the same shape and tells ladj = log |det dy/dx| as a map
(b or 1, 1, *space or ones) whose sum over positions is the whole, so a likelihood can be said voxel by voxel.
`given` is a feature map (b or 1, k, *space or ones) that networks inside are told besides x.

    log p(x) = sum over positions [ log N(y; 0, 1) + ladj ]
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from zuko.transforms import MonotonicRQSTransform

CouplingName = Literal["additive", "affine", "spline"]
MixingName = Literal["conv", "permutation"]
# Splines act on (-bound, bound) and are the identity beyond.
_BOUND = 5.0


class Mix(nn.Module):
    """ActNorm, then an invertible mixing of channels: y = W ((x + shift) * scale), as one 1x1 convolution.

    ActNorm's shift and scale start at what makes the first batch standard normal a channel (Kingma &
    Dhariwal 2018, "Glow", section 3.1). W is a fixed permutation, or P L U with P fixed, L and U
    triangular and learned (the same, equation 10), which starts as a random rotation.

    Args:
        channels: c.
        kind: 'conv' or 'permutation'.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, kind: MixingName) -> None:
        super().__init__()
        self.kind = kind
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        if kind == "permutation":
            self.register_buffer("permutation", torch.eye(channels)[torch.randperm(channels)])
            return
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", diagonal.sign().float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())

    def initialise(self, x: Float[Tensor, "b c *space"]) -> None:
        """Make every channel of this batch zero mean and unit variance before mixing."""
        rows = x.movedim(1, 0).flatten(1)
        self.shift.data.copy_(-rows.mean(1))
        if rows.shape[1] > 1:  # one number has no spread to be told
            self.log_scale.data.copy_(-rows.std(1).clamp(min=1e-4).log())

    def weight(self) -> Float[Tensor, "c c"]:
        """W."""
        if self.kind == "permutation":
            return self.permutation
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ (self.lower.tril(-1) + torch.eye(len(upper), device=upper.device)) @ upper

    def forward(self, x: Float[Tensor, "b c *space"], given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and ladj, the same number at every position."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight() * self.log_scale.exp()
            ladj = self.log_scale.sum() + (self.log_diagonal.sum() if self.kind == "conv" else 0)
            return _pointwise(x, weight, weight @ self.shift), ladj.reshape([1] * x.ndim)

    def inverse(self, y: Float[Tensor, "b c *space"], given: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """x; W is inverted in double precision."""
        with torch.autocast(y.device.type, enabled=False):
            undo = torch.linalg.inv(self.weight().double()) * (-self.log_scale.double()).exp()[:, None]
            return _pointwise(y, undo.to(y.dtype), -self.shift)

    def rebuilt(self, y: Tensor, given: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """See `Coupling.rebuilt`."""
        with torch.no_grad():
            x = self.inverse(y)
        x.requires_grad_()
        with torch.enable_grad():
            return ((x,), *self(x))


class Coupling(nn.Module):
    """The first channels stay and decide how each of the others is moved (Dinh et al. 2017, equations 4 to 9).

    additive    y = x + t                                        Dinh et al. 2015, "NICE", equation 2
    affine      y = x exp(s) + t,  s = 2 tanh(raw / 2)           Dinh et al. 2017, "Real NVP", equation 7
    spline      y = monotone rational-quadratic spline of x      Durkan et al. 2019, equations 4 to 8

    Args:
        network: maps (kept channels, given) to `parameters_of(kind, bins)` numbers a moved channel; one that
            starts at zero makes the coupling start as the identity.
        keep: how many channels stay.
        kind: what is done to the others.
        bins: of the spline.
    """

    def __init__(self, network: nn.Module, keep: int, kind: CouplingName, bins: int = 8) -> None:
        super().__init__()
        self.network, self.keep, self.kind, self.bins = network, keep, kind, bins

    @staticmethod
    def parameters_of(kind: CouplingName, bins: int = 8) -> int:
        """Numbers the network has to give for every moved channel."""
        return {"additive": 1, "affine": 2, "spline": 3 * bins - 1}[kind]

    def initialise(self, x: Float[Tensor, "b c *space"]) -> None:
        """Nothing: it starts as the identity."""

    def forward(self, x: Float[Tensor, "b c *space"], given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and its ladj map."""
        kept, moved = x[:, : self.keep], x[:, self.keep :]
        out, ladj = self._move(moved, self.network(kept, given))
        return torch.cat([kept, out], 1), ladj

    def inverse(self, y: Float[Tensor, "b c *space"], given: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """x, exactly but for rounding."""
        kept, moved = y[:, : self.keep], y[:, self.keep :]
        return torch.cat([kept, self._move_back(moved, self.network(kept, given))], 1)

    def rebuilt(self, y: Tensor, given: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The input behind `y` as leaves (to be joined along channels), and the output again with its graph.

        One evaluation of the network serves the inverse and the gradient.
        """
        kept = y[:, : self.keep].detach().requires_grad_()
        with torch.enable_grad():
            told = self.network(kept, given)
        with torch.no_grad():
            moved = self._move_back(y[:, self.keep :], told)
        moved.requires_grad_()
        with torch.enable_grad():
            out, ladj = self._move(moved, told)
            return (kept, moved), torch.cat([kept, out], 1), ladj

    # -- what is done to the moved channels --------------------------------------------------------

    def _move(self, x: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        told = told.to(x.dtype)
        if self.kind == "additive":
            return x + told, x.new_zeros([1] * x.ndim)
        if self.kind == "affine":
            shift, log_scale = _shift_and_log_scale(told)
            return torch.addcmul(shift, x, log_scale.exp()), log_scale.sum(1, keepdim=True)
        out, ladj = self._spline(told).call_and_ladj(x)
        return out, ladj.sum(1, keepdim=True)

    def _move_back(self, y: Tensor, told: Tensor) -> Tensor:
        told = told.to(y.dtype)
        if self.kind == "additive":
            return y - told
        if self.kind == "affine":
            shift, log_scale = _shift_and_log_scale(told)
            return (y - shift) * (-log_scale).exp()
        return self._spline(told)._inverse(y)

    def _spline(self, told: Tensor) -> "_Spline":
        """Widths, heights and inner slopes of every moved element, bin last."""
        rows = told.unflatten(1, (-1, 3 * self.bins - 1)).movedim(2, -1)
        return _Spline(*rows.split([self.bins, self.bins, self.bins - 1], -1), bound=_BOUND)


class _Spline(MonotonicRQSTransform):
    """zuko's spline; its own inverse is not a number where rounding makes the root's argument negative."""

    def _inverse(self, y: Tensor) -> Tensor:
        """Durkan et al. 2019, equations 29 to 32."""
        found = cast("torch.LongTensor", self.searchsorted(self.vertical, y) - 1)
        inside, x0, x1, y0, y1, d0, d1, s = self.bin(found)
        rise = inside * (y - y0)
        bend = rise * (d0 + d1 - 2 * s)
        a, b, c = (y1 - y0) * (s - d0) + bend, (y1 - y0) * d0 - bend, -s * rise
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        return torch.where(inside, x0 - 2 * c / (b + root) * (x1 - x0), y)


class Chain(nn.Module):
    """Bijections one after another.

    With `recompute`, training keeps the last output alone: the backward pass rebuilds each input from its
    output (Gomez et al. 2017, "The reversible residual network", section 3.2), so memory does not grow
    with the number of steps. Networks inside then compute in full precision, as rebuilding needs.

    Args:
        steps: the bijections, in the order of density evaluation.
        recompute: rebuild instead of store.
    """

    def __init__(self, steps: Sequence["Mix | Coupling"], *, recompute: bool = False) -> None:
        super().__init__()
        self.steps = cast("list[Mix | Coupling]", nn.ModuleList(steps))
        self.recompute = recompute

    def initialise(self, x: Float[Tensor, "b c *space"], given: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """Data-dependent initialisation of every step by what reaches it; returns the output."""
        for step in self.steps:
            step.initialise(x)
            x = step(x, given)[0]
        return x

    def forward(self, x: Float[Tensor, "b c *space"], given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the ladj map (b, 1, *space)."""
        if self.recompute and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return _Rebuilding.apply(self, x, given, *self.parameters())  # pyright: ignore[reportReturnType]
        return self.run(x, given)

    def run(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward`, storing what gradients need."""
        total = x.new_zeros(len(x), 1, *x.shape[2:])
        for step in self.steps:
            x, ladj = step(x, given)
            total = total + ladj
        return x, total

    def inverse(self, y: Float[Tensor, "b c *space"], given: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """x."""
        for step in reversed(self.steps):
            y = step.inverse(y, given)
        return y


class _Rebuilding(torch.autograd.Function):
    """A chain's output without its graph; the backward pass walks the chain from the output back."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, given: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            y, ladj = chain.run(x, given)
        ctx.chain, ctx.given_needs = chain, given is not None and given.requires_grad
        ctx.save_for_backward(y, *(() if given is None else (given,)))
        return y, ladj

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_y, of_ladj = gradients
        y, *told = ctx.saved_tensors
        given = told[0].detach().requires_grad_(ctx.given_needs) if told else None
        of_given = torch.zeros_like(given) if given is not None and ctx.given_needs else None
        # Made before the first of the large temporaries, between which they would keep the heap from shrinking.
        found = {p: torch.zeros_like(p) for p in ctx.chain.parameters() if p.requires_grad}
        with torch.autocast(y.device.type, enabled=False):
            for step in reversed(ctx.chain.steps):
                leaves, again, ladj = step.rebuilt(y, given)
                own = [p for p in step.parameters() if p.requires_grad]
                wanted = [*leaves, *own, *([given] if ctx.given_needs else [])]
                outputs, weights = [again], [of_y]
                if ladj.requires_grad:
                    outputs, weights = [again, ladj], [of_y, of_ladj.sum_to_size(ladj.shape)]
                grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
                of_y = torch.cat([_or_zero(g, leaf) for g, leaf in zip(grads, leaves, strict=False)], 1)
                for parameter, gradient in zip(own, grads[len(leaves) :], strict=False):
                    if gradient is not None:
                        found[parameter].add_(gradient)
                if of_given is not None and grads[-1] is not None:
                    of_given += grads[-1]
                y = torch.cat([leaf.detach() for leaf in leaves], 1)
        return (None, of_y, of_given, *(found.get(p) for p in ctx.chain.parameters()))


def _or_zero(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if gradient is None else gradient


def _shift_and_log_scale(told: Tensor) -> tuple[Tensor, Tensor]:
    shift, raw = told.chunk(2, 1)
    return shift, 2 * torch.tanh(raw / 2)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b at every position; off the CPU as a product of matrices, since GPUs convolve with ten bits (TF32)."""
    if x.device.type != "cpu":
        return torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x.flatten(2)).reshape(x.shape)
    convolve = nn.functional.conv2d if x.ndim == 4 else nn.functional.conv3d
    return convolve(x, weight.reshape(*weight.shape, *[1] * (x.ndim - 2)), bias)


__all__ = ["Chain", "Coupling", "CouplingName", "Mix", "MixingName"]
