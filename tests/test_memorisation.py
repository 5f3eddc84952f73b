"""Copies of patients are caught, other people's scans are not."""

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import SAMPLES

from medgen import io
from medgen.errors import DataError, LeakageError
from medgen.metrics.membership import Closeness, likelihood_attack
from medgen.metrics.memorisation import COPIES, CopyDetector, CopyTest
from medgen.metrics.spaces import SPACES
from medgen.report.duplicates import duplicate_sheet


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


# -- generators that memorise, and others --------------------------------------------------------------------


def strangers(dims: int, n: int, channels: int = 1) -> torch.Tensor:
    """Scans (n, c, *space) of n people who differ in smooth anatomy and grain; further channels are other contrasts."""
    from scipy.ndimage import gaussian_filter

    space = (24, 24) if dims == 2 else (12, 14, 12)
    rng = np.random.default_rng(11)
    middle = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in space], indexing="ij"))
    body = 1 / (1 + np.exp(8 * ((middle**2).sum(0) - 0.7)))
    smooth = gaussian_filter(rng.normal(size=(n, *space)), [0, *[1.5] * dims])
    x = body * (0.5 + 0.12 * smooth / smooth.std()) + 0.02 * rng.normal(size=(n, *space))
    x = torch.from_numpy(x.clip(0, 1).astype(np.float32))[:, None]
    return torch.cat([x, x.sqrt(), 1 - x][:channels], 1)


