"""Flow matching: equations solved to their order, divergences without bias, densities known in closed form."""

import math
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from medgen.data.dataset import Batch, ScanDataset
from medgen.data.manifest import index
from medgen.data.recipe import CropOrPad, Orient, Percentiles, Recipe
from medgen.errors import ConfigError, DataError, MedgenError
from medgen.log import reporting
from medgen.models import build, config_of
from medgen.models.base import Model, Player
from medgen.nets.unet import UNet
from medgen.prob.gaussian import GaussianPath
from medgen.prob.ode import EULER, HEUN, integrate, integrate_adaptively, lattice_probes, traces
from medgen.prob.transport import optimal_assignment
from medgen.training.fit import FitConfig, fit
from medgen.training.spans import placed, schedule, stage

SPACES = {2: (8, 12), 3: (4, 8, 8)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scans(n: int, dims: int, seed: int = 0, channels: int = 1, space: tuple[int, ...] = ()) -> torch.Tensor:
    """Smooth blobs somewhere, on [0, 1]."""
    space = space or SPACES[dims]
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size) for size in space], indexing="ij")
    where = torch.rand(n, channels, dims, generator=torch.Generator().manual_seed(seed)) - 0.5
    far = sum((axis - where[..., k].reshape(n, channels, *[1] * dims)) ** 2 for k, axis in enumerate(axes))
    return (0.1 + 0.7 * torch.exp(-3 * far) + 0.03 * noise(n, channels, *space, seed=seed + 1)).clamp(0, 1)


def flowmatch(dims: int = 2, *, moved: float = 0.0, **changes: object) -> Model:
    """A small initialised model; `moved` shakes its parameters, so that the network adds something."""
    torch.manual_seed(0)
    values = {"kind": "flowmatch", "shape": SPACES[dims], "width": 8, "levels": 1, "depth": 1, "steps": 8, "bits": 0}
    return started(build(config_of(values | changes)), moved)


def latent(dims: int = 2, *, moved: float = 0.0, **changes: object) -> Model:
    torch.manual_seed(0)
    inner = {"width": 8, "levels": 0, "depth": 1, "steps": 8}
    values = {"kind": "latentflowmatch", "shape": SPACES[dims], "width": 8, "latent": 3, "velocity": inner} | changes
    return started(build(config_of(values)), moved)


