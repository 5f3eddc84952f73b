"""`medgen compare` and `evaluate`: one table, the same splits and voxels for all; classification; the doctor."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import medgen
from medgen.bundle import Bundle
from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, ConfigError, DataError
from medgen.metrics.classification import (
    accuracy,
    best_temperature,
    expected_calibration_error,
    log_loss,
    one_versus_rest_auroc,
    tempered,
)
from medgen.models import build, config_of
from medgen.models.base import Model, ModelConfig
from medgen.scores.likelihoods import bits_per_dim, density_kind
from medgen.tasks.compare import lines, would_train
from medgen.tasks.plan import Choices, look_at, planned, shared_recipe
from medgen.training.doctor import complaints

ROOT = Path(__file__).resolve().parents[1]
XRAY = ROOT / "data_samples" / "xray"


# -- metrics of chances --------------------------------------------------------------------------------


def drawn(n: int = 4000, k: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Chances that are true: classes drawn from them."""
    rng = np.random.default_rng(seed)
    log_chances = rng.normal(0, 2, (n, k))
    log_chances -= np.logaddexp.reduce(log_chances, axis=1, keepdims=True)
    classes = np.array([rng.choice(k, p=row) for row in np.exp(log_chances)])
    return log_chances, classes


def test_true_chances_are_calibrated_and_want_no_temperature():
    found, true = drawn()
    assert expected_calibration_error(found, true) < 0.03
    assert best_temperature(found, true) == pytest.approx(1, abs=0.08)


def test_a_temperature_undoes_chances_that_are_too_sure():
    found, true = drawn()
    sure = tempered(found, 1 / 40)
    assert expected_calibration_error(sure, true) > 0.1
    assert best_temperature(sure, true) == pytest.approx(40, rel=0.08)
    assert log_loss(tempered(sure, 40), true) == pytest.approx(log_loss(found, true), rel=1e-6)
    assert accuracy(sure, true) == accuracy(found, true)


def test_auroc_of_two_classes_is_the_same_from_either_side_and_survives_rounding():
    found, true = drawn(k=2)
    expected = one_versus_rest_auroc(found, true)
    assert 0.7 < expected < 1
    # Hundreds of nats apart every chance is 0 or 1 to the last bit; the order is still there.
    assert one_versus_rest_auroc(tempered(found, 1e-3), true) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(one_versus_rest_auroc(found[true == 0], true[true == 0]))


# -- Bayes' rule ---------------------------------------------------------------------------------------


