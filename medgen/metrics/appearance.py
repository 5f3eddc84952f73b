"""Does a scan look like those of a set, and like those of its class? Model-free, in milliseconds a scan.

Features are edges and where they are (histograms of oriented gradients), grey values (quantiles) and detail (log energy
of the bands between averages over 2, 4, 8 and 16 voxels). How far a scan is from a set is Mahalanobis' distance in
their principal components,

    d(x)^2 = (f(x) - m)' S^-1 (f(x) - m),    S shrunk (Ledoit & Wolf 2004, "A well-conditioned estimator for
                                                  large-dimensional covariance matrices")

and how surprising that is, its rank among scans of the same kind that the set does not hold (a conformal p-value; Vovk
et al. 2005, "Algorithmic learning in a random world"):

    p(x) = (1 + #{held out: d >= d(x)}) / (1 + #{held out})
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from medgen.errors import DataError
from medgen.metrics.hog import hog_rows

_COMPONENTS = 64
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_BANDS = 4
# Held-out scans of a class below which nothing is said of its label.
FEWEST_OF_CLASS = 19


def appearance(x: Float[Tensor, "n c *space"]) -> Float[np.ndarray, "n d"]:
    """What each scan looks like, as a row of numbers.

    Args:
        x: scans on [0, 1], two or three axes of space.

    >>> import torch
    >>> appearance(torch.rand(2, 1, 16, 16)).shape[0]
    2
    """
    pool = functional.avg_pool2d if x.ndim == 4 else functional.avg_pool3d
    space = tuple(range(2, x.ndim))
    values, told = x.float().cpu(), []
    for _ in range(_BANDS):
        if min(values.shape[2:]) < 2:
            break
        coarser = pool(values, 2, ceil_mode=True, count_include_pad=False)
        finer = functional.interpolate(coarser, size=values.shape[2:], mode="nearest")
        told.append(((values - finer).square().mean(space) + 1e-6).log().numpy())
        values = coarser
    flat = x.float().cpu().flatten(2).numpy()
    told += list(np.quantile(flat, _QUANTILES, axis=2))
    return np.concatenate([hog_rows(x), *told], axis=1).astype(np.float64)


Look = Callable[[Float[Tensor, "n c *space"]], Float[np.ndarray, "n d"]]


class Appearance:
    """Who looks like a set of scans.

    Args:
        x: the set.
        labels: the class of each, as numbers; None where there are none.
        look: what a scan looks like, as a row of numbers.

    Raises:
        DataError: fewer than two scans.
    """

    def __init__(
        self, x: Float[Tensor, "n c *space"], labels: Int[np.ndarray, " n"] | None = None, look: Look = appearance
    ) -> None:
        from sklearn.covariance import LedoitWolf
        from sklearn.decomposition import PCA
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(x) < 2:
            raise DataError(f"What scans look like takes two of them to learn; found {len(x)}.")
        self._look = look
        rows = look(x)
        count = max(1, min(_COMPONENTS, len(rows) // 2, rows.shape[1]))
        self._view = make_pipeline(StandardScaler(), PCA(count, svd_solver="full")).fit(rows)
        seen = self._view.transform(rows)
        self._shape = LedoitWolf().fit(seen)
        several = labels is not None and len(np.unique(labels)) > 1
        self._classes = LinearDiscriminantAnalysis("lsqr", shrinkage="auto").fit(seen, labels) if several else None

    def rows(self, x: Float[Tensor, "n c *space"]) -> Float[np.ndarray, "n k"]:
        """Principal components of each scan's appearance."""
        return self._view.transform(self._look(x))

    def distance(self, rows: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
        """How far each scan is from the set."""
        return np.sqrt(np.maximum(self._shape.mahalanobis(rows), 0))

    def doubt(self, rows: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """How little each scan looks like its class: -log p(class | scan) of a linear discriminant; 0 of one class."""
        if self._classes is None:
            return np.zeros(len(rows))
        found = self._classes.predict_log_proba(rows)
        place = np.searchsorted(self._classes.classes_, labels)
        return -np.maximum(found[np.arange(len(rows)), place], -50.0)


def conformal(values: Float[np.ndarray, " n"], healthy: Sequence[float] | np.ndarray) -> Float[np.ndarray, " n"]:
    """p-values of `values`: the part of `healthy` that is at least as high, counting each value itself.

    >>> conformal(np.array([9.0, 0.0]), [1.0, 2.0, 3.0]).tolist()
    [0.25, 1.0]
    """
    known = np.sort(np.asarray(healthy, dtype=np.float64))
    above = len(known) - np.searchsorted(known, values, side="left")
    return (1 + above) / (1 + len(known))


__all__ = ["FEWEST_OF_CLASS", "Appearance", "Look", "appearance", "conformal"]
