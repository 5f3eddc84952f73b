"""Numbers about detection: equal to other people's code, and intervals that hold what they promise."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from medgen.metrics.detection import auroc, auroc_error, average_precision, sensitivity_at
from medgen.metrics.intervals import Interval, binomial_interval, bootstrap_interval, conformal_interval, patients_drawn
from medgen.metrics.localisation import voxel_counts
from medgen.tasks.calibration import p_value


def tied_scores(seed: int, n: int = 40, m: int = 17) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(0, 1, n), 1), np.round(rng.normal(0.7, 1.5, m), 1)


def truth_of(healthy: np.ndarray, ill: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat([0, 1], [len(healthy), len(ill)]), np.concatenate([healthy, ill])


# -- scans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_and_sensitivity_are_sklearn_s_with_ties(seed):
    healthy, ill = tied_scores(seed)
    truth, scores = truth_of(healthy, ill)
    assert average_precision(healthy, ill) == pytest.approx(average_precision_score(truth, scores))
    for specificity in (0.95, 0.8, 0.0):
        rate, found, _ = roc_curve(truth, scores, drop_intermediate=False)
        expected = found[rate <= 1 - specificity + 1e-9].max()
        assert sensitivity_at(healthy, ill, specificity) == pytest.approx(expected)


def test_scores_that_separate_and_scores_that_are_all_one():
    low, high, same = np.array([0.0, 1.0]), np.array([2.0, 3.0, 4.0]), np.full(5, 7.0)
    assert average_precision(low, high) == sensitivity_at(low, high) == 1
    assert average_precision(same, same[:2]) == pytest.approx(2 / 7)
    assert sensitivity_at(same, same) == 0
    assert auroc_error(low, high) == 0


def test_delong_s_error_is_what_placements_say():
    healthy, ill = tied_scores(3)
    wins = (ill[:, None] > healthy) + 0.5 * (ill[:, None] == healthy)
    expected = np.sqrt(wins.mean(1).var(ddof=1) / len(ill) + wins.mean(0).var(ddof=1) / len(healthy))
    assert auroc_error(healthy, ill) == pytest.approx(expected)
    assert np.isnan(auroc_error(healthy, ill[:1]))


def test_delong_s_error_is_how_much_auroc_varies():
    rng = np.random.default_rng(0)
    draws = [(rng.normal(0, 1, 40), rng.normal(1, 1.5, 25)) for _ in range(600)]
    spread = np.std([auroc(*one) for one in draws])
    assert np.mean([auroc_error(*one) for one in draws]) == pytest.approx(spread, rel=0.1)


# -- maps ------------------------------------------------------------------------------------------------


def world(n: int, shape: tuple[int, ...], seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps (float32) and masks of blobs that they find in part; the first scan is healthy."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for one in range(n):
        field = gaussian_filter(rng.normal(size=shape), 2.0)
        mask = field > (np.inf if one == 0 else np.quantile(field, 0.97))
        maps.append((rng.normal(size=shape) + 1.5 * mask).astype(np.float32))
        masks.append(mask)
    return maps, masks


def pooled(maps: list[np.ndarray], masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])


def reference_aupro(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """Bergmann's curve at every value there is."""
    regions = []
    for found, mask in zip(maps, masks, strict=True):
        named, count = label(mask, np.ones((3,) * mask.ndim))
        regions += [found[named == one + 1] for one in range(count)]
    truth, values = pooled(maps, masks)
    healthy = values[~truth]
    rate, share = [0.0], [0.0]
    for level in np.unique(values)[::-1]:
        rate.append((healthy >= level).mean())
        share.append(np.mean([(region >= level).mean() for region in regions]))
    rates = np.linspace(0, limit, 200_001)
    return float(np.trapezoid(np.interp(rates, rate, share), rates) / limit)