@pytest.fixture(scope="module", params=[(2, 1), (2, 3), (3, 2)], ids=["flat", "colour", "solid"])
def world(request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(training, held-out, fresh) scans: 60, 100 and 100 images, or 40, 50 and 40 volumes."""
    dims, channels = request.param
    sizes = [60, 100, 100] if dims == 2 else [40, 50, 40]
    parts = strangers(dims, sum(sizes), channels).split(sizes)
    return parts[0], parts[1], parts[2]


def memorised(train: torch.Tensor, n: int) -> torch.Tensor:
    """What a sampler makes that knows nothing but its training scans: each slightly disguised, in turn."""
    rng = torch.Generator().manual_seed(5)
    axes = tuple(range(2, train.ndim))
    enlarge = torch.cat([torch.eye(len(axes)) / 1.05, torch.zeros(len(axes), 1)], 1)[None]
    made = []
    for index in range(n):
        x = train[index % len(train)][None]
        other = train[(7 * index + 3) % len(train)][None]
        nearer = torch.nn.functional.affine_grid(enlarge, list(x.shape), align_corners=False)
        made.append(
            [
                x + 0.05 * torch.randn(x.shape, generator=rng),
                torch.nn.functional.grid_sample(x, nearer, padding_mode="border", align_corners=False),
                x.roll([1] * len(axes), axes),
                x.flip(2) * 0.95,
                0.75 * x + 0.25 * other,
                0.5 * x + 0.25 * (x.roll(1, 2) + x.roll(-1, 2)),
            ][index % 6]
        )
    return torch.cat(made)


def test_a_memorising_sampler_is_caught_and_other_people_pass(world):
    train, held, fresh = world
    detector = CopyDetector(train, names(len(train)))
    test = detector.calibrate(held, copies=12)
    caught = [test.is_copy(one) for one in detector.nearest(memorised(train, 60))]
    assert np.mean(caught) >= 0.95
    assert np.mean([test.is_copy(one) for one in detector.nearest(fresh)]) <= 0.03
    assert 0 <= test.held_out_flagged <= 0.01


def test_a_copy_of_the_held_out_is_not_one_of_a_patient(world):
    train, held, _ = world
    detector = CopyDetector(train, names(len(train)))
    test = detector.calibrate(torch.cat([held[:30], train[:3]]), copies=4)
    assert (test.held_out, test.leaked) == (30, 3)
    assert test == CopyTest(**test.to_dict())
    assert detector.calibrate(held[:0]) == CopyTest.untested()


def test_closeness_tells_a_memorising_sampler_from_other_people(world):
    train, held, fresh = world
    whose, others = names(len(train)), [f"h{n}" for n in range(len(held))]
    innocent, guilty = (Closeness(train, whose, held, others) for _ in range(2))
    innocent.add(fresh)
    guilty.add(
        (train + 0.02 * torch.randn(train.shape, generator=torch.Generator().manual_seed(1))).repeat_interleave(2, 0)
    )
    for space in innocent.report().spaces.values():
        assert space.interval.low <= 0.5 <= space.interval.high
        assert space.attack.interval.low <= 0.5 <= space.attack.interval.high
        assert space.worst.ratio > 0.4
    found = guilty.report()
    assert found.standing == "measured"
    assert found.spaces["voxel"].attack.auroc > 0.9
    assert found.spaces["voxel"].attack.found > 0.8
    assert found.spaces["voxel"].calibrated.auroc > 0.9
    assert found.spaces["voxel"].closer > 0.7
    assert found.spaces["voxel"].worst.ratio < found.spaces["voxel"].worst.held_out


def test_closeness_is_the_same_in_blocks_and_keeps_nothing(world):
    train, held, fresh = world
    whole, parts = (Closeness(train, names(len(train)), held, [f"h{n}" for n in range(len(held))]) for _ in range(2))
    whole.add(fresh)
    size = kept(whole)
    for part in fresh.split(7):
        parts.add(part)
    one, other = whole.report(), parts.report()
    assert one.candidates == other.candidates == len(fresh)
    for space in ("voxel", "feature"):
        assert one.spaces[space].closer == pytest.approx(other.spaces[space].closer, abs=1e-9)
        assert one.spaces[space].attack.auroc == pytest.approx(other.spaces[space].attack.auroc, abs=1e-9)
    whole.add(fresh)
    assert kept(whole) == size


def kept(thing: object) -> int:
    """Bytes of all arrays that an object holds."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if isinstance(thing, (list, tuple)):
        return sum(map(kept, thing))
    if isinstance(thing, dict):
        return sum(map(kept, thing.values()))
    return sum(map(kept, vars(thing).values())) if hasattr(thing, "__dict__") else 0


def test_few_held_out_scans_are_rough_or_nothing():
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for held, standing in ((0, "not measured"), (3, "not measured"), (4, "rough"), (19, "rough"), (20, "measured")):
        closeness = Closeness(x[:20], names(20), x[20 : 20 + held], [f"h{n}" for n in range(held)])
        closeness.add(x[:5])
        found = closeness.report()
        assert found.standing == standing
        assert bool(found.spaces) == (standing != "not measured")
        assert str(held) in found.note or standing == "measured"
        assert found.to_dict()["candidates"] == 5
    assert Closeness(x, names(40), None).report().standing == "not measured"


def test_patients_in_both_sets_are_refused_and_scans_in_both_left_aside():
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(LeakageError, match="among both"):
        Closeness(x[:20], names(20), x[20:], names(20))
    with pytest.raises(DataError, match="needs its patient"):
        Closeness(x[:20], names(19), x[20:], names(20))
    # h0's second scan goes with the one that is p0's.
    found = Closeness(x[:20], names(20), torch.cat([x[:1], x[20:]]), ["h0", "h0", *[f"h{n}" for n in range(1, 20)]])
    assert (found.report().held_out, found.report().leaked) == (19, 2)


def test_a_likelihood_attack_is_the_auroc_of_the_densities():
    rng = np.random.default_rng(0)
    guess, sure = (likelihood_attack(rng.normal(shift, 1, 200), rng.normal(0, 1, 150)) for shift in (0, 4))
    assert guess.interval.low < 0.5 < guess.interval.high
    assert sure.auroc > 0.98
    assert sure.found > 0.7
    with pytest.raises(DataError, match="4 members"):
        likelihood_attack(np.zeros(3), np.zeros(9))
    with pytest.raises(DataError, match="finite"):
        likelihood_attack(np.array([0, 1, 2, np.inf]), np.zeros(9))


def test_copies_are_shown_beside_their_patients(tmp_path):
    for shape in ((1, 28, 28), (2, 12, 14, 12)):
        x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
        path = duplicate_sheet(
            [(x[0], x[1], "SYN-1 and case-7: r_voxel 0.10"), (x[0], x[2], "SYN-2")], tmp_path / "copies.png"
        )
        with Image.open(path) as picture:
            assert min(picture.size) > 160
            assert not picture.info
