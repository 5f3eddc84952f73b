"""Masks for models that draw scans for masks: training scans' own, such ones deformed, or new ones."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from medgen import io
from medgen.data.classic import Classical
from medgen.data.dataset import given_view
from medgen.data.labels import label_channels, label_map, one_hot
from medgen.data.manifest import Row
from medgen.data.window import flat
from medgen.errors import ConfigError, DataError, MedgenError
from medgen.grid import Grid
from medgen.log import note, track
from medgen.prob.subspace import SubspaceMixture
from medgen.scan import Scan
from medgen.tasks.ways.base import Material
from medgen.tasks.ways.sources import Sources, seed_of, source_name

ShapeKind = Literal["real", "deformed", "sampled"]
# Fewer masks than this say too little of how shapes vary; more numbers than this are not held at a time.
_FEWEST, _NUMBERS, _RANK = 8, 2**27, 24
# Bending, as a part of the field of view's length, and how often it is halved until no part is lost or torn.
_BEND, _HALVED = (0.01, 0.03), 5
_TRIES = 8


class Shapes:
    """Number i of endlessly many masks, as a model is given them.

    A deformed mask is a training mask bent without folding, in which no part has come apart, grown together or
    vanished. A sampled one is drawn from a Gaussian over the principal components of the training masks' ramps
    (Cootes et al. 1995, "Active shape models", with distances in place of landmarks: Leventon et al. 2000): nobody's.

    Args:
        material: with a bundle whose model is given masks.
        kind: 'real', 'deformed' or 'sampled'.

    Raises:
        ConfigError: there is no such kind, or the model is given no masks.
        DataError: no training scan has a mask.
    """

    def __init__(self, material: Material, kind: ShapeKind = "real") -> None:
        if kind not in get_args(ShapeKind):
            raise ConfigError(f"Shapes are one of {', '.join(get_args(ShapeKind))}; found {kind!r}.")
        bundle = material.bundle
        if bundle is None or not getattr(bundle.model.config, "context", 0):
            raise ConfigError("Shapes are for a model that draws scans for masks; this one is given none.")
        self._material, self._recipe = material, bundle.recipe
        # Without labels a model is given whatever is marked.
        self._told = bundle.model.config.labels
        self.labels = self._told or (1,)
        self._grid, self._space = Grid.from_dict(bundle.contract.grid), bundle.model.config.shape
        rows = tuple(row for row in material.manifest.rows if row.mask)
        if not rows:
            raise DataError("The model draws scans for given masks, but no training scan of these data has a mask.")
        self._seed = seed_of(material.seed, "shapes")
        self._sources = Sources({"": rows}, self._read, seed=self._seed, size=lambda drawn: drawn.size)
        self.kind: ShapeKind = kind
        self._model: SubspaceMixture | None = None
        if kind == "sampled":
            self._model = self._fitted(rows)
            self.kind = "sampled" if self._model else "deformed"

    def __call__(self, i: int) -> tuple[Float[Tensor, "k *space"], tuple[str, ...]]:
        """Mask i, 1 where each label is, and the pseudonyms of the cases it is of; none where it is nobody's.

        Raises:
            DataError: no mask can be read.
        """
        if self._model is not None:
            return self._given(self._sampled(self._model, i)), ()
        key = self._material.key
        return self._sources.made(
            "", i, lambda row, drawn: (self._given(self._shown(drawn, i)), (source_name(row, key),))
        )

    def _given(self, drawn: Integer[np.ndarray, "*space"]) -> Float[Tensor, "k *space"]:
        return torch.from_numpy(one_hot(drawn, self.labels))

    def _read(self, row: Row) -> Integer[np.ndarray, "*space"]:
        """A training scan's label map as the model sees it, small numbers."""
        manifest, options = self._material.manifest, self._material.options
        scan = flat(io.read(manifest.locate(row.path), options))
        ready = self._recipe.grid(scan)
        given = given_view(manifest.locate(row.mask), scan.grid, ready, self._told, options)
        return label_map(given.numpy(), self.labels).astype(np.int16)

    # -- deformed ----------------------------------------------------------------------------------

    def _shown(self, drawn: Integer[np.ndarray, "*space"], i: int) -> Integer[np.ndarray, "*space"]:
        if self.kind == "real" or not drawn.any():
            return drawn
        scan = Scan(drawn.reshape(1, *self._grid.shape), self._grid, is_label=True)
        seed = seed_of(self._seed, "deformed", i)
        change = Classical.drawn(seed, scan)
        length = float(np.exp(np.log(np.asarray(self._grid.spacing) * self._grid.shape)[: drawn.ndim].mean()))
        bend = np.random.default_rng(seed).uniform(*_BEND) * length
        change = change.model_copy(update={"bend": float(bend)})
        parts = _parts(drawn, self.labels)
        for _ in range(_HALVED):
            moved = change.moved(scan).voxels.reshape(drawn.shape)
            if _parts(moved, self.labels) == parts:
                return moved
            change = _halved(change)
        return drawn

    # -- sampled -----------------------------------------------------------------------------------

    def _fitted(self, rows: Sequence[Row]) -> SubspaceMixture | None:
        """The distribution of the training masks; None of too few."""
        numbers = (len(self.labels) + 1) * int(np.prod(self._space))
        most = max(_FEWEST, _NUMBERS // numbers)
        chosen = [rows[n] for n in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))]
        ramps, parts = [], []
        for row in track(chosen, "Learning shapes"):
            try:
                drawn = self._sources.get(row)
            except MedgenError:
                continue  # named already
            # Whatever is marked has a ramp of its own, so that no gaps open between labels.
            whole = label_channels((drawn > 0).astype(np.int16), (1,))
            ramps.append(torch.from_numpy(np.concatenate([label_channels(drawn, self.labels), whole])).flatten())
            parts.append([inside for inside, _ in _parts(drawn, self.labels)])
        if len(ramps) < _FEWEST:
            note(f"{len(ramps)} masks say too little of how shapes vary to sample new ones: theirs are deformed.")
            return None
        rank = min(_RANK, len(ramps) - 2)
        model = SubspaceMixture(numbers, rank=rank, components=1, lead=rank)
        model.fit(torch.stack(ramps), shrinkage="none")
        self._most = [max(counts) for counts in zip(*parts, strict=True)]
        self._never_empty = all(map(any, parts))
        return model

    @torch.no_grad()
    def _sampled(self, model: SubspaceMixture, i: int) -> Integer[np.ndarray, "*space"]:
        """A label map of nobody; one that is empty is drawn again where no training mask is."""
        drawn = np.zeros(self._space, dtype=np.int32)
        for n in range(_TRIES):
            # Principal components alone: what is beyond them is noise, which has no shape.
            seed, cond = seed_of(self._seed, "sampled", i, n), torch.zeros(1, dtype=torch.long)
            codes = model.mixture.sample(1, seed=seed, first=0, cond=cond)
            ramps = model.expected(codes[:, : model.lead]).reshape(-1, *self._space).numpy()
            names = np.asarray(self.labels, dtype=np.int32)
            drawn = np.where(ramps[-1] > 0.5, names[ramps[:-1].argmax(0)], 0).astype(np.int32)
            for name, most in zip(self.labels, self._most, strict=True):
                drawn[_crumbs(drawn == name, most)] = 0
            if drawn.any() or not self._never_empty:
                break
        return drawn


