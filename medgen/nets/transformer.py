"""A decoder-only transformer over a sequence: what comes next, given all before it.

Vaswani et al. 2017 ("Attention is all you need"); Radford et al. 2018 and 2019 (GPT and GPT-2: normalisation before
every part); Esser et al. 2021 ("Taming transformers for high-resolution image synthesis"). MONAI's
`DecoderOnlyTransformer` is the same network, but keeps no keys and values, so that drawing n symbols costs n passes
over all of them, and has no place for covariates.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Past:
    """Keys and values (b, heads, n, w) of what has been seen, a layer each, in room for all there will be."""

    room: int
    seen: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class CausalTransformer(nn.Module):
    """`depth` layers of causal self-attention and a perceptron; place n of the output depends on places up to n alone.

    Args:
        width: features, a multiple of `heads`.
        depth: layers.
        heads: of attention.
        dropout: part of the features left out in training.

    Example:
        >>> CausalTransformer(8, 2, 2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, depth: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n w"], past: Past | None = None) -> Float[Tensor, "b n w"]:
        """Features of the same size; with a `past`, of the places that follow it, which it then takes in."""
        for index, layer in enumerate(self.layers):
            x = layer(x, past, index)
        if past is not None:
            past.seen += x.shape[1]
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Past | None, index: int) -> Tensor:
        x = x + self.dropout(self._attended(self.before_attention(x), past, index))
        return x + self.dropout(self.mlp(self.before_mlp(x)))

    def _attended(self, x: Tensor, past: Past | None, index: int) -> Tensor:
        batch, count, width = x.shape
        # (3, b, heads, n, w)
        parts = self.to_qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        if past is None:
            found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            key, value = _remembered(past, index, key, value)
            allowed = None
            if count > 1:
                allowed = torch.ones(count, key.shape[2], dtype=torch.bool, device=x.device).tril(past.seen)
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.from_heads(found.transpose(1, 2).reshape(batch, count, width))


def _remembered(past: Past, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values of a layer so far, with these at their end."""
    batch, heads, count, width = key.shape
    if len(past.keys) == index:
        past.keys.append(key.new_zeros(batch, heads, past.room, width))
        past.values.append(value.new_zeros(batch, heads, past.room, width))
    after = past.seen + count
    past.keys[index][:, :, past.seen : after] = key
    past.values[index][:, :, past.seen : after] = value
    return past.keys[index][:, :, :after], past.values[index][:, :, :after]


__all__ = ["CausalTransformer", "Past"]