@pytest.mark.parametrize("decimals", [1, 6])
def test_few_values_are_counted_exactly(decimals):
    maps, masks = world(3, (20, 24))
    maps = [found.round(decimals) for found in maps]
    counts = voxel_counts(maps, masks, also=[0.123, 1.5])
    truth, values = pooled(maps, masks)
    assert counts.average_precision() == pytest.approx(average_precision_score(truth, values))
    dices = {t: 2 * (truth & (values >= t)).sum() / ((values >= t).sum() + truth.sum()) for t in np.unique(values)}
    assert counts.best_dice() == pytest.approx(max(dices.values()))
    for level in (0.123, 1.5):
        marked = values >= level
        assert counts.dice_at(level) == pytest.approx(2 * (truth & marked).sum() / (marked.sum() + truth.sum()))
    for limit in (0.3, 0.05):
        assert counts.aupro(limit) == pytest.approx(reference_aupro(maps, masks, limit), abs=2e-3)


def test_many_voxels_are_counted_in_little_memory_and_nearly_exactly():
    maps, masks = world(6, (60, 60, 40))
    counts = voxel_counts(maps, masks)
    truth, values = pooled(maps, masks)
    assert counts.healthy.nbytes < 6 * 1600 * 8
    assert counts.average_precision() == pytest.approx(average_precision_score(truth, values), abs=1e-3)
    rate, found, _ = roc_curve(truth, values)
    precise = 2 * found * truth.sum() / (found * truth.sum() + rate * (~truth).sum() + truth.sum())
    assert counts.best_dice() == pytest.approx(precise.max(), abs=1e-3)


def test_aupro_of_perfect_random_and_inverted_maps():
    masks = [np.zeros((60, 60), dtype=bool)]
    masks[0][10:13, 10:13] = masks[0][30:50, 30:50] = True
    noise = np.random.default_rng(0).random((60, 60))
    assert voxel_counts([masks[0] + noise / 2], masks).aupro() == pytest.approx(1.0)
    assert voxel_counts([noise], masks).aupro() == pytest.approx(0.15, abs=0.05)
    assert voxel_counts([noise / 2 - masks[0]], masks).aupro() == 0
    # Half a curve: a small finding that is found counts as much as the large one that is not.
    only_small = masks[0] & (np.arange(60) < 20)
    assert voxel_counts([only_small + noise / 2 - (masks[0] & ~only_small)], masks).aupro() == pytest.approx(0.5)


def test_findings_without_a_score_are_missed_and_unscored_healthy_voxels_do_not_count():
    maps, masks = world(3, (20, 24))
    hidden = [np.where(mask, np.nan, found) for found, mask in zip(maps, masks, strict=True)]
    share = np.mean([mask.mean() for mask in masks])
    assert voxel_counts(hidden, masks).average_precision() == pytest.approx(share)
    assert voxel_counts(hidden, masks, also=[0.0]).dice_at(0.0) == 0
    bordered = [np.pad(found, 5, constant_values=np.nan) for found in maps]
    wide = [np.pad(mask, 5) for mask in masks]
    plain, framed = voxel_counts(maps, masks), voxel_counts(bordered, wide)
    assert framed.average_precision() == pytest.approx(plain.average_precision())
    assert framed.aupro() == pytest.approx(plain.aupro())


def test_a_table_of_drawn_scans_is_the_table_of_those_scans():
    maps, masks = world(4, (16, 18))
    chosen = np.array([3, 1, 1])
    drawn = voxel_counts(maps, masks).together(chosen)
    direct = voxel_counts([maps[n] for n in chosen], [masks[n] for n in chosen])
    assert drawn.average_precision() == pytest.approx(direct.average_precision())
    assert drawn.best_dice() == pytest.approx(direct.best_dice())
    assert drawn.aupro() == pytest.approx(direct.aupro(), abs=1e-3)


def test_without_findings_there_is_no_number():
    maps, masks = world(1, (8, 8))
    counts = voxel_counts(maps, masks, also=[1.0])
    assert np.isnan([counts.average_precision(), counts.best_dice(), counts.dice_at(1.0), counts.aupro()]).all()


