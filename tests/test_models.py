"""What every family promises, in two and three dimensions, and what each paper adds."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from pydantic import ValidationError

from medgen.config import load_preset, preset_names
from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, ConfigError
from medgen.models import FAMILIES, build, config_of, family
from medgen.models import abilities as abilities_of
from medgen.models.base import Loss, Model

# The method that belongs to each ability.
METHODS = {
    "samples": "sample",
    "encodes": "encode",
    "decodes": "decode",
    "reconstructs": "reconstruct",
    "scores_density": "log_prob",
    "estimates_density": "log_prob_estimate",
    "bounds_density": "elbo",
    "maps_density": "log_prob_map",
    "restores": "restore",
    "translates": "translate",
    "classifies": "class_log_prob",
    "inpaints": "inpaint",
    "marks": "mark",
    "perceives": "perceive",
}
PROTOCOLS = {"samples": "Samples", "encodes": "Encodes", "decodes": "Decodes", "reconstructs": "Reconstructs"}
# Batch, widths, channels and axes all differ, so that no two can be mixed up.
BATCH, CLASSES = 3, ("calm", "stormy", "windy", "foggy")


def minimal(values: dict, dims: int, channels: int, classes: tuple[str, ...]) -> dict:
    """A small config of the same family: narrow, and two different axes that suit its stride."""
    stride = family(values["kind"]).stride(values)
    # Two voxels or more along each axis: what is masked has something before it.
    least = max(2, stride)
    space = (2 * stride, 4 * stride) if dims == 2 else (least, 2 * stride, 2 * least)
    fields = family(values["kind"]).Config.model_fields
    small = {"width": 8, "latent": 4, "depth": 1}
    small |= {"draws": 4, "steps": 20, "voxels": 400} if values["kind"] == "segmenter" else {}
    return values | {k: v for k, v in small.items() if k in fields} | {
        "shape": space, "channels": channels, "classes": classes
    }  # fmt: skip


def families() -> list:
    """Every family with its defaults, in 2D and 3D."""
    found = []
    for kind in FAMILIES:
        defaults = {name: field.default for name, field in family(kind).Config.model_fields.items()}
        small = {"levels": 2} if "levels" in defaults else {}
        found += [pytest.param({"kind": kind} | small, dims, id=f"{kind}-{dims}d") for dims in (2, 3)]
    return found


def presets() -> list:
    """Every preset of one model, in its own dimensions."""
    loaded = [(name, load_preset(name)) for name in preset_names()]
    return [pytest.param(dict(one.model), one.about.dims, id=f"preset-{name}") for name, one in loaded if one.model]


def everything(channels: Sequence[int] = (1,)) -> list:
    """Families with every number of channels, with and without classes; presets with one channel and classes."""
    found = []
    for case in families():
        for count, classes in product(channels, ((), CLASSES)):
            told = f"{case.id}-{count}-{'classes' if classes else 'plain'}"
            found.append(pytest.param(*case.values, count, classes, id=told))
    return found + [pytest.param(*case.values, 1, CLASSES, id=case.id) for case in presets()]


FAMILY_AND_DIMS = pytest.mark.parametrize(("values", "dims"), families())
FAMILY_OR_PRESET = pytest.mark.parametrize(("values", "dims"), families() + presets())
EVERYTHING = pytest.mark.parametrize(("values", "dims", "channels", "classes"), everything())
WITH_CHANNELS = pytest.mark.parametrize(("values", "dims", "channels", "classes"), everything((1, 3)))


def scans(n: int, channels: int, space: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Smooth blobs of unequal brightness in [0, 1], a little noise on top."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size) for size in space], indexing="ij")
    where = torch.rand(n, channels, len(space), generator=generator) - 0.5
    distance = sum((axis - where[..., k].reshape(n, channels, *[1] * len(space))) ** 2 for k, axis in enumerate(axes))
    noise = torch.randn(n, channels, *space, generator=generator)
    return (torch.exp(-3 * distance) * 0.8 + 0.1 + 0.02 * noise).clamp(0, 1)


def batch_for(config: object, n: int = BATCH, seed: int = 0) -> Batch:
    cond = torch.arange(n) % len(config.classes) if config.classes else None
    return Batch(scans(n, config.channels, config.shape, seed), cond, given_to(config, n))


def given_to(config: object, n: int) -> torch.Tensor | None:
    """Masks for a family that cannot do without a given image; None for one that can."""
    if not (getattr(config, "context", 0) and config.kind == "gan"):
        return None
    return (scans(32, config.context, config.shape, seed=5)[:n] > 0.25).float()


def drawn(model: Model, n: int, *, seed: int, cond: torch.Tensor | None = None) -> torch.Tensor:
    image = given_to(model.config, n)
    return model.sample(n, seed=seed, cond=cond, **({} if image is None else {"context": image}))


def made(values: dict, dims: int, channels: int = 1, classes: tuple[str, ...] = (), seed: int = 0) -> Model:
    """An initialised model in evaluation mode whose every parameter has left its starting point."""
    torch.manual_seed(seed)
    model = build(config_of(minimal(values, dims, channels, classes)))
    model.initialise(batch_for(model.config, 8))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.finalise([batch_for(model.config, 5), batch_for(model.config, 5, seed=1)])
    return model.eval()


def of(model: Model) -> frozenset[str]:
    return model.abilities(model.config)


def seeded(call: Callable, seed: int = 0) -> object:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call()


# -- the loss --------------------------------------------------------------------------------------


@WITH_CHANNELS
def test_the_loss_is_one_finite_number_a_scan_with_named_terms(values, dims, channels, classes):
    model = made(values, dims, channels, classes).train()
    batch = batch_for(model.config)
    for player in model.players():
        loss = model(batch, player.name)
        assert isinstance(loss, Loss)
        assert loss.total.shape == (BATCH,)
        assert bool(torch.isfinite(loss.total).all())
        assert loss.terms
        assert all(term.shape == (BATCH,) for term in loss.terms.values())


@EVERYTHING
def test_the_loss_reaches_each_of_its_players_parameters(values, dims, channels, classes):
    model = made(values, dims, channels, classes).train()
    for player in model.players():
        model.zero_grad(set_to_none=True)
        model(batch_for(model.config), player.name).total.mean().backward()
        own = {id(parameter) for parameter in player.parameters}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert own <= set(names)
        idle = [
            names[id(p)] for p in player.parameters if p.grad is None or not bool(torch.isfinite(p.grad).all()) or not
            bool(p.grad.abs().max() > 0)
        ]  # fmt: skip
        assert not idle


@FAMILY_OR_PRESET
def test_players_own_all_parameters_and_share_none(values, dims):
    model = made(values, dims)
    owned = [id(parameter) for player in model.players() for parameter in player.parameters]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len({player.name for player in model.players()}) == len(model.players())


@EVERYTHING
def test_the_bound_of_a_scan_does_not_depend_on_the_rest_of_the_batch(values, dims, channels, classes):
    model = made(values, dims, channels, classes)
    batch = batch_for(model.config)
    cond = batch.cond
    for ability, method in (("bounds_density", "elbo"), ("scores_density", "log_prob")):
        if ability in of(model):
            call = getattr(model, method)
            alone = [call(batch.x[i : i + 1], cond[i : i + 1] if classes else None) for i in range(BATCH)]
            assert torch.allclose(call(batch.x, cond), torch.cat(alone), rtol=1e-4, atol=1e-2)


@FAMILY_AND_DIMS
def test_the_loss_falls_on_eight_scans(values, dims):
    torch.manual_seed(0)
    model = build(config_of(minimal(values, dims, 1, ())))
    if not model.players():
        pytest.skip("has a closed form")
    batch = batch_for(model.config, 8)
    model.initialise(batch)
    player = model.players()[0]
    optimizer = torch.optim.AdamW(player.parameters, lr=5e-4)

    def now() -> float:
        return seeded(lambda: float(model(batch, player.name).total.detach().mean()))

    first = now()
    for step in range(30):
        optimizer.zero_grad()
        seeded(lambda: (model(batch, player.name).total.mean() / batch.x[0].numel()).backward(), seed=step)
        optimizer.step()
    last = now()
    assert math.isfinite(first)
    assert math.isfinite(last)
    assert last < first


@FAMILY_AND_DIMS
def test_bfloat16_changes_the_loss_little(values, dims):
    model = made(values, dims)
    batch = batch_for(model.config)
    for player in model.players():
        exact = seeded(lambda name=player.name: model(batch, name).total.detach())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = seeded(lambda name=player.name: model(batch, name).total.detach())
        assert rough.dtype == torch.float32
        assert torch.allclose(rough, exact, rtol=0.05, atol=0.05 * batch.x[0].numel())


# -- abilities -------------------------------------------------------------------------------------


@FAMILY_OR_PRESET
def test_declared_abilities_have_their_method_and_others_have_none(values, dims):
    model = made(values, dims)
    assert of(model) <= set(METHODS)
    for ability, method in METHODS.items():
        if ability not in of(model) and hasattr(model, method):
            # Another config of this family can; this one says in a sentence that it cannot.
            x = batch_for(model.config).x
            given = {"samples": ((2,), {"seed": 0}), "inpaints": ((x, x[:, :1] > 0.5), {"seed": 0})}
            places, names = given.get(ability, ((x,), {}))
            with pytest.raises(CapabilityError):
                getattr(model, method)(*places, **names)
            continue
        assert callable(getattr(model, method, None)) == (ability in of(model)), ability
        if ability in of(model) and ability in PROTOCOLS:
            assert isinstance(model, getattr(abilities_of, PROTOCOLS[ability]))


@WITH_CHANNELS
def test_every_declared_ability_works_and_repeats(values, dims, channels, classes):
    model = made(values, dims, channels, classes)
    batch = batch_for(model.config)
    x, cond = batch.x, batch.cond
    can = of(model)

    def twice(call: Callable) -> torch.Tensor:
        first, second = call(), call()
        assert torch.equal(first, second)
        assert bool(torch.isfinite(first).all())
        return first

    if "samples" in can:
        assert twice(lambda: drawn(model, BATCH, seed=3, cond=cond)).shape == x.shape
    if "reconstructs" in can:
        assert twice(lambda: model.reconstruct(x, cond)).shape == x.shape
    if "encodes" in can:
        posterior = model.encode(x, cond)
        twice(lambda: model.encode(x, cond).mean.detach())
        assert posterior.batch_shape == (BATCH,)
        if "decodes" in can:
            likelihood = model.decode(posterior.mean, cond)
            assert likelihood.mean.shape == x.shape
            assert likelihood.log_prob(x).shape == (BATCH,)
    for ability, method in (("scores_density", "log_prob"), ("bounds_density", "elbo")):
        if ability in can:
            assert twice(lambda method=method: getattr(model, method)(x, cond)).shape == (BATCH,)
    if "estimates_density" in can:
        both = twice(lambda: torch.stack(model.log_prob_estimate(x, cond, seed=2)))
        assert both.shape == (2, BATCH)
        assert bool((both[1] >= 0).all())
    if "maps_density" in can:
        density = twice(lambda: model.log_prob_map(x, cond))
        assert density.shape == (BATCH, 1, *x.shape[2:])
    if "restores" in can:
        assert twice(lambda: model.restore(x, strength=0.5, seed=1)).shape == x.shape
    if "inpaints" in can:
        hole = torch.zeros(BATCH, 1, *x.shape[2:], dtype=torch.bool)
        hole[..., : x.shape[-1] // 2] = True
        filled = twice(lambda: model.inpaint(x, hole, seed=1, cond=cond))
        assert torch.equal(torch.where(hole, 0, filled), torch.where(hole, 0, x))
    if "classifies" in can:
        chances = twice(lambda: model.class_log_prob(x))
        assert torch.allclose(chances.logsumexp(1), torch.zeros(BATCH), atol=1e-4)


@WITH_CHANNELS
def test_sample_i_is_the_same_bytes_however_many_are_drawn(values, dims, channels, classes):
    model = made(values, dims, channels, classes)
    if "samples" not in of(model):
        pytest.skip("does not sample")
    n = 18 if dims == 2 else 3  # beyond one micro-batch
    cond = torch.arange(n) % len(classes) if classes else None
    many = drawn(model, n, seed=7, cond=cond)
    for count in (1, 2, n - 1):
        few = drawn(model, count, seed=7, cond=None if cond is None else cond[:count])
        assert few.numpy().tobytes() == many[:count].numpy().tobytes()
    assert len({scan.numpy().tobytes() for scan in many}) == n
    assert not torch.equal(drawn(model, 2, seed=8, cond=None if cond is None else cond[:2]), many[:2])


@FAMILY_AND_DIMS
def test_sampling_leaves_the_global_random_state_alone(values, dims):
    model = made(values, dims)
    if "samples" not in of(model):
        pytest.skip("does not sample")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn(model, 2, seed=1)
    assert torch.equal(torch.rand(3), expected)


@FAMILY_AND_DIMS
def test_a_sample_shows_its_class(values, dims):
    model = made(values, dims, 1, CLASSES)
    if "samples" not in of(model):
        pytest.skip("does not sample")
    batch = batch_for(model.config, 12)
    # Class 2 is bright, and the model is fitted to that.
    batch.x[batch.cond == 2] = 0.9 + 0.1 * batch.x[batch.cond == 2]
    torch.manual_seed(0)
    fresh = build(model.config)
    fresh.initialise(batch)

    def brighter() -> float:
        fresh.finalise([batch])
        drawn = fresh.eval().sample(16, seed=0, cond=torch.tensor([0, 2] * 8)).flatten(1).mean(1)
        return float(drawn[1::2].mean() - drawn[::2].mean())

    if not fresh.players():
        assert brighter() > 0.1
        return
    optimizer = torch.optim.Adam(fresh.parameters(), lr=1e-2)
    # Some families know it from the start, in closed form; the others may learn it.
    for step in range(120):
        if step % 20 == 0 and brighter() > 0.1:
            return
        optimizer.zero_grad()
        for player in fresh.players():
            seeded(lambda p=player: (fresh(batch, p.name).total.mean() / batch.x[0].numel()).backward(), seed=step)
        torch.nn.utils.clip_grad_norm_(fresh.parameters(), 1.0)
        optimizer.step()
    assert brighter() > 0.1


@FAMILY_AND_DIMS
def test_what_is_computed_of_a_scan_does_not_depend_on_its_place_in_the_batch(values, dims):
    model = made(values, dims)
    x, turned = batch_for(model.config).x, [2, 0, 1]
    if "estimates_density" in of(model):
        expected = torch.stack(model.log_prob_estimate(x))[:, turned]
        assert torch.allclose(torch.stack(model.log_prob_estimate(x[turned])), expected, rtol=1e-3, atol=1e-2)
    for ability, method in (
        ("reconstructs", "reconstruct"),
        ("bounds_density", "elbo"),
        ("scores_density", "log_prob"),
        ("maps_density", "log_prob_map"),
    ):
        if ability in of(model):
            call = getattr(model, method)
            expected = call(x)[turned]
            assert torch.allclose(call(x[turned]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), method


# -- configs and weights ---------------------------------------------------------------------------


@EVERYTHING
def test_weights_and_config_make_the_same_model_again(values, dims, channels, classes):
    model = made(values, dims, channels, classes)
    written = json.dumps(model.config.model_dump(mode="json"))
    config = config_of(json.loads(written))
    assert config == model.config
    other = build(config).eval()
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    batch = batch_for(model.config)
    for player in model.players():
        losses = [seeded(lambda m=m, name=player.name: m(batch, name).total.detach()) for m in (model, other)]
        assert torch.equal(*losses)
    if "samples" in of(model):
        assert torch.equal(drawn(model, 2, seed=1, cond=batch.cond), drawn(other, 2, seed=1, cond=batch.cond))


@FAMILY_OR_PRESET
def test_what_weights_a_config_has_can_be_told_without_memory_for_them(values, dims):
    """Bundles compare names and shapes before anything is built; so configs cannot ask for more than they bring."""
    config = config_of(minimal(values, dims, 1, CLASSES))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in build(config).state_dict().items()}


@FAMILY_AND_DIMS
def test_a_config_refuses_keys_and_shapes_that_make_no_sense(values, dims):
    good = minimal(values, dims, 1, ())
    kind = family(values["kind"])
    assert kind.Config.model_validate(good).dims == dims
    for wrong in ({"colour": 1}, {"shape": (0,) * dims}, {"shape": (16,)}, {"shape": (16,) * 4}, {"channels": 0}):
        with pytest.raises(ValidationError):
            kind.Config.model_validate(good | wrong)
    stride = kind.stride(good)
    if stride > 1:
        with pytest.raises(ValidationError, match="divisible"):
            kind.Config.model_validate(good | {"shape": tuple(n + 1 for n in good["shape"])})


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_what_its_name_says(kind):
    chosen = family(kind)
    assert issubclass(chosen, Model)
    assert chosen.Config.model_fields["kind"].default == kind
    assert set(chosen.abilities(chosen.Config(shape=(64, 64)))) <= set(METHODS)


def test_an_unknown_family_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="Families: "):
        family("crystal-ball")
    with pytest.raises(ConfigError):
        config_of({})


def test_no_two_presets_build_the_same_model():
    built: dict[str, str] = {}
    for name in [name for name in preset_names() if load_preset(name).model]:
        preset = load_preset(name)
        config = config_of(minimal(dict(preset.model), preset.about.dims, 1, ()))
        written = config.model_dump_json()
        assert written not in built, f"{name} is {built[written]}"
        built[written] = name


# -- what the papers add: the variational autoencoder -------------------------------------------------


def vae(**changes: object) -> Model:
    torch.manual_seed(0)
    return build(config_of({"kind": "vae", "shape": (8, 8), "width": 8, "levels": 1, "latent": 3} | changes))


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "bernoulli", "discretised-logistic"])
@pytest.mark.parametrize("code", ["vector", "map"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_likelihood_and_code_starts_well_and_learns(likelihood, code, dims):
    model = vae(likelihood=likelihood, code=code, shape=(8,) * dims)
    batch = batch_for(model.config, 8)
    # What the scans cost once their codes are known; how much the codes cost is for training to settle.
    before = float(seeded(lambda: model(batch).terms["distortion"].detach().mean()))
    model.initialise(batch)
    after = float(seeded(lambda: model(batch).terms["distortion"].detach().mean()))
    assert after < before
    error = (model.reconstruct(batch.x) - batch.x).square().mean()
    assert float(error) < float((batch.x - batch.x.mean(0)).square().mean())


def test_at_the_start_a_vector_code_is_probabilistic_pca():
    model = vae(shape=(6, 10), latent=3)
    x = scans(40, 1, (6, 10))
    model.initialise(Batch(x))
    rows = (x - x.mean(0)).flatten(1).double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / 39)
    top, left = values.flip(0)[:3], values.flip(0)[3:].mean()
    assert bool((top > 2 * left).all())
    directions = vectors.flip(1)[:, :3]
    # Tipping & Bishop 1999: W = U (L - s^2)^(1/2), M = W'W + s^2, E[x | t] = W M^-1 W' (t - m) + m.
    weight = directions * (top - left).sqrt()
    inner = weight.T @ weight + left * torch.eye(3).double()
    expected = rows @ weight @ torch.linalg.inv(inner) @ weight.T
    ours = (model.reconstruct(x) - x.mean(0)).flatten(1).double()
    assert torch.allclose(ours, expected, atol=1e-5)
    posterior = model.encode(x)
    assert torch.allclose(
        posterior.variance.reshape(40, 3).double(), (left * torch.linalg.inv(inner)).diagonal(), rtol=1e-3
    )


def test_the_learned_scale_goes_to_the_reconstruction_error():
    """Rybkin et al. 2021: the best sigma of a Gaussian decoder is the root mean square error."""
    model = vae(latent=2)
    batch = batch_for(model.config, 16)
    model.initialise(batch)
    with torch.no_grad():
        model.slow_log_scale.fill_(0.0)
    optimizer = torch.optim.Adam([model.slow_log_scale], lr=0.01)
    for step in range(200):
        optimizer.zero_grad()
        seeded(lambda: model(batch).total.mean().backward(), seed=step % 4)
        optimizer.step()

    @torch.no_grad()
    def error() -> torch.Tensor:
        draws = [seeded(lambda s=s: model.decode(model.encode(batch.x).rsample()).mean, s) for s in range(4)]
        return torch.stack([(draw - batch.x).square().mean() for draw in draws]).mean().sqrt()

    assert float(model.log_scale.detach().exp()) == pytest.approx(float(error()), rel=0.03)


def test_a_map_code_keeps_place_where_a_vector_cannot():
    """A pattern that no training scan has, in one corner: a map reconstructs it, a vector code does not."""
    x = scans(32, 1, (16, 16))
    models = {code: vae(code=code, shape=(16, 16), latent=4) for code in ("vector", "map")}
    new = scans(4, 1, (16, 16), seed=9)
    new[:, :, 2:6, 2:6] = 1 - new[:, :, 2:6, 2:6]
    errors = {}
    for code, model in models.items():
        model.initialise(Batch(x))
        errors[code] = float((model.reconstruct(new) - new)[:, :, 2:6, 2:6].square().mean())
    assert errors["map"] < 0.5 * errors["vector"]


def test_the_healthy_twin_leaves_healthy_scans_and_drops_what_no_training_scan_has():
    x, new = scans(64, 1, (16, 16)), scans(8, 1, (16, 16), seed=9)
    model = vae(code="map", shape=(16, 16), latent=4)
    model.initialise(Batch(x))
    model.finalise([Batch(x)])
    ill = new.clone()
    ill[:, :, 2:6, 9:13] += 0.5
    mended = model.restore(ill, strength=1.0, seed=0)
    inside, outside = (slice(None), slice(None), slice(2, 6), slice(9, 13)), (slice(None), slice(None), slice(8, 16))
    # The reconstruction still shows the blob; the twin hardly does, and is right elsewhere.
    shown = float((model.reconstruct(ill) - new)[inside].mean())
    assert shown > 0.3
    assert abs(float((mended - new)[inside].mean())) < 0.5 * shown
    assert float((mended - new)[outside].square().mean()) < 0.1 * float((new - new.mean())[outside].square().mean())
    # Strength 0 changes nothing, one half lies between.
    assert torch.allclose(model.restore(ill, strength=0.0, seed=0), model.reconstruct(ill), atol=1e-5)
    half = model.restore(ill, strength=0.5, seed=0)
    assert torch.allclose(half, (mended + model.reconstruct(ill)) / 2, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_code_map_has_one_vector_a_block(dims):
    model = vae(code="map", shape=(8,) * dims, fold=2, levels=1, latent=5)
    assert model.encode(scans(2, 1, (8,) * dims)).event_shape == (5, *(2,) * dims)
    assert vae(shape=(8,) * dims).encode(scans(2, 1, (8,) * dims)).event_shape == (3, *(1,) * dims)


def test_beta_weighs_the_rate_and_free_bits_put_a_floor_under_it():
    batch = Batch(scans(4, 1, (8, 8)))

    def loss(**changes: object) -> Loss:
        model = vae(**changes)
        return seeded(lambda: model(batch))

    plain, heavy, floored = loss(), loss(beta=3.0), loss(free_bits=5.0)
    assert torch.allclose(plain.total, plain.terms["distortion"] + plain.terms["rate"])
    assert torch.allclose(heavy.total - plain.total, 2 * plain.terms["rate"], atol=1e-3)
    assert bool((floored.terms["rate"] >= 3 * 5.0).all())
    # The bound itself knows neither.
    assert torch.equal(vae().elbo(batch.x), vae(beta=3.0, free_bits=5.0).elbo(batch.x))


def test_initialisation_survives_a_single_scan_and_equal_scans():
    for x in (scans(1, 1, (8, 8)), scans(1, 1, (8, 8)).repeat(6, 1, 1, 1), torch.zeros(4, 1, 8, 8)):
        model = vae()
        model.initialise(Batch(x))
        model.finalise([Batch(x)])
        assert bool(torch.isfinite(model(Batch(x)).total).all())
        assert bool(torch.isfinite(drawn(model, 2, seed=0)).all())
