"""What synthetic scans are worth to learners: sanity of the numbers, which no learner may bend."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medgen.errors import DataError
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
