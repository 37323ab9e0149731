"""One layer of the masked decoder.

Source: RuDOLPH, ``rudolph/model/transformer.py``; CogView (arXiv:2105.13290) for sandwich norms;
Henry 2020 (arXiv:2010.04245) and Chameleon (arXiv:2405.09818) for norms of queries and keys.

Shapes: B batch, T tokens, D hidden size, N heads, H head size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rudolph.models.attention import Look, Seen, attention
from rudolph.models.dropout import drop

if TYPE_CHECKING:
    from rudolph.models.decoder import DecoderConfig

HALF_MAX = 65504.0
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Layer(nn.Module):
    """One transformer layer: norm, attention, (norm,) add; norm, MLP, (norm,) add."""

    def __init__(self, config: "DecoderConfig") -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.attention_norm = nn.LayerNorm(size)
        self.to_qkv = nn.Linear(size, 3 * size)
        self.to_out = nn.Linear(size, size)
        head = size // config.num_heads
        self.query_norm = nn.LayerNorm(head) if config.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head) if config.qk_norm else nn.Identity()
        self.attention_out_norm = nn.LayerNorm(size) if config.sandwich_norm else nn.Identity()
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp_in = nn.Linear(size, 4 * size)
        self.activation = nn.GELU(approximate=config.gelu)
        self.mlp_out = nn.Linear(4 * size, size)
        self.mlp_out_norm = nn.LayerNorm(size) if config.sandwich_norm else nn.Identity()

    def forward(self, x: Tensor, look: Look) -> Tensor:
        """``(B, T, D)``; ``look`` says what each position sees."""
        x = x + self.attention_out_norm(self.attend(self.attention_norm(x), look))
        hidden = self.activation(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out_norm(self.dropped(self.mlp_out(hidden)))

    def attend(self, x: Tensor, look: Look) -> Tensor:
        query, seen = look.split(self.queries_keys_values(x))
        out = self.to_out(look.merge(self.attention_of(query, seen)))
        # The reference clamps to the range of float16 in every precision.
        return self.dropped(out.clamp(-HALF_MAX, HALF_MAX))

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """``(B, T, 3, N, H)`` of what a norm gave, ``(B, T, D)``."""
        batch, length, _ = x.shape
        qkv: Tensor = self.to_qkv(x).view(batch, length, 3, self.config.num_heads, -1)
        if not self.config.qk_norm:
            return qkv
        query, key, value = qkv.unbind(2)
        norms = self.query_norm(query), self.key_norm(key)
        return torch.stack([*(norm.to(qkv.dtype) for norm in norms), value], dim=2)

    def attention_of(self, query: Tensor, seen: Sequence[Seen]) -> Tensor:
        """Attention in the machine's precision, or in the one that the configuration names."""
        share = self.config.attention_dropout if self.training else 0.0
        relaxed = self.config.pb_relax_maximum if self.config.pb_relax else None
        if self.config.attention_precision is None:
            return attention(query, seen, pb_relax=relaxed, dropout=share)
        dtype = PRECISIONS[self.config.attention_precision]
        seen = [part._replace(key=part.key.to(dtype), value=part.value.to(dtype)) for part in seen]
        with torch.autocast(query.device.type, enabled=False):
            out = attention(query.to(dtype), seen, pb_relax=relaxed, dropout=share)
        return out.to(query.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        return drop(x, self.config.output_dropout) if self.training else x


def run_layer(layer: nn.Module, x: Tensor, look: Look) -> Tensor:
    """A layer as a function, so that all of them share a compilation."""
    out: Tensor = layer(x, look)
    return out