def started(model: Model, moved: float) -> Model:
    config = model.config
    cond = torch.arange(12) % len(config.classes) if config.classes else None
    model.initialise(Batch(scans(12, config.dims, channels=config.channels, space=config.shape), cond))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += moved * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def seeded(call: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call()


def step(model: Model, batch: Batch, player: str, count: int, rate: float = 2e-3) -> tuple[float, float]:
    """Train a player on one batch; its loss at the same noise before and after."""
    parameters = next(p.parameters for p in model.players() if p.name == player)
    optimizer = torch.optim.Adam(parameters, lr=rate)

    def now() -> float:
        return float(seeded(lambda: model(batch, player).total.detach().mean(), 99))

    before = now()
    for n in range(count):
        optimizer.zero_grad()
        seeded(lambda: (model(batch, player).total.mean() / batch.x[0].numel()).backward(), n)
        optimizer.step()
    return before, now()


# -- equations -------------------------------------------------------------------------------------


def turning(state: tuple[torch.Tensor, ...], time: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """dy/dt = i a y with a = 3 + t: turns by 3 t + t^2 / 2."""
    y = state[0]
    return (torch.stack([-y[:, 1], y[:, 0]], 1) * (3 + time)[:, None],)


START = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
END = torch.tensor([[math.cos(3.5), math.sin(3.5)], [-2 * math.sin(3.5), 2 * math.cos(3.5)]], dtype=torch.float64)


@pytest.mark.parametrize("method", [EULER, HEUN], ids=["euler", "heun"])
def test_the_error_falls_with_the_order_of_the_method(method):
    errors = []
    for steps in (64, 128, 256):
        (y,) = integrate(turning, (START,), torch.linspace(0, 1, steps + 1, dtype=torch.float64), method)
        errors.append(float((y - END).norm()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(method.order, abs=0.15)


def test_adaptive_steps_keep_to_their_tolerance_both_ways():
    for tolerance in (1e-3, 1e-6, 1e-9):
        calls = []

        def counted(state: tuple[torch.Tensor, ...], time: torch.Tensor) -> tuple[torch.Tensor, ...]:
            calls.append(time)  # noqa: B023
            return turning(state, time)

        (y,) = integrate_adaptively(counted, (START,), 0.0, 1.0, tolerance=tolerance)
        assert float((y - END).abs().max()) < 10 * tolerance
        (back,) = integrate_adaptively(turning, (y,), 1.0, 0.0, tolerance=tolerance)
        assert float((back - START).abs().max()) < 20 * tolerance
    # Fifth order: a million times the precision costs about 16 times the steps, each of six evaluations.
    assert len(calls) < 16 * 6 * 6


def test_adaptive_steps_of_a_row_do_not_depend_on_the_others():
    speeds = torch.tensor([1.0, 30.0, 4.0], dtype=torch.float64)

    def rate(which: torch.Tensor) -> Callable:
        return lambda state, time: (torch.cos(which[:, None] * time[:, None]) * which[:, None] - 0.5 * state[0],)

    y = torch.ones(3, 2, dtype=torch.float64)
    (together,) = integrate_adaptively(rate(speeds), (y,), 0.0, 1.0, tolerance=1e-5)
    alone = [integrate_adaptively(rate(speeds[i : i + 1]), (y[:1],), 0.0, 1.0, tolerance=1e-5)[0] for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_what_cannot_be_followed_is_said_in_a_sentence():
    ones = (torch.ones(2, 1),)
    with pytest.raises(ConfigError, match="larger tolerance"):
        integrate_adaptively(lambda y, t: (y[0] ** 2,), ones, 0.0, 2.0, tolerance=1e-4)  # goes to infinity at t = 1
    with pytest.raises(ConfigError, match="5 steps were not enough"):
        integrate_adaptively(lambda y, t: (torch.cos(50 * t)[:, None],), ones, 0.0, 1.0, tolerance=1e-6, most=5)
    for bad in (math.nan, math.inf):
        broken = (torch.tensor([[1.0], [bad]]),)
        with pytest.raises(MedgenError, match="not finite"):
            integrate(lambda y, t: y, broken, torch.linspace(0, 1, 4))
        with pytest.raises(MedgenError, match="not finite"):
            integrate_adaptively(lambda y, t: y, broken, 0.0, 1.0, tolerance=1e-3)


# -- divergence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_random_traces_have_no_bias_and_vary_less_on_a_lattice(stride):
    shape, reach = (1, 6, 6), torch.nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    x = noise(1, *shape).double().requires_grad_()
    output = torch.tanh(reach(x)) * 2
    columns = torch.eye(36).double().reshape(36, *shape)
    exact = float(traces(output, x, columns).detach().sum())
    probes = lattice_probes(shape, repeats=400, stride=stride, seed=0).double()
    found = traces(output, x, probes.flatten(0, 1)).detach().reshape(400, stride**2).sum(1)
    error = float(found.std()) / 20
    assert abs(float(found.mean()) - exact) < 3 * error + 1e-12
    # A 3-wide convolution joins neighbours along both axes and diagonals, none of which share a lattice of stride 2.
    assert float(found.std()) < 1e-9 if stride == 2 else float(found.std()) > 0.1


def test_lattices_share_out_every_voxel_once():
    probes = lattice_probes((2, 5, 6, 7), repeats=3, stride=2, seed=0)
    assert probes.shape == (3, 8, 2, 5, 6, 7)
    assert torch.equal(probes.abs().sum(1), torch.ones(3, 2, 5, 6, 7))


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2)])
def test_the_density_estimate_is_as_good_as_it_says(shape):
    x = scans(4, len(shape), seed=5, space=shape)
    settings = {"moved": 0.1, "shape": shape, "width": 8, "levels": 0}
    exact, none = flowmatch(**settings, probes=0).log_prob_estimate(x)
    assert torch.equal(none, torch.zeros(4))
    model = flowmatch(**settings, probes=4)
    away, errors = [], []
    for seed in range(4):
        found, error = model.log_prob_estimate(x, seed=seed)
        away.append((found - exact) / error)
        errors.append(error.square().mean())
    # Sixteen errors in units of their standard error; one seed's are alike.
    assert 0.3 < float(torch.stack(away).square().mean().sqrt()) < 2.5
    # With eight times the probes the variance is an eighth, which those few repeats tell roughly.
    many = flowmatch(**settings, probes=32).log_prob_estimate(x)[1]
    assert 1 / 24 < float(many.square().mean() / torch.stack(errors).mean()) < 3 / 8


# -- the Gaussian field ----------------------------------------------------------------------------


def gaussian_field(path: GaussianPath, mean: torch.Tensor) -> torch.distributions.MultivariateNormal:
    """The path's Gaussian over scans, written out."""
    size = path.mean.numel()
    basis = torch.eye(size).reshape(size, *path.mean.shape[1:])
    cosines = path._turned(basis).reshape(size, size).T.double()  # column k: the transform of voxel k
    spread = path.spread.flatten().double()
    covariance = spread[:, None] * (cosines.T * path.log_power.exp().flatten().double() @ cosines) * spread
    return torch.distributions.MultivariateNormal((path.centre + path.spread * mean).flatten().double(), covariance)


@pytest.mark.parametrize("dims", [2, 3])
def test_at_the_start_the_density_is_that_of_the_gaussian_field(dims):
    model = flowmatch(dims)
    x = scans(3, dims, seed=7)
    with torch.no_grad():
        expected = gaussian_field(model.path, model.path.mean).log_prob(x.flatten(1).double())
    found, error = model.log_prob_estimate(x)
    assert torch.equal(error, torch.zeros(3))  # the network adds nothing, so nothing is estimated
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-2)
    # The loss then says the same, whatever noise and times are drawn.
    for seed in range(3):
        loss = seeded(lambda: model(Batch(x)), seed)
        assert torch.allclose(loss.total.double(), -expected, rtol=1e-4, atol=1e-2)


def test_the_gaussian_of_independent_voxels_is_found():
    """An 8 x 8 field of independent voxels, each with its own mean and spread: the analytic density within 2%."""
    mean, sd = 0.2 + 0.6 * torch.rand(8, 8), 0.02 + 0.1 * torch.rand(8, 8)
    torch.manual_seed(3)
    train, held = (mean + sd * torch.randn(n, 1, 8, 8) for n in (4000, 64))
    path = GaussianPath(1, (8, 8))
    path.fit(train)
    with torch.no_grad():
        w = path.whiten(path.standardised(held), torch.ones(64), path.mean)
        found = path.log_prob(w)
    expected = torch.distributions.Normal(mean, sd).log_prob(held).flatten(1).sum(1)
    assert float((found - expected).abs().max()) < 0.02 * 64


def test_samples_at_the_start_have_the_fields_mean_and_covariance():
    torch.manual_seed(0)
    model = build(
        config_of({"kind": "flowmatch", "shape": (4, 4), "width": 8, "levels": 1, "steps": 1, "depth": 1, "bits": 0})
    )
    field = 0.5 + 0.1 * torch.cumsum(0.4 * torch.randn(4000, 1, 4, 4), 2)
    model.initialise(Batch(field))
    drawn = model.eval().sample(2000, seed=0).flatten(1)
    assert float((drawn.mean(0) - field.flatten(1).mean(0)).abs().max()) < 0.015
    with torch.no_grad():
        expected = gaussian_field(model.path, model.path.mean).covariance_matrix.float()
    assert float((drawn.T.cov() - expected).norm() / expected.norm()) < 0.1


def test_frequencies_emerge_as_often_as_their_density_says():
    path = flowmatch().path
    time = seeded(lambda: path.emerging(torch.rand(200_000)))
    edges = torch.linspace(0, 1, 21)
    counted = torch.histc(time, 20, 0, 1) / 200_000
    fine = torch.linspace(0, 1, 20_001)
    mass = (path.emergence((fine[1:] + fine[:-1]) / 2) / 20_000).reshape(20, 1000).sum(1)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-3)
    assert float((counted - mass).abs().max()) < 0.01, edges


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("loss", ["nats", "velocity"])
@pytest.mark.parametrize("times", ["emergence", "uniform", "logit-normal"])
def test_every_loss_learns(dims, loss, times):
    model = flowmatch(dims, loss=loss, times=times)
    before, after = step(model, Batch(scans(16, dims)), "model", 25)
    assert after < before


