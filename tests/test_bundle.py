"""Bundles: what was saved comes back, anything else is refused in a sentence, and nothing in one can run."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medgen import io
from medgen.bundle import Bundle, Contract, signature
from medgen.data.recipe import Recipe
from medgen.errors import BundleError
from medgen.grid import Grid
from medgen.scan import Header, Scale, Scan


@pytest.fixture
def folder(heads_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the heads' bundle to do harm to."""
    return Path(shutil.copytree(heads_bundle, tmp_path / "bundle"))


def edited(folder: Path, change: Callable[[dict], object]) -> Path:
    """The bundle with its bundle.json changed by somebody who knows how to sign it."""
    place = folder / "bundle.json"
    stated = json.loads(place.read_text())
    changed = change(stated)
    stated = stated if changed is None else changed
    if isinstance(stated, dict) and isinstance(stated.get("sha256"), dict):
        stated["sha256"]["bundle.json"] = signature(stated)
    place.write_text(json.dumps(stated))
    return folder


# -- there and back --------------------------------------------------------------------------------


def test_what_is_saved_comes_back(heads_bundle, tmp_path):
    first = Bundle.load(heads_bundle)
    again_at = tmp_path / "again"
    again_at.mkdir()
    digest = first.save(again_at)
    again = Bundle.load(again_at)
    assert digest == again.weights_sha256 == hashlib.sha256((again_at / "weights.safetensors").read_bytes()).hexdigest()
    assert again.recipe == first.recipe
    assert again.contract == first.contract
    assert again.calibration == first.calibration
    assert (again.training, again.metrics, again.licence) == (first.training, first.metrics, first.licence)
    assert again.model.config == first.model.config
    for (a, x), (b, y) in zip(first.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert a == b
        assert torch.equal(x, y)
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert torch.equal(first.model.sample(2, seed=1), again.model.sample(2, seed=1))
    assert not again.model.training


def test_the_same_bundle_is_saved_as_the_same_bytes(heads_bundle, tmp_path):
    bundle = Bundle.load(heads_bundle)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bundle.save(tmp_path / name)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_bundle_holds_several_models_by_name(heads_bundle, tmp_path):
    one = Bundle.load(heads_bundle)
    two = replace(one, models={"model": one.model, "other": Bundle.load(heads_bundle).model})
    two.save(tmp_path)
    again = Bundle.load(tmp_path)
    assert set(again.models) == {"model", "other"}
    assert again.model is again.models["model"]
    assert again.name == "vae+vae"


def test_nothing_in_a_bundle_can_run(heads_bundle, monkeypatch):
    assert {path.name for path in heads_bundle.iterdir()} <= {
        "weights.safetensors", "calibration.safetensors", "bundle.json", "README.md", "preview.png", "run.json"
    }  # fmt: skip
    for path in heads_bundle.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK", b"#!"))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a bundle made something run")

    monkeypatch.setattr("pickle.load", forbidden)
    monkeypatch.setattr("pickle.loads", forbidden)
    monkeypatch.setattr("pickle.Unpickler", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    Bundle.load(heads_bundle)


def test_the_card_says_what_it_is(heads_bundle):
    card = (heads_bundle / "README.md").read_text()
    assert "Research use only, not a medical device." in card
    assert "MR" in card or "not told" in card
    stated = json.loads((heads_bundle / "bundle.json").read_text())
    assert stated["intended_use"] == "Research use only, not a medical device."
    assert stated["training"]["patients"] == stated["training"]["scans"] > 20
    assert len(stated["training"]["manifest_sha256"]) == 64


# -- damage and foreign things ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.safetensors", "calibration.safetensors"])
@pytest.mark.parametrize("place", [0, 40, 0.5, -1])
def test_one_flipped_bit_in_a_tensor_file_is_refused(folder, name, place):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}.*sha256"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["calibration"]["scores"].__setitem__(0, 99.0),
        lambda s: s["contract"].update(slope=1.5),
        lambda s: s.update(licence="mine"),
        lambda s: s["sha256"].pop("bundle.json"),
    ],
)
def test_a_number_changed_by_hand_is_refused(folder, change):
    place = folder / "bundle.json"
    stated = json.loads(place.read_text())
    place.write_text(json.dumps(stated))  # laid out otherwise, it says the same
    Bundle.load(folder)
    change(stated)
    place.write_text(json.dumps(stated))
    with pytest.raises(BundleError, match="is not what was saved"):
        Bundle.load(folder)


