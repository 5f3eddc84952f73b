"""Which device a choice of the user's means on this machine."""

import torch


def device_for(choice: str) -> str:
    """Where models are asked: 'cuda' for 'auto' and 'cuda' where there is one, else 'cpu'.

    >>> device_for("cpu")
    'cpu'
    """
    return "cuda" if choice in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


__all__ = ["device_for"]
