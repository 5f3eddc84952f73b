"""Corners of adversarial networks: codes beside scans, stages that begin at whole steps, changes of dark voxels."""

import pytest
import torch

from medgen.data.dataset import Batch
from medgen.models.gan.config import GANConfig
from medgen.models.gan.model import GAN
from medgen.nets.diffaugment import Change

SMALL = {"shape": (8, 8), "width": 8, "latent": 4, "start": "noise"}


def test_a_critic_of_pairs_has_features_of_a_scan_alone():
    model = GAN(GANConfig(**SMALL, inference="joint", condition="none")).eval()
    assert model.perceive(torch.rand(3, 1, 8, 8)).shape[0] == 3


def test_a_posthoc_encoder_is_validated_as_one_even_if_its_stage_begins_a_little_early():
    model, batch = (
        GAN(GANConfig(**SMALL, inference="posthoc", condition="none", share=0.7)),
        Batch(torch.rand(3, 1, 8, 8)),
    )
    model.progress = 0.64
    model(batch, "encoder")
    assert torch.allclose(model.eval().validation_loss(batch), model(batch, "encoder").total)
    assert model.pulse(batch) == {}


def test_a_changed_contrast_keeps_background_and_its_slope():
    one = torch.zeros(1, 2)
    x = torch.tensor([-1.0, -0.9999, 1.0]).reshape(1, 1, 1, 3).requires_grad_()
    changed = Change(one, one - 9, torch.tensor([0.7]), torch.ones(1))([x])[0]
    assert torch.allclose(changed, x, atol=1e-3)
    assert bool((torch.autograd.grad(changed.sum(), x)[0] > 0).all())


@pytest.mark.parametrize(
    "fields",
    [
        {"condition": "information", "codes": (3, 0), "inference": "posthoc"},
        {"architecture": {"kind": "laplacian"}, "consistency": 1.0},
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict):
    with pytest.raises(ValueError, match=r"inference: none|in parts"):
        GANConfig(**SMALL, **fields)
