"""Sets of scans compared by their features: against loops and closed forms, and on sets whose answer is known."""

import json

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from medgen.errors import ConfigError, DataError
from medgen.metrics import encoder as encoders
from medgen.metrics.encoder import learned_encoder, torchscript_extractor
from medgen.metrics.sets import METRICS, compare_sets, frechet, kernel_distance, neighbour_shares, standardised
from medgen.metrics.twosample import blocks_of, c2st


def normal(n: int, d: int = 6, seed: int = 0, mean: float = 0.0, sd: float = 1.0) -> np.ndarray:
    return mean + sd * np.random.default_rng(seed).standard_normal((n, d))


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x[:, None] - y[None], axis=2)


def shares(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    return neighbour_shares(distances(real, real), distances(made, made), distances(real, made))


# -- each number -----------------------------------------------------------------------------------------


def test_precision_recall_density_and_coverage_are_those_of_plain_loops():
    real, made, k = normal(40, 3), normal(31, 3, seed=1, mean=0.4), 5

    def reach(rows, n):
        return sorted(float(np.linalg.norm(rows[n] - other)) for other in rows)[k]

    inside = [[np.linalg.norm(a - b) <= reach(real, n) for b in made] for n, a in enumerate(real)]
    back = [[np.linalg.norm(a - b) <= reach(made, m) for m, b in enumerate(made)] for a in real]
    expected = {
        "precision": np.mean([any(inside[n][m] for n in range(40)) for m in range(31)]),
        "recall": np.mean([any(row) for row in back]),
        "density": np.sum(inside) / (k * 31),
        "coverage": np.mean([any(row) for row in inside]),
    }
    assert shares(real, made) == pytest.approx(expected)


def test_two_sets_of_one_source_are_dense_and_covered_and_a_lost_mode_is_not_covered():
    rng = np.random.default_rng(0)
    modes = np.array([[0.0] * 4, [8.0] * 4, [-8.0] * 4])
    real, same = (modes[rng.integers(3, size=600)] + rng.standard_normal((600, 4)) for _ in range(2))
    found = shares(real, same)
    assert found["density"] == pytest.approx(1, abs=0.1)
    assert found["coverage"] > 0.94
    assert min(found["precision"], found["recall"]) > 0.9
    dropped = modes[rng.integers(2, size=600)] + rng.standard_normal((600, 4))
    lost = shares(real, dropped)
    assert lost["precision"] > 0.9
    assert lost["coverage"] < 0.75
    assert lost["recall"] < 0.75
    copied = shares(real, real.copy())
    assert copied["precision"] == copied["coverage"] == copied["recall"] == 1


def test_the_frechet_distance_is_that_of_two_gaussians():
    d, n = 5, 20000
    root = np.random.default_rng(1).standard_normal((d, d)) / 2 + np.eye(d)
    x, y = normal(n, d), normal(n, d, seed=1, mean=0.5) @ root.T
    a, b = np.eye(d), root @ root.T
    values = np.linalg.eigvals(a @ b)
    expected = (0.5 * root.sum(1) @ (0.5 * root.sum(1))) + np.trace(a + b) - 2 * np.sqrt(values.real).sum()
    assert frechet(x, y) == pytest.approx(expected, rel=0.03)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet(x, y) == pytest.approx(frechet(y, x))


def test_rows_of_more_columns_than_there_are_rows_have_the_distance_of_their_whole_covariances():
    x, y = normal(12, 60), normal(14, 60, seed=1, sd=2)
    a, b = ledoit_wolf(x)[0], ledoit_wolf(y)[0]
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = apart + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    assert frechet(x, y) == pytest.approx(expected)
    wide = compare_sets(normal(20, 600, seed=2, mean=1), normal(20, 600), normal(20, 600, seed=1)).measures
    assert wide["c2st_linear"].value > 0.9
    assert wide["frechet"].ratio > 1.3


def test_the_kernel_distance_is_unbiased_and_its_standard_error_holds():
    x, y = normal(9, 3), normal(7, 3, seed=1)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    inside = [np.mean([kernel(a, b) for n, a in enumerate(z) for m, b in enumerate(z) if n != m]) for z in (x, y)]
    assert kernel_distance(x, y)[0] == pytest.approx(sum(inside) - 2 * np.mean([kernel(a, b) for a in x for b in y]))
    same, apart = (
        np.array([kernel_distance(normal(80, seed=n), normal(80, seed=1000 + n, mean=shift)) for n in range(60)]).T
        for shift in (0.0, 0.5)
    )
    assert abs(same[0].mean()) < 3 * same[0].std() / np.sqrt(60)
    # Where there is nothing to find it errs on the safe side.
    assert 1 < same[1].mean() / same[0].std() < 2
    assert apart[1].mean() == pytest.approx(apart[0].std(), rel=0.3)
    shifted = kernel_distance(normal(80), normal(80, seed=5, mean=1))
    assert shifted[0] > 3 * shifted[1]


def test_classifiers_tell_sets_apart_only_where_they_differ_and_trees_see_a_spread():
    real = normal(200)
    for kind in ("linear", "trees"):
        same = [c2st(normal(100, seed=n), normal(100, seed=50 + n), kind=kind, seed=n) for n in range(4)]
        assert np.mean(same) == pytest.approx(0.5, abs=0.06)
        assert c2st(real, normal(200, seed=1, mean=1), kind=kind) > 0.9
    wide = [normal(200, seed=n, sd=2) for n in range(1, 7)]
    assert c2st(real, wide[0], kind="trees") > 0.75
    assert np.mean([c2st(real, one) for one in wide]) == pytest.approx(0.5, abs=0.08)


def test_an_owner_is_in_one_block_and_blocks_are_of_a_size():
    owners = np.repeat(np.arange(50), np.arange(50) % 4 + 1)
    block = blocks_of(owners, np.random.default_rng(0))
    assert all(len(set(block[owners == one])) == 1 for one in range(50))
    sizes = np.bincount(block)
    assert len(sizes) == 20
    assert sizes.max() - sizes.min() <= 4


# -- all of them beside the floor --------------------------------------------------------------------------


def test_a_set_of_the_same_source_is_at_its_floor_and_another_is_not():
    real, other, same = normal(120), normal(150, seed=1), normal(130, seed=2)
    good = compare_sets(same, real, other)
    assert tuple(good.measures) == METRICS
    assert good.scans == 120
    for name, found in good.measures.items():
        assert found.interval.low <= found.value <= found.interval.high, name
        assert found.floor_interval.low <= found.floor <= found.floor_interval.high, name
        assert (found.ratio is None) == (name == "kernel")
        if found.ratio is not None:
            assert found.ratio == pytest.approx(found.value / found.floor)
            assert found.ratio_interval.low <= 1.1, name
            assert found.ratio_interval.high >= 0.9, name
    bad = compare_sets(normal(130, seed=2, mean=1), real, other).measures
    assert bad["frechet"].ratio > 3
    assert bad["coverage"].ratio < 0.8
    assert bad["c2st_linear"].interval.low > 0.8
    assert bad["frechet"].floor == pytest.approx(good.measures["frechet"].floor)
    json.dumps(good.to_dict())


def test_it_repeats_itself_takes_tensors_and_does_not_ask_for_units():
    sets = normal(40, seed=2, mean=0.3), normal(40), normal(40, seed=1)
    found = compare_sets(*sets, seed=3)
    assert compare_sets(*map(torch.from_numpy, sets), seed=3) == found
    unit, origin = np.array([1e-3, 1, 10, 1e4, 5, 2]), np.arange(6) * 100
    scaled = compare_sets(*(one * unit + origin for one in sets), seed=3)
    for name in METRICS:
        assert scaled.measures[name].value == pytest.approx(found.measures[name].value, rel=1e-6, abs=1e-6)


def test_intervals_are_as_wide_as_values_of_other_scans_differ():
    several = [compare_sets(normal(60, 3, seed=n, mean=0.5), normal(60, 3, seed=100 + n), normal(60, 3, seed=200 + n))
               for n in range(8)]  # fmt: skip
    for name in ("frechet", "precision", "coverage", "c2st_linear"):
        values = np.array([one.measures[name].value for one in several])
        held = [one.measures[name].interval for one in several]
        inside = np.mean([end.low <= np.median(values) <= end.high for end in held])
        assert inside >= 0.7, name


def test_scans_of_one_patient_are_left_out_together():
    real = np.repeat(normal(15, seed=4), 4, axis=0) + 0.01 * normal(60, seed=5)
    made, other = normal(60, seed=1), normal(60, seed=2)
    alone = compare_sets(made, real, other).measures["frechet"]
    owned = compare_sets(made, real, other, patients=[str(n // 4) for n in range(60)]).measures["frechet"]
    assert owned.value == alone.value
    assert np.diff(owned.interval)[0] > 1.2 * np.diff(alone.interval)[0]


def test_columns_without_spread_count_without_infinities():
    real, made = normal(30), normal(30, seed=1)
    real[:, 0], made[:, 0] = 3, 3
    assert not standardised(real, made)[0][:, 0].any()
    made[:, 0] += np.linspace(0, 1e-3, 30)
    found = standardised(real, made)[0]
    assert np.isfinite(found).all()
    assert 0 < np.abs(found[:, 0]).max() < 5
    assert standardised(real, np.full((2, 6), 1e9))[0][:, 1:].tolist() == [[5.0] * 5] * 2
    constant = np.ones((12, 3))
    assert all(np.isfinite(one.value) for one in compare_sets(constant, constant, constant).measures.values())


def test_sets_that_cannot_be_compared_are_refused():
    for sets, words in {
        (9, 6, 12, 6, 12, 6): r"10 scans or more each; found 12 \(reference\), 9 \(generated\), 12 \(floor\)",
        (12, 6, 12, 5, 12, 6): r"columns: 5 \(reference\), 6 \(generated\), 6 \(floor\)",
    }.items():
        n, d, n2, d2, n3, d3 = sets
        with pytest.raises(DataError, match=words):
            compare_sets(normal(n, d), normal(n2, d2), normal(n3, d3))
    with pytest.raises(DataError, match="NaN"):
        compare_sets(np.full((12, 2), np.nan), normal(12, 2), normal(12, 2))


# -- encoders ----------------------------------------------------------------------------------------------


def shapes(n: int, space: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A bright blob each, anywhere."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in space], indexing="ij")
    centre, width = rng.uniform(-0.6, 0.6, (n, len(space))), rng.uniform(0.02, 0.1, n)
    away = sum((axis[None] - centre[:, a].reshape(-1, *[1] * len(space))) ** 2 for a, axis in enumerate(axes))
    return np.exp(-away / width.reshape(-1, *[1] * len(space)))[:, None].astype(np.float32)


@pytest.mark.parametrize("space", [(16, 12), (8, 10, 6)])
def test_an_encoder_repeats_itself_by_its_seed_and_leaves_no_trace(space, monkeypatch):
    monkeypatch.setattr(encoders, "_STEPS", {2: 4, 3: 4})
    train, new = shapes(20, space), shapes(5, space, seed=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = learned_encoder(train, seed=1)(new)
    assert torch.equal(torch.rand(2), expected)
    assert found.shape == (5, 64)
    assert np.array_equal(found, learned_encoder(torch.from_numpy(train), seed=1)(new))
    assert not np.array_equal(found, learned_encoder(train, seed=2)(new))
    # A row does not depend on those beside it.
    assert np.allclose(learned_encoder(train, seed=1)(new[:2]), found[:2], atol=1e-5)


def test_an_encoder_knows_a_scan_again(monkeypatch):
    monkeypatch.setattr(encoders, "_STEPS", {2: 25, 3: 4})
    encoder = learned_encoder(shapes(100, (16, 16)))
    new = shapes(40, (16, 16), seed=1)
    again = np.clip(new**1.15 + 0.03 * np.random.default_rng(0).standard_normal(new.shape), 0, 1)
    a, b = standardised(encoder(new), encoder(new), encoder(again))
    assert (distances(a, b).argmin(1) == np.arange(40)).mean() > 0.6


def test_large_scans_are_averaged_down_and_few_are_refused(monkeypatch):
    monkeypatch.setattr(encoders, "_STEPS", {2: 1, 3: 1})
    assert learned_encoder(np.repeat(shapes(8, (70, 33)), 2, axis=1))(np.zeros((3, 2, 70, 33))).shape == (3, 64)
    with pytest.raises(DataError, match="8 scans or more; found 7"):
        learned_encoder(shapes(7, (9, 9)))


class Extractor(torch.nn.Module):
    """Maps of the mean, and of the mean square; of three channels only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 3
        return torch.stack([x.mean(1), (x * x).mean(1)], 1)


class Odd(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_somebodys_own_extractor_is_run_and_refused_where_it_does_not_fit(tmp_path):
    torch.jit.script(Extractor()).save(str(tmp_path / "own.pt"))
    torch.jit.script(Odd()).save(str(tmp_path / "odd.pt"))
    x = shapes(70, (9, 8))
    found = torchscript_extractor(tmp_path / "own.pt")(x)
    assert found == pytest.approx(np.stack([x.mean((1, 2, 3)), (x**2).mean((1, 2, 3))], 1), abs=1e-5)
    with pytest.raises(DataError, match=r"own.pt does not take scans \(70, 2, 9, 8\)|\(64, 2, 9, 8\)"):
        torchscript_extractor(tmp_path / "own.pt")(np.repeat(x, 2, axis=1))
    with pytest.raises(DataError, match="one row of features a scan"):
        torchscript_extractor(tmp_path / "odd.pt")(x)
    (tmp_path / "text.pt").write_text("no program")
    with pytest.raises(ConfigError, match="not a TorchScript file"):
        torchscript_extractor(tmp_path / "text.pt")
    with pytest.raises(ConfigError, match="no such file"):
        torchscript_extractor(tmp_path / "none.pt")
