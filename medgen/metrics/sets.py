"""How far a set of generated scans is from real ones, beside how far other real scans are from the same ones.

All numbers are of rows of features (`medgen.metrics.radiomics`, `hog`, `encoder`), so a number is nothing without the
name of its features. Nor is it much without its floor: the same number of other real scans. A generator at its floor
cannot be told from the real source by that number, with as many scans.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from medgen.errors import DataError
from medgen.metrics.intervals import Interval
from medgen.metrics.twosample import Block, blocks_of, classifier_scores, folds_of, mean_auroc
from medgen.seeds import derived_seed

METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage", "c2st_linear", "c2st_trees")
FEWEST, FEWEST_PATIENTS = 10, 5
# Sets are compared with at most so many scans each: distances are held in memory.
_MOST = 2000
_NEIGHBOURS = 5
# In deviations of the reference.
_FARTHEST = 5.0

Rows = Float[np.ndarray, "_ _"] | Float[Tensor, "_ _"]


@dataclass(frozen=True)
class Measure:
    """A number about generated scans.

    Args:
        value: of the generated scans against the reference.
        interval: where it would lie with other scans, with a chance of 95 %.
        floor: of the other real scans against the same reference.
        floor_interval: the same for it.
        ratio: value / floor; None where the floor may be zero or less.
        ratio_interval: the same for it.
    """

    value: float
    interval: Interval
    floor: float
    floor_interval: Interval
    ratio: float | None = None
    ratio_interval: Interval | None = None


@dataclass(frozen=True)
class SetComparison:
    """Generated against real scans, in one feature space.

    Args:
        scans: in each of the three sets.
        measures: by the names in `METRICS`.
    """

    scans: int
    measures: dict[str, Measure]

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def compare_sets(
    generated: Rows,
    reference: Rows,
    floor: Rows,
    *,
    patients: Sequence[str] | None = None,
    floor_patients: Sequence[str] | None = None,
    seed: int = 0,
) -> SetComparison:
    """All of `METRICS` of generated scans, and of other real scans, against the same reference.

    The three sets are cut down to as many scans each, drawn by `seed`, because most of these numbers depend on how
    many there are. Columns are standardised by the reference (see `standardised`).

    Intervals are those of a jackknife that leaves out one of 20 blocks of patients at a time, of all sets at once
    (Shao & Wu 1989): value +- 1.96 standard errors, within what the metric can be. Draws with replacement would not
    do: copies are each other's nearest neighbours. Trained classifiers stay; only their test scans are left out.

    Args:
        generated: features of generated scans.
        reference: of real scans that the generator has not learned from.
        floor: of other real scans, such as those it has learned from.
        patients: whose the scans of `reference` are; None: each is somebody else's.
        floor_patients: the same of `floor`.
        seed: which scans are taken, and how they fall into blocks.

    Raises:
        DataError: a set has fewer than 10 scans or 5 patients, or the columns differ.
    """
    rows = [np.asarray(one, dtype=np.float64) for one in (reference, generated, floor)]
    check_rows(reference=rows[0], generated=rows[1], floor=rows[2])
    for name, whose in (("reference", patients), ("floor", floor_patients)):
        if whose is not None and len(set(whose)) < FEWEST_PATIENTS:
            raise DataError(
                f"Scans of {FEWEST_PATIENTS} patients or more are compared, as those of one are not independent; found "
                f"{len(set(whose))} ({name})."
            )
    count = min(_MOST, *(len(one) for one in rows))
    chosen, blocks = [], []
    for n, (one, whose) in enumerate(zip(rows, (patients, None, floor_patients), strict=True)):
        rng = np.random.default_rng(derived_seed(seed, n))
        taken = np.sort(rng.permutation(len(one))[:count])
        owners = taken if whose is None else np.unique(np.asarray(whose), return_inverse=True)[1][taken]
        chosen.append(one[taken])
        blocks.append(blocks_of(owners, rng))
    real, made, other = standardised(chosen[0], *chosen)
    value, floor_value = (Pair(real, one, (blocks[0], of)) for one, of in ((made, blocks[1]), (other, blocks[2])))
    whole, part = [one.at() for one in (value, floor_value)], range(max(map(np.max, blocks)) + 1)
    left = [[one.at(without) for without in part] for one in (value, floor_value)]
    found = {}
    for name in METRICS:
        at, at_floor = (one[name] for one in whole)
        several, several_floor = (np.asarray([one[name] for one in each]) for each in left)
        ratio = ratio_interval = None
        if name != "kernel" and at_floor > 0:
            ratio = at / at_floor
            ratio_interval = jackknife_interval(ratio, several / np.maximum(several_floor, 1e-12), (0.0, np.inf))
        ends = (-np.inf if name == "kernel" else 0.0, np.inf if name in ("frechet", "kernel", "density") else 1.0)
        interval, floor_interval = (
            jackknife_interval(at, several, ends),
            jackknife_interval(at_floor, several_floor, ends),
        )
        found[name] = Measure(at, interval, at_floor, floor_interval, ratio, ratio_interval)
    return SetComparison(count, found)


def check_rows(**sets: Float[np.ndarray, "_ _"]) -> None:
    """Refuse sets, given by name, that cannot be compared.

    Raises:
        DataError: too few rows, other columns, or values that are not finite.
    """
    if min(map(len, sets.values())) < FEWEST:
        found = ", ".join(f"{len(one)} ({name})" for name, one in sets.items())
        raise DataError(f"Sets are compared with {FEWEST} scans or more each; found {found}.")
    if len({one.shape[1] for one in sets.values()}) > 1:
        found = ", ".join(f"{one.shape[1]} ({name})" for name, one in sets.items())
        raise DataError(f"Sets to compare have the same features; found columns: {found}.")
    if broken := [name for name, one in sets.items() if not np.isfinite(one).all()]:
        raise DataError(f"Features must be finite; found NaN or infinity in {', '.join(broken)}.")


def standardised(reference: Float[np.ndarray, "n d"], *sets: Float[np.ndarray, "_ d"]) -> list[np.ndarray]:
    """Sets whose columns have mean 0 and standard deviation 1 in the reference.

    A column that is constant in the reference is divided by its deviation about the reference's value in all sets
    together, and is 0 where nothing deviates: it counts, but no infinity comes of it. What lies more than 5
    deviations away is taken for 5: texture has long tails, and one odd scan would decide a Fréchet distance.
    """
    centre, spread = reference.mean(0), reference.std(0)
    size = np.maximum(abs(centre), 1e-30)
    together = np.sqrt(np.concatenate([(one - centre) ** 2 for one in sets or [reference]]).mean(0))
    spread = np.where(spread > 1e-9 * size, spread, together)
    scaled = [np.where(spread > 1e-9 * size, (one - centre) / np.maximum(spread, 1e-30), 0.0) for one in sets]
    return [np.clip(one, -_FARTHEST, _FARTHEST) for one in scaled]


# -- metrics -------------------------------------------------------------------------------------------------


def frechet(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """The Fréchet distance of two Gaussians fitted to the rows, squared (Dowson & Landau 1982; Heusel et al. 2017).

        |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2)

    Covariances are shrunk as Ledoit & Wolf (2004) do, because there may be fewer rows than columns. It still falls
    with the number of rows: compare only distances with the same n and m.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    apart, d = x.mean(0) - y.mean(0), x.shape[1]
    x, y = x - x.mean(0), y - y.mean(0)
    # Where columns outnumber rows, both covariances are multiples of one outside the space of the rows.
    basis = np.linalg.qr(np.concatenate([x, y]).T)[0] if d > len(x) + len(y) else np.eye(d)
    inside, outside = [], []
    for rows in (x, y):
        shrinkage = ledoit_wolf_shrinkage(rows, assume_centered=True)
        least = shrinkage * (rows**2).sum() / len(rows) / d
        rows = rows @ basis
        inside.append((1 - shrinkage) * rows.T @ rows / len(rows) + least * np.eye(basis.shape[1]))
        outside.append(least)
    values, vectors = np.linalg.eigh(inside[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    both = np.sqrt(np.clip(np.linalg.eigvalsh(root @ inside[1] @ root), 0, None)).sum()
    rest = (d - basis.shape[1]) * (np.sqrt(outside[0]) - np.sqrt(outside[1])) ** 2
    return max(0.0, float(apart @ apart + np.trace(inside[0]) + np.trace(inside[1]) - 2 * both + rest))


def kernel_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], *, seed: int = 0) -> tuple[float, float]:
    """The squared maximum mean discrepancy, unbiased, with the kernel (x . y / d + 1)^3, and its standard error.

    Bińkowski et al. 2018, "Demystifying MMD GANs". The standard error leaves out one of 20 blocks of rows at a time;
    of two sets of one source it is too large, by about a half.

    >>> kernel_distance(np.eye(4), np.eye(4))[0]
    -0.4765625
    """
    rng = np.random.default_rng(seed)
    blocks = blocks_of(np.arange(len(x)), rng), blocks_of(np.arange(len(y)), rng)
    inner = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    several = [_discrepancy(*_cut(inner, blocks, n)) for n in range(max(map(np.max, blocks)) + 1)]
    return _discrepancy(*inner), _standard_error(np.asarray(several))


