"""Does a set of generated scans give away whose scans the model has learned from?

Three questions, each asked of training patients and of held-out patients in the same way, so that a model that has
learned what scans look like, and nobody's scan, gives the same answer for both:

- Are generated scans closer to training scans than to as many held-out ones? Expected share: 50 %.
- Can an attacker who holds somebody's scan, and all generated ones, tell that the scan was learned from? The nearer
  the nearest generated scan, the more likely (Hayes et al. 2019, "LOGAN"; Chen et al. 2020, "GAN-Leaks"). AUROC 0.5 is
  guessing, 1 is certainty; the share found at 1 % false accusations says what a careful attacker gains.
- Who is worst off: which training patient has a generated scan nearest, relative to the nearest other patient?

These are tests of given scans against given attackers, not guarantees for any: a low number is no proof of privacy
(Dar et al. 2024, on copies that diffusion models make of medical images; Yale et al. 2020, on such distances).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medgen.errors import DataError, LeakageError
from medgen.metrics.detection import auroc, sensitivity_at
from medgen.metrics.intervals import Interval, bootstrap_interval, patients_drawn
from medgen.metrics.spaces import FeatureSpace, VoxelSpace, euclidean, owners, shrunk
from medgen.seeds import derived_seed

FEWEST, ENOUGH = 4, 20
# Random subsets of training scans, and pairs of half as many that say how much subsets differ.
_SUBSETS, _HALVES = 20, 40
_DRAWS, _FALSE_ACCUSATIONS = 400, 0.01
# Scans compared at a time: answers do not depend on how candidates come in blocks.
_BLOCK = 64
# Closer than this, in parts of a typical distance, is the same scan in two splits.
_SAME = 1e-4

Standing = Literal["measured", "rough", "not measured"]
Chosen = Int[np.ndarray, "_ _"]


@dataclass(frozen=True)
class Attack:
    """How well an attacker tells scans a model has learned from (members) from others.

    Args:
        auroc: the chance that a member is suspected more than a non-member; 0.5 is guessing.
        interval: where that lies with other patients, with a chance of 95 %; its upper end is what to promise by.
        found: the share of members found while at most 1 % of non-members are accused.
        members: how many scans of a kind there were.
        others: the same of non-members.
    """

    auroc: float
    interval: Interval
    found: float
    members: int
    others: int

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class WorstOff:
    """The training patient whom a generated scan is nearest to.

    Args:
        index: of the training scan.
        ratio: distance of the nearest generated scan / of the nearest other patient; near 0 is a copy.
        usual: the lowest such ratio among as many training scans as there are held-out ones (median of subsets).
        held_out: the lowest among held-out scans: what to expect without having learned from anybody.
    """

    index: int
    ratio: float
    usual: float
    held_out: float


@dataclass(frozen=True)
class InSpace:
    """What distances in one space give away.

    Args:
        closer: share of generated scans closer to training scans than to as many held-out ones; expected 0.5.
        interval: where that lies with other patients and other generated scans, with a chance of 95 %.
        attack: by the distance of the nearest generated scan.
        calibrated: by the same, divided by the distance of the nearest other patient.
        worst: who is worst off.
    """

    closer: float
    interval: Interval
    attack: Attack
    calibrated: Attack
    worst: WorstOff


@dataclass(frozen=True)
class Membership:
    """What generated scans give away.

    Args:
        standing: 'measured'; 'rough' with fewer than 20 held-out scans; 'not measured' with fewer than 4.
        note: what that means, in a sentence.
        candidates: generated scans seen.
        train: training scans.
        held_out: held-out scans, without those of patients who have an identical training scan.
        leaked: how many those were.
        compared: scans of either kind in a comparison.
        spaces: the numbers in each space; empty where nothing was measured.
    """

    standing: Standing
    note: str
    candidates: int
    train: int
    held_out: int
    leaked: int
    compared: int
    spaces: dict[str, InSpace]

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


class Closeness:
    """Whom generated scans are close to; takes them block by block and keeps none.

    Memory does not depend on how many there are: of every real scan it keeps the distance of the nearest generated one,
    of every pair of subsets how often a generated scan was closer to the first.

    Args:
        train: scans the model has learned from (n, c, *space).
        patients: whose they are.
        held: scans of patients it neither learned from nor was selected by, of the same source; None: there are none.
        held_patients: whose those are.
        seed: of the subsets.

    Raises:
        DataError: patients are not as many as scans.
        LeakageError: a patient is in both sets.

    >>> rng = torch.Generator().manual_seed(0)
    >>> train, held, made = (torch.rand(n, 1, 8, 8, generator=rng) for n in (12, 6, 30))
    >>> closeness = Closeness(train, list("abcdefghijkl"), held, list("mnopqr"))
    >>> closeness.add(made[:20])
    >>> closeness.add(made[20:])
    >>> found = closeness.report()
    >>> found.standing, found.candidates, sorted(found.spaces)
    ('rough', 30, ['feature', 'voxel'])
    """

    def __init__(
        self,
        train: Float[Tensor, "n c *space"],
        patients: Sequence[str],
        held: Float[Tensor, "m c *space"] | None,
        held_patients: Sequence[str] = (),
        *,
        seed: int = 0,
    ) -> None:
        held = train[:0] if held is None else held
        _check(len(train), patients, len(held), held_patients)
        self._seed, self._candidates = seed, 0
        small = shrunk(torch.cat([train, held]))
        # The spaces are built with scans of both kinds: with one only, that kind would be described better.
        leaked = _leaked(VoxelSpace(small).rows, len(train), held_patients)
        small = small[~leaked]
        self._leaked, self._train = int(leaked.sum()), len(train)
        self._held = len(held) - self._leaked
        self._spaces: dict[str, _Space] = {}
        if self._held < FEWEST or self._train < FEWEST:
            return
        kept = [p for p, gone in zip(held_patients, leaked[len(train) :].tolist(), strict=True) if not gone]
        # Identical scans are one patient's, whatever they are called.
        self._whose = owners(small, [*(f"t{p}" for p in patients), *(f"h{p}" for p in kept)]).numpy()
        self._pairs = self._subsets(min(self._train, self._held), _SUBSETS, 0)
        self._halves = self._subsets(max(1, min(self._train, self._held) // 2), _HALVES, 1)
        for name, kind in (("voxel", VoxelSpace), ("feature", FeatureSpace)):
            self._spaces[name] = _Space(kind(small), self._whose, self._pairs, self._halves)

    def add(self, candidates: Float[Tensor, "k c *space"]) -> None:
        """Take in generated scans."""
        self._candidates += len(candidates)
        for first in range(0, len(candidates) if self._spaces else 0, _BLOCK):
            small = shrunk(candidates[first : first + _BLOCK])
            for space in self._spaces.values():
                space.add(small)

    def report(self) -> Membership:
        """What the generated scans so far give away."""
        compared = min(self._train, self._held)
        facts = (self._candidates, self._train, self._held, self._leaked)
        if not self._spaces or not self._candidates:
            note = (
                f"Closeness was not measured: it takes generated scans, {FEWEST} training and {FEWEST} held-out ones; "
                f"found {self._candidates}, {self._train} and {self._held}."
            )
            return Membership("not measured", note, *facts, 0, {})
        spaces = {name: self._in_space(space) for name, space in self._spaces.items()}
        if compared < ENOUGH:
            note = f"Rough: {compared} scans of either kind were compared; {ENOUGH} or more would say something."
            return Membership("rough", note, *facts, compared, spaces)
        note = (
            f"{compared} scans of either kind were compared; 50 % closer to training and an AUROC of 0.5 are expected."
        )
        return Membership("measured", note, *facts, compared, spaces)

    def _in_space(self, space: "_Space") -> InSpace:
        closer = space.closer.mean() / self._candidates
        # Half of the scans vary as much around all as all do around the truth (Shao and Wu 1989, "A general theory for
        # jackknife variance estimation": delete-d with d = n / 2); the generated scans are a draw, too.
        varies = (space.closer_halves / self._candidates - closer) ** 2
        error = float(np.sqrt(varies.mean() + closer * (1 - closer) / self._candidates))
        interval = Interval(max(0.0, float(closer) - 1.96 * error), min(1.0, float(closer) + 1.96 * error))
        away, relative = -space.nearest, -space.nearest / np.maximum(space.apart, 1e-12)
        attack, calibrated = self._attack(away), self._attack(relative)
        ratio, cut = -relative, self._train
        usual = float(np.median([ratio[one].min() for one in self._pairs[0]]))
        worst = WorstOff(int(ratio[:cut].argmin()), float(ratio[:cut].min()), usual, float(ratio[cut:].min()))
        return InSpace(float(closer), interval, attack, calibrated, worst)

    def _attack(self, scores: Float[np.ndarray, " n"]) -> Attack:
        whose, cut = [str(one) for one in self._whose], self._train
        return _attacked(scores[:cut], scores[cut:], whose[:cut], whose[cut:], derived_seed(self._seed, 2))

    def _subsets(self, size: int, count: int, stream: int) -> tuple[Chosen, Chosen]:
        """Random subsets of training and of held-out scans, patient by patient, all of one size."""
        rng = np.random.default_rng(derived_seed(self._seed, stream))
        kinds = (np.arange(self._train), np.arange(self._train, self._train + self._held))
        sets = [[_patientwise(scans, self._whose, size, rng) for _ in range(count)] for scans in kinds]
        return np.asarray(sets[0]), np.asarray(sets[1])


class _Space:
    """What is kept of all generated scans so far, in one space.

    Args:
        space: of all real scans, training ones first.
        whose: whose each real scan is.
        pairs: subsets of training scans and of held-out ones to compare.
        halves: smaller ones.
    """

    def __init__(
        self,
        space: VoxelSpace | FeatureSpace,
        whose: Int[np.ndarray, " n"],
        pairs: tuple[Chosen, Chosen],
        halves: tuple[Chosen, Chosen],
    ) -> None:
        self._space, self._pairs, self._halves = space, pairs, halves
        self.nearest = np.full(len(whose), np.inf)
        self.apart = _apart(space.rows, torch.from_numpy(whose))
        self.closer, self.closer_halves = np.zeros(len(pairs[0])), np.zeros(len(halves[0]))

    def add(self, small: Float[Tensor, "n c *space"]) -> None:
        distances = self._space.distances(small)[0].numpy()
        self.nearest = np.minimum(self.nearest, distances.min(0))
        self.closer += _closer(distances, self._pairs)
        self.closer_halves += _closer(distances, self._halves)


def likelihood_attack(
    members: Float[np.ndarray, " n"],
    others: Float[np.ndarray, " m"],
    *,
    patients: Sequence[str] | None = None,
    other_patients: Sequence[str] | None = None,
    seed: int = 0,
) -> Attack:
    """How well somebody who holds the model tells members by their log density or critic score.

    A model that fits its training scans better than others of the same source has overfitted, and its bundle gives its
    training patients away to whoever holds it, whatever it generates (Hayes et al. 2019; Yeom et al. 2018, "Privacy
    risk in machine learning: analyzing the connection to overfitting").

    Args:
        members: log densities or scores of scans that were learned from; higher is more suspect.
        others: of held-out scans.
        patients: whose `members` are; None: each is somebody else's.
        other_patients: the same of `others`.
        seed: of the interval.

    Raises:
        DataError: fewer than 4 scans of a kind, or values that are not finite.

    >>> likelihood_attack(np.arange(10.0), np.arange(10.0) - 0.5).auroc
    0.55
    """
    if min(len(members), len(others)) < FEWEST:
        found = f"{len(members)} and {len(others)}"
        raise DataError(f"A likelihood attack is measured on {FEWEST} members and {FEWEST} others; found {found}.")
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise DataError("A likelihood attack needs finite log densities or scores; found NaN or infinity.")
    first = [f"member {n}" for n in range(len(members))] if patients is None else [f"member {p}" for p in patients]
    second = [f"{n}" for n in range(len(others))] if other_patients is None else list(other_patients)
    return _attacked(members, others, first, second, derived_seed(seed, 3))


def _attacked(
    members: Float[np.ndarray, " n"],
    others: Float[np.ndarray, " m"],
    patients: Sequence[str],
    other_patients: Sequence[str],
    seed: int,
) -> Attack:
    scores = np.concatenate([members, others]).astype(np.float64)
    kind = np.repeat(["member", "other"], [len(members), len(others)])
    draws = patients_drawn(
        [*patients, *other_patients], np.random.default_rng(seed), strata=kind.tolist(), draws=_DRAWS
    )
    member = kind == "member"
    interval = bootstrap_interval(lambda n: auroc(scores[n][~member[n]], scores[n][member[n]]), draws)
    found = sensitivity_at(others, members, 1 - _FALSE_ACCUSATIONS)
    return Attack(auroc(others, members), interval, found, len(members), len(others))


def _closer(distances: Float[np.ndarray, "k n"], pairs: tuple[Chosen, Chosen]) -> Float[np.ndarray, "_"]:
    """How many candidates are closer to the first subset of each pair than to the second; ties count half."""
    first, second = ([distances[:, one].min(1) for one in sets] for sets in pairs)
    return np.asarray([((a < b) + 0.5 * (a == b)).sum() for a, b in zip(first, second, strict=True)])


def _patientwise(
    scans: Int[np.ndarray, " n"], whose: Int[np.ndarray, "_"], size: int, rng: np.random.Generator
) -> Int[np.ndarray, " size"]:
    """`size` scans of randomly ordered patients, one patient's together; of the last one some."""
    order = rng.permutation(np.unique(whose[scans]))
    place = np.empty(int(whose.max()) + 1, dtype=np.int64)
    place[order] = np.arange(len(order))
    mixed = rng.permutation(scans)
    return np.sort(mixed[np.argsort(place[whose[mixed]], kind="stable")][:size])


def _apart(rows: Float[Tensor, "n d"], whose: Int[Tensor, " n"]) -> Float[np.ndarray, " n"]:
    """Of each real scan, the distance to the nearest of another patient."""
    found = []
    for part in torch.arange(len(rows)).split(256):
        distances = euclidean(rows[part], rows)
        distances[whose[part][:, None] == whose] = torch.inf
        found.append(distances.amin(1))
    return torch.cat(found).numpy()


def _leaked(rows: Float[Tensor, "n d"], train: int, held_patients: Sequence[str]) -> Bool[Tensor, " n"]:
    """Which scans are of held-out patients who have a training scan, stored twice."""
    usual = rows.norm(dim=1).median() if len(rows) else torch.ones(())
    gone: set[str] = set()
    for part in torch.arange(len(held_patients)).split(256):
        same = euclidean(rows[train + part], rows[:train]).lt(_SAME * usual).any(1)
        gone.update(str(held_patients[n]) for n in part[same].tolist())
    return torch.tensor([False] * train + [patient in gone for patient in held_patients])


def _check(train: int, patients: Sequence[str], held: int, held_patients: Sequence[str]) -> None:
    if train != len(patients) or held != len(held_patients):
        found = f"{len(patients)} for {train} training and {len(held_patients)} for {held} held-out scans"
        raise DataError(f"Every scan needs its patient; found patients: {found}.")
    if both := set(patients) & set(held_patients):
        raise LeakageError(
            "Closeness compares patients who were learned from with others who were not; "
            f"{len(both)} are among both. Split by patient."
        )


__all__ = ["ENOUGH", "FEWEST", "Attack", "Closeness", "InSpace", "Membership", "WorstOff", "likelihood_attack"]
