"""What synthetic scans are worth to learners: sanity of the numbers, which no learner may bend."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medgen.errors import DataError
from medgen.metrics.intervals import Interval
from medgen.metrics.paired import class_aurocs, drawn_again, interval, means, over_sets, verdict
from medgen.metrics.rivals import STRENGTHS, classical, mixture, mixup, smote, tuned
from medgen.metrics.segmentation import dice, segment
from medgen.metrics.utility import LEARNERS, TARGETS, balanced, class_auroc, decisions, utility


def rings(n: int, space: tuple[int, ...], seed: int = 0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Noisy scans whose classes are bright at different places along the first axis."""
    generator = np.random.default_rng(seed)
    y = np.arange(n) % classes
    place = np.linspace(0, 1, space[0])
    profile = np.exp(-8 * (place[None] - ((y + 1) / (classes + 1))[:, None]) ** 2)
    strength = profile.reshape(n, space[0], *[1] * (len(space) - 1))
    return (0.3 * strength + 0.4 * generator.standard_normal((n, *space))).astype(np.float32), y


@pytest.mark.parametrize("learner", ["svm", "logistic"])
@pytest.mark.parametrize("space", [(8, 6), (6, 4, 5)], ids=["2d", "3d"])
def test_scans_of_the_same_kind_are_worth_the_same_and_labels_at_random_nothing(learner, space):
    real, synthetic, test = (rings(400, space, seed) for seed in range(3))
    found = [utility(one, test, learners=[learner])[learner] for one in (real, synthetic)]
    assert found[0] > 0.9
    assert found[0] == pytest.approx(found[1], abs=0.04)
    # Labels in an order of their own: over several orders as often above a half as below.
    blind = [
        utility((real[0], np.random.default_rng(n).permutation(real[1])), test, learners=[learner])[learner]
        for n in range(8)
    ]
    assert np.mean(blind) == pytest.approx(0.5, abs=0.12)


