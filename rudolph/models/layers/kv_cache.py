"""Keys and values of the positions that a decoding has behind it.

A prompt is computed once: its keys and values are kept once for all of its samples (*shared*),
and each sample keeps only what it adds (*own*).  Reading follows the mask: of an image row, column
or window a new position takes the tens of keys that it may see and not the hundreds before it.

Shapes: P prompts, S samples of each, B = P * S, N heads, R = P * N * S rows of attention, T
positions, H head size, L layers.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.models.layers.attention import KeyValue
from rudolph.models.rudolph.static_decode import StaticSelection, StaticView, static_selection

# A gather reads, writes and reads again what it takes; up to so many times what is needed, reading
# a whole stretch with the rest masked costs no more.
GATHER_COST = 3


class KeySelection(NamedTuple):
    """Which of some keys are read, in ascending order, and which of these each query sees."""

    at: slice | Tensor
    mask: Tensor | None


def select_keys(rows: Tensor) -> KeySelection | None:
    """The keys that queries need, from their rows of a mask, ``(T, T')`` bool; None for none.

    >>> select_keys(torch.tensor([[True, False, True, False, True]]))
    KeySelection(at=slice(0, 5, 2), mask=None)
    """
    positions = rows.any(0).nonzero().flatten()
    if not len(positions):
        return None
    first, last = int(positions[0]), int(positions[-1])
    at: slice | Tensor = slice(first, last + 1, 1)
    if len(positions) <= last - first:
        step = int(positions[1]) - first
        if bool((positions.diff() == step).all()):
            at = slice(first, last + 1, step)
        elif last - first + 1 > GATHER_COST * len(positions):
            at = positions
    mask = rows[:, at]
    return KeySelection(at, None if bool(mask.all()) else mask)


Selections = tuple[KeySelection | None, KeySelection | None]
# Number of shared positions, first and end of the new ones, and where the memory is.
CacheSpan = tuple[int, int, int, torch.device]


class KeyValueCache:
    """Memory that is allocated once; positions from a smaller ``length`` on are forgotten.

    Args:
        tables: ``(M, T, T)`` bool on the CPU, the different masks of the layers.
        known_reads: what was found out about these masks, for all caches of a model.
        own: ``(L, 2, P, N, S, T, H)``, memory for the keys and values of each sample.
        shared: ``(L, 2, P, N, T', H)``, those that samples of a prompt have in common.
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
        # Rows of attention side by side: (L, 2, G, T, H), shared ones and own.
        self.rows = None if shared is None else shared.flatten(2, 3), own.flatten(2, 4)

    def repeat(self, num_samples: int, *, num_positions: int) -> "KeyValueCache":
        """The same prompts for several samples of each, with room for what these add."""
        if self.shared is not None:
            raise ValueError("the prompts of a cache are repeated once")
        num_layers, _, prompts, heads, _, _, size = self.own.shape
        own = self.own.new_empty(num_layers, 2, prompts, heads, num_samples, num_positions, size)
        shared = self.own[:, :, :, :, 0, : self.length]
        return KeyValueCache(self.tables, self.known_reads, own, shared)

    def keep(self, prompts: Tensor, samples: Tensor) -> "KeyValueCache":
        """The cache of some prompts ``(P',)`` and some samples of each ``(P', S')``, by number."""
        shared = None if self.shared is None else self.shared.index_select(2, prompts)
        own = torch.stack(
            [
                self.own[:, :, prompt].index_select(3, numbers)
                for prompt, numbers in zip(prompts.tolist(), samples, strict=True)
            ],
            dim=2,
        )
        kept = KeyValueCache(self.tables, self.known_reads, own, shared)
        kept.length = self.length
        return kept

    def looks(self, end: int, mask_of_layer: Sequence[int]) -> list["CachedView"]:
        """How each layer's positions from ``length`` to ``end`` see those before them."""
        start = self.length - self.num_prefix
        places = self.own.narrow(5, start, end - self.length).unbind()
        # Views for all layers at once: what is done for each costs more than what is computed.
        seen = [
            [self._views(*pair) for pair in zip(self.rows, reads, strict=True)]
            for reads in self._reads(end)
        ]
        return [
            CachedView(places[layer], [part[layer] for part in seen[number] if part is not None])
            for layer, number in enumerate(mask_of_layer)
        ]

    def static_views(self, mask_of_layer: Sequence[int]) -> list[StaticView]:
        """How each layer's next position sees those before it, in shapes that stay."""
        assert self.shared is not None
        step = self.length - self.num_prefix
        places, reads = self._steps
        now = [(shared and shared.step(step), own and own.step(step)) for shared, own in reads]
        kept = zip(self.shared.unbind(), self.own.unbind(), mask_of_layer, strict=True)
        return [StaticView(shared, own, places[step], now[mask]) for shared, own, mask in kept]

    @cached_property
    def _steps(
        self,
    ) -> tuple[Sequence[Tensor], list[tuple[StaticSelection | None, StaticSelection | None]]]:
        """Where each position of its own is stored, and what it reads by each mask."""
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

    def _views(
        self, rows: Tensor | None, read: KeySelection | None
    ) -> "list[KeyValue | GatheredKeys] | None":
        if rows is None or read is None:
            return None
        if isinstance(read.at, Tensor):
            return [GatheredKeys(layer, read.at, read.mask) for layer in rows.unbind()]
        keys, values = (rows[:, kind, :, read.at].unbind() for kind in (0, 1))
        return [KeyValue(key, value, read.mask) for key, value in zip(keys, values, strict=True)]

    def _reads(self, end: int) -> list[Selections]:
        """For each mask, what positions from ``length`` to ``end`` read: shared keys and own."""
        place = (self.num_prefix, self.length, end, self.own.device)
        if place not in self.known_reads:
            rows = [table[self.length : end, :end] for table in self.tables]
            parts = (mask.tensor_split((self.num_prefix,), dim=1) for mask in rows)
            self.known_reads[place] = [
                (self._read(shared), self._read(own)) for shared, own in parts
            ]
        return self.known_reads[place]

    def _read(self, rows: Tensor) -> KeySelection | None:
        read = select_keys(rows)
        if read is None or self.own.device == rows.device:
            return read
        at = read.at.to(self.own.device) if isinstance(read.at, Tensor) else read.at
        return KeySelection(at, None if read.mask is None else read.mask.to(self.own.device))


class GatheredKeys(NamedTuple):
    """Keys and values ``(2, G, T, H)`` of which those ``at`` some positions are read."""

    rows: Tensor
    at: Tensor
    mask: Tensor | None

    def seen(self) -> KeyValue:
        key, value = self.rows.index_select(2, self.at).unbind()
        return KeyValue(key, value, self.mask)


class CachedView(NamedTuple):
    """How new positions of a layer see those before them: see ``attention.Look``.

    ``place`` (2, P, N, S, T, H) is where their keys and values are stored.
    """

    place: Tensor
    parts: list[KeyValue | GatheredKeys]

    def split(self, qkv: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Queries ``(R, T, H)`` of ``(B, T, 3, N, H)``, and what they see."""
        prompts, samples = self.place.shape[1:4:2]
        # (3, P, N, S, T, H)
        rows = qkv.view(prompts, samples, *qkv.shape[1:]).permute(3, 0, 4, 1, 2, 5)
        self.place.copy_(rows[1:])
        # What is gathered is copied, so it has to be stored before.
        seen = [part.seen() if isinstance(part, GatheredKeys) else part for part in self.parts]
        return rows[0].flatten(0, 2), seen

    def merge(self, out: Tensor) -> Tensor:
        """``(R, T, H)`` to ``(B, T, N * H)``."""
        rows = out.view(self.place.shape[1:]).permute(0, 2, 3, 1, 4)
        return rows.flatten(0, 1).flatten(2)
