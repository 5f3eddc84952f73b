"""What flows make of their input: grey levels, conditions, images beside, sizes, values that make no sense."""

import copy
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import affine_transform

from medgen.data.dataset import Batch
from medgen.data.motion import RandMove
from medgen.errors import CapabilityError, DataError
from medgen.models import build, config_of, family
from medgen.models.base import Model
from medgen.nets.conditioner import Conditioner
from medgen.nets.haar import haar
from medgen.prob.bijections import Coupling, Mix
from medgen.seeds import voxel_uniform

FLOW = {"kind": "flow", "shape": (8, 16), "width": 8, "steps": 2, "levels": 2}
PYRAMID = {"kind": "pyramidflow", "shape": (16, 24), "width": 8, "steps": 2, "levels": 2, "position": 3}
VOLUME = {"shape": (8, 8, 16), "levels": 1}
BOTH = pytest.mark.parametrize("values", [FLOW, PYRAMID, FLOW | VOLUME, PYRAMID | VOLUME], ids=lambda v: v["kind"])
AGE = {"name": "age", "mean": 50.0, "sd": 10.0}
# Everything a flow may be told, in numbers that are all different.
TOLD = {"channels": 3, "classes": ("calm", "stormy"), "covariates": (AGE,), "context": 2}


def batch_for(model: Model, n: int = 4, seed: int = 0, shape: tuple[int, ...] | None = None) -> Batch:
    """Random scans and random answers to all that the model is told."""
    generator = torch.Generator().manual_seed(seed)
    config, space = model.config, shape or model.config.shape
    cond = torch.rand(n, config.condition_width, generator=generator) if config.condition_width else None
    context = torch.rand(n, config.context, *space, generator=generator) if config.context else None
    return Batch(torch.rand(n, config.channels, *space, generator=generator), cond, context)


def stirred(values: dict, amount: float = 0.1) -> Model:
    """A model away from its start, where couplings do something."""
    torch.manual_seed(0)
    model = build(config_of(values)).eval()
    with torch.no_grad():
        model.initialise(batch_for(model))
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape)
    return model


def with_weights_of(model: Model, **changes: object) -> Model:
    other = build(model.config.model_copy(update=changes)).eval()
    other.load_state_dict(model.state_dict())
    return other


def loss_of(model: Model, batch: Batch) -> torch.Tensor:
    """All players' loss, with the same noise every time."""
    torch.manual_seed(1)
    return torch.stack([model(batch, player.name).total.mean() for player in model.players()]).sum()


# -- grey levels -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bits", [1, 8, 12])
def test_the_density_is_told_per_grey_level(values, bits):
    model = stirred(values | {"bits": bits})
    x = batch_for(model).x
    levels = (x * (2**bits - 1)).round()
    filled = (levels + voxel_uniform(tuple(x.shape[2:]), seed=0)) / 2**bits
    told = with_weights_of(model, bits=0).log_prob(filled) - x[0].numel() * bits * math.log(2)
    assert torch.allclose(model.log_prob(x), told, rtol=1e-4)
    assert torch.equal(model.log_prob(levels / (2**bits - 1)), model.log_prob(x))


@pytest.mark.parametrize("coupling", ["additive", "affine", "spline"])
@pytest.mark.parametrize("bits", [1, 8])
def test_grey_levels_come_back_exactly(coupling, bits):
    model = stirred(FLOW | {"coupling": coupling, "bits": bits, "channels": 2, "position": 3}, 0.03)
    levels = torch.randint(0, 2**bits, (4, 2, 8, 16))
    x = levels / (2**bits - 1)
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x).mean).mean, x)


@BOTH
@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_scans_have_a_finite_loss_gradient_and_density(values, bits, value):
    torch.manual_seed(0)
    model = build(config_of(values | {"bits": bits}))
    batch = Batch(torch.full((3, 1, *model.config.shape), value))
    model.initialise(batch)
    loss = loss_of(model, batch)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert bool(torch.isfinite(model.log_prob(batch.x)).all())
    assert bool(torch.isfinite(model.sample(1, seed=0)).all())


