"""Train any model: `forward(batch, player)` is the loss, images seen are the clock."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
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
from medgen.training.diagnosis import COMPLAINTS, alone, diagnosed
from medgen.training.doctor import ailing, findings
from medgen.training.during import evaluated, interruption, seeded
from medgen.training.ema import MovingAverage
from medgen.training.fabric import fabric_for
from medgen.training.spans import active, last_stage, placed, schedule, stage, stage_end
from medgen.training.state import Progress, load_state, optimizer_tensors, restore_optimizer, save_state

# Which stream of randomness a seed is for; the numbers are arbitrary and fixed.
_NOISE, _VALIDATION, _PULSE = 3, 4, 5
# Real scans that a model is shown for its data-dependent beginning, and for its pulse; held-out ones if so many.
_SHOWN, _FEWEST = 64, 16


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
        remedies: how many times at most training goes back to its best weights, each time at half the learning rate,
            where modes collapse, the loss diverges or it is not finite.
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
    remedies: int = Field(default=0, ge=0)


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
        TrainingError: a loss or gradient is not finite (the message names its term and layer), or memory ran out.
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
            model.initialise(next(train.batches(model.first_scans)).to(self.fabric.device))
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
        with interruption() as interrupted, progress("Training (images seen)", config.images) as bar:
            bar.advance(done.seen)
            batches = self._batches()
            while not done.finished:
                batch = next(batches)
                before, loss = done.seen, self._tried(batch)
                if done.start is None and math.isfinite(loss):
                    done.start = loss
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

    def _tried(self, batch: Batch) -> float:
        """One step's loss; NaN where it could not be taken, and training went back to its best weights instead."""
        try:
            return self._step(batch)
        except TrainingError as error:
            if not self._remedies_left:
                raise
            self._go_back("a loss that is not finite", str(error))
            return math.nan

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
                group["lr"] = rate * config.learning_rate * 0.5 ** len(self.progress.remedies)
            total = self._loss(batch, player).total.mean() / batch.x[0].numel()
            optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(total)
            norm = nn.utils.clip_grad_norm_(player.parameters, config.grad_clip)
            # A GPU is waited for once: here, where weights can still be kept from what is not finite.
            loss, size = torch.stack([total.detach(), norm.to(total)]).tolist()
            if not math.isfinite(loss + size) and (error := self._diagnosed(batch, player)):
                raise error
            optimizer.step()
            shown.append(loss)
        return shown[0] if shown else math.nan

    def _loss(self, batch: Batch, player: Player) -> Loss:
        try:
            with self._noise():
                return self.module(batch, player.name)
        except COMPLAINTS as refusal:
            if error := self._diagnosed(batch, player) or alone(refusal, player):
                raise error from refusal
            raise

    def _diagnosed(self, batch: Batch, player: Player) -> TrainingError | None:
        def again() -> Loss:
            with self._noise(), self.fabric.autocast():
                return self.model(batch, player.name)

        return diagnosed(self.model, batch, player, again, seen=self.progress.seen)

    def _noise(self) -> AbstractContextManager[None]:
        """The randomness of the present step."""
        return seeded(derived_seed(self.seed, _NOISE, self.progress.seen, self.fabric.global_rank), self.fabric.device)

    # -- validation ----------------------------------------------------------------------------

    def _validate(self, train_loss: float) -> None:
        done, images = self.progress, self.config.images
        held = self._examined(train_loss)
        done.history.append((done.seen, train_loss, held))
        if (self.val is None or -math.inf < held < done.best) and not (self._remedies_left and ailing(done)):
            done.best, done.best_seen, done.stale = held, done.seen, 0
            self.best = {name: tensor.clone() for name, tensor in self.average.weights.items()}
        elif self.val is not None:
            done.stale += 1
        enough = done.stale >= self.config.patience and last_stage(self.players, done.seen)
        if self._went_back(over=enough or done.seen >= images):
            return
        if enough:
            note(f"Stopped early after {done.seen:,} images: no better on held-out scans since {done.best_seen:,}.")
        done.finished = done.seen >= images or enough

    def _examined(self, train_loss: float) -> float:
        """What the averaged weights make of held-out scans: their mean loss, with the same noise every time."""
        done, total, count = self.progress, 0.0, 0
        with evaluated(self.model, self.average.weights):
            with seeded(derived_seed(self.seed, _VALIDATION), self.fabric.device):
                for batch in self.val.batches(self.config.batch_size) if self.val else ():
                    moved = batch.to(self.fabric.device)
                    with self.fabric.autocast():
                        total += float(self.model.validation_loss(moved).sum()) / batch.x[0].numel()
                    count += len(batch.x)
            if type(self.model).pulse is not Model.pulse:  # else no scans need to be gathered
                with seeded(derived_seed(self.seed, _PULSE), self.fabric.device):
                    done.pulses.append((done.seen, self.model.pulse(self._real())))
        return total / count if count else train_loss

    def _real(self) -> Batch:
        """Scans to measure generated ones by: held-out ones, or training scans where those are few; of all classes."""
        scans = self.data if self.val is None or len(self.val) < _FEWEST else self.val
        count = min(_SHOWN, len(scans))
        return collate([scans[n * len(scans) // count] for n in range(count)]).to(self.fabric.device)

    # -- trouble -------------------------------------------------------------------------------

    @property
    def _remedies_left(self) -> int:
        return self.config.remedies - len(self.progress.remedies)

    def _went_back(self, *, over: bool) -> bool:
        """Say what the doctor finds, each trouble once a course, or go back to the best weights where that is left."""
        done, config = self.progress, self.config
        end = stage_end(self.players, done.began, config.images)
        found = findings(done, end=end, warmup=config.warmup, held_out=self.val is not None, over=over)
        for one in self.fabric.broadcast(found):  # training losses differ between devices
            if one.remediable and self._remedies_left and done.seen < config.images:
                self._go_back(one.trouble, one.sentence)
                return True
            if one.trouble not in done.told:
                note(one.sentence)
                done.told.append(one.trouble)
                done.warnings.append(one.sentence)
        return False

    def _go_back(self, trouble: str, sentence: str) -> None:
        """A remedy: the best weights again, at half the learning rate, and without what the optimisers remember."""
        done = self.progress
        done.remedies.append((done.seen, trouble))
        done.begin_course()
        self.model.load_state_dict(self.best)
        self.average = MovingAverage(self.model, self.config.ema)
        for optimizer in self.optimizers:
            optimizer.optimizer.state.clear()
        note(
            f"{sentence} Remedy {len(done.remedies)} of {self.config.remedies}: training goes on from the weights of "
            f"after {done.best_seen:,} images, at half the learning rate."
        )

    def _begin_stage(self, before: int, train_loss: float) -> None:
        """Go on from the best weights so far, which those whose time begins may look at; the best is sought anew."""
        done, now = self.progress, stage(self.players, self.progress.seen)
        if not done.history or done.history[-1][0] != done.seen:
            self._validate(train_loss)
        self.model.load_state_dict(self.best)
        self.model.eval()
        for name in now:
            if name not in stage(self.players, before):
                self.model.begin(name, next(self.data.batches(_SHOWN)).to(self.fabric.device))
        self.average = MovingAverage(self.model, self.config.ema)
        done.best, done.best_seen = math.inf, done.seen
        done.begin_course()
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


__all__ = ["FitConfig", "fit"]
