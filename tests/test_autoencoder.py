"""Autoencoders: what each field of the config adds, in closed form where there is one."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal

from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.metrics.image import ssim_map
from medgen.models import build, config_of
from medgen.models.base import Model
from medgen.nets.memory import Memory, address_entropy
from medgen.nets.noise import coarse_noise, foreground_noise


def scans(n: int, space: tuple[int, ...], channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Smooth blobs in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size) for size in space], indexing="ij")
    where = torch.rand(n, channels, len(space), generator=generator) - 0.5
    distance = sum((axis - where[..., k].reshape(n, channels, *[1] * len(space))) ** 2 for k, axis in enumerate(axes))
    noise = torch.randn(n, channels, *space, generator=generator)
    return (torch.exp(-3 * distance) * 0.8 + 0.1 + 0.02 * noise).clamp(0, 1)


def autoencoder(**changes: object) -> Model:
    torch.manual_seed(0)
    base = {"kind": "autoencoder", "shape": (8, 8), "width": 8, "levels": 1, "latent": 3}
    return build(config_of(base | changes))


def moved(model: Model, by: float = 0.05) -> Model:
    """The model in evaluation mode after every parameter has left its starting point."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# -- the plain one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(6, 10), (4, 6, 4)])
def test_at_the_start_it_is_principal_component_analysis(space):
    model = autoencoder(shape=space, latent=3)
    x = scans(60, space)
    model.initialise(Batch(x))
    rows = (x - x.mean(0)).flatten(1).double()
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:]
    expected = rows @ directions @ directions.T
    assert torch.allclose((model.reconstruct(x) - x.mean(0)).flatten(1).double(), expected, atol=1e-5)
    # Codes have unit variance and do not go together.
    codes = model.encode(x).mean.flatten(1)
    assert torch.allclose(torch.cov(codes.T), torch.eye(3), atol=0.02)


def test_a_code_map_keeps_place():
    model = autoencoder(code="map", shape=(8, 12), latent=2)
    assert model.encode(scans(2, (8, 12))).mean.shape == (2, 2, 4, 6)
    assert autoencoder(shape=(8, 12)).encode(scans(2, (8, 12))).mean.shape == (2, 3, 1, 1)


def test_the_losses_are_what_their_names_say():
    x = scans(4, (8, 8), channels=2)
    for loss in ("l2", "l1", "ssim"):
        model = moved(autoencoder(channels=2, loss=loss))
        model.initialise(Batch(x))
        twin = model.reconstruct(x)
        said = {
            "l2": (twin - x).square().flatten(1).sum(1),
            "l1": (twin - x).abs().flatten(1).sum(1),
            "ssim": x[0].numel() * (1 - ssim_map(twin, x)).flatten(1).mean(1),
        }[loss]
        assert torch.allclose(model(Batch(x)).total, said, rtol=1e-4)


def test_structural_similarity_costs_nothing_where_scans_are_equal():
    # As many principal components as scans: the start reconstructs them exactly.
    x = scans(4, (8, 8))
    model = autoencoder(loss="ssim", latent=4)
    model.initialise(Batch(x))
    assert torch.allclose(model.reconstruct(x), x, atol=1e-4)
    assert float(model(Batch(x)).total.detach().abs().max()) < 1e-3 * 64
    assert float(model(Batch(1 - x)).total.detach().min()) > 1.0


def test_it_has_no_density():
    able = autoencoder().abilities(autoencoder().config)
    assert not able & {"scores_density", "bounds_density", "estimates_density", "maps_density", "classifies"}
    # A certain decoder is one point.
    model = autoencoder()
    x = scans(2, (8, 8))
    twin = model.decode(model.encode(x).mean)
    assert torch.equal(twin.log_prob(x), torch.full((2,), -math.inf))
    assert torch.equal(twin.log_prob(twin.mean), torch.zeros(2))


