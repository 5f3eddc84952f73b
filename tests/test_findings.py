"""What stands out in a map, on its millimetre, with the volume and the p-value it has."""

import csv

import numpy as np
import pytest

from medgen.grid import Grid
from medgen.tasks.calibration import Normals
from medgen.tasks.findings import MOST_FINDINGS, Finding, findings, write_findings

# Oblique, 2 x 3 x 4 mm, flipped along the first axis.
TURN = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = TURN @ np.diag([-2.0, 3.0, 4.0]), (10, -20, 30)
GRID = Grid((12, 13, 14), AFFINE)


def known(largest=(0, 1, 4, 9, 2, 3, 1, 1, 0), maxima=(3, 4, 5, 6, 7, 3, 3, 3, 4), forming=3.0) -> Normals:
    ones = np.ones((1, 1, 1), np.float32)
    maxima = np.asarray(maxima, float)
    return Normals(ones, ones, maxima, maxima, np.asarray(largest, float), forming)


@pytest.fixture
def z_map() -> np.ndarray:
    """A block of 8 voxels that peaks at one corner, a diagonal pair, one voxel, and a rest that nobody scored."""
    z = np.zeros((12, 13, 14), np.float32)
    z[2:4, 5:7, 8:10] = 4
    z[3, 6, 9] = 6.5
    z[8, 8, 8] = z[9, 9, 9] = 20
    z[0, 0, 0] = 3.5
    z[11] = np.nan
    return z


def test_volume_place_and_peak_are_in_millimetres(z_map):
    block, pair, single = findings(z_map, GRID, known(), 0.1)
    assert [one.volume_mm3 for one in (block, pair, single)] == pytest.approx([8 * 24, 2 * 24, 24])
    corners = np.array([[i, j, k, 1] for i in (2, 3) for j in (5, 6) for k in (8, 9)])
    assert (block.x, block.y, block.z) == pytest.approx((corners @ AFFINE.T)[:, :3].mean(0), abs=0.01)
    assert (block.peak_x, block.peak_y, block.peak_z) == pytest.approx((AFFINE @ [3, 6, 9, 1])[:3], abs=0.01)
    assert (pair.x, pair.y, pair.z) == pytest.approx((AFFINE @ [8.5, 8.5, 8.5, 1])[:3], abs=0.01)
    assert (single.x, single.y, single.z) == (single.peak_x, single.peak_y, single.peak_z)
    assert (single.x, single.y, single.z) == pytest.approx(AFFINE[:3, 3])
    assert [one.highest for one in (block, pair, single)] == pytest.approx([6.5, 20, 3.5])


def test_p_counts_the_healthy_scans_with_as_large_a_cluster(z_map):
    assert [one.p for one in findings(z_map, GRID, known(), 0.1)] == pytest.approx([2 / 10, 5 / 10, 8 / 10])
    none_as_large = known(largest=[0] * 9)
    assert [one.p for one in findings(z_map, GRID, none_as_large, 0.1)] == pytest.approx([0.1] * 3)


def test_a_finding_is_marked_where_its_peak_is_above_the_mask_s_threshold(z_map):
    assert [one.marked for one in findings(z_map, GRID, known(), 0.1)] == [False, True, False]  # above 7
    assert [one.marked for one in findings(z_map, GRID, known(), 0.4)] == [True, True, False]  # above 5
    assert [one.marked for one in findings(z_map, GRID, known(), 0.05)] == [None] * 3


def test_healthy_and_unscored_maps_have_no_findings(z_map):
    assert findings(np.zeros_like(z_map), GRID, known(), 0.1) == ()
    assert findings(np.full_like(z_map, np.nan), GRID, known(), 0.1) == ()
    assert findings(z_map, GRID, known(largest=()), 0.1) == ()
    nobody = Normals(np.ones((1, 1, 1), np.float32), np.ones((1, 1, 1), np.float32), np.ones(9), np.ones(9))
    assert findings(z_map, GRID, nobody, 0.1) == ()


def test_images_have_findings_too():
    z = np.zeros((20, 30, 1), np.float32)
    z[4:6, 7:10, 0] = 9
    (one,) = findings(z, Grid((20, 30, 1), np.diag([0.5, 0.5, 1.0, 1.0])), known(), 0.1)
    assert one.volume_mm3 == pytest.approx(6 * 0.25)
    assert (one.x, one.y, one.z) == pytest.approx((2.25, 4.0, 0.0))


def test_a_long_list_is_cut_after_the_largest():
    z = np.zeros((80, 4, 4), np.float32)
    z[::2, 1, 1] = 9
    z[0, 1, 1:3] = 9
    found = findings(z, Grid(z.shape, np.eye(4)), known(), 0.1)
    assert len(found) == MOST_FINDINGS
    assert found[0].volume_mm3 == 2
    assert len(findings(z, Grid(z.shape, np.eye(4)), known(), 0.1, most=99)) == 40


def test_the_table_has_a_row_a_finding(z_map, tmp_path):
    found = findings(z_map, GRID, known(), 0.1)
    write_findings([("a", found), ("b", ()), ("c", found[:1])], tmp_path / "findings.csv")
    with (tmp_path / "findings.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["case"], row["finding"]) for row in table] == [("a", "1"), ("a", "2"), ("a", "3"), ("c", "1")]
    assert list(table[0]) == ["case", "finding", *Finding.__dataclass_fields__]
    assert float(table[1]["volume_mm3"]) == pytest.approx(found[1].volume_mm3)
    assert table[1]["marked"] == "True"
