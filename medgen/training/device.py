"""Which device a choice of the user's means on this machine."""

import torch


def device_for(choice: str) -> str:
    """Where models are asked: 'cuda' for 'auto' and 'cuda' where there is one, 'mps' for 'mps' likewise, else 'cpu'.

    >>> device_for("cpu")
    'cpu'
    """
    if choice == "mps" and torch.backends.mps.is_available():
        return "mps"
    return "cuda" if choice in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


__all__ = ["device_for"]
