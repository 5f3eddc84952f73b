"""Ordinary differential equations dy/dt = f(y, t) on batches, and the divergence of f along the way.

Every row of a batch is a problem of its own: it has its own time and, where steps adapt, its own steps, so what
is found for one scan does not depend on those beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from medgen.errors import ConfigError, MedgenError

# What is integrated together, each part (b, ...); and its rate of change at times (b,).
State = tuple[Tensor, ...]
Rate = Callable[[State, Tensor], State]


@dataclass(frozen=True)
class Method:
    """An explicit Runge-Kutta method, as its Butcher tableau.

    Args:
        nodes: fraction of the step at which each stage is evaluated.
        stages: weights of the earlier stages that lead to each stage.
        weights: of the stages in a step.
        errors: weights whose sum estimates a step's error; empty where there is none.
        order: by which power of the step the error of the whole falls.
    """

    nodes: Sequence[float]
    stages: Sequence[Sequence[float]]
    weights: Sequence[float]
    errors: Sequence[float] = ()
    order: int = 1


EULER = Method((0.0,), ((),), (1.0,))
HEUN = Method((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), order=2)
# Dormand & Prince 1980, "A family of embedded Runge-Kutta formulae", RK5(4)7M; its last stage is the next first one.
DORMAND_PRINCE = Method(
    nodes=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    stages=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    weights=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    errors=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)


def integrate(rate: Rate, state: State, times: Float[Tensor, " n"], method: Method = HEUN) -> State:
    """The state at the last of `times`, from that at the first, with one step between each two.

    Raises:
        MedgenError: the result is not finite.

    >>> (y,) = integrate(lambda state, t: (state[0],), (torch.ones(1),), torch.linspace(0, 1, 101))
    >>> round(float(y), 3)
    2.718
    """
    rows = len(state[0])
    for start, stop in pairwise(times):
        time, step = start.expand(rows), (stop - start).expand(rows)
        state = _moved(state, step, _slopes(rate, state, time, step, method), method.weights)
    _check_finite(state, "at the end")
    return state


def integrate_adaptively(
    rate: Rate, state: State, since: float, until: float, *, tolerance: float, most: int = 2000
) -> State:
    """The state at `until` from that at `since`, in steps whose error is about `tolerance`.

    Dormand-Prince 5(4). The error of a step is the root mean square of each part over tolerance * (1 + |y|), the
    largest part counting; a proportional-integral controller chooses each row's next step (Hairer & Wanner 1996,
    "Solving ordinary differential equations II", section IV.2).

    Args:
        rate: of change.
        state: parts (b, ...).
        since, until: times; `until` may be the earlier.
        tolerance: of a step, relative and absolute.
        most: steps, accepted or not, after which it gives up.

    Raises:
        ConfigError: steps became too small or too many.
        MedgenError: the state is not finite.
    """
    rows, span = len(state[0]), until - since
    time = state[0].new_full((rows,), since)
    step = state[0].new_full((rows,), 0.1 * span)
    before = torch.ones_like(step)  # the last accepted error, for the controller's integral part
    done = torch.zeros_like(step, dtype=torch.bool)
    first = rate(state, time)
    for _ in range(most):
        left = until - time
        last = step.abs() >= left.abs() * (1 - 1e-6)
        step = torch.where(done, 0.0, torch.where(last, left, step))
        slopes = _slopes(rate, state, time, step, DORMAND_PRINCE, first)
        new = _moved(state, step, slopes, DORMAND_PRINCE.weights)
        error = _error(state, new, step, slopes, tolerance)
        accepted = (error <= 1) & ~done
        state = _chosen(accepted, new, state)
        first = _chosen(accepted, tuple(part[-1] for part in slopes), first)
        time = torch.where(accepted, torch.where(last, torch.full_like(time, until), time + step), time)
        done = done | (accepted & last)
        if bool(done.all()):
            _check_finite(state, "at the end")
            return state
        grown = 0.9 * error.clamp(min=1e-6) ** -0.14 * before**0.08
        step = step * torch.where(accepted, grown.clamp(0.2, 5.0), (0.9 * error**-0.2).nan_to_num(0.1).clamp(0.1, 0.9))
        before = torch.where(accepted, error.clamp(min=1e-4), before)
        if bool((~done & (step.abs() < 1e-6 * abs(span))).any()):
            _check_finite(first, f"about t = {float(time[~done].min()):.4f}")
            raise ConfigError(_too_hard("a millionth of the way would be a step too long", tolerance))
    raise ConfigError(_too_hard(f"{most:,} steps were not enough", tolerance))


# -- divergence ------------------------------------------------------------------------------------


def traces(
    output: Float[Tensor, "b *event"], x: Float[Tensor, "b *event"], probes: Float[Tensor, "k *event"]
) -> Float[Tensor, "b k"]:
    """probe' (d output / d x) probe for each probe; its mean over random signs is the divergence.

    Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix": one vector-Jacobian product a
    probe. With the rows of the identity as probes their sum is exact, at the price of one product a dimension.
    Row i of `output` depends on row i of `x` alone.
    """
    found = []
    for probe in probes:
        (product,) = torch.autograd.grad(output, x, probe.expand_as(output), retain_graph=True)
        found.append((product * probe).flatten(1).sum(1))
    return torch.stack(found, dim=1)


def lattice_probes(
    shape: tuple[int, ...], *, repeats: int, stride: int, seed: int
) -> Float[Tensor, "repeats lattices c *space"]:
    """Random signs on each of the stride**dims lattices of every stride-th voxel, and zero elsewhere.

    Signs vary least of all probes (Hutchinson 1990), and what is left of the variance comes from pairs of voxels under
    one probe. On a lattice those are far apart, where a network's derivatives are small (Tang & Saad 2012, "A probing
    method for computing the diagonal of a matrix inverse"). The divergence is the sum over lattices.

    Args:
        shape: (c, *space).
        repeats: independent signs for each lattice.
        stride: voxels between neighbours on a lattice; 1 for a single one with all voxels.
        seed: any integer.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.arange(size) % stride for size in shape[1:]], indexing="ij")
    which = sum(axis * stride**n for n, axis in enumerate(axes))
    lattices = torch.arange(stride ** len(axes)).reshape(-1, 1, *[1] * len(axes))
    signs = 2.0 * torch.randint(2, (repeats, len(lattices), *shape), generator=generator) - 1.0
    return signs * (which == lattices)


