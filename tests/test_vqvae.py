"""Vector quantisation, and priors of code maps that are small enough to be counted out."""

from itertools import product

import pytest
import torch
from pydantic import ValidationError

from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch
from medgen.errors import DataError
from medgen.models.vqvae import VQVAE
from medgen.nets.codebook import Codebook, straight_through
from medgen.nets.codeprior import CodePrior, PixelPrior, SequencePrior, redrawn
from medgen.nets.transformer import CausalTransformer, Past
from medgen.training.ema import MovingAverage

PRIORS = pytest.mark.parametrize("kind", ["pixelcnn", "transformer"])


def blobs(n: int, *space: int, seed: int = 0) -> torch.Tensor:
    """Blurred noise on [0, 1]."""
    x = torch.rand(n, 1, *space, generator=torch.Generator().manual_seed(seed))
    pool = torch.nn.functional.avg_pool2d if len(space) == 2 else torch.nn.functional.avg_pool3d
    return ((pool(x, 3, 1, 1) - 0.5) * 2 + 0.5).clamp(0, 1)


def vqvae(kind: str = "pixelcnn", *, stirred: bool = True, **changes: object) -> VQVAE:
    """A small model, begun on blobs; `stirred`: every parameter has left its starting point."""
    torch.manual_seed(0)
    prior = {"kind": kind, "width": 8, "depth": 2} | ({"heads": 2} if kind == "transformer" else {})
    fields = {"shape": (8, 8), "width": 8, "levels": 1, "fold": 2, "latent": 4, "codes": 6, "prior": prior}
    model = VQVAE(VQVAE.Config.model_validate(fields | changes))
    model.initialise(Batch(blobs(8, *model.config.shape)))
    with torch.no_grad():
        for parameter in model.parameters() if stirred else ():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def prior_of(kind: str, codes: int = 3, positions: tuple[int, ...] = (2, 2), numbers: int = 0) -> CodePrior:
    """A prior far from equal chances."""
    torch.manual_seed(1)
    if kind == "pixelcnn":
        prior = PixelPrior(codes, positions, numbers=numbers, width=8, depth=2)
    else:
        prior = SequencePrior(codes, positions, numbers=numbers, width=8, depth=2, heads=2)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return prior.eval()


def all_maps(codes: int, positions: tuple[int, ...]) -> torch.Tensor:
    count = torch.zeros(positions).numel()
    return torch.tensor(list(product(range(codes), repeat=count))).reshape(-1, *positions)


def log_p(prior: CodePrior, codes: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return prior(codes, told).gather(1, codes[:, None]).flatten(1).sum(1)


# -- the codebook ------------------------------------------------------------------------------------


def test_every_vector_gets_its_nearest_code():
    torch.manual_seed(0)
    book, z = Codebook(7, 5), torch.randn(3, 5, 4, 6)
    rows = z.movedim(1, -1).reshape(-1, 5)
    expected = torch.cdist(rows.double(), book.vectors.double()).argmin(1).reshape(3, 4, 6)
    assert torch.equal(book(z), expected)
    assert torch.equal(book.look_up(expected).movedim(1, -1)[1, 2, 3], book.vectors[expected[1, 2, 3]])


def test_the_gradient_passes_as_if_nothing_were_rounded():
    book, z = Codebook(4, 3), torch.randn(2, 3, 5, 5, requires_grad=True)
    quantised = book.look_up(book(z))
    passed = straight_through(z, quantised)
    assert torch.allclose(passed, quantised)
    weight = torch.randn_like(z)
    (passed.square() * weight).sum().backward()
    assert z.grad is not None
    assert torch.allclose(z.grad, 2 * quantised * weight, atol=1e-6)


def test_a_step_moves_codes_as_the_paper_says():
    """van den Oord et al. 2017, equations 6 to 8."""
    torch.manual_seed(0)
    book = Codebook(3, 2, decay=0.9, revive=0.0)
    before, sums, counts = book.vectors.clone(), book.sums.clone(), book.counts.clone()
    z = torch.randn(4, 2, 3, 3)
    chosen = book(z)
    book.update(z, chosen)
    rows, index = z.movedim(1, -1).reshape(-1, 2), chosen.flatten()
    for k in range(3):
        near = rows[index == k]
        held = 0.9 * counts[k] + 0.1 * len(near)
        assert torch.allclose(book.counts[k], held)
        assert torch.allclose(book.vectors[k], (0.9 * sums[k] + 0.1 * near.sum(0)) / held, atol=1e-5)
    assert not torch.allclose(book.vectors, before)


def test_a_code_nobody_uses_stays_where_it_is_or_begins_anew_at_what_was_said():
    z = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for revive in (0.0, 0.05):
        book = Codebook(4, 2, decay=0.5, revive=revive)
        book.sums.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [100.0, 100.0]]))
        for _ in range(200):
            book.update(z, book(z))
        assert bool(torch.isfinite(book.vectors).all())
        if revive:
            assert book(z).unique().tolist() == [0, 1, 2, 3]
        else:
            assert torch.allclose(book.vectors[3], torch.tensor([100.0, 100.0]), rtol=1e-3)


