"""Memory and time of a 3D flow on 64^3 patches: activations stored, or recomputed in the backward pass.

Every measurement is a process of its own. Memory: the resident peak of two steps with Adam above the resident size
before the first; the allocator then gives every freed tensor back at once (a block below its threshold stays, and
what is measured is how it cuts up the heap). Time: the median step, with the allocator as it comes. Last, in
one process, the gradients of both modes in float32.

    python benchmarks/flow_memory.py --steps 4 16
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measure import keep, table
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.models import build, config_of
from medgen.models.base import Model
from medgen.nets.blocks import count_parameters

MODES = ("store", "recompute")


def patches(side: int, count: int) -> Batch:
    """Smooth random volumes with a little noise, on [0, 1]."""
    coarse = torch.rand(count, 1, *[side // 8] * 3, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear")
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
    return Batch((smooth + 0.02 * noise).clamp(0, 1))


def flow(options: dict, memory: str, steps: int) -> Model:
    """A flow whose couplings do something: their last layers, which start at zero, get small weights."""
    values = {"kind": "flow", "shape": (options["side"],) * 3, "channels": 1, "bits": 8}
    values |= {"levels": options["levels"], "width": options["width"], "steps": steps, "memory": memory}
    torch.manual_seed(0)
    model = build(config_of(values))
    model.initialise(patches(options["side"], options["batch"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.train()


def loss(model: Model, batch: Batch) -> Tensor:
    return model(batch, model.players()[0].name).total.mean() / batch.x[0].numel()


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measured(options: dict, memory: str, steps: int, count: int) -> dict[str, float]:
    """In a fresh process: peak MB above the size before the first step, and seconds of the median step."""
    torch.set_num_threads(options["threads"])
    model, batch = flow(options, memory, steps), patches(options["side"], options["batch"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before, clock = resident("VmRSS"), [time.perf_counter()]
    for _ in range(count):
        optimizer.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        optimizer.step()
        clock.append(time.perf_counter())
    peak, trained = resident("VmHWM") - before, count_parameters(model)
    state = 3 * 4 * trained / 2**20  # gradients and Adam's two moments
    return {
        "peak": peak,
        "activations": peak - state,
        "parameters": trained,
        "step": float(np.median(np.diff(clock)[1:])),
    }


def child(options: dict, memory: str, steps: int, *, lean: bool) -> dict[str, float]:
    """`measured`, in a process of its own; `lean` gives freed tensors back at once."""
    told = [
        sys.executable,
        __file__,
        "--child",
        json.dumps([options, memory, steps, 2 if lean else options["count"] + 1]),
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"} if lean else None
    ran = subprocess.run(told, capture_output=True, text=True, env=environment)
    if ran.returncode:
        sys.exit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def gradients(options: dict, memory: str, steps: int) -> dict[str, Tensor]:
    model = flow(options, memory, steps)
    torch.manual_seed(1)  # the same noise between grey levels
    loss(model, patches(options["side"], options["batch"])).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def difference(options: dict, steps: int) -> dict[str, float]:
    """Relative distance of recomputed gradients from stored ones: of all together, and of the worst tensor."""
    stored, again = (gradients(options, memory, steps) for memory in MODES)
    if stored.keys() != again.keys():
        sys.exit("The two modes train different parameters.")
    apart = {name: float((again[name] - one).norm()) for name, one in stored.items()}
    sizes = {name: float(one.norm()) for name, one in stored.items()}
    each = {name: apart[name] / sizes[name] for name in stored if sizes[name] > 0}
    worst = max(each, key=each.__getitem__)
    whole = float(np.linalg.norm(list(apart.values())) / np.linalg.norm(list(sizes.values())))
    return {"all": whole, "worst": each[worst], "worst tensor": worst}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, nargs="+", default=[4, 16], help="couplings a level")
    options.add_argument("--side", type=int, default=64)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--levels", type=int, default=2)
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--count", type=int, default=5, help="steps timed in each process")
    options.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turns")
    options.add_argument("--child", help=argparse.SUPPRESS)
    options = vars(options.parse_args())
    if asked := options.pop("child"):
        print(json.dumps(measured(*json.loads(asked))))
        return
    began, busy = time.monotonic(), os.getloadavg()[0]
    kinds = [(memory, steps) for steps in options["steps"] for memory in MODES]
    lean = {kind: child(options, *kind, lean=True) for kind in kinds}
    timed = [{kind: child(options, *kind, lean=False) for kind in kinds} for _ in range(options["rounds"])]
    step = {kind: float(np.median([one[kind]["step"] for one in timed])) for kind in kinds}
    usual = {kind: float(np.median([one[kind]["peak"] for one in timed])) for kind in kinds}
    rows = [(*kind, lean[kind]["peak"], lean[kind]["activations"], usual[kind], step[kind]) for kind in kinds]
    table(rows, ("memory", "steps a level", "peak, MB", "of activations", "peak, usual malloc", "seconds a step"))
    few, many = min(options["steps"]), max(options["steps"])
    ratios = {
        f"{what}, {many} : {few} steps, {m}": lean[m, many][what] / lean[m, few][what]
        for what in ("peak", "activations")
        for m in MODES
    }
    for steps in options["steps"]:
        paired = [one["recompute", steps]["step"] / one["store", steps]["step"] for one in timed]
        ratios[f"step time, recompute : store, {steps} steps"] = float(np.median(paired))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    torch.set_num_threads(options["threads"])
    apart = {str(steps): difference(options, steps) for steps in options["steps"]}
    print("relative difference of gradients:", apart)
    stated = {f"{m}, {n} steps": {**lean[m, n], "step": step[m, n], "usual peak": usual[m, n]} for m, n in kinds}
    keep("flow_memory", {**options, "load before": busy, **stated, "ratios": ratios, "gradients": apart}, began)


if __name__ == "__main__":
    main()
