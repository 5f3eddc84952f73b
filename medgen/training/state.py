"""Everything a training run needs to go on as if it had never stopped; never part of a bundle."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from medgen.errors import OutputError, TrainingError
from medgen.io.atomic import replacing

_NAME = "state"


@dataclass
class Progress:
    """Where a run stands, in images seen.

    Args:
        seen: images the model has been trained on, and those skipped.
        best: lowest validation loss so far.
        best_seen: when that was.
        stale: validations since then.
        history: (images seen, training loss, validation loss).
        seconds: spent training, all sessions together.
        finished: nothing is left to do.
        skipped: of `seen`, images that a stage left out because its part of the time was up.
        began: images seen when the present course began: the run, a stage of it, or what followed a remedy.
        start: loss of the first step of that course.
        pulses: (images seen, what `Model.pulse` told).
        told: which troubles were spoken of in that course.
        warnings: sentences about troubles that were not remedied.
        remedies: (images seen, the trouble for which training went back to its best weights).
    """

    seen: int = 0
    best: float = float("inf")
    best_seen: int = 0
    stale: int = 0
    history: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    skipped: int = 0
    began: int = 0
    start: float | None = None
    pulses: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    remedies: list[tuple[int, str]] = field(default_factory=list)

    def begin_course(self) -> None:
        """From here on training is judged anew."""
        self.began, self.start, self.stale, self.told = self.seen, None, 0, []

    @property
    def trained(self) -> int:
        """Images the model has really been trained on."""
        return self.seen - self.skipped


def save_state(folder: Path, tensors: dict[str, Tensor], progress: Progress, facts: dict[str, Any]) -> None:
    """Write tensors and progress; an interruption leaves the previous state intact.

    Raises:
        OutputError: the disk is full, or refuses.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        with replacing(folder / _NAME, force=True) as part:
            part.mkdir()
            save_file(plain, part / "tensors.safetensors")
            (part / "progress.json").write_text(json.dumps({"progress": asdict(progress), "facts": facts}))
    except SafetensorError as error:
        raise OutputError(f"Cannot save the state of training: {error}. Free some space, run again.") from error


def load_state(folder: Path, facts: dict[str, Any]) -> tuple[dict[str, Tensor], Progress] | None:
    """The saved state, or None where there is none.

    Raises:
        TrainingError: the state belongs to a run with other settings, or is damaged.
    """
    place = folder / _NAME
    if not (place / "progress.json").exists():
        return None
    try:
        saved = json.loads((place / "progress.json").read_text())
        tensors = load_file(place / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"The unfinished run in {folder.name} is damaged ({type(error).__name__}). Pass --force to start again."
        ) from error
    if saved["facts"] != json.loads(json.dumps(facts)):
        changed = sorted(key for key in facts if saved["facts"].get(key) != json.loads(json.dumps(facts[key])))
        raise TrainingError(
            f"The unfinished run in {folder.name} was started with other settings ({', '.join(changed)}). "
            "Repeat its settings to go on, or pass --force to start again."
        )
    told = saved["progress"]
    # JSON has no tuples.
    pairs = {name: [tuple(row) for row in told.get(name, ())] for name in ("history", "pulses", "remedies")}
    return tensors, Progress(**told | pairs)


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimizer's running averages under flat names."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{key}": torch.as_tensor(value)
        for index, kept in state.items()
        for key, value in kept.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Put running averages back."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            index, key = name.removeprefix(f"{prefix}.").split(".", 1)
            parameter = parameters[int(index)]
            # Fused kernels walk memory, so an average must lie there as its parameter does (channels last).
            laid = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
            state.setdefault(int(index), {})[key] = laid
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


__all__ = ["Progress", "load_state", "optimizer_tensors", "restore_optimizer", "save_state"]
