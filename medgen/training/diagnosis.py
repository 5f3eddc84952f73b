"""Where a number that is not finite comes from: the scans, a term of the loss, a layer, or a gradient.

Nothing is watched while all is well. When a step has gone wrong it runs once more, with the same randomness, under
hooks that look at what goes into each layer and what comes out.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medgen.data.dataset import Batch
from medgen.errors import TrainingError
from medgen.models.base import Loss, Player

# What torch raises where values that are not finite reach a distribution or a decomposition.
COMPLAINTS = (ValueError, torch.linalg.LinAlgError)

_REMEDY = "Lower the learning rate (--set fit.learning_rate=...), or look for extreme values in the scans."


def diagnosed(
    model: nn.Module, batch: Batch, player: Player, again: Callable[[], Loss], *, seen: int
) -> TrainingError | None:
    """Why a step's loss or gradient is not finite, by taking it again; its gradients are gone afterwards.

    Args:
        model: whose layers are watched.
        batch: of the step.
        player: whose step it is.
        again: computes the loss as the step did.
        seen: images before the step.

    Returns:
        The error to raise; None where every number is finite this time, such as a gradient whose norm alone overflows.
    """
    model.zero_grad(set_to_none=True)  # no step shall be taken with what went wrong
    told = _scans(batch) + _weights(model)
    loss, place = _forward(model, again)
    if loss is None or not _finite(loss.total):
        terms = [] if loss is None else [name for name, term in loss.terms.items() if not _finite(term)]
        if loss is None and not (place or told):
            return None
        fault = "" if loss is None else f"; the term at fault: {', '.join(terms or ['total'])}"
        return TrainingError(
            f"After {seen:,} images the loss of '{player.name}' is not finite{fault}. {told}{place} {_REMEDY}"
        )
    if place := _backward(model, loss.total.mean() / batch.x[0].numel()):
        return TrainingError(
            f"After {seen:,} images the gradient of '{player.name}' is not finite, though its loss is. {told}{place} "
            f"Look for a square root, logarithm or division at 0 there. {_REMEDY}"
        )
    return None


def alone(refusal: Exception, player: Player) -> TrainingError | None:
    """What to do where torch refuses to normalise over a batch that has one value of a feature; None of others."""
    if "more than 1 value per channel" not in str(refusal):
        return None
    return TrainingError(
        f"'{player.name}' normalises over the batch, which takes two values of each feature or more; found one scan a "
        "step, and a level with one position. Pass --set fit.batch_size=2 or more, or fewer model.levels."
    )


# -- what the step is given ------------------------------------------------------------------------


def _scans(batch: Batch) -> str:
    """Names the scans that are not finite themselves."""
    given = [t for t in (batch.x, batch.cond, batch.context) if t is not None]
    cases = batch.cases or tuple(f"number {n}" for n in range(len(batch.x)))
    bad = [case for n, case in enumerate(cases) if not all(_finite(t[n]) for t in given)]
    return f"Scans with values that are not finite: {', '.join(bad)}; leave them out. " if bad else ""


def _weights(model: nn.Module) -> str:
    """Names the parameters that are not finite before the step, three of them at most."""
    bad = [_of(model, name) for name, p in model.named_parameters() if not _finite(p)]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"Not finite before the step: {', '.join(bad[:3])}{more}. " if bad else ""


# -- forwards --------------------------------------------------------------------------------------


class _Watch:
    """Looks at every layer's inputs and outputs as they come."""

    def __init__(self) -> None:
        self.culprit = self.entered = self.largest = ""
        self.most = 0.0

    def hook(self, name: str) -> Callable[..., None]:
        """For the layer `name`; those inside a layer are done before it, so the first found is the innermost."""

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if self.culprit:
                return
            told, sound = f"{name} ({type(layer).__name__})", all(map(_finite, _tensors((args, kwargs))))
            out = list(_tensors(output))
            if not sound:
                self.entered = self.entered or told
            elif not all(map(_finite, out)):
                self.culprit = told
            elif (most := max((float(t.detach().abs().max()) for t in out if t.numel()), default=0.0)) > self.most:
                self.most, self.largest = most, told

        return look

    def __str__(self) -> str:
        if self.culprit:
            return f"It begins in layer {self.culprit}: finite values go in, others come out."
        if self.entered:
            return f"It begins in the model's own arithmetic before layer {self.entered}."
        largest = f" (the largest, {self.most:.2g}, in {self.largest})" if self.largest else ""
        return f"Every layer gives finite values{largest}: it begins in the arithmetic of the loss."


def _forward(model: nn.Module, again: Callable[[], Loss]) -> tuple[Loss | None, str]:
    """The loss once more (None where torch refuses to compute it), and where it ceases to be finite."""
    watch, loss = _Watch(), None
    layers = [(name, layer) for name, layer in model.named_modules() if name]
    hooks = [layer.register_forward_hook(watch.hook(name), with_kwargs=True) for name, layer in layers]
    try:
        with contextlib.suppress(*COMPLAINTS):
            loss = again()
    finally:
        for hook in hooks:
            hook.remove()
    return loss, str(watch) if loss is not None or watch.culprit or watch.entered else ""


# -- backwards -------------------------------------------------------------------------------------


def _backward(model: nn.Module, total: Tensor) -> str:
    """Where gradients cease to be finite on their way back from the loss; '' where they do not."""
    arrived: list[tuple[str, bool]] = []

    def look(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: arrived.append((name, _finite(gradient)))

    hooks = [p.register_hook(look(name)) for name, p in model.named_parameters() if p.requires_grad]
    try:
        total.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    first = next((n for n, (_, finite) in enumerate(arrived) if not finite), None)
    if first is None:
        return ""
    told = f"It begins at the gradient of {_of(model, arrived[first][0])}"
    return told + (f"; nearer to the loss, at {_of(model, arrived[first - 1][0])}, it is finite." if first else ".")


# -- parts -----------------------------------------------------------------------------------------


def _of(model: nn.Module, parameter: str) -> str:
    """A parameter with its layer, in words."""
    place, _, name = parameter.rpartition(".")
    return f"{parameter} ({type(model.get_submodule(place)).__name__})" if place else f"the model's own {name}"


def _finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values.detach()).all())


def _tensors(value: object, depth: int = 5) -> Iterator[Tensor]:
    """Every floating tensor inside what layers take and give: containers, dataclasses, distributions."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    inside: Iterable[object] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        inside = vars(value).values()
    for one in inside if depth else ():
        yield from _tensors(one, depth - 1)


__all__ = ["COMPLAINTS", "alone", "diagnosed"]
