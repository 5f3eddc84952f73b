"""What the hierarchical VAE promises: bounds that bound, rates that are divergences, levels that know their part."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch
from medgen.errors import ConfigError
from medgen.models import build, config_of
from medgen.models.hvae import HVAE


def scans(n: int, space: tuple[int, ...] = (8, 8), seed: int = 0) -> torch.Tensor:
    """Grey values on [0, 1] that differ coarsely and finely."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 1, *(size // 4 for size in space), generator=generator)
    fine = torch.randn(n, 1, *space, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=space, mode="nearest")
    return ((0.5 + 0.15 * smooth + 0.03 * fine).clamp(0, 1) * 255).round() / 255


def hvae(*, shaken: bool = True, **changes: object) -> HVAE:
    """A model started on scans, with every parameter moved off its starting point."""
    torch.manual_seed(0)
    values = {"kind": "hvae", "shape": (8, 8), "width": 8, "levels": 2, "fold": 2, "latent": 2} | changes
    model = build(config_of(values))
    assert isinstance(model, HVAE)
    x = scans(32, model.config.shape).expand(-1, model.config.channels, *model.config.shape)
    classes = len(model.config.classes)
    model.initialise(Batch(x, torch.arange(32) % classes if classes and not model.config.covariates else None))
    if shaken:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


# -- the bound ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_rates_are_divergences_between_what_is_drawn_before_and_after_a_scan_is_seen():
    """In units of the prior KL(q || N(0, 1)); in the codes' own units the same, and so does Monte Carlo say."""
    model, x = hvae(), scans(2)
    path = model._noisy(x, None, [False] * len(model.rungs))
    for posterior, rate in zip(path.posteriors, model._rates(path.posteriors), strict=True):
        base = posterior.base_dist
        mean, scale = torch.randn_like(base.loc), torch.rand_like(base.loc) + 0.5
        after = Normal(mean + scale * base.loc, scale * base.scale)
        assert torch.allclose(rate, kl_divergence(after, Normal(mean, scale)), atol=1e-4)
        assert bool((rate >= -1e-6).all())
        u = base.sample(torch.Size((4000,)))
        estimate = base.log_prob(u) - Normal(0.0, 1.0).log_prob(u)
        assert torch.allclose(estimate.mean(0), rate, atol=float(6 * estimate.std(0).max() / 4000**0.5))


@torch.no_grad()
def test_the_bound_lies_below_what_importance_weighting_says_and_many_draws_lie_above_few():
    """Burda et al. 2016: log of the mean of k weights is a bound, tighter with k."""
    model, x = hvae(), scans(3)
    torch.manual_seed(0)
    many = x.repeat(400, 1, 1, 1)
    path = model._path(lambda _, q: q.sample(), len(many), None, many)
    prior = sum(
        Normal(0.0, 1.0).log_prob(u).flatten(1).sum(1) - q.log_prob(u)
        for u, q in zip(path.codes, path.posteriors, strict=True)
    )
    log_w = (path.likelihood.log_prob(many) + prior).reshape(400, 3)
    bounds = [(log_w.reshape(k, -1, 3).logsumexp(0) - math.log(k)).mean(0) for k in (1, 20, 400)]
    assert bool((bounds[0] < bounds[1]).all())
    assert bool((bounds[1] < bounds[2]).all())
    # The closed-form rates leave less to chance, and agree.
    drawn = -model(Batch(many)).total.reshape(400, 3)
    error = (log_w.std(0) + drawn.std(0)) / 20 * 5
    assert bool(((drawn.mean(0) - bounds[0]).abs() < error).all())
    assert bool((model.elbo(x) < bounds[2] + 5 * drawn.std(0)).all())


@torch.no_grad()
def test_bounds_of_scans_that_differ_in_one_grey_value_sum_to_at_most_its_probability():
    model = hvae(shape=(4, 4), levels=1, shaken=False)
    x = scans(1, (4, 4)).repeat(256, 1, 1, 1)
    x[:, 0, 0, 0] = torch.arange(256) / 255
    assert float(model.elbo(x).exp().sum()) <= 1


