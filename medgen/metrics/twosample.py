"""Classifiers that try to tell one set of scans from another by their features."""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from medgen.metrics.detection import auroc

# Blocks that a jackknife leaves out, and the folds of a cross-validation, each of several blocks.
_BLOCKS, _FOLDS = 20, 5

# Rows of more columns are turned onto so many principal components first.
_MOST_COLUMNS, _COMPONENTS = 512, 128

Block = Int[np.ndarray, " _"]
Kind = Literal["linear", "trees"]


def c2st(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], *, kind: Kind = "linear", seed: int = 0) -> float:
    """How well a classifier tells rows of x from rows of y: its AUROC, cross-validated in 5 folds.

    Lopez-Paz & Oquab 2017, "Revisiting classifier two-sample tests": if both are of one source, no classifier tells
    them apart, and the AUROC is about 0.5.

    Args:
        x, y: features.
        kind: 'linear', logistic regression; 'trees', 100 boosted trees, which also see what is not a shift.
        seed: of the folds.
    """
    rng = np.random.default_rng(seed)
    folds = folds_of((blocks_of(np.arange(len(x)), rng), blocks_of(np.arange(len(y)), rng)))
    return mean_auroc(classifier_scores(x, y, folds, kind), folds)


def classifier_scores(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], folds: tuple[Block, Block], kind: Kind
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """How much each row looks like one of y to a classifier that has not seen its fold.

    Rows of more than 512 columns are turned onto principal components of the other folds first: 128, or a quarter
    of the rows.
    """
    from sklearn.decomposition import PCA
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, label = np.concatenate([x, y]), np.repeat([0, 1], [len(x), len(y)])
    fold, scores = np.concatenate(folds), np.zeros(len(x) + len(y))
    for part in np.unique(fold):
        learner = [HistGradientBoostingClassifier(max_leaf_nodes=8, random_state=0)]
        if kind == "linear":
            learner = [StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)]
        if rows.shape[1] > _MOST_COLUMNS:
            learner = [PCA(min(_COMPONENTS, sum(fold != part) // 4), svd_solver="full"), *learner]
        learner = make_pipeline(*learner)
        learner.fit(rows[fold != part], label[fold != part])
        scores[fold == part] = learner.predict_proba(rows[fold == part])[:, 1]
    return scores[: len(x)], scores[len(x) :]


def mean_auroc(scores: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]], folds: tuple[Block, Block]) -> float:
    """The mean over folds of the AUROC; scores of different folds are different classifiers' and do not compare."""
    found = []
    for fold in np.unique(np.concatenate(folds)):
        x, y = (one[where == fold] for one, where in zip(scores, folds, strict=True))
        if len(x) and len(y):
            found.append(auroc(x, y))
    return float(np.mean(found))


def folds_of(blocks: tuple[Block, Block]) -> tuple[Block, Block]:
    """The fold of each row, from its block."""
    return blocks[0] % _FOLDS, blocks[1] % _FOLDS


def blocks_of(owners: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """The block of each scan: 20, of about as many scans; an owner's scans are in one block.

    >>> blocks_of(np.array([3, 3, 7]), np.random.default_rng(0)).tolist()
    [0, 0, 1]
    """
    names, place, counts = np.unique(owners, return_inverse=True, return_counts=True)
    number = min(_BLOCKS, len(names))
    block, sizes = np.zeros(len(names), dtype=np.int64), np.zeros(number, dtype=np.int64)
    for owner in rng.permutation(len(names)):
        block[owner] = sizes.argmin()
        sizes[block[owner]] += counts[owner]
    return block[place]


__all__ = ["Block", "Kind", "blocks_of", "c2st", "classifier_scores", "folds_of", "mean_auroc"]
