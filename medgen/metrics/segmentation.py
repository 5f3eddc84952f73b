"""What pairs of scans and label maps are good for: a small network that learns to draw the maps of other scans.

The network is fixed, so that numbers of different generators and of later versions compare: a residual U-Net of three
levels (Ronneberger et al. 2015, "U-Net"; MONAI's), the sum of Dice loss and cross-entropy (Milletari et al. 2016,
"V-Net"), a fixed number of steps.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor
from torch.nn import functional

from medgen.metrics.learner import averaged_down, shuffled_rows
from medgen.seeds import derived_seed

STEPS = {2: 600, 3: 240}
_BATCH = {2: 16, 3: 2}
_RATE = 4e-3
_WIDTHS = (8, 16, 32)
# The network halves edges twice.
_MULTIPLE = 4
# The longest edge that the network sees: what is larger is averaged down.
_EDGE = {2: 128, 3: 64}

# Changes a batch of scans (b, c, *space) on [0, 1] and their maps (b, *space), by a generator.
PairAugmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def segment(
    train: tuple[Float[np.ndarray, "n c *space"], Int[np.ndarray, "n *space"]],
    x: Float[np.ndarray, "m c *space"],
    *,
    labels: Sequence[int],
    steps: int | None = None,
    seed: int = 0,
    weights: Float[np.ndarray, " n"] | None = None,
    augment: PairAugmentation | None = None,
) -> Int[np.ndarray, "m *space"]:
    """Label maps of scans, by a network trained on others with theirs.

    Args:
        train: scans on any scale, two or three axes, and their label maps, 0 for background.
        x: scans on the same scale, of one shape.
        labels: those to tell apart, without 0; what else is in a map counts as background.
        steps: of training; about a minute on one core for 240 of volumes of 36 x 50 x 36.
        seed: decides weights and order.
        weights: how often each pair is met, beside the others; None: all alike, in shuffled passes.
        augment: what every batch goes through, on the scans' own scale.
    """
    taught = Segmenter(train, labels=labels, steps=steps, seed=seed, weights=weights, augment=augment)
    return taught.maps(x)


class Segmenter:
    """The network, taught.

    Args:
        train, labels, steps, seed, weights, augment: as for `segment`.
    """

    def __init__(
        self,
        train: tuple[Float[np.ndarray, "n c *space"], Int[np.ndarray, "n *space"]],
        *,
        labels: Sequence[int],
        steps: int | None = None,
        seed: int = 0,
        weights: Float[np.ndarray, " n"] | None = None,
        augment: PairAugmentation | None = None,
    ) -> None:
        dims = train[0].ndim - 2
        count, known = steps or STEPS[dims], _seen(train[0], dims)
        maps = _coarse(_numbered(train[1], labels), known.shape[2:])
        self._labels, self._centre, self._spread = tuple(labels), known.mean(), known.std().clamp(min=1e-6)
        changes = torch.Generator().manual_seed(derived_seed(seed, 31))
        loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, 32) % 2**63)
            network = UNet(dims, known.shape[1], len(labels) + 1, _WIDTHS, (2, 2), num_res_units=1).train()
            optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=count)
            for rows in _order(len(known), _BATCH[dims], count, weights):
                scans, drawn = known[rows], maps[rows]
                if augment is not None:
                    scans, drawn = augment(scans, drawn, changes)
                optimizer.zero_grad(set_to_none=True)
                told = _inside(network(_padded((scans - self._centre) / self._spread)), scans.shape[2:])
                loss(told, drawn[:, None]).backward()
                optimizer.step()
                schedule.step()
        self._network = network.eval()

    def maps(self, x: Float[np.ndarray, "m c *space"]) -> Int[np.ndarray, "m *space"]:
        """Label maps of scans of one shape, on the scale of those it was taught by."""
        seen = (_seen(x, x.ndim - 2) - self._centre) / self._spread
        return _drawn(self._network, seen, tuple(x.shape[2:]), self._labels)


def dice(
    predicted: Int[np.ndarray, "m *space"], truth: Int[np.ndarray, "m *space"], labels: Sequence[int]
) -> Float[np.ndarray, " m"]:
    """Dice of each scan, the mean over the labels that either map has; 1 where both have none.

        2 |A and B| / (|A| + |B|)

    Args:
        predicted: label maps.
        truth: label maps.
        labels: those that count.

    >>> dice(np.array([[0, 1, 1]]), np.array([[0, 0, 1]]), [1]).round(3).tolist()
    [0.667]
    """
    shares = []
    axes = tuple(range(1, truth.ndim))
    for label in labels:
        ours, theirs = predicted == label, truth == label
        both, each = (ours & theirs).sum(axes), ours.sum(axes) + theirs.sum(axes)
        shares.append(np.where(each > 0, 2 * both / np.maximum(each, 1), np.nan))
    table = np.stack(shares)
    there = np.isfinite(table)
    counted = there.sum(0)
    return np.where(counted > 0, np.where(there, table, 0).sum(0) / np.maximum(counted, 1), 1.0)


# -- parts -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _drawn(
    network: torch.nn.Module, x: Tensor, shape: tuple[int, ...], labels: Sequence[int]
) -> Int[np.ndarray, "m *space"]:
    """Label maps at the scans' own size."""
    found = []
    for part in x.split(8):
        told = _inside(network(_padded(part)), part.shape[2:])
        if tuple(told.shape[2:]) != shape:
            told = functional.interpolate(told, shape, mode="bilinear" if len(shape) == 2 else "trilinear")
        found.append(told.argmax(1))
    return np.asarray([0, *labels])[torch.cat(found).numpy()]


def _order(count: int, size: int, steps: int, weights: np.ndarray | None) -> list[Tensor]:
    if weights is None:
        return shuffled_rows(count, size, steps)
    return list(torch.multinomial(torch.from_numpy(weights).double(), steps * size, replacement=True).split(size))


def _seen(x: np.ndarray, dims: int) -> Float[Tensor, "n c *space"]:
    return averaged_down(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), _EDGE[dims])


def _numbered(maps: np.ndarray, labels: Sequence[int]) -> Int[Tensor, "n *space"]:
    """Numbers from 1 in place of labels, 0 for all else."""
    numbers = np.zeros(maps.shape, dtype=np.int64)
    for n, label in enumerate(labels):
        numbers[maps == label] = n + 1
    return torch.from_numpy(numbers)


def _coarse(maps: Int[Tensor, "n *space"], shape: Sequence[int]) -> Int[Tensor, "n *coarse"]:
    """The middle of each block of voxels."""
    if tuple(maps.shape[1:]) == tuple(shape):
        return maps
    return functional.interpolate(maps[:, None].float(), tuple(shape), mode="nearest-exact")[:, 0].long()


def _padded(x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *padded"]:
    """Edges that are multiples of what the network halves, at least two positions at its coarsest."""
    wanted = [max(2 * _MULTIPLE, -(-n // _MULTIPLE) * _MULTIPLE) for n in x.shape[2:]]
    margins = [size for have, want in zip(x.shape[:1:-1], wanted[::-1], strict=True) for size in (0, want - have)]
    return functional.pad(x, margins, mode="replicate") if any(margins) else x


def _inside(x: Float[Tensor, "n c *padded"], shape: Sequence[int]) -> Float[Tensor, "n c *space"]:
    return x[(..., *(slice(0, n) for n in shape))]


__all__ = ["STEPS", "PairAugmentation", "Segmenter", "dice", "segment"]
