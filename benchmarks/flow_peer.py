"""medgen's flow beside normflows' Glow: training steps a second, and bits per dimension at equal seconds.

Both have 8 steps on each of 3 levels and 64 hidden channels, and learn PneumoniaMNIST's normal chests, padded from
28 x 28 to 32 x 32 by repeating the edge, 8 bit, uniform dequantisation, 64 scans a step. They take turns, so
that a busy machine slows both. normflows trains twice: as medgen does, and as its own example does; the better on
the tenth of train counts. Every checkpoint is chosen on that tenth; val is only reported.

    pip install normflows; python benchmarks/flow_peer.py --seconds 180
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import normflows
import numpy as np
import torch
from densities import LEVELS, bits_per_dim, normals, stated
from measure import keep, table
from torch import Tensor, nn

from medgen.data.dataset import Batch
from medgen.data.motion import RandMove
from medgen.models import build, config_of
from medgen.nets.blocks import count_parameters
from medgen.training.fabric import native_bfloat16

STEPS, SCALES, WIDTH, SIZE, BATCH = 8, 3, 64, 32, 64
FLOW = {
    "kind": "flow", "shape": (SIZE, SIZE), "channels": 1, "bits": 8, "steps": STEPS, "levels": SCALES, "width": WIDTH,
}  # fmt: skip
# What builds a density from the first batch.
Kinds = dict[str, Callable[[Tensor], nn.Module]]


class Ours(nn.Module):
    """-log p of grey levels, nats a scan, by medgen, in the precision that `medgen train` takes.

    Args:
        first: the first batch.
        half: bfloat16 inside couplings where the machine has it.
        helped: as the preset flow2d: told where voxels are, and trained on slightly moved scans.
    """

    def __init__(self, first: Tensor, *, half: bool = True, helped: bool = False) -> None:
        super().__init__()
        self.flow = build(config_of(FLOW | ({"position": 32} if helped else {})))
        self.flow.initialise(Batch(first / (LEVELS - 1)))
        self.half = half and native_bfloat16("cpu")
        self.motion = RandMove(0.5, rotate=0.1, shift=1.0, scale=0.1) if helped else None
        if self.motion is not None:
            self.motion.set_random_state(seed=0)

    def forward(self, levels: Tensor) -> Tensor:
        x = levels / (LEVELS - 1)
        if self.motion is not None and self.training:
            x = torch.stack([self.motion(one) for one in x])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half and self.training):
            return self.flow(Batch(x)).total

    def nats(self, levels: Tensor) -> Tensor:
        return -self.flow.log_prob(levels / (LEVELS - 1))


class Peer(nn.Module):
    """The same by normflows, built as its Glow example does, without classes."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        bases, merges, flows = [], [], []
        for i in range(SCALES):
            channels = 2 ** (SCALES + 1 - i)
            blocks = [
                normflows.flows.GlowBlock(channels, WIDTH, split_mode="channel", scale=True) for _ in range(STEPS)
            ]
            flows.append([*blocks, normflows.flows.Squeeze()])
            if i > 0:
                merges.append(normflows.flows.Merge())
            kept, side = (channels // 2 if i else channels), SIZE // 2 ** (SCALES - i)
            bases.append(normflows.distributions.DiagGaussian((kept, side, side)))
        self.flow = normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)
        with torch.no_grad():
            self(first)  # its first batch sets the scales of its activations

    def forward(self, levels: Tensor) -> Tensor:
        density = self.flow.log_prob((levels + torch.rand_like(levels)) / LEVELS, None)
        return levels[0].numel() * math.log(LEVELS) - density

    def nats(self, levels: Tensor, draws: int = 4) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.stack([self(levels) for _ in range(draws)]).mean(0)


class Runner:
    """A model and its optimiser, trained slice by slice; `example` is the setting of normflows' example."""

    def __init__(self, net: nn.Module, scans: dict[str, Tensor], *, seconds: float, example: bool = False) -> None:
        self.net, self.scans, self.seconds, self.example = net, scans, seconds, example
        if example:
            self.optimizer = torch.optim.Adamax(net.parameters(), lr=1e-3, weight_decay=1e-5)
        else:
            self.optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        self.spent, self.steps, self.best, self.weights = 0.0, 0, math.inf, copy.deepcopy(net.state_dict())
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        """One update; Adam's rate rises for a fiftieth of the seconds, then falls along half a cosine."""
        chosen = torch.randint(len(self.scans["train"]), (BATCH,), generator=self.generator)
        loss = self.net(self.scans["train"][chosen]).mean() / SIZE**2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not self.example:
            done = min(1.0, self.spent / self.seconds)
            rate = 1e-3 * min(1.0, 50 * done + 0.02) * 0.5 * (1 + math.cos(math.pi * done))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        if self.example and not torch.isfinite(loss):
            return  # as the example does
        self.optimizer.step()

    def train(self, seconds: float) -> None:
        """Train for these seconds, not counting the look at the tenth afterwards; keep the best weights."""
        self.net.train()
        began = time.perf_counter()
        before = self.spent
        while self.spent < min(before + seconds, self.seconds):
            self.step()
            self.steps += 1
            self.spent = before + time.perf_counter() - began
        held = self.bits("tenth").mean()
        if held < self.best:
            self.best, self.weights = held, copy.deepcopy(self.net.state_dict())

    def bits(self, split: str) -> np.ndarray:
        return bits_per_dim(self.net.eval().nats, self.scans[split])