def test_training_raises_the_density_of_what_no_gaussian_fits():
    def drawn(n: int, seed: int) -> torch.Tensor:
        """Blobs in one of two corners."""
        corner = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
        x = 0.3 + 0.05 * noise(n, 1, 8, 8, seed=seed + 1)
        x[corner, :, :4, :4] += 0.4
        x[~corner, :, 4:, 4:] += 0.4
        return x

    torch.manual_seed(0)
    model = build(
        config_of({"kind": "flowmatch", "shape": (8, 8), "width": 16, "levels": 1, "depth": 1, "lattice": 2, "bits": 0})
    )
    model.initialise(Batch(drawn(64, 0)))
    held = drawn(16, 90)
    at_start = model.log_prob_estimate(held)[0].mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for n in range(60):
        optimizer.zero_grad()
        seeded(lambda: (model(Batch(drawn(32, 2 * n + 100))).total.mean() / 64).backward(), n)  # noqa: B023
        optimizer.step()
    found, error = model.eval().log_prob_estimate(held)
    assert float(found.mean() - at_start) > 1 + 3 * float(error.mean())
    with torch.no_grad():
        bound = torch.stack([seeded(lambda: model(Batch(held)).total, n) for n in range(16)]).mean()
    # The loss bounds the negative log density of the diffusion with this velocity; the flow's own is close.
    assert float(-found.mean()) < float(bound) + 3