def test_the_network_learns_repeats_itself_and_leaves_no_trace(monkeypatch):
    import torch

    monkeypatch.setattr("medgen.metrics.utility._SEEDS", 2)
    monkeypatch.setattr("medgen.metrics.utility._STEPS", 30)
    train, test = rings(120, (8, 6)), rings(100, (8, 6), seed=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = decisions("cnn", train, test[0], seed=4)
    assert torch.equal(torch.rand(2), expected)
    assert found.shape == (2, 100, 2)
    assert np.array_equal(found, decisions("cnn", train, test[0], seed=4))
    assert not np.array_equal(found[0], found[1])
    assert np.mean([class_auroc(one, test[1], np.array([0, 1])) for one in found]) > 0.75


@pytest.mark.parametrize("space", [(40, 33), (20, 6, 5)], ids=["2d", "3d"])
def test_the_network_takes_large_scans_volumes_and_three_classes(space, monkeypatch):
    monkeypatch.setattr("medgen.metrics.utility._STEPS", 3)
    monkeypatch.setattr("medgen.metrics.utility._SEEDS", 1)
    found = decisions("cnn", rings(12, space, classes=3), rings(6, space, seed=1, classes=3)[0])
    assert found.shape == (1, 6, 3)
    assert np.exp(found).sum(2) == pytest.approx(np.ones((1, 6)))


def test_more_classes_are_each_told_from_the_rest():
    train, test = rings(240, (9, 4), classes=3), rings(150, (9, 4), seed=1, classes=3)
    scores = decisions("logistic", train, test[0])[0]
    expected = np.mean([roc_auc_score(test[1] == k, scores[:, k]) for k in range(3)])
    assert utility(train, test, learners=["logistic"])["logistic"] == pytest.approx(expected)
    assert expected > 0.8


def test_two_classes_are_one_curve_whatever_they_are_called():
    train, test = rings(100, (8, 6)), rings(80, (8, 6), seed=1)
    margin = decisions("svm", train, test[0])[0]
    expected = roc_auc_score(test[1], margin[:, 1])
    named = [(x, 3 + 4 * y) for x, y in (train, test)]
    assert utility(*named, learners=["svm"])["svm"] == pytest.approx(expected)


def test_balanced_takes_as_many_of_each_class_by_seed():
    y = np.array([0] * 30 + [1] * 7 + [2] * 12)
    rows = balanced(y, seed=1)
    assert np.bincount(y[rows]).tolist() == [7, 7, 7]
    assert len(set(rows.tolist())) == 21
    assert np.array_equal(rows, balanced(y, seed=1))
    assert not np.array_equal(rows, balanced(y, seed=2))
    assert np.bincount(y[balanced(y, each=4)]).tolist() == [4, 4, 4]
    with pytest.raises(DataError, match="only 7 scans"):
        balanced(y, each=8)


def test_sets_that_cannot_be_compared_are_refused():
    x, y = rings(20, (4, 4))
    with pytest.raises(DataError, match="same two or more classes"):
        utility((x, np.zeros(20, dtype=int)), (x, y))
    with pytest.raises(DataError, match="same two or more classes"):
        utility((x, y), (x, np.zeros(20, dtype=int)))
    with pytest.raises(DataError, match=r"found \[10, 9\]"):
        utility((x[:19], y[:19]), (x, y))


def test_the_learners_are_these():
    assert LEARNERS == ("svm", "cnn", "logistic")
    assert set(TARGETS) < set(LEARNERS)


# -- mixed sets, and what synthetic scans have to beat -------------------------------------------------------


def unit(n: int, space: tuple[int, ...] = (8, 6), seed: int = 0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """`rings` on [0, 1]."""
    x, y = rings(n, space, seed, classes)
    return (x + 2).clip(0, 4) / 4, y


@pytest.mark.parametrize("learner", ["svm", "logistic"])
def test_certain_chances_and_equal_weights_are_the_same_as_classes(learner):
    train, test = rings(60, (8, 6)), rings(30, (8, 6), seed=1)
    plain = decisions(learner, train, test[0])
    for given in ((train[0], np.eye(2)[train[1]]), train):
        assert np.allclose(decisions(learner, given, test[0], weights=np.ones(60)), plain, atol=1e-6)


def test_the_svm_learns_from_few_scans_and_from_scans_in_a_plane():
    train, test = rings(14, (20, 16)), rings(200, (20, 16), seed=1)
    assert utility(train, test, learners=["svm"])["svm"] > 0.7
    along = np.concatenate([train[0], (train[0][::2] + np.roll(train[0][::2], 1, axis=0)) / 2])
    more = along, np.concatenate([train[1], train[1][::2]])
    assert utility(more, test, learners=["svm"], weights=np.repeat([1.0, 1.0], [14, 7]) * np.where(more[1] == 1, 2, 1))[
        "svm"
    ] > 0.7  # fmt: skip


def test_weights_decide_which_scans_are_believed():
    good, test = rings(80, (8, 6)), rings(200, (8, 6), seed=1)
    bad = (rings(80, (8, 6), seed=2)[0], 1 - good[1])
    both = np.concatenate([good[0], bad[0]]), np.concatenate([good[1], bad[1]])
    taught = {"learners": ["svm", "logistic", "cnn"]}

    def found(weight: float) -> dict[str, float]:
        return utility(both, test, weights=np.repeat([1.0, weight], 80), **taught)

    with pytest.MonkeyPatch.context() as quick:
        quick.setattr("medgen.metrics.utility._STEPS", 40)
        quick.setattr("medgen.metrics.utility._SEEDS", 1)
        trusted, misled = found(0.01), found(100.0)
    assert all(trusted[name] > 0.75 > 0.4 > misled[name] for name in taught["learners"])


def test_sets_of_unequal_weight_are_refused():
    x, y = rings(20, (4, 4))
    with pytest.raises(DataError, match="same weight"):
        utility((x, y), (x, y), weights=np.where(y == 1, 2.0, 1.0))
    with pytest.raises(DataError, match="same two or more classes"):
        utility((x, np.eye(3)[y]), (x, y))


def test_the_network_learns_chances_and_meets_each_batch_changed():
    train, test = unit(80), unit(60, seed=1)
    soft = 0.8 * np.eye(2)[train[1]] + 0.1
    seen = []

    def change(x, generator):
        seen.append((float(x.min()), float(x.max())))
        return x + 0.0 * torch.rand(x.shape, generator=generator)

    import torch

    found = decisions("cnn", (train[0], soft), test[0], augment=change, steps=40, runs=1)[0]
    assert class_auroc(found, test[1], np.array([0, 1])) > 0.75
    # It never becomes surer than what it was taught, but for what it has not learned.
    assert np.median(np.exp(found).max(1)) < 0.95
    assert len(seen) == 40
    assert all(low >= 0 and high <= 1 for low, high in seen)
    plain = decisions("cnn", train, test[0], steps=10, runs=1)
    same = decisions("cnn", train, test[0], steps=10, runs=1, augment=change)
    assert np.allclose(plain, same, atol=1e-5)


def test_smote_lies_on_lines_between_two_scans_of_a_class():
    x, y = unit(24)
    made, classes = smote(x, y, 30, seed=1)
    assert np.bincount(classes).tolist() == [30, 30]
    for one, name in zip(made[::7], classes[::7], strict=True):
        mine = x[y == name].reshape(-1, 48).astype(np.float64)
        flat = one.reshape(-1).astype(np.float64)
        gaps = [
            np.linalg.norm(flat - a) + np.linalg.norm(flat - b) - np.linalg.norm(a - b)
            for i, a in enumerate(mine) for b in mine[i + 1 :]
        ]  # fmt: skip
        assert min(gaps) == pytest.approx(0, abs=1e-5)
    assert np.array_equal(made, smote(x, y, 30, seed=1)[0])
    with pytest.raises(DataError, match="two or more scans of each class"):
        smote(x[:3], np.array([0, 0, 1]), 4)


def test_mixup_adds_two_scans_and_their_classes_in_proportion():
    x, y = unit(20, classes=3)
    x = np.broadcast_to(y[:, None, None], (20, 8, 6)).astype(np.float32)
    made, chances = mixup(x, y, 200, seed=2)
    assert chances.sum(1) == pytest.approx(np.ones(200))
    assert made[:, 0, 0] == pytest.approx(chances @ np.arange(3), abs=1e-6)
    assert 0.02 < ((chances > 0.05).sum(1) > 1).mean() < 0.9


def test_the_mixture_and_moved_scans_have_the_classes_and_the_range_of_theirs():
    x, y = unit(60)
    made, classes = mixture(x, y, 200, seed=1)
    assert x.min() <= made.min() <= made.max() <= x.max()
    assert utility((made, classes), (x, y), learners=["svm"])["svm"] > 0.9
    assert mixture(x[:6], y[:6], 9)[0].shape == (18, 8, 6)
    moved, rows = classical(x, 150, strength=0.5, seed=1)
    assert 0 <= moved.min() <= moved.max() <= 1
    assert (
        np.bincount(rows).tolist() == [3] * 30 + [2] * 30 or sorted(np.bincount(rows).tolist()) == [2] * 30 + [3] * 30
    )
    assert np.array_equal(moved, classical(x, 150, strength=0.5, seed=1)[0])


def test_the_strength_is_chosen_on_parts_that_hold_whole_patients():
    groups, strata = [f"p{n // 2}" for n in range(24)], ["a"] * 12 + ["b"] * 12
    seen = []

    def score(strength, known, new):
        seen.append((known, new))
        assert not {groups[n] for n in known} & {groups[n] for n in new}
        assert {strata[n] for n in new} == {"a", "b"}
        return -abs(strength - 1.2)

    assert tuned(score, groups, strata=strata) == 1.0
    assert sorted(np.concatenate([new for _, new in seen[:3]]).tolist()) == list(range(24))
    assert tuned(lambda *_: 0.5, groups, strata=strata) == min(STRENGTHS)


# -- pairs -------------------------------------------------------------------------------------------------


def balls(n: int, space: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy scans (n, 1, *space) with a ball of label 2 somewhere, and their maps."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.arange(size) for size in space], indexing="ij"))
    maps = np.zeros((n, *space), dtype=np.int64)
    for one in maps:
        centre = np.array([rng.uniform(0.3, 0.7) * size for size in space]).reshape(-1, *[1] * len(space))
        one[((places - centre) ** 2).sum(0) < (0.24 * min(space)) ** 2] = 2
    return (0.3 + 0.3 * (maps == 2) + 0.08 * rng.standard_normal(maps.shape))[:, None].astype(np.float32), maps


@pytest.mark.parametrize("space", [(18, 21), (12, 14, 11)], ids=["2d", "3d"])
def test_the_segmentation_learner_finds_balls_and_repeats_itself(space):
    train, test = balls(12, space), balls(5, space, seed=1)
    found = segment(train, test[0], labels=[2], steps=60, seed=3)
    assert set(np.unique(found)) <= {0, 2}
    assert dice(found, test[1], [2]).mean() > 0.8
    again = segment(train, test[0], labels=[2], steps=3, seed=3)
    assert np.array_equal(again, segment(train, test[0], labels=[2], steps=3, seed=3))


def test_pairs_are_changed_and_weighed_together(monkeypatch):
    train, test = balls(6, (16, 16)), balls(4, (16, 16), seed=1)
    monkeypatch.setattr("medgen.metrics.segmentation._EDGE", {2: 8, 3: 8})
    seen = []

    def change(x, maps, generator):
        seen.append((x.shape, set(maps.unique().tolist())))
        return x.flip(2), maps.flip(1)

    found = segment(train, test[0], labels=[2], steps=4, weights=np.arange(6.0), augment=change)
    assert found.shape == (4, 16, 16)
    assert seen[0][0] == (16, 1, 8, 8)
    assert seen[0][1] == {0, 1}


def test_dice_counts_the_labels_that_either_map_has():
    truth = np.array([[0, 1, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [0, 0, 3, 0]])
    assert dice(found, truth, [1, 2, 3]) == pytest.approx([(2 / 3 + 1) / 2, 1.0, 0.0])


# -- gains ---------------------------------------------------------------------------------------------------


def test_resampled_aurocs_are_those_of_the_resampled_scans():
    rng = np.random.default_rng(0)
    y = np.arange(40) % 3
    scores = rng.integers(6, size=(40, 3)) + 2.0 * np.eye(3)[y]
    counts = np.stack([np.bincount(rng.integers(40, size=40), minlength=40) for _ in range(5)])
    for classes in (np.arange(3), np.arange(2)):
        kept = np.isin(y, classes)
        table, told = scores[kept][:, classes], y[kept]
        for row, found in zip(counts[:, kept], class_aurocs(table, told, classes, counts[:, kept]), strict=True):
            rows = np.repeat(np.arange(len(told)), row)
            assert found == pytest.approx(class_auroc(table[rows], told[rows], classes))


def test_intervals_of_paired_gains_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(1), 0
    for n in range(120):
        hard = rng.normal(size=60)
        # Patients and training sets are hard for both arms; the gain is 0.1 on average.
        ours = hard + 0.1 + 0.2 * rng.normal(size=(6, 60)) + 0.1 * rng.normal(size=(6, 1))
        theirs = hard + 0.2 * rng.normal(size=(6, 60))
        again = drawn_again([str(p) for p in range(60)], None, 6, resamples=100, seed=n)
        gains = np.stack([means(a, again.scans) - means(b, again.scans) for a, b in zip(ours, theirs, strict=True)])
        low, high = interval(over_sets(gains, again))
        held += low <= 0.1 <= high
    # Six training sets drawn again vary a little less than six new ones.
    assert 0.8 < held / 120 <= 0.995


def test_what_intervals_say():
    assert [verdict(Interval(*ends)) for ends in ((0.1, 0.2), (0.0, 0.2), (-0.2, -0.1), (np.nan, np.nan))] == [
        "helps", "no benefit", "harms", "cannot tell",
    ]  # fmt: skip
    assert np.isnan(interval(np.array([1.0]))).all()
    again = drawn_again(["a", "a"], None, 1, resamples=50)
    assert again.scans.tolist() == [[1, 1]]
