"""What flows promise beyond every model: exact inverses, exact densities, tiles that agree, memory that stays flat."""

import itertools
import math

import pytest
import torch

from medgen.data.dataset import Batch
from medgen.errors import DataError
from medgen.models import build, config_of
from medgen.models.base import Model
from medgen.nets.blocks import squeezes
from medgen.nets.haar import haar, haar_ladj, unhaar
from medgen.nets.windows import drawn_window, tiles
from medgen.seeds import voxel_normal, voxel_uniform

COUPLINGS = ["additive", "affine", "spline"]


def stirred(values: dict, amount: float = 0.1, seed: int = 0) -> Model:
    """A model away from its start, where couplings do something."""
    torch.manual_seed(seed)
    model = build(config_of(values)).eval()
    with torch.no_grad():
        model.initialise(Batch(scans(4, model)))
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape)
    return model


def scans(n: int, model: Model, shape: tuple[int, ...] | None = None, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, model.config.channels, *(shape or model.config.shape), generator=generator)


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("mixing", ["conv", "permutation"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
def test_a_flow_gives_back_its_scan_and_its_density_is_autograds(coupling, mixing, shape):
    values = {"kind": "flow", "coupling": coupling, "mixing": mixing, "shape": shape, "bits": 0, "width": 6}
    model = stirred(values | {"steps": 2, "levels": 1, "position": 2}).double()
    x = scans(1, model).double()
    with torch.no_grad():
        assert float((model.from_noise(model.to_noise(x)[0]) - x).abs().max()) < 1e-10
    jacobian = torch.autograd.functional.jacobian(lambda v: model.encode(v).mean[0], x).reshape(x.numel(), -1)
    z = model.encode(x).mean[0].detach()
    expected = torch.linalg.slogdet(jacobian)[1] - 0.5 * z.square().sum() - 0.5 * z.numel() * math.log(2 * math.pi)
    assert float(model.log_prob(x)[0]) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("shape", [(16, 24), (8, 16, 16)])
def test_in_single_precision_a_flow_still_gives_back_its_scan(coupling, shape):
    model = stirred({"kind": "flow", "coupling": coupling, "shape": shape, "steps": 6, "levels": 2, "width": 16}, 0.02)
    x = scans(2, model)
    with torch.no_grad():
        assert float((model.from_noise(model.to_noise(x)[0]) - x).abs().max()) < 1e-4


@pytest.mark.parametrize("spacing", [(), (1.0, 4.0)])
def test_a_pyramid_flows_density_is_autograds(spacing):
    values = {"kind": "pyramidflow", "shape": (8, 4), "bits": 0, "width": 6, "steps": 2, "levels": 1, "position": 3}
    model = stirred(values | {"spacing": spacing}).double()
    x = scans(1, model).double()

    def noise(v: torch.Tensor) -> torch.Tensor:
        parts = []
        for number, level in enumerate(model.levels):
            details, coarse, _ = model._at(v, None, number)
            space = tuple(details.shape[2:])
            parts.append(level(details, coarse, None, None, level.guide.place((0, 0), space, space))[0].flatten())
        return torch.cat(parts)

    jacobian = torch.autograd.functional.jacobian(noise, x).reshape(x.numel(), -1)
    z = noise(x).detach()
    expected = torch.linalg.slogdet(jacobian)[1] - 0.5 * z.square().sum() - 0.5 * z.numel() * math.log(2 * math.pi)
    assert float(model.log_prob(x)[0]) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("factors", [(2, 2), (2, 1), (2, 2, 2), (1, 2, 2)])
def test_the_haar_pyramid_turns_back_and_knows_how_much_it_stretches(factors):
    shape = tuple(2 * factor for factor in factors)
    x = torch.rand(2, 3, *shape, dtype=torch.float64)
    coarse, details = haar(x, factors)
    assert torch.allclose(unhaar(coarse, details, factors), x, atol=1e-12)
    pool = torch.nn.functional.avg_pool2d if len(factors) == 2 else torch.nn.functional.avg_pool3d
    assert torch.allclose(coarse, pool(x, factors), atol=1e-12)

    def bands(v: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in haar(v[None], factors)])

    jacobian = torch.autograd.functional.jacobian(bands, x[0]).reshape(x[0].numel(), -1)
    blocks = math.prod(n // factor for n, factor in zip(shape, factors, strict=True))
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(blocks * haar_ladj(3, factors))


def test_coarse_axes_are_squeezed_later_and_single_slices_never():
    assert squeezes((1.0, 1.0, 5.0), 3, (False,) * 3) == ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    assert squeezes((1.0, 1.0, 1.0), 2, (False, False, True)) == ((2, 2, 1), (2, 2, 1))


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "pyramidflow"])
@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_rebuilding_activations_gives_the_gradients_of_storing_them(kind, coupling):
    values = {"kind": kind, "shape": (8, 8, 8), "coupling": coupling, "steps": 3, "levels": 1, "width": 8}
    stored, rebuilt = (stirred(values | {"memory": memory}, 0.05) for memory in ("store", "recompute"))
    batch = Batch(scans(2, stored))
    for model in (stored, rebuilt):
        for player in model.players():
            torch.manual_seed(0)
            (model(batch, player.name).total.mean() / batch.x[0].numel()).backward()
    for one, other in zip(stored.parameters(), rebuilt.parameters(), strict=True):
        scale = float(one.grad.abs().max())
        assert float((one.grad - other.grad).abs().max()) <= 1e-5 * max(1.0, scale)


