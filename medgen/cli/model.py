"""`medgen models` and `medgen train`."""

from typing import Annotated

import typer

from medgen.cli import app
from medgen.cli.shared import (
    AsJson,
    Colour,
    Context,
    Covariates,
    Data,
    Device,
    Domain,
    DryRun,
    Force,
    Label,
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
    reading,
    say,
    speaking,
)


@app.command()
def models(as_json: AsJson = False):
    """The presets: family, year, paper, dimensions and abilities."""
    from medgen.tasks.look import list_models

    found = list_models()
    lines = []
    for row in found:
        lines += [f"{row['preset']}  ({row['dims']}D, {row['family']}, {row['year']})", f"  {row['title']}"]
        lines += [f"  {row['paper']}", f"  can: {', '.join(row['abilities'])}"]
    say(lines, {"presets": found}, as_json)


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
    context: Context = None,
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
        "covariates": listed(covariates), "context": context,
    }  # fmt: skip
    with speaking(quiet):
        if dry_run:
            show_plan(data, options, choices, as_json)
            return
        from medgen.tasks.learn import train as run

        folder = run(data, out, **choices, device=device, options=options, licence=licence, force=force)
    say([f"Wrote the bundle {folder}.", f"Next: medgen score SCANS -m {folder} -o OUT"], {"bundle": folder}, as_json)


def show_plan(data, options, choices: dict, as_json: bool) -> None:
    """Print what a training run would do."""
    import yaml

    from medgen.io import opened
    from medgen.tasks.plan import Choices, plan_training

    with opened(data) as place:
        plan = plan_training(place, Choices(**choices), options).describe()
    say([yaml.safe_dump(plan, sort_keys=False).rstrip()], plan, as_json)