def test_any_flipped_byte_in_bundle_json_is_refused_or_harmless(folder):
    """The text may still be a bundle, with another licence, say; it never ends in another kind of error."""
    place = folder / "bundle.json"
    original = place.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, len(original), 250):
        content = bytearray(original)
        content[at] ^= int(rng.integers(1, 256))
        place.write_bytes(content)
        try:
            Bundle.load(folder)
        except BundleError:
            refused += 1
    assert refused > 80


@pytest.mark.parametrize("key", ["format", "models", "recipe", "contract", "calibration", "training", "sha256"])
def test_a_missing_key_is_refused(folder, key):
    with pytest.raises(BundleError):
        Bundle.load(edited(folder, lambda stated: {k: v for k, v in stated.items() if k != key}))


@pytest.mark.parametrize(
    "key", ["models", "recipe", "contract", "calibration", "training", "metrics", "sha256", "licence"]
)
@pytest.mark.parametrize("value", [None, 3, "text", [], [1], {}, {"a": 1}])
def test_a_value_of_another_kind_is_refused_or_harmless(folder, key, value):
    edited(folder, lambda stated: stated | {key: value})
    try:
        bundle = Bundle.load(folder)
    except BundleError:
        return
    assert isinstance(bundle.calibration, dict)
    assert isinstance(bundle.training, dict)
    assert isinstance(bundle.metrics, dict)
    assert isinstance(bundle.licence, str)
    assert bundle.models


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s["models"]["model"].update(kind="oracle"), "oracle"),
        (lambda s: s["models"]["model"].update(kind="medgen.cli:main"), "famil"),
        (lambda s: s["models"]["model"].update(width=9), "belong together"),
        (lambda s: s["models"]["model"].update(colour=1), "colour"),
        (lambda s: s["models"].update(other=s["models"]["model"]), "belong together"),
        (lambda s: s.update(format=99), "format"),
        (lambda s: s["sha256"].update({"../../etc/passwd": "0" * 64}), "passwd"),
        (lambda s: s["sha256"].pop("weights.safetensors"), "sha256"),
        (lambda s: s["recipe"]["steps"].append({"do": "dance"}), "recipe.steps"),
        (lambda s: s["contract"].pop("low"), "contract.low"),
    ],
)
def test_a_change_by_hand_is_refused_and_told(folder, change, expected):
    def keep(stated: dict) -> None:
        change(stated)

    with pytest.raises(BundleError, match=expected):
        Bundle.load(edited(folder, keep))


def test_a_config_too_large_for_its_weights_is_refused_before_it_is_built(folder):
    """A few characters must not be able to ask for a terabyte."""
    with pytest.raises(BundleError, match="belong together"):
        Bundle.load(edited(folder, lambda s: s["models"]["model"].update(width=4_000_000)))


@pytest.mark.parametrize("change", [{"depth": 10**9}, {"levels": 10**8}, {"classes": ["x"] * 100_000}])
def test_a_config_that_would_take_for_ever_to_build_is_refused_at_once(folder, change):
    with pytest.raises(BundleError, match="belong together"):
        Bundle.load(edited(folder, lambda s: s["models"]["model"].update(change)))


