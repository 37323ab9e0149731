"""Key/value cache for incremental decoding with several samples per prompt.

A prompt is computed once.  Its keys and values are stored once for all of its samples (*shared*),
and each sample stores only the positions that it adds (*own*).  Reads follow the mask: under a
row, column or window mask, a new position reads tens of keys, not all of the hundreds before it.

Shapes: P prompts, S samples of each, B = P * S, N heads, R = P * N * S attention rows, G key rows,
M distinct masks, T positions, T' earlier positions, H head size, L layers.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.models.layers.attention import KeyValue
from rudolph.models.rudolph.static_decode import StaticSelection, StaticView, static_selection

# A gather reads, writes and rereads every key that it takes.  A contiguous read is no slower, even
# if it covers up to this many times the needed keys and masks the keys in between.
GATHER_COST = 3


class KeySelection(NamedTuple):
    """The keys to read, in ascending order, and which of them each query attends to.

    Attributes:
        at: positions of the keys, as a slice or an index tensor.
        mask: ``(T, number of keys read)`` bool; None if every query attends to all of them.
    """

    at: slice | Tensor
    mask: Tensor | None


def select_keys(rows: Tensor) -> KeySelection | None:
    """Return the keys that some queries need, or None if they need none.

    >>> select_keys(torch.tensor([[True, False, True, False, True]]))
    KeySelection(at=slice(0, 5, 2), mask=None)

    Args:
        rows: mask rows of the queries, ``(T, T')`` bool.

    Returns:
        A slice with a step if the positions are evenly spaced.  Otherwise a contiguous slice if it
        reads at most ``GATHER_COST`` times the needed keys, else an index tensor.
    """
    positions = rows.any(0).nonzero().flatten()
    if not len(positions):
        return None
    first, last = int(positions[0]), int(positions[-1])
    key_positions: slice | Tensor = slice(first, last + 1, 1)
    if len(positions) <= last - first:
        step = int(positions[1]) - first
        if bool((positions.diff() == step).all()):
            key_positions = slice(first, last + 1, step)
        elif last - first + 1 > GATHER_COST * len(positions):
            key_positions = positions
    mask = rows[:, key_positions]
    return KeySelection(key_positions, None if bool(mask.all()) else mask)


Selections = tuple[KeySelection | None, KeySelection | None]
# Number of shared positions, start and end of the new positions, device of the cache.
CacheSpan = tuple[int, int, int, torch.device]


class KeyValueCache:
    """A preallocated cache of keys and values.

    Decoding first runs the prompts through the model, with one sample each.  ``expand_samples``
    then turns their positions into shared ones.  Every later forward pass appends positions
    of the individual samples.

    ``length`` counts the valid positions, shared ones included.  Setting it to a smaller value
    discards the positions after it.

    Args:
        tables: ``(M, T, T)`` bool on the CPU, the distinct masks of the layers.
        known_reads: key selections already derived from these masks, shared by all caches of a
            model.
        own: ``(L, 2, P, N, S, T, H)``, memory for the keys and values of each sample.
        shared: ``(L, 2, P, N, T', H)``, keys and values that all samples of a prompt share.
    """

    def __init__(
        self,
        tables: Tensor,
        known_reads: dict[CacheSpan, list[Selections]],
        own: Tensor,
        shared: Tensor | None = None,
    ) -> None:
        self.tables, self.known_reads, self.own, self.shared = tables, known_reads, own, shared
        self.num_prefix = 0 if shared is None else shared.shape[4]
        self.length = self.num_prefix
        # Views with prompts, heads and samples flattened to key rows: (L, 2, G, T, H).
        self.rows = None if shared is None else shared.flatten(2, 3), own.flatten(2, 4)

    def expand_samples(self, num_samples: int, *, num_positions: int) -> "KeyValueCache":
        """Return a cache in which the current positions are shared by several samples per prompt.

        Args:
            num_samples: S, samples per prompt.
            num_positions: positions that each sample can add.

        Raises:
            ValueError: if the cache has shared positions already.
        """
        if self.shared is not None:
            raise ValueError("the prompts of a cache are repeated once")
        num_layers, _, prompts, heads, _, _, size = self.own.shape
        own = self.own.new_empty(num_layers, 2, prompts, heads, num_samples, num_positions, size)
        shared = self.own[:, :, :, :, 0, : self.length]
        return KeyValueCache(self.tables, self.known_reads, own, shared)

    def select(self, prompts: Tensor, samples: Tensor) -> "KeyValueCache":
        """Return a copy with a selection of prompts and samples.

        Args:
            prompts: indices of the prompts, ``(P',)``.
            samples: indices of the samples of each kept prompt, ``(P', S')``.
        """
        shared = None if self.shared is None else self.shared.index_select(2, prompts)
        own = torch.stack(
            [
                self.own[:, :, prompt].index_select(3, indices)
                for prompt, indices in zip(prompts.tolist(), samples, strict=True)
            ],
            dim=2,
        )
        selected = KeyValueCache(self.tables, self.known_reads, own, shared)
        selected.length = self.length
        return selected

    def views(self, end: int, mask_of_layer: Sequence[int]) -> list["CachedView"]:
        """Return each layer's view of the positions from ``length`` to ``end``.

        Args:
            end: position after the last new one.
            mask_of_layer: index into ``tables`` for each layer.
        """
        start = self.length - self.num_prefix
        new_slots = self.own.narrow(5, start, end - self.length).unbind()
        # Build the views of all layers at once: per-layer overhead would exceed the computation.
        views_by_mask = [
            [self._key_value_views(*pair) for pair in zip(self.rows, reads, strict=True)]
            for reads in self._reads(end)
        ]
        return [
            CachedView(
                new_slots[layer], [part[layer] for part in views_by_mask[mask] if part is not None]
            )
            for layer, mask in enumerate(mask_of_layer)
        ]

    def static_views(self, mask_of_layer: Sequence[int]) -> list[StaticView]:
        """Return each layer's view of the next position, with shapes that never change.

        The cache must have shared positions.
        """
        assert self.shared is not None
        step = self.length - self.num_prefix
        slots, reads = self._steps
        step_reads = [
            (shared and shared.step(step), own and own.step(step)) for shared, own in reads
        ]
        layers = zip(self.shared.unbind(), self.own.unbind(), mask_of_layer, strict=True)
        return [
            StaticView(shared, own, slots[step], step_reads[mask]) for shared, own, mask in layers
        ]

    @cached_property
    def _steps(
        self,
    ) -> tuple[Sequence[Tensor], list[tuple[StaticSelection | None, StaticSelection | None]]]:
        """Return the storage index of each own position, and the keys it reads under each mask."""
        first, device = self.num_prefix, self.own.device
        rows = self.tables[:, first : first + self.own.shape[5]]
        end = first + rows.shape[1]
        reads = [
            (
                static_selection(mask[:, :first], device),
                static_selection(mask[:, first:end], device),
            )
            for mask in rows
        ]
        return torch.split(torch.arange(rows.shape[1], device=device), 1), reads

    def _key_value_views(
        self, rows: Tensor | None, read: KeySelection | None
    ) -> "list[KeyValue | GatheredKeys] | None":
        if rows is None or read is None:
            return None
        if isinstance(read.at, Tensor):
            return [GatheredKeys(layer, read.at, read.mask) for layer in rows.unbind()]
        keys, values = (rows[:, kind, :, read.at].unbind() for kind in (0, 1))
        return [KeyValue(key, value, read.mask) for key, value in zip(keys, values, strict=True)]

    def _reads(self, end: int) -> list[Selections]:
        """Return, for each mask, the shared and own keys that positions before ``end`` read."""
        span = (self.num_prefix, self.length, end, self.own.device)
        if span not in self.known_reads:
            rows = [table[self.length : end, :end] for table in self.tables]
            parts = (mask.tensor_split((self.num_prefix,), dim=1) for mask in rows)
            self.known_reads[span] = [
                (self._read(shared), self._read(own)) for shared, own in parts
            ]
        return self.known_reads[span]

    def _read(self, rows: Tensor) -> KeySelection | None:
        read = select_keys(rows)
        if read is None or self.own.device == rows.device:
            return read
        key_positions = read.at.to(self.own.device) if isinstance(read.at, Tensor) else read.at
        return KeySelection(
            key_positions, None if read.mask is None else read.mask.to(self.own.device)
        )


class GatheredKeys(NamedTuple):
    """Keys and values that are gathered only when they are read.

    Attributes:
        rows: ``(2, G, T, H)``.
        at: positions to gather.
        mask: ``(T, number of positions)`` bool, or None.
    """

    rows: Tensor
    at: Tensor
    mask: Tensor | None

    def gather(self) -> KeyValue:
        """Gather the keys and values."""
        key, value = self.rows.index_select(2, self.at).unbind()
        return KeyValue(key, value, self.mask)


class CachedView(NamedTuple):
    """The view of one layer's new positions, which follow cached ones; see ``KVView``.

    Attributes:
        new_slots: ``(2, P, N, S, T, H)``, memory for the keys and values of the new positions.
        parts: the shared and the own keys to read.
    """

    new_slots: Tensor
    parts: list[KeyValue | GatheredKeys]

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Store the new keys and values; return queries ``(R, T, H)`` and the keys to attend to.

        Args:
            qkv: ``(B, T, 3, N, H)``.
        """
        prompts, samples = self.new_slots.shape[1:4:2]
        # (3, P, N, S, T, H)
        rows = qkv.view(prompts, samples, *qkv.shape[1:]).permute(3, 0, 4, 1, 2, 5)
        self.new_slots.copy_(rows[1:])
        # A gather copies, so the new keys must be stored first.
        key_values = [
            part.gather() if isinstance(part, GatheredKeys) else part for part in self.parts
        ]
        return rows[0].flatten(0, 2), key_values

    def merge(self, out: Tensor) -> Tensor:
        """Return attention rows ``(R, T, H)`` as ``(B, T, N * H)``."""
        rows = out.view(self.new_slots.shape[1:]).permute(0, 2, 3, 1, 4)
        return rows.flatten(0, 1).flatten(2)
