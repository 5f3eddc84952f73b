"""Scores of images and volumes that ask no model, or only its encoder, and the density of states."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from scipy.ndimage import gaussian_filter
from scipy.stats import norm, skew
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, DataError
from medgen.metrics.hog import hog_rows
from medgen.metrics.image import smoothed
from medgen.models.autoencoder import Autoencoder
from medgen.models.base import Model
from medgen.models.mixture import Mixture
from medgen.models.vae import VAE
from medgen.scores.base import Healthy, Score
from medgen.scores.features import Hog
from medgen.scores.filters import squared_gradient, tail_mean
from medgen.scores.normative import Normative, Pca, Voxelwise
from medgen.scores.patches import Patches, feature_maps
from medgen.scores.reference import fingerprints, own_rows
from medgen.scores.states import DensityOfStates, Spreads
from medgen.scores.statistics import CodeLength, GradientEnergy, Intensity, Statistics

SPACES = {2: (16, 20), 3: (10, 12, 8)}
PLAIN = (Statistics(), Intensity(), Intensity(bright=False), GradientEnergy(), CodeLength())
LEARNING = (
    Hog(), Hog(how="mahalanobis"), Voxelwise(), Voxelwise(side="high"), Voxelwise(side="low"), Normative(),
    Pca(components=4),
)  # fmt: skip


def scans(count: int, dims: int = 2, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Smooth healthy scans about a common one, on [0, 1]."""
    rng = np.random.default_rng(seed)
    space = SPACES[dims]
    common = gaussian_filter(np.random.default_rng(99).standard_normal((1, channels, *space)), (0, 0, *[2] * dims))
    own = gaussian_filter(rng.standard_normal((count, channels, *space)), (0, 0, *[1] * dims))
    x = 0.5 + 0.3 * common / common.std() * 0.5 + 0.05 * own / own.std()
    return torch.from_numpy(x.clip(0, 1).astype(np.float32))


def painted(x: torch.Tensor, by: float = 0.35) -> torch.Tensor:
    """The same with a square or cube brighter, or darker, than it should be."""
    ill = x.clone()
    ill[(..., *[slice(3, 7)] * (x.ndim - 2))] += by
    return ill.clamp(0, 1)


def healthy(train: torch.Tensor, held: torch.Tensor | None = None) -> Healthy:
    def batches(x: torch.Tensor) -> Iterator[Batch]:
        return (Batch(part) for part in x.split(5))

    return Healthy(lambda: batches(train), lambda: batches(train if held is None else held))


def named(score: Score) -> str:
    return "-".join(str(value) for name, value in score if name in {"do", "how", "side", "bright"})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("score", PLAIN + LEARNING, ids=named)
def test_contract(score: Score, dims: int, channels: int) -> None:
    known = load(save(score.learn({}, healthy(scans(12, dims, channels)))))
    score = type(score).model_validate_json(score.model_dump_json())
    x = torch.cat([scans(3, dims, channels, seed=1), painted(scans(1, dims, channels, seed=2))])
    score.check({})
    found = score({}, Batch(x), known)
    assert found.values.shape == (4, len(score.names))
    assert found.values.isfinite().all()
    one = score({}, Batch(x[1:2]), known)
    torch.testing.assert_close(one.values, found.values[1:2], rtol=1e-4, atol=1e-5)
    if found.map is not None:
        assert found.map.shape == (4, *x.shape[2:])
        assert found.map.isfinite().all()
        torch.testing.assert_close(one.map, found.map[1:2], rtol=1e-4, atol=1e-4)
        real = torch.ones(4, *x.shape[2:], dtype=torch.bool)
        real[:, :2] = False
        shown = score({}, Batch(x, real=real), known).map
        assert shown is not None
        assert torch.equal(shown.isnan(), ~real)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("score", LEARNING, ids=named)
def test_a_lesion_stands_out(score: Score, dims: int) -> None:
    known = score.learn({}, healthy(scans(24, dims)))
    by = -0.35 if getattr(score, "side", "") == "low" else 0.35
    fresh = scans(8, dims, seed=1)
    usual, ill = score({}, Batch(fresh), known), score({}, Batch(painted(fresh, by)), known)
    assert (ill.values > usual.values).all()
    if ill.map is not None:
        inside = (slice(None), *[slice(4, 6)] * dims)
        assert (ill.map[inside].flatten(1).mean(1) > 2 * ill.map.flatten(1).mean(1)).all()


