"""Autoregressive densities: exact over every scan there is, blind to what comes later, the same voxel by voxel."""

import math
from itertools import product

import pytest
import torch

from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, DataError
from medgen.models import autoregressive
from medgen.models.autoregressive import Autoregressive
from medgen.nets.causal import CausalStack, Style
from medgen.nets.masked import MaskedMLP
from medgen.nets.rowlstm import RowLSTM
from medgen.prob.levels import GreyValues

NETWORKS = {
    "gated": {},
    "pixelcnnpp": {"levels": 1, "dropout": 0.3},
    "rowlstm": {},
    "wavenet": {"depth": 2},
    "masked-mlp": {"dropout": 0.3},
}
NETWORK = pytest.mark.parametrize("network", NETWORKS)
DIMS = pytest.mark.parametrize("dims", [2, 3])
SPACES = {2: (4, 5), 3: (3, 3, 4)}


def moved(module: torch.nn.Module, by: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from where it began, so that nothing is zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def made(network: str, shape: tuple[int, ...], **changes: object) -> Autoregressive:
    torch.manual_seed(0)
    config = {"network": network, "shape": shape, "width": 6, "depth": 1, "components": 2} | NETWORKS[network] | changes
    return moved(Autoregressive(Autoregressive.Config(**config)))


def every_scan(bits: int, channels: int, shape: tuple[int, ...]) -> torch.Tensor:
    """All scans of so many grey values."""
    size, levels = channels * math.prod(shape), 2**bits
    rows = torch.tensor(list(product(range(levels), repeat=size)), dtype=torch.float32)
    return rows.reshape(-1, channels, *shape) / (levels - 1)


def outputs_depend_on(model: Autoregressive, channels: int) -> torch.Tensor:
    """Whether the numbers said of place i (voxels in raster order, channels inside) change with place j."""
    x = torch.rand(1, channels, *model.config.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net = model.net.double()

    def said(row: torch.Tensor) -> torch.Tensor:
        scan = row.reshape(*model.config.shape, channels).movedim(-1, 0)[None]
        found = net(scan)[0].movedim(0, -1).movedim(0, -1)  # space, channels, numbers
        weights = torch.arange(1, found.shape[-1] + 1, dtype=torch.float64)
        return (found * weights).sum(-1).flatten()

    row = x[0].movedim(0, -1).flatten()
    return torch.autograd.functional.jacobian(said, row) != 0


# -- causality ---------------------------------------------------------------------------------------


@NETWORK
@DIMS
@pytest.mark.parametrize("channels", [1, 2])
def test_what_is_said_of_a_voxel_depends_on_no_later_one(network, dims, channels):
    depends = outputs_depend_on(made(network, SPACES[dims], position=3, channels=channels), channels)
    assert not bool(depends.triu().any())
    # The voxel before in the row, and earlier channels of the same voxel, do count.
    before = [i for i in range(1, len(depends)) if i % channels or i // channels % SPACES[dims][-1]]
    assert bool(depends[before, [i - 1 for i in before]].all())


@DIMS
@pytest.mark.parametrize(
    "style",
    [Style(), Style("resnet"), Style("resnet", levels=1), Style(dilations=(1, 2))],
    ids=["gated", "resnet", "levels", "dilated"],
)
def test_stacks_see_the_whole_past_without_a_blind_spot(dims, style):
    space = (5, 6) if dims == 2 else (3, 4, 4)
    torch.manual_seed(0)
    stack = moved(CausalStack(dims, 1, 2, width=4, depth=5 if not style.levels else 3, style=style)).double()
    size = math.prod(space)
    row = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = torch.autograd.functional.jacobian(lambda r: stack(r.reshape(1, 1, *space))[0].sum(0).flatten(), row) != 0
    assert torch.equal(seen, torch.ones(size, size).tril(-1).bool())


def test_a_masked_perceptron_sees_the_whole_past_and_a_row_lstm_its_triangle():
    torch.manual_seed(0)
    mlp = moved(MaskedMLP(7, 2, width=9, depth=2)).double()
    seen = torch.autograd.functional.jacobian(lambda r: mlp(r[None])[0].sum(1), torch.rand(7).double()) != 0
    assert torch.equal(seen, torch.ones(7, 7).tril(-1).bool())
    net = moved(RowLSTM(2, 1, 2, width=4, depth=1)).double()
    x = torch.rand(1, 1, 4, 9, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0, :, 3, 4].sum(), x)
    seen = grad[0, 0] != 0
    # One column wider to the right with each row above, as far as the kernel goes.
    assert [int(columns.nonzero().max()) for columns in seen] == [6, 5, 4, 3]


@NETWORK
def test_a_given_image_may_be_seen_everywhere(network):
    model = made(network, (4, 5), context=1)
    x, context = torch.rand(1, 1, 4, 5), torch.rand(1, 1, 4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(model.net(x, None, context)[0, 0, :, 1, 1].sum(), context)
    assert bool((grad[0, 0, 2, 1:3] != 0).all())
    with pytest.raises(DataError, match="context"):
        model.log_prob(x)


# -- probabilities -----------------------------------------------------------------------------------


@NETWORK
@pytest.mark.parametrize("output", ["logistic-mixture", "categorical"])
@pytest.mark.parametrize(("bits", "channels"), [(2, 1), (1, 2), (1, 3)])
def test_probabilities_of_all_scans_sum_to_one(network, output, bits, channels):
    shape = (2, 2)
    model = made(network, shape, output=output, bits=bits, channels=channels, position=2, classes=("calm", "stormy"))
    scans = every_scan(bits, channels, shape)
    for cond in (None, torch.zeros(len(scans), dtype=torch.long), torch.ones(len(scans), dtype=torch.long)):
        assert float(model.log_prob(scans, cond).double().exp().sum()) == pytest.approx(1, abs=1e-4)


@NETWORK
def test_probabilities_of_all_volumes_sum_to_one(network):
    model = made(network, (2, 2, 2), bits=1)
    assert float(model.log_prob(every_scan(1, 1, (2, 2, 2))).double().exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["logistic-mixture", "categorical"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_voxels_grey_values_sum_to_one_and_are_drawn_as_often(kind, bits):
    grey = GreyValues(kind, bits, 3)
    output = torch.randn(1, grey.width, generator=torch.Generator().manual_seed(bits))
    values = torch.arange(grey.levels) / (grey.levels - 1)
    chances = grey.log_prob(output.expand(grey.levels, -1), values).double().exp()
    assert float(chances.sum()) == pytest.approx(1, abs=1e-5)
    n = 20000
    u = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = (grey.draw(output.expand(n, -1), u) * (grey.levels - 1)).round().long()
    often = torch.bincount(drawn, minlength=grey.levels).double() / n
    assert float((often.cumsum(0) - chances.cumsum(0)).abs().max()) < 1.63 / math.sqrt(n)  # Kolmogorov, 1 %


@NETWORK
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_as_frequent_as_they_are_probable(network, channels, monkeypatch):
    monkeypatch.setitem(autoregressive._MICRO_BATCH, 2, 1600)
    shape = (2, 2) if channels == 1 else (1, 2)
    model = made(network, shape, bits=1, channels=channels)
    scans = every_scan(1, channels, shape)
    chances = model.log_prob(scans).double().exp()
    n = 1600
    drawn = model.sample(n, seed=3)
    which = (drawn.flatten(1) * 2 ** torch.arange(3, -1, -1)).sum(1).long()
    counts = torch.bincount(which, minlength=16).double()
    statistic = float(((counts - n * chances) ** 2 / (n * chances)).sum())
    assert statistic < 37.7  # chi-squared with 15 degrees of freedom, 0.1 %


@NETWORK
@DIMS
@pytest.mark.parametrize("channels", [1, 2])
def test_voxel_by_voxel_is_the_same_as_all_at_once(network, dims, channels):
    shape = SPACES[dims]
    model = made(network, shape, channels=channels, position=2, context=1, classes=("calm", "stormy"))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.rand(3, channels, *shape, generator=generator), torch.rand(3, 1, *shape, generator=generator)
    cond = torch.tensor([0, 1, 1])
    with torch.no_grad():
        whole = model.net(x, cond, context)
    for begin in (0, 1):
        walk = model.net.walk(shape, 3, cond, context)
        if begin:
            walk.fill(x)
        for index in product(range(begin, shape[0]), *[range(size) for size in shape[1:]]):
            here = (slice(None), slice(None), *index)
            for k in range(channels):
                said = walk.at(index, x[here][:, :k])
                assert torch.allclose(said, whole[(slice(None), k, slice(None), *index)], atol=1e-4)
            walk.put(index, x[here])


@NETWORK
def test_a_map_sums_to_the_density_and_rounds_as_grey_values_do(network):
    model = made(network, (4, 5), channels=2)
    x = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    density = model.log_prob_map(x)
    assert density.shape == (3, 1, 4, 5)
    assert torch.allclose(density.flatten(1).sum(1), model.log_prob(x))
    assert torch.equal(model.log_prob((x * 255).round() / 255), model.log_prob(x))
    assert torch.allclose(-model(Batch(x)).total, model.log_prob(x))
    with pytest.raises(DataError, match="takes scans"):
        model.log_prob(x[..., :3])


@NETWORK
def test_nothing_is_dropped_once_trained(network):
    model = made(network, (4, 5), dropout=0.5)
    x = torch.rand(2, 1, 4, 5)
    assert torch.equal(model.log_prob(x), model.log_prob(x))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(Batch(x)).total, model(Batch(x)).total)


def test_every_condition_counts():
    known = {"classes": ("calm", "stormy"), "covariates": (Covariate(name="age"),)}
    for network in NETWORKS:
        model = made(network, (3, 4), **known)
        x, table = torch.rand(1, 1, 3, 4), torch.tensor([[1.0, 0.0, 0.5]])
        values = [model.log_prob(x, one) for one in (None, table, table.flip(1), torch.tensor([[1.0, 0.0, 2.0]]))]
        assert len({float(value) for value in values}) == 4


# -- holes -------------------------------------------------------------------------------------------


@NETWORK
def test_a_hole_is_filled_and_the_rest_stays_as_it_is(network):
    model = made(network, (4, 5), channels=2, candidates=3)
    x = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(3, 1, 4, 5, dtype=torch.bool)
    hole[0, :, 1:3, 2:4], hole[1, :, 3, 4] = True, True
    filled = model.inpaint(x, hole, seed=1)
    everywhere = hole.expand_as(x)
    assert torch.equal(filled[~everywhere], x[~everywhere])
    assert bool((filled[everywhere] != x[everywhere]).any())
    assert torch.equal(filled, model.inpaint(x, hole, seed=1))
    assert not torch.equal(filled, model.inpaint(x, hole, seed=2))
    # Scan i's filling does not depend on how many scans there are.
    assert torch.equal(filled[:1], model.inpaint(x[:1], hole[:1], seed=1))


def test_more_candidates_come_closer_to_what_the_rest_of_the_scan_says():
    """Two of four voxels of one bit are missing, the first ones: their exact distribution is known."""
    shape, hole = (2, 2), torch.tensor([[[[True, True], [False, False]]]])
    model = made("gated", shape, bits=1)
    moved(model, 1.0, seed=5)
    x = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])
    fillings = x.repeat(4, 1, 1, 1)
    fillings[:, 0, 0] = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    exact = model.log_prob(fillings).double().softmax(0)
    n = 120
    model.config = model.config.model_copy(update={"candidates": 20})
    drawn = model.inpaint(x.expand(n, -1, -1, -1), hole.expand(n, -1, -1, -1), seed=0)[:, 0, 0]
    often = torch.bincount((2 * drawn[:, 0] + drawn[:, 1]).long(), minlength=4).double() / n
    assert 0.5 * float((often - exact).abs().sum()) < 0.1
    # In raster order alone, whatever follows, the first voxels would be drawn otherwise.
    alone = model.log_prob_map(fillings)[:, 0, 0].sum(1).double().exp()
    assert 0.5 * float((alone - exact).abs().sum()) > 0.2


# -- a code of its own ---------------------------------------------------------------------------------


def darn(**changes: object) -> Autoregressive:
    return made("masked-mlp", (2, 2), bits=1, binary_code=3, dropout=0.0, **changes)


def test_with_a_binary_code_the_density_is_bounded():
    """All codes and all scans are counted: the bound, averaged over draws, is below the evidence, and that is one."""
    model, scans = darn(), every_scan(1, 1, (2, 2))
    codes = every_scan(1, 1, (3,)).flatten(1)
    assert model.code is not None
    ones = torch.ones(len(scans))
    joint, bound = [], torch.zeros(len(scans))
    with torch.no_grad():
        posterior = model.encode(scans)
        for code in codes:
            each = code.expand(len(scans), -1)
            distortion = model._voxels(scans, None, None, each)
            prior = -model.code.rate(posterior.mean, each, None) - posterior.entropy()
            joint.append(distortion + prior)
            bound += posterior.log_prob(each).exp() * (distortion - model.code.rate(posterior.mean, each, None))
    evidence = torch.stack(joint).logsumexp(0)
    assert float((evidence.exp() * ones).sum()) == pytest.approx(1, abs=1e-4)
    assert bool((bound <= evidence + 1e-5).all())
    many = scans.repeat(200, 1, 1, 1)
    torch.manual_seed(0)
    drawn = -model(Batch(many)).total.detach().reshape(200, -1).mean(0)
    assert torch.allclose(drawn, bound, atol=0.3)
    assert torch.allclose(model.log_prob_map(scans).flatten(1).sum(1), model.elbo(scans))


def test_samples_of_a_code_are_as_frequent_as_probable(monkeypatch):
    monkeypatch.setitem(autoregressive._MICRO_BATCH, 2, 1600)
    model, scans = darn(), every_scan(1, 1, (2, 2))
    codes = every_scan(1, 1, (3,)).flatten(1)
    assert model.code is not None
    with torch.no_grad():
        chances = torch.zeros(16)
        for code in codes:
            each = code.expand(len(scans), -1)
            half = torch.full_like(each, 0.5)
            prior = -model.code.rate(half, each, None) - 3 * math.log(2)
            chances += (model._voxels(scans, None, None, each) + prior).exp()
    n = 1600
    which = (model.sample(n, seed=0).flatten(1) * 2 ** torch.arange(3, -1, -1)).sum(1).long()
    counts = torch.bincount(which, minlength=16)
    assert float(((counts - n * chances) ** 2 / (n * chances)).sum()) < 37.7


def test_what_makes_no_sense_is_refused():
    for wrong in (
        {"network": "gated", "binary_code": 4},
        {"kernel": 4},
        {"output": "categorical", "bits": 12},
        {"bits": 0},
    ):
        with pytest.raises(ValueError):
            Autoregressive.Config(shape=(4, 4), **wrong)
    with pytest.raises(CapabilityError, match="bounds"):
        darn().log_prob(torch.rand(1, 1, 2, 2))
    with pytest.raises(CapabilityError, match="exact"):
        made("gated", (2, 2)).elbo(torch.rand(1, 1, 2, 2))
