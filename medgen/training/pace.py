"""How fast a model trains on this machine."""

import copy
import time

import torch

from medgen.data.dataset import ScanDataset
from medgen.models.base import Model
from medgen.training.during import seeded
from medgen.training.fabric import fabric_for
from medgen.training.fit import FitConfig
from medgen.training.spans import active, placed, stage_end


def images_in(minutes: float, model: Model, train: ScanDataset, config: FitConfig, *, device: str) -> tuple[int, float]:
    """How many images `minutes` of training see on this machine, and seconds an image, by trying a few steps.

    Of every stage, weighted by its part of the run.
    """
    trial = copy.deepcopy(model)
    fabric = fabric_for(device, config.precision, mixed=model.mixed_precision_pays)
    players = placed(trial.players(), config.images, config.batch_size)
    optimizer = torch.optim.AdamW([p for player in players for p in player.parameters], lr=0.0, fused=True)
    module, optimizer = fabric.setup(trial, optimizer)
    batch = next(train.batches(config.batch_size)).to(fabric.device)
    seconds, since = 0.0, 0
    while since < config.images:
        until = min(config.images, stage_end(players, since, config.images))
        now = [player for player in players if active(player, since, config.batch_size)]
        timings = []
        for _ in range(4):
            begun = time.monotonic()
            optimizer.zero_grad()
            for player in now:
                with seeded(0, fabric.device):
                    total = module(batch, player.name).total.mean() / batch.x[0].numel()
                fabric.backward(total)
                float(total.detach())  # a GPU computes behind our back: wait for it
            optimizer.step()
            timings.append(time.monotonic() - begun)
        seconds += min(timings[1:]) / len(batch.x) * (until - since) / config.images
        since = until
    return max(config.batch_size, int(minutes * 60 / seconds)), seconds


__all__ = ["images_in"]
