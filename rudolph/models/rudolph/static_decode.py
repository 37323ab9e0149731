"""Single-token decoding with the same tensor shapes at every position.

Static shapes let one compiled step serve a whole decoding.  Every step therefore reads the same
number of keys: the keys of its mask row, padded with masked copies of one of those keys.

Shapes: P prompts, S samples of each, B = P * S, N heads, R = P * N * S attention rows, G key rows,
T positions, K keys read per step, H head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.models.layers.attention import KeyValue

# K is rounded up to a multiple of this, so that masks with similar key counts share a compilation.
NUM_KEYS_MULTIPLE = 32


class StaticSelection(NamedTuple):
    """The keys that each position reads, and which of them it attends to.

    Attributes:
        at: indices of the keys read, ``(T, K)``, or ``(K,)`` for one position; None reads all
            keys.
        mask: bool, ``(T, K)``, or ``(1, K)`` for one position; None attends to all keys read.
    """

    at: Tensor | None
    mask: Tensor | None

    def step(self, position: int) -> "StaticSelection":
        """Return the selection of one position, with ``at`` ``(K,)`` and ``mask`` ``(1, K)``."""
        at = None if self.at is None else self.at[position]
        return StaticSelection(at, None if self.mask is None else self.mask[position, None])

    def read(self, rows: Tensor) -> KeyValue:
        """Return the keys and values that one position reads, out of ``rows`` ``(2, G, T, H)``."""
        if self.at is not None:
            rows = rows.index_select(2, self.at)
            # as_strided forces the compiler to materialise the gather as one copy, instead of
            # repeating it inside each sum.
            rows = rows.as_strided(rows.shape, rows.stride())
        key, value = rows
        return KeyValue(key, value, self.mask)


def static_selection(rows: Tensor, device: torch.device) -> StaticSelection | None:
    """Return the keys that each position reads, padded to a common number of keys.

    A padding entry repeats a key that the position attends to, because other keys may not be
    computed yet.  A position that attends to none repeats key 0, which always exists.  If no
    position attends to any key, the result is None.

    Args:
        rows: mask rows of the positions over some keys, ``(T, T')`` bool.
        device: where the returned tensors go.
    """
    max_keys = int(rows.sum(1).max()) if rows.numel() else 0
    if not max_keys:
        return None
    if bool(rows.all()):
        return StaticSelection(None, None)
    num_keys = min(-(-max_keys // NUM_KEYS_MULTIPLE) * NUM_KEYS_MULTIPLE, rows.shape[1])
    mask, indices = rows.sort(dim=1, descending=True, stable=True)
    mask, indices = mask[:, :num_keys], indices[:, :num_keys]
    indices = torch.where(mask, indices, torch.where(mask[:, :1], indices[:, :1], 0))
    return StaticSelection(indices.contiguous().to(device), mask.contiguous().to(device))


class StaticView(NamedTuple):
    """The key/value view of one new position of a layer, with static shapes; see ``KVView``.

    Attributes:
        shared: ``(2, P, N, T', H)``, keys and values common to all samples of a prompt.
        own: ``(2, P, N, S, T, H)``, keys and values of each sample.
        slot: ``(1,)``, index in ``own`` at which the new position is stored.
        reads: selections from ``shared`` and from ``own``; None where no key is read.
    """

    shared: Tensor
    own: Tensor
    slot: Tensor
    reads: tuple[StaticSelection | None, StaticSelection | None]

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Store the new keys and values; return queries ``(R, 1, H)`` and the keys to attend to.

        Args:
            qkv: ``(B, 1, 3, N, H)``.
        """
        prompts, samples = self.own.shape[1:4:2]
        # (3, P, N, S, 1, H)
        rows = qkv.view(prompts, samples, *qkv.shape[1:]).permute(3, 0, 4, 1, 2, 5)
        self.own.index_copy_(4, self.slot, rows[1:])
        stored = self.shared.flatten(1, 2), self.own.flatten(1, 3)
        pairs = zip(stored, self.reads, strict=True)
        return rows[0].flatten(0, 2), [
            selection.read(part) for part, selection in pairs if selection
        ]

    def merge(self, out: Tensor) -> Tensor:
        """Return attention rows ``(R, 1, H)`` as ``(B, 1, N * H)``."""
        rows = out.view(*self.own.shape[1:4], 1, -1).permute(0, 2, 3, 1, 4)
        return rows.flatten(0, 1).flatten(2)
