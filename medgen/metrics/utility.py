"""What synthetic scans are good for: learners trained on them and tested on real ones.

Train on synthetic, test on real (Esteban et al. 2017, "Real-valued (medical) time series generation with recurrent
conditional GANs"; "classification accuracy score" in Ravuri & Vinyals 2019). The number means something beside the
same learner's number after training on real scans: as many of each class, the same test scans, the same run.

The learners are fixed, so that numbers of different generators and of later versions compare:

- `svm`: 64 whitened principal components, fewer of fewer than 256 scans, and a support vector machine with a Gaussian
  kernel, C = 1. A target.
- `cnn`: five convolutions on three levels, 800 steps of 32 scans, the mean over 5 seeds. A target.
- `logistic`: logistic regression on standardised voxels. Shown only: it rewards a generator for matching means.

Scans of real training sets are given balanced: `balanced` takes as many of each class. Where real and synthetic scans
are mixed, each may count more or less than one (`weights`); what a scan shows may be a mixture of classes (a row of
chances in place of a class), and the network may be given an augmentation that changes every batch anew.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from medgen.errors import DataError
from medgen.metrics.detection import auroc
from medgen.metrics.learner import Ladder, averaged_down, shuffled_rows
from medgen.seeds import derived_seed

LearnerName = Literal["svm", "cnn", "logistic"]
LEARNERS: tuple[LearnerName, ...] = ("svm", "cnn", "logistic")
# What decides whether a generator is useful; logistic regression is shown beside them.
TARGETS: tuple[LearnerName, ...] = ("svm", "cnn")
_COMPONENTS = 64
# A component with a smaller part of the first one's variance is rounding.
_FLAT = 1e-9
# Scans, or their weight together, that a component takes.
_A_COMPONENT = 4
_SEEDS = 5
_STEPS, _BATCH, _RATE = 800, 32, 2e-3
_WIDTHS = (8, 16, 32)
# The longest edge that the network sees: what is larger is averaged down.
_EDGE = {2: 32, 3: 16}

# A class a scan, or its chances of each class.
Classes = Int[np.ndarray, " n"] | Float[np.ndarray, "n k"]
# Changes a batch of scans (b, 1, *space), by a generator that decides all that is random.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def utility(
    train: tuple[Float[np.ndarray, "n *space"], Classes],
    test: tuple[Float[np.ndarray, "m *space"], Int[np.ndarray, " m"]],
    *,
    learners: Sequence[LearnerName] = LEARNERS,
    seed: int = 0,
    weights: Float[np.ndarray, " n"] | None = None,
    augment: Augmentation | None = None,
) -> dict[str, float]:
    """AUROC on `test` of every learner trained on `train`.

    Args:
        train: scans on any scale, two or three axes, and their classes; the same number of each class, or of the same
            weight together. Rows of chances are those of the classes 0, 1, ...
        test: real scans on the same scale, and their classes.
        learners: which; all by default.
        seed: of the network's seeds.
        weights: how much each training scan counts; None: all alike.
        augment: what the network's batches go through.

    Raises:
        DataError: fewer than two classes, a class without scans in `test`, or training classes that differ in size.
    """
    (x, y), (x_test, y_test) = train, test
    if y.ndim == 2 or weights is not None:
        return _weighed((x, y), (x_test, y_test), learners, seed, weights, augment)
    counts = np.unique_counts(y)
    if len(counts.values) < 2 or set(np.unique(y_test)) != set(counts.values.tolist()):
        raise DataError(
            f"Utility needs the same two or more classes in both sets; found {counts.values.tolist()} to train "
            f"on and {np.unique(y_test).tolist()} to test on."
        )
    if len(set(counts.counts.tolist())) > 1:
        raise DataError(
            f"Utility compares sets with as many scans of each class; found {counts.counts.tolist()}. Use balanced()."
        )
    scores: dict[str, np.ndarray] = {
        name: decisions(name, (x, y), x_test, seed=seed, augment=augment) for name in learners
    }
    return _mean_auroc(scores, y_test, counts.values)


def _weighed(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    learners: Sequence[LearnerName],
    seed: int,
    weights: np.ndarray | None,
    augment: Augmentation | None,
) -> dict[str, float]:
    """The same of scans that count differently, or that show mixtures of classes."""
    y, (x_test, y_test) = train[1], test
    classes = np.arange(y.shape[1]) if y.ndim == 2 else np.unique(y)
    if len(classes) < 2 or set(np.unique(y_test)) != set(classes.tolist()):
        raise DataError(
            f"Utility needs the same two or more classes in both sets; found {classes.tolist()} to train "
            f"on and {np.unique(y_test).tolist()} to test on."
        )
    chances = y if y.ndim == 2 else (y[:, None] == classes).astype(np.float64)
    total = (chances if weights is None else chances * weights[:, None]).sum(0)
    # Mixtures of classes have as much of each up to chance.
    if not np.allclose(total, total.mean(), rtol=0.1 if y.ndim == 2 else 1e-3):
        raise DataError(
            f"Utility compares sets in which each class has the same weight; found {total.round(3).tolist()}. Scale "
            "the weights of each class."
        )
    scores = {name: decisions(name, train, x_test, seed=seed, weights=weights, augment=augment) for name in learners}
    return _mean_auroc(scores, y_test, classes)


def _mean_auroc(scores: Mapping[str, np.ndarray], y: np.ndarray, classes: Int[np.ndarray, " k"]) -> dict[str, float]:
    return {name: float(np.mean([class_auroc(one, y, classes) for one in found])) for name, found in scores.items()}


def decisions(
    learner: LearnerName,
    train: tuple[Float[np.ndarray, "n *space"], Classes],
    x: Float[np.ndarray, "m *space"],
    *,
    seed: int = 0,
    weights: Float[np.ndarray, " n"] | None = None,
    augment: Augmentation | None = None,
    steps: int | None = None,
    runs: int | None = None,
) -> Float[np.ndarray, "runs m k"]:
    """How much each scan of `x` looks like each class, after training; higher is more. One run a seed.

    Args:
        learner: which.
        train: scans and classes, or scans and their chances (n, k) of each class.
        x: scans to judge.
        seed: of the network's seeds.
        weights: how much each training scan counts: the network meets it so often, the others' errors cost so much.
        augment: what the network's batches go through, on the scans' own scale; the other learners know none.
        steps: of the network; 800, the fixed learner's, by default.
        runs: networks with seeds of their own; 5 by default.
    """
    if learner == "cnn":
        taught = (weights, augment, steps or _STEPS)
        return np.stack([_network(train, x, derived_seed(seed, n), *taught) for n in range(runs or _SEEDS)])
    return _classical(learner, train, x, weights)[None]


def class_auroc(scores: Float[np.ndarray, "m k"], y: Int[np.ndarray, " m"], classes: Int[np.ndarray, " k"]) -> float:
    """The mean over classes of the AUROC of that class against the rest; of two classes, the one AUROC.

    >>> class_auroc(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]), np.array([0, 1]))
    1.0
    """
    if len(classes) == 2:
        margin = scores[:, 1] - scores[:, 0]
        return auroc(margin[y == classes[0]], margin[y == classes[1]])
    return float(np.mean([auroc(scores[y != c, k], scores[y == c, k]) for k, c in enumerate(classes)]))


def balanced(y: Int[np.ndarray, " n"], *, seed: int = 0, each: int | None = None) -> Int[np.ndarray, " m"]:
    """Rows with as many scans of each class: `each`, or as many as the rarest has; drawn by `seed`, in order.

    Raises:
        DataError: a class has fewer than `each` scans.
    """
    found = np.unique_counts(y)
    rarest = int(found.counts.min())
    if each is not None and each > rarest:
        raise DataError(f"There are only {rarest} scans of the rarest class; {each} of each were asked for.")
    generator = np.random.default_rng(derived_seed(seed, 1))
    chosen = [generator.permutation(np.flatnonzero(y == c))[: each or rarest] for c in found.values]
    return np.sort(np.concatenate(chosen))


# -- learners --------------------------------------------------------------------------------------


def _classical(
    learner: LearnerName, train: tuple[np.ndarray, np.ndarray], x: np.ndarray, weights: np.ndarray | None
) -> Float[np.ndarray, "m k"]:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    (scans, y), costs = _once_a_class(train, weights) if train[1].ndim == 2 else (train, weights)
    rows = scans.reshape(len(scans), -1)

    def taught(pipeline: Pipeline) -> Pipeline:
        return pipeline.fit(rows, y, **({} if costs is None else {f"{pipeline.steps[-1][0]}__sample_weight": costs}))

    if learner == "svm":
        # Whitened, the directions that a few scans happen to span would all be as loud as those that matter.
        known = len(rows) if costs is None else int(costs.sum())
        count = max(1, min(_COMPONENTS, known // _A_COMPONENT, *rows.shape))
        pipeline = taught(make_pipeline(PCA(count, whiten=True, random_state=0), SVC(C=1.0, kernel="rbf")))
        # Few scans span fewer directions than there are components: whitening would turn rounding into data.
        spread = np.asarray(pipeline.named_steps["pca"].explained_variance_)
        spans = int((spread > _FLAT * spread[0]).sum())
        if 0 < spans < count:
            pipeline = taught(make_pipeline(PCA(spans, whiten=True, random_state=0), SVC(C=1.0, kernel="rbf")))
    else:
        pipeline = taught(make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000)))
    found = pipeline.decision_function(x.reshape(len(x), -1))
    return np.stack([-found, found], 1) if found.ndim == 1 else found


def _once_a_class(
    train: tuple[np.ndarray, np.ndarray], weights: np.ndarray | None
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Scans that show mixtures of classes, once for each class with its chance as the weight."""
    x, chances = train
    rows, classes = np.nonzero(chances)
    return (x[rows], classes), chances[rows, classes] * (1.0 if weights is None else weights[rows])