@pytest.mark.parametrize(
    ("score", "ill", "tolerance"),
    [
        (Hog(), True, 1e-4), (Hog(how="mahalanobis"), False, 0.1), (Voxelwise(), True, 0.05),
        (Normative(), False, 0.02), (Pca(components=30), True, 1e-3),
    ],
    ids=["knn", "mahalanobis", "voxelwise", "normative", "pca"],
)  # fmt: skip
def test_a_scan_that_was_learned_from_is_scored_as_if_it_was_not(score: Score, ill: bool, tolerance: float) -> None:
    x = scans(16)
    x[3] = painted(x[3]) if ill else x[3]
    left_out = score.learn({}, healthy(torch.cat([x[:3], x[4:]])))
    honest = float(score({}, Batch(x[3:4]), left_out).values)
    mine = float(score({}, Batch(x[3:4]), score.learn({}, healthy(x))).values)
    assert mine == pytest.approx(honest, rel=tolerance)


@pytest.mark.parametrize("score", LEARNING, ids=named)
def test_two_scans_are_too_few(score: Score) -> None:
    with pytest.raises(DataError, match="learns from 3 healthy scans or more; there are 2"):
        score.learn({}, healthy(scans(2)))


# -- against closed forms and other libraries ----------------------------------------------------------


def test_statistics_are_what_they_say() -> None:
    x = scans(2)
    found = dict(zip(Statistics().names, Statistics()({}, Batch(x), {}).values[1].tolist(), strict=True))
    image = x[1, 0].double().numpy()
    assert found["mean"] == pytest.approx(image.mean(), rel=1e-5)
    assert found["sd"] == pytest.approx(image.std(), rel=1e-5)
    assert found["skewness"] == pytest.approx(skew(image, axis=None), rel=1e-3, abs=1e-5)
    slopes = np.gradient(image)
    assert found["gradient"] == pytest.approx(np.log((slopes[0] ** 2 + slopes[1] ** 2).mean()), rel=1e-4)
    held = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(held, "PNG", optimize=True)
    assert found["png"] == held.tell()
    assert found["symmetry"] == pytest.approx(np.corrcoef(image.ravel(), image[::-1].ravel())[0, 1], rel=1e-4)


def test_bands_have_the_energy_of_their_scale() -> None:
    place = torch.arange(64, dtype=torch.float32)
    names = ("finest", "fine", "middle", "coarse")
    for period, own in ((3, "finest"), (32, "coarse")):
        wave = (0.5 + 0.3 * torch.sin(2 * torch.pi * place / period)).expand(1, 1, 64, 64)
        values = Statistics(which=names)({}, Batch(wave), {}).values[0]
        assert names[int(values.argmax())] == own


def test_padding_counts_for_nothing() -> None:
    x, real = scans(3), torch.ones(3, *SPACES[2], dtype=torch.bool)
    real[:, :5] = False
    other = x.clone()
    other[:, :, :5] = 0
    statistic = Statistics(which=("mean", "sd", "skewness"))
    seen = [statistic({}, Batch(one, real=real), {}).values for one in (x, other)]
    torch.testing.assert_close(*seen)


def test_a_constant_scan_has_numbers() -> None:
    assert Statistics()({}, Batch(torch.full((1, 1, 16, 20), 0.4)), {}).values.isfinite().all()


def test_smoothing_is_a_gaussian_average() -> None:
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 20, 20] = 1
    expected = gaussian_filter(x[0, 0].numpy(), 2.0, truncate=8)
    np.testing.assert_allclose(smoothed(x, 2.0)[0, 0], expected, atol=1e-6)
    assert smoothed(torch.full((1, 1, 5, 3, 4), 0.7), 9.0).allclose(torch.tensor(0.7))


def test_gradient_of_a_ramp() -> None:
    ramp = (2 * torch.arange(6.0)[:, None] + 3 * torch.arange(5.0)).expand(1, 1, 6, 5)
    assert squared_gradient(ramp).allclose(torch.tensor(13.0))
    assert not squared_gradient(torch.rand(2, 1, 1, 1)).any()


def test_the_tail_is_the_highest_half_per_cent_of_real_voxels() -> None:
    values = torch.arange(1000.0).reshape(1, 40, 25)
    assert tail_mean(values).tolist() == [997.0]
    real = values < 800
    assert tail_mean(values, real).tolist() == [797.5]


def test_hog_distances_agree_with_scikit_learn() -> None:
    train, fresh = scans(20), scans(4, seed=1)
    bank, rows = hog_rows(train), hog_rows(fresh)
    near = NearestNeighbors(n_neighbors=5).fit(bank).kneighbors(rows)[0].mean(1)
    found = Hog()({}, Batch(fresh), Hog().learn({}, healthy(train))).values[:, 0]
    np.testing.assert_allclose(found, near, rtol=1e-4)
    score = Hog(how="mahalanobis")
    mean, scale = bank.mean(0), np.maximum(bank.std(0, ddof=1), 1e-3 * bank.std(0, ddof=1).max())
    fitted = LedoitWolf(assume_centered=True).fit((bank - mean) / scale)
    squared = fitted.mahalanobis((rows - mean) / scale) / bank.shape[1]
    found = score({}, Batch(fresh), score.learn({}, healthy(train))).values[:, 0]
    np.testing.assert_allclose(found, np.sqrt(squared), rtol=1e-3)


