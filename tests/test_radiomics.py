"""Radiomic features: against scikit-image, against matrices worked by hand, and what they must never do."""

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis, skew
from skimage.feature import graycomatrix, graycoprops

from medgen.errors import DataError
from medgen.metrics.radiomics import BINS, FIRST_ORDER, first_order, grey_bins, radiomic_names, radiomics
from medgen.metrics.texture import (
    CO_OCCURRENCE,
    RUN_LENGTH,
    co_occurrence_numbers,
    co_occurrences,
    directions,
    run_length_numbers,
    run_lengths,
)

# The example of the reference manual of the Image Biomarker Standardisation Initiative, with bins from 0.
MANUAL = np.array([[1, 2, 2, 3], [1, 2, 3, 3], [4, 2, 4, 1], [4, 1, 2, 3]]) - 1
# The example image of Hall-Beyer's tutorial on texture.
HALL_BEYER = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 2, 2, 2], [2, 2, 3, 3]])


def scans(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Smooth enough that bins run and lie beside their like."""
    values = np.random.default_rng(seed).random((n, *shape))
    for axis in range(2, values.ndim):
        values = (values + np.roll(values, 1, axis)) / 2
    return values


def test_co_occurrences_and_their_numbers_are_those_of_scikit_image():
    levels = grey_bins(scans(3, 1, 17, 12)[:, 0])
    shares = co_occurrences(levels, BINS)
    found = dict(zip(CO_OCCURRENCE, co_occurrence_numbers(shares).T, strict=True))
    for n, level in enumerate(levels):
        # Its angles turn the other way; all four are there.
        theirs = graycomatrix(level, [1], np.arange(4) * np.pi / 4, BINS, symmetric=True, normed=True)
        ours = sorted(shares[n].reshape(4, -1).tolist())
        assert np.allclose(ours, sorted(theirs[:, :, 0].transpose(2, 0, 1).reshape(4, -1).tolist()))
        for mine, name in {
            "contrast": "contrast", "dissimilarity": "dissimilarity", "inverse_difference_moment": "homogeneity",
            "angular_second_moment": "ASM", "correlation": "correlation", "joint_entropy": "entropy",
            "joint_variance": "variance",
        }.items():  # fmt: skip
            expected = graycoprops(theirs, name).mean()
            # Its entropy is in nats.
            assert found[mine][n] == pytest.approx(expected / (np.log(2) if name == "entropy" else 1)), mine
        i, j = np.arange(1, BINS + 1)[:, None], np.arange(1, BINS + 1)
        p = theirs[:, :, 0].transpose(2, 0, 1)
        mean = (p * i).sum((1, 2))[:, None, None]
        marginal = p.sum(2)
        product = marginal[:, :, None] * marginal[:, None]
        bits = -(marginal * np.log2(np.where(marginal > 0, marginal, 1))).sum(1)
        joint = -(p * np.log2(np.where(p > 0, p, 1))).sum((1, 2))
        apart = -(p * np.log2(np.where(product > 0, product, 1))).sum((1, 2))
        for name, expected in {
            "cluster_shade": ((i + j - 2 * mean) ** 3 * p).sum((1, 2)),
            "cluster_prominence": ((i + j - 2 * mean) ** 4 * p).sum((1, 2)),
            "sum_variance": ((i + j - 2 * mean) ** 2 * p).sum((1, 2)),
            "autocorrelation": (i * j * p).sum((1, 2)),
            "inverse_variance": (p[:, i != j] / ((i - j) ** 2)[i != j]).sum(1),
            "information_correlation_1": (joint - apart) / bits,
        }.items():
            assert found[name][n] == pytest.approx(expected.mean()), name


def test_run_lengths_are_those_worked_by_hand():
    along = run_lengths(MANUAL[None], 4)[0, directions((4, 4)).index((0, 1))]
    assert along.tolist() == [[4, 0, 0, 0], [3, 1, 0, 0], [2, 1, 0, 0], [3, 0, 0, 0]]
    down = run_lengths(MANUAL[None], 4)[0, directions((4, 4)).index((1, 0))]
    assert down.tolist() == [[2, 1, 0, 0], [2, 0, 1, 0], [2, 1, 0, 0], [1, 1, 0, 0]]
    diagonal = run_lengths(MANUAL[None], 4)[0, directions((4, 4)).index((1, 1))]
    assert diagonal.tolist() == [[4, 0, 0, 0], [3, 1, 0, 0], [4, 0, 0, 0], [3, 0, 0, 0]]


def test_numbers_of_run_lengths_are_the_published_ones_of_the_example():
    along = run_lengths(HALL_BEYER[None], 4)[:, [directions((4, 4)).index((0, 1))]]
    found = dict(zip(RUN_LENGTH, run_length_numbers(along, 16)[0], strict=True))
    expected = {"short_runs": 0.3263889, "long_runs": 4.25, "grey_non_uniformity": 2.25, "run_percentage": 0.5}
    expected |= {"length_non_uniformity": 4.75, "high_grey": (3 * 1 + 2 * 4 + 2 * 9 + 16) / 8}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["normalised_grey_non_uniformity"] == pytest.approx(2.25 / 8)
    assert found["length_variance"] == pytest.approx(4.25 - 4)


@pytest.mark.parametrize("shape", [(9, 7), (5, 4, 6)])
def test_runs_hold_every_voxel_once_in_every_direction(shape):
    levels = grey_bins(scans(3, 1, *shape)[:, 0]) // 4
    runs = run_lengths(levels, 4)
    held = (runs * np.arange(1, max(shape) + 1)).sum(3)
    assert runs.shape[1] == {2: 4, 3: 13}[len(shape)]
    assert (held == np.stack([np.bincount(one.ravel(), minlength=4) for one in levels])[:, None]).all()
    # A straight look along one diagonal.
    line = np.full((1, *shape), 1)
    line[:, *[np.arange(4)] * len(shape)] = 0
    one = run_lengths(line, 2)[0, directions(shape).index((1,) * len(shape))]
    assert one[0].tolist() == [float(n == 3) for n in range(max(shape))]


def test_first_order_numbers_are_those_of_scipy_and_numpy():
    x = scans(4, 1, 13, 11).reshape(4, -1)
    found = dict(zip(FIRST_ORDER, first_order(x).T, strict=True))
    assert found["skewness"] == pytest.approx(skew(x, axis=1))
    assert found["kurtosis"] == pytest.approx(kurtosis(x, axis=1))
    assert found["variation"] == pytest.approx(x.std(1) / x.mean(1))
    assert found["percentile_90"] == pytest.approx(np.quantile(x, 0.9, axis=1))
    middle = [one[(one >= np.quantile(one, 0.1)) & (one <= np.quantile(one, 0.9))] for one in x]
    robust = [abs(one - one.mean()).mean() for one in middle]
    assert found["robust_mean_absolute_deviation"] == pytest.approx(robust)


@pytest.mark.parametrize("shape", [(2, 9, 8), (1, 28, 28), (1, 6, 5, 7), (3, 8, 1, 6)])
def test_every_column_is_named_and_channels_stand_one_after_another(shape):
    x = scans(3, *shape)
    found = radiomics(x)
    names = radiomic_names(shape[0], len(shape) - 1)
    assert found.shape == (3, len(names)) == (3, len(set(names)))
    assert np.isfinite(found).all()
    assert np.array_equal(found, radiomics(torch.from_numpy(x)))
    width = len(names) // shape[0]
    assert np.array_equal(radiomics(x[:, :1]), found[:, :width])
    # One scan's features do not depend on those beside it.
    assert np.allclose(radiomics(x[1:2]), found[1:2])
    mean = next(n for n, name in enumerate(names) if name.endswith("first_order.mean"))
    assert found[:, mean] == pytest.approx(x[:, 0].reshape(3, -1).mean(1))


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("space", [(9, 8), (6, 5, 7)])
def test_a_constant_scan_has_finite_features(space, value):
    found = dict(zip(radiomic_names(1, len(space)), radiomics(np.full((1, 1, *space), value))[0], strict=True))
    assert np.isfinite(list(found.values())).all()
    for name in ("skewness", "kurtosis", "variation"):
        assert found[f"first_order.{name}"] == 0
    assert found["co_occurrence.correlation"] == 1
    assert found["co_occurrence.information_correlation_1"] == found["co_occurrence.information_correlation_2"] == 0
    assert found["co_occurrence.joint_entropy"] == 0


def test_what_is_no_batch_of_scans_is_refused():
    for wrong in (np.zeros((2, 1, 5)), np.zeros((2, 1, 1, 1))):
        with pytest.raises(DataError, match="2 or 3 axes"):
            radiomics(wrong)
    with pytest.raises(DataError, match="NaN"):
        radiomics(np.full((2, 1, 4, 4), np.nan))
