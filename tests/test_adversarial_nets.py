"""Adversarial architectures: shapes at every size, gradients everywhere, and what each paper adds."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from medgen.nets.adversarial.attention import Attention, local_masks
from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, doubled, halved
from medgen.nets.adversarial.cell import GENOTYPE, Cell, Wiring, wirings
from medgen.nets.adversarial.growing import Deviation, Growing, equalised, grown, pixel_normal
from medgen.nets.adversarial.plain import DCGAN, Perceptron
from medgen.nets.adversarial.residual import ResNet
from medgen.nets.adversarial.scales import Laplacian, MultiScale, enlarged, laplacian_pyramid, sizes_of
from medgen.nets.adversarial.style import Modulated, Style
from medgen.nets.adversarial.translation import Spade, Translation

KINDS: dict[str, Architecture] = {
    "perceptron": Perceptron(),
    "dcgan": DCGAN(norm=False),
    "resnet": ResNet(),
    "sagan": ResNet(norm="condition", attention="full", noise=True),
    "ylg": ResNet(attention="local", split=True),
    "style": Style(mapping=2),
    "progressive": Growing(),
    "multi-scale": MultiScale(),
    "laplacian": Laplacian(),
    "autogan": Cell(),
    "unet": Translation(),
    "spade": Spade(),
    "spade-instance": Spade(norm="instance"),
}
# Those that are nothing without halvings, and those that make scans of an image.
SEVERAL_SIZES = {"progressive", "multi-scale", "laplacian", "autogan", "unet"}
OF_AN_IMAGE = {"unet", "spade", "spade-instance"}
COUNT, CODE = 3, 7
FRAMES = {
    "2d": Frame((8, 12), 2, CODE, width=4, levels=2),
    "2d-folded": Frame((12, 8), 1, CODE, width=4, levels=1, fold=2, depth=2),
    "3d": Frame((8, 4, 12), 2, CODE, width=4, levels=2),
}
EVERY = pytest.mark.parametrize("kind", list(KINDS))
EVERYWHERE = pytest.mark.parametrize("where", list(FRAMES))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def framed(where: str, **changes: object) -> Frame:
    return replace(FRAMES[where], context=1, beside=1, **changes)


def built(kind: str, frame: Frame) -> tuple[Generator, Critic]:
    """Both networks, every parameter away from its starting point."""
    torch.manual_seed(0)
    networks = KINDS[kind].generator(frame), KINDS[kind].critic(frame)
    with torch.no_grad():
        for n, parameter in enumerate(p for network in networks for p in network.parameters()):
            parameter += 0.05 * noise(*parameter.shape, seed=n)
    return networks


def inputs(
    generator: Generator, frame: Frame, count: int = COUNT
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Code with noise, condition, given image."""
    told = functional.one_hot(torch.arange(count) % 2, frame.numbers).float() if frame.numbers else None
    return noise(count, generator.draws), told, noise(count, 1, *frame.shape, seed=5)


def scans(frame: Frame) -> torch.Tensor:
    return noise(COUNT, frame.channels, *frame.shape, seed=9).tanh()


# -- every architecture ----------------------------------------------------------------------------


@EVERY
@EVERYWHERE
def test_scans_come_at_every_size_and_the_critic_sees_both_kinds_alike(kind, where):
    frame = framed(where, numbers=2)
    generator, critic = built(kind, frame)
    code, told, image = inputs(generator, frame)
    made = generator(code, told, image)
    assert made[-1].shape == (COUNT, frame.channels, *frame.shape)
    assert all(fine.shape[2:] == tuple(2 * n for n in coarse.shape[2:]) for coarse, fine in pairwise(made))
    real = scans(frame)
    seen, drawn = generator.seen(real), generator.drawn(code, told, image, real)
    assert [x.shape for x in seen] == [x.shape for x in drawn]
    assert critic(drawn, image).shape[:2] == (COUNT, critic.width)
    assert critic(seen, image).shape == critic(drawn, image).shape
    assert generator(code[:, :CODE], told, image)[-1].shape == made[-1].shape


