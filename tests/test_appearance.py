"""Who looks like a set of scans, and like a class: outliers are far, relatives are near, p-values are honest."""

import numpy as np
import pytest
import torch
from worlds import small_chest

from medgen.errors import DataError
from medgen.metrics.appearance import Appearance, appearance, conformal


def chests(first: int, count: int) -> torch.Tensor:
    """Two dark lungs beside each other, nobody's twice."""
    return torch.stack([small_chest(seed) for seed in range(first, first + count)])


@pytest.fixture(scope="module")
def known() -> torch.Tensor:
    return chests(0, 40)


def test_relatives_are_nearer_than_noise_and_blanks(known):
    look = Appearance(known)
    near = look.distance(look.rows(chests(100, 20)))
    noise = torch.rand(5, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    for strange in (noise, torch.zeros(5, 1, 24, 24), torch.ones(5, 1, 24, 24)):
        assert look.distance(look.rows(strange)).min() > near.max()


def test_what_a_scan_looks_like_does_not_depend_on_its_company(known):
    look = Appearance(known)
    alone = np.concatenate([look.distance(look.rows(known[n : n + 1])) for n in range(5)])
    assert look.distance(look.rows(known[:5])) == pytest.approx(alone)


def test_a_scan_that_looks_like_another_class_is_doubted():
    labels = np.repeat([0, 1], 30)
    x = torch.cat([chests(0, 30), chests(30, 30).transpose(2, 3)])
    look = Appearance(x, labels)
    rows = look.rows(torch.cat([chests(100, 10), chests(110, 10).transpose(2, 3)]))
    right, wrong = look.doubt(rows, np.repeat([0, 1], 10)), look.doubt(rows, np.repeat([1, 0], 10))
    assert right.max() < wrong.min()
    assert (right >= 0).all()
    assert not Appearance(x).doubt(look.rows(x[:3]), np.zeros(3, dtype=int)).any()


def test_volumes_channels_and_thin_scans_have_an_appearance():
    x = chests(0, 6)[:, :, :9, :11, None].expand(-1, -1, -1, -1, 7).contiguous()
    assert np.isfinite(appearance(x)).all()
    assert appearance(torch.cat([x, x], 1)).shape[0] == 6
    assert np.isfinite(appearance(torch.rand(3, 1, 1, 9))).all()
    look = Appearance(x)
    assert np.isfinite(look.distance(look.rows(x))).all()


def test_one_scan_tells_nothing():
    with pytest.raises(DataError, match="two"):
        Appearance(torch.rand(1, 1, 8, 8))


def test_p_values_of_scans_of_the_same_kind_are_uniform():
    rng = np.random.default_rng(0)
    p = np.concatenate([conformal(rng.normal(size=50), rng.normal(size=99)) for _ in range(200)])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=0.01)
    assert conformal(np.array([1e9]), np.zeros(99))[0] == pytest.approx(0.01)
    assert conformal(np.array([0.0]), [])[0] == 1