@BOTH
def test_values_beyond_the_range_count_as_its_ends_and_what_is_no_number_stays_none(values):
    model = stirred(values)
    x = batch_for(model).x
    x[1].flatten()[5], x[2].flatten()[7] = -3.0, torch.inf
    expected = model.log_prob(x.clamp(0, 1))
    assert torch.equal(model.log_prob(x), expected)
    x[3].flatten()[9] = torch.nan
    found = model.log_prob(x)
    assert torch.allclose(found[:3], expected[:3], rtol=1e-5)
    assert bool(found[3].isnan())


@pytest.mark.parametrize("learned", [False, True])
def test_a_flow_says_which_of_density_and_bound_it_has(learned):
    model = stirred(FLOW | {"dequantisation": "variational" if learned else "uniform"})
    x = batch_for(model).x
    has, has_not = (model.elbo, model.log_prob) if learned else (model.log_prob, model.elbo)
    with pytest.raises(CapabilityError, match="ask for"):
        has_not(x)
    assert torch.allclose(model.log_prob_map(x).flatten(1).sum(1), has(x), rtol=1e-5)
    assert ("bounds_density" in model.abilities(model.config)) is learned
    assert ("scores_density" in model.abilities(model.config)) is not learned


def test_learned_noise_bounds_the_truth_and_comes_closer_than_uniform_noise():
    # Black or white voxels, independent, nine in ten white: the entropy is known.
    x = (torch.rand(256, 1, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.9).float()
    white = float(x.mean())
    truth = 4 * (white * math.log(white) + (1 - white) * math.log(1 - white))
    torch.manual_seed(0)
    values = FLOW | {"shape": (2, 2), "levels": 1, "steps": 1, "bits": 1}
    model = build(config_of(values | {"dequantisation": "variational"}))
    model.initialise(Batch(x))
    uniform = build(config_of(values))
    uniform.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("noise.")})

    def bound(one: Model) -> float:
        with torch.no_grad():
            return -float(torch.stack([one(Batch(x)).total.mean() for _ in range(8)]).mean())

    # The same density of the filled-in scans: only the noise between grey levels is learned.
    optimizer = torch.optim.Adam(model.noise.parameters(), lr=3e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(Batch(x)).total.mean().backward()
        optimizer.step()
    assert bound(uniform) + 0.3 < bound(model) < truth


# -- conditions, images beside, channels -----------------------------------------------------------


@BOTH
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_each_thing_told_of_a_scan_changes_its_density_its_loss_and_its_sample_alone(values, memory):
    model = stirred(values | TOLD | {"bits": 0, "memory": memory})
    batch = batch_for(model, 3)

    def shown(b: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        losses = torch.stack([model(b, player.name).total.detach() for player in model.players()]).sum(0)
        return model.log_prob(b.x, b.cond, b.context), losses, model.sample(3, seed=0, cond=b.cond, context=b.context)

    before = shown(batch)
    for what, place in (("cond", (1, 0)), ("cond", (1, 2)), ("context", (1, 0)), ("context", (1, 1))):
        changed = copy.deepcopy(batch)
        getattr(changed, what)[place] += 1
        for one, other in zip(before, shown(changed), strict=True):
            assert torch.allclose(one[[0, 2]], other[[0, 2]], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(one[1], other[1], rtol=1e-4, atol=1e-4), (what, place)


@BOTH
def test_a_class_index_says_what_its_row_says(values):
    model = stirred(values | {"classes": ("calm", "stormy", "windy")})
    x = batch_for(model, 3).x
    rows = torch.eye(3)[[2, 0, 1]]
    assert torch.allclose(model.log_prob(x, torch.tensor([2, 0, 1])), model.log_prob(x, rows), rtol=1e-6)


@pytest.mark.parametrize("spacing", [(), (1.0, 4.0)])
def test_tiles_agree_with_everything_told_and_axes_of_unlike_spacing(spacing):
    model = stirred(PYRAMID | TOLD | {"tile": 5, "bits": 0, "spacing": spacing}, 0.05)
    whole = with_weights_of(model, tile=256)
    batch = batch_for(model, 2, shape=(40, 32))
    x, cond, context = batch.x, batch.cond, batch.context
    for one, other in zip(*(m.log_prob_maps(x, cond, context) for m in (model, whole)), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    told = {"cond": cond, "context": context, "shape": (40, 32)}
    one, other = (m.sample(2, seed=3, **told) for m in (model, whole))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 2])
def test_any_number_of_scales_is_sharpened_with_what_is_told(levels):
    model = stirred(PYRAMID | TOLD | {"bits": 0}, 0.05)
    batch = batch_for(model, 2)
    told = {"cond": batch.cond, "context": batch.context}
    x = coarse = model.sample(2, seed=5, **told)
    for _ in range(levels):
        coarse = haar(coarse, (2, 2))[0]
    assert torch.allclose(model.sharpen(coarse, seed=5, levels=levels, **told), x, atol=1e-4)
    with pytest.raises(CapabilityError, match="1 to 2 scales"):
        model.sharpen(coarse, seed=5, levels=3, **told)
    with pytest.raises(DataError, match="context"):
        model.sharpen(coarse, seed=5, levels=levels, cond=batch.cond)


def test_sharpened_grey_levels_average_to_the_coarse_scan():
    model = stirred(PYRAMID | {"bits": 8, "temperature": 0.05}, 0.02)
    coarse = torch.rand(3, 1, 8, 12) * 0.2 + 0.4
    drawn = model.sharpen(coarse, seed=0)
    assert torch.equal(drawn, (drawn * 255).round() / 255)
    # Every grey level is cut down from somewhere within its step, on average from its middle.
    assert float((haar(drawn, (2, 2))[0] - coarse).mean().abs()) < 0.1 / 255


@BOTH
def test_an_image_that_belongs_beside_the_scan_must_be_there_and_fit(values):
    model = stirred(values | {"context": 2})
    batch = batch_for(model)
    player = model.players()[0].name
    with pytest.raises(DataError, match="context"):
        model.sample(4, seed=0, context=batch.context[..., :-1])
    for wrong in (None, batch.context[:, :1]):
        with pytest.raises(DataError, match="context"):
            model.log_prob(batch.x, None, wrong)
        with pytest.raises(DataError, match="context"):
            model(Batch(batch.x, None, wrong), player)
        with pytest.raises(DataError, match="context"):
            model.sample(4, seed=0, context=wrong)
    with pytest.raises(DataError, match="no image as context"):
        stirred(values).log_prob(batch.x, None, batch.context)


# -- sizes and configs -----------------------------------------------------------------------------


@pytest.mark.parametrize("values", [FLOW, FLOW | {"position": 3}, PYRAMID], ids=["flow", "place", "pyramid"])
def test_scans_of_an_odd_size_are_refused(values):
    model = stirred(values)
    with pytest.raises(DataError, match=r"\(1, 9, 17\)|\(9, 17\)"):
        model.log_prob(torch.rand(1, 1, 9, 17))


@pytest.mark.parametrize("kind", ["flow", "pyramidflow"])
@pytest.mark.parametrize(("spacing", "levels"), [((), 3), ((1.0, 1.0, 5.0), 3), ((4.0, 1.0, 2.0), 2), ((1.0, 1.0), 1)])
def test_scans_of_the_stated_stride_fit_and_those_with_a_voxel_more_do_not(kind, spacing, levels):
    stride = family(kind).stride({"spacing": spacing, "levels": levels})
    shape = stride if spacing else (stride,) * 2
    config = config_of({"kind": kind, "spacing": spacing, "levels": levels, "shape": shape})
    assert build(config).sample(1, seed=0).shape == (1, 1, *shape)
    with pytest.raises(ValidationError, match="divisible"):
        config_of({"kind": kind, "spacing": spacing, "levels": levels, "shape": (*shape[:-1], shape[-1] + 1)})


def test_a_flow_without_squeezes_fits_every_size():
    assert family("flow").stride({"levels": 0, "spacing": (1.0, 2.0)}) == 1
    model = stirred({"kind": "flow", "shape": (3, 5), "channels": 2, "levels": 0, "width": 4, "steps": 1, "bits": 0})
    x = batch_for(model).x
    assert torch.allclose(model.decode(model.encode(x).mean).mean, x, atol=1e-5)


WRONG = [
    (FLOW | {"shape": (8, 15)}, "divisible"),
    (FLOW | {"levels": 16}, "divisible"),
    (FLOW | {"shape": (1, 1)}, "one channel"),
    (FLOW | {"shape": (1, 1), "channels": 3, "levels": 3}, "one channel"),
    (FLOW | {"levels": 0}, "one channel"),
    (FLOW | {"kernels": (2, 1, 3)}, "odd"),
    (FLOW | {"spacing": (1.0,)}, "spacing"),
    (FLOW | {"spacing": (1.0, 0.0)}, "spacing"),
    (FLOW | {"bits": 17}, "less than or equal"),
    (FLOW | {"bits": 0, "dequantisation": "variational"}, "grey levels"),
    (PYRAMID | {"shape": (1, 1)}, "halved"),
    (PYRAMID | {"shape": (16, 20)}, "divisible"),
    (PYRAMID | {"levels": 12}, "divisible"),
    (PYRAMID | {"steps": 16, "patch": 32}, "no core"),
    (PYRAMID | {"coupling": "additive"}, "affine"),
    ({"kind": "vae", "shape": (8, 8), "code": "map", "latent": 1, "prior": {}}, "latent must be 2"),
    ({"kind": "vae", "shape": (8, 8), "free_bits": 0.1, "prior": {}}, "free_bits"),
]


@pytest.mark.parametrize(("values", "says"), WRONG)
def test_configs_that_cannot_work_are_refused(values, says):
    with pytest.raises(ValidationError, match=says):
        config_of(values)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (16, 16, 1), (1, 16, 8)])
