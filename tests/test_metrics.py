"""Numbers about images: equal to other people's code."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import roc_auc_score

from medgen.metrics.detection import auroc
from medgen.metrics.image import local_mean, psnr, ssim_map


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
