"""How much the scans that a model draws are like real ones it has not learned from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from medgen.bundle import Bundle
from medgen.config import load_preset, preset_for, typed
from medgen.data.dataset import Batch, ScanDataset, collate
from medgen.data.manifest import Manifest, Row
from medgen.data.splits import SPLITS
from medgen.errors import CapabilityError, ConfigError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.metrics.encoder import Extractor, learned_encoder, torchscript_extractor
from medgen.metrics.hog import hog_rows
from medgen.metrics.radiomics import radiomics
from medgen.metrics.sets import FEWEST, FEWEST_PATIENTS, METRICS, SetComparison, compare_sets
from medgen.models import build, family
from medgen.models.abilities import Samples
from medgen.models.base import Model, can, class_indices
from medgen.seeds import derived_seed
from medgen.tasks.capabilities import families_that
from medgen.tasks.conditions import told_of
from medgen.tasks.detection_table import table, write_csv
from medgen.tasks.intake import require_whole

# Scans drawn at a time; training scans that are read, at most; held-out scans below which calibration scans join them.
_AT_ONCE = 32
_MOST = {2: 4000, 3: 400}
_ENOUGH = 100
# What the model's own row is called, and that of other real scans.
MODEL, REAL = "model", "real scans (floor)"
_COLUMNS = {
    "generator": "generator", "frechet": "Fréchet distance", "frechet_ratio": "x floor",
    "kernel": "kernel distance", "precision": "precision", "recall": "recall", "density": "density",
    "coverage": "coverage", "coverage_ratio": "x floor", "c2st_linear": "AUROC, linear", "c2st_trees": "AUROC, trees",
}  # fmt: skip
_EXPLAINS = (
    "The floor: training scans against the same held-out scans; a generator cannot do better but by chance. [ ]: 95 % "
    "intervals, by leaving out blocks of patients. AUROC: of a classifier that tells drawn from real; 0.5 is best.",
    "Numbers of different features, or of other numbers of scans, do not compare. Research use only, not a medical "
    "device.",
)


@dataclass(frozen=True)
class Drawn:
    """What of drawn scans a person decides.

    Args:
        scans: how many to draw; 0: none, and nothing is measured.
        extractor: a TorchScript file whose features are used, too. It is a program: only trusted ones.
        against: presets with nothing to train, such as 'gaussian' and 'gmm', fitted to the same training scans.
        seed: of the drawing, of who is compared, of the encoder.
    """

    scans: int = 0
    extractor: str | Path | None = None
    against: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scans and self.scans < FEWEST:
            raise ConfigError(f"--samples takes 0, or {FEWEST} or more; found {self.scans}.")
        if not self.scans and (self.extractor is not None or self.against):
            raise ConfigError(
                "--extractor and --against say how drawn scans are measured: ask for some with --samples."
            )


def require_drawing(bundle: Bundle) -> None:
    """Refuse a bundle that draws no scans.

    Raises:
        CapabilityError: its model does not sample, or sees slices.
    """
    if not can(bundle.model, "samples"):
        raise CapabilityError(
            f"{bundle.name} draws no scans: there is nothing for --samples. Models that do: {families_that('samples')}."
        )
    require_whole(bundle.recipe, bundle.name, "draw scans")


def comparable(bundle: Bundle) -> bool:
    """Whether a bundle draws whole scans, and training set aside enough others to compare them with."""
    aside = bundle.training.get("set_aside", {})
    enough = min(bundle.training.get("scans", 0), aside.get("scans", 0)) >= FEWEST
    people = min(bundle.training.get("patients", 0), aside.get("patients", 0)) >= FEWEST_PATIENTS
    return enough and people and can(bundle.model, "samples") and not bundle.recipe.slices


@dataclass(frozen=True, eq=False)
class _Side:
    """Real scans, prepared, and whose they are."""

    batch: Batch
    patients: tuple[str, ...]

    def rows(self, which: np.ndarray) -> "_Side":
        """Some of them."""
        batch = Batch(self.batch.x[which], None if self.batch.cond is None else self.batch.cond[which])
        return _Side(batch, tuple(self.patients[n] for n in which))

    def shown(self, images: int) -> "_Side":
        """The same without the channels of labels."""
        return replace(self, batch=replace(self.batch, x=self.batch.x[:, :images]))


def generation(
    bundle: Bundle, scans: Manifest, known: Manifest | None, asked: Drawn, options: ReadOptions
) -> dict[str, Any]:
    """Compare drawn scans with held-out ones, beside the same comparison of training scans.

    Held out are the scans of the test split, and of the calibration split where there are fewer than 100. In a folder
    that the bundle did not learn from they are every second patient's, and the others' make the floor. The model is
    told what is known of the held-out scans, in turn: class, covariates, mask. The floor has their shares of classes.

    Args:
        bundle: whose model samples.
        scans: that suit it, of which held-out ones are taken.
        known: all scans, with the splits of training; None where it learned from others.
        asked: how many, by which features.
        options: how strict reading is.

    Returns:
        'rows': plain values for each feature space and generator; 'scans' in each set, 'drawn', 'held_out', 'notes'.
        Where fewer than 10 scans are held out there are no rows, and a note says so.

    Raises:
        CapabilityError, ConfigError, DataError.
    """
    held, learned, says = _sides(scans, known)
    found: dict[str, Any] = {"drawn": asked.scans, "held_out": len(held), "rows": [], "notes": [says]}
    people = [len(rows.patients) for rows in (held, learned)]
    if min(len(held), len(learned)) < FEWEST or min(people) < FEWEST_PATIENTS:
        few = f"Comparing drawn scans takes {FEWEST} held-out scans of {FEWEST_PATIENTS} patients and as many others"
        seen = f"{len(held)} of {people[0]} and {len(learned)} of {people[1]}"
        found["notes"].append(f"{few}; found {seen}: not measured.")
        return found
    rng = np.random.default_rng(derived_seed(asked.seed, 1))
    few = rng.permutation(len(learned))[: _MOST[bundle.model.config.dims]]
    train = _read(_of(learned, [learned.rows[n] for n in sorted(few)]), bundle, options)
    real = _read(held, bundle, options)
    drawn = {MODEL: _drawn(bundle.model, real.batch, asked)}
    for name in asked.against:
        fitted = _fitted(name, bundle, train.batch)
        told = replace(real.batch, cond=class_indices(bundle.model.config, real.batch.cond), context=None)
        drawn[name] = _drawn(fitted, told, asked)
    # Pairs are compared by their scans: features are of pictures.
    images = bundle.model.config.images
    drawn = {name: x[:, :images] for name, x in drawn.items()}
    train, real = train.shown(images), real.shown(images)
    floor = train.rows(_alike(train, real, bundle.model, rng))
    for name, extract in _extractors(train.batch.x, asked).items():
        found["rows"] += _compared(name, extract, drawn, (real, floor), asked.seed)
    count = found["rows"][0]["scans"]
    return {**found, "scans": count, "held_out": len(real.patients), "notes": [says, *_thoughts(count, train)]}


# -- who is compared -----------------------------------------------------------------------------------------


def _sides(scans: Manifest, known: Manifest | None) -> tuple[Manifest, Manifest, str]:
    """Held-out scans, others, and a sentence about them."""
    if known is None:
        theirs = set(scans.patients[::2])
        held, others = ([row for row in scans.rows if (row.patient in theirs) == side] for side in (True, False))
        says = "The bundle did not learn from this folder: the floor compares one half of its patients with the other."
        return _of(scans, held), _of(scans, others), says
    labels, domains = ({getattr(row, name) for row in scans.rows} for name in ("label", "domain"))
    split = {name: [r for r in known.split(name).rows if r.label in labels and r.domain in domains] for name in SPLITS}
    tested = {row.case for row in split["test"]}
    held = [row for row in scans.rows if row.case in tested]
    says = f"Held out are {len(held)} scans of the test split"
    if len(held) < _ENOUGH and split["calibration"]:
        says += f" and {len(split['calibration'])} of the calibration split"
        held += split["calibration"]
    return _of(scans, held), _of(known, split["train"]), f"{says}."


def _of(scans: Manifest, rows: Sequence[Row]) -> Manifest:
    return replace(scans, rows=tuple(rows))


def _read(rows: Manifest, bundle: Bundle, options: ReadOptions) -> _Side:
    """The scans prepared; those that cannot be are named and left out."""
    data = ScanDataset(rows, bundle.recipe, **told_of(bundle.model.config), options=options)
    batch = collate([data[n] for n in range(len(data))])
    owners = {row.case: row.patient for row in rows.rows}
    return _Side(batch, tuple(owners[case] for case in batch.cases))


def _alike(train: _Side, real: _Side, model: Model, rng: np.random.Generator) -> np.ndarray:
    """Rows of training scans, as many as there can be with the held-out scans' shares of classes."""
    order = rng.permutation(len(train.patients))
    classes, wanted = (class_indices(model.config, side.batch.cond) for side in (train, real))
    if classes is None or wanted is None:
        return order
    there, shares = (np.bincount(one.numpy(), minlength=len(model.config.classes)) for one in (classes, wanted))
    shares = shares / shares.sum()
    most = min(count / share for count, share in zip(there, shares, strict=True) if share)
    of_each = [order[classes.numpy()[order] == n][: int(most * share + 1e-9)] for n, share in enumerate(shares)]
    return np.concatenate(of_each)


