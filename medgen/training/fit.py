"""Train any model: `forward(batch, player)` is the loss, images seen are the clock."""

import copy
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from medgen.data.dataset import Batch, Draws, ScanDataset, collate, loader
from medgen.data.motion import Augment
from medgen.errors import TrainingError
from medgen.log import note, progress
from medgen.models.base import Loss, Model, Player
from medgen.seeds import derived_seed
from medgen.training.ema import MovingAverage
from medgen.training.fabric import fabric_for
from medgen.training.spans import active, last_stage, placed, schedule, stage, stage_end
from medgen.training.state import Progress, load_state, optimizer_tensors, restore_optimizer, save_state

# Which stream of randomness a seed is for; the numbers are arbitrary and fixed.
_NOISE, _VALIDATION = 3, 4


class FitConfig(BaseModel):
    """How to train.

    Args:
        images: images to see at most.
        batch_size: images a step, over all devices together.
        learning_rate: of AdamW at its peak; it warms up, then falls along a cosine.
        warmup: images over which it rises.
        weight_decay: of AdamW.
        momentum: of AdamW (beta 1); 0 for two players whose losses chase each other.
        memory: of AdamW for squared gradients (beta 2).
        grad_clip: largest gradient norm, with the loss in nats a voxel.
        ema: half-life of the moving average of weights, images; the average is what is kept.
        validations: how often the held-out loss is measured.
        patience: validations without improvement after which training stops.
        precision: 'auto' computes in bfloat16 where the machine does it natively and the model gains by it.
        augment: random transforms of training scans.
        workers: processes that draw and augment scans; 0 does it in this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(default=30_000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=500, ge=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    memory: float = Field(default=0.99, gt=0, lt=1)
    grad_clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=1000, gt=0)
    validations: int = Field(default=20, ge=1)
    patience: int = Field(default=6, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    augment: tuple[Augment, ...] = ()
    workers: int = Field(default=0, ge=0)


def fit(
    model: Model,
    train: ScanDataset,
    val: ScanDataset | None,
    config: FitConfig,
    *,
    seed: int = 0,
    device: str = "auto",
    state_folder: Path | None = None,
    seconds: float | None = None,
) -> Progress:
    """Train `model` in place; it ends with the averaged weights of the best validation.

    The seed and the images seen decide all randomness, so a run that was interrupted and goes on
    from `state_folder` ends with the same weights as one that was not.

    Args:
        model: any family.
        train: what to learn from.
        val: what to stop on; None trains to the end.
        config: how.
        seed: of data order, augmentation and noise.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        state_folder: where to keep the state for resuming; None keeps none.
        seconds: training time, all sessions together, after which the next validation is the last.

    Raises:
        TrainingError: a loss is not finite (the message names its term), or memory ran out.
        KeyboardInterrupt: Ctrl-C; the state was saved at the end of the running step.
    """
    if not model.players():  # all of it has a closed form, which `finalise` finds
        return Progress(finished=True)
    run = _Run(model, train, val, config, seed=seed, device=device, state_folder=state_folder)
    try:
        run.train(seconds)
    except RuntimeError as error:  # CUDA's is a subclass, the CPU's is told by its words alone
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"Memory ran out with {config.batch_size} scans of {tuple(train[0]['x'].shape)} a step. "
            "Pass a smaller --set fit.batch_size, or a smaller --set max_voxels."
        ) from error
    return run.progress


class _Run:
    def __init__(
        self,
        model: Model,
        train: ScanDataset,
        val: ScanDataset | None,
        config: FitConfig,
        *,
        seed: int,
        device: str,
        state_folder: Path | None,
    ) -> None:
        self.model, self.data, self.val, self.config, self.seed = model, train, val, config, seed
        self.folder = state_folder
        self.draws = Draws(train, config.augment, seed=seed)
        self.fabric = fabric_for(device, config.precision, mixed=model.mixed_precision_pays)
        self.facts = {"fit": config.model_dump(), "model": model.config.model_dump(), "seed": seed, "scans": len(train)}
        saved = load_state(state_folder, self.facts) if state_folder else None
        if saved is None:
            model.to(self.fabric.device)
            model.initialise(_first(train, 64).to(self.fabric.device))
        self.players = placed(model.players(), config.images, config.batch_size)
        betas, decay = (config.momentum, config.memory), config.weight_decay
        optimizers = [
            torch.optim.AdamW(p.parameters, config.learning_rate, betas, weight_decay=decay, fused=True)
            for p in self.players
        ]
        self.module, *self.optimizers = self.fabric.setup(model, *optimizers)
        self.average = MovingAverage(model, config.ema)
        self.best = {name: tensor.clone() for name, tensor in self.average.weights.items()}
        self.progress = Progress()
        if saved:
            self._restore(*saved)

    # -- the loop ------------------------------------------------------------------------------

    def train(self, seconds: float | None) -> None:
        """Until the images are seen, validation says enough, or `seconds` of training are over."""
        config, done = self.config, self.progress
        before_this, began = done.seconds, time.monotonic()
        every = max(config.batch_size, config.images // config.validations)
        started, saved_at = time.monotonic(), time.monotonic()
        with _interruption() as interrupted, progress("Training (images seen)", config.images) as bar:
            bar.advance(done.seen)
            batches = self._batches()
            while not done.finished:
                batch = next(batches)
                before, loss = done.seen, self._step(batch)
                done.seen += config.batch_size
                self.average.update(self.model, images=config.batch_size, seen=done.seen)
                if done.seen // every > before // every or done.seen >= config.images:
                    self._validate(loss)
                    if self._time_is_up(before_this + time.monotonic() - began, seconds):
                        batches = self._batches()
                if not done.finished and stage(self.players, before) != stage(self.players, done.seen):
                    self._begin_stage(before, loss)
                bar.advance(done.seen - before, f"loss {loss:.4g}")
                clock = time.monotonic()
                if self.folder and (interrupted.is_set() or clock - saved_at > 60):
                    done.seconds, started, saved_at = done.seconds + clock - started, clock, clock
                    self._save(self.folder)
                if interrupted.is_set():
                    note("Interrupted. Run the same command again to go on from here.")
                    raise KeyboardInterrupt
        done.seconds += time.monotonic() - started
        self.model.load_state_dict(self.best)
        self.model.eval()
        self.model.progress = 1.0

    def _batches(self) -> Iterator[Batch]:
        batch = self.config.batch_size
        per_rank = max(1, batch // self.fabric.world_size)
        passes = math.ceil(self.config.images / batch) * batch + batch
        which = range(self.progress.seen + self.fabric.global_rank, passes, self.fabric.world_size)
        for found in loader(self.draws, which, per_rank, workers=self.config.workers):
            yield found.to(self.fabric.device)

    def _step(self, batch: Batch) -> float:
        """One update of every active player; returns the first one's loss, nats a voxel."""
        config, seen, shown = self.config, self.progress.seen, []
        self.model.train()
        self.model.progress = seen / config.images
        for player, optimizer in zip(self.players, self.optimizers, strict=True):
            if not active(player, seen, config.batch_size):
                continue
            rate = schedule(player, seen, config.images, config.warmup, config.batch_size)
            for group in optimizer.param_groups:
                group["lr"] = rate * config.learning_rate
            with _seeded(derived_seed(self.seed, _NOISE, seen, self.fabric.global_rank), self.fabric.device):
                loss: Loss = self.module(batch, player.name)
            check_finite(loss, player, seen)
            total = loss.total.mean() / batch.x[0].numel()
            optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(total)
            nn.utils.clip_grad_norm_(player.parameters, config.grad_clip)
            optimizer.step()
            shown.append(float(total.detach()))
        return shown[0] if shown else math.nan

    def _validate(self, train_loss: float) -> None:
        done = self.progress
        held = train_loss if self.val is None else self._held_out_loss(self.val)
        done.history.append((done.seen, train_loss, held))
        if self.val is None or held < done.best:
            done.best, done.best_seen, done.stale = held, done.seen, 0
            self.best = {name: tensor.clone() for name, tensor in self.average.weights.items()}
        else:
            done.stale += 1
        enough = done.stale >= self.config.patience and last_stage(self.players, done.seen)
        if enough:
            note(f"Stopped early after {done.seen:,} images: no better on held-out scans since {done.best_seen:,}.")
        done.finished = done.seen >= self.config.images or enough

    def _begin_stage(self, before: int, train_loss: float) -> None:
        """Go on from the best weights so far, which those whose time begins may look at; the best is sought anew."""
        done, now = self.progress, stage(self.players, self.progress.seen)
        if not done.history or done.history[-1][0] != done.seen:
            self._validate(train_loss)
        self.model.load_state_dict(self.best)
        self.model.eval()
        for name in now:
            if name not in stage(self.players, before):
                self.model.begin(name, _first(self.data, 64).to(self.fabric.device))
        self.average = MovingAverage(self.model, self.config.ema)
        done.best, done.best_seen, done.stale = math.inf, done.seen, 0
        note(f"After {done.seen:,} images: training {', '.join(now)}.")

    def _time_is_up(self, spent: float, seconds: float | None) -> bool:
        """Stop when the time is up: a machine that became busy must not take hours instead of minutes.

        A stage has its part of the time; when that is up the next one begins, which is told by True.
        """
        done, images = self.progress, self.config.images
        end = stage_end(self.players, done.seen, images)
        if seconds is None or done.finished or spent <= seconds * end / images:
            return False
        if end >= images:
            done.finished = True
            note(f"Stopped after {done.trained:,} of {images:,} images: the training time is up.")
            return False
        done.skipped += end - done.seen
        done.seen = end
        return True

    @torch.no_grad()
    def _held_out_loss(self, val: ScanDataset) -> float:
        """Mean loss of the averaged weights on validation scans, with the same noise every time."""
        live = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.weights)
        self.model.eval()
        total = count = 0.0
        with _seeded(derived_seed(self.seed, _VALIDATION), self.fabric.device):
            for batch in val.batches(self.config.batch_size):
                moved = batch.to(self.fabric.device)
                with self.fabric.autocast():
                    total += float(self.model.validation_loss(moved).sum()) / batch.x[0].numel()
                count += len(batch.x)
        self.model.load_state_dict(live)
        return total / count

    # -- resuming ------------------------------------------------------------------------------

    def _save(self, folder: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for prefix, weights in (
            ("model", self.model.state_dict()),
            ("average", self.average.weights),
            ("best", self.best),
        ):
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
        for player, optimizer in zip(self.players, self.optimizers, strict=True):
            tensors |= optimizer_tensors(optimizer.optimizer, f"optimizer.{player.name}")
        if self.fabric.is_global_zero:
            save_state(folder, tensors, self.progress, self.facts)

    def _restore(self, tensors: dict[str, Tensor], saved: Progress) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            device = self.fabric.device
            return {
                k.removeprefix(f"{prefix}."): t.to(device) for k, t in tensors.items() if k.startswith(f"{prefix}.")
            }

        self.model.load_state_dict(part("model"))
        self.average.weights, self.best = part("average"), part("best")
        for player, optimizer in zip(self.players, self.optimizers, strict=True):
            restore_optimizer(optimizer.optimizer, tensors, f"optimizer.{player.name}")
        self.progress = saved
        note(f"Going on after {saved.seen:,} images.")


# -- parts ---------------------------------------------------------------------------------------


def images_in(minutes: float, model: Model, train: ScanDataset, config: FitConfig, *, device: str) -> tuple[int, float]:
    """How many images `minutes` of training see on this machine, and seconds an image, by trying a few steps.

    Of every stage, weighted by its part of the run.
    """
    trial = copy.deepcopy(model)
    fabric = fabric_for(device, config.precision, mixed=model.mixed_precision_pays)
    players = placed(trial.players(), config.images, config.batch_size)
    optimizer = torch.optim.AdamW([p for player in players for p in player.parameters], lr=0.0, fused=True)
    module, optimizer = fabric.setup(trial, optimizer)
    batch = _first(train, config.batch_size).to(fabric.device)
    seconds, since = 0.0, 0
    while since < config.images:
        until = min(config.images, stage_end(players, since, config.images))
        now = [player for player in players if active(player, since, config.batch_size)]
        timings = []
        for _ in range(4):
            begun = time.monotonic()
            optimizer.zero_grad()
            for player in now:
                with _seeded(0, fabric.device):
                    total = module(batch, player.name).total.mean() / batch.x[0].numel()
                fabric.backward(total)
                float(total.detach())  # a GPU computes behind our back: wait for it
            optimizer.step()
            timings.append(time.monotonic() - begun)
        seconds += min(timings[1:]) / len(batch.x) * (until - since) / config.images
        since = until
    return max(config.batch_size, int(minutes * 60 / seconds)), seconds


def check_finite(loss: Loss, player: Player, seen: int) -> None:
    """Refuse a loss that is not finite, naming the term.

    Raises:
        TrainingError: some term is NaN or infinite.
    """
    if bool(torch.isfinite(loss.total).all()):
        return
    bad = [name for name, term in loss.terms.items() if not bool(torch.isfinite(term).all())] or ["total"]
    raise TrainingError(
        f"After {seen:,} images the loss of '{player.name}' is not finite; the term at fault: {', '.join(bad)}. "
        "Lower the learning rate (--set fit.learning_rate=...), or look for extreme values in the scans."
    )


def _first(dataset: ScanDataset, count: int) -> Batch:
    """Up to `count` scans."""
    return collate([dataset[n] for n in range(min(count, len(dataset)))])


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random state set by `seed` inside the block, and as before after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step can end before the state is saved."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(_signal: int, _frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        pressed.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["FitConfig", "check_finite", "fit", "images_in"]