def test_weights_of_another_model_are_refused(folder):
    path = folder / "weights.safetensors"
    weights = load_file(path)
    for change in (
        dict(list(weights.items())[1:]),
        weights | {"model.extra": torch.zeros(2)},
        weights | {"stranger.template": torch.zeros(2)},
    ):
        save_file(change, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(BundleError, match="belong together"):
            Bundle.load(edited(folder, lambda s, d=digest: s["sha256"].update({"weights.safetensors": d})))


def test_weights_that_are_not_finite_are_refused(folder):
    path = folder / "weights.safetensors"
    weights = load_file(path)
    weights["model.template"][0, 0, 0] = float("nan")
    save_file(weights, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(BundleError, match="finite"):
        Bundle.load(edited(folder, lambda s: s["sha256"].update({"weights.safetensors": digest})))


@pytest.mark.parametrize("name", ["weights.safetensors", "calibration.safetensors", "bundle.json"])
def test_a_missing_file_is_refused_by_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.load(folder)


def test_json_too_deep_to_read_is_refused(folder):
    (folder / "bundle.json").write_text('{"format": 1, "models": ' + "[" * 200_000)
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"name": "a package"}', b'{"format": 1}'])
def test_foreign_json_is_refused(folder, content):
    (folder / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.load(folder)


def test_no_bundle_at_all_is_refused(tmp_path):
    with pytest.raises(BundleError, match="nothing"):
        Bundle.load(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        Bundle.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError):
        Bundle.load(tmp_path / "file")


# -- the input contract ------------------------------------------------------------------------------


def contract(**changes: object) -> Contract:
    grid = Grid((8, 8, 8), np.diag([2.0, 2.0, 2.0, 1.0])).to_dict()
    values = {"modality": "MR", "spacing": (2.0, 2.0, 2.0), "low": 0.0, "high": 1000.0, "grid": grid}
    return Contract.model_validate(values | changes)


def scan(low=0.0, high=1000.0, shape=(8, 8, 8), spacing=2.0, unit="", modality="MR", channels=1) -> Scan:
    voxels = np.linspace(low, high, channels * int(np.prod(shape)), dtype=np.float32).reshape(channels, *shape)
    return Scan(voxels, Grid(shape, np.diag([spacing, spacing, spacing, 1.0])), Scale(unit=unit), Header(modality))


def test_a_scan_like_the_training_scans_raises_no_warning():
    assert contract().check(scan()) == []
    assert contract(modality="CT", unit="HU", low=-1000).check(scan(-1000, 1500, unit="HU", modality="CT")) == []


def test_what_the_file_does_not_tell_is_not_held_against_it():
    assert contract().check(scan(modality="")) == []
    assert contract(modality="", unit="HU", low=-1000).check(scan(-1000, 1500, unit="")) == []


@pytest.mark.parametrize(
    ("changes", "other", "expected"),
    [
        ({}, {"modality": "CT"}, "MR.*CT"),
        ({"unit": "HU", "low": -1000.0}, {"unit": "Bq/ml", "low": -1000}, "HU.*Bq"),
        ({}, {"low": -900.0}, "goes down to -900"),
        ({"unit": "HU", "low": -1000.0, "modality": ""}, {"low": 0.0, "modality": ""}, "starts at 0"),
        ({}, {"shape": (8, 8, 1)}, "volume.*image"),
        ({"planar": True}, {}, "image.*volume"),
        ({}, {"channels": 2}, "1 channel"),
    ],
)
def test_a_scan_of_another_kind_is_refused_and_told(changes, other, expected):
    with pytest.raises(BundleError, match=expected):
        contract(**changes).check(scan(**other))


def test_unusual_spacing_and_range_are_warned_of():
    assert "spacing" in contract().check(scan(spacing=9.0))[0]
    assert "spacing" in contract().check(scan(spacing=0.5))[0]
    assert "span" in contract().check(scan(high=1.0))[0]
    assert contract(planar=True).check(scan(shape=(8, 8, 1), spacing=9.0)) == []


def test_spacing_is_compared_whatever_the_order_of_the_axes():
    one = contract(spacing=(1.0, 1.0, 5.0))
    voxels = np.linspace(0, 1000, 512, dtype=np.float32).reshape(1, 8, 8, 8)
    turned = Scan(voxels, Grid((8, 8, 8), np.diag([5.0, 1.0, 1.0, 1.0])), Scale(), Header("MR"))
    assert one.check(turned) == []


def test_unmeasured_voxels_do_not_count():
    valid = np.ones((8, 8, 8), bool)
    valid[0] = False
    padded = scan()
    voxels = padded.voxels.copy()
    voxels[0, 0] = -30_000
    assert contract().check(replace(padded, voxels=voxels, valid=valid)) == []


def test_a_scan_without_any_measured_voxel_is_refused_in_a_sentence():
    with pytest.raises(BundleError):
        contract().check(replace(scan(), valid=np.zeros((8, 8, 8), bool)))


def test_the_bundle_takes_its_own_training_scans(heads, heads_bundle):
    bundle = Bundle.load(heads_bundle)
    assert isinstance(bundle.recipe, Recipe)
    for path in sorted(heads.iterdir())[:4]:
        assert bundle.contract.check(io.read(path)) == []


def test_a_generated_scan_lies_where_training_scans_lay_in_their_unit(heads, heads_bundle):
    bundle = Bundle.load(heads_bundle)
    original = bundle.recipe(io.read(next(iter(sorted(heads.iterdir())))))
    made = bundle.contract.physical_scan(np.full(original.voxels.shape, 0.5, np.float32))
    assert made.grid.close(original.grid)
    assert made.header.synthetic
    assert made.header.modality == bundle.contract.modality
    assert original.physical().min() < float(made.physical().mean()) < original.physical().max()
