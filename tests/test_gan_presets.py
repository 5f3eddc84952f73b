"""What each adversarial network's paper adds, seen in a small one with the preset's own settings."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, one_hot

from medgen.config import load_preset
from medgen.data.dataset import Batch
from medgen.metrics.energy import energy_score
from medgen.models import build, config_of
from medgen.models.gan import GAN
from medgen.nets.adversarial.attention import Attention, local_masks
from medgen.nets.adversarial.base import halved
from medgen.nets.adversarial.cell import wirings
from medgen.nets.adversarial.residual import Normalisation
from medgen.training.ema import MovingAverage

CLASSES = ("up", "right", "down", "left")
SMALL = {"shape": (8, 8), "width": 8, "latent": 8, "levels": 1}


def small(name: str, **changes: object) -> GAN:
    values = dict(load_preset(name).model)
    values |= {key: value for key, value in SMALL.items() if key != "levels" or values.get("levels")} | changes
    torch.manual_seed(0)
    return build(config_of(values))


def seeded(call: Callable, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call()


def trained(model: GAN, name: str, data: Batch, steps: int, *, rate: float, only: str = "", size: int = 32) -> GAN:
    """The model after a short training as `fit` does it, with the preset's memory and averaged weights.

    `only` one player takes part where it is given; `rate` is larger than the preset's, as the training is shorter.
    """
    told = load_preset(name).fit
    betas = told["momentum"], told.get("memory", 0.99)

    def run() -> None:
        model.initialise(data)
        turns = [(p, torch.optim.Adam(p.parameters, rate * p.rate, betas)) for p in model.players()]
        average = MovingAverage(model, 40 * size)
        for step in range(steps):
            model.train().progress = step / steps
            which = torch.randint(len(data.x), (size,))
            parts = {key: getattr(data, key) for key in ("x", "cond", "context")}
            batch = Batch(**{key: None if part is None else part[which] for key, part in parts.items()})
            for player, optimizer in turns:
                mine = player.since * steps <= step < (1 if player.until is None else player.until) * steps
                if (only and player.name != only) or not mine or step % player.every:
                    continue
                optimizer.zero_grad(set_to_none=True)
                (model(batch, player.name).total.mean() / batch.x[0].numel()).backward()
                nn.utils.clip_grad_norm_(player.parameters, 1.0)
                optimizer.step()
            average.update(model, images=size, seen=(step + 1) * size)
        model.load_state_dict(average.weights)

    seeded(run, 1)
    model.progress = 1.0
    return model.eval()


def blobs(n: int, kinds: int = 4, *, seed: int = 0, grain: float = 0.02, size: int = 8) -> tuple[torch.Tensor, ...]:
    """Scans with a blob at one of so many places around the middle, and at which."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(n) % kinds
    angle, middle = 2 * torch.pi * (kind + 0.5) / kinds, (size - 1) / 2
    line = torch.arange(size).float()
    place = middle + 0.27 * size * torch.stack([angle.sin(), angle.cos()])
    apart = (line[:, None] - place[0, :, None, None]) ** 2 + (line - place[1, :, None, None]) ** 2
    bright = 0.6 + 0.2 * torch.rand(n, 1, 1, generator=generator)
    x = 0.1 + bright * torch.exp(-apart / 3.4) + grain * torch.randn(n, size, size, generator=generator)
    return x[:, None].clamp(0, 1), kind


