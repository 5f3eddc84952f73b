"""Adversarial networks: their losses and regularisers, conditions, bad input, and that no two presets are the same."""

import math
from itertools import combinations

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import interpolate, one_hot

from medgen.config import load_preset, preset_names
from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch, ScanDataset
from medgen.data.manifest import index
from medgen.data.recipe import CropOrPad, Recipe, Window
from medgen.errors import CapabilityError, DataError
from medgen.metrics.energy import coverage, energy_score, variety
from medgen.models import build, config_of
from medgen.models.gan import GAN
from medgen.nets.diffaugment import Change, consistent
from medgen.prob.adversarial import critic_loss, generator_loss, interpolated, slope
from medgen.training.fit import FitConfig, fit

LOSSES = ("non-saturating", "least-squares", "wasserstein", "hinge", "energy", "relativistic")
CLASSES = ("calm", "stormy", "windy")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scans(n: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    """A blob somewhere, in [0, 1]."""
    line = torch.linspace(-1, 1, size)
    where = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 0.5
    apart = (line[None, :, None] - where[:, :1, None]) ** 2 + (line[None, None] - where[:, 1:, None]) ** 2
    return (0.1 + 0.8 * torch.exp(-4 * apart) + 0.02 * noise(n, size, size, seed=seed)).clamp(0, 1)[:, None]


def gan(**changes: object) -> GAN:
    torch.manual_seed(0)
    return GAN(GAN.Config(**{"shape": (8, 8), "width": 8, "latent": 4, "levels": 1} | changes))


def seeded(call, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call()


# -- losses ----------------------------------------------------------------------------------------


def test_every_loss_is_its_formula():
    real, generated, margin = [1.5, -0.4], [-0.7, 0.9], 1.2
    s = lambda t: math.log1p(math.exp(t))  # noqa: E731
    critic = {
        "non-saturating": lambda r, g: s(-r) + s(g),
        "least-squares": lambda r, g: ((r - 1) ** 2 + g**2) / 2,
        "wasserstein": lambda r, g: g - r,
        "hinge": lambda r, g: max(0, 1 - r) + max(0, 1 + g),
        "energy": lambda r, g: r + max(0, margin - g),
        "relativistic": lambda r, g: s(g - r),
    }
    generator = {
        "non-saturating": lambda r, g: s(-g),
        "least-squares": lambda r, g: (g - 1) ** 2 / 2,
        "wasserstein": lambda r, g: -g,
        "hinge": lambda r, g: -g,
        "energy": lambda r, g: g,
        "relativistic": lambda r, g: s(r - g),
    }
    pairs = list(zip(real, generated, strict=True))
    alone, patches = torch.tensor([real, generated]).T, torch.tensor([[*real, *generated]])
    r, g = alone[:, :1], alone[:, 1:]
    for kind in LOSSES:
        expected = [critic[kind](*pair) for pair in pairs]
        assert critic_loss(kind, r, g, margin=margin).tolist() == pytest.approx(expected, abs=1e-6)
        assert generator_loss(kind, r, g).tolist() == pytest.approx([generator[kind](*p) for p in pairs], abs=1e-6)
        # A scan with several patches pays their mean.
        both = critic_loss(kind, patches[:, :2], patches[:, 2:], margin=margin)
        assert both.tolist() == pytest.approx([sum(expected) / 2], abs=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_critic_and_generator_pull_verdicts_apart_and_together(kind):
    real, generated = (torch.full((1, 1), 0.2, requires_grad=True) for _ in range(2))
    sign = -1 if kind == "energy" else 1  # an energy is low for what is real
    up, down = torch.autograd.grad(critic_loss(kind, real, generated).sum(), [real, generated])
    assert float(sign * up) < 0 < float(sign * down)
    lured, of_real = torch.autograd.grad(
        generator_loss(kind, real, generated).sum(), [generated, real], allow_unused=True
    )
    assert float(sign * lured) < 0
    assert (of_real is not None) == (kind == "relativistic")


def test_a_relativistic_loss_knows_only_differences():
    real, generated = noise(5, 3), noise(5, 3, seed=1)
    for loss in (critic_loss, generator_loss):
        moved = loss("relativistic", real + 7.5, generated + 7.5)
        torch.testing.assert_close(loss("relativistic", real, generated), moved, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(critic_loss("hinge", real, generated), critic_loss("hinge", real + 9, generated + 9))


def test_slopes_are_the_squared_gradient_at_every_size():
    weights = [noise(1, 4, 4), noise(1, 8, 8, seed=1)]
    at = [noise(3, 1, 4, 4, seed=2), noise(3, 1, 8, 8, seed=3)]

    def linear(scans: list[torch.Tensor]) -> torch.Tensor:
        return sum((x * w).flatten(1).sum(1, keepdim=True) for x, w in zip(scans, weights, strict=True))

    by_hand = sum(float(w.square().sum()) for w in weights)
    assert slope(linear, at).tolist() == pytest.approx([by_hand] * 3, rel=1e-5)
    assert slope(lambda scans: 0 * linear(scans) + 3, at).tolist() == [0, 0, 0]
    # A bowl's slope grows with the distance, and pulls its weight down.
    steep = torch.tensor(2.0, requires_grad=True)
    found = slope(lambda scans: steep / 2 * scans[0].square().flatten(1).sum(1, keepdim=True), at[:1])
    torch.testing.assert_close(found, 4 * at[0].square().flatten(1).sum(1))
    assert float(torch.autograd.grad(found.sum(), steep)[0]) > 0
    assert not at[0].requires_grad


def test_slopes_of_a_model_are_weighed_and_zero_for_a_critic_without_opinion():
    model, batch = gan(r1=0.5, r2=2.0, condition="none", start="noise"), Batch(scans(6))
    terms = {name: term.detach() for name, term in seeded(lambda: model(batch, "critic").terms).items()}
    told, z = None, seeded(lambda: model.pair.draws(6))
    sides = model.pair.real(told, batch), model.pair.generated(z, told, batch)
    torch.testing.assert_close(terms["r1"], 0.25 * model.pair.steepness(sides[0]).detach())
    torch.testing.assert_close(terms["r2"], model.pair.steepness(sides[1]).detach())
    assert float(terms["r1"].min()) > 0
    with torch.no_grad():
        model.pair.judge.real.weight.zero_()
    silent = seeded(lambda: model(batch, "critic").terms)
    assert not any(silent[name].detach().any() for name in ("r1", "r2"))


def test_lazy_slopes_cost_the_same_on_average():
    batch = Batch(scans(4))
    eager, lazy = (gan(r1=1.0, r2=0.0, lazy=n, condition="none").train() for n in (1, 4))
    found = [seeded(lambda n=n: lazy(batch, "critic").terms, n).get("r1") for n in range(60)]
    there = [term for term in found if term is not None]
    assert 7 < len(there) < 25
    usual = seeded(lambda: eager(batch, "critic").terms)["r1"]
    torch.testing.assert_close(there[0], 4 * usual)


def test_interpolation_takes_one_place_a_scan_at_every_size():
    real, generated = [torch.zeros(50, 1, n, n) for n in (2, 4)], [torch.ones(50, 1, n, n) for n in (2, 4)]
    coarse, fine = seeded(lambda: interpolated(real, generated))
    assert torch.equal(coarse.amin((1, 2, 3)), fine.amax((1, 2, 3)))
    places = fine[:, 0, 0, 0]
    assert 0 <= float(places.min()) < 0.2 < 0.8 < float(places.max()) <= 1


def test_only_the_encoder_of_a_joint_model_is_moved_through_real_scans():
    for joint in (False, True):
        model = gan(inference="joint" if joint else "none", condition="none", r1=0.0, r2=0.0)
        x = scans(4).requires_grad_()
        seeded(lambda m=model, x=x: m(Batch(x), "generator").total.sum().backward())
        assert (x.grad is not None) == joint
        assert all(p.grad is None for p in model.pair.judge.parameters())
        model.zero_grad(set_to_none=True)
        seeded(lambda m=model: m(Batch(scans(4)), "critic").total.sum().backward())
        made = [*model.pair.generator.parameters(), *(model.pair.reader.parameters() if joint else ())]
        assert all(p.grad is None for p in made)


# -- changes before the critic ---------------------------------------------------------------------


def test_a_change_of_nothing_changes_nothing():
    x = scans(5) * 2 - 1
    change = seeded(lambda: Change.drawn(5, 2, 0.0, x.device))
    assert torch.equal(change([x])[0], x)
    changed = seeded(lambda: Change.drawn(5, 2, 1.0, x.device))([x])[0]
    assert all(not torch.allclose(a, b) for a, b in zip(changed, x, strict=True))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_scan_is_changed_alike_at_every_size_and_gradients_flow(dims):
    coarse = torch.rand(64, 1, *(8,) * dims, generator=torch.Generator().manual_seed(0)).mul(1.6).sub(0.8)
    coarse.requires_grad_()
    fine = interpolate(coarse, scale_factor=2, mode="nearest")
    small, large = seeded(lambda: Change.drawn(64, dims, 1.0, coarse.device))([coarse, fine])
    # Shifts are whole voxels of each size, so at the fine one a scan may move by half a coarse voxel more.
    apart = (interpolate(small, scale_factor=2) - large).detach().abs().flatten(1)
    assert int((apart.median(1).values < 1e-5).sum()) > (64 * 0.5**dims) / 2
    (small.sum() + large.sum()).backward()
    assert bool(torch.isfinite(coarse.grad).all())
    assert float((coarse.grad.flatten(1) != 0).float().mean(1).min()) > 0.2


def test_masks_move_with_the_scan_and_keep_their_values():
    mask = (scans(40, 16) > 0.6).float()
    change = seeded(lambda: Change.drawn(40, 2, 1.0, mask.device))
    change = Change(change.shift, torch.full_like(change.hole, -9), change.gamma, change.kept)  # the hole is outside
    moved, scan = change([mask], values=False)[0], change([2 * mask - 1])[0]
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(moved, mask)
    assert torch.equal(moved > 0.5, scan > 0)


def test_changes_are_for_training_and_for_both_kinds_of_scans():
    model, batch = gan(diffaugment=1.0, condition="none", r1=0.0, r2=0.0), Batch(scans(16))
    assert model.eval().pair.change(4) is None
    assert gan(diffaugment=0.0).train().pair.change(4) is None
    shown: list[torch.Tensor] = []
    model.train().pair.judge.register_forward_pre_hook(lambda module, given: shown.append(given[0][-1]))
    seeded(lambda: model(batch, "critic"))
    untouched = 2 * batch.x - 1
    made = seeded(lambda: model.pair.generated(model.pair.draws(16), None, batch).scans[-1])
    assert len(shown) == 2
    assert all(not torch.allclose(a, b) for a, b in zip(shown[0], untouched, strict=True))
    assert all(not torch.allclose(a, b) for a, b in zip(shown[1], made, strict=True))
    shown.clear()
    seeded(lambda: model.eval()(batch, "critic"))
    assert torch.equal(shown[0], untouched)


def test_consistency_is_the_squared_difference_of_verdicts():
    assert consistent(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])).tolist() == [5.0]
    batch = Batch(scans(4))
    weighed = [seeded(lambda w=w: gan(consistency=w)(batch, "critic").terms["consistency"]) for w in (1.0, 3.0)]
    torch.testing.assert_close(weighed[1], 3 * weighed[0])


# -- how far draws are from scans ------------------------------------------------------------------


def test_the_energy_score_is_least_for_the_true_distribution():
    real, true = scans(200, 16, seed=1), scans(200, 16, seed=2)
    blurred = torch.nn.functional.avg_pool2d(true, 3, 1, 1, count_include_pad=False)
    worse = {
        "blurred": blurred,
        "sharper": (true + 1.5 * (true - blurred)),
        "shifted": true.roll(2, 2),
        "darker": 0.9 * true,
        "noisier": true + 0.05 * noise(200, 1, 16, 16),
        "one mode": true[:1].expand(200, 1, 16, 16),
        "modes dropped": true[true.flatten(1).argmax(1) % 16 > 7][:60],
    }
    best = float(energy_score(real, true).mean())
    scores = {name: float(energy_score(real, draws).mean()) for name, draws in worse.items()}
    assert min(scores.values()) > best + 0.005, (best, scores)


def test_coverage_and_variety_fall_when_modes_collapse():
    real, true = scans(200, seed=1), scans(200, seed=2)
    few = true[:4].repeat(50, 1, 1, 1)
    assert coverage(real, true) > 0.95 > 0.4 > coverage(real, few)
    assert variety(real, true) == pytest.approx(1, abs=0.1)
    assert variety(real, true[:1].expand(200, 1, 8, 8)) < 1e-3
    assert variety(real, 0.5 * true) < 0.6


def test_scores_of_a_single_scan_or_of_equal_scans_are_of_usual_size():
    usual = float(energy_score(scans(32), scans(32, seed=3)).mean())
    assert float(energy_score(scans(1), scans(1, seed=3)).mean()) < 20 * usual
    assert float(energy_score(torch.full((8, 1, 8, 8), 0.5), scans(8)).mean()) < 2000 * usual


# -- no two are the same ---------------------------------------------------------------------------


def adversarial_presets() -> list[str]:
    named = [(name, load_preset(name)) for name in preset_names()]
    return [name for name, one in named if one.about.dims == 2 and one.model.get("kind") == "gan"]


def built(name: str) -> GAN:
    values = dict(load_preset(name).model) | {"width": 8, "latent": 6, "shape": (8, 8), "classes": CLASSES}
    torch.manual_seed(0)
    model = build(config_of(values))
    with torch.no_grad():  # the same weights wherever networks are the same, away from their start
        for parameter in model.parameters():
            parameter.copy_(0.3 * noise(*parameter.shape, seed=parameter.numel()))
    return model.train()


def paid(model: GAN) -> list[torch.Tensor]:
    """Every term of every player, in order, on one batch with the same randomness."""
    context = (scans(6, seed=4) > 0.5).float() if model.config.context else None
    batch = Batch(scans(6), torch.arange(6) % 3, context)
    # Which steps are lazy is chance; on average slopes count.
    lazy = range(3 * model.config.lazy)
    found = []
    for player in model.players():
        terms = [seeded(lambda p=player, n=n: model(batch, p.name).terms, n) for n in lazy]
        names = sorted({name for some in terms for name in some})
        found += [sum(some[name] for some in terms if name in some).detach() / len(terms) for name in names]
    return found


def test_no_two_presets_build_the_same_graph_and_loss():
    names = adversarial_presets()
    assert len(names) >= 24
    models = {name: built(name) for name in names}
    graphs = {name: {k: tuple(p.shape) for k, p in model.named_parameters()} for name, model in models.items()}
    bills = {name: paid(model) for name, model in models.items()}
    for one, other in combinations(names, 2):
        if graphs[one] != graphs[other]:
            continue  # the graph differs; where it does not, what is paid must
        same = len(bills[one]) == len(bills[other]) and all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(bills[one], bills[other], strict=True)
        )
        assert not same, f"{one} and {other} are the same"


# -- conditions ------------------------------------------------------------------------------------


def bright_and_dark(n: int) -> Batch:
    """Three dark scans to every bright one, whose class is the second."""
    cond = (torch.arange(n) % 4 == 0).long()
    return Batch((0.2 * scans(n) + 0.7 * cond[:, None, None, None]).clamp(0, 1), cond)


def test_without_a_condition_classes_are_as_often_as_in_training():
    model = gan(classes=("dark", "bright")).eval()
    model.initialise(bright_and_dark(64))
    drawn = model.sample(400, seed=0)
    assert float((drawn.flatten(1).mean(1) > 0.5).float().mean()) == pytest.approx(0.25, abs=0.06)
    told = model.sample(8, seed=0, cond=torch.ones(8, dtype=torch.long))
    assert bool((told.flatten(1).mean(1) > 0.5).all())


def test_scans_of_no_known_class_do_not_count_as_the_first():
    model, batch = gan(classes=("dark", "bright"), condition="semi-supervised", start="noise"), bright_and_dark(64)
    batch.cond = one_hot(batch.cond, 2).float()
    batch.cond[4:] = 0
    model.initialise(batch)
    assert model.shares.tolist() == [0.75, 0.25]
    found = seeded(lambda: model(batch, "critic").terms["classes"]).detach()
    assert bool((found[:4] > 0).all())
    assert not found[4:].any()
    batch.cond = torch.zeros_like(batch.cond)
    model.initialise(batch)
    assert model.shares.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("classes", [(), ("a", "b")])
@pytest.mark.parametrize("condition", ["concat", "projection", "auxiliary"])
def test_covariates_are_taken_with_and_without_classes(classes, condition):
    known = {"classes": classes, "covariates": (Covariate(name="age"), Covariate(name="sex", levels=("F", "M")))}
    model = gan(condition=condition, inference="joint", **known)
    rows = torch.cat([one_hot(torch.arange(6) % 2, 2)[:, : len(classes)].float(), noise(6, 3)], 1)
    batch = Batch(scans(6), rows)
    model.initialise(batch)
    for player in model.players():
        seeded(lambda name=player.name: model(batch, name).total.sum().backward())
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * noise(*parameter.shape)
    older = rows + torch.tensor([0.0] * len(classes) + [2.0, 0.0, 0.0])
    assert not torch.allclose(model.sample(6, seed=0, cond=rows), model.sample(6, seed=0, cond=older))
    assert model.sample(6, seed=0).shape == model.reconstruct(batch.x).shape == (6, 1, 8, 8)
    assert model.validation_loss(batch).shape == (6,)


def test_a_missing_or_wrong_image_is_refused_in_a_sentence():
    model = gan(architecture={"kind": "spade"}, start="noise", context=2, condition="none").eval()
    for given in (None, torch.zeros(3, 1, 8, 8)):
        with pytest.raises(DataError, match=r"this model is given an image \(2, 8, 8\) as context; found"):
            model.sample(3, seed=0, context=given)
    assert model.sample(3, seed=0, context=torch.zeros(3, 2, 8, 8)).shape == (3, 1, 8, 8)
    with pytest.raises(DataError, match="no image as context"):
        gan().eval().sample(3, seed=0, context=torch.zeros(3, 1, 8, 8))


def test_what_a_gan_cannot_do_names_who_can():
    model = gan().eval()
    for call in (model.encode, model.reconstruct):
        with pytest.raises(CapabilityError, match=r"bigan.*fanogan"):
            call(scans(2))
    with pytest.raises(CapabilityError, match="information"):
        model.found_codes(scans(2))
    with pytest.raises(CapabilityError, match="classif"):
        model.class_log_prob(scans(2))


def test_weights_remember_how_far_networks_had_grown():
    growing = {"architecture": {"kind": "progressive"}, "start": "noise", "levels": 2, "condition": "none"}
    model = gan(**growing).train()
    model.progress = 0.3
    seeded(lambda: model(Batch(scans(4)), "critic"))
    again = gan(**growing).eval()
    whole = again.sample(4, seed=0)
    again.load_state_dict(model.eval().state_dict())
    drawn = again.sample(4, seed=0)
    assert torch.equal(drawn, model.sample(4, seed=0))
    assert torch.equal(drawn[..., ::2, ::2], drawn[..., 1::2, 1::2])  # the finest level has not begun
    assert not torch.equal(whole[..., ::2, ::2], whole[..., 1::2, 1::2])


# -- bad input -------------------------------------------------------------------------------------


def dataset(folder, x: torch.Tensor, labels: list[str]) -> ScanDataset:
    from PIL import Image

    for n, (scan, label) in enumerate(zip(x[:, 0], labels, strict=True)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * scan).round().byte().numpy()).save(folder / label / f"{n}.png")
    recipe = Recipe(steps=(CropOrPad(shape=(8, 8, 1)), Window(low=0, high=255)))
    return ScanDataset(index(folder), recipe, classes=("many", "two"))