@pytest.mark.parametrize("kind", ["flow", "pyramidflow"])
def test_single_voxel_axes_are_left_alone(kind, shape):
    model = stirred({"kind": kind, "shape": shape, "levels": 2, "width": 8, "steps": 2, "bits": 0}, 0.05)
    x = model.sample(2, seed=0)
    assert x.shape == (2, 1, *shape)
    assert bool(torch.isfinite(model.log_prob(x)).all())
    loss_of(model, batch_for(model)).backward()


# -- where training starts -------------------------------------------------------------------------


@pytest.mark.parametrize("values", [FLOW, PYRAMID | {"position": 0}, PYRAMID], ids=["flow", "nowhere", "pyramid"])
def test_one_scan_is_enough_to_start_from(values):
    values = values | {"shape": (8, 8)}
    torch.manual_seed(0)
    model = build(config_of(values))
    batch = batch_for(model, 1)
    before = torch.get_rng_state()
    model.initialise(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert math.isfinite(float(loss_of(model, batch).detach()))


def test_at_the_start_channels_are_standard_normal():
    x = torch.randn(16, 3, 8, 8) * torch.tensor([0.1, 1, 7])[:, None, None] + torch.tensor([5.0, 0, -3])[:, None, None]
    mix = Mix(3, "conv")
    mix.initialise(x)
    rows = mix(x)[0].detach().movedim(1, 0).flatten(1)
    assert torch.allclose(rows.mean(1), torch.zeros(3), atol=1e-4)
    assert torch.allclose(rows.square().mean(1).sum(), torch.tensor(3.0), rtol=1e-2)  # a rotation keeps the sum


def test_a_pyramid_starts_from_patches_however_large_the_scans():
    model = build(config_of(PYRAMID | {"shape": (128, 64), "patch": 16}))
    sizes = []
    for module in model.modules():
        if isinstance(module, Conditioner):
            module.register_forward_hook(lambda _, given, __: sizes.append(max(given[0].shape[2:])))
    model.initialise(batch_for(model))
    assert max(sizes) == 16


@pytest.mark.parametrize("latent", [8, 40])
def test_codes_that_tell_nothing_do_not_upset_a_flow_prior(latent):
    torch.manual_seed(0)
    values = {"kind": "vae", "shape": (8, 8), "code": "map", "latent": latent, "width": 8, "prior": {"width": 8}}
    model = build(config_of(values))
    batch = Batch(torch.rand(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous())
    model.initialise(batch)
    # A nat or two for each number of the code, at most.
    assert float(model(batch).terms["rate"].detach().max()) < 3 * math.prod(model.config.code_shape)
    before = torch.get_rng_state()
    model.elbo(batch.x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("classes", [(), ("calm", "stormy")])
def test_a_code_of_one_number_may_have_a_flow_prior(classes):
    torch.manual_seed(0)
    values = {"kind": "vae", "shape": (8, 8), "latent": 1, "width": 8, "classes": classes, "prior": {"width": 8}}
    model = build(config_of(values))
    cond = torch.tensor([0, 1, 1]) if classes else None
    model(Batch(torch.rand(3, 1, 8, 8), cond)).total.mean().backward()
    assert bool(torch.isfinite(model.sample(3, seed=0, cond=cond)).all())


# -- rebuilding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [FLOW | {"coupling": "spline"}, PYRAMID], ids=lambda v: v["kind"])
def test_rebuilding_takes_frozen_weights_copies_and_a_second_pass_but_no_second_derivative(values):
    model = stirred(values | TOLD | {"memory": "recompute"})
    batch = batch_for(model)
    loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, 2 * gradient, rtol=1e-3, atol=1e-4)
    other = copy.deepcopy(model).requires_grad_(False)
    trained = [name for name, _ in model.named_parameters()][::2]
    for name in trained:
        other.get_parameter(name).requires_grad_().grad = None
    loss_of(other, batch).backward()
    for name, parameter in other.named_parameters():
        if name in trained and name in expected:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)
    weights = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss_of(model, batch), weights, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first if g is not None).backward()


