"""Scores that ask a model: what they say where the truth is known, and that each scan is scored by itself."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.metrics.image import local_mean, ssim_map
from medgen.models.autoencoder import Autoencoder
from medgen.models.base import Model
from medgen.models.flow import Flow
from medgen.models.gan import GAN
from medgen.models.hvae import HVAE
from medgen.models.mixture import Mixture
from medgen.models.pyramidflow import PyramidFlow
from medgen.models.vae import VAE
from medgen.scores.base import Healthy
from medgen.scores.density import Background, Complexity, Surprise, Typicality
from medgen.scores.latent import LatentDistance, gaussians, mahalanobis
from medgen.scores.parts import Gradient, Scales, Whiteness
from medgen.scores.reconstruction import Residual
from medgen.scores.regret import Regret
from medgen.scores.statistics import statistic

SPACE = {2: (16, 16), 3: (8, 8, 8)}


def scans(count: int, *, dims: int = 2, seed: int = 0, channels: int = 1) -> Batch:
    """Smooth scans on [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, channels, *SPACE[dims], generator=generator)
    return Batch(local_mean(noise, 3).clamp(0, 1))


def shaken(model: Model, seed: int = 0) -> Model:
    """The model with weights that are nobody's start, so that nothing is zero by chance, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def made(kind: type[Model], *, dims: int = 2, **values: object) -> Model:
    """A small model that has seen some scans."""
    torch.manual_seed(0)
    sizes = {} if kind is Mixture else {"width": 8, "levels": 1}
    model = kind(kind.Config(shape=SPACE[dims], **(sizes | values)))
    model.initialise(scans(16, dims=dims, seed=9))
    model.finalise([scans(16, dims=dims, seed=9)])
    return shaken(model) if sizes else model.eval()


def healthy(count: int = 12, dims: int = 2) -> Healthy:
    """Two batches to learn from."""

    def batches():
        yield scans(count, dims=dims, seed=3)
        yield scans(count // 2, dims=dims, seed=4)

    return Healthy(batches, batches)


FLOW = {"steps": 2}
CASES = [
    (Residual(), VAE, {}, 2),
    (Residual(twin="reconstruction", measure="l2", reduce="tail"), VAE, {}, 3),
    (Residual(measure="normalised"), Autoencoder, {"uncertainty": True}, 2),
    (Residual(sigma=1.5, strength=0.5), HVAE, {}, 2),
    (Surprise(), Flow, FLOW, 2),
    (Surprise(), VAE, {}, 3),
    (Typicality(), HVAE, {}, 2),
    (Complexity(), PyramidFlow, FLOW, 3),
    (Complexity(), VAE, {}, 2),
    (LatentDistance(), VAE, {}, 2),
    (LatentDistance(how="knn", k=2), VAE, {"code": "map", "latent": 3}, 3),
    (LatentDistance(reduce="tail"), Autoencoder, {"code": "map", "latent": 3}, 2),
    (LatentDistance(), Flow, FLOW, 2),
    (Scales(), Flow, {"dequantisation": "variational", **FLOW}, 2),
    (Scales(), PyramidFlow, {"classes": ("a", "b"), **FLOW}, 3),
    (Scales(), VAE, {}, 3),
    (Scales(), HVAE, {"levels": 2}, 2),
    (Whiteness(), Flow, {"levels": 2, **FLOW}, 2),
    (Whiteness(keep=("kurtosis",)), PyramidFlow, {"classes": ("a", "b"), **FLOW}, 2),
    (Gradient(), PyramidFlow, FLOW, 2),
    (Gradient(), HVAE, {}, 2),
    (Gradient(), Flow, FLOW, 3),
    (Regret(steps=3), VAE, {"classes": ("a", "b")}, 2),
    (Regret(steps=3), HVAE, {}, 3),
    (Gradient(by="parameters"), Flow, FLOW, 2),
    (Gradient(by="parameters", depth=1), VAE, {"classes": ("a", "b")}, 2),
]


@pytest.mark.parametrize(("score", "kind", "values", "dims"), CASES, ids=lambda v: getattr(v, "do", None))
def test_a_scan_is_scored_by_itself(score, kind, values, dims):
    """Whatever the other scans and their number, twice the same; finite, of the shapes that are promised."""
    models = {"model": made(kind, dims=dims, **values)}
    score.check(models)
    known = score.learn(models, healthy(dims=dims))
    batch = scans(5, dims=dims)
    found, again = score(models, batch, known), score(models, batch, known)
    assert torch.equal(found.values, again.values)
    assert found.values.isfinite().all()
    assert not found.values.requires_grad
    assert found.values.shape[1] == len(score.columns(models))
    alone = [score(models, Batch(x[None]), known) for x in batch.x]
    torch.testing.assert_close(torch.cat([one.values for one in alone]), found.values, rtol=1e-4, atol=1e-4)
    if found.map is not None:
        assert found.map.shape == (5, *SPACE[dims])
        torch.testing.assert_close(torch.cat([one.map for one in alone]), found.map, rtol=1e-3, atol=1e-3)
    assert type(score).model_validate_json(score.model_dump_json()) == score


# -- residuals -------------------------------------------------------------------------------------------


def test_structural_similarity_is_scikit_images_inside():
    x, y = scans(1).x, scans(1, seed=1).x
    told = {"data_range": 1.0, "gaussian_weights": True, "use_sample_covariance": False, "full": True}
    judge = structural_similarity(x[0, 0].numpy(), y[0, 0].numpy(), sigma=1.5, **told)[1]
    found = ssim_map(x, y, sigma=1.5)[0, 0].numpy()
    np.testing.assert_allclose(found[5:-5, 5:-5], judge[5:-5, 5:-5], atol=2e-3)


def test_the_default_residual_of_images_is_one_minus_the_similarity_to_the_restoration():
    model, batch = made(VAE), scans(3)
    found = Residual()({"model": model}, batch, {})
    expected = 1 - ssim_map(batch.x, model.restore(batch.x).clamp(0, 1), window=7)[:, 0]
    torch.testing.assert_close(found.map, expected)
    torch.testing.assert_close(found.values[:, 0], expected.flatten(1).mean(1))


def test_the_default_residual_of_volumes_is_the_local_mean_of_the_difference():
    model, batch = made(VAE, dims=3), scans(2, dims=3)
    real = torch.ones(2, *SPACE[3], dtype=torch.bool)
    real[:, :2] = False
    found = Residual()({"model": model}, replace(batch, real=real), {})
    expected = local_mean((batch.x - model.restore(batch.x).clamp(0, 1)).abs(), 5)[:, 0]
    assert found.map.isnan().equal(~real)
    torch.testing.assert_close(found.map[real], expected[real])
    torch.testing.assert_close(found.values[:, 0], expected[:, 2:].flatten(1).mean(1))


def test_the_tail_finds_a_small_lesion_that_the_mean_hardly_sees():
    model, batch = made(VAE), scans(1)
    ill = batch.x.clone()
    ill[:, :, 6:9, 6:9] = 1.0
    tail, mean = (Residual(measure="l1", window=1, reduce=how) for how in ("tail", "mean"))
    rise = [s({"model": model}, Batch(ill), {}).values - s({"model": model}, batch, {}).values for s in (tail, mean)]
    assert rise[0] > 5 * rise[1] > 0


def test_the_normalised_residual_divides_by_the_predicted_variance():
    model, batch = made(Autoencoder, uncertainty=True), scans(2)
    found = Residual(measure="normalised", window=1, twin="reconstruction")({"model": model}, batch, {})
    away = (batch.x - model.reconstruct(batch.x).clamp(0, 1)) / model.uncertainty_map(batch.x)
    torch.testing.assert_close(found.map, away.square()[:, 0])


def test_residuals_refuse_models_without_a_twin_or_an_uncertainty():
    with pytest.raises(CapabilityError, match="restores"):
        Residual(twin="restoration").check({"model": made(Flow, **FLOW)})
    with pytest.raises(CapabilityError, match="uncertainty=true"):
        Residual(measure="normalised").check({"model": made(Autoencoder)})
    with pytest.raises(ValueError, match="uniform and odd"):
        Residual(window=4)


# -- surprise ----------------------------------------------------------------------------------------------


def test_surprise_is_the_density_and_counts_real_voxels_alone():
    model, batch = made(PyramidFlow, **FLOW), scans(3)
    found = Surprise()({"model": model}, batch, {})
    torch.testing.assert_close(found.values[:, 0], -model.log_prob(batch.x) / batch.x[0].numel())
    real = torch.ones(3, 16, 16, dtype=torch.bool)
    real[:, 12:] = False
    masked = Surprise()({"model": model}, replace(batch, real=real), {})
    expected = -model.log_prob_map(batch.x)[:, 0, :12].flatten(1).mean(1)
    torch.testing.assert_close(masked.values[:, 0], expected)
    assert masked.map.isnan().equal(~real)


def test_typicality_is_a_distance_in_healthy_spreads():
    models = {"model": made(Mixture)}
    known = Typicality().learn(models, healthy())
    seen = torch.cat([Surprise()(models, batch, {}).values[:, 0] for batch in healthy().held()]).double()
    batch = scans(4, seed=7)
    expected = (Surprise()(models, batch, {}).values[:, 0].double() - seen.mean()).abs() / seen.std(correction=0)
    torch.testing.assert_close(Typicality()(models, batch, known).values[:, 0].double(), expected, rtol=1e-4, atol=1e-4)


def test_complexity_takes_the_code_length_off():
    model, batch = made(Flow, **FLOW), scans(3)
    bits = -model.log_prob(batch.x) / batch.x[0].numel() / log(2)
    found = Complexity()({"model": model}, batch, {}).values[:, 0]
    torch.testing.assert_close(found, bits - 8 * statistic("png", batch.x) / batch.x[0].numel())


def test_a_background_like_the_model_leaves_nothing_and_a_better_model_is_less_surprised():
    model, same, other = made(Flow, **FLOW), made(Flow, **FLOW), shaken(made(Flow, **FLOW), seed=1)
    batch, score = scans(3), Background(against="rough")
    assert score({"model": model, "rough": same}, batch, {}).values.abs().max() == 0
    found = score({"model": model, "rough": other}, batch, {})
    expected = (other.log_prob(batch.x) - model.log_prob(batch.x)) / batch.x[0].numel()
    torch.testing.assert_close(found.values[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert score.asks == ("model", "rough")
    with pytest.raises(CapabilityError, match="'rough'"):
        score.check({"model": model})
    with pytest.raises(CapabilityError, match="same bits"):
        score.check({"model": model, "rough": made(VAE)})


def test_a_model_of_two_classes_is_asked_about_both():
    model, x = made(Flow, classes=("a", "b"), **FLOW), scans(4).x
    found = Surprise()({"model": model}, Batch(x, torch.zeros(4, dtype=torch.long)), {}).values[:, 0]
    each = [-model.log_prob(x, torch.full((4,), c)) / x[0].numel() for c in (0, 1)]
    torch.testing.assert_close(found, torch.minimum(*each))


# -- codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(60, 5), (12, 30)], ids=["many scans", "few scans"])
def test_the_distance_of_codes_is_scikit_learns(count, size):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator)
    new = torch.randn(7, size, generator=generator)
    judge = LedoitWolf().fit(rows.numpy())
    learnt = {name: tensor.float() for name, tensor in gaussians(rows[None]).items()}
    found = mahalanobis(new[:, None], learnt)[:, 0].square() * size
    np.testing.assert_allclose(found.numpy(), judge.mahalanobis(new.numpy()), rtol=1e-3)


def test_a_code_map_says_where():
    model = made(VAE, code="map", latent=3)
    batch = scans(1)
    ill = batch.x.clone()
    ill[:, :, 4:6, 8:10] = 1.0
    for score in (LatentDistance(), LatentDistance(how="knn")):
        known = score.learn({"model": model}, healthy(40))
        before, after = (score({"model": model}, Batch(x), known) for x in (batch.x, ill))
        rise = (after.map - before.map)[0]
        assert rise[4:6, 8:10].mean() == rise.max() > 0
        assert torch.equal(rise[4:6, 8:10], rise[4, 8].expand(2, 2))


def test_neighbours_are_scikit_learns():
    model, score = made(VAE), LatentDistance(how="knn", k=3)
    known = score.learn({"model": model}, healthy())
    with torch.no_grad():
        codes = torch.cat([model.encode(batch.x).mean.flatten(1) for batch in healthy().train()])
        new = model.encode(scans(5).x).mean.flatten(1)
    spread = codes.std(0, correction=0)
    judge = NearestNeighbors(n_neighbors=3).fit((codes / spread).numpy())
    expected = judge.kneighbors((new / spread).numpy())[0].mean(1) / codes.shape[1] ** 0.5
    np.testing.assert_allclose(score({"model": model}, scans(5), known).values[:, 0], expected, rtol=1e-4)


# -- regret --------------------------------------------------------------------------------------------------


def test_a_posterior_that_is_exact_has_nothing_to_regret():
    """Of a linear VAE the posterior is known: PCA's, with which it starts; a wrong encoder leaves a gap that closes."""
    torch.manual_seed(0)
    model = VAE(VAE.Config(shape=(16, 16), width=8, levels=1, latent=3))
    model.initialise(scans(64, seed=9))
    models, batch = {"model": model.eval()}, scans(3)
    score = Regret(steps=200, rate=0.05)
    exact = score(models, batch, {}).values * 256
    with torch.no_grad():
        model.to_code.bias[:3] += 2.0
        before = model.elbo(batch.x)
        wrong = score(models, batch, {}).values * 256
        model.to_code.bias[:3] -= 2.0
        gap = model.elbo(batch.x) - before
    assert (exact.abs() < 0.5).all()
    assert (wrong > 3).all()
    torch.testing.assert_close(wrong[:, 0], gap, rtol=0.3, atol=1.0)


