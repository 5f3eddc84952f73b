"""The command line: exit codes, one clear sentence and never a traceback, JSON for machines, disks that fill up."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from worlds import QUICK_3D, SAMPLES, quick

from medgen import io
from medgen.bundle import Bundle

COMMANDS = ("info", "convert", "models", "train", "augment", "score", "embed", "interpolate", "traverse")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def sentence(err: str, expected: str) -> None:
    """One clear sentence on stderr, and nothing of Python's."""
    assert expected in err
    assert "Traceback" not in err
    assert 'File "' not in err
    # typer frames its own usage errors; everything of medgen's is one line.
    if err.startswith("Error: "):
        assert err.strip().count("\n") == 0 or "\n  " in err


@pytest.fixture
def three(heads: Path, tmp_path: Path) -> Path:
    """Three heads in a folder."""
    folder = tmp_path / "three"
    folder.mkdir()
    for path in sorted(heads.iterdir())[:3]:
        shutil.copy(path, folder)
    return folder


# -- help and what is there ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command, name):
    code, out, err = command(name, "--help")
    assert code == 0
    assert name in out
    assert not err


def test_no_command_shows_all_of_them(command):
    code, out, err = command()
    assert code in (0, 2)
    assert all(name in out + err for name in COMMANDS)


def test_unknown_commands_and_options_are_usage_errors(command, three, tmp_path):
    for arguments in (
        ("anonymise",),
        ("info",),
        ("info", three, "--zebra"),
        ("train", three),
        ("info", three, "--on-gap", "x"),
    ):
        code, _, err = command(*arguments)
        assert code == 2
        assert err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_models_are_the_presets(command):
    code, out, _ = command("models", "--json")
    assert code == 0
    told = json.loads(out)
    names = [row["preset"] for row in told["presets"]]
    assert "vae2d" in names
    assert "vae3d" in names
    code, out, _ = command("models")
    assert all(name in out for name in names)


def test_info_tells_place_and_what_was_left_out(command, three):
    (three / "notes.txt").write_text("x")
    broken = three / "sub-900.nii.gz"
    broken.write_bytes(b"nonsense")
    code, out, _ = command("info", three)
    assert code == 0
    assert "4 scans, 1 other files" in out
    assert "16 x 16 x 16, 11 x 11 x 11 mm" in out
    assert "sub-900.nii.gz: REFUSED" in out
    assert "skipped notes.txt: not a scan" in out
    code, out, _ = command("info", three, "--json")
    told = json.loads(out)
    assert [scan["shape"] for scan in told["scans"] if "shape" in scan] == [[16, 16, 16]] * 3
    assert told["skipped"][0]["reason"] == "not a scan"


# -- wrong paths -------------------------------------------------------------------------------------------


def wrong_data(tmp_path: Path, kind: str) -> tuple[Path, str]:
    place = tmp_path / "data"
    if kind == "nowhere":
        return place, "no such file or folder"
    place.mkdir()
    if kind == "pictures of nothing":
        (place / "a.txt").write_text("x")
        (place / "b.pdf").write_bytes(b"%PDF")
        (place / "c").write_bytes(b"\0" * 300)
    return place, "no scan"


@pytest.mark.parametrize("kind", ["nowhere", "empty", "pictures of nothing"])
@pytest.mark.parametrize("name", ["train", "augment", "score", "convert"])
def test_nothing_to_read_is_one_sentence_and_leaves_nothing(command, tmp_path, heads_bundle, name, kind):
    data, expected = wrong_data(tmp_path, kind)
    before = files(tmp_path)
    extra = ["-m", heads_bundle] if name == "score" else []
    code, out, err = command(name, data, "-o", tmp_path / "out", *extra, "-q")
    assert code == 3
    assert not out
    sentence(err, "Error: ")
    assert expected in err.replace("there is no scan", "no scan")
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["nowhere", "empty", "pictures of nothing"])
def test_info_of_nothing_says_so(command, tmp_path, kind):
    data, _ = wrong_data(tmp_path, kind)
    code, out, err = command("info", data)
    assert code == 3
    assert "Traceback" not in out + err