def test_a_voxelwise_z_is_a_standard_normal_of_healthy_scans() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.1 * torch.randn(400, 1, 16, 16, generator=generator)
    score = Voxelwise(sigma=0, side="high")
    z = score({}, Batch(x[200:]), score.learn({}, healthy(x[:200]))).map
    assert z is not None
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.std()) == pytest.approx(1, abs=0.02)


def test_normative_distance_is_about_one_for_healthy_scans() -> None:
    score = Normative()
    found = score({}, Batch(scans(50, seed=1)), score.learn({}, healthy(scans(50)))).map
    assert found is not None
    assert 0.7 < float(found.square().mean()) < 1.1


def test_principal_components_leave_nothing_of_what_they_span() -> None:
    x = scans(10)
    score = Pca(components=9)
    known = score.learn({}, healthy(x))
    inside = (x[:5] + x[5:]) / 2
    assert float(score({}, Batch(inside), known).values.max()) < 1e-5
    assert float(score({}, Batch(scans(2, seed=1)), known).values.min()) > 1e-2


def test_scans_are_known_again_and_others_are_not() -> None:
    x = scans(6, 3)
    assert own_rows(x[[4, 1]], fingerprints(x)).tolist() == [4, 1]
    other = x.clone()
    other[:, :, 2, 2, 2] += 1 / 255
    assert own_rows(other, fingerprints(x)).tolist() == [-1] * 6


def test_dark_background_is_no_finding() -> None:
    x = scans(8)
    x[:, :, :4] = 0
    score = Intensity(bright=False)
    found = score({}, Batch(painted(x, -0.4)), score.learn({}, healthy(x))).map
    assert found is not None
    assert not found[:, :4].any()
    assert (found[:, 5, 5] > found[:, 10, 10]).all()


# -- patch features ------------------------------------------------------------------------------------


def encoding(dims: int = 2, kind: type[Model] = Autoencoder, **values: object) -> Model:
    """A model that was not trained: its encoder's random features tell textures apart all the same."""
    torch.manual_seed(0)
    shape = {2: (16, 20), 3: (8, 12, 8)}[dims]
    return kind(kind.Config(shape=shape, width=8, levels=2, **values)).eval()


