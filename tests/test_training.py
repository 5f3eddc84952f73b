"""Training: the same weights whether interrupted or not, and the best of them kept."""

import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medgen.data.dataset import Batch, ScanDataset
from medgen.data.manifest import index
from medgen.data.motion import Affine, Flip, Noise
from medgen.data.recipe import CropOrPad, Orient, Percentiles, Recipe, Window
from medgen.errors import TrainingError
from medgen.log import reporting
from medgen.models import build, config_of
from medgen.models.base import Loss, Model, ModelConfig, Player
from medgen.training.ema import MovingAverage
from medgen.training.fit import FitConfig, fit
from medgen.training.pace import images_in
from medgen.training.state import Progress, load_state, save_state

QUICK = {"batch_size": 4, "precision": "float32", "warmup": 8, "ema": 20}


@pytest.fixture(scope="module")
def volumes(heads: Path) -> tuple[ScanDataset, ScanDataset]:
    """Twelve training and four validation heads of 8 x 8 x 8 voxels."""
    manifest = index(heads)
    recipe = Recipe(steps=(Orient(), CropOrPad(shape=(8, 8, 8)), Percentiles()))
    rows = manifest.rows
    parts = [type(manifest)(rows[part], (), manifest.root) for part in (slice(0, 12), slice(12, 16))]
    return ScanDataset(parts[0], recipe), ScanDataset(parts[1], recipe)


@pytest.fixture(scope="module")
def images(xrays: Path) -> tuple[ScanDataset, ScanDataset]:
    """Radiographs of two classes, 16 x 16 pixels."""
    manifest = index(xrays)
    recipe = Recipe(steps=(CropOrPad(shape=(16, 16, 1)), Window(low=0, high=255)))
    parts = [type(manifest)(manifest.rows[part], (), manifest.root) for part in (slice(0, 30), slice(30, 36))]
    first, second = (ScanDataset(part, recipe, classes=("normal", "opacity")) for part in parts)
    return first, second


def vae(shape: tuple[int, ...], **changes: object) -> Model:
    torch.manual_seed(0)
    values = {"kind": "vae", "shape": shape, "width": 4, "levels": 1, "latent": 3} | changes
    return build(config_of(values))


class CtrlC:
    """A reporter that presses Ctrl-C `times` when so many images have been seen."""

    def __init__(self, at: int, times: int = 1) -> None:
        self.at, self.times, self.seen, self.notes = at, times, 0, []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, what: str, total: float | int | None) -> object:
        return what

    def advance(self, handle: object, amount: float | int, text: str) -> None:
        self.seen += int(amount)
        if self.seen >= self.at and self.times:
            presses, self.times = self.times, 0
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    def stop(self, handle: object) -> None:
        pass


def same(one: Model, other: Model) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [4, 20, 28, 40])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(volumes, tmp_path, at):
    train, val = volumes
    config = FitConfig(images=40, validations=5, augment=(Flip(), Affine(), Noise()), **QUICK)
    whole = vae((8, 8, 8), code="map")
    finished = fit(whole, train, val, config, seed=3)
    halved = vae((8, 8, 8), code="map")
    reporter = CtrlC(at)
    with reporting(reporter), pytest.raises(KeyboardInterrupt):
        fit(halved, train, val, config, seed=3, state_folder=tmp_path)
    assert any("same command again" in said for said in reporter.notes)
    again = vae((8, 8, 8), code="map")
    with torch.no_grad():
        again.template.add_(1.0)  # whatever it begins with, the state decides
    resumed = fit(again, train, val, config, seed=3, state_folder=tmp_path)
    assert same(whole, again)
    assert resumed.history == finished.history
    assert resumed.seen == finished.seen == 40


def test_many_interruptions_with_classes_and_images_change_nothing(images, tmp_path):
    train, val = images
    config = FitConfig(images=32, validations=4, augment=(Noise(),), **QUICK)
    whole = vae((16, 16), classes=("normal", "opacity"))
    fit(whole, train, val, config, seed=1)
    for _ in range(3):
        with reporting(CtrlC(8)), pytest.raises(KeyboardInterrupt):
            fit(vae((16, 16), classes=("normal", "opacity")), train, val, config, seed=1, state_folder=tmp_path)
    again = vae((16, 16), classes=("normal", "opacity"))
    fit(again, train, val, config, seed=1, state_folder=tmp_path)
    assert same(whole, again)


