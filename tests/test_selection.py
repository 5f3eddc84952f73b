"""Which scores a detector keeps: those that hold healthy scans for healthier than what is plainly wrong."""

from typing import ClassVar, Literal

import pytest
import torch
from test_segmenter import healthy

from medgen.data.controls import CONTROLS
from medgen.data.dataset import Batch
from medgen.scores.base import Found, Healthy, Score
from medgen.scores.states import DensityOfStates
from medgen.scores.statistics import GradientEnergy
from medgen.tasks.selection import DRAWN, kept


class Busy(Score):
    """Finds scans unusual that show much: constant and blurred ones are the healthiest of all."""

    two_sided: ClassVar[bool] = False
    do: Literal["busy"] = "busy"

    def __call__(self, models, batch, known):
        return Found(batch.x.diff(dim=2).abs().flatten(1).mean(1)[:, None])


def scans(space) -> Healthy:
    train, held = healthy(24, space), healthy(16, space)
    return Healthy(lambda: [Batch(train)], lambda: [Batch(held[:10]), Batch(held[10:])])


@pytest.mark.parametrize("space", [(20, 24), (10, 12, 14)])
def test_a_score_that_likes_empty_scans_is_left_out_and_it_is_said_why(space):
    both = DensityOfStates(members=(Busy(), GradientEnergy()))
    score, verdicts = kept(both, {}, scans(space))
    assert [member.do for member in score.members] == ["gradient-energy"]
    busy, energy = verdicts
    assert {"constant", "blurred"} <= set(busy.fails)
    assert busy.aurocs["constant"] == 0
    assert not energy.fails
    assert set(energy.aurocs) == {DRAWN, *CONTROLS}
    assert energy.aurocs["constant"] == 1


def test_what_is_chosen_does_not_depend_on_random_state_or_on_batches():
    both = DensityOfStates(members=(Busy(), GradientEnergy()))
    torch.manual_seed(5)
    first = kept(both, {}, scans((20, 24)))
    torch.manual_seed(6)
    assert kept(both, {}, scans((20, 24))) == first


def test_nothing_is_chosen_where_nothing_can_be():
    few = Healthy(lambda: [Batch(healthy(9, (12, 12)))], lambda: [Batch(healthy(4, (12, 12)))])
    both = DensityOfStates(members=(Busy(), GradientEnergy()))
    assert kept(both, {}, few) == (both, ())
    assert kept(GradientEnergy(), {}, few) == (GradientEnergy(), ())
    all_bad = DensityOfStates(members=(Busy(),))
    assert kept(all_bad, {}, scans((20, 24)))[0] == all_bad
