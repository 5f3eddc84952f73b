"""Numbers about images: equal to other people's code, and copies of patients caught."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import roc_auc_score
from worlds import SAMPLES

from medgen import io
from medgen.errors import DataError
from medgen.metrics.detection import auroc
from medgen.metrics.image import local_mean, psnr, ssim_map
from medgen.metrics.memorisation import COPIES, CopyDetector, CopyTest


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    one = rng.random(shape)
    other = np.clip(0.7 * one + 0.3 * rng.random(shape), 0, 1)
    return torch.from_numpy(one), torch.from_numpy(other)


# -- images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1, 20, 24), (2, 2, 12, 14, 16)])
@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_psnr_is_skimage_s(shape, peak):
    x, y = pair(*shape)
    expected = [
        peak_signal_noise_ratio(a.numpy() * peak, b.numpy() * peak, data_range=peak) for a, b in zip(x, y, strict=True)
    ]
    assert np.allclose(psnr(x * peak, y * peak, peak=peak), expected)


def test_psnr_inside_a_mask_knows_nothing_of_the_outside():
    x, y = pair(2, 1, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:6] = True
    inside = psnr(x[..., 2:5, 3:6], y[..., 2:5, 3:6])
    y[..., 0, 0] += 100
    assert torch.allclose(psnr(x, y, mask), inside)
    assert float(psnr(x, x).min()) > 150


@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize("shape", [(2, 1, 20, 24), (2, 1, 14, 16, 18)])
def test_ssim_is_skimage_s_wherever_the_window_fits(shape, window):
    x, y = pair(*shape)
    ours = ssim_map(x, y, window=window)[:, 0].numpy()
    half = window // 2
    inner = (slice(half, -half),) * (len(shape) - 2)
    for n in range(shape[0]):
        _, theirs = structural_similarity(
            x[n, 0].numpy(), y[n, 0].numpy(), win_size=window, data_range=1.0, use_sample_covariance=False, full=True
        )
        assert np.allclose(ours[n][inner], theirs[inner], atol=1e-9)


def test_ssim_of_equal_images_is_one_and_the_mean_over_channels():
    x, y = pair(2, 3, 12, 12)
    assert torch.allclose(ssim_map(x, x), torch.ones(2, 1, 12, 12, dtype=torch.float64))
    each = torch.cat([ssim_map(x[:, c : c + 1], y[:, c : c + 1]) for c in range(3)], 1)
    assert torch.allclose(ssim_map(x, y), each.mean(1, keepdim=True))
    assert float(ssim_map(x, 1 - x).min()) >= -1


def test_local_means_mirror_at_the_border_and_shorten_on_thin_axes():
    row = torch.arange(5.0).reshape(1, 1, 1, 5)
    assert torch.allclose(local_mean(row, 3)[0, 0, 0], torch.tensor([2 / 3, 1, 2, 3, 10 / 3]))
    assert local_mean(torch.rand(1, 1, 2, 1, 9), 7).shape == (1, 1, 2, 1, 9)
    flat = torch.full((1, 2, 6, 7, 8), 3.0)
    assert torch.allclose(local_mean(flat, 5), flat)


# -- detection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_sklearn_s_with_ties(seed):
    rng = np.random.default_rng(seed)
    healthy, ill = np.round(rng.normal(0, 1, 40), 1), np.round(rng.normal(0.7, 1.5, 17), 1)
    truth = np.concatenate([np.zeros(40), np.ones(17)])
    assert auroc(healthy, ill) == pytest.approx(roc_auc_score(truth, np.concatenate([healthy, ill])))


def test_auroc_of_apart_equal_and_reversed_scores():
    low, high = np.array([0.0, 1.0]), np.array([2.0, 3.0, 4.0])
    assert (auroc(low, high), auroc(high, low), auroc(low, low)) == (1.0, 0.0, 0.5)


# -- copies ----------------------------------------------------------------------------------------------


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
        ratio, nearest = detectors[dims][0].nearest(train[index])
        assert nearest == index
        assert ratio < 0.01


@pytest.mark.parametrize("dims", [2, 3])
def test_the_test_reports_what_it_catches(detectors, dims):
    _, test = detectors[dims]
    assert set(test.copies_caught) == set(COPIES)
    assert test.held_out == {2: 6, 3: 10}[dims]
    assert 0 <= test.held_out_flagged <= 0.01
    assert test.reliable == (min(test.copies_caught.values()) >= 0.95)
    assert set(test.to_dict()) == {"threshold", "held_out_flagged", "copies_caught", "held_out", "reliable"}


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
        caught += detector.nearest(torch.from_numpy(np.ascontiguousarray(disguised, np.float32)))[0] < test.threshold
    assert caught >= 9


@pytest.mark.parametrize("dims", [2, 3])
def test_people_the_detector_never_saw_are_not_taken_for_copies(people, detectors, dims):
    _, held_out = people[dims]
    detector, test = detectors[dims]
    ratios = detector.ratios(held_out[len(held_out) // 2 :])
    assert (ratios < test.threshold).sum() <= 2
    assert np.median(ratios) > 0.85


@pytest.mark.parametrize("dims", [2, 3])
def test_two_scans_of_one_patient_do_not_hide_a_copy(people, detectors, dims):
    """r compares different patients: with a second scan of the copied patient it must stay small."""
    train, _ = people[dims]
    again = (train[:1] + 0.01).clamp(0, 1)
    both = CopyDetector(torch.cat([train, again]), [*names(len(train)), "p0"])
    assert both.nearest(train[0])[0] < 0.1
    # Even under another name, an identical scan is one patient's.
    twice = CopyDetector(torch.cat([train, train[:1]]), [*names(len(train)), "somebody else"])
    assert twice.nearest(train[0])[0] < 0.1


def test_identical_scans_join_all_their_patients_into_one():
    """a = b by one scan and b = c by another: the three are one person, whatever order they come in."""
    rng = torch.Generator().manual_seed(0)
    one, two, three, four = (torch.rand(1, 8, 8, generator=rng) for _ in range(4))
    for order in ([0, 1, 2, 3, 4], [1, 3, 0, 2, 4], [3, 2, 1, 0, 4]):
        rows = [(one, "a"), (one, "b"), (two, "b"), (two, "c"), (four, "d")]
        detector = CopyDetector(torch.stack([rows[n][0] for n in order]), [rows[n][1] for n in order])
        # Were they two people, a disguised copy of `two` would be as near to the second as to the first.
        assert detector.nearest(two + 0.01 * three)[0] < 0.2


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
    assert np.isfinite(detector.ratios(torch.cat([held_out[:2], torch.zeros_like(held_out[:1])]))).all()


def test_odd_sizes_channels_and_large_scans_are_compared():
    rng = torch.Generator().manual_seed(0)
    for shape in ((1, 33, 50), (2, 9, 100), (1, 7, 6, 5)):
        train = torch.rand(6, *shape, generator=rng)
        detector = CopyDetector(train, names(6))
        ratio, nearest = detector.nearest(train[4])
        assert nearest == 4
        assert ratio < 0.05