# -- drawing -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _drawn(model: Model, told: Batch, asked: Drawn) -> Tensor:
    """Scans (n, c, *space) on [0, 1], each told what one of the held-out scans is told."""
    order = np.random.default_rng(derived_seed(asked.seed, 2)).permutation(len(told.x))
    rows, drawn = np.resize(order, asked.scans), []
    for first in track(range(0, asked.scans, _AT_ONCE), "Drawing scans"):
        which = rows[first : first + _AT_ONCE]
        cond = None if told.cond is None else told.cond[which]
        given = {} if told.context is None else {"context": told.context[which]}
        seed = derived_seed(asked.seed, 3, first)
        drawn.append(cast(Samples, model).sample(len(which), seed=seed, cond=cond, **given).clamp(0, 1).cpu())
    return torch.cat(drawn)


def _fitted(name: str, bundle: Bundle, train: Batch) -> Model:
    """A preset with nothing to train, of the same scans and classes.

    Raises:
        ConfigError: there is no such preset, or it has something to train.
    """
    config = bundle.model.config
    preset = load_preset(preset_for(name, config.dims))
    kind = family(str(preset.model.get("kind", "")) or "mixture")
    values = {"shape": config.shape, "channels": config.channels, "classes": config.classes, **preset.model}
    model = build(typed(kind.Config, values, name, "model"))
    if preset.models or preset.about.dims != config.dims or model.players() or not can(model, "samples"):
        raise ConfigError(
            f"--against {name}: takes presets that are fitted at once and sample: gaussian, gmm, patchgmm."
        )
    model.finalise([replace(train, cond=class_indices(config, train.cond), context=None)])
    return model.eval()


