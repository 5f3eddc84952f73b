"""`medgen info` and `medgen convert`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medgen.cli import app
from medgen.cli.shared import (
    AsJson,
    Colour,
    Data,
    DryRun,
    Force,
    OnGap,
    OnTilt,
    Out,
    Quiet,
    Xform,
    reading,
    say,
    speaking,
)

_SHOWN = 40


@app.command()
def info(
    data: Data,
    as_json: AsJson = False,
    on_gap: OnGap = "error",
    on_tilt: OnTilt = "error",
    xform: Xform = "error",
    colour: Colour = False,
):
    """What a file or folder holds: scans, sizes, spacing, and what was skipped and why."""
    from medgen.tasks.look import info as look

    told = look(data, reading(on_gap, on_tilt, xform, colour))
    lines = [f"{len(told['scans'])} scans, {len(told['skipped'])} other files in {data}"]
    for scan in told["scans"][:_SHOWN]:
        name = Path(scan["path"]).name
        if "error" in scan:
            lines.append(f"  {name}: REFUSED: {scan['error']}")
            continue
        size = " x ".join(map(str, scan["shape"])) + (f" x {scan['channels']} channels" if scan["channels"] > 1 else "")
        spacing = " x ".join(f"{s:g}" for s in scan["spacing_mm"])
        marks = " ".join(filter(None, [scan["modality"], scan["axcodes"], "SYNTHETIC" if scan["synthetic"] else ""]))
        lines.append(f"  {name}: {scan['kind']}, {size}, {spacing} mm, {marks}")
    if len(told["scans"]) > _SHOWN:
        lines.append(f"  ... and {len(told['scans']) - _SHOWN} more (--json lists all)")
    lines += [f"  skipped {Path(one['path']).name}: {one['reason']}" for one in told["skipped"][:10]]
    say(lines, told, as_json)
    if not told["scans"]:
        raise typer.Exit(3)


@app.command()
def convert(
    data: Data,
    out: Out,
    format: Annotated[Literal["nifti", "dicom", "png"], typer.Option(help="What to write.")] = "nifti",
    identity: Annotated[
        Literal["pseudonym", "keep"], typer.Option(help="DICOM to DICOM: new names, or the patient's own.")
    ] = "pseudonym",
    table: Annotated[Path | None, typer.Option(help="Keep originals beside pseudonyms here, outside OUT.")] = None,
    on_gap: OnGap = "error",
    on_tilt: OnTilt = "error",
    xform: Xform = "error",
    colour: Colour = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
):
    """The same scans in another format, on the same millimetres, in the same units."""
    options = reading(on_gap, on_tilt, xform, colour)
    if dry_run:
        info(data, as_json, on_gap, on_tilt, xform, colour)
        return
    from medgen.tasks.convert import convert as run

    with speaking(quiet):
        done = run(data, out, format=format, identity=identity, table=table, options=options, force=force)
    lines = [f"Wrote {len(done.written)} scans to {done.folder}."]
    lines += [f"Skipped {Path(one.path).name}: {one.reason}" for one in done.skipped[:10]]
    lines.append(f"Next: medgen info {done.folder}")
    say(lines, {"folder": done.folder, "written": done.written, "skipped": [vars(s) for s in done.skipped]}, as_json)
    if done.failed:
        raise typer.Exit(3)