def test_optimal_coupling_shortens_paths_and_keeps_conditions_apart():
    y, e = noise(32, 1, 4, 4), noise(32, 1, 4, 4, seed=1)
    order = optimal_assignment(e, y)
    assert sorted(order.tolist()) == list(range(32))
    assert float((y - e[order]).square().sum()) < 0.8 * float((y - e).square().sum())
    cond = torch.nn.functional.one_hot(torch.arange(32) % 3, 3).float()
    order = optimal_assignment(e, y, cond)
    assert torch.equal(cond[order], cond)
    assert not torch.equal(order, torch.arange(32))
    batch = Batch(scans(8, 2), torch.arange(8) % 2)
    for classes in ((), ("calm", "stormy")):
        before, after = step(flowmatch(coupling="optimal", loss="velocity", classes=classes), batch, "model", 20)
        assert after < before


QUICK = {"batch_size": 4, "precision": "float32", "warmup": 8, "ema": 20, "validations": 4, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def volumes(heads: Path) -> tuple[ScanDataset, ScanDataset]:
    """Twelve training and four validation heads of 8 x 8 x 8 voxels."""
    manifest = index(heads)
    recipe = Recipe(steps=(Orient(), CropOrPad(shape=(8, 8, 8)), Percentiles()))
    parts = [type(manifest)(manifest.rows[part], (), manifest.root) for part in (slice(0, 12), slice(12, 16))]
    return ScanDataset(parts[0], recipe), ScanDataset(parts[1], recipe)


def fresh() -> Model:
    torch.manual_seed(0)
    inner = {"width": 8, "levels": 0, "depth": 1}
    return build(config_of({"kind": "latentflowmatch", "shape": (8, 8, 8), "width": 4, "latent": 3, "velocity": inner}))


def test_a_latent_run_trains_the_autoencoder_and_then_the_velocity(volumes, monkeypatch):
    model, ends = fresh(), {}
    begin = type(model).begin

    def watched(self: Model, player: str, batch: Batch) -> None:
        ends[player] = [p.detach().clone() for p in self.parameters()]
        begin(self, player, batch)

    monkeypatch.setattr(type(model), "begin", watched)
    progress = fit(model, *volumes, FitConfig(images=48, patience=1, **QUICK))
    assert progress.seen > 24  # a stage that no longer improves does not end training
    assert [*ends] == ["velocity"]
    count, now = len(list(model.autoencoder.parameters())), [p.detach() for p in model.parameters()]
    same = [torch.equal(a, b) for a, b in zip(ends["velocity"], now, strict=True)]
    assert all(same[:count])
    assert not all(same[count:])
    assert bool(model.begun)
    assert bool(torch.isfinite(model.sample(2, seed=0)).all())


class CtrlC:
    """A reporter that presses Ctrl-C when so many images have been seen."""

    def __init__(self, at: int) -> None:
        self.left = at

    def note(self, message: str) -> None:
        pass

    def start(self, what: str, total: float | int | None) -> object:
        return what

    def advance(self, handle: object, amount: float | int, text: str) -> None:
        self.left -= int(amount)
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def stop(self, handle: object) -> None:
        pass


@pytest.mark.parametrize("at", [12, 16, 20])
def test_a_latent_run_interrupted_about_the_change_of_stages_ends_alike(volumes, tmp_path, at):
    settings = FitConfig(images=32, **QUICK)
    whole, halved, resumed = fresh(), fresh(), fresh()
    fit(whole, *volumes, settings)
    with reporting(CtrlC(at)), pytest.raises(KeyboardInterrupt):
        fit(halved, *volumes, settings, state_folder=tmp_path)
    fit(resumed, *volumes, settings, state_folder=tmp_path)
    ends = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in ends)


