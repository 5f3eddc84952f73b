"""Corners of adversarial networks: codes beside scans, stages that begin at whole steps, changes of dark voxels."""

from dataclasses import replace

import pytest
import torch

from medgen.data.dataset import Batch, ScanDataset
from medgen.data.manifest import index
from medgen.data.recipe import CropOrPad, Recipe, Window
from medgen.errors import TrainingError
from medgen.models.gan.config import GANConfig
from medgen.models.gan.model import GAN
from medgen.nets.diffaugment import Change
from medgen.training.fit import FitConfig, fit

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


def test_one_scan_a_step_at_a_single_position_is_refused_in_a_sentence(xrays):
    recipe = Recipe(steps=(CropOrPad(shape=(8, 8, 1)), Window(low=0, high=255)))
    scans = ScanDataset(replace(index(xrays), rows=index(xrays).rows[:3]), recipe)
    model = GAN(GANConfig(**SMALL | {"condition": "none", "levels": 2}, architecture={"kind": "dcgan"}))
    with pytest.raises(TrainingError, match=r"one scan a step.*fit\.batch_size=2"):
        fit(model, scans, None, FitConfig(images=4, batch_size=1, precision="float32"))
