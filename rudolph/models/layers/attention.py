"""The package's only attention, and the views that decide what each position attends to.

A layer passes its queries, keys and values to a ``KVView``.  The view arranges them as attention
rows, selects the keys of each row and reassembles the output.  ``FullView`` covers a whole
sequence under its mask.  ``kv_cache.CachedView`` covers new positions after cached ones, and
``static_decode.StaticView`` a single new position with static shapes.

Source: CogView (arXiv:2105.13290) for PB-relax.

Shapes: B samples, N heads, R = B * N attention rows, G groups of rows that share keys, T query
positions, T' key positions, H head size.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.layers.dropout import apply_dropout

PB_RELAX_SCALE = 32.0
# The maximum that PB-relax subtracts: of each score row or of the whole matrix.
PB_RELAX_MAXIMA = ("row", "matrix")
# Up to this many positions, plain products beat the CPU's fused kernel.  Including its backward
# pass, the kernel takes 1.5 to 2 times as long at 100 positions and equally long at 300.
MAX_UNFUSED_LENGTH = 256
# Up to this many single-row products, a fused sum is faster than one call of bmm.
MAX_SUMMED_PRODUCTS = 64


class KeyValue(NamedTuple):
    """Keys and values, stored once per group of attention rows that share them.

    Each group consists of R / G adjacent rows.

    Attributes:
        key: ``(G, T', H)``.
        value: ``(G, T', H)``.
        mask: ``(T, T')`` bool, true where a query may attend to a key; ``(B, T, T')`` with one
            mask per sample, shared by its R / B adjacent rows; a ``BlockMask`` of
            FlexAttention; or None to attend to all keys.
    """

    key: Tensor
    value: Tensor
    mask: Any = None


def block_mask(table: Tensor) -> Any:
    """Turn a bool mask ``(T, T)`` into a FlexAttention ``BlockMask``, which skips empty blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[query, key]

    length = len(table)
    return create_block_mask(mask_mod, None, None, length, length, device=str(table.device))


@cache
def block_kernel(device: str) -> Any:
    """Return FlexAttention, compiled except on the CPU.

    The uncompiled CPU version has no gradient.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention)


def block_attention(query: Tensor, key_value: KeyValue, *, dropout: float) -> Tensor:
    """Return attention ``(R, T, H)`` over the non-empty blocks of a ``BlockMask``.

    Args:
        query: ``(R, T, H)``.
        key_value: keys and values with a ``BlockMask``.
        dropout: must be 0, because FlexAttention has no dropout.

    Raises:
        ValueError: if ``dropout`` is not 0.

    Source: Dong et al. 2024 (arXiv:2412.05496).
    """
    if dropout:
        raise ValueError(f"block masks need model.attention_dropout 0, got {dropout}")
    key, value, mask = key_value
    kernel = block_kernel(query.device.type)
    out: Tensor = kernel(query[None], key[None], value[None], block_mask=mask)[0]
    return out


def attention(
    query: Tensor, key_values: Sequence[KeyValue], *, pb_relax: str | None, dropout: float
) -> Tensor:
    """Return softmax attention ``(R, T, H)`` over the concatenation of all given keys.

    PB-relax (``apply_pb_relax``) keeps float16 scores from overflowing.  It is skipped in float32,
    in bfloat16, and in fused kernels with float32 scores, where it would change only rounding.

    Args:
        query: ``(R, T, H)``, not yet scaled.
        key_values: one or two parts of the keys and values; two parts are the prompt's shared keys
            and each sample's own.
        pb_relax: maximum to subtract, ``row`` or ``matrix``; None disables PB-relax.
        dropout: dropout probability of the attention weights.

    Raises:
        ValueError: if ``dropout`` is not 0 with a ``BlockMask``.
    """
    first, *others = key_values
    if not others and first.mask is not None and not isinstance(first.mask, Tensor):
        return block_attention(query, first, dropout=dropout)
    # In half precision on the CPU, the fused kernel takes three times as long as plain products.
    is_long = max(query.shape[1], first.key.shape[1]) > MAX_UNFUSED_LENGTH and query.shape[1] > 1
    is_fused = query.device.type != "cpu" or (query.dtype == torch.float32 and is_long)
    if is_fused and not others and len(first.key) == len(query):
        key, value, mask = first
        has_own_masks = mask is not None and mask.dim() == 3
        # The kernel takes four dimensions: one batch of many heads, or one batch per mask.
        shape = (len(mask) if has_own_masks else 1, -1)
        out = F.scaled_dot_product_attention(
            query.view(*shape, *query.shape[1:]),
            key.view(*shape, *key.shape[1:]),
            value.view(*shape, *value.shape[1:]),
            attn_mask=mask[:, None] if has_own_masks else mask,
            dropout_p=dropout,
        )
        return out.flatten(0, 1)
    is_relaxed = pb_relax is not None and query.dtype == torch.float16
    query = query * (query.shape[-1] ** -0.5 / (PB_RELAX_SCALE if is_relaxed else 1.0))
    parts = [_scores(query, part) for part in key_values]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # (R, T, T')
    if is_relaxed:
        scores = apply_pb_relax(scores, pb_relax)
    weights = scores.softmax(-1)
    if dropout:
        weights = apply_dropout(weights, dropout)
    if not others:
        return _product(_stack_shared_rows(weights, first), first.value).view_as(query)
    [second] = others
    before, after = weights.tensor_split((first.key.shape[1],), dim=-1)
    out = _product(_stack_shared_rows(before, first), first.value).view_as(query)
    # Each sample's own keys form one group per row; baddbmm adds their part without a new tensor.
    return _product(after, second.value, out)


def apply_pb_relax(scores: Tensor, maximum: str | None) -> Tensor:
    """Subtract the maximum from scores ``(R, T, T')`` and scale them back to full size.

    The input scores were computed ``PB_RELAX_SCALE`` times smaller.  The maximum is subtracted
    before they are scaled back, so the largest score is 0 and nothing overflows.  The softmax is
    unchanged.

    Args:
        scores: ``(R, T, T')``, divided by ``PB_RELAX_SCALE``.
        maximum: ``matrix`` for one maximum per score matrix ``(T, T')``, as in CogView and
            ru-dolph; otherwise one per query.  With ``matrix``, queries whose scores lie far below
            the maximum lose precision in float16.
    """
    dims = (-2, -1) if maximum == "matrix" else -1
    return (scores - scores.amax(dims, keepdim=True)) * PB_RELAX_SCALE


def _stack_shared_rows(rows: Tensor, key_value: KeyValue) -> Tensor:
    """Stack the rows ``(R, T, .)`` that share keys as ``(G, T * R / G, .)``.

    The keys of a group are then read from memory once.
    """
    num_groups = len(key_value.key)
    return rows if len(rows) == num_groups else rows.reshape(num_groups, -1, rows.shape[-1])


def _scores(query: Tensor, key_value: KeyValue) -> Tensor:
    """Return attention scores ``(R, T, T')`` of scaled queries, with -inf where masked."""
    rows, key = _stack_shared_rows(query, key_value), key_value.key.mT
    if key_value.mask is None:
        return _product(rows, key).view(*query.shape[:2], -1)
    bias = _bias(key_value.mask, query.dtype)
    num_copies = rows.shape[1] // bias.shape[-2]
    if bias.dim() == 2:
        bias = bias.repeat(num_copies, 1)
    else:
        bias = bias.repeat_interleave(len(rows) // len(bias), dim=0).repeat(1, num_copies, 1)
    scores = _product(rows, key, bias)
    return scores.view(*query.shape[:2], -1)


def _product(left: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
    """Return the batched product of ``(G, T, K)`` and ``(G, K, T')``, plus ``start`` if given."""
    if torch.compiler.is_compiling() and left.shape[1] == 1 and len(left) <= MAX_SUMMED_PRODUCTS:
        # The compiler fuses a sum with the operations around it, but calls bmm separately.
        product = (left.mT * right).sum(1, keepdim=True)
        return product if start is None else start + product
    return left.bmm(right) if start is None else torch.baddbmm(start, left, right)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class KVView(Protocol):
    """A view of keys and values, which maps new positions to attention rows and back.

    ``Layer.attend`` calls ``split``, then ``attention``, then ``merge``, wherever the keys come
    from.
    """

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Return queries ``(R, T, H)`` and the keys and values that they attend to.

        Args:
            qkv: queries, keys and values of the new positions, ``(B, T, 3, N, H)``.
        """
        ...

    def merge(self, out: Tensor) -> Tensor:
        """Return attention rows ``(R, T, H)`` as ``(B, T, N * H)``."""
        ...


class FullView(NamedTuple):
    """The view of a whole sequence whose positions attend to each other.

    Attributes:
        mask: the mask of ``KeyValue``.
        batch_size: B.
    """

    mask: Any
    batch_size: int

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Split ``(B, T, 3, N, H)`` into queries ``(R, T, H)`` and their keys and values."""
        query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # each (R, T, H)
        return query, [KeyValue(key, value, self.mask)]

    def merge(self, out: Tensor) -> Tensor:
        """Return attention rows ``(R, T, H)`` as ``(B, T, N * H)``."""
        return out.view(self.batch_size, -1, *out.shape[1:]).transpose(1, 2).flatten(2)
