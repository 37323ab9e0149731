"""Heads around the one attention: split channels into heads, attend, join them again.

Shapes: B batch, N query heads, G key-value heads, T queries, S keys, H head size.
"""

from torch import Tensor

from rudolph.models.layers.attention import KeyValue, attention


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return ``(B, N, T, H)`` of ``(B, T, N * H)``."""
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
        mask: ``(T, S)`` or ``(B, T, S)`` bool, true where a query may attend; every query needs
            at least one such key.  None attends everywhere.
        dropout: fraction of attention weights set to 0.
    """
    batch, num_heads, length, _ = query.shape
    if length > 1 and key.shape[1] < num_heads:
        # The fused kernel takes as many keys as queries; a single query reads shared ones once.
        num_copies = num_heads // key.shape[1]
        key, value = (part.repeat_interleave(num_copies, dim=1) for part in (key, value))
    key_value = KeyValue(key.flatten(0, 1), value.flatten(0, 1), mask)
    out = attention(query.flatten(0, 1), [key_value], pb_relax=None, dropout=dropout)
    return out.view(batch, num_heads, length, -1).transpose(1, 2).flatten(2)
