"""What variations of the VAE promise: priors that are densities, discrepancies, warm-up, collapse that shows."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Independent, MultivariateNormal, Normal

from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch
from medgen.models import build, config_of
from medgen.models.vae import VAE
from medgen.prob.divergences import activity, mmd
from medgen.prob.learned import CodeMixture, CodeSpline, pseudo_inputs


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scans(n: int, space: tuple[int, ...] = (8, 8), seed: int = 0) -> torch.Tensor:
    """Scans on [0, 1] that differ along three patterns, with a little noise."""
    place = torch.arange(math.prod(space)).reshape(space).float()
    patterns = torch.stack([torch.sin(place / (1.5 + k)) for k in range(3)])
    weights = noise(n, 3, seed=seed) * torch.tensor([0.15, 0.1, 0.05])
    x = 0.5 + torch.einsum("nk,k...->n...", weights, patterns) + 0.01 * noise(n, *space, seed=seed + 1)
    return x[:, None].clamp(0, 1)


def vae(**changes: object) -> VAE:
    torch.manual_seed(0)
    model = build(config_of({"kind": "vae", "shape": (8, 8), "width": 8, "levels": 1, "latent": 2} | changes))
    assert isinstance(model, VAE)
    return model


def trained(model: VAE, batch: Batch, steps: int, rate: float = 3e-3, only: tuple[str, ...] = ()) -> VAE:
    torch.manual_seed(0)
    chosen = [p for name, p in model.named_parameters() if not only or name.startswith(only)]
    optimizer = torch.optim.Adam(chosen, lr=rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).total.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    return model.eval()


# -- priors ----------------------------------------------------------------------------------------


def square(reach: float = 8.0, steps: int = 161) -> tuple[torch.Tensor, float]:
    """Points that fill a square about 0, and the area of each."""
    line = torch.linspace(-reach, reach, steps)
    return torch.cartesian_prod(line, line), float((line[1] - line[0]) ** 2)


PRIORS = ({"kind": "vamp", "components": 5}, {"kind": "mixture", "components": 5}, {"steps": 2, "width": 8})


@pytest.mark.parametrize("prior", PRIORS, ids=["vamp", "mixture", "flow"])
@pytest.mark.parametrize("told", [None, 0, 2], ids=["nothing", "first", "last"])
@torch.no_grad()
def test_learned_priors_are_densities_whatever_is_known(prior, told):
    model = vae(prior=prior, classes=("calm", "stormy", "windy"))
    model.initialise(Batch(scans(24), torch.arange(24) % 3))
    model.to_code.bias[2:] = -0.5  # posteriors wide enough for a lattice of points to see
    for parameter in model.prior.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    points, area = square()
    cond = None if told is None else torch.full((len(points),), told)
    # What codes cost is log q - log p: with a posterior of density 1, -log p.
    flat = Independent(Normal(torch.zeros(len(points), 2, 1, 1), torch.ones(len(points), 2, 1, 1)), 3)
    z = points.reshape(-1, 2, 1, 1)
    log_p = flat.log_prob(z) - model.rate(flat, z, cond)
    assert float(log_p.exp().sum() * area) == pytest.approx(1, abs=5e-3)


def test_a_vamp_prior_is_the_mean_of_the_posteriors_of_its_pseudo_inputs():
    model = vae(prior={"kind": "vamp", "components": 6})
    model.initialise(Batch(scans(24)))
    z = noise(10, 2, 1, 1)
    with torch.no_grad():
        each = [model.encode(model.pseudo[k : k + 1]) for k in range(6)]
        expected = torch.stack([q.log_prob(z) for q in each]).logsumexp(0) - math.log(6)
        found = model.prior.log_prob(z.flatten(1), None, model._pseudo_posteriors())
    assert torch.allclose(found, expected, atol=1e-4)


def test_pseudo_inputs_begin_as_nobodys_scan():
    x = scans(32)
    began = pseudo_inputs(x, 50)
    nearest = torch.cdist(began.flatten(1), x.flatten(1)).min(1).values
    between = torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(torch.inf).min(1).values
    assert float(nearest.min()) > 0.2 * float(between.median())
    assert torch.allclose(began.mean((0, 1)), x.mean((0, 1)), atol=0.1)


@pytest.mark.parametrize("kind", ["mixture", "spline"])
@torch.no_grad()
def test_draws_have_the_density_that_is_stated(kind):
    torch.manual_seed(0)
    prior = CodeMixture(2, 4) if kind == "mixture" else CodeSpline(2, steps=2, width=8)
    for parameter in prior.parameters():
        parameter += 0.5 * torch.randn_like(parameter)
    n = 40_000
    drawn = prior.draw(torch.rand(n), torch.randn(n, 2)) if kind == "mixture" else prior.draw(torch.randn(n, 2))
    points, area = square()
    density = prior.log_prob(points).exp() * area
    for below in ((-0.5, 0.3), (0.4, -0.2), (0.0, 1.5)):
        inside = (points < torch.tensor(below)).all(1)
        stated, seen = float(density[inside].sum()), float((drawn < torch.tensor(below)).all(1).float().mean())
        assert seen == pytest.approx(stated, abs=0.02)


def test_a_mixture_learns_two_clumps_of_codes_that_one_gaussian_cannot_have():
    codes = torch.cat([noise(200, 2) * 0.3 + 2, noise(200, 2, seed=1) * 0.3 - 2])
    prior = CodeMixture(2, 8)
    prior.start(codes)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (-prior.log_prob(codes).mean()).backward()
        optimizer.step()
    one = MultivariateNormal(codes.mean(0), codes.T.cov()).log_prob(codes).mean()
    assert float(prior.log_prob(codes).detach().mean()) > float(one) + 0.3


def test_a_mixtures_weights_follow_the_class():
    prior = CodeMixture(1, 2, conditions=2)
    with torch.no_grad():
        prior.means.copy_(torch.tensor([[-5.0], [5.0]]))
        prior.told.copy_(torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))
        drawn = prior.draw(torch.rand(200), noise(200, 1), torch.arange(200) % 2)
        told = torch.eye(2)[torch.arange(200) % 2]
        assert torch.equal(prior.log_weights(torch.arange(200) % 2, 200), prior.log_weights(told, 200))
    assert bool((drawn[::2] < 0).all())
    assert bool((drawn[1::2] > 0).all())


def test_a_prior_without_a_kind_is_a_flow_and_one_of_no_known_kind_is_refused():
    assert VAE.Config(shape=(8, 8), prior={"steps": 2, "width": 8}).prior.kind == "flow"
    with pytest.raises(ValidationError, match="vamp"):
        VAE.Config(shape=(8, 8), prior={"kind": "crystal"})
    with pytest.raises(ValidationError, match="free_bits"):
        VAE.Config(shape=(8, 8), prior={"kind": "vamp"}, free_bits=0.1)


# -- the discrepancy, and weights that rise -----------------------------------------------------------


def test_the_discrepancy_is_zero_of_equal_samples_and_grows_with_a_shift():
    a, b = noise(200, 3), noise(200, 3, seed=1)
    assert float(mmd(a, a)) == pytest.approx(0, abs=1e-6)
    shifts = [float(mmd(a, b + shift)) for shift in (0.0, 0.5, 1.0, 3.0)]
    assert shifts == sorted(shifts)
    assert 0 < shifts[0] < 0.02
    assert shifts[1] > 3 * shifts[0]
    assert float(mmd(a, b + 100)) <= 2
    # A brute-force sum over all pairs.
    kernel = [[math.exp(-float((u - v).square().sum()) / 6) for v in b[:4]] for u in a[:4]]
    own = [
        sum(math.exp(-float((u - v).square().sum()) / 6) for u in c[:4] for v in c[:4]) / 16 for c in (a, b)
    ]  # fmt: skip
    assert float(mmd(a[:4], b[:4])) == pytest.approx(sum(own) - 2 * sum(map(sum, kernel)) / 16, abs=1e-5)


def test_the_discrepancy_is_one_number_of_the_batch_and_falls_when_trained():
    model = vae(mmd=1e5, beta=0.0)
    with torch.no_grad():
        model.linear_in.weight.mul_(0.01)
        model.to_code.bias[2:] = -4.0  # codes that all say the same
    batch = Batch(scans(32))
    torch.manual_seed(0)
    loss = model(batch)
    assert len(set(loss.terms["mmd"].tolist())) == 1
    assert torch.allclose(loss.total, loss.terms["distortion"] + 1e5 * loss.terms["mmd"])
    torch.manual_seed(0)
    after = trained(model, batch, 40, only=("linear_in", "to_code"))(batch).terms["mmd"][0].detach()
    assert float(after) < 0.5 * float(loss.terms["mmd"][0].detach())


def test_the_rate_s_weight_rises_with_progress_while_training_only():
    model = vae(warmup=0.5, beta=2.0).train()
    batch = Batch(scans(4))
    for progress, weight in ((0.0, 0.0), (0.25, 1.0), (0.5, 2.0), (1.0, 2.0)):
        model.progress = progress
        loss = model(batch)
        assert torch.allclose(loss.total, loss.terms["distortion"] + weight * loss.terms["rate"])
    model.progress = 0.25
    loss = model.eval()(batch)
    assert torch.allclose(loss.total, loss.terms["distortion"] + 2 * loss.terms["rate"])


# -- collapse ----------------------------------------------------------------------------------------


def test_activity_is_the_variance_of_posterior_means():
    codes = torch.stack([torch.tensor([1.0, -1.0] * 8), torch.zeros(16)], 1)
    assert torch.allclose(activity(codes), torch.tensor([16 / 15, 0.0]))
    assert torch.equal(activity(codes[:1]), torch.zeros(2))
    assert torch.allclose(activity(codes[..., None, None].expand(16, 2, 3, 4)), activity(codes))


def test_a_collapsed_posterior_shows_and_a_sound_one_does_too():
    batch = Batch(scans(32))
    model = vae(latent=3, depth=0)
    model.initialise(batch)
    assert trained(model, batch, 10).health([batch]) == {"active_units": 3.0, "units": 3.0}
    # A decoder that ignores codes: what is said of a scan costs and earns nothing, and is soon left unsaid.
    with torch.no_grad():
        for part in (model.linear_out, model.from_code):
            part.weight.zero_()
    encoder = ("linear_in", "to_code")
    assert trained(model, batch, 80, rate=0.1, only=encoder).health([batch]) == {"active_units": 0.0, "units": 3.0}


# -- conditions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [None, *PRIORS], ids=["normal", "vamp", "mixture", "flow"])
@pytest.mark.parametrize("code", ["vector", "map"])
def test_age_and_class_are_told_to_encoder_decoder_and_prior(prior, code):
    age = Covariate(name="age", mean=50, sd=10)
    model = vae(prior=prior, code=code, classes=("calm", "stormy"), covariates=(age,))
    index, years = torch.arange(40) % 2, torch.linspace(-2, 2, 40)
    cond = torch.cat([torch.eye(2)[index], years[:, None]], 1)
    x = (scans(40) + 0.1 * years.reshape(-1, 1, 1, 1) + 0.1 * index.reshape(-1, 1, 1, 1)).clamp(0, 1)
    model.initialise(Batch(x, cond))
    trained(model, Batch(x, cond), 5)
    model.finalise([Batch(x, cond)])
    drawn = model.sample(6, seed=0, cond=cond[:6])
    assert torch.equal(model.sample(2, seed=0, cond=cond[:2]), drawn[:2])
    assert not torch.equal(model.sample(2, seed=0, cond=cond[[1, 0]]), drawn[:2])
    chances = model.class_log_prob(x[:4], cond[:4])
    assert torch.allclose(chances.logsumexp(1), torch.zeros(4), atol=1e-4)
    assert not torch.equal(model.elbo(x[:4], cond[:4]), model.elbo(x[:4], cond[36:]))


# -- the bound against the truth ----------------------------------------------------------------------------


def linear_bound(model: VAE, x: torch.Tensor) -> torch.Tensor:
    """The bound of a VAE without networks, in closed form: E_q log N(x; m + Wz, s^2) - KL(q || N(0, 1))."""
    q = model.encode(x)
    mean, spread = q.mean.flatten(1), q.variance.flatten(1)
    variance = (2 * model.log_scale).exp()
    noise_of = Normal(model.decode(q.mean).mean, variance.sqrt().reshape(1, 1, 1, 1))
    lost = (spread @ model.linear_out.weight.square().sum(0)) / (2 * variance)
    kl = 0.5 * (mean.square() + spread - 1 - spread.log()).sum(1)
    return noise_of.log_prob(x).flatten(1).sum(1) - lost - kl


def test_a_trained_linear_vaes_bound_is_its_exact_log_density_within_a_thousandth_of_a_nat():
    """Probabilistic PCA has this evidence: N(m, W W' + s^2); Lucas et al. 2019, the bound reaches it."""
    mixing = noise(3, 16, seed=5).double()
    x = (0.3 * noise(200, 3).double() @ mixing + 0.1 * noise(200, 16, seed=3).double()).reshape(200, 1, 4, 4)
    model = vae(shape=(4, 4), latent=3, width=1, levels=0, depth=0).double()
    model.initialise(Batch(x))
    learned = [*model.linear_in.parameters(), *model.linear_out.parameters(), model.template, model.slow_log_scale]
    learned += [model.to_code.bias]
    with torch.no_grad():
        for parameter in learned:  # away from the start, so that training has something to do
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    began = float(linear_bound(model, x).detach().mean())
    optimizer = torch.optim.LBFGS(learned, lr=1.0, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -linear_bound(model, x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        weight, variance = model.linear_out.weight, (2 * model.log_scale).exp()
        offset = model.template.flatten() + model.linear_out.bias
        exact = MultivariateNormal(offset, weight @ weight.T + variance * torch.eye(16))
        gap = exact.log_prob(x.flatten(1)) - linear_bound(model, x)
        # The model's own stochastic bound has this mean.
        torch.manual_seed(0)
        drawn = -model(Batch(x.repeat_interleave(100, 0))).total.reshape(200, 100)
        expected, error = linear_bound(model, x).mean(), drawn.std(1).mean() / 20000**0.5
    assert float(gap.min()) > -1e-9
    assert float(gap.max()) < 1e-3
    assert float(exact.log_prob(x.flatten(1)).mean()) > began + 1
    assert float(drawn.mean()) == pytest.approx(float(expected), abs=4 * float(error))