@pytest.mark.parametrize("values", [FLOW, PYRAMID], ids=lambda v: v["kind"])
def test_without_gradients_rebuilding_changes_nothing(values):
    model = stirred(values)
    batch = batch_for(model)
    with torch.no_grad():
        assert torch.equal(loss_of(model, batch), loss_of(with_weights_of(model, memory="recompute"), batch))


# -- numbers ---------------------------------------------------------------------------------------


def test_an_extreme_spline_still_has_an_inverse():
    network = Conditioner(2, 1, 23 * 100, 4)
    coupling = Coupling(network, keep=1, kind="spline")
    torch.nn.init.normal_(network.last.bias, std=30, generator=torch.Generator().manual_seed(0))
    x = 12 * torch.rand(1, 101, 20, 20, generator=torch.Generator().manual_seed(1)) - 6
    y, ladj = coupling(x)
    back = coupling.inverse(y)
    assert all(bool(torch.isfinite(t).all()) for t in (y, ladj, back))
    assert torch.equal(back[x.abs() > 5.01], x[x.abs() > 5.01])


def test_noise_is_the_same_in_volumes_that_are_made_piece_by_piece():
    whole = voxel_uniform((40, 70, 300), seed=5, channels=2)
    assert torch.equal(
        voxel_uniform((12, 5, 7), seed=5, origin=(19, 60, 290), channels=2), whole[:, 19:31, 60:65, 290:297]
    )
    assert abs(float(whole.mean()) - 0.5) < 0.002
    # What a seed means never changes.
    assert voxel_uniform((3,), seed=0).tolist()[0] == pytest.approx([0.5799914, 0.05754143, 0.8651915])
    assert voxel_uniform((1, 1, 1), seed=7, origin=(3, 2, 1)).item() == pytest.approx(0.02833742)


