"""The journal of a long task: whatever moment it is interrupted at, what was finished before is known afterwards."""

import json

import pytest

from medgen.errors import OutputError
from medgen.tasks.workspace import Workspace

SETTINGS = {"scans": "some", "rate": 0.05}
FACTS = {"one": {"score": 0.5, "note": "two\nlines, ä"}, "two": True, "three": [1, None], "four": {"p": float("inf")}}


def test_a_journal_cut_short_anywhere_tells_what_was_finished(tmp_path):
    work = Workspace(tmp_path / "out", SETTINGS)
    work.record()
    place = work.folder / "journal.json"
    ends = []
    for name, facts in FACTS.items():
        work.record(name, facts)
        ends.append(len(place.read_bytes()))
    whole = place.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole) + 1):
        place.write_bytes(whole[:cut])
        again = Workspace(tmp_path / "out", SETTINGS)
        assert again.resumed
        # The end of a line may be missing, as nothing is told by it.
        finished = [name for name, end in zip(FACTS, ends, strict=True) if cut >= end - 1]
        assert again.done == {name: FACTS[name] for name in finished}


def test_an_interrupted_run_goes_on_after_a_line_that_was_cut_short(tmp_path):
    first = Workspace(tmp_path / "out", SETTINGS)
    first.record()
    first.record("one", 1)
    first.record("two", 2)
    place = first.folder / "journal.json"
    place.write_bytes(place.read_bytes()[:-3])
    second = Workspace(tmp_path / "out", SETTINGS)
    second.record("three", 3)  # even where nobody asked for the whole journal first
    second.record("one", "again")
    third = Workspace(tmp_path / "out", SETTINGS)
    assert third.done == {"one": "again", "three": 3}
    third.journal["images"] = 7
    third.record()
    third.record("four", 4)
    fourth = Workspace(tmp_path / "out", SETTINGS)
    assert fourth.journal["images"] == 7
    assert list(fourth.done) == ["one", "three", "four"]


def test_a_name_is_noted_without_writing_the_others_again(tmp_path):
    work = Workspace(tmp_path / "out", SETTINGS)
    work.record()
    place = work.folder / "journal.json"
    for n in range(5):
        before = place.read_bytes()
        work.record(f"scan {n}", {"score": n})
        assert place.read_bytes().startswith(before)
        assert place.read_bytes().count(b"scan 0") == 1


def test_a_journal_of_one_line_is_read_as_well(tmp_path):
    work = Workspace(tmp_path / "out", SETTINGS)
    work.record()
    place = work.folder / "journal.json"
    told = json.loads(place.read_text())
    place.write_text(json.dumps({**told, "done": {"one": 1}}))
    assert Workspace(tmp_path / "out", SETTINGS).done == {"one": 1}


def test_other_settings_and_a_journal_of_nothing(tmp_path):
    work = Workspace(tmp_path / "out", SETTINGS)
    work.record("one", 1)
    with pytest.raises(OutputError, match="other settings"):
        Workspace(tmp_path / "out", {**SETTINGS, "rate": 0.1})
    (work.folder / "journal.json").write_text("{")
    fresh = Workspace(tmp_path / "out", SETTINGS)
    assert not fresh.resumed
    assert not fresh.done