@pytest.mark.parametrize("kind", ["nowhere", "a folder of scans", "a file"])
@pytest.mark.parametrize("name", ["score", "augment"])
def test_a_wrong_bundle_is_one_sentence(command, three, tmp_path, name, kind):
    place = {"nowhere": tmp_path / "nowhere", "a folder of scans": three, "a file": next(three.iterdir())}[kind]
    before = files(tmp_path)
    code, _, err = command(name, three, "-m", place, "-o", tmp_path / "out", "-q")
    assert code == 3
    sentence(err, "bundle")
    assert files(tmp_path) == before


def test_a_wrong_preset_or_override_is_one_sentence(command, three, tmp_path):
    for extra, expected in (
        (["--preset", "vae9"], "There is no preset"),
        (["--set", "model.latents=3"], "model.latents: no such key. Did you mean 'latent'?"),
        (["--set", "fit.image=3"], "fit.image: no such key. Did you mean 'images'?"),
        (["--set", "nonsense"], "--set"),
        (["--set", "model.kind=oracle"], "no model family 'oracle'"),
        (["--set", "model.latent=-1"], "model.latent"),
    ):
        before = files(tmp_path)
        code, _, err = command("train", three, "-o", tmp_path / "out", "-q", *extra)
        assert code == 2, err
        sentence(err, expected)
        assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["train", "augment", "score", "convert"])
def test_an_output_that_cannot_be_written_is_one_sentence(command, heads, three, heads_bundle, tmp_path, name):
    (tmp_path / "file").write_text("x")
    data = heads if name == "augment" else three
    extra = {"train": quick(QUICK_3D), "augment": ["-m", heads_bundle, "-n", 1], "score": ["-m", heads_bundle]}
    code, _, err = command(name, data, "-o", tmp_path / "file" / "out", "-q", *extra.get(name, []))
    assert code == 3
    sentence(err, "Cannot write")


# -- outputs that exist ------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_force_replaces_it(command, three, heads_bundle, tmp_path):
    out = tmp_path / "out"
    assert command("score", three, "-m", heads_bundle, "-o", out, "-q", "--no-maps")[0] == 0
    (out / "mine.txt").write_text("a note of mine")
    code, _, err = command("score", three, "-m", heads_bundle, "-o", out, "-q", "--no-maps")
    assert code == 3
    sentence(err, "exists already")
    assert (out / "mine.txt").exists()
    assert command("score", three, "-m", heads_bundle, "-o", out, "-q", "--no-maps", "--force")[0] == 0
    assert not (out / "mine.txt").exists()
    assert (out / "scores.csv").exists()
    assert not list(tmp_path.glob("*.part"))


def test_force_does_not_replace_what_medgen_did_not_make(command, three, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    code, _, err = command("convert", three, "-o", tmp_path / "thesis", "--force", "-q")
    assert code == 3
    sentence(err, "not made by medgen")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


# -- plans and JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "augment", "score", "convert"])
def test_a_dry_run_writes_nothing(command, three, heads_bundle, tmp_path, name):
    before = files(tmp_path)
    extra = ["-m", heads_bundle] if name == "score" else []
    code, out, err = command(name, three, "-o", tmp_path / "out", "--dry-run", *extra)
    assert code == 0, err
    assert out
    assert files(tmp_path) == before
    code, out, _ = command(name, three, "-o", tmp_path / "out", "--dry-run", "--json", *extra)
    assert code == 0
    json.loads(out)
    assert files(tmp_path) == before


def test_the_plan_says_what_would_be_learned(command, heads, tmp_path):
    code, out, _ = command(
        "train", heads, "-o", tmp_path / "out", "--dry-run", "--json", "--set", "fit.images=77", "-q"
    )
    assert code == 0
    plan = json.loads(out)
    assert plan["preset"] == "vae3d"
    assert plan["fit"]["images"] == 77
    assert sum(plan["scans"].values()) == 64
    assert plan["recipe"]["steps"][-1]["do"] == "percentiles"
    assert len(plan["model"]["shape"]) == 3


def test_json_is_all_there_is_on_stdout(command, heads, three, heads_bundle, tmp_path):
    code, out, err = command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["failed"] == 0
    assert len(told["scans"]) == 3
    assert {"case", "score", "p", "z_max"} <= set(told["scans"][0])
    code, out, err = command("augment", heads, "-m", heads_bundle, "-o", tmp_path / "a", "-n", 2, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["written"] == {"synthetic by sample": 2}
    assert told["folder"].endswith("a")
    code, out, _ = command("convert", three, "-o", tmp_path / "c", "--json", "-q")
    assert len(json.loads(out)["written"]) == 3


def test_quiet_says_nothing_on_stderr(command, three, heads_bundle, tmp_path):
    code, out, err = command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "-q")
    assert code == 0
    assert not err
    assert "Wrote scores.csv" in out


def test_a_command_ends_with_what_was_written_and_what_to_do_next(command, heads, three, heads_bundle, tmp_path):
    _, out, _ = command("augment", heads, "-m", heads_bundle, "-o", tmp_path / "a", "-n", 2, "-q")
    assert "Wrote 2 synthetic by sample (nifti, flat)" in out
    assert f"Next: medgen score SCANS -m {heads_bundle}" in out
    _, out, _ = command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "-q")
    assert "Scored 3 of 3 scans" in out
    assert "Research use only, not a medical device." in out