def neighbour_shares(
    real: Float[np.ndarray, "n n"],
    made: Float[np.ndarray, "m m"],
    across: Float[np.ndarray, "n m"],
    k: int = _NEIGHBOURS,
) -> dict[str, float]:
    """Precision, recall, density and coverage, of distances; a ball about a row reaches to its k-th neighbour.

    precision: generated rows within the ball of a real one; recall: real rows within that of a generated one
    (Kynkäänniemi et al. 2019). density: balls of real rows that a generated row lies in, over k, on the mean;
    coverage: real rows whose ball holds a generated one (Naeem et al. 2020).

    Of two sets of one source coverage is about 1 - 2^-k, and density about 1.

    Args:
        real: distances among real rows.
        made: among generated rows.
        across: from real rows to generated ones.
        k: which neighbour, itself not counted.
    """
    k = min(k, len(real) - 1, len(made) - 1)
    reach, reach_made = (np.partition(one, k, axis=1)[:, k] for one in (real, made))
    within = across <= reach[:, None]
    return {
        "precision": float(within.any(0).mean()),
        "recall": float((across <= reach_made[None]).any(1).mean()),
        "density": float(within.sum(0).mean() / k),
        "coverage": float((across.min(1) <= reach).mean()),
    }


# -- both sets, with and without a block ---------------------------------------------------------------------


