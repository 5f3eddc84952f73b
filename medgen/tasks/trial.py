"""One preset tried on a folder in a process of its own, so that its memory is its own: `python -m medgen.tasks.trial`.

Settings come as JSON on stdin; notes, progress and the result go as lines of JSON to stdout.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

from medgen.errors import MedgenError
from medgen.log import Progress, note, progress, reporting

_MB = 2**20


def tried(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run a trial in a process of its own and pass on what it says.

    Args:
        settings: fields of `Choices` under 'choices', of ReadOptions under 'options', and data, out, device.

    Returns:
        The numbers of the trial, or {'error': sentence}.
    """
    command = [sys.executable, "-m", "medgen.tasks.trial"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(settings, default=str))
        child.stdin.close()
        said: dict[str, Any] = {"error": "it ended without a result; memory may have run out."}
        with progress(str(settings["choices"]["preset"])) as bar:
            for line in child.stdout:
                said = _heard(line, bar) or said
    return said


def _heard(line: str, bar: Progress) -> dict[str, Any] | None:
    """Pass on what a child said; its result where this is it."""
    try:
        told = json.loads(line)
    except json.JSONDecodeError:
        return None
    if "note" in told:
        note(told["note"])
    if "progress" in told:
        bar.advance(0, told["progress"])
    return told.get("result")


class _Telling:
    """Passes notes and progress on as lines of JSON."""

    def __init__(self) -> None:
        self._told, self._what, self._done, self._total = 0.0, "", 0.0, 0.0

    def note(self, message: str) -> None:
        _tell({"note": message})

    def start(self, what: str, total: float | int | None) -> object:
        self._what, self._done, self._total = what, 0.0, total or 0.0
        return what

    def advance(self, handle: object, amount: float | int, text: str) -> None:
        self._done += amount if handle == self._what else 0
        if time.monotonic() - self._told > 1:
            self._told = time.monotonic()
            _tell({"progress": f"{self._what}: {self._done:,.0f} of {self._total:,.0f}  {text}"})

    def stop(self, handle: object) -> None:
        """Nothing to take away."""


def _tell(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what, default=str) + "\n")
    sys.stdout.flush()


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a preset, keep its bundle, and measure it on the test scans."""
    from medgen import io
    from medgen.data.dataset import ScanDataset
    from medgen.io.source import ReadOptions
    from medgen.models.base import can
    from medgen.nets.blocks import count_parameters
    from medgen.tasks.conditions import told_of
    from medgen.tasks.learn import learn
    from medgen.tasks.plan import Choices, plan_training
    from medgen.tasks.quality import quality
    from medgen.tasks.workspace import Workspace

    choices, options = Choices(**settings["choices"]), ReadOptions(**settings["options"])
    work = Workspace(settings["out"], dict(settings))
    with io.opened(settings["data"]) as place:
        plan = plan_training(place, choices, options)
        work.record()
        bundle = learn(plan, work, seed=choices.seed, device=settings["device"], options=options)
        model = bundle.model
        test = ScanDataset(plan.manifest.split("test"), plan.recipe, **told_of(plan.model), options=options)
        numbers: dict[str, Any] = {
            "family": model.config.kind,
            "shape": list(model.config.shape),
            "parameters": count_parameters(model),
            "train_seconds": bundle.training["train_seconds"],
            "images_seen": bundle.training["images_seen"],
            "manifest_sha256": bundle.training["manifest_sha256"],
            "warnings": bundle.training["warnings"],
            **{f"test_{name}": v for name, v in quality(model, test, temperature=_temperature(bundle)).items()},
        }
        if can(model, "samples"):
            numbers["sample_seconds"] = _sample_seconds(model, test)
    numbers["peak_mb"] = _peak_mb()
    work.finish({"command": "compare", "settings": settings, "plan": plan.describe()})
    return numbers


def _temperature(bundle: Any) -> float | None:
    return bundle.calibration.get("temperature")


def _sample_seconds(model: Any, test: Any) -> float:
    """Seconds a scan, when a few are drawn together."""
    from medgen.models.abilities import Samples
    from medgen.scores.likelihoods import given

    n = min(len(test), 16 if model.config.dims == 2 else 1)
    batch = next(iter(test.batches(n))).to(model.device)
    begun = time.monotonic()
    cast(Samples, model).sample(n, seed=0, cond=batch.cond, **given(batch)).cpu()
    return round((time.monotonic() - begun) / n, 4)


def _peak_mb() -> float | None:
    """The most memory this process ever had, or the GPU's where there is one; None where the system does not tell."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / _MB)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / _MB if sys.platform == "darwin" else peak / 1024)


def main() -> None:
    """Measure what stdin asks for."""
    settings = json.loads(sys.stdin.read())
    # Nothing but lines of JSON may reach stdout.
    with reporting(_Telling()):
        try:
            result = measure(settings)
        except MedgenError as error:
            result = {"error": str(error)}
    _tell({"result": result})


if __name__ == "__main__":
    main()


__all__ = ["main", "measure", "tried"]
