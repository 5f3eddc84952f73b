"""Networks' parts: sizes, exact inverses, identity at the start, and gradients that are the same every time."""

import pytest
import torch

from medgen.nets.blocks import (
    ConditionBias,
    Decoder,
    Encoder,
    Fold,
    Residual,
    Unfold,
    Up,
    channels_last,
    conv,
    count_parameters,
    from_blocks,
    level_widths,
    norm,
    to_blocks,
)

SPACES = {2: (8, 12), 3: (4, 8, 12)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution_divides_every_axis_by_its_stride(dims, stride, kernel):
    x = noise(5, 3, *SPACES[dims])
    assert conv(dims, 3, 7, kernel, stride)(x).shape == (5, 7, *[n // stride for n in SPACES[dims]])


@pytest.mark.parametrize(("dims", "space"), [(3, (2, 4, 4)), (3, (2, 2, 2)), (3, (4, 4, 4)), (2, (1, 1)), (2, (4, 4))])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_weight_gradients_are_right_and_the_same_every_time(dims, space, stride):
    layer, x = conv(dims, 16, 16, 3, stride), noise(8, 16, *space)

    def gradient(precision: bool) -> torch.Tensor:
        # Memory full of NaN, which the next allocations get back: reading what nobody wrote would show.
        for size in (64, 512, 4096, 8192, 16 * 16 * 3**dims):
            torch.full((size,), float("nan"), dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision):
            y = layer(x)
        return torch.autograd.grad(y.float().square().sum(), layer.weight)[0]

    exact, first = gradient(False), gradient(True)
    assert float((first - exact).abs().max()) < 0.05 * float(exact.abs().max())
    for _ in range(10):
        assert torch.equal(gradient(True), first)


def test_blocks_are_cut_in_place_and_put_back():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    rows = to_blocks(x, (2, 3))
    assert rows.shape == (2, 2, 2, 18)
    # Block (1, 0) of scan 1 holds exactly the voxels of rows 2-3 and columns 0-2, all channels.
    assert torch.equal(rows[1, 1, 0].sort().values, x[1, :, 2:4, 0:3].flatten().sort().values)
    assert torch.equal(from_blocks(rows, (2, 3)), x)


@pytest.mark.parametrize("dims", [2, 3])
def test_unfold_inverts_fold(dims):
    x = noise(2, 3, *SPACES[dims])
    folded = Fold(dims, 2)(x)
    assert folded.shape == (2, 3 * 2**dims, *[n // 2 for n in SPACES[dims]])
    assert torch.equal(Unfold(dims, 2)(folded), x)


@pytest.mark.parametrize("dims", [2, 3])
def test_residual_block_begins_as_the_identity_and_can_learn(dims):
    block, x = Residual(dims, 12), noise(2, 12, *SPACES[dims])
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert float(block.inner[-1].weight.grad.abs().max()) > 0


@pytest.mark.parametrize("width", [1, 2, 3, 6, 8, 20, 64])
def test_norm_works_for_any_width_and_a_batch_of_one(width):
    y = norm(width)(noise(1, width, 4, 4) * 3 + 5).detach()
    assert y.shape == (1, width, 4, 4)
    assert abs(float(y.mean())) < 1e-4


def test_norm_of_a_scan_does_not_depend_on_its_neighbours_in_the_batch():
    layer, x = norm(8), noise(3, 8, 6, 6)
    assert torch.equal(layer(x)[1], layer(x[1:2])[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_up_doubles_every_axis(dims):
    assert Up(dims, 3, 5)(noise(2, 3, *SPACES[dims])).shape == (2, 5, *[2 * n for n in SPACES[dims]])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("depth", [0, 1])
def test_decoder_mirrors_encoder(dims, fold, depth):
    space = (8, 16) if dims == 2 else (8, 8, 16)
    encoder = Encoder(dims, 3, 4, 2, fold=fold, depth=depth, classes=0)
    decoder = Decoder(dims, 3, 4, 2, fold=fold, depth=depth, classes=0)
    features = encoder(noise(2, 3, *space))
    assert features.shape == (2, encoder.width, *[n // (4 * fold) for n in space])
    assert decoder(features).shape == (2, 3, *space)


def test_condition_adds_the_class_everywhere_and_nothing_without_classes():
    x, cond = noise(3, 4, 5, 5), torch.tensor([1, 0, 1])
    layer = ConditionBias(2, 4)
    added = layer(x, cond) - x
    assert torch.allclose(added, layer.table.weight[cond][:, :, None, None].expand_as(x), atol=1e-6)
    assert layer(x, None) is x
    assert count_parameters(ConditionBias(0, 4)) == 0


def test_widths_double_up_to_four_times():
    assert level_widths(8, 4) == [8, 16, 32, 32, 32]


@pytest.mark.parametrize(("dims", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last_changes_the_layout_and_no_number(dims, layout):
    layer, x = conv(dims, 4, 6), noise(2, 4, *SPACES[dims])
    before = layer(x)
    channels_last(layer, dims)
    assert layer.weight.is_contiguous(memory_format=layout)
    assert torch.allclose(layer(x), before, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_leaves_all_but_convolutions_alone(dims, rank):
    module = torch.nn.Sequential(conv(dims, 2, 2))
    module.register_buffer("table", torch.arange(2.0**rank).reshape((2,) * rank))
    channels_last(module, dims)
    assert module.table.is_contiguous()


def test_frozen_parameters_are_not_counted():
    layer = conv(2, 3, 5)
    assert count_parameters(layer) == 5 * 3 * 9 + 5
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 5 * 3 * 9