def test_samples_follow_the_mixture_of_the_training_codes():
    x = torch.cat([scans(40, (8, 8)), 0.5 * scans(40, (8, 8), seed=1)])
    model = autoencoder(latent=3)
    model.initialise(Batch(x))
    model.finalise([Batch(x[:50]), Batch(x[50:])])
    drawn = model.sample(200, seed=0)
    assert torch.allclose(drawn.mean(0), x.mean(0), atol=0.06)
    assert float(drawn.flatten(1).mean(1).std()) == pytest.approx(float(x.flatten(1).mean(1).std()), rel=0.25)


def test_covariates_reach_encoder_and_decoder_and_classes_choose_the_mixture():
    age = Covariate(name="age", mean=50, sd=10)
    model = autoencoder(classes=("a", "b"), covariates=(age,))
    x = scans(12, (8, 8))
    x[1::2] *= 0.3
    table = torch.zeros(12, model.config.condition_width)
    table[::2, 0] = table[1::2, 1] = 1
    model.initialise(Batch(x, table))
    model.finalise([Batch(x, table)])
    bright = [float(model.sample(8, seed=0, cond=table[k : k + 1].expand(8, -1)).mean()) for k in (0, 1)]
    assert bright[0] > bright[1] + 0.1
    model = moved(model)
    older = table.clone()
    older[:, 2] += 2
    assert not torch.equal(model.encode(x, table).mean, model.encode(x, older).mean)
    assert not torch.equal(model.decode(torch.zeros(12, 3, 1, 1), table).mean,
                           model.decode(torch.zeros(12, 3, 1, 1), older).mean)  # fmt: skip


# -- denoising -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(24, 17), (12, 16, 9)])
def test_coarse_noise_is_gaussian_of_the_stated_spread_everywhere(space):
    torch.manual_seed(0)
    like = torch.zeros(40, 3, *space)
    for coarseness in (1, 4):
        drawn = torch.cat([coarse_noise(like, 0.2, coarseness) for _ in range(20)])
        assert drawn.shape[1:] == like.shape[1:]
        # Between two values with weights w and 1 - w: w^2 + (1 - w)^2 of the variance, in the mean over places.
        weights = (torch.arange(coarseness) + 0.5) / coarseness
        share = float((weights**2 + (1 - weights) ** 2).mean()) if coarseness > 1 else 1.0
        expected = 0.2 * share ** (len(space) / 2)
        assert float(drawn.std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(drawn.mean())) < 0.01
        # The same at the border as in the middle, since places are drawn.
        border = float(drawn[..., 0].std())
        assert border == pytest.approx(expected, rel=0.1)


def test_coarse_noise_is_smooth_between_its_values():
    torch.manual_seed(0)
    noise = coarse_noise(torch.zeros(1, 1, 40, 40), 1.0, 8)
    bends = noise[..., 2:] - 2 * noise[..., 1:-1] + noise[..., :-2]
    # Straight but at one place in eight.
    assert float((bends.abs() < 1e-5).float().mean()) > 0.7


def test_noise_goes_where_any_channel_is_not_air():
    x = torch.zeros(2, 2, 16, 16)
    x[0, 1, 4:8, 4:8] = 0.5
    noise = foreground_noise(x, 0.2, 4)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 4:8] = True
    assert bool((noise[0][:, inside] != 0).all())
    assert bool((noise[0][:, ~inside] == 0).all())
    assert bool((noise[1] == 0).all())


def test_noise_is_added_in_the_loss_and_nowhere_else():
    for changes in ({"noise": 0.2}, {"noise": 0.2, "skips": True}):
        model = moved(autoencoder(**changes))
        x = scans(3, (8, 8))
        torch.manual_seed(1)
        first = model(Batch(x)).total
        torch.manual_seed(1)
        assert torch.equal(model(Batch(x)).total, first)
        assert not torch.equal(model(Batch(x)).total, first)
        state = torch.random.get_rng_state()
        assert torch.equal(model.reconstruct(x), model.reconstruct(x))
        assert torch.equal(torch.random.get_rng_state(), state)


