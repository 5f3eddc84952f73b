"""What synthetic scans have to beat: sets of scans that cost nothing to make from labelled training scans.

- `mixup`: sums of two scans, with both classes in proportion (Zhang et al. 2018, "mixup: beyond empirical risk
  minimization").
- `smote`: a place on the line from a scan to one of its nearest of the same class (Chawla et al. 2002, "SMOTE:
  synthetic minority over-sampling technique").
- `mixture`: draws from Gaussians in the space of principal components, class by class.
- `classical`: scans turned, scaled, bent, with another gamma and noise. How much, `tuned` decides on a part of the
  training scans: nothing that is tested on has a say.

Each draws from the scans that it is given and from `seed` alone.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medgen.data.classic import classical_batch
from medgen.errors import DataError
from medgen.metrics.utility import Augmentation
from medgen.seeds import derived_seed

# Which of classical transforms are tried: half, as they are, twice as strong.
STRENGTHS = (0.5, 1.0, 2.0)
_COMPONENTS, _GAUSSIANS = 32, 5
# Scans of a class that a further Gaussian takes.
_A_GAUSSIAN = 10
_NEIGHBOURS = 5
_ALPHA = 0.4
_FOLDS = 3
_AT_ONCE = 64


def mixup(
    x: Float[np.ndarray, "n *space"], y: Int[np.ndarray, " n"], count: int, *, seed: int = 0, alpha: float = _ALPHA
) -> tuple[Float[np.ndarray, "m *space"], Float[np.ndarray, "m k"]]:
    """`count` sums of two scans, and their chances of the classes 0, 1, ...

        x = l a + (1 - l) b,    l ~ Beta(alpha, alpha)

    The first scans come in turn, so that each class is met equally often in balanced sets.

    Args:
        x: scans.
        y: classes, from 0.
        count: how many.
        seed: decides everything.
        alpha: small values keep sums near one of both; the paper's range is 0.1 to 0.4.
    """
    rng = np.random.default_rng(derived_seed(seed, 11))
    first = np.resize(rng.permutation(len(x)), count)
    second = rng.integers(len(x), size=count)
    share = rng.beta(alpha, alpha, size=count)
    known = np.eye(int(y.max()) + 1)
    along = share.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
    mixed = along * x[first] + (1 - along) * x[second]
    return mixed.astype(np.float32), share[:, None] * known[y[first]] + (1 - share[:, None]) * known[y[second]]


def smote(
    x: Float[np.ndarray, "n *space"],
    y: Int[np.ndarray, " n"],
    each: int,
    *,
    seed: int = 0,
    near: int = _NEIGHBOURS,
) -> tuple[Float[np.ndarray, "m *space"], Int[np.ndarray, " m"]]:
    """`each` scans a class, on lines from a scan a to one of its nearest b: a + u (b - a), u in [0, 1].

    Args:
        x: scans.
        y: classes.
        each: how many of each class.
        seed: decides everything.
        near: of how many nearest scans one is taken.

    Raises:
        DataError: a class has fewer than two scans.
    """
    rng, made = np.random.default_rng(derived_seed(seed, 12)), []
    for name in np.unique(y):
        mine = x[y == name]
        if len(mine) < 2:
            raise DataError(f"SMOTE needs two or more scans of each class; found {len(mine)} of class {name}.")
        rows = mine.reshape(len(mine), -1).astype(np.float64)
        squares = (rows**2).sum(1)
        apart = squares[:, None] + squares[None] - 2 * rows @ rows.T
        np.fill_diagonal(apart, np.inf)
        closest = np.argsort(apart, axis=1, kind="stable")[:, : min(near, len(mine) - 1)]
        first = np.resize(rng.permutation(len(mine)), each)
        second = closest[first, rng.integers(closest.shape[1], size=each)]
        along = rng.random(each).reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
        made.append(mine[first] + along * (mine[second] - mine[first]))
    return np.concatenate(made).astype(np.float32), np.repeat(np.unique(y), each)


def mixture(
    x: Float[np.ndarray, "n *space"],
    y: Int[np.ndarray, " n"],
    each: int,
    *,
    seed: int = 0,
    most: int = _COMPONENTS,
) -> tuple[Float[np.ndarray, "m *space"], Int[np.ndarray, " m"]]:
    """`each` scans a class, drawn from up to 5 Gaussians of that class among the principal components of all scans.

    What the components leave out is added as noise. Fewer Gaussians where there are fewer than 10 scans for each.
    Values stay within those of the scans.

    Args:
        x: scans.
        y: classes.
        each: how many of each class.
        seed: decides everything.
        most: principal components.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    rows = x.reshape(len(x), -1)
    space = PCA(min(most, len(x) - 1, rows.shape[1]), random_state=0).fit(rows)
    codes, made = space.transform(rows).astype(np.float64), []
    # With few scans a Gaussian would be flat: it keeps at least this part of the mean spread along each component.
    floor = 0.01 * float(codes.var(0).mean()) + 1e-12
    for n, name in enumerate(np.unique(y)):
        mine = codes[y == name]
        gaussians = max(1, min(_GAUSSIANS, len(mine) // _A_GAUSSIAN))
        drawn_by = np.random.RandomState(derived_seed(seed, 13, n) % 2**32)
        model = GaussianMixture(gaussians, reg_covar=floor, max_iter=500, random_state=drawn_by).fit(mine)
        made.append(model.sample(each)[0])
    # What the components leave out is noise of its mean variance (Tipping and Bishop 1999): without it the scans would
    # lie in a plane, which no learner that whitens can make sense of.
    noise = np.random.default_rng(derived_seed(seed, 17)).normal(size=(each * len(made), rows.shape[1]))
    scans = space.inverse_transform(np.concatenate(made)) + float(space.noise_variance_) ** 0.5 * noise
    scans = scans.reshape(-1, *x.shape[1:])
    return scans.clip(x.min(), x.max()).astype(np.float32), np.repeat(np.unique(y), each)


# -- classical -------------------------------------------------------------------------------------------


def augmentation(strength: float) -> Augmentation:
    """Classical transforms of a batch, for the network: every batch is changed anew."""

    def change(x: Tensor, generator: torch.Generator) -> Tensor:
        return classical_batch(x, generator, strength)[0]

    return change


def classical(
    x: Float[np.ndarray, "n *space"], count: int, *, strength: float = 1.0, seed: int = 0
) -> tuple[Float[np.ndarray, "m *space"], Int[np.ndarray, " m"]]:
    """`count` transformed scans, for learners that are taught once; and of which scan each is.

    Args:
        x: scans on [0, 1].
        count: how many; the scans come in turn.
        strength: 1 as they are, 2 twice as strong.
        seed: decides everything.
    """
    rows = np.resize(np.random.default_rng(derived_seed(seed, 14)).permutation(len(x)), count)
    generator = torch.Generator().manual_seed(derived_seed(seed, 15) % 2**63)
    parts = [torch.from_numpy(x[rows[n : n + _AT_ONCE]])[:, None] for n in range(0, count, _AT_ONCE)]
    made = [classical_batch(part, generator, strength)[0][:, 0].numpy() for part in parts]
    return np.concatenate(made), rows


def tuned(
    score: Callable[[float, Int[np.ndarray, " a"], Int[np.ndarray, " b"]], float],
    groups: Sequence[str],
    *,
    strata: Sequence[str] = (),
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    folds: int = _FOLDS,
) -> float:
    """The strength whose mean score on held-out parts of the training scans is highest; of equal ones the mildest.

    Args:
        score: of a strength, learned on the first rows and measured on the second; NaN where it says nothing.
        groups: whose each training scan is: all scans of a patient are on one side.
        strata: of each scan, such as its class; each part gets its share of patients of each.
        strengths: to try.
        seed: of the parts.
        folds: parts, each held out once. 1: only the first of three is.
    """
    parts = _parts(groups, strata or [""] * len(groups), max(folds, _FOLDS if folds == 1 else folds), seed)
    held = [(np.flatnonzero(parts != n), np.flatnonzero(parts == n)) for n in range(folds)]
    held = [(known, new) for known, new in held if len(known) and len(new)]
    means = []
    for strength in sorted(strengths):
        found = np.asarray([score(strength, known, new) for known, new in held], dtype=np.float64)
        found = found[np.isfinite(found)]
        means.append(float(found.mean()) if len(found) else -np.inf)
    return sorted(strengths)[int(np.argmax(means))]


def _parts(groups: Sequence[str], strata: Sequence[str], count: int, seed: int) -> Int[np.ndarray, " n"]:
    """A part of each scan: patients of each stratum are dealt in turn, in an order by the seed."""
    rng = np.random.default_rng(derived_seed(seed, 16))
    kind = dict(zip(groups, strata, strict=True))
    part: dict[str, int] = {}
    for name in sorted(set(kind.values())):
        members = sorted(one for one, theirs in kind.items() if theirs == name)
        for place, one in enumerate(rng.permutation(len(members))):
            part[members[int(one)]] = place % count
    return np.asarray([part[one] for one in groups])


__all__ = ["STRENGTHS", "augmentation", "classical", "mixture", "mixup", "smote", "tuned"]
