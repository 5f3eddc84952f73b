"""Copies of patients are caught, other people's scans are not."""

import numpy as np
import pytest
import torch
from worlds import SAMPLES

from medgen import io
from medgen.errors import DataError
from medgen.metrics.memorisation import COPIES, CopyDetector, CopyTest
from medgen.metrics.spaces import SPACES


@pytest.fixture(scope="module")
def people(heads) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """(training, held-out) phantoms in [0, 1] of different people: 24 and 12 radiographs, 40 and 20 heads."""
    files = sorted((SAMPLES / "xray").glob("*/*.dcm"))
    flat = torch.stack([torch.from_numpy(io.read(path).voxels[..., 0].astype(np.float32)) / 4095 for path in files])
    flat = torch.nn.functional.avg_pool2d(flat, 2)[torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    paths = sorted(heads.iterdir())[:60]
    solid = torch.stack([torch.from_numpy(io.read(path).voxels.astype(np.float32)) / 250 for path in paths])
    return {2: (flat[:24], flat[24:]), 3: (solid[:40], solid[40:])}


def names(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


@pytest.fixture(scope="module")
def detectors(people) -> dict[int, tuple[CopyDetector, CopyTest]]:
    found = {}
    for dims, (train, held_out) in people.items():
        detector = CopyDetector(train, names(len(train)))
        found[dims] = detector, detector.calibrate(held_out[: len(held_out) // 2], seed=0)
    return found


@pytest.mark.parametrize("dims", [2, 3])
def test_an_exact_copy_is_found_with_its_owner(people, detectors, dims):
    train, _ = people[dims]
    for index in (0, 7, len(train) - 1):
        found = detectors[dims][0].nearest(train[index : index + 1])[0]
        assert found.nearest == index
        assert max(found.r.values()) < 0.01
        assert set(found.r) == set(found.distance) == set(SPACES)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_test_reports_what_it_catches(detectors, dims):
    _, test = detectors[dims]
    assert set(test.copies_caught) == set(COPIES)
    assert test.held_out == {2: 6, 3: 10}[dims]
    assert 0 <= test.held_out_flagged <= 0.01
    assert test.reliable == (min(test.copies_caught.values()) >= 0.95)
    assert set(test.thresholds) == set(SPACES)
    assert test.threshold == test.thresholds["registered"]
    assert test.to_dict()["thresholds"] == test.thresholds


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["same", "blurred", "noised", "brighter", "flipped"])
def test_copies_in_disguise_fall_below_the_threshold(people, detectors, dims, kind):
    """Made here, not by the detector itself: it must not only know its own disguises."""
    from scipy.ndimage import gaussian_filter

    train, _ = people[dims]
    detector, test = detectors[dims]
    rng = np.random.default_rng(3)
    caught = 0
    for index in range(0, 20, 2):
        scan = train[index].numpy()
        disguised = {
            "same": scan,
            "blurred": gaussian_filter(scan, (0, *[0.8] * dims)),
            "noised": scan + 0.15 * scan.std() * rng.normal(size=scan.shape),
            "brighter": 0.8 * scan + 0.1,
            "flipped": np.flip(scan, 1),
        }[kind]
        disguised = torch.from_numpy(np.ascontiguousarray(disguised, np.float32))
        caught += test.is_copy(detector.nearest(disguised[None])[0])
    assert caught >= 9


@pytest.mark.parametrize("dims", [2, 3])
def test_people_the_detector_never_saw_are_not_taken_for_copies(people, detectors, dims):
    _, held_out = people[dims]
    detector, test = detectors[dims]
    found = detector.nearest(held_out[len(held_out) // 2 :])
    assert sum(test.is_copy(one) for one in found) <= 2
    assert np.median([one.r["registered"] for one in found]) > 0.85


@pytest.mark.parametrize("dims", [2, 3])
def test_two_scans_of_one_patient_do_not_hide_a_copy(people, detectors, dims):
    """r compares different patients: with a second scan of the copied patient it must stay small."""
    train, _ = people[dims]
    again = (train[:1] + 0.01).clamp(0, 1)
    both = CopyDetector(torch.cat([train, again]), [*names(len(train)), "p0"])
    assert both.nearest(train[:1])[0].r["registered"] < 0.1
    # Even under another name, an identical scan is one patient's.
    twice = CopyDetector(torch.cat([train, train[:1]]), [*names(len(train)), "somebody else"])
    assert max(twice.nearest(train[:1])[0].r.values()) < 0.1


def test_identical_scans_join_all_their_patients_into_one():
    """a = b by one scan and b = c by another: the three are one person, whatever order they come in."""
    rng = torch.Generator().manual_seed(0)
    one, two, three, four = (torch.rand(1, 8, 8, generator=rng) for _ in range(4))
    for order in ([0, 1, 2, 3, 4], [1, 3, 0, 2, 4], [3, 2, 1, 0, 4]):
        rows = [(one, "a"), (one, "b"), (two, "b"), (two, "c"), (four, "d")]
        detector = CopyDetector(torch.stack([rows[n][0] for n in order]), [rows[n][1] for n in order])
        # Were they two people, a disguised copy of `two` would be as near to the second as to the first.
        assert detector.nearest((two + 0.01 * three)[None])[0].r["registered"] < 0.2


def test_one_training_patient_is_not_enough(people):
    train, _ = people[2]
    with pytest.raises(DataError, match="two training patients"):
        CopyDetector(train[:3], ["p", "p", "p"])
    with pytest.raises(DataError, match="two training patients"):
        CopyDetector(train[:1].repeat(2, 1, 1, 1), ["p", "q"])


def test_the_seed_decides_what_is_planted(people):
    train, held_out = people[2]
    detector = CopyDetector(train[:12], names(12))
    one, again, other = (detector.calibrate(held_out[:4], copies=5, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_constant_scans_make_no_nonsense(people):
    train, held_out = people[2]
    detector = CopyDetector(torch.cat([train[:6], torch.zeros(1, *train.shape[1:])]), names(7))
    for r in detector.ratios(torch.cat([held_out[:2], torch.zeros_like(held_out[:1])])).values():
        assert np.isfinite(r).all()


def test_odd_sizes_channels_and_large_scans_are_compared():
    rng = torch.Generator().manual_seed(0)
    for shape in ((1, 33, 50), (2, 9, 100), (1, 7, 6, 5)):
        train = torch.rand(6, *shape, generator=rng)
        detector = CopyDetector(train, names(6))
        found = detector.nearest(train[4:5])[0]
        assert found.nearest == 4
        assert found.r["registered"] < 0.05