def _parts(drawn: Integer[np.ndarray, "*space"], labels: Sequence[int]) -> list[tuple[int, int]]:
    """How many connected parts each label has, and what is not it."""
    return [(_count(drawn == one, drawn.ndim), _count(drawn != one, 1)) for one in labels]


def _count(inside: Bool[np.ndarray, "*space"], connectivity: int) -> int:
    """Connected parts; what is outside goes on beyond the border."""
    from skimage.measure import label

    padded = np.pad(inside, [(1, 1) if n > 1 else (0, 0) for n in inside.shape], mode="edge")
    parts = np.asarray(label(padded, connectivity=connectivity))
    return int(parts.max())


def _crumbs(inside: Bool[np.ndarray, "*space"], most: int) -> Bool[np.ndarray, "*space"]:
    """All but the `most` largest parts."""
    from skimage.measure import label

    named = np.asarray(label(inside))
    sizes = np.bincount(named.ravel())
    sizes[0] = 0
    return inside & ~np.isin(named, np.argsort(-sizes, kind="stable")[:most])


def _halved(change: Classical) -> Classical:
    """Half as much of everything that moves."""

    def half(values: Sequence[float], power: bool = False) -> tuple[float, ...]:
        return tuple(value**0.5 if power else value / 2 for value in values)

    less = {"rotate": half(change.rotate), "shift": half(change.shift), "scale": half(change.scale, power=True)}
    return change.model_copy(update={**less, "bend": change.bend / 2})


__all__ = ["ShapeKind", "Shapes"]