@pytest.mark.parametrize(("images", "since"), [(104, 52), (8, 4), (4, 4)])
def test_parts_of_a_run_become_whole_steps(images, since):
    weight = (torch.nn.Parameter(torch.zeros(1)),)
    players = [Player("first", weight, until=0.5), Player("then", weight, since=0.5), Player("late", weight, since=12)]
    first, then, late = placed(players, images, 4)
    assert (first.since, first.until, then.since, then.until, late.since) == (0, since, since, None, 12)
    assert stage([first, then], since - 4) == ("first",)
    assert stage([first, then], since) == ("then",)
    assert schedule(then, since, 400, 4, 4) == schedule(first, 0, 400, 4, 4) == pytest.approx(1.0)


@pytest.mark.parametrize("dims", [2, 3])
def test_both_players_of_a_latent_flow_learn(dims):
    model = latent(dims)
    batch = Batch(scans(12, dims))
    for player in ("autoencoder", "velocity"):
        before, after = step(model, batch, player, 25)
        assert after < before
    model.begin("velocity", batch)
    bound = seeded(lambda: model.validation_loss(batch).detach().mean())
    assert float(bound) == pytest.approx(float(-model.elbo(batch.x).mean()), rel=0.2)


# -- conditions ------------------------------------------------------------------------------------


def test_guidance_of_one_is_the_condition_and_of_none_is_its_absence():
    cond = torch.tensor([0, 1, 1])
    drawn = {
        weight: flowmatch(moved=0.05, classes=("calm", "stormy"), guidance=weight).sample(3, seed=0, cond=cond)
        for weight in (0.0, 0.5, 1.0, 3.0)
    }
    plain = flowmatch(moved=0.05, classes=("calm", "stormy"))
    assert torch.equal(drawn[1.0], plain.sample(3, seed=0, cond=cond))
    assert torch.equal(drawn[0.0], plain.sample(3, seed=0))
    assert not torch.allclose(drawn[0.0], drawn[1.0], atol=1e-3)
    steps = [float((drawn[weight] - drawn[0.0]).norm()) for weight in (0.5, 1.0, 3.0)]
    assert steps == sorted(steps)
    # At the start all is Gaussian, and guidance moves the mean alone.
    fresh = {w: flowmatch(classes=("calm", "stormy"), guidance=w).sample(3, seed=0, cond=cond) for w in (0.0, 1.0, 3.0)}
    assert torch.allclose(fresh[3.0] - fresh[0.0], 3 * (fresh[1.0] - fresh[0.0]), atol=1e-4)


COVARIATES = [{"name": "age", "mean": 50.0, "sd": 10.0}, {"name": "sex", "levels": ["F", "M"]}]