def test_regret_refuses_what_has_no_posterior():
    with pytest.raises(CapabilityError, match="vae"):
        Regret().check({"model": made(Flow, dequantisation="variational", **FLOW)})


# -- parts ---------------------------------------------------------------------------------------------------

PARTED = [
    (Flow, {"levels": 2, **FLOW}),
    (Flow, {"dequantisation": "variational", **FLOW}),
    (PyramidFlow, {"levels": 2, **FLOW}),
    (VAE, {}),
    (HVAE, {"levels": 2, "steps": 2}),
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("kind", "values"), PARTED, ids=lambda v: getattr(v, "__name__", ""))
def test_parts_add_up_to_the_density(kind, values, dims):
    model, batch = made(kind, dims=dims, **values), scans(3, dims=dims)
    whole = model.log_prob if "scores_density" in model.abilities(model.config) else model.elbo
    found = Scales()({"model": model}, batch, {}).values.sum(1) * batch.x[0].numel()
    torch.testing.assert_close(found, whole(batch.x), rtol=1e-4, atol=1e-2)
    assert len(Scales().columns({"model": model})) > 1


def test_white_noise_is_found_white_and_other_noise_is_not():
    """Through the inverse of a flow, noise is a scan whose own noise it is."""
    model = made(Flow, bits=0, levels=2, **FLOW)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 256, generator=generator)
    with torch.no_grad():
        white, loud = (model.decode(scale * noise).mean for scale in (1.0, 1.5))
    models, names = {"model": model}, Whiteness().columns({"model": model})
    found = Whiteness()(models, Batch(white), {}).values
    # Statistics of 128 numbers a level and scan: over 200 scans their means are within 4 standard errors of 0.
    assert (found.mean(0).abs() < 0.05).all(), dict(zip(names, found.mean(0).tolist(), strict=True))
    louder = Whiteness()(models, Batch(loud), {}).values.mean(0)
    for name, value in zip(names, louder, strict=True):
        if name.endswith("variance"):
            assert abs(float(value) - 2 * log(1.5)) < 0.05


