"""Which of the scans that were made are written: those that look like real ones, like their class, and like nobody.

Quality. A scan is rejected that lies further from the training scans than all but `reject` of held-out scans do, by any
of the tests of `medgen.tasks.looks`. Where most of a model's first scans do, as those of blurring models, a note says
so, and only those are rejected that are unusual among them, too (beyond the upper fence; Tukey 1977, "Exploratory data
analysis"). Derived scans are real ones, changed: of them, too, only the unusual are. One of a class is rejected, too,
that looks more like another class, and less like its own than all but `reject` of the held-out scans of that class.

Privacy. A scan from noise that is a copy of a training scan is never written (`medgen.metrics.memorisation`). Derived
scans show their source by design, and say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from medgen.bundle import Bundle
from medgen.errors import PrivacyError
from medgen.log import note
from medgen.metrics.appearance import FEWEST_OF_CLASS, Appearance, conformal
from medgen.metrics.memorisation import CopyDetector, CopyTest
from medgen.models.base import can
from medgen.tasks.looks import Far, Known, Seen, apart, critics, misfit, told_nothing_more, unusual
from medgen.tasks.ways.base import Made

Reason = Literal["", "appearance", "critic", "density", "mask", "label", "copy"]
# Held-out scans and planted copies of each kind that thresholds are set by, at most.
_MOST_HELD, _COPIES = {2: 500, 3: 60}, {2: 20, 3: 8}


@dataclass(frozen=True)
class Verdict:
    """What the gates say of one scan.

    Args:
        reason: why it is rejected; '' where it is not.
        facts: p-values and the ratio r of distances, for the manifest.
        nearest: of the training scans the one it may be a copy of.
        far: tests by which it is further from the training scans than all but `reject` of held-out ones.
    """

    reason: Reason
    facts: Mapping[str, float]
    nearest: int = -1
    far: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Test:
    """One look at scans: how far from the training scans they are, and how far is too far."""

    name: Reason
    distances: Far
    held: Float[np.ndarray, " n"]
    limit: float
    fences: dict[str, float] = field(default_factory=dict)


class Gates:
    """The quality gate and the privacy gate.

    Args:
        known: everybody the model may have learned from: training scans, and those it was selected by.
        held: scans it never saw; None where there are none, which leaves the quality gate open.
        bundle: whose scans are judged; None where they need no model.
        reject: the part of real scans that each quality test may reject; 0: no quality gate.
        seed: of planted copies.
        copies: tell copies: of scans from noise, that is; derived ones show their sources.

    Raises:
        PrivacyError: copies are to be told, but there is one patient.
    """

    def __init__(
        self, known: Known, held: Known | None, bundle: Bundle | None, *, reject: float, seed: int, copies: bool = True
    ) -> None:
        dims = known.x.ndim - 2
        self.known = known
        some = None if held is None else held.take(np.arange(min(len(held), _MOST_HELD[dims])))
        self._detector: CopyDetector | None = None
        self.copy_test: CopyTest | None = None
        if copies:
            require_several(known.patients)
            self._detector = CopyDetector(known.x, known.patients)
            self.copy_test = _copy_test(self._detector, some, _COPIES[dims], seed)
        self._reject, self._classes = reject, tuple(sorted(set(known.labels)))
        self._tests: list[_Test] = []
        self._doubts: dict[str, Float[np.ndarray, " n"]] = {}
        # Ways whose usual scans it has seen.
        self.usual: set[str] = set()
        if some is None or not reject:
            return
        labels = np.asarray([self._classes.index(name) for name in known.labels])
        self._look = Appearance(known.x, labels)
        self._learn("appearance", apart(self._look), some)
        if bundle is not None and told_nothing_more(bundle.model):
            if can(bundle.model, "perceives"):
                self._learn("critic", apart(Appearance(known.x, None, critics(bundle.model))), some)
            if can(bundle.model, "scores_density", "bounds_density"):
                self._learn("density", unusual(bundle.model, some), some)
        if bundle is not None and known.maps is not None and some.maps is not None:
            note("Teaching a small network what masks look like on these scans, to see whether drawn ones fit.")
            self._learn("mask", misfit(known, bundle.model.config.labels, seed=seed), some)
        self._learn_labels(some)

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the tests of how far from the training scans a scan is."""
        return tuple(test.name for test in self._tests)

    def _learn(self, name: Reason, distances: Far, held: Known) -> None:
        far = distances(held.seen)
        self._tests.append(_Test(name, distances, far, float(np.quantile(far, 1 - self._reject, method="higher"))))

    def _learn_labels(self, held: Known) -> None:
        """How little held-out scans look like their own class."""
        theirs = np.asarray(held.labels)
        for number, name in enumerate(self._classes if len(self._classes) > 1 else ()):
            there = np.flatnonzero(theirs == name)
            if len(there) >= FEWEST_OF_CLASS:
                rows = self._look.rows(held.x[there])
                self._doubts[name] = self._look.doubt(rows, np.full(len(there), number))

    def learn_usual(self, how: str, made: Sequence[Made]) -> None:
        """Learn from the first scans made in one way how far from the training scans such scans usually are."""
        self.usual.add(how)
        for test in self._tests_of(made):
            far = test.distances(Seen.of(made))
            low, high = np.quantile(far, [0.25, 0.75])
            share = float((far > test.limit).mean())
            derived = all(one.origin == "derived" for one in made)
            if share > 0.5 or derived:
                test.fences[how] = float(high + 1.5 * (high - low))
            if share > 0.5:
                more = "" if derived else " To make better ones, train for longer or use another preset."
                note(
                    f"By {test.name}, {share:.0%} of the first {len(made)} scans ({how}) are further from the training "
                    f"scans than all but {self._reject:.0%} of held-out scans: only those unusual among them are "
                    f"rejected.{more}"
                )

    def _tests_of(self, made: Sequence[Made]) -> list[_Test]:
        """The tests that these scans can be put to: masks are compared where a model drew them."""
        return [test for test in self._tests if test.name != "mask" or all(one.seen is not None for one in made)]

    def judge(self, made: Sequence[Made]) -> list[Verdict]:
        """A verdict for each scan."""
        if not made:
            return []
        seen = Seen.of(made)
        reasons: list[Reason] = ["" for _ in made]
        facts: list[dict[str, float]] = [{} for _ in made]
        unlike: list[list[str]] = [[] for _ in made]
        for test in self._tests_of(made):
            far = test.distances(seen)
            p = conformal(far, test.held)
            for n, one in enumerate(made):
                facts[n][f"p_{test.name}"] = round(float(p[n]), 4)
                limit = max(test.limit, test.fences.get(one.how, 0.0))
                reasons[n] = reasons[n] or (test.name if far[n] > limit else "")
                unlike[n] += [test.name] * bool(far[n] > test.limit)
        if self._doubts:
            self._judge_labels(made, seen.x, reasons, facts)
        nearest = self._judge_copies(made, seen.x, reasons, facts)
        return [Verdict(*told) for told in zip(reasons, facts, nearest, map(tuple, unlike), strict=True)]

    def _judge_labels(
        self, made: Sequence[Made], x: Tensor, reasons: list[Reason], facts: list[dict[str, float]]
    ) -> None:
        rows = self._look.rows(x)
        for n, one in enumerate(made):
            if one.label in self._doubts:
                doubt = self._look.doubt(rows[n : n + 1], np.asarray([self._classes.index(one.label)]))
                held = self._doubts[one.label]
                facts[n]["p_label"] = round(float(conformal(doubt, held)[0]), 4)
                # Of classes that nobody confuses, what is likelier of its own than of all others is no stranger.
                limit = max(float(np.quantile(held, 1 - self._reject, method="higher")), np.log(2))
                reasons[n] = reasons[n] or ("label" if doubt[0] > limit else "")

    def _judge_copies(
        self, made: Sequence[Made], x: Tensor, reasons: list[Reason], facts: list[dict[str, float]]
    ) -> list[int]:
        nearest = [-1] * len(made)
        if self._detector is None or self.copy_test is None:
            return nearest
        found = self._detector.nearest(x)
        for n, one in enumerate(made):
            facts[n] |= {f"r_{space}": round(float(r), 4) for space, r in found[n].r.items()}
            if one.origin == "synthetic" and self.copy_test.is_copy(found[n]):
                reasons[n], nearest[n] = "copy", found[n].nearest
        return nearest


def require_several(patients: Sequence[str]) -> None:
    """Refuse a single patient.

    Raises:
        PrivacyError: there are not two.
    """
    if len(set(patients)) < 2:
        raise PrivacyError(
            f"There is {len(set(patients))} patient to learn from, so whatever a model draws shows that patient, and "
            "copies cannot be told. Add scans of more patients."
        )


def _copy_test(detector: CopyDetector, held: Known | None, copies: int, seed: int) -> CopyTest:
    """Thresholds between held-out scans and planted copies."""
    if held is None:
        note("No held-out scan: copies are told with the threshold r = 0.5.")
        return CopyTest.untested()
    test = detector.calibrate(held.x, copies=copies, seed=seed)
    if not test.reliable:
        worst = min(test.copies_caught, key=lambda kind: test.copies_caught[kind])
        note(
            f"On these scans copies are told imperfectly: {test.held_out_flagged:.0%} of held-out scans look like "
            f"copies, {test.copies_caught[worst]:.0%} of {worst} copies are caught. Do not rely on the screening alone."
        )
    return test


__all__ = ["Gates", "Verdict", "require_several"]