@EVERY
@EVERYWHERE
def test_what_the_critic_sees_reaches_all_parameters(kind, where):
    frame = framed(where, numbers=2)
    generator, critic = built(kind, frame)
    code, told, image = inputs(generator, frame)
    features = critic(generator.drawn(code, told, image, scans(frame)), image)
    (features * noise(*features.shape, seed=2)).sum().backward()
    for network in (generator, critic):
        idle = [n for n, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
        assert not idle


@EVERY
@pytest.mark.parametrize("normed", [False, True])
def test_slopes_of_critics_are_differentiable(kind, normed):
    frame = framed("2d", spectral=normed)
    generator, critic = built(kind, frame)
    at = [x.detach().requires_grad_() for x in generator.seen(scans(frame))]
    slopes = torch.autograd.grad(critic(at, inputs(generator, frame)[2]).square().sum(), at, create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    gradients = [p.grad for p in critic.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@EVERY
@EVERYWHERE
def test_in_evaluation_a_scan_does_not_depend_on_its_neighbours(kind, where):
    frame = framed(where)
    generator, critic = (network.eval() for network in built(kind, frame))
    code, told, image = inputs(generator, frame)
    real = scans(frame)
    with torch.no_grad():
        all_drawn = generator.drawn(code, told, image, real)
        alone = generator.drawn(code[1:2], told, image[1:2], real[1:2])
        features = critic(all_drawn, image)
        feature = critic(alone, image[1:2])
    for many, one in zip(all_drawn, alone, strict=True):
        torch.testing.assert_close(many[1:2], one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features[1:2], feature, atol=1e-5, rtol=1e-4)


@EVERY
def test_without_halvings_an_architecture_works_or_says_what_it_needs(kind):
    frame = framed("2d", levels=0)
    if kind in SEVERAL_SIZES:
        with pytest.raises(ValueError, match="levels must be 1 or more"):
            built(kind, frame)
        return
    generator, critic = built(kind, frame)
    code, told, image = inputs(generator, frame)
    assert critic(generator(code, told, image), image).shape[:2] == (COUNT, critic.width)


@pytest.mark.parametrize("kind", sorted(OF_AN_IMAGE))
def test_translations_need_an_image(kind):
    with pytest.raises(ValueError, match="context must be 1 or more"):
        KINDS[kind].generator(FRAMES["2d"])
    generator, _ = built(kind, framed("2d"))
    with pytest.raises(ValueError, match="none was given"):
        generator(noise(COUNT, generator.draws))


@EVERY
def test_half_precision_gives_about_the_same(kind):
    frame = framed("2d")
    generator, critic = (network.eval() for network in built(kind, frame))
    code, told, image = inputs(generator, frame)
    with torch.no_grad():
        exact = generator(code, told, image)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = generator(code, told, image)
        features = critic(generator.drawn(code, told, image, scans(frame)), image)
    assert bool(torch.isfinite(features).all())
    assert float((exact[-1] - rough[-1]).abs().mean()) < 0.05 * float(exact[-1].std()) + 0.01


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(4, 4), (8, 8), (5, 3), (2, 7), (3, 4, 2), (1, 1), (1, 2)])
def test_two_steps_of_local_attention_reach_everything(space):
    first, second, back, again = (mask.float() for mask in local_masks(space))
    assert bool((second @ first > 0).all())
    assert bool((again @ back > 0).all())
    # Blocks of sqrt(n), so no pattern has more than about n sqrt(n) of the n^2 pairs.
    count = first.shape[0]
    assert max(float(mask.sum()) for mask in (first, second, back, again)) <= count * (2 * count**0.5 + 2)
    assert all(bool(mask.diagonal().bool().all()) for mask in (first, second, back, again))


def test_local_attention_runs_along_distance_from_a_corner():
    first, second, back, again = local_masks((4, 4))
    order = sorted(range(16), key=lambda n: (n // 4 + n % 4, n // 4))
    rank = {position: place for place, position in enumerate(order)}
    for row in range(16):
        for column in range(16):
            i, j = rank[row], rank[column]
            assert bool(first[row, column]) == (i // 4 == j // 4 and j <= i)
            assert bool(second[row, column]) == (i == j or j % 4 == 3)
            assert bool(back[row, column]) == (i // 4 == j // 4 and j >= i)
            assert bool(again[row, column]) == (i == j or j % 4 == 0)


@pytest.mark.parametrize("space", [(4, 4), (2, 3, 2)])
def test_a_head_of_local_attention_hears_only_what_its_mask_shows(space):
    torch.manual_seed(0)
    dims, count = len(space), len(local_masks(space)[0])
    layer = Attention(dims, 32, space, "local", normed=False)
    with torch.no_grad():
        layer.gamma.fill_(1.0)
    x = noise(1, 32, *space).requires_grad_()
    heard = torch.stack(local_masks(space)).any(0)
    reached = torch.zeros(count, count, dtype=torch.bool)
    for position in range(count):
        found = torch.autograd.grad(layer(x).flatten(2)[..., position].square().sum(), x)[0]
        reached[position] = found.flatten(2).abs().sum((0, 1)) > 0
    assert torch.equal(reached, heard)


def test_full_attention_weighs_by_likeness():
    torch.manual_seed(0)
    layer, x = Attention(2, 16, (2, 3), "full", normed=False), noise(2, 16, 2, 3)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.gamma.fill_(0.5)
    query, key, value = (part(x).flatten(2) for part in (layer.query, layer.key, layer.value))
    weights = torch.einsum("bdi,bdj->bij", query, key).div(query.shape[1] ** 0.5).softmax(2)
    gathered = torch.einsum("bij,bdj->bdi", weights, value).reshape(2, -1, 2, 3)
    torch.testing.assert_close(layer(x), x + 0.5 * layer.out(gathered))


# -- style -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_a_modulated_convolution_has_the_weights_of_its_definition(dims):
    torch.manual_seed(0)
    layer = Modulated(dims, 5, 6, style=4)
    x, style = noise(3, 5, *(4, 3, 5)[:dims]), noise(3, 4, seed=1)
    scales, weight = layer.scales(style), layer.conv.weight
    own = weight[None] * scales.reshape(3, 1, 5, *[1] * dims)
    own = own / (own.square().flatten(2).sum(2) + 1e-8).sqrt().reshape(3, 6, *[1] * (dims + 1))
    grouped = functional.conv2d if dims == 2 else functional.conv3d
    expected = grouped(x.reshape(1, 15, *x.shape[2:]), own.flatten(0, 1), padding=1, groups=3).reshape(
        3, 6, *x.shape[2:]
    )
    torch.testing.assert_close(layer(x, style), expected)


def test_style_and_noise_both_change_the_scan():
    frame = framed("2d")
    generator, _ = built("style", frame)
    code = noise(1, generator.draws)
    other, grainy = code.clone(), code.clone()
    other[:, 0] += 1
    grainy[:, CODE:] += 1
    with torch.no_grad():
        scan, changed, noisy = (generator(z)[0] for z in (code, other, grainy))
        again = generator(3 * code[:, :CODE])[0]
        smooth = generator(code[:, :CODE])[0]
    assert not torch.allclose(scan, changed)
    assert not torch.allclose(scan, noisy)
    # The code is divided by its root mean square, so its length says nothing.
    torch.testing.assert_close(again, smooth, atol=1e-4, rtol=1e-4)


# -- growing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_levels_are_added_in_order_and_all_there_at_three_quarters(levels):
    steps = [grown(n / 1000, levels) for n in range(1001)]
    assert steps[0] == 0
    assert all(value == levels for value in steps[750:])
    assert all(0 <= after - before < 0.02 * levels for before, after in pairwise(steps))
    held = sum(value == int(value) for value in steps[:750])
    assert abs(held - 375) < 10


@pytest.mark.parametrize("where", ["2d", "3d"])
def test_growing_networks_fade_without_a_jump(where):
    frame = framed(where)
    generator, critic = (network.eval() for network in built("progressive", frame))
    code, told, image = inputs(generator, frame)
    real = scans(frame)

    @torch.no_grad()
    def at(progress: float) -> list[torch.Tensor]:
        generator.progress = critic.progress = progress
        drawn, seen = generator.drawn(code, told, image, real), generator.seen(real)
        return [drawn[0], seen[0], critic(drawn, image), critic(seen, image)]

    borders = [0.75 * n / (2 * frame.levels) for n in range(1, 2 * frame.levels + 1)]
    for border in borders:
        for before, after in zip(at(border - 1e-6), at(border + 1e-6), strict=True):
            torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)
    middle, before, after = (at(t)[0] for t in (1.5 * borders[0], borders[0], borders[1]))
    torch.testing.assert_close(middle, (before + after) / 2, atol=1e-4, rtol=1e-4)


def test_growing_networks_see_nothing_finer_than_what_is_grown():
    frame = framed("2d")
    generator, critic = (network.eval() for network in built("progressive", frame))
    code, told, image = inputs(generator, frame)
    real = scans(frame)
    generator.progress = critic.progress = 0.0
    seen = generator.seen(real)[0]
    torch.testing.assert_close(seen, doubled(doubled(halved(halved(real)))))
    drawn = generator(code, told, image)
    assert [x.shape[2:] for x in drawn] == [(2, 3), (4, 6), (8, 12)]
    torch.testing.assert_close(drawn[-1], doubled(doubled(drawn[0])))
    torch.testing.assert_close(critic([real], image), critic([seen], image))
    generator.progress = critic.progress = 1.0
    assert torch.equal(generator.seen(real)[0], real)
    assert not torch.allclose(critic([real], image), critic([seen], image), atol=1e-3)


def test_equalised_weights_are_scaled_when_used():
    torch.manual_seed(0)
    layer = equalised(torch.nn.Linear(400, 300)).requires_grad_(False)
    assert float(layer.weight.std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    stored = dict(layer.named_parameters())["parametrizations.weight.original"]
    assert float(stored.std()) == pytest.approx(1, rel=0.02)
    assert float(layer(noise(500, 400)).std()) == pytest.approx(2**0.5, rel=0.05)


def test_pixel_norm_has_unit_mean_square_at_every_position():
    torch.testing.assert_close(pixel_normal(noise(2, 5, 3, 4)).square().mean(1), torch.ones(2, 3, 4))


def test_deviation_tells_alike_scans_from_different_ones_and_is_settled_in_evaluation():
    layer, x = Deviation(), noise(4, 3, 2, 2)
    different = layer(x)[:, -1]
    alike = layer(x[:1].expand(4, 3, 2, 2))[:, -1]
    torch.testing.assert_close(different, x.std(0, correction=0).mean().expand(4, 2, 2))
    assert float(alike.max()) < 1e-3
    layer.eval()
    assert torch.equal(layer(x)[:1], layer(x[:1]))


# -- several sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["multi-scale", "laplacian"])
def test_a_critic_of_several_sizes_takes_a_scan_apart(kind):
    frame = framed("3d")
    generator, critic = (network.eval() for network in built(kind, frame))
    real, (*_, image) = scans(frame), inputs(generator, frame)
    torch.testing.assert_close(critic([real], image), critic(generator.seen(real), image))


def test_every_size_of_a_multi_scale_scan_counts():
    frame = framed("2d")
    generator, critic = built("multi-scale", frame)
    at = [x.requires_grad_() for x in generator.seen(scans(frame))]
    assert [x.shape[2:] for x in at] == [(2, 3), (4, 6), (8, 12)]
    slopes = torch.autograd.grad(critic(at, inputs(generator, frame)[2]).square().sum(), at)
    assert all(bool((slope.flatten(1).abs().amax(1) > 0).all()) for slope in slopes)


@pytest.mark.parametrize("space", [(8, 12), (4, 8, 4)])
def test_a_laplacian_pyramid_adds_up_to_the_scan(space):
    x = noise(2, 3, *space)
    coarsest, *finer = laplacian_pyramid(x, 2)
    again = coarsest
    for level in finer:
        torch.testing.assert_close(level[:, :3], enlarged(again))
        again = enlarged(again) + level[:, 3:]
    torch.testing.assert_close(again, x)
    assert torch.equal(coarsest, sizes_of(x, 2)[0])


def test_laplacian_levels_start_from_real_scans_in_training_and_from_their_own_in_sampling():
    frame = FRAMES["2d"]
    generator, _ = built("laplacian", frame)
    code, real = noise(COUNT, CODE), scans(frame)
    drawn, seen, made = generator.drawn(code, None, None, real), generator.seen(real), generator(code)
    torch.testing.assert_close(drawn[0], made[0])
    for ours, theirs in zip(drawn[1:], seen[1:], strict=True):
        assert torch.equal(ours[:, :2], theirs[:, :2])
        assert not torch.allclose(ours[:, 2:], theirs[:, 2:])
    # Given its own samples instead, training makes what sampling makes.
    own = generator.drawn(code, None, None, made[-1])
    coarser = sizes_of(made[-1], 2)
    torch.testing.assert_close(own[2][:, :2], enlarged(coarser[1]))
    # A level's loss is its own networks' business.
    names = [name for name, _ in generator.named_parameters()]
    found = torch.autograd.grad(drawn[1].sum(), list(generator.parameters()), allow_unused=True)
    assert {n.split(".")[1] for n, gradient in zip(names, found, strict=True) if gradient is not None} == {"1"}


def test_laplacian_verdicts_are_one_a_level_and_independent():
    frame = FRAMES["2d"]
    generator, critic = built("laplacian", frame)
    seen = generator.seen(scans(frame))
    features = critic(seen)
    assert features.shape == (COUNT, critic.width, 3)
    changed = critic([seen[0], seen[1] + 1, seen[2]])
    same = [torch.equal(features[..., n], changed[..., n]) for n in range(3)]
    assert same == [True, False, True]


def test_a_code_shorter_than_the_pyramid_is_read_again():
    frame = replace(FRAMES["2d"], code=2)
    generator, _ = built("laplacian", frame)
    assert generator(noise(COUNT, 2))[-1].shape == (COUNT, 2, 8, 12)


# -- the searched cells ----------------------------------------------------------------------------


def test_cells_are_those_of_the_published_genotype():
    assert [number for cell in GENOTYPE for number in cell] == [1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 3]
    assert wirings(3) == [
        Wiring("nearest", True, ()),
        Wiring("linear", True, (1,)),
        Wiring("nearest", False, (1, 2)),
    ]
    generator = Cell().generator(Frame((16, 8), 1, CODE, width=4, levels=3))
    cells = list(generator.cells)
    assert [cell.mode for cell in cells] == ["nearest", "bilinear", "nearest"]
    assert [cell.shortcut is not None for cell in cells] == [True, True, False]
    assert [len(cell.skips) for cell in cells] == [0, 1, 2]
    norms = [m for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == [generator.norm]


def test_more_cells_repeat_the_last_and_fewer_drop_it():
    assert wirings(1) == wirings(3)[:1]
    assert wirings(5)[3:] == [wirings(3)[2]] * 2
    frame = Frame((32, 16, 16), 1, CODE, width=2, levels=4)
    generator = Cell().generator(frame)
    assert generator(noise(COUNT, CODE))[0].shape == (COUNT, 1, 32, 16, 16)


# -- of images -------------------------------------------------------------------------------------


def halves(frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask, and another that differs from it in one corner only."""
    mask = torch.zeros(1, 1, *frame.shape)
    mask[:, :, 10:] = 1
    other = mask.clone()
    other[:, :, :4, :4] = 1
    return mask, other


@pytest.mark.parametrize("kind", ["spade", "spade-instance", "unet"])
def test_another_mask_changes_the_scan_most_where_it_differs(kind):
    frame = Frame((32, 32), 1, CODE, context=1, width=4, levels=1)
    generator = built(kind, frame)[0].eval()
    code = noise(1, CODE)
    with torch.no_grad():
        one, other = (generator(code, None, mask)[0] for mask in halves(frame))
    change = (one - other).abs()[0, 0]
    assert float(change[:4, :4].mean()) > 3 * float(change[16:, 16:].mean())
    assert float(change[:4, :4].mean()) > 1e-3


@pytest.mark.parametrize("kind", sorted(OF_AN_IMAGE))
def test_an_image_has_more_than_one_scan(kind):
    frame = framed("2d")
    generator = built(kind, frame)[0].eval()
    code, told, image = inputs(generator, frame)
    with torch.no_grad():
        first, second = (generator(z, told, image[:1])[0] for z in (code[:1], code[1:2]))
    assert float((first - second).abs().max()) > 1e-3


def test_a_patch_critic_judges_patches_by_what_is_near():
    frame = Frame((64, 64), 1, CODE, context=1, width=4, levels=2)
    critic = built("unet", frame)[1].eval()
    x = noise(1, 1, 64, 64)
    other = x.clone()
    other[..., :4, :4] += 1
    with torch.no_grad():
        changed = (critic([x]) - critic([other])).abs().amax(1)[0]
    assert changed.shape == (16, 16)
    assert float(changed[0, 0]) > 0
    assert float(changed[8:, 8:].max()) == 0


def test_a_spade_critic_sees_two_scales_where_there_are_two():
    for levels, scales in ((0, 1), (2, 2)):
        frame = framed("2d", levels=levels)
        found = built("spade", frame)[1]([scans(frame)], noise(COUNT, 1, *frame.shape))
        space = frame.at(levels)
        assert found.shape[2:] == (space if scales == 1 else (2, *space))


def test_the_second_scale_of_a_spade_critic_does_not_see_what_halving_takes_away():
    frame = framed("2d")
    critic, real = built("spade", frame)[1], scans(frame)
    stripes = real + torch.tensor([1.0, -1.0]).repeat(frame.shape[1] // 2)
    image = noise(COUNT, 1, *frame.shape)
    with torch.no_grad():
        plain, striped = critic([real], image), critic([stripes], image)
    torch.testing.assert_close(plain[:, :, 1], striped[:, :, 1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain[:, :, 0], striped[:, :, 0], atol=1e-3)