def test_chances_of_classes_follow_from_densities_by_bayes_rule():
    torch.manual_seed(0)
    model = build(config_of({"kind": "flow", "shape": (4, 4), "classes": ("a", "b", "c"), "width": 8, "steps": 2}))
    x = torch.rand(5, 1, 4, 4)
    model.initialise(Batch(x, torch.arange(5) % 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    each = torch.stack([model.log_prob(x, torch.full((5,), c)) for c in range(3)], 1)
    assert torch.allclose(model.class_log_prob(x).exp(), each.softmax(1), atol=1e-5)
    assert float(each.std(1).min()) > 0


def test_a_model_without_classes_says_that_it_cannot_classify():
    model = build(config_of({"kind": "flow", "shape": (4, 4), "width": 8}))
    with pytest.raises(CapabilityError, match="two or more classes; it has 0"):
        model.class_log_prob(torch.rand(1, 1, 4, 4))


# -- one unit for all densities ------------------------------------------------------------------------


class Flat(Model):
    """A density of 1 on [0, 1] whatever x is, of continuous values or of 256 grey levels."""

    class Config(ModelConfig):
        bits: int = 0

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.config = Flat.Config(kind="flat", shape=(4, 4), bits=bits)

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset:
        return frozenset({"scores_density"})

    def log_prob(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        return -x[0].numel() * torch.full((len(x),), math.log(self.config.grey_levels or 1))


def test_continuous_and_grey_densities_are_told_in_the_same_bits():
    batch = Batch(torch.rand(3, 1, 4, 4))
    assert bits_per_dim(Flat(8), batch)[0].tolist() == pytest.approx([8] * 3)
    assert bits_per_dim(Flat(0), batch)[0].tolist() == pytest.approx([math.log2(255)] * 3)
    assert density_kind(Flat(0)) == "exact"


# -- the doctor ----------------------------------------------------------------------------------------


def test_collapse_is_named_with_what_to_do():
    assert complaints({}) == []
    assert complaints({"active_units": 12, "units": 16, "codes_used": 200, "codes": 256}) == []
    (none,) = complaints({"active_units": 0, "units": 16})
    assert none.startswith("Posterior collapse: no unit")
    (part,) = complaints({"active_units": 2, "units": 16})
    assert "14 of 16" in part
    (codes,) = complaints({"codes_used": 3, "codes": 256, "code_perplexity": 1.5})
    assert "3 of 256" in codes


def test_a_collapsed_training_is_named_in_the_bundle(tmp_path):
    """A code that costs a thousand times what it should is not used; training says so."""
    place = medgen.train(
        XRAY, tmp_path / "b", preset="vae", label="normal", minutes=None,
        overrides=[
            "model.beta=10000", "model.latent=4", "max_voxels=256", "fit.images=1600", "fit.batch_size=8",
            "fit.patience=20",
        ],
    )  # fmt: skip
    told = Bundle.load(place).training
    assert told["health"]["units"] == 4
    assert told["health"]["active_units"] == 0
    assert told["warnings"][0].startswith("Posterior collapse")


# -- one table -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> "medgen.tasks.compare.Compared":
    return medgen.compare(
        XRAY, tmp_path_factory.mktemp("compared") / "out", presets=["gaussian", "vae"], minutes=0.01,
        overrides=["max_voxels=256", "fit.batch_size=8"], seed=3,
    )  # fmt: skip


def test_a_comparison_measures_all_on_the_same_scans_and_voxels(compared):
    rows = {row["preset"]: row for row in compared.rows}
    assert list(rows) == ["mean of training scans", "lossless PNG", "gaussian", "vae"]
    trained = [rows[name] for name in ("gaussian", "vae")]
    assert len({tuple(row["shape"]) for row in trained}) == 1
    assert len({row["manifest_sha256"] for row in trained}) == 1
    assert len({row["scans"] for row in trained}) == 1
    assert [row["density"] for row in trained] == ["exact", "bound"]
    for row in trained:
        assert 2 < row["bits_per_dim"] < 20
        assert 0 <= row["auroc"] <= 1
        assert row["train_seconds"] > 0
        assert row["sample_seconds"] > 0
        assert row["peak_mb"] > 100
    assert rows["vae"]["psnr_db"] > 5
    assert rows["mean of training scans"]["psnr_db"] > 5


def test_the_table_is_written_for_machines_and_for_people(compared):
    with (compared.folder / "comparison.csv").open(newline="") as file:
        assert [row["preset"] for row in csv.DictReader(file)] == [row["preset"] for row in compared.rows]
    assert json.loads((compared.folder / "comparison.json").read_text()) == list(compared.rows)
    assert (compared.folder / "comparison.md").read_text().splitlines() == lines(compared.rows)
    assert Bundle.load(compared.folder / "bundles" / "vae").model.config.kind == "vae"


def test_evaluate_repeats_what_the_comparison_measured(compared):
    row = next(row for row in compared.rows if row["preset"] == "vae")
    found = medgen.evaluate(XRAY, compared.folder / "bundles" / "vae")
    assert found["scans"] == row["scans"]
    assert found["bits_per_dim_bound"] == pytest.approx(row["bits_per_dim"], abs=1e-3)
    assert found["psnr_db"] == pytest.approx(row["psnr_db"], abs=0.02)
    assert medgen.evaluate(XRAY, compared.folder / "bundles" / "vae", split="all")["scans"] > 30


def test_presets_of_several_strides_share_one_shape():
    choices = [Choices(name, overrides=["max_voxels=900"]) for name in ("vae", "glow")]
    look = look_at(XRAY, choices[0])
    recipe = shared_recipe(look, choices)
    for one in choices:
        told = [*one.overrides, f"recipe={recipe.model_dump_json()}"]
        assert planned(look, Choices(one.preset, overrides=told)).model.shape == recipe.shape[:2]


def test_a_comparison_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no preset 'vea'\. Did you mean 'vae'"):
        medgen.compare(XRAY, tmp_path / "a", presets=["vea"], minutes=0.01)
    with pytest.raises(DataError, match="no class"):
        medgen.compare(XRAY, tmp_path / "b", presets=["vae"], label="purple", minutes=0.01)
    assert not list(tmp_path.iterdir())


def test_presets_that_cannot_be_compared_are_named_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"different names; found vae, vae"):
        medgen.compare(XRAY, tmp_path / "a", presets=["vae", "vae"], minutes=0.01)
    with pytest.raises(ConfigError, match=r"no 'wavenet' in 2D, only wavenet3d"):
        would_train(XRAY, ["vae", "wavenet"])
    with pytest.raises(ConfigError, match="different names"):
        would_train(XRAY, ["vae", "vae"])
    assert would_train(XRAY, ["vae", "glow2d"])["presets"] == ["vae2d", "glow2d"]
    assert not list(tmp_path.iterdir())


def test_a_class_nobody_can_learn_is_left_out_and_said(tmp_path):
    folder = tmp_path / "few"
    for label, count in (("normal", 10), ("opacity", 1)):
        (folder / label).mkdir(parents=True)
        for path in sorted((XRAY / label).iterdir())[:count]:
            shutil.copy(path, folder / label)
    plan = planned(look_at(folder))
    assert plan.model.classes == ()
    assert {row.label for row in plan.manifest.rows} == {"normal"}


def test_evaluate_leaves_out_scans_of_another_kind(compared, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(XRAY / "normal", folder / "normal")
    shutil.copytree(XRAY / "opacity", folder / "unheard of")
    shutil.copy(next((ROOT / "data_samples" / "heads").glob("*.nii.gz")), folder / "normal" / "head.nii.gz")
    found = medgen.evaluate(folder, compared.folder / "bundles" / "vae", split="all")
    assert found["scans"] == len(list((XRAY / "normal").iterdir()))
    assert found["left_out"] == 1 + len(list((XRAY / "opacity").iterdir()))