def test_codes_of_averaged_weights_are_where_a_code_began_anew():
    """An average of vectors would lie between a dead code's old place and its new one."""
    book = Codebook(2, 1, revive=0.02)
    book.sums.copy_(torch.tensor([[0.0], [10.0]]))
    book.counts.copy_(torch.tensor([1.0, 0.01]))
    average = MovingAverage(book, half_life=100)
    z = torch.tensor([-1.0, 1.0]).repeat(8).reshape(1, 1, 4, 4)
    for step in range(20):
        book.update(z, book(z))
        average.update(book, images=1, seen=1000 + step)
    averaged = Codebook(2, 1)
    averaged.load_state_dict(average.weights)
    new, kept = float(book.vectors[1]), 0.5 ** (20 / 100)
    assert abs(new) < 1.5
    between = kept * 1000 + (1 - kept) * new
    assert abs(float(averaged.vectors[1]) - new) < 0.1 * abs(between - new)


def test_the_start_finds_clusters_and_survives_fewer_vectors_than_codes():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
    rows = centres.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    book = Codebook(4, 2)
    book.initialise(torch.cat([rows, torch.zeros(4000, 2)]))
    apart = torch.cdist(centres, book.vectors).min(1).values
    assert bool((apart < 0.2).all())
    for few in (rows[:1], rows[:3], torch.zeros(9, 2)):
        book.initialise(few)
        assert bool(torch.isfinite(book.vectors).all())


def test_only_the_autoencoders_training_moves_the_codebook():
    model, batch = vqvae(), Batch(blobs(4, 8, 8, seed=3))

    def moved() -> bool:
        before = {name: t.clone() for name, t in model.codebook.state_dict().items()}
        yet = lambda: any(not torch.equal(t, before[n]) for n, t in model.codebook.state_dict().items())  # noqa: E731
        for player in players:
            model(batch, player)
        model.validation_loss(batch)
        return yet()

    players = ["codes", "prior"]
    assert not moved()
    model.train()
    assert moved()
    players = ["prior"]
    assert not moved()


# -- the prior ---------------------------------------------------------------------------------------


@PRIORS
@pytest.mark.parametrize("positions", [(2, 2), (1, 2, 2)])
def test_probabilities_of_all_code_maps_sum_to_one(kind, positions):
    total = log_p(prior_of(kind, 3, positions), all_maps(3, positions)).double().logsumexp(0)
    assert float(total) == pytest.approx(0, abs=1e-5)


@PRIORS
@pytest.mark.parametrize("positions", [(3, 4), (2, 3, 2)])
def test_a_code_is_told_all_codes_before_it_and_none_after(kind, positions):
    prior = prior_of(kind, 5, positions)
    codes = torch.randint(5, (1, *positions), generator=torch.Generator().manual_seed(0))
    said = prior(codes).flatten(2)
    for n in range(codes.numel()):
        other = codes.flatten(1).clone()
        other[0, n] = (other[0, n] + 1) % 5
        changed = (prior(other.reshape(codes.shape)).flatten(2) - said).abs().amax((0, 1)) > 1e-6
        assert changed.tolist() == [place > n for place in range(codes.numel())]


@PRIORS
@pytest.mark.parametrize("positions", [(3, 4), (2, 3, 2)])
def test_step_by_step_is_the_same_as_all_at_once(kind, positions):
    prior = prior_of(kind, 5, positions, numbers=2)
    generator = torch.Generator().manual_seed(0)
    codes, told = torch.randint(5, (3, *positions), generator=generator), torch.randn(3, 2, generator=generator)
    with torch.no_grad():
        step = prior.step(3, told)
        for n in (0, 1, 2, 5, 6, 11):
            expected = prior(codes, told).flatten(2)[:, :, n]
            assert torch.allclose(step(codes.flatten(1), n), expected, atol=1e-5)