def nearest(x: torch.Tensor, kinds: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Which kind each scan is most like, and how far it is from the middle one of that kind."""
    known, kind = blobs(32 * kinds, kinds, seed=9)
    means = torch.stack([known[kind == k].mean(0) for k in range(kinds)])
    found = torch.cdist(x.flatten(1), means.flatten(1)).min(1)
    return found.indices, found.values


def parameters_of(model: GAN) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.pair.generator.parameters()]


# -- from noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps", "kinds"), [("gan2d", 250, 1), ("dcgan2d", 160, 2)])
def test_samples_are_of_one_of_two_kinds_and_not_between(name, steps, kinds):
    """Of both, with convolutions and normalisation; perceptrons often settle for one (mode collapse)."""
    x, _ = blobs(64, 2)
    model = trained(small(name), name, Batch(x), steps, rate=3e-3)
    kind, apart = nearest(model.sample(64, seed=0), 2)
    between = float(torch.cdist(x[:1].flatten(1), x[1:2].flatten(1)))
    assert len(set(kind.tolist())) >= kinds
    assert float(apart.mean()) < 0.3 * between
    layers = [type(layer) for layer in model.pair.modules()]
    assert (nn.BatchNorm2d in layers) == (nn.ConvTranspose2d in layers) == (name == "dcgan2d")


def test_lsgan_verdicts_go_to_one_and_zero_and_too_good_is_pulled_back():
    x, _ = blobs(64)
    model = trained(small("lsgan2d"), "lsgan2d", Batch(x), 80, rate=2e-3, only="critic").train()
    with torch.no_grad():
        sides = (
            model.pair.real(None, Batch(x)),
            seeded(lambda: model.pair.generated(model.pair.draws(64), None, Batch(x))),
        )
        real, generated = (model.pair.judged(side).verdict.mean() for side in sides)
    assert float(real) == pytest.approx(1, abs=0.25)
    assert float(generated) == pytest.approx(0, abs=0.25)


def test_the_slope_of_a_wgan_gp_critic_goes_near_one_between_real_and_generated_scans():
    x, _ = blobs(64)
    model = trained(small("wgan-gp2d"), "wgan-gp2d", Batch(x), 120, rate=3e-3, only="critic")

    def slopes() -> torch.Tensor:
        side = model.pair.generated(model.pair.draws(64), None, Batch(x))
        side.scans[0] = ((side.scans[0] + 2 * x - 1) / 2).detach()
        return model.pair.steepness(side).sqrt().detach()

    assert 0.5 < float(seeded(slopes).mean()) < 2
    assert float(seeded(lambda: model.pulse(Batch(x)))["real_above"]) > 0.95


@pytest.mark.parametrize(("name", "whole"), [("sngan2d", False), ("sagan2d", True), ("autogan2d", False)])
def test_no_weight_of_a_spectral_critic_stretches_anything(name, whole):
    x, _ = blobs(32)
    model = trained(small(name), name, Batch(x), 12, rate=2e-2, only="critic")

    def norms(network: nn.Module) -> list[float]:
        weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return [float(torch.linalg.matrix_norm(w.detach().flatten(1), 2)) for w in weights]

    assert max(norms(model.pair.judge)) < 1.15
    stored = {k: p for k, p in model.pair.judge.named_parameters() if k.endswith("original")}
    assert len(stored) >= 6
    if whole:  # but for gains that a class decides
        plain = {k for k, p in model.pair.generator.named_parameters() if p.ndim > 1 and not k.endswith("original")}
        assert plain == {k for k in plain if ".gain." in k or ".bias." in k}
    # Only directions count: what is stored is divided by its largest singular value.
    before = model.pair.judged(model._side(x, None)).verdict.detach()
    with torch.no_grad():
        for weight in stored.values():
            weight *= 7
    after = model.pair.judged(model._side(x, None)).verdict.detach()
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_ebgan_energies_are_low_for_scans_and_pushed_up_to_the_margin_only():
    x, _ = blobs(64)
    model = trained(small("ebgan2d"), "ebgan2d", Batch(x), 160, rate=3e-3)

    def energy(of: torch.Tensor) -> float:
        return float(model.pair.judged(model._side(of, None)).verdict.detach().mean())

    noise = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    known = energy(blobs(32, seed=5)[0])
    assert known < 0.3 * energy(noise)
    assert energy(x.mean(0, keepdim=True).flip(2)[:, :, :, :]) > known
    margin = model.config.margin
    terms = seeded(lambda: model.train()(Batch(x), "critic").terms)["verdict"].detach()
    assert float(terms.max()) < margin + 1  # real energy, and what generated ones lack to the margin
    assert set(seeded(lambda: model(Batch(x), "generator").terms)) == {"verdict", "pull"}


# -- several sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lapgan2d", "progan2d", "msggan2d"])
def test_scans_come_at_every_size(name):
    model = small(name, shape=(16, 8), levels=2).eval()
    z = seeded(lambda: model.pair.draws(3))
    made = model.pair.generator(z)
    assert [tuple(x.shape[2:]) for x in made] == [(4, 2), (8, 4), (16, 8)]
    torch.testing.assert_close(model.pair.made(z, None, None), made[-1])


def test_lapgan_shows_the_class_at_every_size():
    x, kind = blobs(64, 2)
    model = trained(small("lapgan2d", classes=CLASSES[:2]), "lapgan2d", Batch(x, kind), 160, rate=3e-3)
    told = torch.arange(32) % 2
    with torch.no_grad():
        coarse, fine = model.pair.generator(seeded(lambda: model.pair.draws(32)), one_hot(told, 2).float())
    means = torch.stack([x[kind == k].mean(0) for k in range(2)]) * 2 - 1
    for made, known in ((coarse, halved(means)), (fine, means)):
        found = torch.cdist(made.flatten(1), known.flatten(1)).argmin(1)
        assert float((found == told).float().mean()) > 0.8


def test_progan_trains_coarse_levels_first():
    x, _ = blobs(16, size=16)
    model = small("progan2d", shape=(16, 16), levels=2).train()
    moved = {}
    for progress in (0.1, 0.3, 0.9):
        model.progress = progress
        model.zero_grad(set_to_none=True)
        seeded(lambda: model(Batch(x), "generator").total.sum().backward())
        stages = model.pair.generator.stages
        moved[progress] = [any(p.grad is not None for p in stage.parameters()) for stage in stages]
    assert moved == {0.1: [False, False], 0.3: [True, False], 0.9: [True, True]}


def test_msggan_gives_the_generator_gradients_at_every_size_at_once():
    x, _ = blobs(8, size=16)
    model = small("msggan2d", shape=(16, 16), levels=2).train()
    side = seeded(lambda: model.pair.generated(model.pair.draws(8), None, Batch(x)))
    slopes = torch.autograd.grad(model.pair.judged(side).verdict.sum(), side.scans)
    assert [tuple(slope.shape[2:]) for slope in slopes] == [(4, 4), (8, 8), (16, 16)]
    assert all(bool((slope.flatten(1).abs().amax(1) > 0).all()) for slope in slopes)
    # A coarse scan that does not belong to the fine one is seen.
    swapped = [side.scans[0].flip(0), *side.scans[1:]]
    with torch.no_grad():
        one, other = (model.eval().pair.judge(scans).verdict for scans in (side.scans, swapped))
    assert float((one - other).abs().min()) > 0


# -- conditions and codes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "rate"), [("cgan2d", 250, 2e-3), ("acgan2d", 160, 3e-3), ("sagan2d", 120, 1e-3)]
)
def test_samples_show_the_class_that_was_asked_for(name, steps, rate):
    x, kind = blobs(64)
    model = trained(small(name, classes=CLASSES), name, Batch(x, kind), steps, rate=rate)
    told = torch.arange(64) % 4
    drawn = model.sample(64, seed=0, cond=told)
    assert float((nearest(drawn)[0] == told).float().mean()) > 0.9
    if name == "acgan2d":
        held, other = blobs(64, seed=5)
        assert float((model.class_log_prob(held).argmax(1) == other).float().mean()) > 0.9
        assert float((model.class_log_prob(drawn).argmax(1) == told).float().mean()) > 0.9


def test_sgan_learns_classes_of_few_labelled_scans():
    x, kind = blobs(128)
    rows = one_hot(kind, 4).float()
    rows[12:] = 0  # three scans of each class are labelled
    model = trained(small("sgan2d", classes=CLASSES), "sgan2d", Batch(x, rows), 160, rate=3e-3)
    held, known = blobs(100, seed=5)
    assert float((model.class_log_prob(held).argmax(1) == known).float().mean()) > 0.9
    assert len(set(nearest(model.sample(64, seed=0))[0].tolist())) >= 2


def test_infogan_reads_its_codes_in_its_samples():
    x, _ = blobs(64)
    model = trained(small("infogan2d"), "infogan2d", Batch(x), 200, rate=3e-3)
    z = seeded(lambda: model.pair.draws(200))
    categories, numbers = z[:, 8:18], z[:, 18:20]
    assert bool(((categories == 0) | (categories == 1)).all())
    assert bool((categories.sum(1) == 1).all())
    assert float(numbers.abs().max()) <= 1
    with torch.no_grad():
        drawn = (model.pair.made(z, None, None) + 1) / 2
    chances, read = model.found_codes(drawn)
    right = float((chances.argmax(1) == categories.argmax(1)).float().mean())
    assert right > 0.5  # by chance 0.1
    told = [float(torch.corrcoef(torch.stack([read[:, n], numbers[:, n]]))[0, 1]) for n in range(2)]
    assert max(told) > 0.5


def test_biggan_tells_each_block_its_own_part_of_the_code_and_the_class():
    model = small("biggan2d", classes=CLASSES, levels=2, shape=(16, 16), latent=9).eval()
    generator = model.pair.generator
    told: dict[int, torch.Tensor] = {}
    for n, block in enumerate(generator.blocks):
        block.register_forward_pre_hook(lambda module, given, n=n: told.__setitem__(n, given[1]))
    z, rows = torch.arange(9.0)[None], one_hot(torch.tensor([2]), 4).float()
    scan = generator(z, rows)[0]
    assert [told[n][0].tolist() for n in (0, 1)] == [[3, 4, 5, 0, 0, 1, 0], [6, 7, 8, 0, 0, 1, 0]]
    gains = [m.gain for m in generator.modules() if isinstance(m, Normalisation) and m.gain is not None]
    assert len(gains) == 4
    assert not torch.allclose(scan, generator(z + torch.eye(9)[8], rows)[0], atol=1e-6)
    assert not torch.allclose(scan, generator(z, rows.roll(1, 1))[0], atol=1e-6)


@pytest.mark.parametrize(("name", "whole"), [("sagan2d", True), ("biggan2d", True), ("ylg2d", False)])
def test_attention_hears_everything_or_what_its_patterns_show(name, whole):
    model = small(name, classes=CLASSES, levels=2, shape=(16, 16), width=16).eval()
    layers = [layer for layer in model.pair.modules() if isinstance(layer, Attention)]
    assert len(layers) == 2  # one in either network
    shown = torch.stack(local_masks((8, 8))).any(0)
    for layer in layers:
        with torch.no_grad():
            layer.gamma.fill_(1.0)
        x = torch.randn(1, layer.query.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = layer(x).flatten(2)
        for position in (0, 27, 63):
            found = torch.autograd.grad(out[..., position].square().sum(), x, retain_graph=True)[0]
            heard = found.flatten(2).abs().sum((0, 1)) > 0
            assert torch.equal(heard, torch.ones(64, dtype=torch.bool) if whole else shown[position])


def test_stylegan_noise_changes_detail_and_codes_change_the_whole():
    model = small("stylegan2d", shape=(16, 16), levels=2).eval()
    generator = model.pair.generator
    with torch.no_grad():
        for gain in generator.grains.gains:
            gain.fill_(0.3)
    z = seeded(lambda: model.pair.draws(64))
    other, finest = z.clone(), 16 * 16
    other[:, -finest:] = torch.randn(64, finest, generator=torch.Generator().manual_seed(1))
    styled = torch.cat([z[:, :8].flip(0), z[:, 8:]], 1)

    def coarse_share(changed: torch.Tensor) -> float:
        difference = (generator(changed)[0] - generator(z)[0]).detach()
        assert float(difference.abs().max()) > 1e-3
        return float(avg_pool2d(difference, 4).square().mean() / difference.square().mean())

    assert coarse_share(other) < 0.2
    assert coarse_share(styled) > 2 * coarse_share(other)
    # Without noise of its own a scan is what its style says, and the mapping keeps codes apart.
    styles = generator.mapping(nn.functional.normalize(z[:, :8], dim=1) * 8**0.5).detach()
    assert float(torch.pdist(styles).min()) > 0


@pytest.mark.slow
def test_nrgan_learns_noise_apart_and_samples_without_it():
    """Of scans that differ in nothing but noise."""
    grain = 0.08
    x = (0.5 + grain * torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    model = trained(small("nrgan2d"), "nrgan2d", Batch(x), 160, rate=3e-3)
    drawn = model.sample(64, seed=0)
    learned = float(model.pair.grain.spread(drawn).detach().mean()) / 2
    assert 0.6 * grain < learned < 1.4 * grain
    assert float(drawn.std(0).mean()) < 0.7 * float(x.std(0).mean())
    # Draws that are compared with scans have their noise.
    held = seeded(lambda: model.validation_loss(Batch(x))).detach().mean()
    assert float(held) < 64 * float(energy_score(x, drawn).mean())


def test_autogan_cells_are_wired_by_the_genotype_and_hear_those_before():
    model = small("autogan2d", shape=(16, 16), levels=3).eval()
    generator = model.pair.generator
    assert [cell.wiring for cell in generator.cells] == wirings(3)
    z = seeded(lambda: model.pair.draws(2))
    scan = generator(z)[0].detach()
    for cell in (generator.cells[1], generator.cells[2]):
        for skip in cell.skips:
            with torch.no_grad():
                skip.weight.mul_(2)
            changed = generator(z)[0].detach()
            assert not torch.allclose(changed, scan, atol=1e-6)
            scan = changed


# -- finding codes ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_bigan_reconstructs_what_it_encodes():
    x, _ = blobs(64, 2)
    model = trained(small("bigan2d", latent=4), "bigan2d", Batch(x), 250, rate=6e-3)
    held, kind = blobs(40, 2, seed=5)
    again = model.reconstruct(held)
    assert float((nearest(again, 2)[0] == kind).float().mean()) > 0.8
    own = (again - held).square().mean()
    assert float(own) < 0.5 * float((again - held.roll(1, 0)).square().mean())
    assert model.encode(held).mean.shape == (40, 4)


@pytest.mark.slow
def test_fanogan_encodes_after_the_generator_and_leaves_a_foreign_blob_out():
    x, _ = blobs(64, 2)
    model = small("fanogan2d", critic_steps=1)  # a short training has no steps to spare
    critic, generator, encoder = model.players()
    assert critic.until == generator.until == encoder.since == model.config.share
    trained(model, "fanogan2d", Batch(x), 240, rate=4e-3)
    before = parameters_of(model)
    model.train().zero_grad(set_to_none=True)
    seeded(lambda: model(Batch(x), "encoder").total.sum().backward())
    assert all(p.grad is None for p in [*model.pair.generator.parameters(), *model.pair.judge.parameters()])
    assert all(p.grad is not None for p in encoder.parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True))
    model.eval()
    held, kind = blobs(32, 2, seed=5)
    assert float((nearest(model.reconstruct(held), 2)[0] == kind).float().mean()) > 0.7
    ill = held.clone()
    ill[:, :, :2, :2] += 0.6
    left = (model.reconstruct(ill) - held)[:, :, :2, :2].mean()
    assert abs(float(left)) < 0.3


# -- of a given image ------------------------------------------------------------------------------


def placed(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of a square somewhere, and scans that are bright there."""
    where = torch.randint(0, 6, (n, 2), generator=torch.Generator().manual_seed(seed))
    line = torch.arange(8)
    inside = [(line >= where[:, k, None]) & (line < where[:, k, None] + 3) for k in range(2)]
    mask = (inside[0][:, :, None] & inside[1][:, None]).float()[:, None]
    noise = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return mask, (0.15 + 0.6 * mask + 0.02 * noise).clamp(0, 1)


@pytest.mark.parametrize(("name", "steps"), [("pix2pix2d", 100), pytest.param("spade2d", 160, marks=pytest.mark.slow)])
def test_the_mask_decides_where_things_are(name, steps):
    mask, x = placed(64)
    model = trained(small(name), name, Batch(x, None, mask), steps, rate=3e-3)
    new = placed(32, seed=4)[0]
    drawn = model.sample(32, seed=0, context=new)
    inside = (drawn * new).flatten(1).sum(1) / new.flatten(1).sum(1)
    outside = (drawn * (1 - new)).flatten(1).sum(1) / (1 - new).flatten(1).sum(1)
    assert float(((inside - outside) > 0.2).float().mean()) > 0.9
    assert float((inside - outside).mean()) == pytest.approx(0.6, abs=0.2)


# -- the default -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_r3gan_covers_every_kind_of_scan():
    x, _ = blobs(128, 8)
    model = trained(small("r3gan2d", levels=1), "r3gan2d", Batch(x), 200, rate=3e-3)
    drawn = model.sample(128, seed=0)
    kind, apart = nearest(drawn, 8)
    between = float(torch.cdist(x[:1].flatten(1), x[1:2].flatten(1)))
    close = kind[apart < between / 2]
    assert len(set(close.tolist())) == 8
