"""Numbers that mean something: valid p-values, thresholds that keep their word, silence where they cannot."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.stats import median_abs_deviation

from medgen.errors import BundleError, DataError
from medgen.tasks.calibration import (
    clusters,
    folded,
    from_bundle,
    learned_from,
    mask_threshold,
    normals,
    normals_needed,
    p_value,
    tail_mean,
)
from medgen.tasks.norms import Norms

# -- p-values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 19, 50])
def test_p_is_never_zero_and_never_above_one(n):
    rng = np.random.default_rng(n)
    scores = rng.normal(size=n)
    for new in (-1e9, -1.0, 0.0, float(scores[0]), 1.0, 1e9):
        p = p_value(scores, new)
        assert 1 / (n + 1) <= p <= 1
        assert p * (n + 1) == pytest.approx(round(p * (n + 1)))


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("kind", ["normal", "exponential", "cauchy", "grey"])
@pytest.mark.parametrize("n", [19, 39])
def test_p_values_are_valid_whatever_the_distribution(kind, n, two_sided):
    """P(p <= alpha) lies in [alpha - 1/(n+1), alpha], and below it only where scores are tied."""
    rng = np.random.default_rng(0)
    draw = {
        "normal": rng.standard_normal,
        "exponential": rng.standard_exponential,
        "cauchy": rng.standard_cauchy,
        "grey": lambda size: rng.integers(0, 12, size).astype(float),
    }[kind]
    trials = 3000
    ps = np.array([p_value(row[:-1], float(row[-1]), two_sided=two_sided) for row in draw((trials, n + 1))])
    for alpha in (0.05, 0.1, 0.25):
        rate, error = (ps <= alpha + 1e-12).mean(), 2 * np.sqrt(alpha * (1 - alpha) / trials)
        assert rate <= alpha + error
        if kind != "grey":
            assert rate >= alpha - 1 / (n + 1) - error


@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=30),
    st.floats(-1e6, 1e6),
    st.floats(0.01, 100),
    st.floats(-1e3, 1e3),
)
@settings(deadline=None, max_examples=60)
def test_folding_treats_the_new_score_like_any_other(scores, new, gain, offset):
    together = np.append(np.asarray(scores), new)
    healthy, mine = folded(np.asarray(scores), new)
    away = together - np.median(together)
    spread = median_abs_deviation(together) * 1.4826
    spread = spread if spread > 1e-9 * away.std() else away.std() or 1.0
    assert np.allclose(np.append(healthy, mine), np.abs(away) / spread, rtol=1e-6)
    signed, placed = folded(np.asarray(scores), new, two_sided=False)
    assert np.allclose(np.append(signed, placed), away / spread, rtol=1e-6)


def test_unusually_low_is_as_suspicious_as_unusually_high():
    scores = np.linspace(-1, 1, 39)
    assert p_value(scores, 50.0) == p_value(scores, -50.0) == pytest.approx(1 / 40)
    assert p_value(scores, 0.0) > 0.9


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=30), st.integers(0, 29))
@settings(deadline=None, max_examples=60)
def test_a_one_sided_p_counts_the_healthy_scores_that_are_at_least_as_high(scores, which):
    healthy, new = np.asarray(scores), scores[which % len(scores)]
    expected = (1 + sum(score >= new for score in scores)) / (len(scores) + 1)
    assert p_value(healthy, new, two_sided=False) >= expected - 1e-12
    assert p_value(healthy, float(healthy.max()) + 1, two_sided=False) == pytest.approx(1 / (len(scores) + 1))
    assert p_value(healthy, float(healthy.min()) - 1, two_sided=False) == 1.0


@pytest.mark.parametrize("two_sided", [True, False])
def test_equal_scores_are_not_unusual(two_sided):
    assert p_value(np.full(19, 3.0), 3.0, two_sided=two_sided) == 1.0
    assert p_value(np.full(19, 3.0), 3.1, two_sided=two_sided) == pytest.approx(0.05)
    assert folded(np.full(19, 3.0), 3.0, two_sided=two_sided)[1] == 0.0


# -- how many are needed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.1, 9), (0.01, 99), (0.5, 1), (0.2, 4), (1 / 3, 2)])
def test_as_many_normals_are_needed_as_the_smallest_p_asks_for(rate, needed):
    assert normals_needed(rate) == needed
    assert 1 / (needed + 1) <= rate + 1e-9
    assert 1 / needed > rate or needed == 1


# -- the mask's threshold ----------------------------------------------------------------------------------


def test_the_threshold_is_the_ranked_maximum():
    maxima = np.random.default_rng(0).permutation(np.arange(1.0, 40.0))  # 39 maps
    assert mask_threshold(maxima, 0.05) == 38.0  # ceil(40 * 0.95)
    assert mask_threshold(maxima, 0.1) == 36.0
    assert mask_threshold(maxima, 0.5) == 20.0
    assert mask_threshold(maxima, 0.025) == 39.0
    assert mask_threshold(maxima, 0.01) is None


@pytest.mark.parametrize("rate", [0.5, 0.2, 0.1, 0.05, 0.01])
def test_there_is_a_threshold_exactly_where_there_are_enough_maps(rate):
    for n in range(1, 120):
        there = mask_threshold(np.arange(float(n)), rate) is not None
        assert there == (n >= normals_needed(rate))


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (39, 0.1), (25, 0.2)])
def test_a_new_healthy_map_reaches_the_threshold_as_rarely_as_promised(n, rate):
    rng = np.random.default_rng(1)
    trials = 4000
    draws = rng.gumbel(size=(trials, n + 1))
    hits = np.mean([row[-1] > mask_threshold(row[:-1], rate) for row in draws])
    error = 2 * np.sqrt(rate * (1 - rate) / trials)
    assert rate - 1 / (n + 1) - error <= hits <= rate + error


# -- what healthy maps look like -----------------------------------------------------------------------------


def maps(n: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    level = rng.random(shape)
    return (level + 0.2 * rng.gamma(2.0, size=(n, *shape))).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 14), (6, 7, 8)])
@pytest.mark.parametrize("n", [4, 5, 12])
def test_each_maximum_and_tail_leaves_its_own_map_out(shape, n):
    """Equal to learning the others from scratch, one by one."""
    residuals = maps(n, shape)
    learnt = normals(residuals)
    for index in range(n):
        others = normals(np.delete(residuals, index, axis=0))
        z = others.z_map(residuals[index])
        assert learnt.maxima[index] == pytest.approx(float(z.max()), rel=1e-3)
        assert learnt.tails[index] == pytest.approx(tail_mean(z), rel=1e-3)
        found, count = ndimage.label(z > learnt.forming, structure=np.ones((3,) * len(shape)))
        sizes = [int((found == number).sum()) for number in range(1, count + 1)]
        assert learnt.largest[index] == pytest.approx(max(sizes, default=0), abs=1)


def test_one_healthy_voxel_in_a_thousand_exceeds_the_forming_level():
    residuals = maps(20, (20, 20, 10))
    learnt = normals(residuals)
    left_out = [normals(np.delete(residuals, n, axis=0)).z_map(residuals[n]) for n in range(20)]
    assert (np.stack(left_out) > learnt.forming).mean() == pytest.approx(0.001, rel=0.1)
    assert learnt.largest.max() >= 1


@pytest.mark.parametrize("shape", [(40, 40), (14, 14, 14)])
def test_the_shrunken_spread_is_nearer_the_truth_than_each_voxel_s_own(shape):
    rng = np.random.default_rng(0)
    true = ndimage.gaussian_filter(rng.uniform(0.5, 4, shape), 4, mode="nearest")
    residuals = (true * rng.normal(size=(12, *shape))).astype(np.float32)
    learnt = normals(residuals, two_sided=True)
    own, kept = residuals.std(0, ddof=1), np.log(learnt.sd / true)
    assert kept.std() < 0.5 * np.log(own / true).std()
    assert 0 < kept.mean() < 0.35  # never too sure of itself
    # Many scans speak for themselves.
    many = normals((true * rng.normal(size=(300, *shape))).astype(np.float32), two_sided=True)
    assert np.abs(np.log(many.sd / true)).mean() < 0.15


def test_maps_of_too_few_scans_teach_nothing():
    with pytest.raises(DataError, match="needs 3 maps of the same place; found 2"):
        normals(maps(2, (4, 4)))


def test_what_too_few_normals_have_is_unknown_and_never_healthy():
    residuals = maps(8, (10, 10))
    residuals[2:, :3] = np.nan  # two scans have it: not enough
    residuals[3:, 3] = np.nan  # three have it
    learnt = normals(residuals)
    z = learnt.z_map(np.full((10, 10), 50.0, np.float32))
    assert np.isnan(z[:3]).all()
    assert (z[3:] > 3).all()
    assert np.isfinite(learnt.maxima).all()
    # Whoever has no voxel there is judged where he has some.
    alone = residuals.copy()
    alone[0, 2:] = np.nan
    assert len(normals(alone).maxima) == 7
    assert np.isnan(tail_mean(np.full((3, 3), np.nan)))


def test_a_map_of_a_million_voxels_takes_no_time():
    shape = (100, 100, 100)
    learnt = normals(maps(3, (10, 10, 10)))
    big = type(learnt)(np.ones(shape, np.float32), np.ones(shape, np.float32), learnt.maxima, learnt.tails)
    residual = np.zeros(shape, np.float32)
    begun = time.perf_counter()
    big.z_map(residual)
    assert time.perf_counter() - begun < 0.1


@pytest.mark.parametrize("shape", [(12, 14), (6, 7, 8)])
def test_mean_and_spread_are_never_below_their_own_voxel_s(shape):
    residuals = maps(15, shape)
    learnt = normals(residuals)
    assert learnt.mean.shape == learnt.sd.shape == shape
    assert (learnt.mean >= residuals.mean(0) - 1e-5).all()
    assert learnt.sd.min() > 0
    assert np.median(learnt.sd / residuals.std(0, ddof=1)) > 0.9
    assert (learnt.z_map(learnt.mean) == 0).all()


def test_voxels_that_never_vary_do_not_explode():
    residuals = maps(10, (8, 8))
    residuals[:, :3] = 0.0
    z = normals(residuals).z_map(np.full((8, 8), 0.001, np.float32))
    assert np.isfinite(z).all()
    flat = normals(np.zeros((5, 8, 8), np.float32))
    assert np.isfinite(flat.maxima).all()
    assert np.isfinite(flat.z_map(np.zeros((8, 8), np.float32))).all()


def test_a_healthy_edge_one_voxel_aside_is_not_unusual():
    """Every healthy map has its edge in row 4; a new one has it in row 5."""
    residuals = 0.01 * maps(20, (10, 10))
    residuals[:, 4] += np.random.default_rng(2).normal(1.0, 0.1, (20, 1))
    learnt = normals(residuals.astype(np.float32))
    moved, lesion = residuals[0].copy(), residuals[0].copy()
    moved[4], moved[5] = residuals[0, 3], residuals[0, 4]
    lesion[9] += 3.0
    assert learnt.z_map(moved.astype(np.float32)).max() < 4
    assert learnt.z_map(lesion.astype(np.float32)).max() > 4


def test_a_lesion_stands_out_where_it_is():
    residuals = maps(25, (8, 8, 8))
    ill = residuals[-1].copy()
    ill[2:4, 5:7, 1:3] += 8
    z = normals(residuals[:-1]).z_map(ill)
    assert np.unravel_index(z.argmax(), z.shape) in {(i, j, k) for i in (2, 3) for j in (5, 6) for k in (1, 2)}
    assert tail_mean(z) > tail_mean(normals(residuals[:-1]).z_map(residuals[-1])) + 1


@pytest.mark.parametrize(("size", "count"), [(1, 1), (100, 1), (400, 2), (10_000, 50)])
def test_the_tail_is_the_highest_half_per_cent(size, count):
    z = np.random.default_rng(0).permutation(np.arange(float(size)))
    assert tail_mean(z) == pytest.approx(np.sort(z)[-count:].mean())


@pytest.mark.parametrize("n", [19])
def test_scoring_a_new_healthy_map_against_the_left_out_tails_is_valid(n):
    """The whole chain: learn from n maps, score the next one, as the score of a volume does."""
    trials, rate = 300, 0.1
    hits = masks = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        residuals = (rng.gamma(3.0, size=(n + 1, 5, 5, 5)) * rng.uniform(0.5, 1.5, (n + 1, 1, 1, 1))).astype(np.float32)
        learnt = normals(residuals[:-1])
        z = learnt.z_map(residuals[-1])
        hits += p_value(learnt.tails, tail_mean(z)) <= rate + 1e-12
        masks += bool(z.max() > mask_threshold(learnt.maxima, rate))
    error = 2.6 * np.sqrt(rate * (1 - rate) / trials)
    assert hits / trials <= rate + error
    assert masks / trials <= rate + error


# -- clusters --------------------------------------------------------------------------------------------


def test_voxels_that_touch_by_a_corner_are_one_cluster():
    z = np.zeros((6, 6, 6), np.float32)
    z[0, 0, 0] = z[1, 1, 1] = z[2, 2, 1] = 5
    z[4, 4, 4] = 5
    labels, sizes = clusters(z, 4.0)
    assert sorted(sizes) == [1, 3]
    assert labels[0, 0, 0] == labels[1, 1, 1] == labels[2, 2, 1] != labels[4, 4, 4] > 0
    assert (labels > 0).sum() == sizes.sum() == 4
    z[3, 3, 3] = np.nan
    assert sorted(clusters(z, 4.0)[1]) == [1, 3]
    assert clusters(z, 5.0)[1].size == 0


@pytest.mark.parametrize(("n", "rate"), [(19, 0.1)])
def test_the_largest_cluster_of_a_new_healthy_map_is_as_large_as_promised(n, rate):
    trials, hits = 150, 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        noise = rng.normal(size=(n + 1, 16, 16)).astype(np.float32)
        smooth = np.stack([ndimage.gaussian_filter(one, rng.uniform(0.5, 1.5)) for one in noise])
        learnt = normals(smooth[:-1])
        largest = clusters(learnt.z_map(smooth[-1]), learnt.forming)[1].max(initial=0)
        hits += (1 + (learnt.largest >= largest).sum()) / (n + 1) <= rate + 1e-12
    assert hits / trials <= rate + 2.6 * np.sqrt(rate * (1 - rate) / trials)


# -- what a bundle keeps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("two_sided", [True, False])
def test_a_bundle_gives_back_what_was_learned(two_sided):
    scores, residuals = np.linspace(0, 1, 7), maps(7, (8, 9))
    numbers, tensors = learned_from(scores, residuals, two_sided=two_sided)
    assert numbers["scans"] == 7
    back, known = from_bundle(json.loads(json.dumps(numbers)), tensors)
    direct = normals(residuals, two_sided=two_sided)
    assert np.array_equal(back, scores)
    assert known.two_sided is two_sided
    assert known.forming == direct.forming
    for name in ("mean", "sd", "maxima", "tails", "largest"):
        assert np.array_equal(getattr(known, name), getattr(direct, name))


def test_fewer_than_three_maps_leave_the_scores_alone():
    for residuals in (None, maps(2, (4, 4))):
        numbers, tensors = learned_from(np.array([1.0, 2.0]), residuals)
        assert tensors == {}
        assert from_bundle(numbers, tensors)[1] is None
    assert from_bundle({}, {})[0].size == 0


def test_without_scores_the_tail_of_the_map_is_the_score():
    residuals = maps(20, (9, 9))
    numbers, _ = learned_from(np.empty(0), residuals)
    assert numbers["scores"] == numbers["tails"] == normals(residuals).tails.tolist()
    assert numbers["scans"] == 20
    assert "norms" not in numbers


def test_what_is_known_of_people_goes_into_the_bundle_as_norms():
    ages = np.linspace(20, 80, 30)
    people = [{"age": str(age)} for age in ages]
    numbers, _ = learned_from(ages / 10, people=people)
    known = Norms.of(json.loads(json.dumps(numbers)))
    assert known.remainder(8.0, {"age": "25"}) > known.residuals.max()
    assert "norms" not in learned_from(ages / 10, people=people[:5])[0]


def test_a_calibration_with_holes_is_refused():
    numbers, tensors = learned_from(np.arange(4.0), maps(4, (5, 5)))
    del numbers["largest"]
    with pytest.raises(BundleError, match="lacks largest"):
        from_bundle(numbers, tensors)
    with pytest.raises(DataError, match="1 of the 3 healthy scans"):
        learned_from(np.array([1.0, np.nan, 2.0]))
    assert isinstance(tensors["mean"], torch.Tensor)


def test_maps_that_are_relative_to_their_place_have_one_healthy_mean_and_spread():
    maps = np.random.default_rng(4).normal(3, 2, (12, 9, 10)).astype(np.float32)
    learnt = normals(maps, by_place=False)
    assert np.allclose(learnt.mean, maps.mean(), atol=1e-5)
    assert np.allclose(learnt.sd, maps.std(), atol=1e-5)
    assert np.argmax(learnt.z_map(maps[0])) == np.argmax(maps[0])
    assert len(learnt.maxima) == 12
