"""A study of arms: every learner is taught every arm of every draw, and their numbers are compared, paired."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medgen.errors import ConfigError
from medgen.log import Progress, note
from medgen.metrics.intervals import Interval
from medgen.metrics.paired import Again, drawn_again, interval, over_sets, verdict
from medgen.metrics.utility import LEARNERS, TARGETS
from medgen.seeds import derived_seed
from medgen.tasks.arms import (
    ALONE,
    BOTH,
    CHOSEN,
    CLASSICAL,
    REAL,
    Examples,
    Learner,
    Lesson,
    arms_of,
    mixed_name,
    taught_with,
    tuned_strength,
)  # fmt: skip

# Scans that are made for a learner, at most.
MOST = {2: 10_000, 3: 1_000}
# Scans of each rival for every real one.
_RIVALS = 10
# Test patients of a class below which there are no intervals, and no verdicts.
FEWEST = 5
MEAN = "mean of targets"


@dataclass(frozen=True)
class Useful:
    """What of the measurement a person decides.

    Args:
        ratios: synthetic scans for each real one.
        learners: of classes; masks have one of their own.
        low_data: training scans of each class (of masks: in all) of a learning curve; none: all there are.
        draws: of training patients for each point of that curve.
        minutes: training time of each generator of that curve.
        synthetic: an output of `medgen augment` whose scans are used; None: the bundle draws them.
        seed: decides everything.
        steps, runs: of networks; None: the fixed learners' (one run a draw in a learning curve).
        resamples: of test patients, for intervals.
    """

    ratios: Sequence[float] = (0.5, 1, 2, 5, 10, 20)
    learners: Sequence[str] = LEARNERS
    low_data: Sequence[int] = ()
    draws: int = 5
    minutes: float = 5
    synthetic: str | Path | None = None
    seed: int = 0
    steps: int | None = None
    runs: int | None = None
    resamples: int = 1000

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) <= 0 or max(self.ratios) > 100:
            raise ConfigError(f"--ratios takes numbers above 0 and up to 100; found {list(self.ratios)}.")
        if unknown := sorted(set(self.learners) - set(LEARNERS)):
            raise ConfigError(f"There is no learner {unknown[0]!r}. Learners: {', '.join(LEARNERS)}.")
        if not self.learners or self.draws < 1 or any(size < 2 for size in self.low_data):
            raise ConfigError("--learners, --draws and --low-data take one or more, and two or more scans of a class.")
        if self.low_data and self.synthetic is not None:
            raise ConfigError(
                "--low-data trains a generator on every small draw, so that it knows no other patient; scans that were "
                "made before (--synthetic) are of a generator that does. Leave one of them out."
            )


class Made:
    """Synthetic scans for one draw of training scans, made when they are asked for; classes come in turn."""

    def __init__(self, drawer: Callable[[np.ndarray, int], Examples], real: Examples, dims: int, asked: Useful) -> None:
        self._drawer, self._seed = drawer, derived_seed(asked.seed, 3, len(real))
        classes = np.unique(real.y)
        wanted = int(np.ceil(max(1.0, *asked.ratios) * len(real)))
        count = max(len(real), min(wanted, MOST[dims]))
        self.labels = np.resize(real.y if real.maps is not None else classes, count)
        self._found: Examples | None = None

    def __call__(self) -> Examples:
        """The scans, perhaps fewer than were asked for."""
        if self._found is None:
            self._found = self._drawer(self.labels, self._seed)
        return self._found


class Study:
    """What learners said of held-out scans after every lesson, and what follows from it.

    Args:
        learners: who is taught.
        val: to choose on; None: nothing is chosen.
        test: to report on.
        asked: what a person decides.
        kept: a folder for outcomes.
    """

    def __init__(
        self, learners: Sequence[Learner], val: Examples | None, test: Examples, asked: Useful, kept: Path | None
    ) -> None:
        self.learners, self._val, self._test, self._asked, self._kept = learners, val, test, asked, kept
        self.notes: list[str] = []
        # By learner and arm, an entry a draw.
        self._said: dict[tuple[str, str], list[np.ndarray]] = {}
        self._chose: dict[tuple[str, str], list[str]] = {}
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)

    def taught(self, size: int, draw: int, real: Examples, made: Made, bar: Progress) -> None:
        """Teach every learner every arm of one draw."""
        if draw == 0:
            self._said, self._chose = {}, {}
        each = min(_RIVALS * int(np.bincount(real.y).max()), MOST[real.x.ndim - 2])
        for learner in self.learners:
            self._one(learner, f"{size}-{draw}-{learner.name}", (size, draw), real, made, each, bar)

    def _one(
        self, learner: Learner, key: str, of: tuple[int, int], real: Examples, made: Made, each: int, bar: Progress
    ) -> None:
        seed = derived_seed(self._asked.seed, 4, *of)
        held = self._test if self._val is None else _joined(self._val, self._test)
        ratios = [ratio for ratio in self._asked.ratios if round(ratio * len(real)) <= len(made.labels)]

        @cache
        def strength() -> float:
            def find() -> np.ndarray:
                return np.asarray([tuned_strength(learner, real, seed)])

            found = float(self._remembered(f"{key}-strength", find)[0])
            self._chose.setdefault((learner.name, CLASSICAL), []).append(f"strength {found:g}")
            bar.advance(3 * learner.folds)
            return found

        def learned(arm: str, lesson: Callable[[], Lesson]) -> np.ndarray:
            found = self._remembered(f"{key}-{arm}", lambda: learner.outcomes(lesson(), held, seed))
            bar.advance(1, f"{arm}")
            return found

        arms = arms_of(learner, real, made, ratios, seed, beside=each, strength=strength)
        strength()
        said = {}
        for arm, lesson in arms.items():
            ratio = next((one for one in ratios if mixed_name(one) == arm), None)
            if ratio is not None and round(ratio * len(real)) > self._available(made, key, arm):
                self._tell(f"There are too few synthetic scans for a ratio of {ratio:g}: it is left out.")
                continue
            said[arm] = learned(arm, lesson)
        self._choose(learner, real, made, said, learned, strength, ratios)
        for arm, found in said.items():
            self._said.setdefault((learner.name, arm), []).append(found[:, len(held) - len(self._test) :])

    def _available(self, made: Made, key: str, arm: str) -> int:
        """How many synthetic scans there are; what is remembered needs none."""
        return len(made.labels) if self._is_kept(f"{key}-{arm}") else len(made())

    def _choose(
        self, learner: Learner, real: Examples, made: Made, said: dict[str, np.ndarray],
        learned: Callable[[str, Callable[[], Lesson]], np.ndarray], strength: Callable[[], float],
        ratios: Sequence[float],
    ) -> None:  # fmt: skip
        """The best ratio on the validation split, with classical transforms, too; and the best of all of these."""
        mixed = {mixed_name(ratio): ratio for ratio in ratios if mixed_name(ratio) in said}
        if not mixed:
            return
        first = mixed_name(min(mixed.values(), key=lambda ratio: abs(ratio - 1)))
        best = max(mixed, key=lambda arm: self._on_val(learner, said[arm])) if self._val else first

        def both() -> Lesson:
            some = made().rows(slice(round(mixed[best] * len(real))))
            lesson = taught_with(Lesson(real.x, learner.told(real)), some.x, learner.told(some))
            return replace(lesson, strength=strength())

        said[BOTH] = learned(f"{BOTH} {mixed[best]:g}", both)
        self._chose.setdefault((learner.name, BOTH), []).append(f"{mixed[best]:g} x synthetic")
        if self._val is not None:
            chosen = max([*mixed, BOTH], key=lambda arm: self._on_val(learner, said[arm]))
            said[CHOSEN] = said[chosen]
            self._chose.setdefault((learner.name, CHOSEN), []).append(
                f"{chosen} ({mixed[best]:g} x)" if chosen == BOTH else chosen
            )

    def _on_val(self, learner: Learner, found: np.ndarray) -> float:
        assert self._val is not None
        count = len(self._val)
        return float(learner.values(found[:, :count], self._val, np.ones((1, count), dtype=np.int64))[0])

    def _path(self, key: str) -> Path | None:
        return None if self._kept is None else self._kept / f"{''.join(c if c.isalnum() else '_' for c in key)}.npy"

    def _is_kept(self, key: str) -> bool:
        path = self._path(key)
        return path is not None and path.exists()

    def _remembered(self, key: str, find: Callable[[], np.ndarray]) -> np.ndarray:
        """What was found, in this session or before it was interrupted."""
        path = self._path(key)
        if path is None:
            return find()
        if not path.exists():
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.save(file, find())
            part.replace(path)
        return np.load(path, allow_pickle=False)

    def _tell(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            note(sentence)

    # -- numbers ---------------------------------------------------------------------------------

    def rows(self, size: int, draws: int) -> list[dict[str, Any]]:
        """A row for every learner and arm of one size."""
        test, asked = self._test, self._asked
        strata = None if test.maps is not None else [str(one) for one in test.y]
        # Drawing from hardly anybody again and again would look like certainty.
        resamples = asked.resamples if fewest(test) >= FEWEST else 0
        again = drawn_again(test.patients, strata, draws, resamples=resamples, seed=asked.seed)
        found: dict[str, dict[str, np.ndarray]] = {}
        for learner in self.learners:
            mine = {arm: said for (name, arm), said in self._said.items() if name == learner.name}
            # An arm that some draw lacks cannot be compared.
            found[learner.name] = {
                arm: np.stack([learner.values(one, test, again.scans) for one in said])
                for arm, said in mine.items() if len(said) == draws
            }  # fmt: skip
        targets = [found[name] for name in TARGETS if name in found]
        if len(targets) > 1:
            shared = [arm for arm in targets[0] if all(arm in other for other in targets)]
            found[MEAN] = {arm: np.mean([one[arm] for one in targets], axis=0) for arm in shared}
        return [
            {"size": size or "all", "learner": name, "arm": arm, "draws": draws, **_numbers(arm, arms, again),
             "chosen": ", ".join(self._chose.get((name, arm), []))}
            for name, arms in found.items() for arm in arms
        ]  # fmt: skip


def _numbers(arm: str, arms: dict[str, np.ndarray], again: Again) -> dict[str, Any]:
    """An arm's own number, its gains over real scans and over classical transforms, and what that says."""
    ours = over_sets(arms[arm], again)
    told: dict[str, Any] = {"value": float(ours[0]), "value_interval": _ends(interval(ours))}
    for name, other in (("gain", REAL), ("over_classical", CLASSICAL)):
        if other in arms and arm not in (REAL, other):
            gains = over_sets(arms[arm] - arms[other], again)
            told |= {name: float(gains[0]), f"{name}_interval": _ends(interval(gains))}
            told |= {f"{name}_verdict": verdict(interval(gains))}
    if arm == ALONE:
        theirs = over_sets(arms[REAL], again)
        share = np.divide(ours, theirs, out=np.full_like(ours, np.nan), where=theirs > 0)
        told |= {"share": float(share[0]), "share_interval": _ends(interval(share))}
    return told


def fewest(test: Examples) -> int:
    """Test patients of the rarest class; of label maps all."""
    kinds = np.zeros_like(test.y) if test.maps is not None else test.y
    return min(len({test.patients[n] for n in np.flatnonzero(kinds == kind)}) for kind in np.unique(kinds))


def _ends(found: Interval) -> list[float | None]:
    """Both ends, None where there is no interval: JSON knows no NaN."""
    return [None if end != end else end for end in found]


def _joined(first: Examples, second: Examples) -> Examples:
    maps = None if first.maps is None or second.maps is None else np.concatenate([first.maps, second.maps])
    both = np.concatenate([first.x, second.x]), np.concatenate([first.y, second.y])
    return Examples(*both, maps, (*first.patients, *second.patients))


__all__ = ["FEWEST", "MEAN", "MOST", "Made", "Study", "Useful", "fewest"]
