"""What learners are taught to find out whether synthetic scans help: real scans alone, and with each kind of others.

An arm is a set of scans that a learner is taught, always the same learner from the same seed, so that arms are paired.
All scans that were made count together as much as the real ones at most, however many they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medgen.data.classic import classical_batch
from medgen.data.labels import label_channels, label_map
from medgen.metrics.paired import class_aurocs, means
from medgen.metrics.rivals import augmentation, classical, mixture, mixup, smote, tuned
from medgen.metrics.segmentation import dice, segment
from medgen.metrics.utility import LearnerName, decisions

REAL, ALONE, CLASSICAL, CHOSEN = "real", "synthetic only", "real + classical", "medgen, chosen on validation"
BOTH = "real + classical + synthetic"


@dataclass(frozen=True, eq=False)
class Examples:
    """Scans for learners.

    Args:
        x: on [0, 1], image channels only.
        y: classes from 0; all 0 where there are none.
        maps: label maps; None where classes are learned.
        patients: whose each is.
        cases: their names; none of scans that were made.
    """

    x: Float[np.ndarray, "n c *space"]
    y: Int[np.ndarray, " n"]
    maps: Int[np.ndarray, "n *space"] | None
    patients: tuple[str, ...]
    cases: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, which: Int[np.ndarray, " m"] | slice) -> "Examples":
        """Some of them."""
        numbers = np.arange(len(self))[which]
        maps = None if self.maps is None else self.maps[numbers]
        patients, cases = (tuple(all_[n] for n in numbers) if all_ else () for all_ in (self.patients, self.cases))
        return Examples(self.x[numbers], self.y[numbers], maps, patients, cases)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a learner is taught.

    Args:
        x: scans.
        told: their classes, chances of classes, or label maps.
        weights: how much each counts.
        strength: of classical transforms; 0 for none.
    """

    x: Float[np.ndarray, "n c *space"]
    told: np.ndarray
    weights: Float[np.ndarray, " n"] | None = None
    strength: float = 0.0


@runtime_checkable
class Learner(Protocol):
    """Learns from scans with what is told of them, and says it of others."""

    @property
    def name(self) -> str:
        """Which it is."""
        ...

    @property
    def measure(self) -> str:
        """What its measure is called."""
        ...

    @property
    def folds(self) -> int:
        """Parts of the training scans on which the strength of classical transforms is chosen."""
        ...

    def told(self, examples: Examples) -> np.ndarray:
        """What is told of scans."""
        ...

    def rivals(self, real: Examples, each: int, seed: int) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Sets that cost nothing to make."""
        ...

    def outcomes(self, lesson: Lesson, held: Examples, seed: int) -> np.ndarray:
        """What it says of held-out scans, a row a run, in the order of the scans."""
        ...

    def values(
        self, outcomes: np.ndarray, held: Examples, counts: Int[np.ndarray, "resamples m"]
    ) -> Float[np.ndarray, " resamples"]:
        """Its measure on every resample of held-out scans, the mean over runs; higher is better."""
        ...


@dataclass(frozen=True)
class Classifier:
    """One of the fixed learners of classes.

    Args:
        name: which.
        classes: how many there are.
        copies: transformed scans for each scan, for learners that are taught once.
        steps, runs: of the network; None: the fixed learner's.
        folds: parts of the training scans.
    """

    name: LearnerName
    classes: int
    copies: int = 10
    steps: int | None = None
    runs: int | None = None
    folds: int = 3
    measure: str = "AUROC"

    def told(self, examples: Examples) -> np.ndarray:
        """Classes."""
        return examples.y

    def rivals(self, real: Examples, each: int, seed: int) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Mixup, SMOTE and the mixture."""
        return {
            "real + mixup": mixup(real.x, real.y, each * self.classes, seed=seed),
            "real + SMOTE": smote(real.x, real.y, each, seed=seed),
            "real + mixture": mixture(real.x, real.y, each, seed=seed),
        }

    def outcomes(self, lesson: Lesson, held: Examples, seed: int) -> np.ndarray:
        """How much each scan looks like each class (runs, m, k)."""
        # Learners see one channel, the mean of several.
        lesson, augment = replace(lesson, x=lesson.x.mean(1, keepdims=True)), None
        if lesson.strength and self.name == "cnn":
            augment = augmentation(lesson.strength)
        elif lesson.strength:
            lesson = _with_copies(lesson, self.copies, seed)
        train = lesson.x[:, 0], lesson.told
        taught: dict[str, Any] = {"weights": lesson.weights, "augment": augment, "steps": self.steps, "runs": self.runs}
        return decisions(self.name, train, held.x.mean(1), seed=seed, **taught)

    def values(self, outcomes: np.ndarray, held: Examples, counts: np.ndarray) -> Float[np.ndarray, " resamples"]:
        """AUROC, of several classes the mean over them."""
        classes = np.arange(self.classes)
        return np.mean([class_aurocs(run, held.y, classes, counts) for run in outcomes], axis=0)


