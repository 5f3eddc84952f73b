"""`medgen models`, `train`, `evaluate` and `compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medgen.cli import app
from medgen.cli.shared import (
    AsJson,
    Colour,
    Covariates,
    Data,
    Device,
    Domain,
    DryRun,
    Force,
    Label,
    Made,
    Masks,
    Minutes,
    OnGap,
    OnTilt,
    Out,
    Preset,
    Quiet,
    Seed,
    Set,
    Xform,
    listed,
    next_command,
    reading,
    say,
    speaking,
)

Split = Literal["test", "all"]


@app.command()
def models(as_json: AsJson = False):
    """The presets by family: year, paper, dimensions and abilities."""
    from medgen.tasks.look import list_models

    found = list_models()
    lines, family = [], ""
    for row in found:
        if row["family"] != family:
            family = row["family"]
            lines += ["", family.upper()]
        lines += [f"{row['preset']}  ({row['dims']}D, {row['year']})  {row['title']}", f"  {row['paper']}"]
        lines += [f"  can: {', '.join(row['abilities'])}"]
    say(lines[1:], {"presets": found}, as_json)


@app.command()
def train(
    data: Data,
    out: Out,
    preset: Preset = None,
    label: Label = None,
    domain: Domain = None,
    minutes: Minutes = 20,
    set_: Set = [],  # noqa: B006
    covariates: Covariates = "",
    masks: Masks = "none",
    licence: Annotated[str, typer.Option(help="Licence of the weights, for the model card.")] = "not stated",
    seed: Seed = 0,
    device: Device = "auto",
    on_gap: OnGap = "error",
    on_tilt: OnTilt = "error",
    xform: Xform = "error",
    colour: Colour = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
):
    """Learn what the scans of a folder look like and keep it as a bundle."""
    options = reading(on_gap, on_tilt, xform, colour)
    choices = {
        "preset": preset, "label": label, "domain": domain, "overrides": set_, "minutes": minutes, "seed": seed,
        "covariates": listed(covariates), "masks": masks,
    }  # fmt: skip
    with speaking(quiet):
        if dry_run:
            show_plan(data, options, choices, as_json)
            return
        from medgen.tasks.learn import train as run

        folder = run(data, out, **choices, device=device, options=options, licence=licence, force=force)
    say([f"Wrote the bundle {folder}.", next_command(folder, data)], {"bundle": folder}, as_json)


@app.command()
def evaluate(
    data: Data,
    bundle: Made,
    split: Annotated[Split, typer.Option(help="test: the scans that training set aside.")] = "test",
    label: Label = None,
    domain: Domain = None,
    paint: Annotated[
        str | None, typer.Option(help="Paint lesions into healthy scans: 'own' shapes, or a folder of drawn masks.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="Lesions to paint, such as hypo,iso [default: all].")] = "",
    healthy: Annotated[str, typer.Option(help="Labels of healthy scans [default: those trained on].")] = "",
    ill: Annotated[str, typer.Option(help="Labels of ill scans [default: all others].")] = "",
    fpr: Annotated[float, typer.Option(min=1e-4, max=0.5, help="False-alarm rate for flags and masks.")] = 0.05,
    samples: Annotated[int, typer.Option(min=0, help="Scans to draw and compare with held-out ones.")] = 0,
    extractor: Annotated[
        Path | None, typer.Option(help="TorchScript file whose features are compared, too. It is run: trust it.")
    ] = None,
    against: Annotated[str, typer.Option(help="Presets to fit beside the bundle, such as gaussian,gmm.")] = "",
    utility: Annotated[
        bool, typer.Option("--utility", help="Teach learners with and without synthetic scans: do these help?")
    ] = False,
    synthetic: Annotated[
        Path | None, typer.Option(help="Output of augment whose scans are used [default: the bundle draws them].")
    ] = None,
    ratios: Annotated[str, typer.Option(help="Synthetic scans for each real one.")] = "0.5,1,2,5,10,20",
    learners: Annotated[str, typer.Option(help="Learners of classes [default: svm,cnn,logistic].")] = "",
    low_data: Annotated[
        str, typer.Option(help="Training scans of each class of a learning curve, such as 10,25,50,100.")
    ] = "",
    draws: Annotated[int, typer.Option(min=1, help="Draws of patients for each point of that curve.")] = 5,
    minutes: Annotated[
        float, typer.Option(min=0.001, help="Training time of each generator of that curve: one a draw.")
    ] = 5,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the tables; must not exist.")] = None,
    seed: Annotated[int, typer.Option(help="Decides painted lesions, drawn scans and whom intervals draw.")] = 0,
    device: Device = "auto",
    on_gap: OnGap = "error",
    on_tilt: OnTilt = "error",
    xform: Xform = "error",
    colour: Colour = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
):
    """How good a bundle is on scans it has not learned from: density, reconstruction, detection, drawn scans, use."""
    options = reading(on_gap, on_tilt, xform, colour)
    with speaking(quiet):
        from medgen.data.lesions import KINDS_B
        from medgen.tasks.detection_table import lines
        from medgen.tasks.evaluate import Asked
        from medgen.tasks.evaluate import evaluate as run
        from medgen.tasks.generation import Drawn
        from medgen.tasks.generation import lines as lines_of_drawn
        from medgen.tasks.usefulness_table import lines as lines_of_use

        asked = Asked(paint, tuple(listed(kinds)) or KINDS_B, listed(healthy), listed(ill), fpr, seed)
        drawn = Drawn(samples, extractor, tuple(listed(against)), seed)
        useful = asked_use(ratios, learners, low_data, draws, minutes, synthetic, seed, utility=utility)
        found = run(
            data, bundle, split=split, label=label, domain=domain, detection=asked, drawn=drawn, useful=useful, out=out,
            device=device, options=options, force=force,
        )  # fmt: skip
    tables = ("detection", "generation", "utility")
    told = [f"{name}: {value}" for name, value in found.items() if name not in tables]
    told += lines(found["detection"]) if "detection" in found else []
    told += lines_of_drawn(found["generation"]) if "generation" in found else []
    told += lines_of_use(found["utility"]) if "utility" in found else []
    say(told + ([] if out is None else [f"Wrote the tables to {out}."]), found, as_json)


def asked_use(
    ratios: str, learners: str, low_data: str, draws: int, minutes: float, synthetic: Path | None, seed: int,
    *, utility: bool,
):  # fmt: skip
    """What is asked of usefulness; None where nothing is."""
    from medgen.errors import ConfigError
    from medgen.metrics.utility import LEARNERS
    from medgen.tasks.study import Useful

    if not utility:
        if learners or low_data or synthetic is not None:
            raise ConfigError("--learners, --low-data and --synthetic say how use is measured: ask for it, --utility.")
        return None
    try:
        shares, sizes = [float(one) for one in listed(ratios)], [int(one) for one in listed(low_data)]
    except ValueError as error:
        raise ConfigError("--ratios takes numbers, --low-data whole numbers, with commas between them.") from error
    return Useful(shares, listed(learners) or LEARNERS, sizes, draws, minutes, synthetic, seed)


@app.command()
def compare(
    data: Data,
    out: Out,
    presets: Annotated[str, typer.Option(help="Presets with commas, such as vae,glow [default: one a family].")] = "",
    label: Label = None,
    domain: Domain = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time of each preset.")] = 5,
    set_: Set = [],  # noqa: B006
    seed: Seed = 0,
    device: Device = "auto",
    on_gap: OnGap = "error",
    on_tilt: OnTilt = "error",
    xform: Xform = "error",
    colour: Colour = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
):
    """Train several presets on one folder, with the same splits and voxels, and write one table."""
    options = reading(on_gap, on_tilt, xform, colour)
    with speaking(quiet):
        from medgen.tasks.compare import DEFAULT, lines
        from medgen.tasks.compare import compare as run

        names = listed(presets) or list(DEFAULT)
        if dry_run:
            from medgen.tasks.compare import would_train

            told = would_train(data, names, label=label, domain=domain, overrides=set_, seed=seed, options=options)
            say([f"Would train {', '.join(told['presets'])} for {minutes:g} minutes each into {out}."], told, as_json)
            return
        done = run(
            data, out, presets=names, label=label, domain=domain, overrides=set_, minutes=minutes, seed=seed,
            device=device, options=options, force=force,
        )  # fmt: skip
    table = lines(done.rows) + [f"{row['preset']}: {row['error']}" for row in done.rows if "error" in row]
    table += [f"Wrote comparison.csv, .json, .md and the bundles to {done.folder}."]
    say(table, {"folder": done.folder, "rows": done.rows}, as_json)
    if done.failed:
        raise typer.Exit(1)


def show_plan(data, options, choices: dict, as_json: bool) -> None:
    """Print what a training run would do."""
    import yaml

    from medgen.io import opened
    from medgen.tasks.plan import Choices, plan_training

    with opened(data) as place:
        plan = plan_training(place, Choices(**choices), options).describe()
    say([yaml.safe_dump(plan, sort_keys=False).rstrip()], plan, as_json)