@torch.no_grad()
def test_the_map_and_the_levels_sum_to_the_bound():
    model, x = hvae(levels=2, steps=2, whole=3, channels=2), scans(3).expand(-1, 2, 8, 8)
    bound = model.elbo(x)
    assert model.log_prob_map(x).shape == (3, 1, 8, 8)
    assert torch.allclose(model.log_prob_map(x).flatten(1).sum(1), bound, rtol=1e-5, atol=1e-2)
    assert torch.allclose(model.elbo_from_level(x, 0), bound, rtol=1e-5, atol=1e-2)
    assert set(model(Batch(x)).terms) == {"distortion", *(f"rate of level {n}" for n in range(3))}


@torch.no_grad()
def test_a_level_that_may_not_look_at_the_scan_knows_less_of_it():
    """Havtorn et al. 2021: the fewer levels see the scan, the less likely it is, and a strange one least of all."""
    model, x = hvae(levels=2, whole=3, shaken=False), scans(16)
    bounds = torch.stack([model.elbo_from_level(x, level) for level in range(3)])
    assert bool((bounds.diff(dim=0).mean(1) < 0).all())
    for level in (-1, 3):
        with pytest.raises(ConfigError, match="levels 0"):
            model.elbo_from_level(x, level)


# -- how it starts and trains -----------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["discretised-logistic", "gaussian", "laplace", "bernoulli"])
@pytest.mark.parametrize("space", [(8, 8), (4, 8, 8)])
@torch.no_grad()
def test_it_starts_as_principal_components_of_what_is_left_on_every_level(likelihood, space):
    model = hvae(shape=space, likelihood=likelihood, shaken=False)
    x = scans(32, space)
    error = (model.reconstruct(x) - x).square().mean()
    assert float(error) < 0.5 * float((x - x.mean(0)).square().mean())
    # One level's start: Tipping & Bishop's posterior mean of blocks.
    one = hvae(shape=(8, 8), levels=1, fold=4, latent=3, shaken=False, likelihood="gaussian")
    y = scans(32)
    blocks = (y - y.mean(0)).reshape(32, 2, 4, 2, 4).transpose(2, 3).reshape(-1, 16).double()
    values, vectors = torch.linalg.eigh(blocks.T @ blocks / (len(blocks) - 1))
    top, left = values.flip(0)[:3], values.flip(0)[3:].mean()
    shrink = vectors.flip(1)[:, :3] * ((top - left) / top).clamp(min=0)
    expected = (blocks @ shrink @ vectors.flip(1)[:, :3].T).reshape(32, 2, 2, 4, 4).transpose(2, 3).reshape(32, 1, 8, 8)
    assert torch.allclose((one.reconstruct(y) - y.mean(0)).double(), expected, atol=2e-2)


@torch.no_grad()
def test_free_bits_are_a_floor_under_every_level_and_warm_up_follows_progress():
    x = scans(4)
    plain, floored = hvae(), hvae(free_bits=1000.0)
    torch.manual_seed(0)
    expected = plain(Batch(x))
    torch.manual_seed(0)
    found = floored(Batch(x))
    assert torch.allclose(found.total, found.terms["distortion"] + 2 * 1000.0)
    rates = sum(term for name, term in expected.terms.items() if name != "distortion")
    assert torch.allclose(expected.total, expected.terms["distortion"] + rates, atol=1e-3)
    assert torch.equal(plain.elbo(x), floored.elbo(x))
    model = hvae(warmup=0.5, beta=2.0).train()
    for progress, weight in ((0.0, 0.0), (0.25, 1.0), (1.0, 2.0)):
        model.progress = progress
        loss = model(Batch(x))
        rates = sum(term for name, term in loss.terms.items() if name != "distortion")
        assert torch.allclose(loss.total, loss.terms["distortion"] + weight * rates, rtol=1e-4)


def test_training_tightens_the_bound_and_lower_levels_learn_to_expect_details():
    model, x = hvae(shaken=False, depth=1), scans(32)
    before = float(model.elbo(x).mean())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(12):
        optimizer.zero_grad()
        (model(Batch(x)).total.mean() / 64).backward()
        optimizer.step()
    assert float(model.elbo(x).mean()) > before + 2


