"""The one attention, and how the positions of a sequence see each other.

A layer hands its queries, keys and values to a *look*, which says what each row of attention sees
and puts the rows together again: a whole sequence under its mask (``FullView``), or new positions
before which others lie in a cache (``cache.CachedView``).

Source: CogView (arXiv:2105.13290) for PB-relax.

Shapes: B samples, N heads, R = B * N rows of attention, T positions, H head size.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.layers.dropout import apply_dropout

PB_RELAX_SCALE = 32.0
# Of what the maximum is that PB-relax subtracts.
MAXIMA = ("row", "matrix")
# So many products with single rows are less work than the call of one for all.
FEW_PRODUCTS = 64


class KeyValue(NamedTuple):
    """Keys and values ``(G, T', H)`` each; ``mask`` (T, T') bool, None where all is seen, or
    FlexAttention's blocks of one.

    R / G rows next to each other see the same keys.
    """

    key: Tensor
    value: Tensor
    mask: Any = None


def block_mask(table: Tensor) -> Any:
    """FlexAttention's blocks of a mask ``(T, T)`` bool: empty ones are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[query, key]

    length = len(table)
    return create_block_mask(sees, None, None, length, length, device=str(table.device))


@cache
def block_kernel(device: str) -> Any:
    """FlexAttention, compiled; on the CPU its plain form, which has no gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention)


def block_attention(query: Tensor, seen: KeyValue, *, dropout: float) -> Tensor:
    """Attention ``(R, T, H)`` over the blocks of a mask that are not empty.

    Raises:
        ValueError: with dropout, which FlexAttention has not.

    Source: Dong et al. 2024 (arXiv:2412.05496).
    """
    if dropout:
        raise ValueError(f"block masks need model.attention_dropout 0, got {dropout}")
    key, value, mask = seen
    kernel = block_kernel(query.device.type)
    out: Tensor = kernel(query[None], key[None], value[None], block_mask=mask)[0]
    return out


def attention(
    query: Tensor, seen: Sequence[KeyValue], *, pb_relax: str | None, dropout: float
) -> Tensor:
    """Softmax attention of queries ``(R, T, H)`` over all keys seen, ``(R, T, H)``.

    PB-relax keeps float16 scores from overflowing (``apply_pb_relax``), by the maximum of each
    ``row`` or of the whole ``matrix``; None computes them as they are.  In float32 and bfloat16,
    and in a kernel that keeps its scores in float32, it changes nothing but rounding and is left
    out.
    """
    if len(seen) == 1 and seen[0].mask is not None and not isinstance(seen[0].mask, Tensor):
        return block_attention(query, seen[0], dropout=dropout)
    # On CPU the fused kernel takes three times as long as plain products in half precision, and
    # as long for single queries.
    is_fused = query.device.type != "cpu" or (query.dtype == torch.float32 and query.shape[1] > 1)
    if is_fused and len(seen) == 1 and len(seen[0].key) == len(query):
        key, value, mask = seen[0]
        # A batch of one with many heads, since that takes four dimensions.
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, dropout_p=dropout
        )[0]
    is_relaxed = pb_relax is not None and query.dtype == torch.float16
    query = query * (query.shape[-1] ** -0.5 / (PB_RELAX_SCALE if is_relaxed else 1.0))
    parts = [_scores(query, part) for part in seen]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # (R, T, T')
    if is_relaxed:
        scores = apply_pb_relax(scores, pb_relax)
    shares = scores.softmax(-1)
    if dropout:
        shares = apply_dropout(shares, dropout)
    if len(seen) == 1:
        return _product(_together(shares, seen[0]), seen[0].value).view_as(query)
    first, second = seen
    before, after = shares.tensor_split((first.key.shape[1],), dim=-1)
    out = _product(_together(before, first), first.value).view_as(query)
    # Rows that see keys of their own add what these give.
    return _product(after, second.value, out)


def apply_pb_relax(scores: Tensor, maximum: str | None) -> Tensor:
    """Scores ``(R, T, T')`` that were computed ``PB_RELAX_SCALE`` times smaller, at full size.

    The maximum leaves before they grow back, so that the largest is 0: of each ``row``, or, as in
    CogView and ru-dolph, of the whole ``matrix``, where rows far below it are lost in float16.
    The softmax is the same.
    """
    over = (-2, -1) if maximum == "matrix" else -1
    return (scores - scores.amax(over, keepdim=True)) * PB_RELAX_SCALE


def _together(rows: Tensor, seen: KeyValue) -> Tensor:
    """Rows ``(R, T, .)`` that see the same keys as one, ``(G, T * R / G, .)``: read once."""
    return rows if len(rows) == len(seen.key) else rows.reshape(len(seen.key), -1, rows.shape[-1])


def _scores(query: Tensor, seen: KeyValue) -> Tensor:
    """``(R, T, T')``."""
    rows, key = _together(query, seen), seen.key.mT
    if seen.mask is None:
        return _product(rows, key).view(*query.shape[:2], -1)
    bias = _bias(seen.mask, query.dtype)
    scores = _product(rows, key, bias.repeat(rows.shape[1] // len(bias), 1))
    return scores.view(*query.shape[:2], -1)


def _product(left: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
    """``start`` plus the products of matrices ``(G, T, K)`` and ``(G, K, T')``."""
    if torch.compiler.is_compiling() and left.shape[1] == 1 and len(left) <= FEW_PRODUCTS:
        # Single rows as a sum, which fuses with what is around it; a product is called.
        product = (left.mT * right).sum(1, keepdim=True)
        return product if start is None else start + product
    return left.bmm(right) if start is None else torch.baddbmm(start, left, right)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class KVView(Protocol):
    """How the positions of a layer see others: from queries, keys and values of new positions to
    the rows of attention, and back."""

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Queries ``(R, T, H)`` of ``(B, T, 3, N, H)``, and what they see."""
        ...

    def merge(self, out: Tensor) -> Tensor:
        """``(R, T, H)`` to ``(B, T, N * H)``."""
        ...


class FullView(NamedTuple):
    """The new positions are the whole sequence, and see each other by ``mask`` (see
    ``KeyValue``)."""

    mask: Any
    batch_size: int

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)
        return query, [KeyValue(key, value, self.mask)]

    def merge(self, out: Tensor) -> Tensor:
        return out.view(self.batch_size, -1, *out.shape[1:]).transpose(1, 2).flatten(2)