class _Network(nn.Module):
    """Five convolutions on three levels, with batch normalisation; the mean over space, then a linear layer."""

    def __init__(self, dims: int, classes: int) -> None:
        super().__init__()
        self.ladder = Ladder(1, _WIDTHS, dims)
        self.head = nn.Linear(_WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ladder(x).flatten(2).mean(2))


def _network(
    train: tuple[np.ndarray, np.ndarray],
    x: np.ndarray,
    seed: int,
    weights: np.ndarray | None,
    augment: Augmentation | None,
    steps: int,
) -> Float[np.ndarray, "m k"]:
    """Log chances of each class, from one network trained for a fixed number of steps."""
    target = _target(train[1])
    classes = int(target.max()) + 1 if target.ndim == 1 else target.shape[1]
    known, new = _seen(train[0]), _seen(x)
    centre, spread = known.mean(), known.std().clamp(min=1e-6)
    new = (new - centre) / spread
    if augment is None:
        known = (known - centre) / spread
    changes = torch.Generator().manual_seed(derived_seed(seed, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(known.ndim - 2, classes).train()
        optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for rows in _order(len(known), weights, steps):
            shown = known[rows] if augment is None else (augment(known[rows], changes) - centre) / spread
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(network(shown), target[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part).log_softmax(1) for part in new.split(256)]).double().numpy()


def _target(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y.astype(np.float32) if y.ndim == 2 else np.unique_inverse(y).inverse_indices)


def _order(count: int, weights: np.ndarray | None, steps: int) -> list[Tensor]:
    """Rows of each step: passes over all, or drawn as often as they weigh."""
    if weights is None:
        return shuffled_rows(count, _BATCH, steps)
    return list(torch.multinomial(torch.from_numpy(weights).double(), steps * _BATCH, replacement=True).split(_BATCH))


def _seen(x: np.ndarray) -> Float[Tensor, "n 1 *space"]:
    """Scans as the network sees them: one channel, averaged down to at most `_EDGE` voxels along an axis."""
    scans = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))[:, None]
    return averaged_down(scans, _EDGE[scans.ndim - 2])


__all__ = [
    "LEARNERS", "TARGETS", "Augmentation", "Classes", "LearnerName", "balanced", "class_auroc", "decisions", "utility",
]  # fmt: skip
