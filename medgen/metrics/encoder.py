"""Networks that turn scans into features to compare sets by: one learned here without labels, or somebody's own."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.errors import ConfigError, DataError
from medgen.metrics.learner import Ladder, averaged_down, shuffled_rows
from medgen.metrics.radiomics import Scans, as_array

Extractor = Callable[[Scans], Float[np.ndarray, "n d"]]

# Numbers of a scan's feature row, and of what the loss sees of it.
_FEATURES, _EXPANDED = 64, 128
_WIDTHS = (16, 32, 64)
# By dimensions: training steps, scans a step, and the longest edge that is seen (what is larger is averaged down).
_STEPS, _BATCH, _EDGE = {2: 200, 3: 100}, {2: 128, 3: 32}, {2: 32, 3: 24}
_RATE, _FEWEST = 2e-3, 8
# Views: spread of the affine map about the identity, of the shift (of half the edge), least part of the edge that a
# crop keeps, spread of log gamma, most noise.
_BEND, _SHIFT, _CROP, _GAMMA, _NOISE = 0.06, 0.08, 0.75, 0.25, 0.05


class LearnedEncoder:
    """A small network that was taught to know a scan again; made by `learned_encoder`, and frozen.

    Args:
        network: gives a row for each standardised scan.
        centre, spread: of the training voxels.
    """

    def __init__(self, network: nn.Module, centre: Tensor, spread: Tensor) -> None:
        self._network, self._centre, self._spread = network.eval().requires_grad_(False), centre, spread

    def __call__(self, x: Scans) -> Float[np.ndarray, "n d"]:
        """64 numbers a scan."""
        with torch.no_grad():
            parts = [self._network((_seen(part) - self._centre) / self._spread) for part in _floats(x).split(256)]
        return torch.cat(parts).double().numpy()


def learned_encoder(train: Scans, *, seed: int = 0) -> LearnedEncoder:
    """Teach a network of five convolutions to know a scan again, without labels, and freeze it.

    Two views of each scan are drawn (shifted, cropped, bent a little, another gamma, noise), and their rows z, z'
    made alike while rows differ from scan to scan and their numbers say different things (Bardes et al. 2022,
    "VICReg", equation 6, with an expander of two layers):

        loss = 25 mean |z - z'|^2 + 25 mean max(0, 1 - sd(z_j)) + 1/d sum over i != j cov(z)_ij^2 (and the same of z')

    The number of steps is fixed, so one seed gives one encoder on one kind of machine. Scans of more than 32 voxels
    an edge (24 in volumes) are averaged down first: fine texture is for `radiomics`. Rows know little of what views
    may differ in, such as a shift of all scans or their gamma.

    Args:
        train: scans on [0, 1] that neither the generated nor the held-out scans are among.
        seed: decides weights, views and order.

    Raises:
        DataError: fewer than 8 scans.
    """
    scans = _seen(train)
    count, dims = len(scans), scans.ndim - 2
    if count < _FEWEST:
        raise DataError(f"An encoder is learned from {_FEWEST} scans or more; found {count}.")
    centre, spread = scans.mean(), scans.std().clamp(min=1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(scans.shape[1], dims).train()
        expander = nn.Sequential(
            nn.Linear(_FEATURES, _EXPANDED), nn.BatchNorm1d(_EXPANDED), nn.ReLU(), nn.Linear(_EXPANDED, _EXPANDED)
        )
        parameters = [*network.parameters(), *expander.parameters()]
        optimizer = torch.optim.AdamW(parameters, _RATE, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS[dims])
        for rows in shuffled_rows(count, min(_BATCH[dims], count), _STEPS[dims]):
            views = torch.cat([_view(scans[rows]), _view(scans[rows])])
            first, second = expander(network((views - centre) / spread)).chunk(2)
            optimizer.zero_grad(set_to_none=True)
            _vicreg(first, second).backward()
            optimizer.step()
            schedule.step()
    return LearnedEncoder(network, centre, spread)


def torchscript_extractor(path: str | Path) -> Extractor:
    """Features by a network somebody saved with `torch.jit.save`.

    A TorchScript file is a program: it is run. Use only files you trust. It is given scans (n, c, *space) as float32
    on [0, 1] and gives (n, d), or maps (n, d, *places), whose mean over places is taken; whatever resizing and
    standardising it needs, it does itself. Where it refuses grey scans, it is given them as three equal channels.

    Args:
        path: of the file.

    Raises:
        ConfigError: there is no such file, or it is no TorchScript.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file. Expected a TorchScript file, saved with torch.jit.save.")
    try:
        with warnings.catch_warnings():  # torch advises its authors to use torch.export; files like these stay
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: not a TorchScript file. Save the extractor with torch.jit.save.") from error

    def extract(x: Scans) -> Float[np.ndarray, "n d"]:
        parts = _floats(x).split(64)
        with torch.no_grad():
            return torch.cat([_extracted(module, part, str(path)) for part in parts]).double().numpy()

    return extract