@PRIORS
def test_maps_are_drawn_as_often_as_they_are_probable(kind):
    prior, n = prior_of(kind, 3, (2, 2)), 20_000
    maps = all_maps(3, (2, 2))
    uniform = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(n, 2, 2, dtype=torch.long)
    drawn = redrawn(prior, zeros, zeros == 0, uniform)
    place = torch.tensor([27, 9, 3, 1])
    counts = torch.bincount((drawn.flatten(1) * place).sum(1), minlength=81).double()
    expected = n * log_p(prior, maps).double().exp()
    assert float(expected.max()) > 3 * n / 81  # far from equal chances
    # Pearson's statistic has mean 80 and standard deviation 12.6.
    assert float(((counts - expected).square() / expected).sum()) < 80 + 5 * 12.6


@PRIORS
def test_codes_that_are_not_free_stay(kind):
    prior, generator = prior_of(kind, 5, (3, 4)), torch.Generator().manual_seed(0)
    codes = torch.randint(5, (6, 3, 4), generator=generator)
    free, uniform = torch.rand(6, 3, 4, generator=generator) < 0.3, torch.rand(6, 3, 4, generator=generator)
    drawn = redrawn(prior, codes, free, uniform)
    assert torch.equal(drawn[~free], codes[~free])
    assert not torch.equal(drawn, codes)


def test_a_transformer_that_remembers_says_the_same():
    torch.manual_seed(0)
    body, x = CausalTransformer(8, 2, 2).eval(), torch.randn(2, 7, 8)
    past = Past(7)
    parts = [body(part, past) for part in x.split([3, 1, 1, 2], 1)]
    assert torch.allclose(torch.cat(parts, 1), body(x), atol=1e-5)


# -- the model ---------------------------------------------------------------------------------------


@PRIORS
@pytest.mark.parametrize("likelihood", ["gaussian", "discretised-logistic"])
def test_the_bound_is_below_the_evidence_which_is_a_sum_over_all_code_maps(kind, likelihood):
    model = vqvae(kind, codes=3, likelihood=likelihood)
    x, maps = blobs(3, 8, 8, seed=5), all_maps(3, (2, 2))
    with torch.no_grad():
        told = model.decode(model.codebook.look_up(maps))
        joint = [told.log_prob(one.expand(81, -1, -1, -1)) + log_p(model.prior, maps) for one in x]
    evidence = torch.stack(joint).double().logsumexp(1)
    assert bool((model.elbo(x) <= evidence + 1e-4).all())
    # It is the term of the scan's own codes.
    own = [int((maps == codes).flatten(1).all(1).nonzero()) for codes in model.code_map(x)]
    assert torch.allclose(model.elbo(x), torch.stack([row[i] for row, i in zip(joint, own, strict=True)]), atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 8)])
def test_the_maps_sum_to_the_bound_and_to_the_probability_of_the_codes(shape):
    model = vqvae(shape=shape)
    x = blobs(3, *shape, seed=5)
    assert torch.allclose(model.log_prob_map(x).flatten(1).sum(1), model.elbo(x))
    codes = model.code_map(x)
    assert torch.allclose(model.code_log_prob(x), log_p(model.prior, codes), atol=1e-4)
    assert model.code_log_prob_map(x).shape == (3, 1, *model.config.coarse)
    voxels = model.elbo(x) - model.code_log_prob(x)
    assert torch.allclose(voxels, model.decode(model.encode(x).mean).log_prob(x).detach(), atol=1e-3)


def test_it_starts_as_vector_quantisation_of_blocks_and_learns_more():
    x = blobs(12, 16, 16)
    model = vqvae(stirred=False, shape=(16, 16), codes=32)
    model.initialise(Batch(x))

    def error() -> float:
        return float((model.eval().reconstruct(x) - x).square().mean())

    start = error()
    assert start < 0.8 * float((x - x.mean(0)).square().mean())
    optimizer = torch.optim.Adam(model.players()[0].parameters, lr=3e-3)
    for _ in range(20):
        model.train()
        optimizer.zero_grad()
        (model(Batch(x), "codes").total.mean() / x[0].numel()).backward()
        optimizer.step()
    assert error() < 0.9 * start
    assert model.health([Batch(x)])["codes_used"] >= 16


def test_a_filled_hole_keeps_known_voxels_and_does_not_look_into_the_hole():
    model, x = vqvae(shape=(16, 16)), blobs(3, 16, 16, seed=7)
    hole = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    hole[:, :, 5:10, 3:9] = True
    filled = model.inpaint(x, hole, seed=2)
    assert torch.equal(filled[~hole], x[~hole])
    assert not torch.equal(filled[hole], model.inpaint(x, hole, seed=3)[hole])
    other = torch.where(hole, 1 - x, x)
    assert torch.equal(filled, model.inpaint(other, hole, seed=2))
    assert torch.equal(model.inpaint(x, torch.zeros_like(hole), seed=2), x)


