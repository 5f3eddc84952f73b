"""What learns from drawn anomalies: how they are drawn, that a scan is judged without itself, that it finds some."""

import pytest
import torch

from medgen.data.dataset import Batch
from medgen.data.lesions import KINDS_A
from medgen.metrics.detection import auroc
from medgen.metrics.image import smoothed
from medgen.models.segmenter import Segmenter, _features
from medgen.nets.anomalies import KINDS, spoilt
from medgen.scores.base import Healthy
from medgen.scores.marks import Marked


def healthy(count: int, space: tuple[int, ...], channels: int = 1) -> torch.Tensor:
    """Scans of one anatomy, each with some smooth difference of its own."""
    noise = torch.randn(count, channels, *space, generator=torch.Generator().manual_seed(count))
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in space], indexing="ij")
    body = (sum(axis**2 for axis in axes) < 0.8).float() * (0.5 + 0.2 * torch.cos(6 * axes[0]))
    return (body + 0.05 * smoothed(noise, 1.0)).clamp(0, 1)


@pytest.mark.parametrize("space", [(24, 30), (14, 16, 18)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_anomaly_changes_a_scan_where_its_mask_says(space, kind):
    x = healthy(3, space, channels=2)
    torch.manual_seed(3)
    drawn = spoilt(x, (kind,), most=1, least=1)
    changed = (drawn.x - x).abs().amax(1, keepdim=True) > 0.2
    assert drawn.mask.shape == drawn.clear.shape == (3, 1, *space)
    assert bool(drawn.mask.flatten(1).any(1).all())
    assert not bool((changed & ~drawn.mask & drawn.clear).any())
    torch.manual_seed(3)
    assert torch.equal(spoilt(x, (kind,), most=1, least=1).x, drawn.x)


def test_the_kinds_that_may_train_are_those_that_are_drawn():
    assert sorted(KINDS) == sorted(KINDS_A)
    with pytest.raises(ValueError, match="kinds are some of"):
        Segmenter.Config(shape=(8, 8), kinds=("scaled",))


def test_a_training_scan_is_held_against_the_others_alone():
    x = healthy(9, (12, 14))
    every, others = (Segmenter(Segmenter.Config(shape=(12, 14), draws=1, steps=1, voxels=50)) for _ in range(2))
    every._learn_healthy(list(x.split(1)))
    others._learn_healthy(list(x[1:].split(1)))
    without = every._held_against(_features(x[:1]), _features(x[:1]))
    features = len(every.mean)
    expected = others._held_against(_features(x[:1]))
    assert torch.allclose(without[:, features : 3 * features], expected[:, features : 3 * features], atol=1e-5)
    # The spread of the neighbourhood, which hardly knows of one scan, is the whole cohort's.
    assert torch.corrcoef(torch.stack([without[:, :features].flatten(), expected[:, :features].flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("space", [(32, 32), (16, 16, 16)])
def test_it_finds_in_scans_it_has_not_seen_what_it_has_not_seen(space):
    train, new = healthy(20, space), healthy(6, space)
    config = Segmenter.Config(shape=space, draws=60, steps=400, voxels=30_000, kinds=("blob",), most=2)
    first, second = Segmenter(config), Segmenter(config)
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        model.finalise([Batch(train)])
    ill = new.clone()
    box = (slice(None), slice(None), *(slice(n // 2 - 2, n // 2 + 2) for n in space))
    ill[box] *= 0.4
    odds = first.mark(ill)
    assert torch.equal(odds, second.mark(ill))
    mask = torch.zeros_like(ill, dtype=torch.bool)
    mask[box] = True
    assert auroc(odds[~mask].numpy(), odds[mask].numpy()) > 0.9
    score = Marked(of="marker")
    batches = Healthy(lambda: [Batch(train)], lambda: [Batch(new)])
    assert score.learn({"marker": first}, batches) == {}
    found = score({"marker": first}, Batch(torch.cat([new, ill])), {})
    assert bool((found.values[6:] > found.values[:6].max()).all())
