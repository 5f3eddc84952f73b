"""What every command shares: options, progress on stderr, and how results are told."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medgen.io.source import ReadOptions
from medgen.log import reporting

Data = Annotated[Path, typer.Argument(help="File, folder, DICOM series, zip, .npz or CSV.", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--out", help="Output folder; must not exist.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no notes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and stop.")]
Seed = Annotated[int, typer.Option(help="Decides splits, training order and noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Made = Annotated[Path, typer.Option("-m", "--bundle", help="Bundle made by `medgen train`.", show_default=False)]
Preset = Annotated[str | None, typer.Option(help="Preset name or YAML file; see `medgen models`.")]
Set = Annotated[list[str], typer.Option("--set", help="Change a value of the preset, such as fit.images=5000.")]
Minutes = Annotated[float, typer.Option(min=0.01, help="Training time to keep within on this machine.")]
Label = Annotated[str | None, typer.Option(help="Learn one class only.")]
Domain = Annotated[str | None, typer.Option(help="Learn one modality or site only; T1w+T2w: as channels.")]
Covariates = Annotated[str, typer.Option(help="Columns of a CSV to condition on, such as age,sex.")]
Masks = Annotated[
    Literal["auto", "none", "given", "joint"],
    typer.Option(
        help="joint: learn scans with their masks, to draw pairs; given: draw scans for masks; auto: joint where "
        "nearly all scans have one."
    ),
]
Gap = Literal["error", "fill", "resample"]
Tilt = Literal["error", "shear", "resample"]
Form = Literal["error", "sform", "qform"]
OnGap = Annotated[Gap, typer.Option(help="Missing or uneven DICOM slices.")]
OnTilt = Annotated[Tilt, typer.Option(help="Tilted gantry.")]
Xform = Annotated[Form, typer.Option(help="NIfTI whose sform and qform disagree.")]
Colour = Annotated[bool, typer.Option("--colour", help="Take RGB pictures as three channels instead of refusing them.")]

# Seconds between progress lines where there is no terminal to draw a bar on.
_EVERY = 20


def reading(on_gap: Gap = "error", on_tilt: Tilt = "error", xform: Form = "error", colour: bool = False) -> ReadOptions:
    """Reading options from the command line."""
    return ReadOptions(on_gap=on_gap, on_tilt=on_tilt, xform=xform, colour=colour)


def listed(words: str) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in words.split(",") if word.strip()]


def pairs(words: str, option: str) -> dict[str, str]:
    """The names and values of a list such as 'age=70,sex=F'.

    Raises:
        ConfigError: a part is not of the form NAME=VALUE, or a name comes twice.
    """
    from medgen.errors import ConfigError

    found: dict[str, str] = {}
    for part in listed(words):
        name, given, value = (word.strip() for word in part.partition("="))
        if not (name and given and value) or name in found:
            raise ConfigError(f"{option}: expected NAME=VALUE,NAME=VALUE with each name once; found {part!r}.")
        found[name] = value
    return found


def weights(words: str) -> dict[str, float]:
    """The parts of a mix such as 'sample=2,classic=1'.

    Raises:
        ConfigError: a weight is no number.
    """
    from medgen.errors import ConfigError

    try:
        return {name: float(value) for name, value in pairs(words, "--mix").items()}
    except ValueError as error:
        raise ConfigError(f"--mix: weights are numbers, such as sample=2,classic=1; found {words!r}.") from error


class _Bars:
    """Progress bars with the time left on a terminal, an occasional line elsewhere; notes as they come."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._told = time.monotonic()

    def note(self, message: str) -> None:
        """One sentence, plain."""
        self._console.print(message, markup=False)

    def start(self, what: str, total: float | None) -> object:
        """Draw a bar."""
        self._progress.start()
        return self._progress.add_task(what, total=total, text="")

    def advance(self, handle: Any, amount: float, text: str) -> None:
        """Move a bar."""
        self._progress.update(handle, advance=amount, text=text)
        if not self._console.is_terminal and time.monotonic() - self._told > _EVERY:
            self._told = time.monotonic()
            task = next(task for task in self._progress.tasks if task.id == handle)
            left = "" if task.time_remaining is None else f", about {task.time_remaining / 60:.1f} min left"
            done = f" {task.completed:,.0f} of {task.total:,.0f}{left} " if task.total else ""
            self.note(f"{task.description}:{done} {text}")

    def stop(self, handle: Any) -> None:
        """Take a bar away."""
        self._progress.remove_task(handle)
        if not self._progress.tasks:
            self._progress.stop()


@contextmanager
def speaking(quiet: bool) -> Iterator[None]:
    """Show progress on stderr while the block runs, unless asked to be quiet."""
    if quiet:
        yield
        return
    with reporting(_Bars()):
        yield


def next_command(bundle: Path, data: Path) -> str:
    """What to do with a bundle next: score scans where it can, else draw some or see how good they are."""
    from medgen.bundle import Bundle
    from medgen.tasks.detector import can_score
    from medgen.tasks.generation import comparable

    made = Bundle.load(bundle)
    if "questions" in made.calibration or can_score(made.model):
        return f"Next: medgen score SCANS -m {bundle} -o OUT"
    if comparable(made):
        return f"Next: medgen evaluate {data} -m {bundle} --samples 200"
    return f"Next: medgen evaluate {data} -m {bundle}"


def say(lines: list[str], result: dict[str, Any], as_json: bool) -> None:
    """End a command: JSON for machines on stdout, or sentences."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")
    else:
        sys.stdout.write("\n".join(lines) + "\n")


__all__ = [
    "AsJson", "Colour", "Covariates", "Data", "Device", "Domain", "DryRun", "Force", "Label", "Made", "Masks",
    "Minutes", "OnGap", "OnTilt", "Out", "Preset", "Quiet", "Seed", "Set", "Xform", "listed", "next_command", "pairs",
    "reading", "say", "speaking", "weights",
]  # fmt: skip