def test_the_seed_and_nothing_else_decides_the_weights(volumes):
    config = FitConfig(images=16, **QUICK)
    weights = []
    for seed, disturbance in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(0)
        model = vae((8, 8, 8))
        torch.manual_seed(disturbance)
        fit(model, volumes[0], None, config, seed=seed)
        weights.append(model)
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


def test_bfloat16_repeats_itself_even_on_the_smallest_maps(volumes):
    config = FitConfig(images=24, batch_size=4, precision="bfloat16", warmup=8)
    models = [vae((8, 8, 8), levels=2) for _ in range(2)]
    for model in models:
        fit(model, volumes[0], None, config)
    assert same(*models)


def test_training_leaves_random_state_and_signals_as_they_were(volumes):
    handler = signal.getsignal(signal.SIGINT)
    model = vae((8, 8, 8))
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    fit(model, volumes[0], None, FitConfig(images=8, **QUICK))
    assert torch.equal(torch.rand(2), expected)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_state_of_other_settings_is_refused_by_name(volumes, tmp_path):
    config = FitConfig(images=40, **QUICK)
    with reporting(CtrlC(8)), pytest.raises(KeyboardInterrupt):
        fit(vae((8, 8, 8)), volumes[0], None, config, state_folder=tmp_path)
    for changed, model, seed in (
        (config.model_copy(update={"learning_rate": 0.1}), vae((8, 8, 8)), 0),
        (config, vae((8, 8, 8), latent=5), 0),
        (config, vae((8, 8, 8)), 1),
    ):
        with pytest.raises(TrainingError, match="other settings"):
            fit(model, volumes[0], None, changed, seed=seed, state_folder=tmp_path)
    fit(vae((8, 8, 8)), volumes[0], None, config, state_folder=tmp_path)