class Pair:
    """Two sets of standardised rows; their distances and classifiers are computed once.

    Args:
        real: the reference.
        made: generated, or other real, rows.
        blocks: the block of each row.
    """

    def __init__(self, real: Float[np.ndarray, "n d"], made: Float[np.ndarray, "m d"], blocks: tuple[Block, Block]):
        from scipy.spatial.distance import cdist

        self._rows, self._blocks = (real, made), blocks
        sides = ((real, real), (made, made), (real, made))
        self._distances = tuple(cdist(a, b) for a, b in sides)
        self._kernels = tuple(_kernel(a, b) for a, b in sides)
        self._folds = folds_of(blocks)
        self._scores = {kind: classifier_scores(real, made, self._folds, kind) for kind in ("linear", "trees")}

    def at(self, without: int | None = None) -> dict[str, float]:
        """All of `METRICS`, of all rows or without a block."""
        kept = tuple(block != without for block in self._blocks)
        real, made = (rows[keep] for rows, keep in zip(self._rows, kept, strict=True))
        found = {"frechet": frechet(real, made), "kernel": _discrepancy(*_cut(self._kernels, self._blocks, without))}
        found |= neighbour_shares(*_cut(self._distances, self._blocks, without))
        folds = self._folds[0][kept[0]], self._folds[1][kept[1]]
        for kind, (of_real, of_made) in self._scores.items():
            found[f"c2st_{kind}"] = mean_auroc((of_real[kept[0]], of_made[kept[1]]), folds)
        return found


def jackknife_interval(value: float, several: Float[np.ndarray, " blocks"], ends: tuple[float, float]) -> Interval:
    """A 95 % interval of a value from what it is without each block, within `ends`."""
    half = 1.96 * _standard_error(several)
    return Interval(float(max(ends[0], value - half)), float(min(ends[1], value + half)))


def _standard_error(several: Float[np.ndarray, " blocks"]) -> float:
    return float(np.sqrt((len(several) - 1) * several.var()))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _discrepancy(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    """Of kernel matrices; a row is not compared with itself."""
    inside = [(one.sum() - one.trace()) / (len(one) * (len(one) - 1)) for one in (xx, yy)]
    return float(sum(inside) - 2 * xy.mean())


def _cut(
    matrices: tuple[np.ndarray, ...], blocks: tuple[Block, Block], without: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (real, real), (made, made) and (real, made) without a block."""
    rows, columns = (_kept(block, without) for block in blocks)
    real, made, across = matrices
    return real[np.ix_(rows, rows)], made[np.ix_(columns, columns)], across[np.ix_(rows, columns)]


def _kept(block: Block, without: int | None) -> Bool[np.ndarray, " n"]:
    return block != without if without is not None else np.ones(len(block), dtype=bool)


__all__ = [
    "FEWEST", "FEWEST_PATIENTS", "METRICS", "Measure", "Pair", "SetComparison", "check_rows", "compare_sets", "frechet",
    "jackknife_interval", "kernel_distance", "neighbour_shares", "standardised",
]  # fmt: skip