# -- parts -----------------------------------------------------------------------------------------


def _slopes(
    rate: Rate, state: State, time: Tensor, step: Tensor, method: Method, first: State | None = None
) -> tuple[list[Tensor], ...]:
    """The rate at every stage, part by part."""
    slopes: tuple[list[Tensor], ...] = tuple([] for _ in state)
    for node, weights in zip(method.nodes, method.stages, strict=True):
        known = first is not None and not slopes[0]
        found = first if known and first else rate(_moved(state, step, slopes, weights), time + node * step)
        for part, value in zip(slopes, found, strict=True):
            part.append(value)
    return slopes


def _moved(state: State, step: Tensor, slopes: tuple[list[Tensor], ...], weights: Sequence[float]) -> State:
    return tuple(y + _total(s, weights) * _over(step, y) if weights else y for y, s in zip(state, slopes, strict=True))


def _total(slopes: list[Tensor], weights: Sequence[float]) -> Tensor:
    parts = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _error(state: State, new: State, step: Tensor, slopes: tuple[list[Tensor], ...], tolerance: float) -> Tensor:
    """The largest part's root mean square error (b,), in units of what is tolerated."""
    parts = []
    for y, after, slope in zip(state, new, slopes, strict=True):
        error = _total(slope, DORMAND_PRINCE.errors) * _over(step, y)
        scale = tolerance * (1 + torch.maximum(y.abs(), after.abs()))
        parts.append((error / scale).reshape(len(y), -1).square().mean(1).sqrt())
    return torch.stack(parts).amax(0)


def _chosen(which: Tensor, new: State, old: State) -> State:
    return tuple(torch.where(_over(which, y), y, kept) for y, kept in zip(new, old, strict=True))


def _over(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.ndim - 1))


def _check_finite(state: State, where: str) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in state):
        raise MedgenError(
            f"Following the velocity from noise to scan gave numbers that are not finite, {where}. Look for extreme "
            "values or NaN in the scans; if there are none, the model's training went astray: train it again."
        )


def _too_hard(why: str, tolerance: float) -> str:
    return (
        f"The velocity cannot be followed to a tolerance of {tolerance:g}: {why}. "
        "Set a larger tolerance, or a method with fixed steps."
    )


__all__ = [
    "DORMAND_PRINCE", "EULER", "HEUN", "Method", "Rate", "State", "integrate", "integrate_adaptively", "lattice_probes",
    "traces",
]  # fmt: skip
