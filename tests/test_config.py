"""Presets: values only, precedence as promised, and a wrong key answered with the right one."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from medgen.config import Preset, load_preset, preset_for, preset_names, presets_folder, typed
from medgen.data.recipe import CropOrPad, Recipe, Window
from medgen.errors import ConfigError
from medgen.models import FAMILIES, build, family
from medgen.tasks.detector import Questions
from medgen.training.fit import FitConfig

GOOD = """
about: {title: t, family: vae, year: 2014, paper: p, dims: 2, abilities: [samples]}
model: {kind: vae, latent: 4}
fit:
  images: 10
  learning_rate: 1e-3
"""


def written(folder: Path, text: str | bytes, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- precedence --------------------------------------------------------------------------------------


def test_defaults_then_yaml_then_set(tmp_path):
    path = written(tmp_path, GOOD)
    plain = load_preset(path)
    assert (plain.max_voxels, plain.recipe) == (1_000_000, "auto")  # defaults
    assert plain.fit["images"] == 10  # the file
    changed = load_preset(path, ["fit.images=20", "max_voxels=5000", "model.code=map", "fit.images=30"])
    assert changed.fit["images"] == 30  # the last word
    assert changed.max_voxels == 5000
    assert changed.model == {"kind": "vae", "latent": 4, "code": "map"}
    settings = typed(FitConfig, changed.fit, "mine.yaml", "fit")
    assert (settings.images, settings.learning_rate) == (30, 1e-3)


def test_set_takes_yaml_values(tmp_path):
    overrides = ["fit.augment=[{do: flip, axis: 1}]", "model.beta=1e-2", "fit.precision=bfloat16", "fit.workers=0"]
    preset = load_preset(written(tmp_path, GOOD), overrides)
    settings = typed(FitConfig, preset.fit, "mine.yaml", "fit")
    assert settings.augment[0].axis == 1
    assert settings.precision == "bfloat16"
    assert typed(family("vae").Config, preset.model | {"shape": (8, 8)}, "x", "model").beta == 0.01


def test_a_recipe_may_be_written_out(tmp_path):
    text = GOOD + "recipe:\n  outside: -1024\n  steps:\n    - {do: crop_or_pad, shape: [8, 8, 8], about: foreground}\n"
    text += "    - {do: window, low: -1000, high: 400}\n"
    recipe = load_preset(written(tmp_path, text)).recipe
    assert recipe == Recipe(
        steps=(CropOrPad(shape=(8, 8, 8), about="foreground"), Window(low=-1000, high=400)), outside=-1024
    )


def test_a_preset_is_frozen_and_the_same_after_json(tmp_path):
    preset = load_preset(written(tmp_path, GOOD))
    assert Preset.model_validate_json(preset.model_dump_json()) == preset
    with pytest.raises(ValidationError):
        preset.max_voxels = 3


# -- wrong keys and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_voxel=5", r"mine\.yaml: max_voxel: no such key\. Did you mean 'max_voxels'\?"),
        ("modell.kind=vae", r"modell: no such key\. Did you mean 'model'\?"),
        ("zebra=1", r"zebra: no such key\. Keys: .*max_voxels"),
        ("max_voxels=many", r"max_voxels: .*found \"many\""),
        ("max_voxels=3", "max_voxels: .*64"),
        ("about.dims=4", r"about\.dims"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_to_write_instead(tmp_path, override, expected):
    with pytest.raises(ConfigError, match=expected):
        load_preset(written(tmp_path, GOOD), [override])


@pytest.mark.parametrize(
    ("model", "values", "prefix", "expected"),
    [
        (family("vae").Config, {"latents": 4}, "model", r"model\.latents: no such key\. Did you mean 'latent'\?"),
        (FitConfig, {"image": 4}, "fit", r"fit\.image: no such key\. Did you mean 'images'\?"),
        (FitConfig, {"images": -1}, "fit", r"fit\.images: .*found -1"),
        (FitConfig, {"augment": [{"do": "spin"}]}, "fit", r"fit\.augment\.0"),
    ],
)
def test_keys_inside_are_named_with_their_place(model, values, prefix, expected):
    with pytest.raises(ConfigError, match=rf"^vae2d\.yaml: {expected}"):
        typed(model, values | ({"shape": (8, 8)} if prefix == "model" else {}), "vae2d.yaml", prefix)


@pytest.mark.parametrize("override", ["fit.images", "=3", "", "model.kind.deep=1", "fit.images=[", "fit.images=*x"])
def test_a_malformed_override_is_refused_in_a_sentence(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        load_preset(written(tmp_path, GOOD), [override])


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'vae2'.* Did you mean 'vae2d'\?"):
        load_preset("vae2")
    with pytest.raises(ConfigError, match=r"Presets: .*vae3d"):
        load_preset("completely-else")
    with pytest.raises(ConfigError):
        load_preset("nowhere.yaml")


# -- values, never code ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['echo harm']",
        "!!python/object/new:os.system ['echo harm']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!harm x",
    ],
)
def test_yaml_cannot_name_code(tmp_path, value):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_preset(written(tmp_path, GOOD + f"max_voxels: {value}\n"))
    with pytest.raises(ConfigError, match="--set"):
        load_preset(written(tmp_path, GOOD), [f"max_voxels={value}"])


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="aliases"):
        load_preset(written(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- b\n",
        "about: [",
        "\tabout: x",
        "x" * 200_000,
        b"\xff\xfe\x00about",
        "[" * 50_000,
        "a: " + "{b: " * 20_000,
        "about: 3\nmodel: 4\n",
    ],
)
def test_what_is_no_preset_is_refused_in_a_sentence(tmp_path, text):
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_preset(written(tmp_path, text))


def test_environment_and_expressions_mean_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGES", "99")
    preset = load_preset(written(tmp_path, GOOD), ["fit.images=$IMAGES"])
    with pytest.raises(ConfigError, match=r"fit\.images"):
        typed(FitConfig, preset.fit, "mine.yaml", "fit")


# -- the presets that come with medgen ---------------------------------------------------------------------


def test_every_preset_is_there_and_every_family_has_one():
    names = preset_names()
    assert names == sorted(path.stem for path in presets_folder().glob("*.yaml"))
    assert {load_preset(name).about.family for name in names} == {"detector", *FAMILIES}


@pytest.mark.parametrize("name", [name for name in preset_names() if load_preset(name).models])
def test_a_detector_s_models_exist_and_can_be_asked(name):
    preset = load_preset(name)
    assert preset.about.family == "detector"
    stated = {}
    for part, told in preset.models.items():
        theirs = load_preset(preset_for(told.preset, preset.about.dims))
        config = family(str(theirs.model["kind"])).Config
        stride = family(str(theirs.model["kind"])).stride({**theirs.model, **told.model})
        shape = (4 * stride,) * preset.about.dims if isinstance(stride, int) else stride
        stated[part] = build(typed(config, theirs.model | told.model | {"shape": shape}, name, part))
    for question in Questions.of(preset.score, preset.map).each.values():
        question.check(stated)
        assert set(question.asks) <= set(stated) or not question.needs
    first = next(iter(stated.values()))
    assert list(preset.about.abilities) == sorted(first.abilities(first.config))


@pytest.mark.parametrize("name", [name for name in preset_names() if load_preset(name).model])
def test_a_preset_s_model_and_training_are_valid(name):
    preset = load_preset(name)
    config = family(preset.about.family)
    stride = config.stride(preset.model)
    shape = (2 * stride,) * preset.about.dims
    assert typed(config.Config, preset.model | {"shape": shape}, name, "model").dims == preset.about.dims
    assert typed(FitConfig, preset.fit, name, "fit").images > 0