def test_a_denoiser_starts_as_the_identity_and_learns_to_take_noise_away():
    model = autoencoder(noise=0.3, skips=True, coarseness=4, shape=(16, 16), width=8, levels=1)
    x = scans(8, (16, 16))
    model.initialise(Batch(x))
    assert torch.equal(model.reconstruct(x), x)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(40):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(Batch(x)).total.mean() / 256).backward()
        optimizer.step()
    torch.manual_seed(1000)
    new = scans(8, (16, 16), seed=9)
    noisy = new + foreground_noise(new, 0.3, 4)
    assert float((model.reconstruct(noisy) - new).square().mean()) < 0.75 * float((noisy - new).square().mean())


def test_skips_leave_no_code_and_say_so():
    model = autoencoder(noise=0.2, skips=True)
    assert model.abilities(model.config) == {"reconstructs", "restores"}
    for call in (
        lambda: model.encode(scans(1, (8, 8))),
        lambda: model.decode(torch.zeros(1, 3, 1, 1)),
        lambda: model.sample(1, seed=0),
    ):
        with pytest.raises(CapabilityError, match="skips"):
            call()
    for wrong in ({"skips": True}, {"skips": True, "noise": 0.1, "uncertainty": True},
                  {"skips": True, "noise": 0.1, "memory": 5}, {"uncertainty": True, "loss": "l1"}):  # fmt: skip
        with pytest.raises(ValidationError):
            autoencoder(**wrong)


def test_strength_is_a_share_of_the_way_to_the_healthy_twin():
    x = scans(5, (8, 8))
    for changes in ({}, {"noise": 0.2, "skips": True}, {"memory": 10, "code": "map"}):
        model = autoencoder(**changes)
        model.initialise(Batch(x))
        model = moved(model)
        assert torch.equal(model.restore(x, strength=0.0), x)
        assert torch.allclose(model.restore(x), model.reconstruct(x), atol=1e-6)
        half = model.restore(x, strength=0.5)
        assert torch.allclose(half, (x + model.reconstruct(x)) / 2, atol=1e-6)


def test_the_twin_of_a_code_map_drops_what_no_training_scan_has():
    x, new = scans(64, (16, 16)), scans(8, (16, 16), seed=9)
    model = autoencoder(code="map", shape=(16, 16), latent=4)
    model.initialise(Batch(x))
    model.finalise([Batch(x)])
    ill = new.clone()
    ill[:, :, 2:6, 9:13] += 0.5
    inside = (slice(None), slice(None), slice(2, 6), slice(9, 13))
    shown = float((model.reconstruct(ill) - new)[inside].mean())
    assert shown > 0.3
    assert abs(float((model.restore(ill) - new)[inside].mean())) < 0.5 * shown


# -- uncertainty ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(8, 8), (4, 8, 6)])
def test_the_uncertain_loss_is_a_normal_s_density(space):
    model = autoencoder(uncertainty=True, shape=space, channels=2)
    x = scans(4, space, channels=2)
    model.initialise(Batch(x))
    model = moved(model)
    twin, spread = model.reconstruct(x), model.uncertainty_map(x)
    assert twin.shape == spread.shape == x.shape
    assert float(spread.std()) > 0
    expected = -Normal(twin, spread).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(model(Batch(x)).total, expected, rtol=1e-5)
    # Mao et al. 2020, equation 3, is twice that, but for a constant.
    theirs = ((x - twin).square() / spread.square() + spread.square().log()).flatten(1).sum(1)
    assert torch.allclose(2 * expected - x[0].numel() * math.log(2 * math.pi), theirs, rtol=1e-4)
    with pytest.raises(CapabilityError, match="uncertainty"):
        autoencoder().uncertainty_map(scans(1, (8, 8)))


