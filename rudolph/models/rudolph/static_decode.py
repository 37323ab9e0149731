"""How a single new position sees those before it, in the same shapes at every position.

A step that is compiled once serves a whole decoding, so every step reads as many keys: those its
mask shows, and then one of them again, hidden, up to the most that any position needs.

Shapes: P prompts, S samples of each, N heads, R = P * N * S rows of attention, G rows of keys, T
positions, K keys read, H head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.models.layers.attention import KeyValue

# Masks whose numbers of keys are close share a compilation.
KEYS_AT_ONCE = 32


class StaticSelection(NamedTuple):
    """Which keys are read, ``(T, K)`` or all, and which of these are seen, ``(T, K)`` or all."""

    at: Tensor | None
    mask: Tensor | None

    def step(self, number: int) -> "StaticSelection":
        """Those of one position, ``(K,)`` and ``(1, K)``."""
        at = None if self.at is None else self.at[number]
        return StaticSelection(at, None if self.mask is None else self.mask[number, None])

    def seen(self, rows: Tensor) -> KeyValue:
        """Of keys and values ``(2, G, T, H)``, what one position reads."""
        if self.at is not None:
            rows = rows.index_select(2, self.at)
            # A view by strides is of memory: compiled, it makes this a copy, row after row, and
            # no gather inside of each sum.
            rows = rows.as_strided(rows.shape, rows.stride())
        key, value = rows
        return KeyValue(key, value, self.mask)


def static_selection(rows: Tensor, device: torch.device) -> StaticSelection | None:
    """What positions read of some keys, from their rows of a mask, ``(T, T')`` bool.

    None where no position reads any.  What is read and hidden is a key that the position sees,
    since others may not be there yet; the first, which must be there, where it sees none.
    """
    most = int(rows.sum(1).max()) if rows.numel() else 0
    if not most:
        return None
    if bool(rows.all()):
        return StaticSelection(None, None)
    width = min(-(-most // KEYS_AT_ONCE) * KEYS_AT_ONCE, rows.shape[1])
    mask, at = rows.sort(dim=1, descending=True, stable=True)
    mask, at = mask[:, :width], at[:, :width]
    at = torch.where(mask, at, torch.where(mask[:, :1], at[:, :1], 0))
    return StaticSelection(at.contiguous().to(device), mask.contiguous().to(device))


class StaticView(NamedTuple):
    """How a new position of a layer sees those before it: see ``attention.Look``.

    Args:
        shared: ``(2, P, N, T', H)``, keys and values that samples of a prompt have in common.
        own: ``(2, P, N, S, T, H)``, those of each sample.
        place: ``(1,)``, where among its own ones the new position's are stored.
        reads: of the shared ones and of its own.
    """

    shared: Tensor
    own: Tensor
    place: Tensor
    reads: tuple[StaticSelection | None, StaticSelection | None]

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Queries ``(R, 1, H)`` of ``(B, 1, 3, N, H)``, and what they see."""
        prompts, samples = self.own.shape[1:4:2]
        # (3, P, N, S, 1, H)
        rows = qkv.view(prompts, samples, *qkv.shape[1:]).permute(3, 0, 4, 1, 2, 5)
        self.own.index_copy_(4, self.place, rows[1:])
        kept = self.shared.flatten(1, 2), self.own.flatten(1, 3)
        pairs = zip(kept, self.reads, strict=True)
        return rows[0].flatten(0, 2), [reads.seen(part) for part, reads in pairs if reads]

    def merge(self, out: Tensor) -> Tensor:
        """``(R, 1, H)`` to ``(B, 1, N * H)``."""
        rows = out.view(*self.own.shape[1:4], 1, -1).permute(0, 2, 3, 1, 4)
        return rows.flatten(0, 1).flatten(2)
