"""Where learners' scans come from: prepared real ones, a model's, or a folder's that `medgen augment` wrote."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int

from medgen.bundle import Bundle
from medgen.data.dataset import Batch, ScanDataset, collate
from medgen.data.labels import label_map
from medgen.data.manifest import Manifest, index
from medgen.data.tables import read_table
from medgen.errors import ConfigError, DataError, LeakageError
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.models import build
from medgen.models.abilities import Samples
from medgen.models.base import Model, ModelConfig, class_indices
from medgen.seeds import derived_seed
from medgen.tasks.arms import Examples
from medgen.tasks.conditions import conditions_for, drawn_cells, told_of
from medgen.tasks.ways.sample import AT_ONCE
from medgen.tasks.ways.sources import secret_of, source_name
from medgen.training.fit import FitConfig, fit
from medgen.training.pace import images_in

# Scans of these classes, by a seed; fewer where there are not so many.
Drawer = Callable[[Int[np.ndarray, " n"], int], Examples]
# What medgen wrote itself may be of three channels.
_OWN = ReadOptions(colour=True)


def examples_of(bundle: Bundle, rows: Manifest, options: ReadOptions) -> Examples | None:
    """Scans prepared as the bundle's model sees them, with classes or maps; None where there are none."""
    config = bundle.model.config
    if config.classes:
        rows = replace(rows, rows=tuple(row for row in rows.rows if row.label in config.classes))
    if not len(rows):
        return None
    data = ScanDataset(rows, bundle.recipe, **told_of(config), options=options)
    owners = {row.case: row.patient for row in rows.rows}
    batch = collate([data[n] for n in range(len(data))])
    return _examples(config, batch, tuple(owners[case] for case in batch.cases))


def _examples(config: ModelConfig, batch: Batch, patients: tuple[str, ...]) -> Examples:
    """The scan's own channels, and the map that the others, or what is given, mark."""
    classes = class_indices(config, batch.cond)
    y = np.zeros(len(batch.x), dtype=np.int64) if classes is None else classes.numpy().astype(np.int64)
    maps, marks = None, batch.x[:, config.images :] if config.joint else batch.context
    if config.labels and marks is not None:
        maps = np.stack([label_map(one.numpy(), config.labels) for one in marks]).astype(np.int64)
    x = batch.x[:, : config.images].numpy().clip(0, 1)
    return Examples(np.ascontiguousarray(x), y, maps, patients, batch.cases)


# -- a model's -----------------------------------------------------------------------------------------


def drawn_by(model: Model, real: Examples) -> Drawer:
    """What a model draws, in whole micro-batches; one that is given masks is given those of `real`, in turn."""

    @torch.no_grad()
    def draw(labels: np.ndarray, seed: int) -> Examples:
        config, size, found = model.config, AT_ONCE[model.config.dims], []
        for first in range(0, len(labels), size):
            # The last part is as large as the others, so that no scan depends on how many there are.
            numbers = np.arange(first, first + size)
            classes = labels[np.minimum(numbers, len(labels) - 1)]
            batch = _told(config, classes, numbers, real, seed)
            given = {} if batch.context is None else {"context": batch.context}
            drawn = cast(Samples, model).sample(size, seed=derived_seed(seed, first), cond=batch.cond, **given)
            made = _examples(config, replace(batch, x=drawn.clamp(0, 1).cpu()), ())
            made = replace(made, y=classes.astype(np.int64))
            found.append(made.rows(slice(min(size, len(labels) - first))))
        return _together(found)

    return draw


def _told(config: ModelConfig, classes: np.ndarray, numbers: np.ndarray, real: Examples, seed: int) -> Batch:
    """What a model is told of the scans it is to draw."""
    told = told_of(config)
    names = [config.classes[n] if config.classes else "" for n in classes]
    cells = [drawn_cells(told["covariates"], derived_seed(seed, 1, int(n))) for n in numbers]
    context = None
    if told["context"]:
        if real.maps is None:
            raise DataError("The model draws scans for given masks, and its masks have no labels. Train it again.")
        maps = real.maps[numbers % len(real)]
        context = torch.from_numpy(np.stack([maps == label for label in config.labels], 1).astype(np.float32))
    blank = torch.zeros(len(names), config.channels, *config.shape)
    return Batch(blank, conditions_for(config, names, cells), context)


