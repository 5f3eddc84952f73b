"""An exponential moving average of weights, with its half-life in images seen."""

import torch
from torch import Tensor, nn


class MovingAverage:
    """Averages every floating parameter and buffer of a module; the rest is copied.

    average <- d * average + (1 - d) * weight,  d = 0.5 ** (images / half_life), and smaller at the
    start, so that early weights do not linger (Karras et al. 2024, EDM2, section 3.1, in spirit).

    Args:
        module: whose weights are averaged.
        half_life: images seen after which a weight's influence has halved.
    """

    def __init__(self, module: nn.Module, half_life: float) -> None:
        self.half_life = half_life
        self.weights: dict[str, Tensor] = {name: t.detach().clone() for name, t in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, *, images: int, seen: int) -> None:
        """Take in the weights after `images` more images, `seen` in all."""
        half_life = min(self.half_life, max(1.0, 0.1 * seen))
        decay = 0.5 ** (images / half_life)
        for name, tensor in module.state_dict().items():
            held = self.weights[name]
            if held.is_floating_point():
                held.lerp_(tensor.detach().to(held.dtype), 1 - decay)
            else:
                held.copy_(tensor)


__all__ = ["MovingAverage"]
