"""The training doctor: every trouble put into a training is named, a healthy one is silent, remedies are bounded."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from test_training import QUICK, CtrlC, same, vae
from torch import Tensor, nn
from torch.distributions import Normal

from medgen.data.dataset import Batch, ScanDataset
from medgen.data.manifest import index
from medgen.data.recipe import CropOrPad, Orient, Percentiles, Recipe
from medgen.errors import TrainingError
from medgen.log import reporting
from medgen.models.base import Loss, Model, ModelConfig, Player
from medgen.training.diagnosis import diagnosed
from medgen.training.fit import FitConfig, fit
from medgen.training.state import Progress, load_state, save_state


@pytest.fixture(scope="module")
def scans(heads: Path) -> tuple[ScanDataset, ScanDataset]:
    """Twelve training and four held-out heads of 8 x 8 x 8 voxels."""
    manifest = index(heads)
    recipe = Recipe(steps=(Orient(), CropOrPad(shape=(8, 8, 8)), Percentiles()))
    parts = [type(manifest)(manifest.rows[part], (), manifest.root) for part in (slice(0, 12), slice(12, 16))]
    return ScanDataset(parts[0], recipe), ScanDataset(parts[1], recipe)


def heard(model: Model, train: ScanDataset, val: ScanDataset | None, config: FitConfig) -> tuple[Progress, list[str]]:
    """How a training went, and what was said."""
    listener = CtrlC(10**9)
    with reporting(listener):
        done = fit(model, train, val, config)
    return done, [said for said in listener.notes if not said.startswith("Stopped early")]


# -- numbers that are not finite ---------------------------------------------------------------------


def test_a_poisoned_weight_is_named_with_the_terms_it_spoils(scans):
    model = vae((8, 8, 8))
    with torch.no_grad():
        model.from_code.weight[0, 0] = math.nan
    said = r"After 0 images the loss of 'model' .*fault: distortion\. Not finite before the step: .*from_code\.weight"
    with pytest.raises(TrainingError, match=said):
        fit(model, scans[0], None, FitConfig(images=8, **QUICK))


class Divides(nn.Linear):
    """A layer that divides 0 by 0 now and then."""

    def __init__(self, layer: nn.Linear, when: Callable[[], bool] = lambda: True) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (y - y) / (y - y) if self.when() else y


def test_a_layer_that_divides_by_zero_is_named(scans):
    model = vae((8, 8, 8))
    model.to_code = Divides(model.to_code, lambda: model.training and 0.5 <= model.progress < 1)
    with pytest.raises(TrainingError, match=r"After 16 images .*: distortion, rate\. .* layer to_code \(Divides\)"):
        fit(model, scans[0], None, FitConfig(images=32, **QUICK))
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(p.grad is None and bool(p.isfinite().all()) for p in model.parameters())


class Chain(Model):
    """Two layers and what is done between them, on the way to a number that ought to be 0."""

    class Config(ModelConfig):
        kind: Literal["chain"] = "chain"

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.config = Chain.Config(shape=(8, 8, 8))
        self.first, self.last, self.between = nn.Linear(512, 4), nn.Linear(4, 1), between

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        total = self.last(self.between(self.first(batch.x.flatten(1))))[:, 0].square()
        return Loss(total, {"square": total})


def test_arithmetic_between_layers_is_placed(scans):
    with pytest.raises(TrainingError, match=r"own arithmetic before layer last \(Linear\)"):
        fit(Chain(lambda x: x / (x - x)), scans[0], None, FitConfig(images=8, **QUICK))


def test_a_gradient_that_is_not_finite_names_the_parameter_and_touches_no_weight(scans):
    model = Chain(lambda x: (x * 0).sqrt())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    said = (
        r"gradient of 'model' is not finite, though its loss is\. It begins at the gradient of first\.\w+ \(Linear\); "
        r"nearer to the loss, at last\.\w+ \(Linear\), it is finite\. Look for a square root"
    )
    with pytest.raises(TrainingError, match=said):
        fit(model, scans[0], None, FitConfig(images=8, **QUICK))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_distribution_that_refuses_is_diagnosed_and_other_refusals_pass(scans):
    def drawn(x: Tensor) -> Tensor:
        return Normal(x, 1.0, validate_args=True).rsample()

    model = Chain(drawn)
    model.first = Divides(model.first)
    with pytest.raises(TrainingError, match=r"layer first \(Divides\)") as told:
        fit(model, scans[0], None, FitConfig(images=8, **QUICK))
    assert isinstance(told.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="GreaterThan"):
        fit(Chain(lambda x: Normal(x, -1.0, validate_args=True).mean), scans[0], None, FitConfig(images=8, **QUICK))


def test_scans_that_are_not_finite_are_named():
    model, x = Chain(), torch.zeros(3, 1, 8, 8, 8)
    x[1, 0, 0, 0, 0] = math.inf
    batch = Batch(x, cases=("one", "two", "three"))
    error = diagnosed(model, batch, Player("model", ()), lambda: model(batch), seen=12_000)
    assert "After 12,000 images the loss of 'model' is not finite; the term at fault: square." in str(error)
    assert "not finite: two; leave them out" in str(error)


def test_only_the_terms_at_fault_are_named():
    model, batch = Chain(), Batch(torch.zeros(2, 1, 8, 8, 8))
    bad, good = torch.tensor([1.0, math.inf]), torch.zeros(2)
    for loss, fault in (
        (Loss(bad + good, {"a": good, "b": bad}), "'critic' is not finite; the term at fault: b. Every layer gives"),
        (Loss(bad, {"a": good}), "the term at fault: total."),
    ):
        assert fault in str(diagnosed(model, batch, Player("critic", ()), lambda loss=loss: loss, seen=0))
    assert diagnosed(model, batch, Player("critic", ()), lambda: model(batch), seen=0) is None


# -- a family whose course is known beforehand ---------------------------------------------------------


class Scripted(Model):
    """Losses and pulses are functions of how far training is; training moves one number."""

    class Config(ModelConfig):
        kind: Literal["scripted"] = "scripted"

    def __init__(self, **scripts: Callable[[float], object]) -> None:
        super().__init__()
        self.config, self.scripts = Scripted.Config(shape=(8, 8, 8)), scripts
        self.weight = nn.Parameter(torch.zeros(1))
        self.weights: list[float] = []

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        self.weights.append(float(self.weight.detach()))
        level = self.scripts.get("loss", lambda way: -way)(self.progress)
        pull = self.scripts.get("slope", lambda way: 1.0)(self.progress) * (self.weight - self.weight.detach())
        total = (level - pull).expand(len(batch.x)) * batch.x[0].numel()
        return Loss(total, {"pull": total})

    def validation_loss(self, batch: Batch) -> Tensor:
        level = self.scripts.get("held", lambda way: -way)(self.progress)
        return torch.full((len(batch.x),), float(level)) * batch.x[0].numel()

    def pulse(self, batch: Batch) -> dict[str, float]:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert len(batch.x) == 12  # four held-out scans are too few
        return self.scripts.get("pulse", lambda way: {})(self.progress)


COURSE = FitConfig(images=400, batch_size=4, validations=20, patience=100, warmup=0, ema=1, weight_decay=0)


@pytest.mark.parametrize(
    "scripts",
    [
        {},
        {"pulse": lambda way: {"variety": 0.9, "coverage": 0.6, "real_above": 0.7}},
        # What settles within a fifth of the run is none: nothing but noise is generated at first.
        {"pulse": lambda way: {"variety": min(0.8, 4 * way), "coverage": way / 2, "real_above": 1.0 - way}},
        # One bad validation is none, either; nor is coverage that never was much.
        {"pulse": lambda way: {"variety": 0.05 if 0.5 < way < 0.55 else 0.6, "coverage": 0.1 + 0.1 * way}},
        # The losses of players who chase each other say nothing.
        {"loss": lambda way: 9.0 * way, "held": lambda way: way, "pulse": lambda way: {"real_above": 0.6}},
    ],
)
def test_a_healthy_course_is_silent(scans, scripts):
    done, said = heard(Scripted(**scripts), *scans, COURSE)
    assert said == done.warnings == done.remedies == []
    assert len(done.pulses) == len(done.history) == 20


def test_a_healthy_vae_is_silent_with_the_same_weights_whatever_remedies_are_allowed(scans):
    models = []
    for remedies in (0, 3):
        model = vae((8, 8, 8))
        config = FitConfig(images=400, remedies=remedies, patience=100, **QUICK)
        done, said = heard(model, *scans, config)
        assert said == done.warnings == done.remedies == done.pulses == []
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize(
    ("scripts", "trouble", "cure"),
    [
        ({"pulse": lambda way: {"variety": 0.9 - way}}, "Mode collapse: .* nearly all alike", "model.r1"),
        ({"pulse": lambda way: {"variety": 0.01}}, "Mode collapse: .* nearly all alike", "fit.learning_rate"),
        (
            {"pulse": lambda way: {"variety": 0.5, "coverage": 0.6 if way < 0.5 else 0.1}},
            "Mode collapse: after 240 images .* cover 10% of the real ones, at best it was 60%",
            "model.diffaugment",
        ),
        (
            {"pulse": lambda way: {"real_above": 0.7 if way < 0.5 else 1.0}},
            "Critic saturation: after 260 ",
            "penalties",
        ),
        (
            {"loss": lambda way: 1.0 if way < 0.6 else 1e3},
            "Divergence: .* 1e\\+03 .* start it was 1",
            "fit.warmup",
        ),
        ({"held": lambda way: 0.5}, "No progress: after 200 images .* the first 20 ", "raise fit.learning_rate"),
        ({"held": lambda way: way}, "No progress: .* was -0.04 then and is -0.49", "learned by heart"),
        ({"held": lambda way: math.nan}, "loss of held-out scans is not finite", "held-out scans"),
    ],
)
def test_every_trouble_is_told_once_with_what_to_do(scans, scripts, trouble, cure):
    done, said = heard(Scripted(**scripts), *scans, COURSE)
    (sentence,) = said
    assert done.warnings == said
    assert sentence[0].isupper()
    assert sentence.endswith((".", "smaller."))
    assert re.search(trouble, sentence), sentence
    assert cure in sentence


def test_a_learning_rate_too_low_for_anything_is_told(scans):
    config = FitConfig(images=400, learning_rate=1e-12, batch_size=4, precision="float32", warmup=8, ema=20)
    _, (sentence,) = heard(vae((8, 8, 8)), *scans, config)
    assert sentence.startswith("No progress")


# -- remedies ------------------------------------------------------------------------------------------


def test_a_remedy_goes_back_to_the_best_weights_at_half_the_learning_rate(scans):
    # While modes collapse the weight goes the other way, which AdamW shall not remember either.
    model = Scripted(
        pulse=lambda way: {"variety": 0.9 if way < 0.5 or way > 0.6 else 0.0},
        slope=lambda way: -1.0 if 0.5 <= way < 0.6 else 1.0,
    )
    done, (said,) = heard(model, *scans, COURSE.model_copy(update={"remedies": 2}))
    assert done.remedies == [(240, "mode collapse")]
    assert done.warnings == []
    assert "Remedy 1 of 2: training goes on from the weights of after 200 images, at half the learning" in said
    step = 240 // 4
    best, weights = model.weights[200 // 4], model.weights
    assert weights[step - 1] != pytest.approx(best, abs=5e-4)
    assert weights[step] == pytest.approx(best, abs=1e-4)  # the collapsed ones are forgotten
    rate = 1e-3 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * 240 / 400)))
    assert weights[step + 1] - weights[step] == pytest.approx(rate / 2, rel=0.01)  # AdamW's first step


def test_without_held_out_scans_ailing_weights_are_none_to_go_back_to(scans):
    model = Scripted(loss=lambda way: 1.0 if way < 0.5 else 1e3)
    done, said = heard(model, scans[0], None, COURSE.model_copy(update={"remedies": 1}))
    assert done.remedies == [(240, "divergence")]
    assert "from the weights of after 200 images" in said[0]


def test_remedies_are_bounded_and_the_trouble_is_told_then(scans):
    model = Scripted(pulse=lambda way: {"variety": 0.9 if way < 0.3 else 0.0})
    done, said = heard(model, *scans, COURSE.model_copy(update={"remedies": 2}))
    assert [trouble for _, trouble in done.remedies] == ["mode collapse"] * 2
    assert len(said) == 3
    assert done.warnings == [said[-1]]
    assert "Remedy" not in said[-1]
    assert done.finished


def ill(at: tuple[int, ...]) -> Model:
    """A VAE whose code is not finite in the steps after `at` images of 48."""
    model = vae((8, 8, 8), code="map")
    model.to_code = Divides(model.to_code, lambda: model.training and round(48 * model.progress) in at)
    return model


def test_a_loss_that_is_not_finite_is_remedied_as_often_as_asked(scans):
    config = FitConfig(images=48, validations=6, remedies=2, **QUICK)
    done, said = heard(ill((12, 28)), *scans, config)
    assert done.remedies == [(12, "a loss that is not finite"), (28, "a loss that is not finite")]
    assert ["to_code (Divides)" in one for one in said] == [True, True]
    assert done.seen == 48
    with pytest.raises(TrainingError, match="After 36 images"):
        fit(ill((12, 28, 36)), *scans, config)
    with pytest.raises(TrainingError, match="After 12 images"):
        fit(ill((12, 28)), *scans, config.model_copy(update={"remedies": 0}))


@pytest.mark.parametrize("at", [12, 16, 28, 40])
def test_a_remedied_run_that_was_interrupted_ends_with_the_same_weights(scans, tmp_path, at):
    config = FitConfig(images=48, validations=6, remedies=2, **QUICK)
    whole, again = ill((12, 28)), ill((12, 28))
    expected = fit(whole, *scans, config, seed=3)
    with reporting(CtrlC(at)), pytest.raises(KeyboardInterrupt):
        fit(ill((12, 28)), *scans, config, seed=3, state_folder=tmp_path)
    resumed = fit(again, *scans, config, seed=3, state_folder=tmp_path)
    assert same(whole, again)
    assert resumed.remedies == expected.remedies
    assert json.dumps(resumed.history) == json.dumps(expected.history)  # NaN equals NaN here


@pytest.mark.parametrize("at", [180, 240, 260])
def test_a_run_that_was_interrupted_tells_its_troubles_once(scans, tmp_path, at):
    def collapsing() -> Model:
        return Scripted(pulse=lambda way: {"variety": 0.9 if way < 0.5 else 0.0})

    whole, again, listener = collapsing(), collapsing(), CtrlC(at)
    expected = fit(whole, *scans, COURSE)
    with reporting(listener), pytest.raises(KeyboardInterrupt):
        fit(collapsing(), *scans, COURSE, state_folder=tmp_path)
    listener.times = 0
    with reporting(listener):
        resumed = fit(again, *scans, COURSE, state_folder=tmp_path)
    assert same(whole, again)
    assert resumed.pulses == expected.pulses
    assert resumed.warnings == expected.warnings
    assert sum("Mode collapse" in said for said in listener.notes) == 1


def test_a_state_that_knows_nothing_of_troubles_still_loads(tmp_path):
    save_state(tmp_path, {"w": torch.ones(1)}, Progress(seen=8, history=[(8, 1.0, 2.0)]), {})
    place = tmp_path / "state" / "progress.json"
    told = json.loads(place.read_text())
    for name in ("began", "start", "pulses", "told", "warnings", "remedies"):
        del told["progress"][name]
    place.write_text(json.dumps(told))
    assert load_state(tmp_path, {})[1] == Progress(seen=8, history=[(8, 1.0, 2.0)])


def test_what_the_doctor_said_is_in_the_bundle(heads: Path, tmp_path):
    import medgen

    overrides = ["fit.images=160", "fit.batch_size=4", "fit.learning_rate=1e-12", "fit.warmup=0", "max_voxels=8000"]
    overrides += ["model.width=4"]
    listener = CtrlC(10**9)
    with reporting(listener):
        place = medgen.train(heads, tmp_path / "bundle", preset="vae3d", overrides=overrides, minutes=None)
    training = json.loads((place / "bundle.json").read_text())["training"]
    found = [said for said in listener.notes if said.startswith("No progress")]
    assert len(found) == 1
    assert found[0] in training["warnings"]
    assert training["remedies"] == training["pulses"] == []
    assert found[0] in (place / "README.md").read_text()