def _extracted(module: nn.Module, scans: Tensor, path: str) -> Float[Tensor, "n d"]:
    tries = [scans] if scans.shape[1] > 1 else [scans, scans.expand(-1, 3, *scans.shape[2:])]
    rows, last = None, None
    for given in tries:
        try:
            rows = module(given)
            break
        except (RuntimeError, torch.jit.Error) as error:
            last = error
    if rows is None:
        reason = str(last).strip().splitlines()[-1]
        raise DataError(f"{path} does not take scans {tuple(scans.shape)} of float32 on [0, 1]: {reason}") from last
    if not isinstance(rows, Tensor) or rows.ndim < 2 or len(rows) != len(scans):
        found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise DataError(f"{path}: expected one row of features a scan, ({len(scans)}, d); found {found}.")
    return rows.float().flatten(2).mean(2) if rows.ndim > 2 else rows.float()


# -- learning ----------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """Five convolutions on three levels; what is left of place are the halves of each axis."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.ladder = Ladder(channels, _WIDTHS, dims)
        self.last = functional.adaptive_avg_pool2d if dims == 2 else functional.adaptive_avg_pool3d
        self.head = nn.Linear(_WIDTHS[-1] * 2**dims, _FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.ladder(x), 2).flatten(1))


def _view(scans: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *space"]:
    """Another look at the same scans, by torch's random state."""
    count, dims = len(scans), scans.ndim - 2
    keeps = 1 - (1 - _CROP) * torch.rand(count, 1, 1)
    bent = (torch.eye(dims) + _BEND * torch.randn(count, dims, dims)) * keeps
    moved = _SHIFT * torch.randn(count, dims, 1) + (1 - keeps) * (2 * torch.rand(count, dims, 1) - 1)
    grid = functional.affine_grid(torch.cat([bent, moved], 2), list(scans.shape), align_corners=False)
    looked = functional.grid_sample(scans, grid, padding_mode="border", align_corners=False)
    one = (count, *[1] * (dims + 1))
    looked = looked.clamp(1e-4, 1) ** torch.exp(_GAMMA * torch.randn(one))
    return looked + _NOISE * torch.rand(one) * torch.randn(looked.shape)


def _vicreg(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The loss of `learned_encoder`."""
    loss = 25 * functional.mse_loss(first, second)
    for rows in (first, second):
        away = rows - rows.mean(0)
        covariance = away.T @ away / (len(rows) - 1)
        spread = (covariance.diagonal() + 1e-4).sqrt()
        others = covariance.square().sum() - covariance.diagonal().square().sum()
        loss = loss + 12.5 * functional.relu(1 - spread).mean() + others / rows.shape[1]
    return loss


def _floats(x: Scans) -> Float[Tensor, "n c *space"]:
    return torch.from_numpy(np.ascontiguousarray(as_array(x), dtype=np.float32))


def _seen(x: Scans) -> Float[Tensor, "n c *coarse"]:
    """Scans averaged down to the longest edge that the network sees."""
    scans = _floats(x)
    return averaged_down(scans, _EDGE[scans.ndim - 2])


__all__ = ["Extractor", "LearnedEncoder", "learned_encoder", "torchscript_extractor"]