@pytest.mark.parametrize("shape", [(12, 20, 31), (1, 16, 16)])
def test_random_motion_is_the_affine_map_it_drew(shape):
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij")
    x = np.exp(-6 * sum((axis - 0.2) ** 2 for axis in axes)).astype(np.float32)
    step = RandMove(1.0, rotate=0.4, shift=3, scale=0.2)
    step.set_random_state(seed=3)
    moved = step(torch.from_numpy(x)[None])[0].numpy()
    step.set_random_state(seed=3)
    step.randomize(3)
    turn, shift, centre = step._matrix[:, :3], step._matrix[:, 3], (np.array(shape) - 1) / 2
    expected = affine_transform(x, turn, offset=centre + shift - turn @ centre, order=1, mode="nearest")
    assert np.allclose(moved, expected, atol=1e-5)
    assert not np.allclose(moved, x, atol=0.1)


# -- accelerators ----------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_an_accelerator_says_what_the_cpu_says(values, memory):
    model = stirred(values | TOLD | {"memory": memory, "bits": 0}, 0.05)
    batch = batch_for(model)
    expected = model.log_prob(batch.x, batch.cond, batch.context)
    drawn = model.sample(2, seed=0, cond=batch.cond, context=batch.context)
    model.cuda()
    moved = batch.to("cuda")
    found = model.log_prob(moved.x, moved.cond, moved.context)
    assert torch.allclose(found.cpu(), expected, rtol=1e-3)
    assert torch.allclose(model.sample(2, seed=0, cond=batch.cond, context=batch.context).cpu(), drawn, atol=1e-2)
    model.initialise(moved)
    loss_of(model, moved).backward()
