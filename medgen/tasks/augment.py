"""`medgen augment`: scans that a dataset does not have, with labels and masks, in the dataset's own layout.

Only the training split is learned from and changed; nobody held out is ever a source. What is written has passed two
gates: it looks like a real scan of its class, and, where it came from noise, it is no copy of a patient.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medgen import io
from medgen.bundle import Bundle
from medgen.data.labels import read_labels
from medgen.data.window import real_voxels
from medgen.errors import ConfigError, DataError, PrivacyError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.report.pictures import contact_sheet
from medgen.tasks.audit import Audit, require_private
from medgen.tasks.card import said_of_privacy, write_card
from medgen.tasks.conditions import Masks
from medgen.tasks.gates import Gates, require_several
from medgen.tasks.generate import Tally, generate
from medgen.tasks.intake import require_training_scans
from medgen.tasks.learn import learn
from medgen.tasks.looks import known_scans
from medgen.tasks.outputs.files import Facts, Output
from medgen.tasks.outputs.layout import Layout, layout_of
from medgen.tasks.plan import Choices, Plan, plan_training
from medgen.tasks.ways.base import Material
from medgen.tasks.ways.choice import require_able, way_of
from medgen.tasks.ways.orders import Making, Order, orders
from medgen.tasks.ways.sample import require_sampling
from medgen.tasks.ways.sources import secret_of
from medgen.tasks.workspace import Workspace

Format = Literal["auto", "nifti", "dicom", "png", "npz"]
# Scans on the contact sheet. What medgen wrote itself may be of three channels.
_SHOWN, _OWN = 24, ReadOptions(colour=True)


@dataclass(frozen=True)
class Augmented:
    """What was written.

    Args:
        folder: where.
        written: how many scans, by the way they were made.
        rejected: how many candidates were not written, by reason.
        format: of the files.
        layout: of the folder.
        privacy: how well copies are told here, and what an attacker learns from the scans from noise.
        quality: by each test, the part of scans further from the training scans than nearly all held-out ones.
        private: a folder with what shows or names patients; None where there is nothing.
    """

    folder: Path
    written: dict[str, int]
    rejected: dict[str, int]
    format: str
    layout: str
    privacy: dict[str, Any]
    quality: dict[str, float]
    private: Path | None = None

    @property
    def said(self) -> str:
        """What is known of copies and attacks, in a sentence or two."""
        return said_of_privacy(self.privacy)


def augment(
    data: str | Path,
    out: str | Path,
    *,
    bundle: str | Path | None = None,
    format: Format = "auto",
    preset: str | Path | None = None,
    label: str | None = None,
    domain: str | None = None,
    overrides: Sequence[str] = (),
    minutes: float | None = 20,
    seed: int = 0,
    covariates: Sequence[str] = (),
    masks: Masks = "auto",
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
    **making: Any,
) -> Augmented:
    """Make scans of the kind that a folder holds, with their labels and masks, in the folder's own layout.

    `out` gets the scans, `manifest.csv` (class, mask, split 'train', origin, how, model, seed, sources, scores),
    `README.md`, `privacy.json`, `contact_sheet.png`, `run.json` and, where a model was learned, the `bundle`. What
    shows or names patients, such as thumbnails of rejected copies and the table of sources, goes to `OUT.private`.

    Args:
        data: a folder, zip, CSV or .npz of scans.
        out: a folder that must not exist.
        bundle: use this trained bundle instead of learning; `data` are the scans it was trained on.
        format: 'auto' writes what `data` is made of.
        preset, label, domain, overrides, minutes, seed, covariates, masks, device, options: as for `train`; masks
            'auto' learns scans together with their masks where they have masks.
        force: replace an existing output.
        **making: how many scans, of which class, in which way: the fields of `medgen.tasks.ways.orders.Making`, such
            as `n=100`, `balance=True`, `how='classic'`.

    Raises:
        DataError, ConfigError, CapabilityError, TrainingError, PrivacyError, OutputError.

    >>> import medgen
    >>> medgen.augment("data_samples/heads", "more", how="classic", n=4)  # doctest: +SKIP
    """
    asked = _making(making)
    choices = Choices(preset, label, domain, list(overrides), minutes, seed, list(covariates), masks)
    settings = {
        "data": str(Path(data).resolve()), **asked.settings(), "bundle": None if bundle is None else str(bundle),
        "format": format, **choices.settings(), "options": vars(options),
    }  # fmt: skip
    work = Workspace(out, settings, force=force)
    require_private(out, force=force or work.resumed)
    with io.opened(data) as place:
        given = None if bundle is None else Bundle.load(bundle)
        plan = _plan(place, choices, given, asked, options)
        train = plan.manifest.split("train")
        if asked.needs_model:
            require_able(asked, (given.model.config if given else plan.model))
        layout = layout_of(data, plan.manifest, format, masked=_masked(asked, plan, given))
        wanted = _orders(asked, plan, given)
        _announce(plan, given, asked, layout, wanted)
        work.record()
        trained = given or (_learned(plan, work, seed, device, options) if asked.needs_model else None)
        recipe = trained.recipe if trained else plan.recipe
        labels = trained.model.config.labels if trained else ()
        known = known_scans(plan.manifest, ("train", "val"), recipe, options, labels)
        held = known_scans(plan.manifest, ("calibration",), recipe, options, labels)
        if known is None:
            raise DataError("No scan is left to learn from. Check the messages above.")
        gates = Gates(known, held, trained, reject=asked.reject, seed=seed, copies="sample" in asked.ways)
        key = secret_of(plan.manifest)
        material = Material(train, recipe, options, seed, trained, asked.tell, key)
        grid = _seen(trained, plan.found.lattice) if trained else None
        ways = {how: way_of(how, material, asked, grid) for how in asked.ways}
        audit = Audit(known, held, trained, work, key=key, seed=seed)
        target = Output(work.folder, layout, _facts(trained, seed))
        with work.writing():
            audit.recall(_rows(work, wanted))
            try:
                tally = generate(wanted, ways, gates, target, work, audit)
            except PrivacyError:
                audit.private(train, _rows(work, wanted))
                # What it has learned shows patients: it is of no use to anybody.
                work.discard()
                raise
            rows = _rows(work, wanted)
            found = _found(rows, tally, gates, audit)
            _sheet(work.folder, target.finish(rows), trained, seed)
            write_card(work.folder, found, layout, trained)
            private = audit.private(train, rows)
        work.finish({"command": "augment", "settings": settings, "weights_sha256": trained and trained.weights_sha256,
                     "layout": layout.kind, "seconds_of": tally.seconds, **found})  # fmt: skip
    return Augmented(Path(out), format=layout.format, layout=layout.kind, private=private, **found)


# -- decisions -----------------------------------------------------------------------------------


def _making(fields: Mapping[str, Any]) -> Making:
    if unknown := sorted(set(fields) - set(Making.__dataclass_fields__)):
        known = ", ".join(Making.__dataclass_fields__)
        raise ConfigError(f"augment takes no {unknown[0]!r}. What says which scans to make: {known}.")
    return Making(**fields)


def _plan(place: Path, choices: Choices, given: Bundle | None, asked: Making, options: ReadOptions) -> Plan:
    """What to learn from; with a bundle, the scans it has learned from, in the splits of then."""
    plan = plan_training(place, choices, options)
    if given:
        if "sample" in asked.ways:
            require_sampling(given)
        # Copies are told by the splits of training, whatever this run's seed would make of the folder.
        plan = replace(plan, manifest=require_training_scans(given, place, options))
    if "sample" in asked.ways:
        require_several([row.patient for row in plan.manifest.rows if row.split in ("train", "val")])
    return plan


def _orders(asked: Making, plan: Plan, given: Bundle | None) -> list[Order]:
    labels = tuple(sorted(set(plan.manifest.split("train").labels)))
    classes = labels if len(labels) > 1 else ()
    if "sample" in asked.ways:
        classes = (given.model.config if given else plan.model).classes
    wanted = orders(asked, plan.manifest.split("train"), classes)
    # Of a folder with one class, or of one that was chosen, every scan is of that class.
    all_told = "sample" not in asked.ways or all(row.label for row in plan.manifest.rows)
    only = labels[0] if len(labels) == 1 and all_told else ""
    named = [replace(one, label=one.label or only) for one in wanted]
    _require_two(named, plan)
    return named


def _require_two(wanted: Sequence[Order], plan: Plan) -> None:
    """Refuse, before anything is learned, scans between two patients of a class that has one.

    Raises:
        DataError: it has.
    """
    train = plan.manifest.split("train").rows
    for how, label in sorted({(one.how, one.label) for one in wanted if one.how in ("interpolate", "morph")}):
        patients = len({row.patient for row in train if not label or row.label == label})
        if patients < 2:
            of = f"class {label!r} has" if label else "there is"
            raise DataError(
                f"--how {how} takes the training scans of two patients of one class; {of} {patients}. Add scans of "
                "another patient, or use another way."
            )


def _masked(asked: Making, plan: Plan, given: Bundle | None) -> bool | None:
    """Whether each scan that will be written has a mask; None: as their sources have."""
    if "lesion" in asked.ways:
        return True
    return bool((given.model.config if given else plan.model).labels) if tuple(asked.ways) == ("sample",) else None


def _facts(bundle: Bundle | None, seed: int) -> Facts:
    return Facts(bundle.name, bundle.weights_sha256, seed) if bundle else Facts(seed=seed)


def _announce(plan: Plan, given: Bundle | None, asked: Making, layout: Layout, wanted: Sequence[Order]) -> None:
    ways = ", ".join(f"{count} by {how}" for how, count in Counter(one.how for one in wanted).items())
    first = f"learn {len(plan.manifest.split('train'))} scans, " if asked.needs_model and not given else ""
    note(f"Plan: {first}make {ways}, write {layout.format} files ({layout.kind}).")


def _learned(plan: Plan, work: Workspace, seed: int, device: str, options: ReadOptions) -> Bundle:
    """The model, trained now or by the run that was interrupted."""
    place = work.folder / "bundle"
    if "bundle" in work.done:
        return Bundle.load(place)
    trained = learn(plan, work, seed=seed, device=device, options=options, place=place)
    work.record("bundle")
    return trained


def _seen(bundle: Bundle, lattice: Grid | None) -> Grid:
    """The part of the model's window within the field of view of scans that all share one; else the window."""
    window = Grid.from_dict(bundle.contract.grid)
    places = np.argwhere(real_voxels(window, lattice)) if lattice else np.empty((0, 3))
    if not len(places):
        return window
    first, last = places.min(0), places.max(0)
    return window.crop(first.tolist(), (last - first + 1).tolist())


