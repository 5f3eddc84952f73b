"""Scans drawn while somebody else's network trains: a bundle as a dataset of torch and MONAI."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from monai.data.meta_tensor import MetaTensor
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from medgen import io
from medgen.bundle import Bundle
from medgen.data.labels import one_hot
from medgen.data.manifest import Manifest
from medgen.errors import ConfigError, DataError, PrivacyError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.scan import Scan
from medgen.seeds import derived_seed
from medgen.tasks.conditions import told_of
from medgen.tasks.gates import Gates
from medgen.tasks.intake import require_training_scans
from medgen.tasks.looks import known_scans
from medgen.tasks.ways.base import Made, Material
from medgen.tasks.ways.sample import AT_ONCE, SampleWay

# Numbers that drawn blocks may hold in each process: a quarter of a gigabyte.
_HELD = 2**26
# A scan that keeps coming out as a copy after this many draws means the model has memorised.
_MOST_DRAWS = 20


@runtime_checkable
class Indexed(Protocol):
    """What is mixed with: anything that has a length and dictionaries by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One scan, as it is handed out.

    Args:
        image: (c, *space), on [0, 1] or in the bundle's unit.
        mask: (1, *space) labels, where the model draws pairs.
        cells: its covariates.
        copy: whether it may be a copy of a training scan.
    """

    image: Float[Tensor, "c *space"]
    mask: Int[Tensor, "1 *space"] | None
    cells: Mapping[str, str]
    copy: bool


@dataclass(eq=False, repr=False)
class SyntheticDataset(Dataset):
    """Scans that a bundle draws when they are asked for, for `monai.data.DataLoader` and whatever takes datasets.

    Items are dictionaries: 'image' (c, *space), a MetaTensor with the RAS+ affine; 'label', the index in `classes`, of
    models that are told classes; 'mask' (1, *space), labels on the same voxels, of models that draw pairs or are given
    masks; each covariate by its name, a number or a word; and 'origin', 'synthetic'.

    Item i depends on `seed` and i alone (and on `labels`, `given` and `masks`), neither on `n`, on the number of
    workers nor on the order of asking. Scans are drawn in blocks, 32 images or 8 volumes of a class at a time, of which
    each process holds up to 256 MB: in order they cost one draw each, and so does whatever is held already.

    Args:
        bundle: a bundle, or its folder; where its model is, scans are drawn: `Bundle.load(folder, device="cuda")`.
        n: how many.
        labels: 'balance' takes the model's classes in turn; or names of classes that are taken in turn.
        given: covariates that are fixed, such as {'age': 70}; others are drawn about the training scans'.
        masks: label maps (*space) on the bundle's voxels, or Scans, for models that draw scans for masks; in turn.
        data: the folder that the bundle learned from. Scans that copy one of its patients are then drawn again.
        physical: values in the bundle's unit, such as HU; otherwise on [0, 1], as the model sees them.
        transform: of items, such as a `monai.transforms.Compose`.
        seed: decides everything.

    Raises:
        CapabilityError: the model does not sample, or sees slices.
        ConfigError: a class or covariate is unknown, masks are missing or not wanted, or `n` is below 1.
        DataError: a mask has other voxels than the model's scans.
        PrivacyError: the bundle did not learn from `data`; or, when asked for scans, it only draws copies.
    """

    bundle: Bundle | str | Path
    n: int = 1000
    _: KW_ONLY
    labels: str | Sequence[str] = "balance"
    given: Mapping[str, float | str] = field(default_factory=dict)
    masks: Sequence[Any] = ()
    data: str | Path | None = None
    physical: bool = False
    transform: Callable[[dict[str, Any]], Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"A dataset has one scan or more; found n = {self.n}.")
        self._bundle = self.bundle if isinstance(self.bundle, Bundle) else Bundle.load(self.bundle)
        config = self._bundle.model.config
        self._maps = [_label_map(mask, self._bundle) for mask in self.masks]
        self._ways = {0: self._way(0)}  # refuses models that do not sample, and unknown covariates
        context = told_of(config)["context"]
        if context != bool(self._maps):
            needs = "draws scans for masks: pass some as masks=" if context else "takes no masks: leave masks= out"
            raise ConfigError(f"{self._bundle.name} {needs}.")
        self._turns = _turns(self.labels, config.classes)
        self._size = AT_ONCE[config.dims]
        self._blocks: OrderedDict[tuple[int, str, int], list[_Drawn]] = OrderedDict()
        self._affine = torch.from_numpy(Grid.from_dict(self._bundle.contract.grid).affine.copy())
        self._gates = None if self.data is None else _gates(self._bundle, self.data, self.seed)
        if self._gates is None:
            note("Drawn scans are not screened for copies of training patients: pass data=, the folder learned from.")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that 'label' counts; empty where the model is told none."""
        return self._bundle.model.config.classes

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} scans; found the number {index}.")
        item = self._item(int(index) % self.n)
        return item if self.transform is None else self.transform(item)

    def mixed_with(self, real: Indexed, ratio: float = 1.0, *, seed: int = 0) -> "MixedDataset":
        """Real and synthetic items in one dataset, in an order that is random and fixed.

        Every real item is there once, with the origin 'real', and the first `ratio` times as many synthetic ones. Items
        keep the keys that both have, so that they collate.

        Args:
            real: a dataset of dictionaries with an 'image'.
            ratio: synthetic items for each real one.
            seed: of the order.

        Raises:
            ConfigError: `ratio` asks for more items than this dataset has, or is negative.
            DataError: items of `real` are no dictionaries with an 'image'.
        """
        return MixedDataset(self, real, ratio, seed=seed)

    # -- drawing -------------------------------------------------------------------------------------

    def _item(self, index: int) -> dict[str, Any]:
        label, number = self._who(index)
        for draw in range(_MOST_DRAWS if self._gates else 1):
            drawn = self._block(draw, label, number // self._size)[number % self._size]
            if not drawn.copy:
                return self._told(drawn, label)
        raise PrivacyError(
            f"{_MOST_DRAWS} draws in a row copied training scans: the model has memorised them. Train on more scans, "
            "or for a shorter time."
        )

    def _who(self, index: int) -> tuple[str, int]:
        """The class of item `index`, and its number among those of the class."""
        turn, place = divmod(index, len(self._turns))
        label = self._turns[place]
        return label, turn * self._turns.count(label) + self._turns[:place].count(label)

    def _told(self, drawn: _Drawn, label: str) -> dict[str, Any]:
        covariates = told_of(self._bundle.model.config)["covariates"]
        item: dict[str, Any] = {
            one.name: drawn.cells[one.name] if one.levels else float(drawn.cells[one.name]) for one in covariates
        }
        item["image"] = MetaTensor(drawn.image.clone(), affine=self._affine.clone(), meta={"space": "RAS"})
        if drawn.mask is not None:
            item["mask"] = MetaTensor(drawn.mask.clone(), affine=self._affine.clone(), meta={"space": "RAS"})
        if self.classes:
            item["label"] = self.classes.index(label)
        return item | {"origin": "synthetic"}

    def _block(self, draw: int, label: str, block: int) -> list[_Drawn]:
        key = (draw, label, block)
        if key not in self._blocks:
            if get_worker_info() is not None and self._bundle.model.device.type != "cpu":
                raise ConfigError(
                    "A model on a GPU cannot draw in a worker: pass num_workers=0, or load it on the CPU."
                )
            if draw not in self._ways:
                self._ways[draw] = self._way(draw)
            made = self._ways[draw].make(label, block * self._size, self._size)
            copies = [verdict.reason == "copy" for verdict in self._gates.judge(made)] if self._gates else []
            self._blocks[key] = [
                self._drawn(one, label, block * self._size + n, bool(copies) and copies[n])
                for n, one in enumerate(made)
            ]
            while len(self._blocks) > 1 and sum(map(_numbers, self._blocks.values())) > _HELD:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _drawn(self, made: Made, label: str, number: int, copy: bool) -> _Drawn:
        image = torch.from_numpy(made.scan.physical()).float().reshape(made.x.shape) if self.physical else made.x
        mask = None
        if self._maps:
            mask = torch.from_numpy(self._mask(self._place(label, number)))
        elif made.mask is not None:
            mask = torch.from_numpy(made.mask.voxels.astype(np.int16))
        return _Drawn(image, None if mask is None else mask.reshape(1, *made.x.shape[1:]), made.covariates, copy)

    def _way(self, draw: int) -> SampleWay:
        """What draws scans for the first time, or again in place of copies."""
        seed = derived_seed(self.seed, draw) if draw else self.seed
        nobody, told = Manifest((), (), Path()), {name: str(value) for name, value in self.given.items()}
        material = Material(nobody, self._bundle.recipe, ReadOptions(), seed, self._bundle, told)
        return SampleWay(material, shapes=self._shape if self._maps else None)

    def _place(self, label: str, number: int) -> int:
        """Which of all masks, taken in turn over all classes, scan `number` of a class is drawn for."""
        classes = self.classes or ("",)
        return number * len(classes) + classes.index(label)

    def _mask(self, place: int) -> Int[np.ndarray, "*space"]:
        return self._maps[place % len(self._maps)]

    def _shape(self, place: int) -> tuple[Float[Tensor, "k *space"], tuple[str, ...]]:
        """What the model is given of a mask."""
        labels, mask = self._bundle.model.config.labels, self._mask(place)
        channels = one_hot(mask, labels) if labels else (mask > 0)[None].astype(np.float32)
        return torch.from_numpy(channels), ()


class MixedDataset(Dataset):
    """Real and synthetic items in a random order that is fixed; made by `SyntheticDataset.mixed_with`."""

    def __init__(self, synthetic: SyntheticDataset, real: Indexed, ratio: float, *, seed: int = 0) -> None:
        count = round(ratio * len(real))
        if not 0 <= count <= len(synthetic):
            raise ConfigError(
                f"A ratio of {ratio:g} to {len(real)} real items takes {count} synthetic ones; there are "
                f"{len(synthetic)}. Pass n={max(1, count)} to SyntheticDataset, or another ratio."
            )
        self._synthetic, self._real = synthetic, real
        self._order = np.random.default_rng(derived_seed(seed, 0)).permutation(len(real) + count).tolist()
        ours, theirs = _parts(synthetic[0]), _parts(real[0])
        for one in theirs:
            if not isinstance(one, Mapping) or "image" not in one:
                found = sorted(map(str, one)) if isinstance(one, Mapping) else type(one).__name__
                raise DataError(f"Items of real datasets are dictionaries with an 'image'; found {found}.")
        self._keys = ours[0].keys() & theirs[0].keys()
        # Tensors with and without metadata do not collate.
        self._plain = {key for key in self._keys if not isinstance(theirs[0][key], MetaTensor)}
        if apart := sorted(map(str, (ours[0].keys() ^ theirs[0].keys()) - {"origin"})):
            note(f"Only one kind of items has {', '.join(apart)}: left out of the mixture, so that items collate.")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        place = self._order[index]
        if place < len(self._real):
            return self._same(self._real[place], "real")
        return self._same(self._synthetic[place - len(self._real)], "synthetic")

    def _same(self, item: Any, origin: str) -> Any:
        parts = [{key: self._plainly(key, one[key]) for key in one if key in self._keys} for one in _parts(item)]
        parts = [one | {"origin": origin} for one in parts]
        return parts if isinstance(item, list) else parts[0]

    def _plainly(self, key: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value)
        return value.as_tensor() if key in self._plain and isinstance(value, MetaTensor) else value


# -- parts ---------------------------------------------------------------------------------------------


def _turns(labels: str | Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Classes that are taken in turn."""
    if labels == "balance":
        return tuple(classes) or ("",)
    wanted = (labels,) if isinstance(labels, str) else tuple(labels)
    unknown = [name for name in wanted if name not in classes]
    if unknown or not wanted:
        known = ", ".join(classes) or "none"
        raise ConfigError(f"labels: the model draws the classes {known}; found {unknown[0] if unknown else 'none'!r}.")
    return wanted


def _label_map(mask: Any, bundle: Bundle) -> Int[np.ndarray, "*space"]:
    """A label map (*space) on the bundle's voxels."""
    shape = bundle.model.config.shape
    if isinstance(mask, Scan):
        mask = mask.onto(Grid.from_dict(bundle.contract.grid), outside=0).voxels
    values = np.asarray(mask)
    if values.size != np.prod(shape) or tuple(n for n in values.shape if n > 1) != tuple(n for n in shape if n > 1):
        raise DataError(f"masks: expected label maps of {shape} voxels; found one of {values.shape}.")
    if not np.array_equal(values, np.rint(values)):
        raise DataError("masks: expected label maps, whole numbers; found others, as in an image or probabilities.")
    return values.reshape(shape).astype(np.int16)


def _gates(bundle: Bundle, data: str | Path, seed: int) -> Gates:
    """What tells copies of the patients that the bundle learned from."""
    options = ReadOptions()
    with io.opened(data) as place:
        manifest = require_training_scans(bundle, place, options)
        known, held = (
            known_scans(manifest, splits, bundle.recipe, options)
            for splits in (("train", "val"), ("calibration", "test"))
        )
    assert known is not None
    return Gates(known, held, None, reject=0, seed=seed)


def _numbers(block: Sequence[_Drawn]) -> int:
    return sum(one.image.numel() + (0 if one.mask is None else one.mask.numel()) for one in block)


def _parts(item: Any) -> Sequence[Any]:
    """One item, or the several that a transform such as a patch sampler makes of one."""
    return item if isinstance(item, list) else [item]


__all__ = ["Indexed", "MixedDataset", "SyntheticDataset"]
