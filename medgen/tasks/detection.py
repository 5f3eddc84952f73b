"""How well a bundle tells ill scans from healthy ones, and where they are ill; always beside what needs no model.

Every method sees the same scans. Values of scores whose both ends are unusual are folded about the calibration scans,
so no sign is chosen by looking at ill scans. Numbers about voxels are of the scans with findings, all together; that
healthy scans stay dark is counted apart, as the share in which a mask marks anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.controls import CONTROLS
from medgen.data.dataset import Batch, ScanDataset, model_view
from medgen.log import note, track
from medgen.metrics.detection import auroc, average_precision, sensitivity_at
from medgen.metrics.intervals import binomial_interval, bootstrap_interval, conformal_interval, patients_drawn
from medgen.metrics.localisation import voxel_counts
from medgen.scan import Scan
from medgen.scores.base import Healthy
from medgen.tasks.calibration import mask_threshold, normals_needed, placed
from medgen.tasks.detector import Batches, Detector, Questions
from medgen.tasks.norms import Norms
from medgen.tasks.selection import against, controls_of

# What needs no model. One side of the intensity alone is the strongest of them where lesions are all dark, or all
# bright (Meissen et al. 2021), so both sides stand in the table.
BASELINES: dict[str, dict[str, Any]] = {
    "intensity": {"do": "intensity"},
    "intensity, dark": {"do": "intensity", "bright": False},
    "gradient-energy": {"do": "gradient-energy"},
    "png": {"do": "png"},
    "hog": {"do": "hog"},
    "voxelwise": {"do": "voxelwise"},
    "voxelwise, bright": {"do": "voxelwise", "side": "high"},
    "voxelwise, dark": {"do": "voxelwise", "side": "low"},
    "pca": {"do": "pca"},
}
# Those of them that say where.
MAPPED = frozenset({"intensity", "voxelwise", "pca"})
DETECTOR = "detector"
_DRAWS = 500
_SPECIFICITY, _LIMIT = 0.95, 0.3


@dataclass(frozen=True, eq=False)
class Case:
    """A prepared scan, with what is known of it.

    Args:
        name: of the scan.
        patient: whose it is.
        ready: as the recipe leaves it.
        given: what the model is told besides.
        mask: where its findings are (*space); None where nobody drew them.
        lesion: what was painted, in words.
        covariates: what is known of the person.
    """

    name: str
    patient: str
    ready: Scan
    given: Mapping[str, Tensor | None] = field(default_factory=dict)
    mask: Bool[np.ndarray, "..."] | None = None
    lesion: str = ""
    covariates: Mapping[str, str] = field(default_factory=dict)

    @property
    def x(self) -> Float[Tensor, "1 c *space"]:
        """The voxels as a model sees them."""
        return model_view(self.ready)[None]


@dataclass(frozen=True, eq=False)
class Method:
    """A way to say how unusual a scan is, and what it said of the calibration scans.

    Args:
        name: in the table.
        ask: number and map of a scan.
        healthy: numbers of the calibration scans.
        two_sided: whether low numbers are as unusual as high ones.
        level: what at most the allowed share of healthy maps reach anywhere; None: unknown.
        norms: what age and sex do to its numbers; None: they are not asked.
    """

    name: str
    ask: Callable[[Case], tuple[float, Float[np.ndarray, "..."] | None]]
    healthy: Float[np.ndarray, " n"]
    two_sided: bool = False
    level: float | None = None
    norms: Norms | None = None

    def placed(self, value: float, case: Case) -> tuple[float, float]:
        """How unusual a number is, and its p-value; NaN for that without calibration."""
        if np.isnan(value):
            return np.inf, float("nan")
        place = placed(self.healthy, value, two_sided=self.two_sided, norms=self.norms, cells=case.covariates)
        if place is None:
            return value, float("nan")
        return place.unusual if self.two_sided or self.norms is not None else value, place.p


@dataclass(frozen=True, eq=False)
class Seen:
    """What a method said of some scans: how unusual each is, its p-value, and its map where it was asked for one."""

    values: Float[np.ndarray, " n"]
    p: Float[np.ndarray, " n"]
    maps: Sequence[Float[np.ndarray, "..."] | None]
    marks: Bool[np.ndarray, " n"]

    @classmethod
    def by(cls, method: Method, cases: Sequence[Case], *, maps: bool) -> "Seen":
        """Ask about every scan."""
        placed, kept, marks = [], [], []
        for case in cases:
            value, found = method.ask(case)
            placed.append(method.placed(value, case))
            kept.append(found if maps else None)
            high = -np.inf if found is None else np.nanmax(np.nan_to_num(found, nan=-np.inf))
            marks.append(method.level is not None and bool(high > method.level))
        values, p = np.asarray(placed, dtype=np.float64).reshape(-1, 2).T
        if blind := int(np.isposinf(values).sum()):
            note(f"{method.name} has no number for {blind} of {len(cases)} scans; they count as most unusual.")
        return cls(values, p, kept, np.asarray(marks, dtype=bool))


# -- methods -------------------------------------------------------------------------------------------


def detector_of(bundle: Bundle, rate: float) -> Method:
    """The bundle's own.

    Raises:
        CapabilityError: its models cannot score.
    """
    detector = Detector.of(bundle)
    known = detector.normals
    return Method(
        DETECTOR,
        lambda case: detector(case.x, **case.given),
        detector.scores,
        detector.two_sided,
        None if known is None else mask_threshold(known.maxima, rate),
        Norms.of(bundle.calibration),
    )


def baselines(train: ScanDataset, held: ScanDataset, rate: float) -> list[Method]:
    """What needs no model, having learned from healthy scans and been calibrated on others.

    Args:
        train: healthy scans to learn from.
        held: healthy scans to calibrate on.
        rate: the false-alarm rate of masks.
    """
    healthy = Healthy(Batches(train.volumes()), Batches(held.volumes()))
    return [_baseline(name, healthy, rate) for name in track(list(BASELINES), "Learning baselines")]


def _baseline(name: str, healthy: Healthy, rate: float) -> Method:
    told = BASELINES[name]
    plain = Detector({}, Questions.of(told, told if told["do"] in MAPPED else None)).learned(healthy)

    def ask(case: Case) -> tuple[float, Float[np.ndarray, "..."] | None]:
        values, found = plain.examined(Batch(case.x, real=case.given.get("real")))
        assert values is not None
        return float(values[0]), None if found is None else found[0]

    scores, highest = [], []
    for batch in healthy.held():
        values, found = plain.examined(batch)
        scores += [] if values is None else values.tolist()
        highest += [] if found is None else [float(np.nanmax(each)) for each in found]
    level = mask_threshold(np.asarray(highest), rate) if highest else None
    return Method(name, ask, np.asarray(scores), plain.two_sided, level)


# -- measuring -----------------------------------------------------------------------------------------


def measured(
    methods: Sequence[Method],
    healthy: Sequence[Case],
    groups: Mapping[str, Sequence[Case]],
    *,
    rate: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Tables of plain numbers: how each method finds each group of ill scans, and what it says of healthy ones.

    Args:
        methods: the first is what the others stand beside.
        healthy: scans that none of them has learned from.
        groups: ill scans by name.
        rate: the false-alarm rate asked for.
        seed: of the patients that intervals draw.

    Returns:
        rows (a group and a method each), false_positives (a method each), scans (a scan each).
    """
    first: dict[str, np.ndarray] = {}
    rows, false, scans = [], [], []
    draws = {name: _draws(healthy, cases, seed) for name, cases in groups.items()}
    for method in track(methods, "Measuring detection"):
        dark = Seen.by(method, healthy, maps=False)
        false.append({"method": method.name, **_false_positives(method, dark, rate)})
        scans += _listed(method, "healthy", healthy, dark)
        for name, cases in groups.items():
            found = Seen.by(method, cases, maps=any(case.mask is not None for case in cases))
            scans += _listed(method, name, cases, found)
            values = np.concatenate([dark.values, found.values])
            base = first.setdefault(name, values)
            row = {"ill": name, "method": method.name, "scans": len(cases)}
            if len(healthy):
                row |= _of_scans(values, None if method is methods[0] else base, len(healthy), draws[name])
            rows.append(row | _of_voxels(method, cases, found, seed))
    rows.sort(key=lambda row: list(groups).index(row["ill"]))
    return {"rows": rows, "false_positives": false, "scans": scans}