@pytest.mark.parametrize("how", ["mahalanobis", "knn"])
@pytest.mark.parametrize("dims", [2, 3])
def test_patch_features_tell_where_a_lesion_is(how: str, dims: int) -> None:
    models = {"model": encoding(dims, VAE if dims == 2 else Autoencoder)}
    score = Patches(how=how, features=6, bank=256)
    score.check(models)
    inner = (..., *map(slice, models["model"].config.shape))
    x, fresh = scans(24, dims)[inner], scans(4, dims, seed=1)[inner]
    known = load(save(score.learn(models, healthy(x))))
    usual, ill = score(models, Batch(fresh), known), score(models, Batch(painted(fresh)), known)
    assert (ill.values > usual.values).all()
    assert ill.map is not None
    assert ill.map.shape == (4, *fresh.shape[2:])
    inside = (slice(None), *[slice(4, 6)] * dims)
    assert ill.map[inside].mean() > (1.3 if how == "mahalanobis" else 1) * ill.map.mean()
    one = score(models, Batch(fresh[2:3]), known)
    torch.testing.assert_close(one.values, usual.values[2:3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["mahalanobis", "knn"])
def test_patches_of_a_scan_that_was_learned_from_count_for_nothing(how: str) -> None:
    models = {"model": encoding()}
    score = Patches(how=how, features=4, bank=512)
    train = scans(20)
    known = score.learn(models, healthy(train))
    mine, fresh = (float(score(models, Batch(x), known).values.mean()) for x in (train, scans(20, seed=1)))
    assert mine == pytest.approx(fresh, rel=0.2)


def test_patches_of_different_levels_meet_on_one_grid() -> None:
    model = encoding()
    assert feature_maps(model, scans(2)).shape == (2, 8 + 16 + 32, 16, 20)
    assert not any(layer._forward_hooks for layer in model.encoder.body)


def test_patches_take_a_model_with_an_encoder() -> None:
    mixture = Mixture(Mixture.Config(shape=(16, 20)))
    with pytest.raises(CapabilityError, match="Models that do: autoencoder, vae, vqvae"):
        Patches().check({"model": mixture})


# -- density of states ---------------------------------------------------------------------------------

MEMBERS = (Statistics(which=("mean", "gradient", "symmetry")), Hog(), Voxelwise())
HOWS = ("mahalanobis", "kde", "knn", "tails")


@pytest.mark.parametrize("held", [4, 19])
@pytest.mark.parametrize("how", HOWS)
def test_states_say_one_thing(how: str, held: int) -> None:
    score = DensityOfStates(members=MEMBERS, how=how)
    assert score.asks == ()
    known = load(save(score.learn({}, healthy(scans(20), scans(held, seed=1)))))
    x = scans(12, seed=2)
    usual, ill = score({}, Batch(x), known), score({}, Batch(painted(x)), known)
    assert usual.values.shape == (12, 1)
    assert ill.values.isfinite().all()
    assert (ill.values > usual.values).float().mean() > 0.9
    assert ill.map is not None
    assert ill.map[:, 4:6, 4:6].mean() > 2 * ill.map.mean()
    one = score({}, Batch(x[3:4]), known)
    torch.testing.assert_close(one.values, usual.values[3:4], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", HOWS)
def test_held_scans_are_scored_as_if_the_states_were_the_others(how: str) -> None:
    score = DensityOfStates(members=MEMBERS, how=how)
    held = scans(19, seed=1)
    known = score.learn({}, healthy(scans(20), held))
    without = score.learn({}, healthy(scans(20), torch.cat([held[:7], held[8:]])))
    assert float(score({}, Batch(held[7:8]), known).values) == pytest.approx(
        float(score({}, Batch(held[7:8]), without).values), rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize("how", HOWS)
def test_low_statistics_count_as_much_as_high_ones_and_low_distances_for_nothing(how: str) -> None:
    score = DensityOfStates(members=MEMBERS, how=how)
    normal = norm.ppf((np.arange(99) + 0.5) / 99)
    healthy_rows = torch.from_numpy(np.stack([np.random.default_rng(k).permutation(normal) for k in range(5)], 1))
    rows = torch.zeros(5, 5, dtype=torch.double)
    rows[1, 0], rows[2, 0], rows[3, 3], rows[4, 3] = 5, -5, 5, -5
    usual, high, low, far, near = score.together(rows, healthy_rows, [3, 1, 1]).tolist()
    assert high > usual + 0.1
    assert low > usual + 0.1
    assert far > usual + 0.1
    assert near < usual + 0.1


@pytest.mark.parametrize("how", HOWS)
def test_extreme_values_go_on_counting(how: str) -> None:
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()
    far = torch.zeros(4, 5, dtype=torch.double)
    far[:, 4] = torch.tensor([5.0, 10.0, 100.0, 1000.0])
    found = DensityOfStates(members=MEMBERS, how=how).together(far, rows, [3, 1, 1])
    assert found.isfinite().all()
    assert (found.diff() > 0).all()


def test_a_member_counts_once_however_many_columns_it_has_and_twins_share() -> None:
    members = (Statistics(which=("mean", "gradient", "symmetry")), Hog(), Voxelwise(), Voxelwise(sigma=2))
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
    rows[:, 5] = rows[:, 4]
    unusual = torch.zeros(3, 6, dtype=torch.double)
    unusual[0, 3], unusual[1, 4:], unusual[2, :3] = 3, 3, 3
    one, twins, statistics = DensityOfStates(members=members).together(unusual, rows, [3, 1, 1, 1]).tolist()
    assert twins == pytest.approx(one, rel=0.15)
    assert statistics > 0.8 * one


def test_spreads_of_a_lopsided_column() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 1, generator=generator).double()
    lopsided = torch.where(normal > 0, 3 * normal, normal)
    z = Spreads.of(lopsided)(lopsided)
    torch.testing.assert_close(z, normal, rtol=0.06, atol=0.06)
    assert Spreads.of(torch.full((5, 1), 2.0).double())(torch.tensor([[2.0]]).double()).tolist() == [[0.0]]


def test_states_are_plain_values() -> None:
    score = DensityOfStates(members=(*MEMBERS, DensityOfStates(members=MEMBERS, how="knn")))
    assert DensityOfStates.model_validate_json(score.model_dump_json()) == score


def test_states_refuse_what_a_member_refuses() -> None:
    with pytest.raises(CapabilityError, match="Models that do"):
        DensityOfStates(members=(Hog(), Patches())).check({"model": Mixture(Mixture.Config(shape=(16, 20)))})


def test_states_without_maps_have_none() -> None:
    members = (Statistics(), Hog())
    score = DensityOfStates(members=members)
    known = score.learn({}, healthy(scans(10), scans(10, seed=1)))
    assert score({}, Batch(scans(2, seed=2)), known).map is None
    flat = DensityOfStates(members=MEMBERS, maps=False)
    assert flat({}, Batch(scans(2, seed=2)), flat.learn({}, healthy(scans(10)))).map is None