# -- what is told --------------------------------------------------------------------------------


def _rows(work: Workspace, wanted: Sequence[Order]) -> list[dict[str, Any]]:
    """The table's rows of what is written already."""
    return [work.done[f"scan {one.name}"] for one in wanted if f"scan {one.name}" in work.done]


def _found(rows: Sequence[Mapping[str, Any]], tally: Tally, gates: Gates, audit: Audit) -> dict[str, Any]:
    return {
        "written": dict(Counter(f"{row['origin']} by {row['how']}" for row in rows)),
        "rejected": dict(tally.rejected),
        "quality": {name: round(tally.far[name] / max(1, tally.judged), 4) for name in gates.tests},
        "privacy": {**({"copies": gates.copy_test.to_dict()} if gates.copy_test else {}), **audit.report()},
    }


def _sheet(folder: Path, rows: Sequence[Mapping[str, Any]], bundle: Bundle | None, seed: int) -> None:
    """A picture of the first scans, each with its mask where it has one."""
    shown = rows[:_SHOWN]
    scans = [io.read(";".join(str(folder / part) for part in row["path"].split(";")), _OWN) for row in shown]
    masks = [read_labels(str(folder / row["mask"]), _OWN) if row["mask"] else None for row in shown]
    origins = " and ".join(sorted({str(row["origin"]).upper() for row in rows}))
    made = f" by {bundle.name}" if bundle else ""
    first = f"the first {len(shown)} of " if len(shown) < len(rows) else ""
    title = f"{origins}: {first}{len(rows)} scans made{made}, seed {seed}"
    # Many pairs of volumes would otherwise make a strip.
    columns = 12 if len(scans) > 8 and any(masks) and not scans[0].is_planar else 6
    contact_sheet(scans, folder / "contact_sheet.png", title=title, columns=columns, masks=masks)


__all__ = ["Augmented", "augment"]
