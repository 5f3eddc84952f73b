"""The two gates: garbage, strangers to their class and copies do not pass, and what is like held-out scans does."""

import numpy as np
import pytest
import torch
from worlds import small_chest

from medgen.data.manifest import Row
from medgen.errors import PrivacyError
from medgen.grid import Grid
from medgen.log import reporting
from medgen.scan import Scan
from medgen.tasks.gates import Gates
from medgen.tasks.looks import Known
from medgen.tasks.ways.base import Made


class Listener:
    """Hears notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, what: str, total: float | int | None) -> object:
        return None

    def advance(self, handle: object, amount: float | int, text: str) -> None: ...

    def stop(self, handle: object) -> None: ...


def phantom(seed: int, label: str) -> tuple[torch.Tensor, Scan]:
    """A chest; of class 'side' one that lies on its side."""
    x = small_chest(seed)
    x = x if label == "up" else x.transpose(1, 2)
    return x, Scan(x.numpy()[..., None], Grid((24, 24, 1), np.eye(4)))


def known(first: int, count: int) -> Known:
    labels = ["up", "side"] * (count // 2)
    x = torch.stack([phantom(first + n, label)[0] for n, label in enumerate(labels)])
    rows = tuple(Row(f"c{first + n}", f"p{first + n}", f"{n}.png", "raster", label) for n, label in enumerate(labels))
    return Known(x, rows)


def made(seeds: range, label: str = "up", *, shown: str | None = None, **more) -> list[Made]:
    found = [phantom(seed, shown or label) for seed in seeds]
    return [Made(x, scan, label, **more) for x, scan in found]


@pytest.fixture(scope="module")
def people() -> tuple[Known, Known]:
    return known(0, 80), known(200, 60)


@pytest.fixture(scope="module")
def gates(people) -> Gates:
    gates = Gates(*people, None, reject=0.01, seed=0)
    gates.learn_usual("sample", [*made(range(400, 416)), *made(range(416, 432), "side")])
    return gates


def test_scans_like_held_out_ones_pass(gates):
    verdicts = gates.judge([*made(range(500, 530)), *made(range(530, 560), "side")])
    assert sum(bool(one.reason) for one in verdicts) <= 3
    for one in verdicts:
        assert {"p_appearance", "p_label", "r_voxel", "r_registered", "r_feature"} <= set(one.facts)
        assert 0 < one.facts["p_appearance"] <= 1


def test_garbage_does_not_pass(gates):
    good = made(range(600, 601))[0]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(1, 24, 24, generator=generator) for _ in range(10)]
    for x in (*noise, torch.zeros(1, 24, 24), torch.ones(1, 24, 24), 1 - good.x):
        (verdict,) = gates.judge([Made(x, good.scan, "up")])
        assert verdict.reason == "appearance"
        assert verdict.far == ("appearance",)
        assert verdict.facts["p_appearance"] < 0.02


def test_a_scan_of_another_class_than_it_says_does_not_pass(gates):
    verdicts = gates.judge(made(range(700, 710), "up", shown="side"))
    assert {one.reason for one in verdicts} == {"label"}


def test_copies_do_not_pass_unless_they_say_whose_they_are(gates, people):
    scan = made(range(1))[0].scan
    generator = torch.Generator().manual_seed(1)
    for n in (0, 3, 8):
        x, label = people[0].x[n], people[0].rows[n].label
        for copy in (x, x + 0.02 * torch.randn(x.shape, generator=generator), x.flip(1)):
            (verdict,) = gates.judge([Made(copy, scan, label)])
            assert (verdict.reason, verdict.nearest) == ("copy", n)
        (verdict,) = gates.judge([Made(x, scan, label, how="classic", sources=("C-0123456789ab",), patient="P-1")])
        assert verdict.reason != "copy"


def test_verdicts_do_not_depend_on_the_company(gates):
    several = [*made(range(800, 805)), *made(range(805, 810), "side")]
    together = gates.judge(several)
    alone = [gates.judge([one])[0] for one in several]
    assert [(one.reason, one.facts) for one in together] == [(one.reason, one.facts) for one in alone]
    assert gates.judge([]) == []


def test_a_model_whose_scans_all_differ_is_told_about_once_and_only_its_outliers_are_rejected(people):
    gates = Gates(*people, None, reject=0.01, seed=0)
    dim = [Made(one.x * 0.5 + 0.25, one.scan, "up") for one in made(range(900, 932))]
    with reporting(listener := Listener()):
        gates.learn_usual("sample", dim)
    assert [("further" in note, "train for longer" in note) for note in listener.notes] == [(True, True)]
    rejected = [one for one in gates.judge(dim) if one.reason == "appearance"]
    assert len(rejected) <= 4
    assert gates.judge(dim)[0].far == ("appearance",)


def test_without_a_gate_or_held_out_scans_quality_is_open_and_privacy_is_not(people):
    scan = made(range(1))[0].scan
    for gates in (Gates(*people, None, reject=0, seed=0), Gates(people[0], None, None, reject=0.01, seed=0)):
        gates.learn_usual("sample", made(range(4)))
        noise, copy = torch.rand(1, 24, 24), people[0].x[0]
        assert [one.reason for one in gates.judge([Made(noise, scan, "up"), Made(copy, scan, "up")])] == ["", "copy"]
        assert gates.tests == ()


def test_one_patient_is_refused(people):
    rows = tuple(Row(row.case, "same", row.path, "raster") for row in people[0].rows)
    with pytest.raises(PrivacyError, match="1 patient"):
        Gates(Known(people[0].x, rows), people[1], None, reject=0.01, seed=0)