# -- intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "total"), [(0, 7), (3, 20), (20, 20)])
def test_exact_binomial_intervals_are_scipy_s(count, total):
    theirs = binomtest(count, total).proportion_ci(0.95, method="exact")
    assert np.allclose(binomial_interval(count, total), (theirs.low, theirs.high))


@pytest.mark.parametrize(("calibration", "rate"), [(19, 0.05), (60, 0.1)])
def test_measured_false_positive_rates_lie_in_the_conformal_interval_as_often_as_it_says(calibration, rate):
    """Simulated with the p-values that medgen gives; a discrete rate is covered a little more often."""
    rng = np.random.default_rng(1)
    low, high = conformal_interval(calibration, 40, rate)
    rates = []
    for _ in range(250):
        known = rng.normal(size=calibration)
        rates.append(np.mean([p_value(known, new) <= rate for new in rng.normal(size=40)]))
    inside = np.mean([(low <= one <= high) for one in rates])
    assert inside >= 0.92
    assert np.mean(rates) <= rate + 0.015


def test_a_rate_that_no_p_value_can_reach_is_zero():
    assert conformal_interval(18, 100, 0.05) == Interval(0.0, 0.0)
    assert conformal_interval(19, 100, 0.05).high > 0
    assert conformal_interval(5, 100, 1.0) == Interval(1.0, 1.0)


def drawn(patients: list[str], seed: int = 0, **more) -> list[np.ndarray]:
    return patients_drawn(patients, np.random.default_rng(seed), **more)


def test_bootstrap_intervals_cover_and_clustered_ones_are_wider():
    rng = np.random.default_rng(2)
    inside, own = 0, [f"p{n}" for n in range(40)]
    for seed in range(100):
        values = rng.normal(3, 1, 40)
        low, high = bootstrap_interval(lambda n, v=values: float(v[n].mean()), drawn(own, seed, draws=200))
        inside += low <= 3 <= high
    assert inside >= 86
    twins = np.repeat(rng.normal(size=20), 10)
    alone = bootstrap_interval(lambda n: float(twins[n].mean()), drawn([f"p{n}" for n in range(200)]))
    together = bootstrap_interval(lambda n: float(twins[n].mean()), drawn([f"p{n // 10}" for n in range(200)]))
    assert (together.high - together.low) > 2 * (alone.high - alone.low)


def test_a_paired_difference_is_known_better_than_its_parts():
    rng = np.random.default_rng(3)
    one = rng.normal(size=60) + np.repeat([0, 1.0], 30)
    other = one + 0.1 * rng.normal(size=60)
    ill = np.repeat([False, True], 30)

    def area(values: np.ndarray, n: np.ndarray) -> float:
        return auroc(values[n][~ill[n]], values[n][ill[n]])

    draws = drawn([f"p{n}" for n in range(60)], strata=["ill" if sick else "healthy" for sick in ill])
    alone = bootstrap_interval(lambda n: area(one, n), draws)
    paired = bootstrap_interval(lambda n: area(one, n) - area(other, n), draws)
    assert alone.low < roc_auc_score(ill, one) < alone.high
    assert paired.high - paired.low < 0.4 * (alone.high - alone.low)


def test_every_draw_has_ill_scans_and_whole_patients_and_one_patient_makes_no_interval():
    draws = drawn([f"p{n // 2}" for n in range(20)], strata=["ill"] * 2 + ["healthy"] * 18)
    for draw in draws:
        assert (draw < 2).sum() == 2
        assert len(draw) == 20
        assert (np.bincount(draw, minlength=20)[::2] == np.bincount(draw, minlength=20)[1::2]).all()
    assert drawn(["p"] * 5) == []
    assert np.isnan(bootstrap_interval(lambda n: 1.0, [])).all()
