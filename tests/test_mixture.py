"""Mixtures of Gaussians: densities that are densities, conditionals in closed form, and nothing to train."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, DataError
from medgen.log import reporting
from medgen.models import build, config_of
from medgen.models.base import Model
from medgen.prob.mixtures import GaussianMixture
from medgen.prob.patches import PatchMixture
from medgen.prob.subspace import SubspaceMixture
from medgen.seeds import voxel_uniform


def blobs(n: int, space: tuple[int, ...], seed: int = 0, channels: int = 1) -> torch.Tensor:
    """Smooth scans on [0, 1] with some noise."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size) for size in space], indexing="ij")
    where = torch.rand(n, channels, len(space), generator=generator) - 0.5
    distance = sum((axis - where[..., k].reshape(n, channels, *[1] * len(space))) ** 2 for k, axis in enumerate(axes))
    return (torch.exp(-3 * distance) * 0.8 + 0.1 + 0.03 * torch.randn(distance.shape, generator=generator)).clamp(0, 1)


def mixture(x: torch.Tensor, cond: torch.Tensor | None = None, **fields: object) -> Model:
    classes = () if cond is None else tuple(f"class {n}" for n in range(int(cond.max()) + 1))
    values = {"kind": "mixture", "shape": tuple(x.shape[2:]), "channels": x.shape[1], "classes": classes}
    model = build(config_of(values | fields))
    model.finalise([Batch(x, cond)])
    return model


