"""Which scores a detector keeps, decided without a single ill scan.

Every member of a density of states is asked alone about healthy scans that no model was trained on, about the same
scans with drawn anomalies (`medgen.nets.anomalies`; the pseudo-AUC of Rahman Siddiquee et al. 2026), and about control
inputs that no score may find healthier than healthy scans (`medgen.data.controls`). A member that fails a control, or
finds drawn anomalies healthier than healthy scans, would work against the others, and is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medgen.data.controls import CONTROLS, controls
from medgen.data.dataset import Batch
from medgen.grid import Grid
from medgen.log import note
from medgen.metrics.detection import auroc, auroc_error
from medgen.nets.anomalies import spoilt
from medgen.scan import Scan
from medgen.scores.base import Healthy, Known, Models, Score
from medgen.scores.states import DensityOfStates

# Healthy scans that members are asked about, at most; with fewer than so many nothing can be told.
_MOST, _FEWEST = {2: 200, 3: 12}, 8
DRAWN = "drawn anomalies"


@dataclass(frozen=True)
class Verdict:
    """How a member did alone.

    Args:
        member: the score.
        aurocs: of each kind of wrong scans against healthy ones.
        fails: the kinds that it finds healthier than healthy scans, by more than 1.96 standard errors.
    """

    member: Score
    aurocs: dict[str, float]
    fails: tuple[str, ...]


def kept(score: Score, models: Models, healthy: Healthy) -> tuple[Score, tuple[Verdict, ...]]:
    """The score with the members that pass, and what was found of each; as it is where nothing can be chosen.

    Where none passes all are kept, as there is no better idea.
    """
    if not isinstance(score, DensityOfStates):
        return score, ()
    held = list(_first(healthy))
    if sum(len(batch.x) for batch in held) < _FEWEST:
        return score, ()
    asked = {"healthy": held, **_wrong(held)}
    verdicts = tuple(_verdict(member, models, healthy, asked) for member in score.members)
    passing = tuple(verdict.member for verdict in verdicts if not verdict.fails)
    for verdict in verdicts:
        if verdict.fails:
            wrong = ", ".join(verdict.fails)
            note(f"The score {verdict.member.do!r} is left out: it finds {wrong} healthier than healthy scans.")
    chosen = score.model_copy(update={"members": passing}) if passing else score
    return chosen, verdicts


def _verdict(member: Score, models: Models, healthy: Healthy, asked: dict[str, list[Batch]]) -> Verdict:
    alone = DensityOfStates(members=(member,), maps=False)
    known = alone.learn(models, healthy)
    found = {name: _values(alone, models, batches, known) for name, batches in asked.items()}
    usual = found.pop("healthy")
    told = {name: against(usual, values) for name, values in found.items()}
    aurocs = {name: round(value, 3) for name, (value, _) in told.items()}
    return Verdict(member, aurocs, tuple(name for name, (_, below) in told.items() if below))


def against(healthy: Float[np.ndarray, " n"], wrong: Float[np.ndarray, " m"]) -> tuple[float, bool]:
    """AUROC of scans that are wrong against healthy ones, and whether it is 1.96 standard errors below chance."""
    found = auroc(healthy, wrong)
    return found, found + 1.96 * auroc_error(healthy, wrong) < 0.5


def controls_of(scans: Sequence[Scan], seed: int) -> dict[str, list[Scan]]:
    """The control inputs of each of some healthy scans, by name."""
    made: dict[str, list[Scan]] = {name: [] for name in CONTROLS}
    for n, scan in enumerate(scans):
        for name, control in controls(scan, np.random.default_rng([seed, n])):
            made[name].append(control)
    return made


def _values(score: Score, models: Models, batches: list[Batch], known: Known) -> Float[np.ndarray, " n"]:
    values = [score(models, batch, known).values[:, 0].cpu().double() for batch in batches]
    return torch.cat(values).numpy()


def _first(healthy: Healthy) -> Iterator[Batch]:
    """The first scans that no model was trained on."""
    left = None
    for batch in healthy.held():
        left = _MOST[batch.x.ndim - 2] if left is None else left
        if left <= 0:
            return
        yield batch.first(left)
        left -= len(batch.x)


def _wrong(held: list[Batch]) -> dict[str, list[Batch]]:
    """The same scans with an anomaly each, and as control inputs."""
    made: dict[str, list[Batch]] = {name: [] for name in (DRAWN, *CONTROLS)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number, batch in enumerate(held):
            made[DRAWN].append(replace(batch, x=spoilt(batch.x, most=1, least=1).x))
            for name, scans in controls_of([_scan(x) for x in batch.x], number).items():
                x = torch.tensor(np.stack([scan.voxels for scan in scans])).reshape(batch.x.shape)
                made[name].append(replace(batch, x=x))
    return made


def _scan(x: Float[Tensor, "c *space"]) -> Scan:
    voxels = x.numpy().reshape(len(x), *x.shape[1:], *[1] * (4 - x.ndim))
    return Scan(voxels, Grid(voxels.shape[1:], np.eye(4)))


__all__ = ["DRAWN", "Verdict", "against", "controls_of", "kept"]
