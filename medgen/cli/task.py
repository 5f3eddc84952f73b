"""`medgen augment` and `medgen score`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from medgen.cli import app
from medgen.cli.model import show_plan
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
    pairs,
    reading,
    say,
    speaking,
    weights,
)

Written = Literal["auto", "nifti", "dicom", "png", "npz"]
Ways = Literal["sample", "interpolate", "morph", "edit", "lesion", "classic", "mix"]
Lesions = Literal["insert", "remove", "auto"]
# A part of the candidates of which a person should know that they are unlike real scans.
_MUCH = 0.1
Drawn = Literal["real", "deformed", "sampled"]


@app.command()
def augment(
    data: Data,
    out: Out,
    how: Annotated[Ways, typer.Option(help="Where scans come from: noise, or training scans.")] = "sample",
    mix: Annotated[str, typer.Option(help="Parts of --how mix, such as sample=2,classic=1.")] = "",
    n: Annotated[int | None, typer.Option("-n", "--n", min=1, help="How many scans in all [default: 20].")] = None,
    per_class: Annotated[int | None, typer.Option(min=1, help="How many scans of each class.")] = None,
    ratio: Annotated[float | None, typer.Option(help="How many for each training scan, such as 0.5.")] = None,
    balance: Annotated[bool, typer.Option("--balance", help="Make classes equal.")] = False,
    format: Annotated[Written, typer.Option(help="auto: as the input.")] = "auto",
    bundle: Annotated[Path | None, typer.Option("-m", "--bundle", help="Use this bundle instead of training.")] = None,
    tell: Annotated[str, typer.Option(help="Fix covariates of new scans, such as age=70,sex=F.")] = "",
    vary: Annotated[str, typer.Option(help="For --how edit: what a covariate becomes, such as age=40:80.")] = "",
    lesions: Annotated[Lesions, typer.Option(help="For --how lesion: put one in, or take it out.")] = "insert",
    shapes: Annotated[Drawn, typer.Option(help="Masks to draw scans for, where the model is given masks.")] = "real",
    reject: Annotated[float, typer.Option(help="Part of real scans the quality gate may reject; 0: no gate.")] = 0.01,
    preset: Preset = None,
    label: Label = None,
    domain: Domain = None,
    minutes: Minutes = 20,
    set_: Set = [],  # noqa: B006
    covariates: Covariates = "",
    masks: Masks = "auto",
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
    """Make scans that a folder does not have, with labels and masks, in its own layout; none copies a patient."""
    options = reading(on_gap, on_tilt, xform, colour)
    choices = {
        "preset": preset, "label": label, "domain": domain, "overrides": set_, "minutes": minutes, "seed": seed,
        "covariates": listed(covariates), "masks": masks,
    }  # fmt: skip
    with speaking(quiet):
        if dry_run:
            show_plan(data, options, choices, as_json)
            return
        from medgen.tasks.augment import augment as run

        done = run(
            data, out, bundle=bundle, format=format, **choices, device=device, options=options, force=force, how=how,
            mix=weights(mix), n=n, per_class=per_class, ratio=ratio, balance=balance, tell=pairs(tell, "--tell"),
            vary=pairs(vary, "--vary"), lesions=lesions, shapes=shapes, reject=reject,
        )  # fmt: skip
    lines = [f"Wrote {_counted(done.written)} ({done.format}, {done.layout}) to {done.folder}; see contact_sheet.png."]
    rejected = ", ".join(f"{count} by {reason}" for reason, count in done.rejected.items())
    lines.append(f"Rejected: {rejected or 'none'}. {done.said}".rstrip())
    lines += [
        f"By {name}, {share:.0%} of candidates are further from training scans than nearly all held-out ones."
        for name, share in done.quality.items()
        if share > _MUCH
    ]
    if done.private:
        lines.append(f"{done.private} shows or names patients: keep it where their scans are kept.")
    if bundle or (done.folder / "bundle").is_dir():
        lines.append(next_command(bundle or done.folder / "bundle", data))
    lines.append("Research use only, not a medical device.")
    say(lines, asdict(done), as_json)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


@app.command()
def score(
    scans: Data,
    bundle: Made,
    out: Out,
    fpr: Annotated[float, typer.Option(min=1e-4, max=0.5, help="False-alarm rate for flags and masks.")] = 0.05,
    maps: Annotated[bool, typer.Option(help="Write maps, masks and pictures.")] = True,
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
    """One number and one map per scan: does it belong to what the bundle has learned?"""
    options = reading(on_gap, on_tilt, xform, colour)
    with speaking(quiet):
        if dry_run:
            from medgen.tasks.look import info

            say([f"Would score the scans of {scans} with {bundle} into {out}."], info(scans, options), as_json)
            return
        from medgen.tasks.anomaly import score as run

        done = run(scans, bundle, out, rate=fpr, maps=maps, device=device, options=options, force=force)
    lines = []
    for scan in done.scans[:20]:
        if scan.error:
            lines.append(f"  {scan.case}: not scored: {scan.error}")
            continue
        p = "" if scan.p is None else f"  p = {scan.p:.3f}"
        mark = "  UNUSUAL" if scan.flagged else ""
        mark += f"  {scan.mask_mm3 / 1000:.3g} mL marked" if scan.mask_mm3 else ""
        lines.append(f"  {scan.case}: score {scan.score:.4f}{p}{mark}" + "".join(f"  ({w})" for w in scan.warnings))
    lines += [f"  ... {len(done.scans) - 20} more in scores.csv"] if len(done.scans) > 20 else []
    lines = [f"Scored {len(done.scans) - done.failed} of {len(done.scans)} scans, most unusual first:", *lines]
    lines += [
        f"Wrote scores.csv{', findings, maps and pictures' if maps else ''} to {done.folder}"
        f"{'; look at worklist.png' if (done.folder / 'worklist.png').is_file() else ''}.",
        "Research use only, not a medical device.",
    ]
    facts = {"folder": done.folder, "failed": done.failed, "notes": done.notes}
    facts["scans"] = [asdict(scan) for scan in done.scans]
    say(lines, facts, as_json)
    if done.failed:
        raise typer.Exit(3)