def survives(name: str, data: ScanDataset) -> None:
    values = dict(load_preset(name).model) | {"shape": (8, 8), "classes": ("many", "two"), "width": 8, "latent": 4}
    torch.manual_seed(0)
    model = build(config_of(values))
    # A batch of seven, so that the last held-out batch is a single scan.
    config = FitConfig(images=28, batch_size=7, validations=2, warmup=7, ema=14, precision="float32")
    progress = fit(model, data, data, config)
    assert progress.seen == 28
    assert all(math.isfinite(value) and abs(value) < 1e4 for entry in progress.history for value in entry[1:])
    drawn = model.sample(3, seed=0)
    assert bool(torch.isfinite(drawn).all())
    assert all(math.isfinite(value) for value in model.health(data.batches(4)).values())


@pytest.mark.parametrize("name", [name for name in adversarial_presets() if name not in ("pix2pix2d", "spade2d")])
def test_eight_scans_with_two_of_a_class_and_some_alike_are_enough_to_train(name, tmp_path):
    x = scans(8)
    x[2:5] = x[1]
    survives(name, dataset(tmp_path, x, ["many"] * 6 + ["two"] * 2))


def test_scans_without_any_content_are_refused_before_training(tmp_path):
    with pytest.raises(DataError, match="None of the 8 scans"):
        dataset(tmp_path, torch.full((8, 1, 8, 8), 0.5), ["many"] * 6 + ["two"] * 2)