def test_training_from_the_command_line(command, heads, tmp_path):
    code, out, err = command(
        "train", heads, "-o", tmp_path / "b", *quick((*QUICK_3D, "fit.images=16")), "--licence", "CC0-1.0"
    )
    assert code == 0, err
    assert f"medgen score SCANS -m {tmp_path / 'b'}" in out
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.licence == "CC0-1.0"
    assert bundle.training["images_seen"] == 16
    assert "64 scans" in err
    assert "with vae3d" in err


# -- some scans wrong --------------------------------------------------------------------------------------


def test_one_corrupt_scan_among_many_sets_the_exit_code_and_spares_the_others(command, three, heads_bundle, tmp_path):
    path = sorted(three.iterdir())[1]
    path.write_bytes(path.read_bytes()[:200])
    code, out, err = command("score", three, "-m", heads_bundle, "-o", tmp_path / "s")
    assert code == 3
    assert "Scored 2 of 3 scans" in out
    assert "not scored" in out
    assert "Traceback" not in out + err
    assert (tmp_path / "s" / "scores.csv").is_file()
    code, out, _ = command("convert", three, "-o", tmp_path / "c")
    assert code == 3
    assert "Wrote 2 scans" in out
    code, out, err = command("train", three, "-o", tmp_path / "b", *quick((*QUICK_3D, "fit.images=16")))
    assert code in (0, 3)
    assert "Traceback" not in err


def test_a_file_that_is_no_scan_changes_no_exit_code(command, three, tmp_path):
    (three / "README.txt").write_text("x")
    assert command("convert", three, "-o", tmp_path / "c", "-q")[0] == 0