class Pairs(CodePrior):
    """Two codes, 0 or 1 with equal chances, the second like the first in nine cases of ten."""

    def forward(self, codes, told=None):
        same = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        first = torch.full((len(codes), 2), 0.5).log()
        return torch.stack([first, same[codes.flatten(1)[:, 0]]], 2).reshape(-1, 2, *self.positions)

    def step(self, count, told=None):
        return lambda codes, position: self(codes.reshape(-1, *self.positions)).flatten(2)[:, :, position]


def test_what_fills_a_hole_suits_the_codes_behind_it():
    """The first code is drawn before the second is known; among several fillings, one that suits it is taken."""
    model = vqvae(stirred=False, shape=(4, 8), codes=2, latent=1)
    model.prior = Pairs(2, (1, 2), 0)
    means = {k: model.decode(model.codebook.look_up(torch.full((1, 1, 2), k))).mean.detach() for k in (0, 1)}
    hole = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    hole[..., :4] = True
    for known in (0, 1):
        filled = torch.cat([model.inpaint(means[known], hole, seed=seed) for seed in range(25)])
        like = [(filled - means[k]).square()[..., :4].flatten(1).sum(1) for k in (known, 1 - known)]
        assert float((like[0] < like[1]).float().mean()) > 0.7


@PRIORS
def test_the_healthy_twin_loses_unlikely_codes_alone(kind):
    model, x = vqvae(kind), blobs(4, 8, 8, seed=9)
    codes = model.code_map(x)
    assert codes.unique().numel() > 1
    assert torch.equal(model.restore(x, strength=0.0, seed=1), model.reconstruct(x))
    new = [model.restore(x, strength=1.0, seed=seed) for seed in (1, 2)]
    assert not torch.equal(*new)
    # With strength 1 nothing of the scan is left.
    assert torch.allclose(new[0], model.restore(1 - x, strength=1.0, seed=1), atol=1e-5)
    with torch.no_grad():
        model.prior.bias[:] = 0.0
        model.prior.bias[2] = 30.0
    expected = model.decode(model.codebook.look_up(torch.full_like(codes, 2))).mean
    assert torch.allclose(model.restore(x, strength=0.02, seed=1), expected, atol=1e-5)
    with pytest.raises(DataError, match="strength"):
        model.restore(x, strength=1.5)


def test_a_collapsed_codebook_shows_in_its_health():
    model, batch = vqvae(codes=6), Batch(blobs(6, 8, 8))
    well = model.health([batch, batch])
    assert well["codes"] == 6
    assert well["codes_used"] >= 4
    assert 2 < well["code_perplexity"] <= 6
    model.codebook.sums.fill_(1.0)
    model.codebook.counts.fill_(1.0)
    assert model.health([batch]) == {"codes_used": 1, "codes": 6, "code_perplexity": pytest.approx(1.0)}


@PRIORS
def test_the_prior_is_told_classes_and_covariates_and_tells_classes_apart(kind):
    age = Covariate(name="age", mean=50.0, sd=10.0)
    model = vqvae(kind, stirred=False, classes=("dark", "bright"), covariates=(age,))
    x = blobs(16, 8, 8)
    bright = torch.arange(16) % 2
    x = 0.4 * x + 0.5 * bright.reshape(-1, 1, 1, 1)
    model.initialise(Batch(x))
    told = torch.cat([torch.nn.functional.one_hot(bright, 2).float(), torch.zeros(16, 1)], 1)
    optimizer = torch.optim.Adam(model.players()[1].parameters, lr=2e-2)
    for _ in range(30):
        model.train()
        optimizer.zero_grad()
        model(Batch(x, told), "prior").total.mean().backward()
        optimizer.step()
    model.eval()
    assert model.class_log_prob(x, told).argmax(1).tolist() == bright.tolist()
    drawn = model.sample(8, seed=0, cond=told[:8]).flatten(1).mean(1)
    assert float(drawn[1::2].min()) > float(drawn[::2].max())
    older = told.clone()
    older[:, 2] = 2.0
    assert not torch.equal(model.elbo(x, told), model.elbo(x, older))
    assert not torch.equal(model.elbo(x, told), model.elbo(x))


def test_a_config_that_cannot_be_built_is_refused():
    with pytest.raises(ValidationError, match="heads"):
        VQVAE.Config.model_validate({"shape": (8, 8), "prior": {"kind": "transformer", "width": 9, "heads": 2}})
    with pytest.raises(ValidationError, match="divisible"):
        VQVAE.Config(shape=(8, 9), levels=1)
