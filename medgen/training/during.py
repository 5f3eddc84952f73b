"""What holds while a block runs: a random state, other weights, patience with Ctrl-C."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from medgen.models.base import Model


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random state set by `seed` inside the block, and as before after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


@contextmanager
def evaluated(model: Model, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other `weights`, as it is used and without gradients; its own are put back after it."""
    live = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        yield
    model.load_state_dict(live)


@contextmanager
def interruption() -> Iterator[threading.Event]:
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


__all__ = ["evaluated", "interruption", "seeded"]