# -- comparing -----------------------------------------------------------------------------------------------


def _extractors(train: Tensor, asked: Drawn) -> dict[str, Extractor]:
    """Features by name."""
    found: dict[str, Extractor] = {} if asked.extractor is None else {"own": torchscript_extractor(asked.extractor)}
    note(f"Learning an encoder of {len(train)} training scans, to compare by its features, too.")
    return {"radiomics": radiomics, "hog": hog_rows, "encoder": learned_encoder(train, seed=asked.seed), **found}


def _compared(
    name: str, extract: Extractor, drawn: Mapping[str, Tensor], sides: tuple[_Side, _Side], seed: int
) -> list[dict[str, Any]]:
    """A row for real scans, and for each generator."""
    real, floor = sides
    rows = [np.asarray(extract(side.batch.x), dtype=np.float64) for side in sides]
    rows_found: list[dict[str, Any]] = []
    for generator, x in track(list(drawn.items()), f"Comparing by {name}"):
        made = np.asarray(extract(x), dtype=np.float64)
        whose = {"patients": real.patients, "floor_patients": floor.patients}
        found = compare_sets(made, rows[0], rows[1], **whose, seed=seed)
        if not rows_found:
            rows_found.append({"features": name, "generator": REAL, "scans": found.scans, **_plain(found, "floor")})
        rows_found.append({"features": name, "generator": generator, "scans": found.scans, **_plain(found, "value")})
    return rows_found


def _plain(found: SetComparison, of: str) -> dict[str, Any]:
    """Numbers of the generator ('value') or of the real scans ('floor') by name."""
    told: dict[str, Any] = {}
    for name in METRICS:
        one = found.measures[name]
        if of == "floor":
            told |= {name: one.floor, f"{name}_interval": list(one.floor_interval)}
            continue
        told |= {name: one.value, f"{name}_interval": list(one.interval)}
        if one.ratio is not None and one.ratio_interval is not None:
            told |= {f"{name}_ratio": one.ratio, f"{name}_ratio_interval": list(one.ratio_interval)}
    return told


def _thoughts(count: int, train: _Side) -> list[str]:
    """What a reader should know before believing a number."""
    told = [f"Each set has {count} scans; the encoder learned from {len(train.patients)} training scans."]
    if count < _ENOUGH:
        told.append(f"With {count} scans a set the numbers are rough: see the intervals.")
    return told


def lines(found: Mapping[str, Any]) -> list[str]:
    """The tables as Markdown."""
    told = ["", f"DRAWN SCANS: {found['drawn']}, compared with held-out scans"]
    for features in dict.fromkeys(row["features"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["features"] == features]
        told += ["", f"By {features}:", "", *table(rows, _COLUMNS)]
    return [*told, "", *(_EXPLAINS if found["rows"] else ()), *found["notes"]]


def write(found: Mapping[str, Any], folder: Path) -> None:
    """generation.md and generation.csv."""
    (folder / "generation.md").write_text("\n".join(lines(found)[1:]) + "\n", encoding="utf-8")
    write_csv(found["rows"], folder / "generation.csv")


__all__ = ["MODEL", "REAL", "Drawn", "comparable", "generation", "lines", "require_drawing", "write"]