def _together(parts: Sequence[Examples]) -> Examples:
    first = parts[0]
    maps = None if first.maps is None else np.concatenate([cast(np.ndarray, part.maps) for part in parts])
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    return Examples(x, y, maps, ())


# -- one that is trained anew --------------------------------------------------------------------------


def known_to(known: Manifest, real: Examples, size: int, seed: int) -> Manifest:
    """The rows of a draw's training scans, and as many validation scans of each class at most."""
    cases, val = set(real.cases), []
    rows = known.split("val").rows
    for label in sorted({row.label for row in rows}):
        mine = [row for row in rows if row.label == label]
        order = np.random.default_rng(derived_seed(seed, 5)).permutation(len(mine))
        val += [mine[int(n)] for n in order[:size]]
    train = [row for row in known.split("train").rows if row.case in cases]
    return replace(known, rows=(*train, *val))


def trained_anew(
    bundle: Bundle, rows: Manifest, minutes: float, *, seed: int, device: str, options: ReadOptions
) -> Model:
    """The bundle's model, with the same config and training, learned from other scans for some minutes.

    Raises:
        ConfigError: the bundle holds several models.
        DataError, TrainingError.
    """
    if len(bundle.models) > 1:
        raise ConfigError(f"{bundle.name} holds several models; --low-data trains bundles of one model anew.")
    config = bundle.model.config
    sides: list[Any] = []
    for name in ("train", "val"):
        side = rows.split(name)
        sides.append(ScanDataset(side, bundle.recipe, **told_of(config), options=options) if len(side) else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    settings = FitConfig.model_validate(bundle.training["fit"])
    if model.players():
        possible, _ = images_in(0.8 * minutes, model, sides[0], settings, device=device)
        settings = settings.model_copy(update={"images": min(settings.images, possible)})
    fit(model, sides[0], sides[1], settings, seed=seed, device=device, seconds=60 * minutes)
    model.finalise(batch.to(model.device) for batch in sides[0].batches(settings.batch_size))
    return model.eval()


# -- a folder's ----------------------------------------------------------------------------------------


def made_before(folder: str | Path, bundle: Bundle, known: Manifest, options: ReadOptions) -> Drawer:
    """The scans of an output of `medgen augment`, each class in the order of the table.

    Raises:
        DataError: it holds no scans, or none of a class, or none with a mask.
        LeakageError: some were made of scans that are not for training.
    """
    place = Path(folder)
    table = place / "manifest.csv"
    rows = index(table if table.is_file() else place, replace(options, colour=True) if options.colour else _OWN)
    if table.is_file():
        _no_leaks(table, known)
    found = examples_of(bundle, rows, _OWN)
    if found is None:
        raise DataError(f"{place.name}: no synthetic scan of the classes {', '.join(bundle.model.config.classes)}.")
    note(f"{len(found)} synthetic scans were made before, and are used.")
    config, everything = bundle.model.config, found

    def draw(labels: np.ndarray, seed: int) -> Examples:
        if config.labels:
            return everything.rows(slice(len(labels)))
        mine = [np.flatnonzero(everything.y == label) for label in np.unique(labels)]
        each = min(len(labels) // len(mine), *(len(one) for one in mine))
        if not each:
            raise DataError(f"{place.name}: a class has no synthetic scans. Make some of each (--per-class).")
        return everything.rows(np.stack([one[:each] for one in mine], 1).reshape(-1))

    return draw


def _no_leaks(table: Path, known: Manifest) -> None:
    """Refuse scans that were made of held-out ones: the table of `medgen augment` names what each was made of."""
    key = secret_of(known)
    held = {name: row.split for row in known.rows for name in (row.case, source_name(row, key))}
    for line in read_table(table)[1]:
        sources = line.get("sources", "").replace(",", ";").split(";")
        if any(held.get(source.strip(), "train") != "train" for source in sources):
            raise LeakageError(
                f"{line.get('case') or table.name} was made of a scan that is held out. Make scans with this bundle, "
                "so that both have the same splits."
            )


__all__ = ["Drawer", "drawn_by", "examples_of", "known_to", "made_before", "trained_anew"]
