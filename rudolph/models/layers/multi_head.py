"""Multi-head attention: split channels into heads, attend, and join the heads again.

Shapes: B batch, N query heads, G key-value heads, T queries, S keys, H head size.
"""

from torch import Tensor

from rudolph.models.layers.attention import KeyValue, attention


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split the channels of ``(B, T, N * H)`` into heads ``(B, N, T, H)``."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax attention ``(B, T, N * H)``.

    Args:
        query: ``(B, N, T, H)``.
        key: ``(B, G, S, H)``; N / G neighbouring query heads share a key-value head.
        value: ``(B, G, S, H)``.
        mask: ``(T, S)`` or ``(B, T, S)`` bool, true where a query may attend to a key; every
            query needs at least one such key.  None attends to all keys.
        dropout: fraction of attention weights set to 0.
    """
    batch, num_heads, length, _ = query.shape
    if length > 1 and key.shape[1] < num_heads:
        # The fused kernel needs a key head per query head.  For a single query, the plain product
        # is used, which reads shared keys only once.
        num_copies = num_heads // key.shape[1]
        key, value = (part.repeat_interleave(num_copies, dim=1) for part in (key, value))
    key_value = KeyValue(key.flatten(0, 1), value.flatten(0, 1), mask)
    out = attention(query.flatten(0, 1), [key_value], pb_relax=None, dropout=dropout)
    return out.view(batch, num_heads, length, -1).transpose(1, 2).flatten(2)