def speed(runners: dict[str, Runner], *, blocks: int, steps: int) -> dict[str, list[float]]:
    """Training steps a second of each block, from its median step; the order changes from block to block."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    for block in range(-1, blocks):  # the first warms up
        for name in sorted(runners, reverse=block % 2 == 0):
            runners[name].net.train()
            clock = [time.perf_counter()]
            for _ in range(steps):
                runners[name].step()
                clock.append(time.perf_counter())
            if block >= 0:
                found[name].append(1 / float(np.median(np.diff(clock))))
    return found


def built(kind: Callable[[Tensor], nn.Module], scans: dict[str, Tensor], **options: float) -> Runner:
    torch.manual_seed(0)
    return Runner(kind(scans["train"][:BATCH]), scans, **options)


def padded(levels: np.ndarray) -> Tensor:
    edge = (SIZE - levels.shape[1]) // 2
    return torch.from_numpy(np.pad(levels, ((0, 0), (edge, edge), (edge, edge)), "edge")).float()[:, None]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=180, help="of training, each; 0 measures speed only")
    options.add_argument("--slice", type=float, default=10, help="seconds of a turn")
    options.add_argument("--blocks", type=int, default=5)
    options.add_argument("--steps", type=int, default=10, help="of a block")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--peer-only", action="store_true")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    busy = os.getloadavg()[0]
    began, scans = time.monotonic(), {name: padded(levels) for name, levels in normals().items()}
    kinds: Kinds = {"normflows": Peer}
    if not options.peer_only:
        kinds |= {"medgen": Ours, "medgen, float32": partial(Ours, half=False)}
    timed = {name: built(kind, scans, seconds=math.inf) for name, kind in kinds.items()}
    rates = speed(timed, blocks=options.blocks, steps=options.steps)
    parameters = {name: count_parameters(runner.net) for name, runner in timed.items()}
    rows = [
        (name, parameters[name], float(np.median(rate)), 1 / float(np.median(rate))) for name, rate in rates.items()
    ]
    table(rows, ("flow", "parameters", "steps a second", "seconds a step"))
    results = {
        "threads": options.threads,
        "load before": busy,
        "normflows": version("normflows"),
        "parameters": parameters,
        "rates": rates,
    }
    if "medgen" in rates:
        for name in ("medgen", "medgen, float32"):
            ratios = np.divide(rates[name], rates["normflows"])
            results[f"steps a second, {name} : normflows"] = [float(np.median(ratios)), ratios.min(), ratios.max()]
            told = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f} over blocks)"
            print(f"{name} : normflows {told}")
        kinds = {"normflows": Peer, "medgen": Ours, "medgen, as flow2d": partial(Ours, helped=True)}
    if options.seconds:
        results["quality"] = quality(kinds, scans, seconds=options.seconds, turn=options.slice)
    keep("flow_peer", results, began)


def quality(kinds: Kinds, scans: dict[str, Tensor], *, seconds: float, turn: float) -> dict:
    """Bits per dimension on val after `seconds` of training each, in turns."""
    runners = {name: built(kind, scans, seconds=seconds) for name, kind in kinds.items()}
    runners["normflows, its example's optimiser"] = built(Peer, scans, seconds=seconds, example=True)
    while any(runner.spent < seconds for runner in runners.values()):
        for runner in runners.values():
            runner.train(turn)
        print({name: (runner.steps, round(float(runner.best), 3)) for name, runner in runners.items()}, flush=True)
    rows, found = [], {}
    for name, runner in runners.items():
        runner.net.load_state_dict(runner.weights)
        val = runner.bits("val")
        found[name] = {"steps": runner.steps, "tenth": float(runner.best), "val": stated(val), "bits": val.tolist()}
        rows.append((name, runner.steps, float(runner.best), float(val.mean())))
    table(rows, ("flow", "steps", "tenth of train, bits/dim", "val, bits/dim"))
    peer = min((name for name in found if name.startswith("normflows")), key=lambda name: found[name]["tenth"])
    better = {}
    for name in (name for name in found if name.startswith("medgen")):
        paired = stated(np.subtract(found[peer]["bits"], found[name]["bits"]))
        better[f"{name} better by, paired over scans"] = paired
        print(f"{name} better by " + "{mean:.3f} +- {se:.3f} bits/dim".format(**paired))
    return found | better


if __name__ == "__main__":
    main()