@pytest.mark.parametrize("name", ["acgan2d", "ebgan2d", "progan2d", "r3gan2d", "wgan-gp2d"])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_constant_scans_give_no_numbers_that_are_not_finite(name, value):
    model = built(name)
    batch = Batch(torch.full((8, 1, 8, 8), value), torch.tensor([0] * 6 + [1] * 2))
    seeded(lambda: model.initialise(batch))
    for player in model.players():
        optimizer = torch.optim.Adam(player.parameters, lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            loss = seeded(lambda name=player.name: model(batch, name).total.mean(), step)
            loss.backward()
            assert all(bool(torch.isfinite(p.grad).all()) for p in player.parameters if p.grad is not None)
            optimizer.step()
    with torch.no_grad():
        assert bool(torch.isfinite(seeded(lambda: model.eval().validation_loss(batch))).all())
    assert bool(torch.isfinite(model.sample(3, seed=0)).all())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shape": (4, 4), "levels": 3}, r"shape \(4, 4\) must be divisible by fold \* 2\*\*levels = 16"),
        ({"shape": (10, 8), "levels": 2}, r"must be divisible by .* = 8"),
        ({"condition": "information"}, "codes"),
        ({"codes": (3, 1)}, "information"),
        ({"architecture": {"kind": "multi-scale"}}, "noise|in parts"),
        ({"context": 1}, "unet and spade do"),
        ({"architecture": {"kind": "laplacian"}, "start": "noise", "grain": "independent"}, "residuals"),
        ({"loss": "energy", "classes": CLASSES}, "takes condition 'none' or 'concat'"),
        ({"loss": "energy", "inference": "joint"}, "inference 'none' or 'posthoc'"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_a_sentence(wrong, said):
    with pytest.raises(ValidationError, match=said):
        GAN.Config(**{"shape": (8, 8), "levels": 1} | wrong)


@pytest.mark.parametrize("kind", ["progressive", "autogan", "unet"])
def test_an_architecture_of_several_sizes_says_that_it_needs_levels(kind):
    with pytest.raises(ValueError, match="levels must be 1 or more"):
        gan(architecture={"kind": kind}, start="noise", context=int(kind == "unet"), condition="none", levels=0)
