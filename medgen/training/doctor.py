"""What goes wrong in a training that runs without an error, in sentences that say what to do.

Families tell numbers (`Model.pulse` while they train, `Model.health` at the end); what they mean is said here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from medgen.training.state import Progress

# Fewer active units than this share of all is a collapse worth a sentence; so is a codebook with fewer live codes.
_FEW_UNITS, _FEW_CODES = 0.25, 0.5

# Generated scans are nearly all alike below this part of the distance between real ones.
_VARIETY = 0.2
# Coverage has fallen when it was at least the first, is below the second, and below half of its best.
_COVERED, _UNCOVERED = 0.3, 0.25
# A critic is never wrong that is right in more pairs than this, in so many validations on end.
_NEVER_WRONG, _VALIDATIONS = 0.98, 3
# What is not settled after this part of a course is judged; no progress is spoken of after the second part.
_SETTLED, _LATE = 0.2, 0.5
# The least change of a loss that counts, nats a voxel; and the least rise above its start that is a divergence.
_CHANGE, _RISE = 1e-4, 0.5
# No progress takes validations to tell, and a learning rate that has risen: so many times its warm-up.
_ENOUGH, _WARMED_UP = 5, 4


@dataclass(frozen=True)
class Finding:
    """A trouble by name, what was seen and what to do; and whether going back to earlier weights may help."""

    trouble: str
    sentence: str
    remediable: bool = False


def findings(done: Progress, *, end: int, warmup: int, held_out: bool, over: bool) -> list[Finding]:
    """What is wrong with the present course of a training, judged at its last validation; empty where all is well.

    Args:
        done: losses and pulses so far.
        end: images at which the course ends.
        warmup: images over which the learning rate rises.
        held_out: validation losses are of held-out scans.
        over: training stops here.

    >>> told = [(n, {"variety": 0.7 if n < 4 else 0.01}) for n in range(1, 6)]
    >>> [one.trouble for one in findings(Progress(5, pulses=told), end=10, warmup=0, held_out=True, over=False)]
    ['mode collapse']
    """
    way = 1.0 if over else (done.seen - done.began) / max(1, end - done.began)
    found = [_mode_collapse(done, way, 2), _saturation(done, way)]
    if not _values(done, "real_above"):
        late = way >= _LATE and done.seen - done.began >= _WARMED_UP * warmup
        found += [_divergence(done, 2), _no_progress(done) if held_out and late else None]
    return [one for one in (*found, _not_finite(done)) if one]


def ailing(done: Progress) -> bool:
    """Whether the last validation alone looks like trouble, so that its weights are none to go back to."""
    adversarial = bool(_values(done, "real_above"))
    return bool(_mode_collapse(done, 1.0, 1) or (not adversarial and _divergence(done, 1)))


def _mode_collapse(done: Progress, way: float, lasting: int) -> Finding | None:
    """Samples that hardly differ, or that have left most of the real scans alone (Naeem et al. 2020, equation 9)."""
    variety, coverage, seen = _values(done, "variety"), _values(done, "coverage"), ""
    alike = len(variety) >= lasting and max(variety[-lasting:]) < _VARIETY
    if alike and (way > _SETTLED or max(variety) >= _VARIETY):
        seen = f"generated scans are nearly all alike ({variety[-1]:.0%} as far apart as real ones)"
    elif len(coverage) >= lasting and max(coverage) >= _COVERED:
        now = max(coverage[-lasting:])
        if now < min(_UNCOVERED, max(coverage) / 2):
            seen = f"generated scans cover {coverage[-1]:.0%} of the real ones, at best it was {max(coverage):.0%}"
    if not seen:
        return None
    cure = (
        "Raise the critic's penalties (model.r1, model.r2), lower fit.learning_rate, change what the critic sees "
        "(model.diffaugment=0.5), or take the relativistic loss (model.loss=relativistic)."
    )
    return Finding("mode collapse", f"Mode collapse: after {done.seen:,} images {seen}. {cure}", remediable=True)


def _saturation(done: Progress, way: float) -> Finding | None:
    """A critic that tells real from generated without fail has no slope to teach with (Arjovsky & Bottou 2017)."""
    right = _values(done, "real_above")[-_VALIDATIONS:]
    if way <= _SETTLED or len(right) < _VALIDATIONS or min(right) <= _NEVER_WRONG:
        return None
    return Finding(
        "critic saturation",
        f"Critic saturation: after {done.seen:,} images, and in {_VALIDATIONS} validations on end, the critic rates "
        f"{min(right):.0%} of real scans above generated ones; one that is never wrong teaches little. "
        "Raise its penalties (model.r1, model.r2), set model.diffaugment=0.5, or lower model.critic_rate.",
    )


def _divergence(done: Progress, lasting: int) -> Finding | None:
    """A training loss far above that of the first step."""
    losses = [trained for seen, trained, _ in done.history if seen > done.began][-lasting:]
    if done.start is None or len(losses) < lasting or not min(losses) > done.start + max(_RISE, abs(done.start)):
        return None
    return Finding(
        "divergence",
        f"Divergence: after {done.seen:,} images the training loss is {losses[-1]:.3g} nats a voxel; at the start it "
        f"was {done.start:.3g}. Lower fit.learning_rate or raise fit.warmup, or look for extreme values in the scans.",
        remediable=True,
    )


def _no_progress(done: Progress) -> Finding | None:
    """Held-out scans that are told no better than at the first validation."""
    course = [row for row in done.history if row[0] > done.began]
    if len(course) < _ENOUGH or not min(held for _, _, held in course[1:]) > course[0][2] - _CHANGE:
        return None
    (first, was, held), now = course[0], course[-1][1]
    return Finding(
        "no progress",
        f"No progress: after {done.seen:,} images the held-out loss was never lower than after the first {first:,} "
        f"({held:.4g} nats a voxel); that of training scans was {was:.4g} then and is {now:.4g}. Where it fell, they "
        "are learned by heart: more scans, fit.augment or a smaller model help. Where it did not, raise "
        "fit.learning_rate (lower it if the loss jumps), and see that scans, classes and covariates belong together.",
    )


def _not_finite(done: Progress) -> Finding | None:
    """A held-out loss that is no number; the training loss is looked at in every step."""
    if not done.history or math.isfinite(done.history[-1][2]) or not math.isfinite(done.history[-1][1]):
        return None
    return Finding(
        "held-out loss",
        f"After {done.seen:,} images the loss of held-out scans is not finite; such weights are not kept. "
        "Look for extreme values in the held-out scans, or lower fit.learning_rate.",
    )


def _values(done: Progress, name: str) -> list[float]:
    """What pulses of the present course told of `name`."""
    return [told[name] for seen, told in done.pulses if seen > done.began and name in told]


def complaints(health: Mapping[str, float]) -> list[str]:
    """Sentences about what is wrong at the end of training, none where all is well.

    Posterior collapse: units of a code whose mean does not vary between scans (Burda et al. 2016, section 5.3) tell
    nothing, and the decoder has learned to do without. Codebook collapse: most codes are never used.

    >>> complaints({"active_units": 16, "units": 16})
    []
    """
    found = []
    if "units" in health:
        active, units = round(health["active_units"]), round(health["units"])
        if active == 0:
            found.append(
                "Posterior collapse: no unit of the code says anything about a scan; every reconstruction is the same. "
                "Train longer, lower model.beta, raise model.free_bits (0.1 to 1 nat) or set model.warmup=0.3."
            )
        elif active < _FEW_UNITS * units:
            found.append(
                f"Posterior collapse in part: {units - active} of {units} code units say nothing. A smaller "
                "model.latent does the same in less time; for more of them lower model.beta or raise model.free_bits."
            )
    if "codes" in health:
        used, codes = round(health["codes_used"]), round(health["codes"])
        if used < _FEW_CODES * codes:
            found.append(
                f"Codebook collapse: {used} of {codes} codes are used. Choose a smaller model.codes, or train longer."
            )
    return found


__all__ = ["Finding", "ailing", "complaints", "findings"]