def covariance(density: SubspaceMixture, k: int = 0, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of one Gaussian over the whole space, written out."""
    turn = density.directions.double()
    factor, s2 = density.mixture.factors[index, k].double(), density.residual[index].double()
    size = turn.shape[1]
    whole = turn.T @ (factor @ factor.T) @ turn + s2 * (torch.eye(size).double() - turn.T @ turn)
    mean = density.centre.double() + density.mixture.means[index, k].double() @ turn
    return mean.numpy(), whole.numpy()


class Notes:
    """A reporter that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def start(self, what: str, total: float | int | None) -> object:
        return what

    def advance(self, handle: object, amount: float | int, text: str) -> None:
        pass

    def stop(self, handle: object) -> None:
        pass


# -- mixtures of vectors ---------------------------------------------------------------------------


def two_clusters(n: int = 600) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 2, generator=generator) * torch.tensor([1.0, 0.5])
    rows[: n // 3] = rows[: n // 3] * 0.4 + torch.tensor([6.0, 2.0])
    return rows


def test_a_known_mixture_is_recovered():
    found = GaussianMixture(2, components=2)
    found.fit(two_clusters(3000), seed=0)
    order = found.weights[0].argsort()
    assert torch.allclose(found.weights[0, order], torch.tensor([1 / 3, 2 / 3]), atol=0.01)
    assert torch.allclose(found.means[0, order], torch.tensor([[6.0, 2.0], [0.0, 0.0]]), atol=0.05)
    variances = (found.factors @ found.factors.mT)[0, order].diagonal(dim1=1, dim2=2)
    assert torch.allclose(variances, torch.tensor([[0.16, 0.04], [1.0, 0.25]]), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("told", [False, True], ids=["any class", "a class"])
def test_a_mixture_integrates_to_one(told):
    rows = two_clusters()
    density = GaussianMixture(2, components=3, classes=2)
    density.fit(rows, torch.arange(600) % 2, seed=0)
    axis = torch.linspace(-8, 10, 181)
    places = torch.cartesian_prod(axis, axis)
    cond = torch.ones(len(places), dtype=torch.long) if told else None
    total = density.log_prob(places, cond).double().exp().sum() * 0.1**2
    assert float(total) == pytest.approx(1, abs=1e-3)
    shares = density.responsibilities(rows, cond[:600] if told else None)
    assert torch.allclose(shares.sum((1, 2)), torch.ones(600), atol=1e-5)


def test_what_is_drawn_has_the_density_and_the_class():
    rows = two_clusters()
    density = GaussianMixture(2, components=2, classes=2)
    density.fit(rows, (torch.arange(600) < 200).long(), seed=0)
    drawn = density.sample(4000, seed=1)
    assert torch.allclose(drawn.mean(0), rows.mean(0), atol=0.15)
    assert torch.allclose(drawn.T.cov(), rows.T.cov(), atol=0.4)
    near = density.sample(300, seed=1, cond=torch.ones(300, dtype=torch.long))
    assert torch.allclose(near.mean(0), torch.tensor([6.0, 2.0]), atol=0.1)
    assert torch.equal(density.sample(5, seed=1, first=3), drawn[3:8])


def test_the_leading_numbers_have_the_marginal_density():
    density = GaussianMixture(2, components=2)
    density.fit(two_clusters(), seed=0)
    axis = torch.linspace(-6, 8, 2801)
    x = torch.tensor([5.5])
    pairs = torch.stack([x.expand(len(axis)), axis], 1)
    expected = density.log_prob(pairs).double().logsumexp(0) + math.log(0.005)
    assert float(density.leading(1).log_prob(x[None])) == pytest.approx(float(expected), abs=1e-4)
    first, whole = density.joints(pairs[:3], 1)
    assert torch.allclose(first.logsumexp((1, 2)).float(), density.leading(1).log_prob(pairs[:3, :1]))
    assert torch.allclose(whole.logsumexp((1, 2)).float(), density.log_prob(pairs[:3]))


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("constant", [False, True])
def test_few_or_equal_rows_still_make_a_density(rows, constant):
    x = torch.zeros(rows, 3) if constant else torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    density = GaussianMixture(3, components=4, classes=2)
    density.fit(x, torch.zeros(rows, dtype=torch.long), seed=0)
    for cond in (None, torch.tensor([0, 1])):
        assert bool(torch.isfinite(density.log_prob(torch.ones(2, 3), cond)).all())
    assert bool(torch.isfinite(density.sample(5, seed=0)).all())


# -- principal components --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 12, 40])
def test_one_gaussian_is_the_multivariate_normal_with_that_covariance(rank):
    """Tipping & Bishop 1999: x ~ N(m, W W' + s^2 I), here with the noise beyond the principal components alone."""
    x = blobs(200, (5, 8))
    model = mixture(x, mixtures=1, rank=rank, lead=3, bits=0)
    mean, whole = covariance(model.density)
    new = blobs(20, (5, 8), seed=1)
    expected = multivariate_normal(mean, whole).logpdf(new.flatten(1).double().numpy())
    assert model.log_prob(new).numpy() == pytest.approx(expected, rel=1e-4)


def test_several_gaussians_are_their_weighted_sum_and_the_grey_levels_are_counted():
    x = blobs(300, (5, 8))
    model = mixture(x, mixtures=3, rank=12, lead=4)
    weights = model.density.mixture.weights[0].double()
    assert int((weights > 0).sum()) == 3
    new = blobs(10, (5, 8), seed=1)
    noisy = ((new * 255).round() + voxel_uniform((5, 8), seed=0)[None]) / 256
    parts = [
        multivariate_normal(*covariance(model.density, k)).logpdf(noisy.flatten(1).double().numpy()) for k in range(3)
    ]
    expected = (torch.from_numpy(np.stack(parts)) + weights.log()[:, None]).logsumexp(0) - 40 * 8 * math.log(2)
    assert torch.allclose(model.log_prob(new).double(), expected, rtol=1e-4)


@pytest.mark.parametrize("n", [30, 300])
def test_ledoit_and_wolfs_covariance_is_scikit_learns(n):
    x = blobs(n, (5, 8))
    model = mixture(x, mixtures=1, rank=40, shrinkage="ledoit-wolf", bits=0)
    _, whole = covariance(model.density)
    expected, _ = ledoit_wolf(x.flatten(1).double().numpy())
    assert whole == pytest.approx(expected, abs=2e-6)


def test_a_given_ridge_is_added_and_the_best_one_suits_new_scans():
    x, new = blobs(60, (5, 8)), blobs(200, (5, 8), seed=1)
    rows = x.flatten(1).double()
    sample = np.cov(rows.T.numpy(), bias=True)
    _, whole = covariance(mixture(x, mixtures=1, rank=40, ridge=0.1, bits=0).density)
    assert whole == pytest.approx(sample + 0.1 * np.trace(sample) / 40 * np.eye(40), abs=1e-6)
    chosen = float(mixture(x, mixtures=1, rank=40).log_prob(new).mean())
    others = [float(mixture(x, mixtures=1, rank=40, ridge=r).log_prob(new).mean()) for r in (1e-5, 1.0)]
    assert chosen > max(others)


@pytest.mark.parametrize("mixtures", [1, 3])
def test_paint_in_a_hole_has_the_closed_form_conditional(mixtures):
    """Of one Gaussian: mean S_ho S_oo^-1 (x_o - m_o), covariance S_hh - S_ho S_oo^-1 S_oh; of several, the mixture."""
    x = blobs(300, (4, 6))
    model = mixture(x, mixtures=mixtures, rank=10, lead=2, bits=0)
    scan = blobs(1, (4, 6), seed=5)
    hole = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    hole[..., 1:3, 2:4] = True
    draws = 200
    filled = model.inpaint(scan.expand(draws, -1, -1, -1), hole.expand(draws, -1, -1, -1), seed=3)
    assert torch.equal(torch.where(hole, 0, filled), torch.where(hole, 0, scan).expand(draws, -1, -1, -1))
    h, o, flat = hole.flatten().numpy(), ~hole.flatten().numpy(), scan.flatten().double().numpy()
    shares, means, seconds = [], [], []
    for k in range(mixtures):
        mean, whole = covariance(model.density, k)
        gain = whole[np.ix_(h, o)] @ np.linalg.inv(whole[np.ix_(o, o)])
        means.append(mean[h] + gain @ (flat[o] - mean[o]))
        seconds.append(whole[np.ix_(h, h)] - gain @ whole[np.ix_(o, h)] + np.outer(means[-1], means[-1]))
        density = multivariate_normal(mean[o], whole[np.ix_(o, o)]).logpdf(flat[o])
        shares.append(math.log(model.density.mixture.weights[0, k]) + density)
    shares = np.exp(shares - np.logaddexp.reduce(shares))
    mean = np.einsum("k,ki->i", shares, means)
    spread = np.einsum("k,kij->ij", shares, seconds) - np.outer(mean, mean)
    drawn = filled[hole.expand(draws, -1, -1, -1)].reshape(draws, -1).double().numpy()
    deviation = np.sqrt(np.diag(spread))
    assert np.abs(drawn.mean(0) - mean).max() < 4 * (deviation / math.sqrt(draws)).max()
    assert np.cov(drawn.T) == pytest.approx(spread, abs=0.4 * float(deviation.max() ** 2))


def test_samples_have_the_scans_mean_and_covariance():
    x = blobs(400, (4, 6))
    drawn = mixture(x, mixtures=2, rank=24, lead=3).sample(1500, seed=0).flatten(1)
    assert torch.allclose(drawn.mean(0), x.flatten(1).mean(0), atol=0.03)
    assert torch.allclose(drawn.T.cov(), x.flatten(1).T.cov(), atol=0.01)
    assert bool(((drawn * 255 - (drawn * 255).round()).abs() < 1e-3).all())  # grey levels


def test_codes_are_principal_components_and_the_twin_drops_what_no_scan_has():
    x = blobs(300, (8, 8))
    model = mixture(x, mixtures=2, lead=6)
    new = blobs(20, (8, 8), seed=2)
    left = new - model.reconstruct(new)
    assert float(left.square().mean()) < 0.3 * float((new - x.mean(0)).square().mean())
    # What is left is at right angles to every code.
    assert torch.allclose(model.encode(new - left).mean, model.encode(new).mean, atol=0.02)
    ill = new.clone()
    ill[..., 1:4, 5:8] = 1.0
    twin, shown = model.restore(ill), model.reconstruct(ill)
    before, after = (float((one - new).square().mean()) for one in (shown, twin))
    assert after < before
    assert torch.allclose(model.restore(ill, strength=0.0), shown, atol=1e-5)


# -- patches ---------------------------------------------------------------------------------------


def conditional(density: PatchMixture, x: torch.Tensor, place: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """log p(voxel = each of `values` | voxels before), by writing the value into the scan."""
    several = x.expand(len(values), *x.shape[1:]).clone()
    several[(slice(None), 0, *place)] = values
    return density.log_prob_map(several)[(slice(None), 0, *place)]


@pytest.mark.parametrize("space", [(5, 6), (3, 4, 3)], ids=["2d", "3d"])
def test_a_voxels_conditional_integrates_to_one_everywhere(space):
    x = blobs(60, space)
    density = mixture(x, over="patches", mixtures=3, radius=1, bits=0).density
    values = torch.linspace(-2, 3, 626)
    for place in [
        (0,) * len(space),
        tuple(n - 1 for n in space),
        tuple(n // 2 for n in space),
        (1, *(0,) * len(space[1:])),
    ]:
        total = conditional(density, x[:1], place, values).exp().sum() * 0.008
        assert float(total) == pytest.approx(1, abs=0.01), place


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("space", [(5, 6), (3, 4, 3)], ids=["2d", "3d"])
def test_a_map_sums_to_the_density_and_knows_only_what_comes_before(space, channels):
    x = blobs(40, space, channels=channels)
    model = mixture(x, over="patches", mixtures=3, radius=2 if len(space) == 2 else 1)
    new = blobs(2, space, seed=1, channels=channels)
    density = model.log_prob_map(new)
    assert torch.allclose(density.flatten(1).sum(1), model.log_prob(new), rtol=1e-5)
    voxels = math.prod(space)
    for moved in (0, voxels // 2, voxels - 1):
        other = new.clone()
        other.flatten(2)[..., moved] = 1 - other.flatten(2)[..., moved]
        changed = (model.log_prob_map(other) != density).flatten(2)
        assert not bool(changed[..., :moved].any())
        assert bool(changed[..., moved].all())


def test_a_voxels_density_is_the_ratio_of_the_mixture_over_its_patch():
    """The closed form, written out for a voxel inside: p(neighbours, voxel) / p(neighbours)."""
    x = blobs(60, (6, 6))
    density = mixture(x, over="patches", mixtures=2, radius=1, position=False).density
    dequantised = (blobs(1, (6, 6), seed=3) * 255).round() / 256 + 0.3 / 256
    i, j = 3, 2
    near = torch.stack([dequantised[0, 0, i + a, j + b] for a, b in ((-1, -1), (-1, 0), (-1, 1), (0, -1))]).double()
    near = ((near * 256).floor() + 0.5) / 256
    mean = near.mean()
    told = torch.cat([near - mean, mean[None]])
    row = torch.cat([told, dequantised[0, 0, i, j].double()[None] - mean])
    top, bottom = [], []
    found = density.mixture
    for weight, centre, factor in zip(found.weights[0], found.means[0], found.factors[0], strict=True):
        whole = (factor.double() @ factor.double().T).numpy()
        top.append(math.log(weight) + multivariate_normal(centre.double().numpy(), whole).logpdf(row.numpy()))
        lead = multivariate_normal(centre.double().numpy()[:5], whole[:5, :5]).logpdf(told.numpy())
        bottom.append(math.log(weight) + lead)
    expected = np.logaddexp.reduce(top) - np.logaddexp.reduce(bottom)
    assert float(density.log_prob_map(dequantised)[0, 0, i, j]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5)], ids=["2d", "3d"])
@pytest.mark.parametrize("radius", [1, 2])
def test_fronts_are_drawn_after_all_that_they_need(shape, radius):
    from medgen.prob.patches import _fronts

    density = PatchMixture(shape, 1, radius=radius, components=1)
    fronts = _fronts(shape, radius)
    assert sorted(torch.cat(fronts).tolist()) == list(range(math.prod(shape)))
    done = {math.prod(shape)}
    for front in fronts:
        assert set(density._neighbours(front).flatten().tolist()) <= done
        done |= set(front.tolist())


def test_patches_draw_scans_like_those_they_learned_from():
    """An autoregressive field of known strength: samples have its variance, and its correlation along both axes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(80, 1, 12, 12, generator=generator)
    field = (noise + noise.roll(1, 2) + noise.roll(1, 3) + noise.roll((1, 1), (2, 3))) / 2
    x = (0.5 + 0.1 * field).clamp(0, 1)
    model = mixture(x, over="patches", mixtures=2, radius=2, position=False)
    drawn = model.sample(96, seed=0)

    def facts(scans: torch.Tensor) -> torch.Tensor:
        off = scans - 0.5
        down, along = (off[..., 1:, :] * off[..., :-1, :]).mean(), (off[..., 1:] * off[..., :-1]).mean()
        return torch.stack([scans.mean(), 10 * off.square().mean(), 10 * down, 10 * along])

    assert torch.allclose(facts(drawn), facts(x), atol=0.015)


def test_a_hole_in_patches_is_filled_to_suit_what_comes_after_it():
    """Scans that are all dark or all bright: the first row alone could be either, the rest tells."""
    generator = torch.Generator().manual_seed(0)
    level = torch.where(torch.arange(80) % 2 == 0, 0.2, 0.8)[:, None, None, None]
    x = (level + 0.02 * torch.randn(80, 1, 6, 6, generator=generator)).clamp(0, 1)
    model = mixture(x, over="patches", mixtures=4, radius=1)
    hole = torch.zeros(8, 1, 6, 6, dtype=torch.bool)
    hole[..., :2, :] = True
    filled = model.inpaint(x[:8], hole, seed=0)
    assert torch.allclose(filled[hole].reshape(8, -1).mean(1), level[:8].flatten(), atol=0.1)


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["components", "patches"])
def test_without_a_class_the_density_is_the_mixture_of_classes(over):
    x, cond = blobs(60, (5, 5)), torch.arange(60) % 3
    x[cond == 1] = 1 - x[cond == 1]
    model = mixture(x, cond, over=over, mixtures=2, radius=1)
    each = torch.stack([model.log_prob(x, torch.full((60,), c)) for c in range(3)], 1)
    expected = (each.double() - math.log(3)).logsumexp(1).float()
    assert torch.allclose(model.log_prob(x), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("over", ["components", "patches"])
def test_a_density_of_classes_classifies_them(over):
    def two_kinds(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, cond = blobs(80, (6, 6), seed=seed), torch.arange(80) % 2
        x[cond == 1] = 1.1 - x[cond == 1]
        return x, cond

    model = mixture(*two_kinds(0), over=over, mixtures=2, radius=1)
    x, cond = two_kinds(1)
    assert float((model.class_log_prob(x).argmax(1) == cond).float().mean()) > 0.9


@pytest.mark.parametrize("over", ["components", "patches"])
@pytest.mark.parametrize("kind", ["one scan", "equal scans", "nothing fitted"])
def test_every_history_leaves_a_proper_density(over, kind):
    scans = {"one scan": blobs(1, (4, 4)), "equal scans": blobs(1, (4, 4)).repeat(6, 1, 1, 1)}
    model = build(config_of({"kind": "mixture", "shape": (4, 4), "over": over}))
    if kind in scans:
        model.finalise([Batch(scans[kind])])
    assert bool(torch.isfinite(model.log_prob(blobs(3, (4, 4), seed=1))).all())
    assert bool(torch.isfinite(model.sample(2, seed=0)).all())
    hole = torch.ones(1, 1, 4, 4, dtype=torch.bool)  # nothing is known
    assert bool(torch.isfinite(model.inpaint(blobs(1, (4, 4)), hole, seed=0)).all())


def test_too_many_scans_are_thinned_evenly_and_that_is_said(monkeypatch):
    monkeypatch.setattr("medgen.models.mixture._NUMBERS", 20 * 16)
    x = blobs(90, (4, 4))
    model = build(config_of({"kind": "mixture", "shape": (4, 4)}))
    notes = Notes()
    with reporting(notes):
        model.finalise([Batch(part) for part in x.split(7)])
    assert "Fitting to 12 of 90 scans" in notes.said[0]
    other = build(config_of({"kind": "mixture", "shape": (4, 4)}))
    other.finalise([Batch(x[::8])])
    assert torch.equal(model.log_prob(x), other.log_prob(x))


def test_what_a_mixture_cannot_do_is_refused_in_a_sentence():
    x = blobs(20, (4, 4))
    whole, patches = mixture(x), mixture(x, over="patches", radius=1)
    with pytest.raises(CapabilityError, match="over: patches"):
        whole.log_prob_map(x)
    for call in (patches.encode, patches.decode, patches.reconstruct, patches.restore):
        with pytest.raises(CapabilityError, match="over: components"):
            call(x)
    with pytest.raises(CapabilityError, match="two or more classes"):
        whole.class_log_prob(x)
    for model in (whole, patches):
        with pytest.raises(DataError, match=r"takes scans \(1, 4, 4\).*found \(1, 4, 5\)"):
            model.log_prob(blobs(2, (4, 5)))
