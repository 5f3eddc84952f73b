"""What a generator begins with: a mixture of the scans, fitted in closed form, whose contrast varies as theirs does."""

import pytest
import torch

from medgen.data.dataset import Batch
from medgen.models.gan import GAN
from medgen.models.gan.start import MixtureStart


def uneven(n: int, size: int = 8, *, seed: int = 0) -> torch.Tensor:
    """Scans on the scale -1 to 1 of normal noise, one as strong again as another by a log-normal factor."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.exp(0.5 * torch.randn(n, 1, 1, 1, generator=generator))
    return 0.1 * strength * torch.randn(n, 1, size, size, generator=generator)


def drawn(start: MixtureStart, n: int, classes: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    code = torch.randn(n, start.code, generator=generator)
    detail = torch.randn(n, start.draws, generator=generator)
    return start(code, detail, torch.zeros(n, dtype=torch.long) if classes is None else classes)


def fitted(x: torch.Tensor, classes: torch.Tensor | None = None, count: int = 0) -> MixtureStart:
    start = MixtureStart(tuple(x.shape[1:]), 8, count, 1)
    start.fit(x, torch.zeros(len(x), dtype=torch.long) if classes is None else classes)
    return start


def test_mean_and_covariance_are_those_of_the_scans():
    x = uneven(2000) + 0.3
    made = drawn(fitted(x), 4000)
    assert float((made.mean(0) - x.mean(0)).abs().max()) < 0.03
    # Components beyond the 32 kept ones are left to the network.
    kept = torch.linalg.eigvalsh(x.flatten(1).T.cov())[-32:].sum()
    assert float(made.flatten(1).var(0).sum()) == pytest.approx(float(kept), rel=0.1)


def test_draws_differ_in_strength_as_scans_do():
    x = uneven(2000)
    spread = torch.log(x.flatten(1).std(1)).std()
    made = torch.log(drawn(fitted(x), 2000).flatten(1).std(1)).std()
    even = torch.log(drawn(fitted(0.1 * torch.randn(2000, 1, 8, 8)), 2000).flatten(1).std(1)).std()
    assert float(made) == pytest.approx(float(spread), rel=0.25)
    assert float(even) < 0.4 * float(made)


def test_each_class_has_its_own_mixture():
    classes = torch.arange(600) % 2
    x = uneven(600) + classes.reshape(-1, 1, 1, 1) - 0.5
    start = fitted(x, classes, 2)
    made = drawn(start, 400, torch.arange(400) % 2).flatten(1).mean(1)
    assert float(made[::2].mean()) == pytest.approx(-0.5, abs=0.05)
    assert float(made[1::2].mean()) == pytest.approx(0.5, abs=0.05)


def test_few_scans_and_a_code_alone_will_do():
    start = fitted(uneven(5))
    assert bool(torch.isfinite(drawn(start, 4)).all())
    code = torch.randn(3, start.code)
    made = start(code, code[:, :0], torch.zeros(3, dtype=torch.long))
    assert made.shape == (3, 1, 8, 8)
    assert torch.equal(made, start(code, torch.zeros(3, start.draws), torch.zeros(3, dtype=torch.long)))


def test_an_untrained_gan_draws_from_its_start():
    torch.manual_seed(0)
    model = GAN(GAN.Config(shape=(8, 8), width=8, levels=1, latent=8))
    model.initialise(Batch((uneven(300) + 1) / 2))
    model.eval()
    z = torch.randn(4, model.pair.numbers)
    start = model.pair.start
    assert start is not None
    base = start(z[:, :8], z[:, model.pair.generator.draws :], torch.zeros(4, dtype=torch.long))
    assert torch.allclose(model.pair.made(z, None, None), base, atol=1e-6)