@dataclass(frozen=True)
class Outliner:
    """The fixed learner of label maps.

    Args:
        labels: to tell apart.
        steps: of training; None: the fixed learner's.
        folds: parts of the training scans.
    """

    labels: tuple[int, ...]
    steps: int | None = None
    folds: int = 1
    name: str = "unet"
    measure: str = "Dice"

    def told(self, examples: Examples) -> np.ndarray:
        """Label maps."""
        assert examples.maps is not None
        return examples.maps

    def rivals(self, real: Examples, each: int, seed: int) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """SMOTE and the mixture, of scans with their maps as ramps, which can be added; mixup has no map to tell."""
        ramps = np.stack([label_channels(one, self.labels) for one in self.told(real)])
        pairs, nobody = np.concatenate([real.x, ramps], 1), np.zeros(len(real), dtype=np.int64)
        count, images = each, real.x.shape[1]
        made = {"real + SMOTE": smote(pairs, nobody, count, seed=seed)[0]} if len(real) > 1 else {}
        made["real + mixture"] = mixture(pairs, nobody, count, seed=seed)[0]
        return {
            name: (x[:, :images], np.stack([label_map(one[images:], self.labels) for one in x]).astype(np.int64))
            for name, x in made.items()
        }

    def outcomes(self, lesson: Lesson, held: Examples, seed: int) -> np.ndarray:
        """Dice of each scan (1, m)."""

        def change(x: Tensor, maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            moved, regions = classical_batch(x, generator, lesson.strength, maps)
            return moved, maps if regions is None else regions

        taught: dict[str, Any] = {"labels": self.labels, "steps": self.steps, "weights": lesson.weights, "seed": seed}
        found = segment((lesson.x, lesson.told), held.x, augment=change if lesson.strength else None, **taught)
        return dice(found, self.told(held), self.labels)[None]

    def values(self, outcomes: np.ndarray, held: Examples, counts: np.ndarray) -> Float[np.ndarray, " resamples"]:
        """Mean Dice."""
        return np.mean([means(run, counts) for run in outcomes], axis=0)


# -- lessons -----------------------------------------------------------------------------------------


def taught_with(real: Lesson, x: np.ndarray, told: np.ndarray) -> Lesson:
    """Real scans and others; those count as much as the real ones at most."""
    known = np.eye(told.shape[1])[real.told] if told.ndim == 2 and real.told.ndim == 1 else real.told
    each = min(1.0, len(real.x) / max(len(x), 1))
    weights = np.repeat([1.0, each], [len(real.x), len(x)])
    return Lesson(np.concatenate([real.x, x]), np.concatenate([known, told]), weights)


def _with_copies(lesson: Lesson, copies: int, seed: int) -> Lesson:
    """The scans and `copies` transformed ones of each, which count as much together."""
    moved, rows = classical(lesson.x[:, 0], copies * len(lesson.x), strength=lesson.strength, seed=seed)
    weights = np.ones(len(lesson.x)) if lesson.weights is None else lesson.weights
    both = np.concatenate([weights, weights[rows] / copies])
    return Lesson(np.concatenate([lesson.x, moved[:, None]]), np.concatenate([lesson.told, lesson.told[rows]]), both)


def arms_of(
    learner: Learner, real: Examples, made: Callable[[], Examples], ratios: Sequence[float], seed: int,
    *, beside: int, strength: Callable[[], float],
) -> dict[str, Callable[[], Lesson]]:  # fmt: skip
    """Every arm but those that are chosen, by name; a lesson is put together when it is asked for.

    Args:
        learner: who is taught.
        real: training scans.
        made: synthetic scans, classes in turn, at least as many as the largest ratio asks for.
        ratios: synthetic scans for each real one.
        seed: of what is made of the real scans.
        beside: scans of each rival for each class.
        strength: of classical transforms.
    """
    alone = Lesson(real.x, learner.told(real))

    def mixed(ratio: float) -> Lesson:
        some = made().rows(slice(round(ratio * len(real))))
        return taught_with(alone, some.x, learner.told(some))

    def only() -> Lesson:
        some = made().rows(slice(len(real)))
        return Lesson(some.x, learner.told(some))

    found: dict[str, Callable[[], Lesson]] = {REAL: lambda: alone, ALONE: only}
    found |= {mixed_name(ratio): (lambda ratio=ratio: mixed(ratio)) for ratio in ratios}
    found[CLASSICAL] = lambda: replace(alone, strength=strength())
    for name, (x, told) in learner.rivals(real, beside, seed).items():
        found[name] = lambda x=x, told=told: taught_with(alone, x, told)
    return found


def mixed_name(ratio: float) -> str:
    """The name of an arm."""
    return f"real + {ratio:g} x synthetic"


def tuned_strength(learner: Learner, real: Examples, seed: int) -> float:
    """The strength of classical transforms that suits a learner, chosen on parts of the training scans."""

    def score(strength: float, known: np.ndarray, new: np.ndarray) -> float:
        if set(real.y[known]) != set(real.y) or set(real.y[new]) != set(real.y):
            return float("nan")
        some, held = real.rows(known), real.rows(new)
        found = learner.outcomes(Lesson(some.x, learner.told(some), strength=strength), held, seed)
        return float(learner.values(found, held, np.ones((1, len(held)), dtype=np.int64))[0])

    return tuned(score, real.patients, strata=[str(one) for one in real.y], seed=seed, folds=learner.folds)


__all__ = [
    "ALONE", "BOTH", "CHOSEN", "CLASSICAL", "REAL", "Classifier", "Examples", "Learner", "Lesson", "Outliner",
    "arms_of", "mixed_name", "taught_with", "tuned_strength",
]  # fmt: skip
