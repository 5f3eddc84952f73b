"""`medgen train`: from a folder of scans to a bundle."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle, Contract
from medgen.data.dataset import ScanDataset
from medgen.data.recipe import GeometryStep
from medgen.errors import DataError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.models import build
from medgen.models.abilities import Samples
from medgen.models.base import Model, can
from medgen.nets.blocks import count_parameters
from medgen.report.pictures import contact_sheet
from medgen.scan import Scan
from medgen.scores.base import Healthy
from medgen.seeds import derived_seed
from medgen.tasks.conditions import Masks, conditions_for, drawn_cells, masks_of, told_of
from medgen.tasks.detector import Detector, can_score, healthy_of, usual_questions
from medgen.tasks.plan import Choices, Part, Plan, plan_training
from medgen.tasks.quality import quality, temperature_of
from medgen.tasks.workspace import Workspace
from medgen.training.device import device_for
from medgen.training.doctor import complaints
from medgen.training.fit import FitConfig, fit
from medgen.training.pace import images_in
from medgen.training.state import Progress


def train(
    data: str | Path,
    out: str | Path,
    *,
    preset: str | Path | None = None,
    label: str | None = None,
    domain: str | None = None,
    overrides: Sequence[str] = (),
    minutes: float | None = 20,
    seed: int = 0,
    covariates: Sequence[str] = (),
    masks: Masks = "none",
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    licence: str = "not stated",
    force: bool = False,
) -> Path:
    """Learn what the scans of a folder look like and keep it as a bundle.

    Args:
        data: a folder, zip, CSV or .npz of scans; every scan is taken for one that belongs.
        out: the bundle's folder, which must not exist.
        preset: name or YAML file; None: the default for images or for volumes.
        label: learn one class only, such as 'normal'.
        domain: learn one modality or site only; 'T1w+T2w' learns one scan of each of a patient as channels.
        overrides: 'a.b=c' changes of the preset.
        minutes: training time to keep within on this machine; None: the preset's images.
        seed: decides splits, order, noise.
        covariates: columns of a CSV that the model is told, such as 'age' and 'sex'.
        masks: 'joint' learns scans together with their masks, to draw pairs; 'given' draws scans for masks; 'auto' is
            'joint' where nearly all scans have a mask; 'none' leaves masks alone, but for presets that are given them.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.
        licence: of the weights, for the model card.
        force: replace an existing output.

    Returns:
        The bundle's folder.

    Raises:
        DataError, ConfigError, TrainingError, OutputError.
    """
    choices = Choices(preset, label, domain, list(overrides), minutes, seed, list(covariates), masks)
    settings = {"data": str(Path(data).resolve()), **choices.settings(), "options": vars(options)}
    work = Workspace(out, settings, force=force)
    with io.opened(data) as place:
        plan = plan_training(place, choices, options)
        work.record()
        learn(plan, work, seed=seed, device=device, options=options, licence=licence)
        return work.finish({"command": "train", "settings": settings, "plan": plan.describe()})


def learn(
    plan: Plan, work: Workspace, *, seed: int, device: str, options: ReadOptions, licence: str = "not stated",
    place: Path | None = None,
) -> Bundle:  # fmt: skip
    """Train what `plan` says inside `work` and write the bundle to `place` (default: the workspace itself)."""
    begun = time.monotonic()
    told = told_of(plan.model)
    train_set = ScanDataset(plan.manifest.split("train"), plan.recipe, **told, options=options)
    val_rows = plan.manifest.split("val")
    val_set = ScanDataset(val_rows, plan.recipe, **told, options=options) if len(val_rows) else None
    models, facts = {}, {}
    for part in plan.parts:
        models[part.name], facts[part.name] = _trained(part, plan, work, (train_set, val_set), seed=seed, device=device)
    trained = time.monotonic()
    contract = _contract(plan, train_set)
    healthy = healthy_of(train_set, val_set)
    calibration, tensors, metrics = _measured(plan, models, healthy, _held_out(plan, options))
    for model in models.values():
        model.cpu()
    bundle = Bundle(
        models=models,
        recipe=plan.recipe,
        contract=contract,
        calibration=calibration,
        tensors=tensors,
        licence=licence,
        training={
            "preset": plan.preset,
            "scans": len(train_set.volumes()),
            "patients": len(plan.manifest.split("train").patients),
            "set_aside": _set_aside(plan),
            "manifest_sha256": plan.manifest.hash(),
            "labels": sorted({row.label for row in plan.manifest.rows}),
            "domains": sorted({row.domain for row in plan.manifest.rows}),
            "seed": seed,
            "train_seconds": round(trained - begun, 2),
            "minutes": round((time.monotonic() - begun) / 60, 2),
            "device": device_for(device),
            **_together(facts),
        },
        metrics=metrics,
    )
    place = place or work.folder
    place.mkdir(parents=True, exist_ok=True)
    bundle.save(place)
    if can(bundle.model, "samples"):
        masks = masks_of(plan.manifest, plan.recipe, options, told["labels"]) if told["context"] else []
        preview(bundle, place / "preview.png", masks, seed=seed)
    return Bundle.load(place)


def _trained(
    part: Part, plan: Plan, work: Workspace, scans: tuple[ScanDataset, ScanDataset | None], *, seed: int, device: str
) -> tuple[Model, dict[str, Any]]:
    """One model, and how its training went."""
    train_set, val_set = scans
    torch_seed = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=torch_seed)))
        model = build(part.model)
    settings = _timed(part, plan.minutes, model, train_set, work, device)
    size = f"{count_parameters(model):,} parameters; at most {settings.images:,} images"
    note(
        f"Learning {len(train_set)} scans of {' x '.join(map(str, part.model.shape))} voxels with {part.preset} "
        f"({size if model.players() else 'in closed form'})."
    )
    reached = fit(
        model,
        train_set,
        val_set,
        settings,
        seed=seed,
        device=device,
        state_folder=work.folder / "training" / ("" if len(plan.parts) == 1 else part.name),
        seconds=None if plan.minutes is None else 60 * plan.minutes * part.share,
    )
    model.finalise(batch.to(model.device) for batch in train_set.batches(settings.batch_size))
    health = model.health(batch.to(model.device) for batch in train_set.batches(settings.batch_size))
    for sentence in complaints(health):
        note(sentence)
    return model, {
        "images_seen": reached.trained,
        "best_images_seen": reached.best_seen,
        "stopped": _why_stopped(reached, settings),
        "fit": settings.model_dump(mode="json"),
        "health": health,
        "warnings": [*complaints(health), *reached.warnings],
        "remedies": reached.remedies,
        "history": reached.history,
        "pulses": reached.pulses,
        # Anomalies of these kinds say nothing about how well a detector finds others.
        "anomaly_kinds": sorted(getattr(part.model, "kinds", ())),
    }


def _together(facts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """How training went: of one model its own facts, of several those by name and what they share."""
    if len(facts) == 1:
        return next(iter(facts.values()))
    every = facts.values()
    return {
        "images_seen": sum(one["images_seen"] for one in every),
        "warnings": [sentence for one in every for sentence in one["warnings"]],
        "anomaly_kinds": sorted({kind for one in every for kind in one["anomaly_kinds"]}),
        "parts": dict(facts),
    }


def preview(bundle: Bundle, path: Path, masks: Sequence[Tensor] = (), *, seed: int) -> None:
    """A contact sheet of generated scans, classes in turn, for `masks` in turn where the model is given one."""
    config = bundle.model.config
    count = 12 if config.dims == 2 else 4
    labels = [config.classes[n % len(config.classes)] if config.classes else "" for n in range(count)]
    cells = [drawn_cells(told_of(config)["covariates"], derived_seed(seed, n)) for n in range(count)]
    given = {"context": torch.stack([masks[n % len(masks)] for n in range(count)])} if masks else {}
    cond = conditions_for(config, labels, cells)
    drawn = cast(Samples, bundle.model).sample(count, seed=seed, cond=cond, **given)
    values = drawn[:, : config.images].clamp(0, 1).numpy()
    if bundle.recipe.slices:
        scans = [Scan(value[..., None], Grid((*value.shape[1:], 1), np.eye(4))) for value in values]
    else:
        scans = [bundle.contract.physical_scan(value) for value in values]
    contact_sheet(scans, path, title=f"SYNTHETIC: generated by {bundle.name}, seed {seed}")


# -- decisions -----------------------------------------------------------------------------------


def _timed(
    part: Part, minutes: float | None, model: Model, train_set: ScanDataset, work: Workspace, device: str
) -> FitConfig:
    """The training config with as many images as fit the minutes; decided once for a run."""
    if minutes is None or not model.players():
        return part.fit
    decided = work.journal.setdefault("images", {})
    if part.name not in decided:
        allowed = minutes * part.share
        possible, seconds = images_in(0.8 * allowed, model, train_set, part.fit, device=device)
        decided[part.name] = min(part.fit.images, possible)
        work.record()
        note(f"One image takes {seconds:.3f} s here: {possible:,} images fit {allowed:.3g} minutes.")
    return part.fit.model_copy(update={"images": decided[part.name]})


def _contract(plan: Plan, train_set: ScanDataset) -> Contract:
    scans = train_set.volumes()
    scales = torch.stack([scans[n]["scale"] for n in range(len(scans))])
    slope, intercept = scales.median(0).values.tolist()
    found = plan.found
    # Domains that were joined are the channels' names.
    names = plan.manifest.domains[0].split("+") if len(plan.manifest.domains) == 1 else []
    return Contract(
        modality=found.modality,
        unit=found.unit,
        channels=found.channels,
        planar=found.planar,
        spacing=found.spacing,
        low=found.physical[0],
        high=found.physical[1],
        integers=found.stored is not None,
        slope=slope,
        intercept=intercept,
        grid=_template(plan).to_dict(),
        space=found.space,
        body_part=found.body_part,
        names=tuple(names) if len(names) == found.channels > 1 else (),
    )


def _template(plan: Plan) -> Grid:
    """Where generated scans lie: the recipe's window of the shared lattice, or about the world's origin."""
    found, recipe = plan.found, plan.recipe
    grid = found.lattice or Grid(recipe.shape or (1, 1, 1), np.diag([*found.spacing, 1.0]))
    for step in recipe.steps:
        if isinstance(step, GeometryStep):
            grid = step.place(grid)
    if found.lattice is None:
        affine = grid.affine.copy()
        affine[:3, 3] -= grid.centre
        grid = Grid(grid.shape, affine)
    return grid


def _set_aside(plan: Plan) -> dict[str, int]:
    """How many scans, and patients, neither training nor its stopping looks at."""
    aside = [plan.manifest.split(split) for split in ("calibration", "test")]
    return {"scans": sum(map(len, aside)), "patients": sum(len(rows.patients) for rows in aside)}


def _held_out(plan: Plan, options: ReadOptions) -> ScanDataset | None:
    """The calibration scans, prepared once for all that needs them; None where none can be read."""
    rows = plan.manifest.split("calibration")
    if not len(rows):
        return None
    try:
        return ScanDataset(rows, plan.recipe, **told_of(plan.model), options=options)
    except DataError:
        return None


def _measured(
    plan: Plan, models: Mapping[str, Model], healthy: Healthy, held: ScanDataset | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """What held-out healthy scans score, as numbers and tensors; and how good the models are on them."""
    calibration, tensors, metrics = {}, {}, {}
    first = next(iter(models.values()))
    if can_score(first) or (plan.questions and not first.config.joint):
        questions = plan.questions or usual_questions(first, sliced=bool(plan.recipe.slices))
        detector, members = Detector(models, questions, slices=plan.recipe.slices).chosen(healthy)
        people = {row.case: row.covariates for row in plan.manifest.rows}
        calibration, tensors = detector.learned(healthy).calibrated(held, people)
        calibration |= {"members": members} if members else {}
    if held is None:
        return calibration, tensors, metrics
    if temperature := temperature_of(first, held):
        calibration = {**calibration, "temperature": temperature}
    for name, model in models.items():
        prefix = "held_out" if len(models) == 1 else f"held_out_{name}"
        metrics |= {f"{prefix}_{key}": value for key, value in quality(model, held).items()}
    return calibration, tensors, metrics


def _why_stopped(reached: Progress, settings: FitConfig) -> str:
    if reached.stale >= settings.patience:
        return "early: no better on held-out scans"
    done = reached.seen >= settings.images and not reached.skipped
    return "at the planned images" if done else "when the time was up"


__all__ = ["learn", "preview", "train"]