def test_noise_is_what_the_density_is_told_by():
    model, x = made(PyramidFlow, levels=2, **FLOW), scans(2).x
    with torch.no_grad():
        parts, noises = model.density_parts(x), model.noise_maps(x)
    assert sum(noise[0].numel() for noise in noises) == x[0].numel()
    for number, noise in enumerate(noises):
        normal = torch.distributions.Normal(0, 1).log_prob(noise).flatten(1).sum(1)
        cost = model._constant(number) * noise[0, 0].numel()
        torch.testing.assert_close(parts[f"level {number}: noise"], normal - cost, rtol=1e-4, atol=1e-3)


def test_the_gradient_is_the_densitys_slope():
    """By finite differences, of a continuous density whose gradient nothing rounds."""
    model = made(Flow, bits=0, **FLOW).double()
    x = scans(2).x.double()
    found = Gradient()({"model": model}, Batch(x), {})
    slopes = torch.zeros_like(x)
    for i in range(16):
        for j in range(16):
            step = torch.zeros_like(x)
            step[:, :, i, j] = 1e-5
            slopes[:, 0, i, j] = (model.log_prob(x + step) - model.log_prob(x - step)) / 2e-5
    expected = slopes.flatten(1).square().mean(1).log() / 2
    torch.testing.assert_close(found.values[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_parameters_are_those_of_the_loss():
    score, model, x = Gradient(by="parameters", depth=9), made(VAE), scans(2).x.double()
    names = score.columns({"model": model})
    model.double()
    found = score({"model": model}, Batch(x), {}).values[1]
    model.density_parts(x[1:])["likelihood"].sum().backward(retain_graph=True)
    model.density_parts(x[1:])["rate"].sum().backward()
    for name, value in zip(names, found, strict=True):
        slope = model.get_parameter(name).grad
        # Some have no effect at all, as biases before a normalisation: they are told as next to nothing.
        expected = slope.square().mean().clamp(min=1e-12).log() / 2
        assert abs(float(expected - value)) < 0.4 if expected < -13 else abs(float(expected - value)) < 1e-3, name


def test_scores_of_parts_refuse_densities_without_them():
    for score in (Scales(), Whiteness(), Gradient()):
        with pytest.raises(CapabilityError, match="pyramidflow"):
            score.check({"model": made(Mixture)})
    with pytest.raises(CapabilityError, match="'other'"):
        Scales(of="other").check({"model": made(VAE)})


def test_what_a_critic_sees_in_scan_and_twin_adds_to_the_residual():
    """Schlegl et al. 2019, equation 4: the mean squared error of voxels, and so many times that of features."""
    model = made(GAN, inference="posthoc", start="noise", latent=4)
    batch = scans(3)
    plain = Residual(measure="l2", window=1)({"model": model}, batch, {})
    both = Residual(measure="l2", window=1, features=2.0)({"model": model}, batch, {})
    twin = model.reconstruct(batch.x).clamp(0, 1)
    seen = (model.perceive(batch.x) - model.perceive(twin)).square().mean(1)
    assert torch.allclose(plain.values[:, 0], (batch.x - twin).square().flatten(1).mean(1), atol=1e-6)
    assert torch.allclose(both.values[:, 0], plain.values[:, 0] + 2 * seen, atol=1e-6)
    assert torch.equal(both.map, plain.map)
    with pytest.raises(CapabilityError, match="fanogan"):
        Residual(features=1.0).check({"model": made(VAE)})