def _draws(healthy: Sequence[Case], ill: Sequence[Case], seed: int) -> list[np.ndarray]:
    patients = [case.patient for case in (*healthy, *ill)]
    strata = ["healthy"] * len(healthy) + ["ill"] * len(ill)
    return patients_drawn(patients, np.random.default_rng(seed), strata=strata, draws=_DRAWS)


def _listed(method: Method, group: str, cases: Sequence[Case], seen: Seen) -> list[dict[str, Any]]:
    return [
        {"case": case.name, "group": group, "lesion": case.lesion, "method": method.name, "unusual": float(value),
         "p": float(p)}
        for case, value, p in zip(cases, seen.values, seen.p, strict=True)
    ]  # fmt: skip


def _of_scans(values: np.ndarray, base: np.ndarray | None, healthy: int, draws: Sequence[np.ndarray]) -> dict[str, Any]:
    """Numbers about whole scans, the first `healthy` of which are; and how much larger the AUROC of `base` is."""

    def apart(statistic: Callable[..., float], scores: np.ndarray, scans: np.ndarray) -> float:
        return statistic(scores[scans[scans < healthy]], scores[scans[scans >= healthy]])

    wanted: dict[str, Callable[[np.ndarray], float]] = {
        "auroc": lambda n: apart(auroc, values, n),
        "average_precision": lambda n: apart(average_precision, values, n),
        "sensitivity": lambda n: apart(partial(sensitivity_at, specificity=_SPECIFICITY), values, n),
    }
    if base is not None:
        wanted["auroc_behind"] = lambda n: apart(auroc, base, n) - apart(auroc, values, n)
    return _with_intervals(wanted, len(values), draws)