# -- codes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_codes_are_standard_normal_before_a_scan_is_seen_and_decode_to_what_was_read():
    model, x = hvae(steps=2, whole=3), scans(3)
    posterior = model.encode(x)
    assert posterior.event_shape == (3 + 2 * 2 * 4 + 2 * 2 * 16,)
    assert torch.equal(model.decode(posterior.mean).mean, model.reconstruct(x))
    zeros = torch.zeros(1, posterior.event_shape[0])
    calm = hvae(steps=2, whole=3, temperature=1e-6).sample(1, seed=0)
    assert torch.allclose(calm, model.decode(zeros).mean, atol=1e-4)


@torch.no_grad()
def test_colder_samples_are_more_alike():
    spread = [float(hvae(temperature=t).sample(16, seed=0).std(0).mean()) for t in (0.2, 1.0)]
    assert spread[0] < 0.5 * spread[1]


@torch.no_grad()
def test_the_healthy_twin_keeps_what_the_top_says_and_drops_the_rest():
    model, x = hvae(shaken=False), scans(4)
    ill = x.clone()
    ill[:, :, 2, 5] += 0.4
    shown = (model.reconstruct(ill) - model.reconstruct(x))[:, :, 2, 5].mean()
    left = (model.restore(ill, strength=1.0) - model.restore(x, strength=1.0))[:, :, 2, 5].mean()
    assert float(left) < 0.6 * float(shown)
    assert torch.equal(model.restore(x, strength=0.0), model.reconstruct(x))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        model.restore(x, strength=2.0)


@torch.no_grad()
def test_a_level_that_says_nothing_shows():
    model, x = hvae(steps=2), scans(32)
    found = model.health([Batch(x[:16]), Batch(x[16:])])
    assert found["units"] == 8
    assert found["active_units"] == found["level 0: active_units"] + found["level 1: active_units"] > 4
    for rung in model.rungs[2:]:
        for part in (rung.gain, rung.to_code):
            part.weight.zero_()
    found = model.health([Batch(x)])
    assert found["level 0: active_units"] == 0
    assert found["level 1: active_units"] > 0


@torch.no_grad()
def test_class_and_covariates_reach_samples_codes_and_bounds():
    age = Covariate(name="age", mean=50, sd=10)
    model, x = hvae(classes=("calm", "stormy"), covariates=(age,)), scans(4)
    old, young = (torch.tensor([[1.0, 0.0, years]]).expand(4, -1) for years in (2.0, -2.0))
    assert not torch.equal(model.sample(4, seed=0, cond=old), model.sample(4, seed=0, cond=young))
    assert not torch.equal(model.elbo(x, old), model.elbo(x, young))
    assert not torch.equal(model.encode(x, old).mean, model.encode(x, young).mean)
    assert torch.allclose(model.class_log_prob(x, old).logsumexp(1), torch.zeros(4), atol=1e-4)


def test_posteriors_do_not_see_scans_where_none_is_given():
    model = hvae()
    seen: list[Independent | None] = []

    def draw(number: int, posterior: Independent | None) -> torch.Tensor:
        seen.append(posterior)
        return torch.zeros(2, *model._shapes()[number])

    model._path(draw, 2, None)
    assert seen == [None] * len(model.rungs)


@torch.no_grad()
def test_a_scan_like_no_other_does_not_set_the_ladder_off():
    """Every rung hears the one above; what is far off must cost much, not everything."""
    model = hvae(steps=4, whole=3, shaken=False)
    for rung in model.rungs:  # a ladder that overdoes everything
        for part in (rung.prior, rung.to_code, rung.gain, rung.tell):
            part.weight.mul_(3).add_(0.3 * torch.randn_like(part.weight))
    strange = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8), (torch.rand(1, 8, 8) > 0.5).float()])
    assert bool(torch.isfinite(model.elbo(strange)).all())
    posterior = model.encode(strange)
    assert float(posterior.mean.abs().max()) <= 8
