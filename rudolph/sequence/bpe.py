"""Byte-pair encoding by its rules: training, the model file, and encoding a word with dropout.

The file is YouTokenToMe's, so either can read what the other wrote.  Training is done here
because YouTokenToMe's threads race, even when it is asked for one: from equal texts it makes
models that differ wherever pairs are equally frequent.  Here a tie goes to the lower ids.

Source: Sennrich 2016 (arXiv:1508.07909); the text format of YouTokenToMe, ``bpe.cpp``; dropout of
Provilkov 2020 (arXiv:1910.13267).
"""

import heapq
import re
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rudolph.sequence.layout import BOS, EOS, PAD, UNK

WORD_START = "\u2581"
# YouTokenToMe separates words at ASCII space and its own mark alone; NBSP is a character.
WORD = re.compile(rf"[^ \t\n\v\f\r{WORD_START}]+")
NUM_SPECIALS = 4

TokenPair = tuple[int, int]


@dataclass(frozen=True)
class BPEModel:
    """``characters`` code point to id; ``merges`` pair to (priority, merged id), best first."""

    characters: dict[int, int]
    merges: dict[TokenPair, tuple[int, int]]

    def encode_word(
        self, word: str, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> list[int]:
        """Return the ids of a word that starts with ``WORD_START``.

        A run of unknown characters is one id.  Before each merge every pair that could be merged
        is dropped with probability ``dropout``, for this merge alone.
        """
        merging = _Merging(self._known(word), self.merges)
        while merging.places:
            kept = None
            if dropout:
                kept = (torch.rand(len(merging.places), generator=generator) >= dropout).numpy()
            at = merging.best(kept)
            if at is None:
                break
            merging.merge(at)
        return merging.ids()

    def _known(self, word: str) -> list[int]:
        """Return the ids of a word's characters; a run of unknown ones is one ``UNK``."""
        tokens: list[int] = []
        for character in word:
            token = self.characters.get(ord(character), UNK)
            if token != UNK or tokens[-1:] != [UNK]:
                tokens.append(token)
        return tokens

    def encode(
        self, text: str, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> list[int]:
        """Return the ids of the words of a text."""
        return [
            token
            for word in WORD.findall(text)
            for token in self.encode_word(WORD_START + word, dropout, generator)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; an unknown character reads ``<UNK>``."""
        text = "".join(self.pieces[token] for token in ids)
        return text.replace(WORD_START, " ").removeprefix(" ")

    @property
    def vocab_size(self) -> int:
        return NUM_SPECIALS + len(self.characters) + len(self.merges)

    @cached_property
    def pieces(self) -> dict[int, str]:
        """The text of each id."""
        pieces = {PAD: "<PAD>", UNK: "<UNK>", BOS: "<BOS>", EOS: "<EOS>"}
        pieces |= {token: chr(code) for code, token in self.characters.items()}
        for (left, right), (_, new) in self.merges.items():
            pieces[new] = pieces[left] + pieces[right]
        return pieces

    def text(self) -> str:
        """The model file."""
        lines = [f"{len(self.characters)} {len(self.merges)}"]
        lines += [f"{code} {token}" for code, token in self.characters.items()]
        lines += [f"{left} {right} {new}" for (left, right), (_, new) in self.merges.items()]
        return "\n".join([*lines, f"{UNK} {PAD} {BOS} {EOS}"]) + "\n"


class _Merging:
    """A word while its pairs are merged: a linked list of ids and a heap of possible merges.

    ``places`` are the positions of the left ids of all pairs that can be merged, in order.  A word
    of n ids takes O(n log n) steps of the heap, and the memory moves of a sorted list.
    """

    def __init__(self, tokens: list[int], merges: dict[TokenPair, tuple[int, int]]) -> None:
        self.tokens, self.merges = tokens, merges
        self.after = list(range(1, len(tokens) + 1))
        self.before = list(range(-1, len(tokens) - 1))
        found = {at: merges[pair] for at, pair in enumerate(pairwise(tokens)) if pair in merges}
        self.merge_at, self.places = found, list(found)
        self.heap = [(merge, at) for at, merge in found.items()]
        heapq.heapify(self.heap)

    def best(self, is_kept: NDArray[np.bool_] | None) -> int | None:
        """Return the place of the best merge among those kept, the leftmost of equal ones.

        Args:
            is_kept: one for each of ``places``; None keeps all.
        """
        passed, best = [], None
        while self.heap:
            merge, at = self.heap[0]
            # Entries are never removed from the middle: one that is no longer true is dropped.
            if self.merge_at.get(at) == merge:
                if is_kept is None or is_kept[bisect_left(self.places, at)]:
                    best = at
                    break
                passed.append((merge, at))
            heapq.heappop(self.heap)
        for entry in passed:
            heapq.heappush(self.heap, entry)
        return best

    def merge(self, at: int) -> None:
        """Merge the pair whose left id is at ``at``."""
        self.tokens[at] = self.merge_at[at][1]
        right = self.after[at]
        self._forget(right)
        self.after[at] = self.after[right]
        if self.after[at] < len(self.tokens):
            self.before[self.after[at]] = at
        for place in (self.before[at], at):
            self._look(place)

    def ids(self) -> list[int]:
        """Return the ids from left to right."""
        found, at = [], 0
        while at < len(self.tokens):
            found.append(self.tokens[at])
            at = self.after[at]
        return found

    def _look(self, at: int) -> None:
        """Bring the merge at a place up to date with the ids that are there now."""
        if at < 0:
            return
        right = self.after[at]
        pair = (self.tokens[at], self.tokens[right]) if right < len(self.tokens) else None
        merge = None if pair is None else self.merges.get(pair)
        if merge is None:
            self._forget(at)
            return
        if at not in self.merge_at:
            insort(self.places, at)
        self.merge_at[at] = merge
        heapq.heappush(self.heap, (merge, at))

    def _forget(self, at: int) -> None:
        if self.merge_at.pop(at, None) is not None:
            del self.places[bisect_left(self.places, at)]


def read_model(path: Path) -> BPEModel:
    """The model in a file of this module or of YouTokenToMe.

    Raises:
        ValueError: when it is no such file.
    """
    try:
        lines = [
            [int(word) for word in line.split()] for line in path.read_text("utf-8").splitlines()
        ]
        num_characters, num_merges = lines[0]
        last = 1 + num_characters + num_merges
        characters = {code: token for code, token in lines[1 : 1 + num_characters]}  # noqa: C416
        rules = lines[1 + num_characters : last]
        merges = {(left, right): (rank, new) for rank, (left, right, new) in enumerate(rules)}
        unk, pad, bos, eos = lines[last]
        _require_consistent(characters, merges, num_characters, num_merges)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path}: not a YouTokenToMe model file ({error})") from error
    if (pad, unk, bos, eos) != (PAD, UNK, BOS, EOS):
        raise ValueError(f"{path}: special ids must be pad 0, unk 1, bos 2, eos 3")
    return BPEModel(characters, merges)


def _require_consistent(
    characters: dict[int, int],
    merges: dict[TokenPair, tuple[int, int]],
    num_characters: int,
    num_merges: int,
) -> None:
    """Raise ``ValueError`` unless every id is given once and merges join ids that exist.

    YouTokenToMe would read memory that is not its own.
    """
    # Compared first: a damaged number may be larger than memory.
    if (len(characters), len(merges)) != (num_characters, num_merges):
        raise ValueError(f"expected {num_characters} characters and {num_merges} merges")
    ids = {*characters.values(), *(new for _, new in merges.values())}
    if ids != set(range(NUM_SPECIALS, NUM_SPECIALS + num_characters + num_merges)):
        raise ValueError("expected every id once")
    if not all(0 <= code < 0x110000 for code in characters):
        raise ValueError("expected code points of Unicode")
    if not {each for pair in merges for each in pair} <= ids:
        raise ValueError("a merge joins an id that is not there")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPEModel:
    """Merge the most frequent pair until there are ``vocab_size`` ids or no pair is left.

    Raises:
        ValueError: when the texts hold no word, or more characters than ``vocab_size``.
    """
    counts = Counter(WORD_START + word for text in texts for word in WORD.findall(text))
    if not counts:
        raise ValueError("a tokenizer cannot be trained on texts without a word")
    frequency: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            frequency[character] += count
    ordered = sorted(frequency, key=lambda character: (-frequency[character], character))
    characters = {ord(character): NUM_SPECIALS + at for at, character in enumerate(ordered)}
    first_new = NUM_SPECIALS + len(characters)
    if first_new > vocab_size:
        raise ValueError(
            f"vocab_size must be at least {first_new} for the {len(characters)} characters of "
            f"the texts, got {vocab_size}"
        )
    words = [[characters[ord(character)] for character in word] for word in counts]
    merges = _merges(words, list(counts.values()), range(first_new, vocab_size))
    return BPEModel(characters, merges)


def _merges(
    words: list[list[int]], counts: list[int], new_ids: range
) -> dict[TokenPair, tuple[int, int]]:
    totals: Counter[TokenPair] = Counter()
    places: defaultdict[TokenPair, set[int]] = defaultdict(set)
    for at, word in enumerate(words):
        for pair in pairwise(word):
            totals[pair] += counts[at]
            places[pair].add(at)
    # Entries are never changed in place: one whose count is no longer true is passed over.
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    merges: dict[TokenPair, tuple[int, int]] = {}
    for rank, new in enumerate(new_ids):
        while heap and -heap[0][0] != totals[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or heap[0][0] == 0:
            break
        best = heapq.heappop(heap)[1]
        merges[best] = (rank, new)
        changed: set[TokenPair] = set()
        for at in sorted(places.pop(best)):
            before, words[at] = words[at], _merged(words[at], best, new)
            for pair in pairwise(before):
                totals[pair] -= counts[at]
                changed.add(pair)
            for pair in pairwise(words[at]):
                totals[pair] += counts[at]
                places[pair].add(at)
                changed.add(pair)
        for pair in changed - {best}:
            heapq.heappush(heap, (-totals[pair], pair))
    return merges


def _merged(word: list[int], pair: TokenPair, new: int) -> list[int]:
    """A word with every occurrence of a pair replaced, from the left."""
    out: list[int] = []
    at = 0
    while at < len(word):
        if tuple(word[at : at + 2]) == pair:
            out.append(new)
            at += 2
        else:
            out.append(word[at])
            at += 1
    return out