# -- tiles -----------------------------------------------------------------------------------------


def test_tiles_cover_everything_once():
    count = torch.zeros(1, 1, 11, 7)
    for window in tiles((11, 7), 4, 2):
        count[window.core_in_whole] += 1
        assert all(o >= 0 and o + n <= t for o, n, t in zip(window.origin, window.size, (11, 7), strict=True))
    assert bool((count == 1).all())


@pytest.mark.parametrize("shape", [(32, 48), (16, 16, 32)])
def test_scoring_by_tiles_is_scoring_the_whole(shape):
    values = {"kind": "pyramidflow", "shape": tuple(n // 2 for n in shape), "steps": 2, "levels": 1, "width": 8}
    model = stirred(values | {"tile": 4}, 0.05)
    whole = build(model.config.model_copy(update={"tile": 64})).eval()
    whole.load_state_dict(model.state_dict())
    x = scans(1, model, shape)
    assert torch.allclose(model.log_prob_map(x), whole.log_prob_map(x), atol=1e-4)
    for one, other in zip(model.log_prob_maps(x), whole.log_prob_maps(x), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert torch.allclose(model.log_prob_map(x).sum(), model.log_prob(x)[0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(32, 48), (16, 16, 32)])
def test_sampling_by_tiles_is_sampling_the_whole(shape):
    values = {"kind": "pyramidflow", "shape": tuple(n // 2 for n in shape), "steps": 2, "levels": 1, "width": 8}
    model = stirred(values | {"tile": 4, "bits": 0}, 0.05)
    whole = build(model.config.model_copy(update={"tile": 64})).eval()
    whole.load_state_dict(model.state_dict())
    one, other = (m.sample(1, seed=3, shape=shape) for m in (model, whole))
    assert one.shape == (1, 1, *shape)
    assert torch.allclose(one, other, atol=1e-4)


def test_a_sample_sharpened_from_its_own_coarse_version_with_its_own_noise_is_itself():
    model = stirred({"kind": "pyramidflow", "shape": (16, 16), "steps": 2, "levels": 2, "width": 8, "bits": 0}, 0.05)
    x = model.sample(1, seed=5)
    coarse = haar(x, (2, 2))[0]
    assert torch.allclose(model.sharpen(coarse, seed=5), x, atol=1e-4)
    drawn = model.sharpen(coarse, seed=6)
    assert torch.allclose(haar(drawn, (2, 2))[0], coarse, atol=1e-5)
    assert not torch.allclose(drawn, x, atol=1e-2)


def test_the_loss_on_patches_is_on_average_that_of_the_whole_scan():
    n, count, reach = 23, 12, 3
    total = torch.zeros(n)
    torch.manual_seed(0)
    draws = 1500
    for _ in range(draws):
        window, weights = drawn_window((n,), (count,), reach)
        first, last = window.core[0]
        assert first == 0 or first - window.origin[0] >= reach
        assert last == n or window.origin[0] + count - last >= reach
        total[window.origin[0] : window.origin[0] + count] += weights[0]
    assert torch.allclose(total / draws, torch.ones(n), atol=0.2)


def test_patches_estimate_the_density_without_bias():
    values = {"kind": "pyramidflow", "shape": (64, 64), "steps": 2, "levels": 1, "width": 8, "patch": 16}
    model = stirred(values, 0.05)
    batch = Batch(scans(1, model))
    exact = -model.log_prob(batch.x)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        found = torch.stack([sum(model(batch, p.name).total[0] for p in model.players()) for _ in range(150)])
    error = found.std() / len(found) ** 0.5
    assert float((found.mean() - exact).abs()) < 4 * float(error) + 1e-3 * float(exact.abs())


def test_a_size_that_does_not_fit_is_refused():
    model = stirred({"kind": "pyramidflow", "shape": (16, 16), "steps": 1, "levels": 1, "width": 4})
    with pytest.raises(DataError, match="divisible by"):
        model.log_prob(torch.rand(1, 1, 18, 16))
    with pytest.raises(DataError, match="divisible by"):
        model.sample(1, seed=0, shape=(18, 16))


# -- noise -----------------------------------------------------------------------------------------


def test_noise_belongs_to_the_voxel_and_not_to_the_tile():
    whole = voxel_normal((9, 10, 11), seed=3, channels=2)
    part = voxel_normal((3, 4, 5), seed=3, origin=(2, 6, 1), channels=2)
    assert torch.equal(part, whole[:, 2:5, 6:10, 1:6])
    assert not torch.equal(whole, voxel_normal((9, 10, 11), seed=4, channels=2))


def test_noise_is_standard_normal_and_neighbours_know_nothing_of_each_other():
    noise = torch.stack([voxel_normal((48, 48, 48), seed=s)[0] for s in range(8)])
    assert float(noise.mean().abs()) < 0.005
    assert float(noise.std() - 1) == pytest.approx(0, abs=0.005)
    for axis, step in itertools.product((1, 2, 3), (1, 2, 4, 16)):
        assert float((noise * noise.roll(step, axis)).mean().abs()) < 0.005
    assert float((noise[0] * noise[1]).mean().abs()) < 0.015
    uniform = voxel_uniform((64, 64), seed=0)
    assert float(uniform.min()) > 0
    assert float(uniform.max()) < 1
