"""`medgen embed`, `medgen interpolate` and `medgen traverse`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medgen.cli import app
from medgen.cli.shared import (
    AsJson,
    Colour,
    Data,
    Device,
    DryRun,
    Force,
    Made,
    OnGap,
    OnTilt,
    Out,
    Quiet,
    Seed,
    Xform,
    reading,
    say,
    speaking,
)

End = Annotated[Path, typer.Argument(help="One scan: file, DICOM series or item of an .npz.", show_default=False)]
_RESEARCH = "Research use only, not a medical device."


@app.command()
def embed(
    scans: Data,
    bundle: Made,
    out: Out,
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
    """Each scan as the few numbers a model makes of it: a table, an array and a picture."""
    options = reading(on_gap, on_tilt, xform, colour)
    with speaking(quiet):
        if dry_run:
            from medgen.tasks.look import info

            say([f"Would write the codes of the scans of {scans} by {bundle} to {out}."], info(scans, options), as_json)
            return
        from medgen.tasks.codes import embed as run

        done = run(scans, bundle, out, device=device, options=options, force=force)
    size = " x ".join(map(str, done.code_shape))
    lines = [f"Embedded {len(done.scans) - done.failed} of {len(done.scans)} scans; a code has {size} numbers."]
    lines += [f"  {scan.case}: no code: {scan.error}" for scan in done.scans if scan.error][:20]
    lines += [f"Wrote codes.csv, codes.npz and codes.png to {done.folder}.", *done.notes, _RESEARCH]
    facts = {"folder": done.folder, "failed": done.failed, "code_shape": done.code_shape, "notes": done.notes}
    say(lines, facts | {"scans": [vars(scan) for scan in done.scans]}, as_json)
    if done.failed:
        raise typer.Exit(3)


@app.command()
def interpolate(
    scan_a: End,
    scan_b: End,
    bundle: Made,
    out: Out,
    steps: Annotated[int, typer.Option(min=2, help="Scans to write, both ends included.")] = 7,
    way: Annotated[
        Literal["auto", "linear", "spherical"], typer.Option(help="auto: spherical for codes that are noise.")
    ] = "auto",
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
    """Scans between two scans, on the way from one's code to the other's."""
    options = reading(on_gap, on_tilt, xform, colour)
    with speaking(quiet):
        if dry_run:
            from medgen.tasks.look import info

            told = {"scan_a": info(scan_a, options), "scan_b": info(scan_b, options), "steps": steps}
            say([f"Would write {steps} scans from {scan_a} to {scan_b} by {bundle} to {out}."], told, as_json)
            return
        from medgen.tasks.walks import interpolate as run

        done = run(
            scan_a, scan_b, bundle, out, steps=steps, way=way, device=device, options=options, force=force,
        )  # fmt: skip
    lines = [f"Wrote {done.written} scans ({done.format}) on a {done.way} way to {done.folder}; see contact_sheet.png."]
    lines += ["They are derived from both patients' scans: keep them as you keep those.", *done.notes, _RESEARCH]
    say(lines, vars(done), as_json)


@app.command()
def traverse(
    bundle: Made,
    out: Out,
    scan: Annotated[
        Path | None, typer.Option(help="Start from this scan, or from the mean of a folder's.", show_default=False)
    ] = None,
    dimensions: Annotated[int, typer.Option(min=1, help="How many directions of the code.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Scans a direction.")] = 7,
    reach: Annotated[float, typer.Option(min=0.01, help="How far to go either side, in standard deviations.")] = 3.0,
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
    """What changes in a scan when its code moves along the directions in which codes differ most."""
    options = reading(on_gap, on_tilt, xform, colour)
    with speaking(quiet):
        if dry_run:
            from medgen.tasks.look import info

            start = f"from {scan}" if scan else "from the mean code"
            plan = f"Would move {start} along {dimensions} directions of {bundle} and write {dimensions * steps} scans."
            say([plan], info(scan, options) if scan else {"scans": dimensions * steps}, as_json)
            return
        from medgen.tasks.walks import traverse as run

        done = run(
            bundle, out, scans=scan, dimensions=dimensions, steps=steps, reach=reach, seed=seed, device=device,
            options=options, force=force,
        )  # fmt: skip
    lines = [f"Moved along {', '.join(done.way)}; {done.written} scans ({done.format}) in {done.folder}."]
    lines += ["Look at traversal.png: a row a direction.", *done.notes, _RESEARCH]
    say(lines, vars(done), as_json)
