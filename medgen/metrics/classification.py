"""How good chances of classes are: do they rank, and do they mean what they say?"""

import numpy as np
from jaxtyping import Float, Int

from medgen.metrics.detection import auroc

Chances = Float[np.ndarray, "n k"]
Classes = Int[np.ndarray, " n"]


def accuracy(log_chances: Chances, classes: Classes) -> float:
    """Share of scans whose likeliest class is theirs."""
    return float((log_chances.argmax(1) == classes).mean())


def one_versus_rest_auroc(log_chances: Chances, classes: Classes) -> float:
    """Area under the ROC curve of each class against the others, mean over the classes that occur.

    A class is ranked by its log odds, log p - log(1 - p), which keep an order where chances are rounded to 1.

    >>> one_versus_rest_auroc(np.log([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))
    1.0
    """
    found = []
    for one in np.unique(classes):
        others = np.delete(log_chances, one, axis=1)
        odds = log_chances[:, one] - np.logaddexp.reduce(others, axis=1)
        if 0 < (classes == one).sum() < len(classes):
            found.append(auroc(odds[classes != one], odds[classes == one]))
    return float(np.mean(found)) if found else float("nan")


def expected_calibration_error(log_chances: Chances, classes: Classes, *, bins: int = 15) -> float:
    """How far confidence is from accuracy, mean over scans, 0 to 1 (Guo et al. 2017, equation 3).

    Scans are binned by the chance of their likeliest class; |accuracy - mean chance| of each bin, by its scans.
    """
    confident = np.exp(log_chances.max(1))
    right = log_chances.argmax(1) == classes
    which = np.minimum((confident * bins).astype(int), bins - 1)
    gaps = [
        abs(right[which == b].mean() - confident[which == b].mean()) * (which == b).mean() for b in np.unique(which)
    ]
    return float(np.sum(gaps))


def log_loss(log_chances: Chances, classes: Classes) -> float:
    """Mean -log chance of the right class, nats."""
    return float(-log_chances[np.arange(len(classes)), classes].mean())


def tempered(log_chances: Chances, temperature: float) -> Chances:
    """log p^(1/T), normalised: T above 1 makes chances more modest and keeps their order."""
    scaled = log_chances / temperature
    return scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)


def best_temperature(log_chances: Chances, classes: Classes) -> float:
    """The temperature with the least log loss on these scans (Guo et al. 2017, "On calibration", section 4.2).

    Between 0.1 and 10^5: densities of many voxels make chances that are far too sure of themselves.
    """
    from scipy.optimize import minimize_scalar

    def cost(log_temperature: float) -> float:
        return log_loss(tempered(log_chances, float(np.exp(log_temperature))), classes)

    grid = np.linspace(np.log(0.1), np.log(1e5), 57)
    middle = grid[int(np.argmin([cost(t) for t in grid]))]
    step = grid[1] - grid[0]
    found = minimize_scalar(cost, bounds=(middle - step, middle + step), method="bounded")
    return float(np.exp(found.x))


__all__ = [
    "accuracy", "best_temperature", "expected_calibration_error", "log_loss", "one_versus_rest_auroc", "tempered",
]  # fmt: skip
