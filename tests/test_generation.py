"""`medgen evaluate --samples`: drawn scans beside held-out ones, their floor, and generators that need no training."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import quick

import medgen
from medgen.bundle import Bundle
from medgen.cli.shared import next_command
from medgen.errors import CapabilityError, ConfigError
from medgen.io.source import ReadOptions
from medgen.metrics.sets import METRICS
from medgen.tasks import generation as task
from medgen.tasks.generation import MODEL, REAL, Drawn, lines
from medgen.tasks.intake import training_scans

FEW = Drawn(scans=12, seed=1)


@pytest.fixture(autouse=True)
def quick_encoder(monkeypatch):
    """What an encoder learns is tested where it is made."""
    monkeypatch.setattr("medgen.metrics.encoder._STEPS", {2: 2, 3: 2})


@pytest.fixture(scope="module")
def gaussian_bundle(xrays, tmp_path_factory) -> Path:
    """Both classes of radiographs as Gaussians."""
    return medgen.train(xrays, tmp_path_factory.mktemp("bundles") / "gaussian", preset="gaussian2d", minutes=None)


def test_drawn_scans_stand_beside_real_ones_and_a_generator_without_training(xrays, gaussian_bundle, tmp_path):
    asked = Drawn(scans=12, against=("gaussian",), seed=1)
    found = medgen.evaluate(xrays, gaussian_bundle, drawn=asked, out=tmp_path / "out")
    made = found["generation"]
    assert [(row["features"], row["generator"]) for row in made["rows"]] == [
        (name, who) for name in ("radiomics", "hog", "encoder") for who in (REAL, MODEL, "gaussian")
    ]
    assert made["drawn"] == 12
    known = training_scans(Bundle.load(gaussian_bundle), xrays, ReadOptions())
    assert made["held_out"] == len(known.split("test")) + len(known.split("calibration"))
    assert made["scans"] == min(12, made["held_out"])
    for real, model, other in zip(*[iter(made["rows"])] * 3, strict=True):
        for name in METRICS:
            low, high = model[f"{name}_interval"]
            assert low <= model[name] <= high
            if f"{name}_ratio" in model:
                assert model[f"{name}_ratio"] == pytest.approx(model[name] / real[name])
            # The same family on the same scans draws the same.
            assert other[name] == pytest.approx(model[name])
    assert json.loads(json.dumps(made)) == made
    told = (tmp_path / "out" / "generation.md").read_text()
    assert "not a medical device" in told
    assert "rough" in told
    with (tmp_path / "out" / "generation.csv").open() as file:
        assert [row["generator"] for row in csv.DictReader(file)] == [row["generator"] for row in made["rows"]]


def test_the_next_command_compares_drawn_scans_only_where_enough_were_set_aside(xrays, gaussian_bundle, monkeypatch):
    bundle = replace(Bundle.load(gaussian_bundle), calibration={})
    few = replace(bundle, training=bundle.training | {"set_aside": {"scans": 9, "patients": 9}})
    monkeypatch.setattr("medgen.tasks.detector.can_score", lambda model: False)
    for made, says in ((bundle, True), (few, False)):
        monkeypatch.setattr(Bundle, "load", lambda place, made=made: made)
        assert next_command(Path("B"), xrays).endswith(f"{xrays} -m B" + says * " --samples 200")


def test_one_seed_draws_one_set_and_nothing_is_drawn_unasked(xrays, gaussian_bundle):
    assert "generation" not in medgen.evaluate(xrays, gaussian_bundle)
    first, again = (medgen.evaluate(xrays, gaussian_bundle, drawn=FEW)["generation"] for _ in range(2))
    assert first == again


def test_the_model_is_told_the_classes_of_held_out_scans_and_the_floor_has_their_shares(
    xrays, gaussian_bundle, monkeypatch
):
    bundle, seen = Bundle.load(gaussian_bundle), {}
    compare = task.compare_sets

    def looked(made, reference, floor, **told):
        seen.setdefault("floor", len(floor))
        return compare(made, reference, floor, **told)

    drawn = bundle.model.sample
    conds: list[torch.Tensor] = []

    def listened(n, *, seed, cond):
        conds.append(cond)
        return drawn(n, seed=seed, cond=cond)

    monkeypatch.setattr(task, "compare_sets", looked)
    monkeypatch.setattr(bundle.model, "sample", listened)
    known = training_scans(bundle, xrays, ReadOptions())
    held = [row for row in known.rows if row.split in ("test", "calibration")]
    count = 3 * len(held)
    medgen.evaluate(xrays, bundle, drawn=Drawn(scans=count))
    told = np.bincount(torch.cat(conds).numpy(), minlength=2)
    expected = [3 * sum(row.label == name for row in held) for name in bundle.model.config.classes]
    assert told.tolist() == expected
    train = [sum(row.label == name for row in known.split("train").rows) for name in bundle.model.config.classes]
    shares = np.array(expected) / count
    most = min(n / share for n, share in zip(train, shares, strict=True))
    assert seen["floor"] == sum(int(most * share + 1e-9) for share in shares)


def test_a_folder_that_was_not_learned_from_is_halved_by_patient(xrays, gaussian_bundle, tmp_path):
    shutil.copytree(xrays, tmp_path / "other")
    next((tmp_path / "other" / "normal").iterdir()).unlink()
    found = medgen.evaluate(tmp_path / "other", gaussian_bundle, split="all", drawn=FEW)["generation"]
    assert "did not learn from this folder" in found["notes"][0]
    assert found["held_out"] == 18
    assert found["rows"]


def test_too_few_held_out_scans_are_told_and_not_measured(xrays, tmp_path):
    shutil.copytree(xrays, tmp_path / "few")
    for folder in ("normal", "opacity"):
        for path in sorted((tmp_path / "few" / folder).iterdir())[8:]:
            path.unlink()
    bundle = medgen.train(tmp_path / "few", tmp_path / "bundle", preset="gaussian2d", minutes=None)
    found = medgen.evaluate(tmp_path / "few", bundle, drawn=FEW)["generation"]
    assert found["rows"] == []
    assert "takes 10 held-out scans" in found["notes"][-1]
    assert found["notes"][-1] in lines(found)


def test_what_cannot_be_drawn_or_measured_is_refused(xrays, gaussian_bundle, command, tmp_path):
    for wrong in ({"scans": 9}, {"scans": -1}, {"against": ("gmm",)}, {"extractor": "own.pt"}):
        with pytest.raises(ConfigError, match="--samples"):
            Drawn(**wrong)
    with pytest.raises(ConfigError, match="fitted at once"):
        medgen.evaluate(xrays, gaussian_bundle, drawn=Drawn(scans=12, against=("vae",)))
    code, _, err = command("evaluate", xrays, "-m", gaussian_bundle, "--samples", 12, "--extractor", "none.pt", "-q")
    assert code == 2
    assert "no such file" in err
    out = tmp_path / "dae"
    assert command("train", xrays, "-o", out, "--preset", "dae2d", *quick(("fit.images=8", "model.width=4")))[0] == 0
    with pytest.raises(CapabilityError, match="draws no scans"):
        medgen.evaluate(xrays, out, drawn=FEW)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_command_prints_a_table_for_each_feature_space(xrays, gaussian_bundle, command, tmp_path):
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "own.pt"))
    code, out, err = command(
        "evaluate", xrays, "-m", gaussian_bundle, "--samples", 12, "--extractor", tmp_path / "own.pt", "-q"
    )
    assert code == 0, err
    for features in ("radiomics", "hog", "encoder", "own"):
        assert f"By {features}:" in out
    assert "Research use only" in out
    assert "x floor" in out


def test_volumes_are_drawn_and_compared(heads, heads_bundle):
    found = medgen.evaluate(heads, heads_bundle, drawn=FEW)["generation"]
    assert {row["features"] for row in found["rows"]} == {"radiomics", "hog", "encoder"}
    assert all(np.isfinite(row[name]) for row in found["rows"] for name in METRICS)