def test_the_predicted_spread_is_larger_where_scans_cannot_be_told():
    generator = torch.Generator().manual_seed(0)
    x = scans(64, (8, 8))
    x[:, :, :, 4:] += 0.2 * torch.randn(64, 1, 8, 4, generator=generator)
    model = autoencoder(uncertainty=True)
    model.initialise(Batch(x))
    # At the start one spread for all voxels: the error of principal components.
    error = (model.reconstruct(x) - x).square().mean().sqrt()
    assert torch.allclose(model.uncertainty_map(x), error.expand(64, 1, 8, 8), rtol=1e-4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (model(Batch(x)).total.mean() / 64).backward()
        optimizer.step()
    spread = model.uncertainty_map(x).mean((0, 1, 2))
    assert float(spread[4:].mean()) > 2 * float(spread[:4].mean())


# -- memory --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_addresses_are_shares_and_sparse():
    torch.manual_seed(0)
    memory = Memory(items=50, size=6)
    read, address = memory(torch.randn(40, 3, 6))
    assert torch.allclose(address.sum(-1), torch.ones(40, 3), atol=1e-5)
    assert bool((address >= 0).all())
    kept = (address > 0).float().sum(-1)
    assert float(kept.mean()) < 25
    assert float(kept.min()) >= 1
    assert torch.allclose(read, address @ memory.items)
    # What is an item itself is read as itself, when addresses are sharp; the entropy falls towards 0.
    with torch.no_grad():
        memory.log_sharpness.fill_(math.log(500.0))
    again, sharp = memory(memory.items)
    assert torch.allclose(again, memory.items, atol=1e-3)
    assert bool((address_entropy(sharp) < 1e-3).all())
    assert float(address_entropy(address).min()) > 0.1
    # Where all items are alike, all are kept.
    with torch.no_grad():
        memory.items.fill_(1.0)
    assert torch.allclose(memory.address(torch.randn(2, 6)), torch.full((2, 50), 0.02), atol=1e-5)


def test_entropy_of_an_address_is_that_of_its_shares():
    even = torch.full((2, 4), 0.25)
    assert torch.allclose(address_entropy(even), torch.full((2,), math.log(4.0)))
    maps = torch.stack([torch.eye(4), even.expand(2, 4).repeat(2, 1)])
    assert torch.allclose(address_entropy(maps), torch.tensor([0.0, math.log(4.0)]), atol=1e-5)


def test_a_memory_has_nothing_to_say_of_what_it_has_not_seen():
    x = scans(48, (8, 8))
    plain, memory = autoencoder(latent=6), autoencoder(latent=6, memory=48)
    for model in (plain, memory):
        model.initialise(Batch(x))
    with torch.no_grad():
        memory.memory.log_sharpness.fill_(math.log(200.0))
    strange = x.clone()
    strange[:, :, :4] = 1 - strange[:, :, :4]
    known, odd = ((memory.reconstruct(a) - a).square().mean() for a in (x, strange))
    assert float(odd) > 4 * float(known)
    # Any code at all is read as a mixture of those kept.
    wild = 50 * torch.randn(4, 6, 1, 1)
    read, free = (model.decode(wild).mean.detach() for model in (memory, plain))
    assert float(read.max()) < 2 < float(free.max())


# -- health --------------------------------------------------------------------------------------------


def test_units_that_say_nothing_are_counted():
    x = scans(40, (8, 8))
    model = autoencoder(latent=4, memory=200)
    model.initialise(Batch(x))
    told = model.health([Batch(x[:25]), Batch(x[25:])])
    assert (told["active_units"], told["units"]) == (4, 4)
    assert 0 < told["memory_used"] <= told["memory"] == 200
    with torch.no_grad():
        model.linear_in.weight[1:3] *= 1e-3
    assert model.health([Batch(x)])["active_units"] == 2
    with torch.no_grad():
        model.linear_in.weight.zero_()
    assert model.health([Batch(x)])["active_units"] == 0
    assert autoencoder(noise=0.1, skips=True).health([Batch(x)]) == {}
