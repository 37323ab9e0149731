"""Gated cross-attention: text attends to media between the blocks of a language model.

``x + tanh(gate) * attention(norm(x), media)``, then ``x + tanh(gate) * mlp(x)``.  Gates start at
0, so that a new block changes nothing.

Keys and values depend only on the media, so decoding computes them once (``keys_values``).
Module names are those that flamingo-pytorch and OpenFlamingo share.

Source: Alayrac 2022 (arXiv:2204.14198), section 2.1.2 and appendix A.1.2; flamingo-pytorch,
``flamingo_pytorch.py``; open_flamingo, ``src/helpers.py``; Idefics, ``modeling_idefics.py``, for
gates that are vectors.

Shapes: B batch, T text positions, K vectors of all media of a row, D text width, E media width, N
heads, H head size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rudolph.files.constraints import Count, check
from rudolph.models.layers.feed_forward import feed_forward
from rudolph.models.layers.multi_head import multi_head_attention, split_heads

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Sizes of a gated cross-attention.

    Attributes:
        num_heads: Attention heads, N.
        head_size: Channels per head, H.
        mlp_ratio: Ratio of the MLP's inner width to the text width.
        gate: One gate per block (``scalar``) or one per channel (``vector``).
    """

    num_heads: Count = 8
    head_size: Count = 64
    mlp_ratio: Count = 4
    gate: Literal["scalar", "vector"] = "scalar"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)


class MaskedCrossAttention(nn.Module):
    """Attention of text to media; the output is exactly 0 where no media may be attended to."""

    def __init__(self, width: int, media_width: int, config: CrossAttentionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner_size = config.num_heads * config.head_size
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner_size, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner_size, bias=False)
        self.to_out = nn.Linear(inner_size, width, bias=False)

    def keys_values(self, media: Tensor) -> KeysValues:
        """Compute keys and values ``(B, N, K, H)`` of media ``(B, K, E)``."""
        key, value = self.to_kv(media).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)

    def forward(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Return ``(B, T, D)``, without the residual.

        Args:
            x: Text states ``(B, T, D)``.
            keys_values: Result of ``keys_values``.
            mask: ``(B, T, K)`` bool; None attends to all media.
        """
        query = split_heads(self.to_q(self.norm(x)), self.num_heads)
        if mask is None:
            return self.to_out(multi_head_attention(query, *keys_values))
        attends = mask.any(-1, keepdim=True)
        # A softmax over no key is undefined.  A position without media therefore attends to all
        # keys, and its output is then set to 0.
        out = multi_head_attention(query, *keys_values, mask | ~attends)
        return self.to_out(out.masked_fill(~attends, 0.0))


class GatedCrossAttentionBlock(nn.Module):
    """Gated cross-attention and a gated MLP."""

    def __init__(self, width: int, media_width: int, config: CrossAttentionConfig) -> None:
        super().__init__()
        num_gates = 1 if config.gate == "scalar" else width
        self.attn = MaskedCrossAttention(width, media_width, config)
        self.attn_gate = nn.Parameter(torch.zeros(num_gates))
        self.ff = feed_forward(width, config.mlp_ratio)
        self.ff_gate = nn.Parameter(torch.zeros(num_gates))

    def forward(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``; see ``MaskedCrossAttention``."""
        x = x + self.attn_gate.tanh() * self.attn(x, keys_values, mask)
        return x + self.ff_gate.tanh() * self.ff(x)