def test_a_truncated_dicom_among_others_sets_the_exit_code(command, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(SAMPLES / "ct_oblique", folder / "ct")
    (folder / "cut.dcm").write_bytes((SAMPLES / "xray" / "normal" / "001.dcm").read_bytes()[:600])
    code, out, _ = command("convert", folder, "-o", tmp_path / "out", "-q")
    assert code == 3
    assert "Wrote 1 scans" in out
    assert "cut.dcm" in out


# -- the disk is full ----------------------------------------------------------------------------------------


class FullDisk:
    """While it lasts, no file of this process may grow beyond so many bytes: writing fails as on a full disk."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


@pytest.mark.parametrize("limit", [0, 700, 3000, 20_000])
@pytest.mark.parametrize("name", ["train", "augment", "score", "convert"])
def test_a_full_disk_leaves_nothing_under_the_final_name(command, heads, three, heads_bundle, tmp_path, name, limit):
    data = heads if name == "augment" else three
    extra = {
        "train": quick((*QUICK_3D, "fit.images=8")),
        "augment": ["-m", heads_bundle, "-n", 2],
        "score": ["-m", heads_bundle],
    }
    if name == "convert":
        limit = min(limit, 3000)
    with FullDisk(limit):
        code, out, err = command(name, data, "-o", tmp_path / "out", "-q", *extra.get(name, []))
    assert code == 3, (out, err)
    sentence(err, "annot ")
    assert not (tmp_path / "out").exists()
    # With room again, the same command ends well.
    code, _, err = command(name, data, "-o", tmp_path / "out", "-q", *extra.get(name, []))
    assert code == 0, err
    assert (tmp_path / "out" / "run.json").is_file()
    assert not (tmp_path / "out.part").exists()


# -- Ctrl-C ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_in_training_then_the_same_command_finishes(heads, tmp_path):
    """A real process and a real signal."""
    arguments = [sys.executable, "-c", "from medgen.cli import main; main()", "train", str(heads), "-o"]
    settings = quick((*QUICK_3D, "fit.images=40000", "fit.patience=100000", "fit.validations=5000"))
    process = subprocess.Popen(
        [*arguments, str(tmp_path / "b"), *settings, "-q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / "b.part" / "journal.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.exists() and "images" in journal.read_text()):
        time.sleep(0.1)
    time.sleep(1.0)  # some steps into training
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    sentence(err, "Run the same command again")
    assert not (tmp_path / "b").exists()
    progress = json.loads((tmp_path / "b.part" / "training" / "state" / "progress.json").read_text())["progress"]
    assert 0 < progress["seen"] < 40000
    # The same command goes on; fewer images left would be other settings, so time is given back by hand.
    state = json.loads((tmp_path / "b.part" / "training" / "state" / "progress.json").read_text())
    state["progress"]["seen"] = 39992 - 39992 % 8
    (tmp_path / "b.part" / "training" / "state" / "progress.json").write_text(json.dumps(state))
    done = subprocess.run([*arguments, str(tmp_path / "b"), *settings], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Going on after 39,992 images" in done.stderr
    assert Bundle.load(tmp_path / "b").training["images_seen"] == 40000
    assert not (tmp_path / "b.part").exists()


def test_ctrl_c_while_scoring_is_one_sentence_and_goes_on(command, three, heads_bundle, tmp_path, monkeypatch):
    from medgen.tasks import anomaly

    original, count = anomaly._Run.score, [0]

    def interrupted(self, *arguments):
        count[0] += 1
        if count[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(anomaly._Run, "score", interrupted)
    code, _, err = command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "-q")
    assert code == 130
    sentence(err, "Run the same command again")
    code, _, err = command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "-q")
    assert code == 0, err
    assert count[0] == 4  # the first was not scored again


def test_another_command_does_not_mix_with_an_unfinished_one(command, three, heads_bundle, tmp_path, monkeypatch):
    from medgen.tasks import anomaly

    with monkeypatch.context() as patch:
        patch.setattr(anomaly._Run, "score", lambda *_: signal.raise_signal(signal.SIGINT))
        assert command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "-q")[0] == 130
    code, _, err = command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "-q", "--fpr", "0.2")
    assert code == 3
    sentence(err, "other settings")
    assert command("score", three, "-m", heads_bundle, "-o", tmp_path / "s", "-q", "--fpr", "0.2", "--force")[0] == 0


# -- convert -------------------------------------------------------------------------------------------------


def test_convert_writes_what_is_asked_for(command, xrays, tmp_path):
    for chosen, count in (("nifti", ".nii.gz"), ("png", ".png"), ("dicom", ".dcm")):
        code, _, err = command("convert", xrays / "opacity", "-o", tmp_path / chosen, "--format", chosen, "-q")
        assert code == 0, err
        assert len([path for path in (tmp_path / chosen).rglob("*") if path.name.endswith(count)]) == 12
    first = sorted((xrays / "opacity").iterdir())[0]
    with Image.open(first) as ours, Image.open(tmp_path / "png" / first.name) as theirs:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert len(io.find(tmp_path / "dicom").sources) == 12


def test_convert_refuses_a_table_inside_the_output(command, tmp_path):
    code, _, err = command(
        "convert",
        SAMPLES / "ct_oblique",
        "-o",
        tmp_path / "out",
        "--format",
        "dicom",
        "--table",
        tmp_path / "out" / "t.csv",
    )
    assert code == 3
    sentence(err, "outside")
    assert not list(tmp_path.iterdir())


def test_a_zip_is_read_like_a_folder(command, three, heads_bundle, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "scans"), "zip", three)
    assert command("info", archive)[0] == 0
    code, out, err = command("convert", archive, "-o", tmp_path / "c", "-q")
    assert code == 0, err
    assert "Wrote 3 scans" in out
    for arguments in (["score", archive, "-m", heads_bundle], ["train", archive, *quick((*QUICK_3D, "fit.images=8"))]):
        code, _, err = command(*arguments, "-o", tmp_path / arguments[0], "-q")
        assert code == 0, err
