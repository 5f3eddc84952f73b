"""Which of the scans that were made are written: those that look like real ones, like their class, and like nobody.

Quality. A scan is rejected that lies further from the training scans than all but `reject` of held-out scans do *and*
than the model's own scans usually do (beyond the upper fence of its first draws; Tukey 1977, "Exploratory data
analysis"): a model whose scans all differ from real ones, as those of blurring models do, is told about in a note
rather than refused scan by scan. One of a class is rejected, too, that looks less like its class than all but `reject`
of the held-out scans of that class.

Privacy. A scan from noise that is a copy of a training scan is never written (`medgen.metrics.memorisation`). Derived
scans show their source by design, and say so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset
from medgen.data.manifest import Manifest, Row
from medgen.data.recipe import Recipe
from medgen.errors import PrivacyError
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.metrics.appearance import FEWEST_OF_CLASS, Appearance, Look, conformal
from medgen.metrics.memorisation import CopyDetector, CopyTest
from medgen.models.abilities import Perceives
from medgen.models.base import Model, can
from medgen.tasks.conditions import conditions_for, told_of
from medgen.tasks.ways.base import Made

Reason = Literal["", "appearance", "critic", "density", "label", "copy"]
# Held-out scans and planted copies of each kind that thresholds are set by, at most.
_MOST_HELD, _COPIES = {2: 500, 3: 60}, {2: 20, 3: 8}
_AT_ONCE = 32


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
class Known:
    """Real scans as a model sees them.

    Args:
        x: (n, c, *space), image channels only.
        rows: what the data tell of each.
    """

    x: Float[Tensor, "n c *space"]
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def patients(self) -> tuple[str, ...]:
        """Whose they are."""
        return tuple(row.patient for row in self.rows)

    @property
    def labels(self) -> tuple[str, ...]:
        """Their classes."""
        return tuple(row.label for row in self.rows)

    def take(self, which: Int[np.ndarray, " m"]) -> "Known":
        """Some of them."""
        return Known(self.x[torch.from_numpy(which)], tuple(self.rows[n] for n in which))


def known_scans(manifest: Manifest, splits: Sequence[str], recipe: Recipe, options: ReadOptions) -> Known | None:
    """The scans of some splits, prepared; None where there are none."""
    rows = tuple(row for row in manifest.rows if row.split in splits)
    if not rows:
        return None
    data = ScanDataset(replace(manifest, rows=rows), recipe, options=options)
    items = [data[n] for n in range(len(data))]
    of = {row.case: row for row in rows}
    return Known(torch.stack([item["x"] for item in items]), tuple(of[item["case"]] for item in items))


# How far scans (n, c, *space) of these classes are from the training scans, (n,).
Far = Callable[[Tensor, Sequence[str]], np.ndarray]


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

    Raises:
        PrivacyError: there is one patient, so that copies cannot be told.
    """

    def __init__(self, known: Known, held: Known | None, bundle: Bundle | None, *, reject: float, seed: int) -> None:
        require_several(known.patients)
        dims = known.x.ndim - 2
        self.known = known
        self._detector = CopyDetector(known.x, known.patients)
        some = None if held is None else held.take(np.arange(min(len(held), _MOST_HELD[dims])))
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
        self._learn("appearance", _apart(self._look), some)
        if bundle is not None and told_nothing_more(bundle.model):
            if can(bundle.model, "perceives"):
                self._learn("critic", _apart(Appearance(known.x, None, _critic(bundle.model))), some)
            if can(bundle.model, "scores_density", "bounds_density"):
                self._learn("density", _unusual(bundle.model, some), some)
        self._learn_labels(some)

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the tests of how far from the training scans a scan is."""
        return tuple(test.name for test in self._tests)

    def _learn(self, name: Reason, distances: Far, held: Known) -> None:
        far = distances(held.x, held.labels)
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
        x = torch.stack([one.x for one in made])
        for test in self._tests:
            far = test.distances(x, [one.label for one in made])
            low, high = np.quantile(far, [0.25, 0.75])
            test.fences[how] = float(high + 1.5 * (high - low))
            share = float((far > test.limit).mean())
            if share > 0.5:
                note(
                    f"By {test.name}, {share:.0%} of the first {len(made)} scans ({how}) are further from the training "
                    f"scans than all but {self._reject:.0%} of held-out scans: train for longer, or use another "
                    "preset. Only those unusual among them are rejected."
                )

    def judge(self, made: Sequence[Made]) -> list[Verdict]:
        """A verdict for each scan."""
        if not made:
            return []
        x = torch.stack([one.x for one in made])
        reasons: list[Reason] = ["" for _ in made]
        facts: list[dict[str, float]] = [{} for _ in made]
        unlike: list[list[str]] = [[] for _ in made]
        for test in self._tests:
            far = test.distances(x, [one.label for one in made])
            p = conformal(far, test.held)
            for n, one in enumerate(made):
                facts[n][f"p_{test.name}"] = round(float(p[n]), 4)
                limit = max(test.limit, test.fences.get(one.how, 0.0))
                reasons[n] = reasons[n] or (test.name if far[n] > limit else "")
                unlike[n] += [test.name] * bool(far[n] > test.limit)
        if self._doubts:
            self._judge_labels(made, x, reasons, facts)
        nearest = self._judge_copies(made, x, reasons, facts)
        return [Verdict(*told) for told in zip(reasons, facts, nearest, map(tuple, unlike), strict=True)]

    def _judge_labels(
        self, made: Sequence[Made], x: Tensor, reasons: list[Reason], facts: list[dict[str, float]]
    ) -> None:
        rows = self._look.rows(x)
        for n, one in enumerate(made):
            if one.label in self._doubts:
                doubt = self._look.doubt(rows[n : n + 1], np.asarray([self._classes.index(one.label)]))
                p = float(conformal(doubt, self._doubts[one.label])[0])
                facts[n]["p_label"] = round(p, 4)
                reasons[n] = reasons[n] or ("label" if p < self._reject else "")

    def _judge_copies(
        self, made: Sequence[Made], x: Tensor, reasons: list[Reason], facts: list[dict[str, float]]
    ) -> list[int]:
        nearest = [-1] * len(made)
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


def told_nothing_more(model: Model) -> bool:
    """Whether a model is told nothing of a scan but its class."""
    told = told_of(model.config)
    return not (told["context"] or told["covariates"] or model.config.labels)


def _apart(look: Appearance) -> Far:
    def far(x: Float[Tensor, "n c *space"], labels: Sequence[str]) -> Float[np.ndarray, " n"]:
        return look.distance(look.rows(x))

    return far


def _critic(model: Model) -> Look:
    """What a model's critic sees in scans."""

    @torch.no_grad()
    def look(x: Float[Tensor, "n c *space"]) -> Float[np.ndarray, "n d"]:
        parts = [cast(Perceives, model).perceive(part.to(model.device)).cpu() for part in x.split(_AT_ONCE)]
        return torch.cat(parts).flatten(1).double().numpy()

    return look


def _unusual(model: Model, held: Known) -> Far:
    """How far log densities are from the middle of held-out ones, either way: too likely is unusual, too."""
    usual = float(np.median(log_densities(model, held.x, held.labels)))

    def far(x: Float[Tensor, "n c *space"], labels: Sequence[str]) -> Float[np.ndarray, " n"]:
        return np.abs(log_densities(model, x, labels) - usual)

    return far


@torch.no_grad()
def log_densities(model: Model, x: Float[Tensor, "n c *space"], labels: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Log density of each scan given its class, or the bound that the model has of it, nats."""
    cond = conditions_for(model.config, labels, [{} for _ in labels])
    density: Any = model
    density = density.log_prob if can(model, "scores_density") else density.elbo
    found = []
    for first in range(0, len(x), _AT_ONCE):
        which = slice(first, first + _AT_ONCE)
        told = None if cond is None else cond[which].to(model.device)
        found.append(density(x[which].to(model.device), told).cpu())
    return torch.cat(found).double().numpy()


__all__ = ["Gates", "Known", "Verdict", "known_scans", "log_densities", "require_several", "told_nothing_more"]