def test_a_second_ctrl_c_does_not_wait_and_costs_only_what_was_not_saved(volumes, tmp_path):
    config = FitConfig(images=40, **QUICK)
    with reporting(CtrlC(8)), pytest.raises(KeyboardInterrupt):
        fit(vae((8, 8, 8)), volumes[0], None, config, state_folder=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # Now twice at once, before the step could end: the state is the one of before, and whole.
    with reporting(CtrlC(12, times=2)), pytest.raises(KeyboardInterrupt):
        fit(vae((8, 8, 8)), volumes[0], None, config, state_folder=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    whole, again = vae((8, 8, 8)), vae((8, 8, 8))
    fit(whole, volumes[0], None, config)
    fit(again, volumes[0], None, config, state_folder=tmp_path)
    assert same(whole, again)


def test_ctrl_c_without_a_state_folder_still_stops(volumes):
    with reporting(CtrlC(8)), pytest.raises(KeyboardInterrupt):
        fit(vae((8, 8, 8)), volumes[0], None, FitConfig(images=400, **QUICK))


def test_a_damaged_state_is_refused_in_a_sentence(tmp_path):
    facts = {"seed": 0}
    save_state(tmp_path, {"model.w": torch.ones(3)}, Progress(seen=8), facts)
    tensors, progress = load_state(tmp_path, facts)
    assert torch.equal(tensors["model.w"], torch.ones(3))
    assert progress.seen == 8
    for name, content in (("tensors.safetensors", b"\0\1\2"), ("progress.json", b"{")):
        path = tmp_path / "state" / name
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(TrainingError, match="damaged"):
            load_state(tmp_path, facts)
        path.write_bytes(before)
    assert load_state(tmp_path / "elsewhere", facts) is None


def test_training_works_outside_the_main_thread(volumes):
    done: list[int] = []

    def run() -> None:
        done.append(fit(vae((8, 8, 8)), volumes[0], None, FitConfig(images=8, **QUICK)).seen)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [8]


def test_training_ends_when_its_time_is_up(volumes):
    train, val = volumes
    config = FitConfig(images=400_000, batch_size=4, validations=50_000, patience=10**6, precision="float32")
    model = vae((8, 8, 8))
    progress = fit(model, train, val, config, seconds=0.5)
    assert progress.finished
    assert 0 < progress.seen < 400_000
    assert progress.seconds < 20
    assert not model.training


# -- a model simple enough to know every weight ------------------------------------------------------


class Toy(Model):
    """One number a player; training pulls each to 1, validation likes 0.3 best."""

    class Config(ModelConfig):
        kind: Literal["toy"] = "toy"
        wrong: str = ""

    def __init__(self, config: "Toy.Config") -> None:
        super().__init__()
        self.config = config
        self.one, self.two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.calls: list[tuple[str, int]] = []
        self.turns: tuple[Player, ...] = (Player("one", (self.one,)), Player("two", (self.two,)))

    def players(self) -> list[Player]:
        return list(self.turns)

    def forward(self, batch: Batch, player: str = "one") -> Loss:
        weight = {"one": self.one, "two": self.two}[player]
        if self.training:
            self.steps += 1
            self.calls.append((player, int(self.steps)))
        goal = 1.0 if self.training else 0.3
        pull = (weight - goal).square().expand(len(batch.x)) * batch.x[0].numel()
        terms = {"pull": pull, "other": torch.zeros_like(pull)}
        if self.config.wrong:
            terms[self.config.wrong] = terms[self.config.wrong] / 0 * 0
        if self.config.wrong == "memory":
            raise torch.OutOfMemoryError("no more")
        return Loss(sum(terms.values()), terms)


def toy(wrong: str = "") -> Toy:
    return Toy(Toy.Config(shape=(8, 8, 8), wrong=wrong))


def test_when_the_time_is_up_every_stage_has_had_its_part(volumes):
    """A prior over codes that never gets its turn would draw nothing but noise."""
    model = toy()
    model.turns = (Player("one", (model.one,), until=0.5), Player("two", (model.two,), since=0.5))
    config = FitConfig(images=400, validations=20, patience=100, **QUICK)
    progress = fit(model, volumes[0], None, config, seconds=1e-6)
    trained = [name for name, _ in model.calls]
    assert trained == ["one"] * (len(trained) // 2) + ["two"] * (len(trained) // 2)
    assert len(trained) * config.batch_size == progress.trained < 100
    assert progress.seen - progress.skipped == progress.trained
    assert progress.finished


def test_the_time_of_every_stage_counts_towards_the_images_planned(volumes):
    """Whoever is slow in the second half is slow for half of the images."""

    class Slow(Toy):
        def forward(self, batch: Batch, player: str = "one") -> Loss:
            time.sleep(0.05 if player == "two" else 0.0)
            return super().forward(batch, player)

    model = Slow(Toy.Config(shape=(8, 8, 8)))
    config = FitConfig(images=400, **QUICK)
    _, both = images_in(1, model, volumes[0], config, device="cpu")
    model.turns = (Player("one", (model.one,), until=0.5), Player("two", (model.two,), since=0.5))
    _, half = images_in(1, model, volumes[0], config, device="cpu")
    assert half == pytest.approx(both / 2, rel=0.3)
    assert half > 0.5 * 0.05 / config.batch_size


@pytest.mark.parametrize("wrong", ["pull", "other"])
def test_a_loss_that_is_not_finite_is_refused_with_the_name_of_its_term(volumes, wrong):
    with pytest.raises(TrainingError, match=rf"After 0 images.*'one'.*at fault: {wrong}\."):
        fit(toy(wrong), volumes[0], None, FitConfig(images=8, **QUICK))


def test_memory_that_runs_out_is_a_sentence(volumes):
    model = toy()
    model.forward = lambda batch, player: (_ for _ in ()).throw(torch.OutOfMemoryError("no more"))
    with pytest.raises(TrainingError, match=r"Memory ran out with 4 scans of \(1, 8, 8, 8\)"):
        fit(model, volumes[0], None, FitConfig(images=8, **QUICK))


def test_training_stops_when_held_out_scans_get_no_better_and_keeps_the_best(volumes):
    train, val = volumes
    model = toy()
    config = FitConfig(
        images=4000, batch_size=4, validations=500, patience=3, learning_rate=0.02, warmup=0, ema=1, weight_decay=0
    )
    listener = CtrlC(10**9)
    with reporting(listener):
        progress = fit(model, train, val, config)
    assert progress.seen < 1000
    assert progress.stale == 3
    assert progress.best_seen == progress.seen - 3 * 8
    assert progress.history[-1][0] == progress.seen
    assert abs(float(model.one.detach()) - 0.3) < 0.05
    assert progress.best == pytest.approx((float(model.one.detach()) - 0.3) ** 2, abs=1e-6)
    assert any("Stopped early" in said for said in listener.notes)
    assert not model.training


def test_without_validation_the_average_of_the_end_is_kept(volumes):
    train, _ = volumes
    model = toy()
    live: list[float] = []
    forward = model.forward

    def remembering(batch: Batch, player: str) -> Loss:
        live.append(float(model.one.detach()))
        return forward(batch, player)

    model.forward = remembering
    model.turns = (Player("one", (model.one,)),)
    config = FitConfig(images=40, batch_size=4, learning_rate=0.05, warmup=0, ema=16, weight_decay=0)
    fit(model, train, None, config)
    # The averages of the weights after each step: the last one shows by what the averaged end implies.
    average, seen = 0.0, 0
    for weight in live[1:]:
        seen += 4
        decay = 0.5 ** (4 / min(16, max(1.0, 0.1 * seen)))
        average = decay * average + (1 - decay) * weight
    assert 0 < average < live[-1]
    # One more step, whose weight nobody saw, lies between the last two averages and weights.
    assert average < float(model.one.detach()) < live[-1] + 0.05


def test_players_take_turns_and_stages(volumes):
    model = toy()
    model.turns = (
        Player("one", (model.one,), until=24),
        Player("two", (model.two,), since=12, every=2),
    )
    fit(model, volumes[0], None, FitConfig(images=40, **QUICK))
    assert [player for player, _ in model.calls].count("one") == 6  # images 0 to 20
    assert [player for player, _ in model.calls].count("two") == 3  # images 16, 24, 32
    assert float(model.one.detach()) > 0
    assert float(model.two.detach()) > 0


def test_a_player_moves_no_weight_but_its_own(volumes):
    model = toy()
    model.turns = (Player("one", (model.one,)),)
    fit(model, volumes[0], None, FitConfig(images=40, **QUICK))
    assert float(model.two.detach()) == 0


def test_the_schedule_rises_and_falls(volumes):
    """The distance of one step is the learning rate: AdamW's first steps have unit size."""
    model = toy()
    model.turns = (Player("one", (model.one,)),)
    weights = []
    forward = model.forward
    model.forward = lambda batch, player: (weights.append(float(model.one.detach())), forward(batch, player))[1]
    config = FitConfig(images=400, batch_size=4, learning_rate=1e-4, warmup=100, weight_decay=0)
    fit(model, volumes[0], None, config)
    steps = [b - a for a, b in pairwise(weights)]
    assert steps[0] == pytest.approx(1e-4 * 4 / 100, rel=0.05)
    assert max(steps) == pytest.approx(1e-4, rel=0.15)
    assert 15 < steps.index(max(steps)) < 50
    assert steps[-1] < 0.05 * max(steps)


# -- parts -------------------------------------------------------------------------------------------


def test_the_moving_average_halves_a_weight_s_influence_in_its_half_life():
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    average = MovingAverage(module, half_life=100)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for _ in range(10):
        average.update(module, images=10, seen=10_000)
    assert float(average.weights["weight"]) == pytest.approx(0.5)


def test_early_weights_do_not_linger_in_the_average():
    module = nn.Linear(1, 1, bias=False)
    average = MovingAverage(module, half_life=10**9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for step in range(100):
        average.update(module, images=10, seen=10 * (step + 1))
    assert float(average.weights["weight"]) == pytest.approx(1.0, abs=0.01)


def test_whole_numbers_are_copied_into_the_average():
    module = nn.BatchNorm1d(2)
    average = MovingAverage(module, half_life=100)
    module.num_batches_tracked += 7
    average.update(module, images=10, seen=1000)
    assert int(average.weights["num_batches_tracked"]) == 7


def test_trying_how_fast_training_is_changes_nothing(volumes):
    model = vae((8, 8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    possible, seconds = images_in(0.1, model, volumes[0], FitConfig(**QUICK), device="cpu")
    assert possible >= 4
    assert seconds > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "wrong", [{"images": 0}, {"batch_size": 0}, {"learning_rate": -1}, {"precision": "half"}, {"epochs": 3}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        FitConfig.model_validate(wrong)