def _with_intervals(
    wanted: Mapping[str, Callable[[np.ndarray], float]], scans: int, draws: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Each number of all scans, and its interval over draws of them."""
    told: dict[str, Any] = {}
    for name, statistic in wanted.items():
        told |= {name: statistic(np.arange(scans)), f"{name}_interval": bootstrap_interval(statistic, draws)}
    return told


def _of_voxels(method: Method, cases: Sequence[Case], seen: Seen, seed: int) -> dict[str, Any]:
    """Numbers about where, of the scans whose findings were drawn; none where the method has no map."""
    pairs = [(n, one, case.mask) for n, (one, case) in enumerate(zip(seen.maps, cases, strict=True))]
    known = [(n, one, mask) for n, one, mask in pairs if one is not None and mask is not None]
    if not known:
        return {}
    numbers, maps, masks = (list(column) for column in zip(*known, strict=True))
    counts = voxel_counts(maps, masks, also=() if method.level is None else (method.level,))
    wanted: dict[str, Callable[[np.ndarray], float]] = {
        "voxel_ap": lambda n: counts.together(n).average_precision(),
        "best_dice": lambda n: counts.together(n).best_dice(),
        "aupro": lambda n: counts.together(n).aupro(_LIMIT),
    }
    draws = patients_drawn([cases[n].patient for n in numbers], np.random.default_rng(seed), draws=_DRAWS)
    told = _with_intervals(wanted, len(numbers), draws)
    return told | ({} if method.level is None else {"dice": counts.dice_at(method.level)})


def _false_positives(method: Method, seen: Seen, rate: float) -> dict[str, Any]:
    """The share of healthy scans flagged, where it would lie by chance, and the share in which anything is marked.

    Nothing with fewer calibration scans than the rate needs: no scan can be flagged then.
    """
    tested = len(seen.p)
    told: dict[str, Any] = {"calibration_scans": len(method.healthy), "scans": tested}
    if not tested or len(method.healthy) < normals_needed(rate):
        return told
    flagged = int((seen.p <= rate + 1e-12).sum())
    told |= {"flagged": flagged / tested, "flagged_interval": binomial_interval(flagged, tested)}
    told["expected_interval"] = conformal_interval(len(method.healthy), tested, rate)
    if method.level is not None:
        marked = int(seen.marks.sum())
        told |= {"marked": marked / tested, "marked_interval": binomial_interval(marked, tested)}
    return told


def controlled(methods: Sequence[Method], healthy: Sequence[Case], *, seed: int = 0) -> list[dict[str, Any]]:
    """AUROC of each control input (see `medgen.data.controls`) against healthy scans, a row a method.

    `below` names those that a method finds healthier than healthy scans: 1.96 standard errors below chance.
    """
    made = {
        name: [replace(case, ready=scan, mask=None) for case, scan in zip(healthy, scans, strict=True)]
        for name, scans in controls_of([case.ready for case in healthy], seed).items()
    }
    rows = []
    for method in track(methods, "Measuring controls"):
        dark = Seen.by(method, healthy, maps=False).values
        row: dict[str, Any] = {"method": method.name, "scans": len(healthy)}
        below = []
        for name, cases in made.items():
            found = Seen.by(method, cases, maps=False).values
            row[name], healthier = against(dark, found)
            below += [name] if healthier else []
        rows.append({**row, "mean": float(np.mean([row[name] for name in CONTROLS])), "below": below})
    return rows


__all__ = [
    "BASELINES", "DETECTOR", "MAPPED", "Case", "Method", "Seen", "baselines", "controlled", "detector_of", "measured",
]  # fmt: skip