@pytest.mark.parametrize("make", [flowmatch, latent], ids=["voxels", "latent"])
@pytest.mark.parametrize("dims", [2, 3])
def test_covariates_and_a_given_image_matter(make, dims):
    model = make(dims, moved=0.05, classes=("calm",), covariates=COVARIATES, context=2)
    x, given = scans(3, dims), scans(3, dims, seed=3, channels=2)
    table = torch.tensor([[1.0, -0.5, 1.0, 0.0], [1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    batch = Batch(x, table, given)
    for player in model.players():
        assert bool(torch.isfinite(model(batch, player.name).total).all())
    drawn = model.sample(3, seed=0, cond=table, context=given)
    assert drawn.shape == x.shape
    others = {
        "age": model.sample(3, seed=0, cond=table + torch.tensor([0.0, 1.0, 0.0, 0.0]), context=given),
        "class": model.sample(3, seed=0, cond=torch.tensor([0, 0, 0]), context=given),
        "no condition": model.sample(3, seed=0, context=given),
        "image": model.sample(3, seed=0, cond=table, context=given.flip(0)),
        "no image": model.sample(3, seed=0, cond=table),
    }
    for name, other in others.items():
        assert float((other - drawn).abs().max()) > 1e-4, name
    density = model.elbo if make is latent else lambda *told: model.log_prob_estimate(*told)[0]
    assert not torch.equal(density(x, table, given), density(x, table, given.flip(0)))
    restored = model.restore(x, cond=table, context=given)
    assert not torch.allclose(restored, model.restore(x, cond=table, context=given.flip(0)))


def test_leaving_the_condition_out_is_learned_too():
    """With `drop` the loss sees each scan now with and now without its condition; in evaluation always with."""
    model = flowmatch(moved=0.05, classes=("calm", "stormy"), drop=0.5)
    batch = Batch(scans(1, 2), torch.tensor([1]))

    def losses() -> set[float]:
        return {round(float(seeded(lambda: model(batch).total.detach(), 3)), 2)}

    assert len(losses()) == 1
    told, untold = model(batch), model(Batch(batch.x))
    model.train()
    torch.manual_seed(0)
    seen = {round(float(model(batch).terms["gaussian"].detach()), 2) for _ in range(20)}
    assert seen == {round(float(loss.terms["gaussian"].detach()), 2) for loss in (told, untold)}


# -- restoring, sampling -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [flowmatch, latent], ids=["voxels", "latent"])
@pytest.mark.parametrize("dims", [2, 3])
def test_restoring_changes_more_the_stronger_it_is(make, dims):
    model, x = make(dims, moved=0.02), scans(3, dims, seed=4)
    unchanged = x if make is flowmatch else model.reconstruct(x)
    assert torch.equal(model.restore(x, strength=0.0), unchanged)
    changes = [float((model.restore(x, strength=s, seed=1) - unchanged).norm()) for s in (0.05, 0.3, 0.9)]
    assert changes == sorted(changes)
    assert changes[0] < 0.5 * changes[2]
    assert torch.equal(model.restore(x, strength=0.5, seed=1), model.restore(x, strength=0.5, seed=1))
    assert not torch.equal(model.restore(x, strength=0.5, seed=1), model.restore(x, strength=0.5, seed=2))
    for wrong in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="strength"):
            model.restore(x, strength=wrong)


def test_at_strength_one_nothing_of_the_scan_is_left():
    model = flowmatch(moved=0.02)
    first, second = (model.restore(scans(2, 2, seed=seed), strength=1.0) for seed in (0, 5))
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(("method", "dims"), [("euler", 2), ("heun", 2), ("heun", 3), ("adaptive", 2), ("adaptive", 3)])
def test_all_methods_come_to_the_same_scans_and_scan_i_does_not_depend_on_n(method, dims):
    model = flowmatch(dims, moved=0.03, width=4, method=method, steps=100 if method == "euler" else 20, tolerance=1e-3)
    many = model.sample(5, seed=3)
    for n in (1, 4):
        assert model.sample(n, seed=3).numpy().tobytes() == many[:n].numpy().tobytes()
    exact = flowmatch(dims, moved=0.03, width=4, method="adaptive", tolerance=1e-5).sample(5, seed=3)
    assert float((many - exact).abs().max()) < 5e-3


def test_grey_levels_are_whole_numbers_and_their_density_is_told_per_level():
    x = (scans(12, 2) * 15).round() / 15
    torch.manual_seed(0)
    values = {"kind": "flowmatch", "shape": SPACES[2], "width": 8, "levels": 1, "bits": 4}
    model = build(config_of(values))
    model.initialise(Batch(x))
    drawn = model.eval().sample(4, seed=0) * 15
    assert torch.allclose(drawn, drawn.round(), atol=1e-4)
    found, _ = model.log_prob_estimate(x)
    assert torch.equal(found, model.log_prob_estimate(x + 0.3 / 15 * (torch.rand(x.shape) - 0.5))[0])
    # A density per grey level, so of probabilities: below zero, and no better than knowing nothing by much.
    assert float(found.max()) < 0
    assert float(found.mean()) / 96 > -math.log(16)


def test_constant_scans_and_a_single_one_do_no_harm():
    for x in (torch.zeros(4, 1, 8, 12), torch.full((1, 1, 8, 12), 0.5), scans(1, 2)):
        torch.manual_seed(0)
        model = build(config_of({"kind": "flowmatch", "shape": (8, 12), "width": 8, "levels": 1}))
        model.initialise(Batch(x))
        assert bool(torch.isfinite(model(Batch(x)).total).all())
        assert bool(torch.isfinite(model.eval().sample(2, seed=0)).all())
        assert bool(torch.isfinite(model.log_prob_estimate(x)[0]).all())


def test_scans_that_are_no_numbers_or_of_another_size_are_refused():
    x = scans(2, 2)
    x[1, 0, 2, 3] = math.nan
    for make in (flowmatch, latent):
        with pytest.raises(DataError, match="finite"):
            make().restore(x)
    model = flowmatch(context=1)
    with pytest.raises(DataError, match="finite"):
        model.log_prob_estimate(x)
    with pytest.raises(DataError, match=r"takes scans \(1, 8, 12\), channels first; found \(1, 8, 8\)"):
        model.restore(x[..., :8])
    with pytest.raises(DataError, match="context"):
        model.sample(2, seed=0, context=scans(2, 2, channels=3))


# -- configs, network ------------------------------------------------------------------------------


def test_sizes_that_do_not_divide_and_one_probe_are_refused():
    for shape in ((9, 8), (8, 9), (8, 8, 10)):
        with pytest.raises(ValidationError, match=r"divisible by fold \* 2\*\*levels = 4"):
            config_of({"kind": "flowmatch", "shape": shape, "levels": 1, "fold": 2})
    with pytest.raises(ValidationError, match="divisible by 16"):
        config_of({"kind": "latentflowmatch", "shape": (24, 16), "levels": 2, "fold": 2, "velocity": {"levels": 1}})
    with pytest.raises(ValidationError, match="standard error"):
        config_of({"kind": "flowmatch", "shape": (8, 8), "probes": 1})
    with pytest.raises(ValidationError, match="loss: velocity"):
        config_of({"kind": "flowmatch", "shape": (8, 8), "coupling": "optimal"})


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("fold", [1, 2])
def test_the_network_starts_at_zero_and_takes_any_size_that_divides(dims, fold):
    network = UNet(dims, (3, 2), 8, 1, fold=fold, depth=2, conditions=4, attention=True)
    stride, time, cond = fold * 2, torch.rand(5), torch.rand(5, 4)
    for factors in ((1, 2, 1), (3, 1, 2)):
        x = noise(5, 3, *[stride * factor for factor in factors[:dims]])
        assert torch.equal(network(x, time, cond), torch.zeros(5, 2, *x.shape[2:]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    output = network(x, time, cond)
    for other in (network(x, 1 - time, cond), network(x, time, 1 - cond), network(x.flip(-1), time, cond).flip(-1)):
        assert not torch.allclose(other, output, atol=1e-3)  # it knows time, condition and place
    assert torch.allclose(network(x[2:], time[2:], cond[2:]), output[2:], atol=1e-4)
