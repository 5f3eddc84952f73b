"""The device and precision to compute with."""

import logging
import os
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision


def fabric_for(device: str, precision: str, *, mixed: bool) -> Fabric:
    """The device and precision to compute with; `mixed` is what 'auto' means on a machine with native bfloat16."""
    accelerator = {"cuda": "gpu"}.get(device, device)
    mixed = precision == "bfloat16" or (precision == "auto" and mixed and native_bfloat16(device))
    devices: Any = "auto" if "LOCAL_RANK" in os.environ or accelerator != "cpu" else 1
    # Fabric announces its precision on stderr, through a logger and a handler of its own.
    announcer = logging.getLogger("lightning_fabric")
    level = announcer.level
    announcer.setLevel(logging.WARNING)
    try:
        half = _HalfInside("bf16-mixed", "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
        fabric = Fabric(accelerator=accelerator, devices=devices, plugins=half if mixed else None)
        fabric.launch()
    finally:
        announcer.setLevel(level)
    return fabric


class _HalfInside(MixedPrecision):
    """bfloat16 inside the model alone: scans come in as they are, since 8 bits of mantissa lose grey values."""

    def convert_input(self, data: Any) -> Any:
        """Unchanged."""
        return data


def native_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16 by itself."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return device in ("auto", "cpu") and torch.cpu._is_avx512_bf16_supported()


__all__ = ["fabric_for", "native_bfloat16"]
