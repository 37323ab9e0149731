"""Byte-pair encoding in Python: training, model files, encoding with dropout, decoding.

The model file has YouTokenToMe's text format, so each implementation reads the other's files.
Training is reimplemented here because YouTokenToMe's is not repeatable: its threads race even with
``n_threads=1``.  The same texts then give different models wherever pairs are equally frequent.
This module breaks such ties in favour of the lower ids.

Source: Sennrich 2016 (arXiv:1508.07909) for BPE; Provilkov 2020 (arXiv:1910.13267) for dropout;
YouTokenToMe, ``bpe.cpp``, for the file format.
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
# YouTokenToMe splits words only at ASCII whitespace and its own mark; NBSP is a character.
WORD = re.compile(rf"[^ \t\n\v\f\r{WORD_START}]+")
NUM_SPECIALS = 4

TokenPair = tuple[int, int]


@dataclass(frozen=True)
class BPEModel:
    """A trained BPE vocabulary.

    Attributes:
        characters: id of each code point.
        merges: (priority, merged id) of each pair of ids, best priority first.
    """

    characters: dict[int, int]
    merges: dict[TokenPair, tuple[int, int]]

    def encode_word(
        self, word: str, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> list[int]:
        """Return the ids of a word that starts with ``WORD_START``.

        A run of unknown characters becomes a single ``UNK``.

        Args:
            word: the word, including its leading ``WORD_START``.
            dropout: probability with which each candidate pair is skipped, resampled before every
                merge.
            generator: source of the dropout samples; None uses torch's default generator.
        """
        state = _MergeState(self._known(word), self.merges)
        while state.positions:
            is_kept = None
            if dropout:
                is_kept = (
                    torch.rand(len(state.positions), generator=generator) >= dropout
                ).numpy()
            position = state.best(is_kept)
            if position is None:
                break
            state.merge(position)
        return state.ids()

    def _known(self, word: str) -> list[int]:
        """Return the ids of a word's characters; a run of unknown ones becomes one ``UNK``."""
        tokens: list[int] = []
        for character in word:
            token = self.characters.get(ord(character), UNK)
            if token != UNK or tokens[-1:] != [UNK]:
                tokens.append(token)
        return tokens

    def encode(
        self, text: str, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> list[int]:
        """Return the ids of all words of a text; see ``encode_word`` for the arguments."""
        return [
            token
            for word in WORD.findall(text)
            for token in self.encode_word(WORD_START + word, dropout, generator)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids; an unknown character becomes ``<UNK>``."""
        text = "".join(self.pieces[token] for token in ids)
        return text.replace(WORD_START, " ").removeprefix(" ")

    @property
    def vocab_size(self) -> int:
        """Return the number of ids: special tokens, characters and merges."""
        return NUM_SPECIALS + len(self.characters) + len(self.merges)

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Return the text piece of each id."""
        pieces = {PAD: "<PAD>", UNK: "<UNK>", BOS: "<BOS>", EOS: "<EOS>"}
        pieces |= {token: chr(code) for code, token in self.characters.items()}
        for (left, right), (_, new) in self.merges.items():
            pieces[new] = pieces[left] + pieces[right]
        return pieces

    def text(self) -> str:
        """Return the content of the model file in YouTokenToMe's format."""
        lines = [f"{len(self.characters)} {len(self.merges)}"]
        lines += [f"{code} {token}" for code, token in self.characters.items()]
        lines += [f"{left} {right} {new}" for (left, right), (_, new) in self.merges.items()]
        return "\n".join([*lines, f"{UNK} {PAD} {BOS} {EOS}"]) + "\n"


class _MergeState:
    """The merge state of one word: a linked list of ids and a heap of candidate merges.

    ``positions`` holds, in ascending order, the position of the left id of every pair that can be
    merged.  A word of n ids needs O(n log n) heap operations plus the element moves of a sorted
    list.
    """

    def __init__(self, tokens: list[int], merges: dict[TokenPair, tuple[int, int]]) -> None:
        self.tokens, self.merges = tokens, merges
        self.after = list(range(1, len(tokens) + 1))
        self.before = list(range(-1, len(tokens) - 1))
        candidates = {
            position: merges[pair]
            for position, pair in enumerate(pairwise(tokens))
            if pair in merges
        }
        self.merge_at, self.positions = candidates, list(candidates)
        self.heap = [(merge, position) for position, merge in candidates.items()]
        heapq.heapify(self.heap)

    def best(self, is_kept: NDArray[np.bool_] | None) -> int | None:
        """Return the position of the best kept merge, the leftmost one on ties, or None.

        Args:
            is_kept: whether each entry of ``positions`` survived dropout; None keeps all.
        """
        skipped, best = [], None
        while self.heap:
            merge, position = self.heap[0]
            # Stale entries stay in the heap until they reach the top and are discarded here.
            if self.merge_at.get(position) == merge:
                if is_kept is None or is_kept[bisect_left(self.positions, position)]:
                    best = position
                    break
                skipped.append((merge, position))
            heapq.heappop(self.heap)
        for entry in skipped:
            heapq.heappush(self.heap, entry)
        return best

    def merge(self, position: int) -> None:
        """Merge the pair whose left id is at ``position``."""
        self.tokens[position] = self.merge_at[position][1]
        right = self.after[position]
        self._remove_candidate(right)
        self.after[position] = self.after[right]
        if self.after[position] < len(self.tokens):
            self.before[self.after[position]] = position
        for neighbor in (self.before[position], position):
            self._update_candidate(neighbor)

    def ids(self) -> list[int]:
        """Return the current ids from left to right."""
        ids, position = [], 0
        while position < len(self.tokens):
            ids.append(self.tokens[position])
            position = self.after[position]
        return ids

    def _update_candidate(self, position: int) -> None:
        """Update the candidate merge at a position after the ids around it have changed."""
        if position < 0:
            return
        right = self.after[position]
        pair = (self.tokens[position], self.tokens[right]) if right < len(self.tokens) else None
        merge = None if pair is None else self.merges.get(pair)
        if merge is None:
            self._remove_candidate(position)
            return
        if position not in self.merge_at:
            insort(self.positions, position)
        self.merge_at[position] = merge
        heapq.heappush(self.heap, (merge, position))

    def _remove_candidate(self, position: int) -> None:
        if self.merge_at.pop(position, None) is not None:
            del self.positions[bisect_left(self.positions, position)]


def read_model(path: Path) -> BPEModel:
    """Load a model file written by this module or by YouTokenToMe.

    Raises:
        ValueError: if the file cannot be read or parsed, or if its special ids differ from
            ``layout.PAD``, ``UNK``, ``BOS`` and ``EOS``.
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
        raise ValueError(
            f"{path}: expected special ids pad 0, unk 1, bos 2, eos 3, "
            f"got {pad}, {unk}, {bos}, {eos}"
        )
    return BPEModel(characters, merges)


def _require_consistent(
    characters: dict[int, int],
    merges: dict[TokenPair, tuple[int, int]],
    num_characters: int,
    num_merges: int,
) -> None:
    """Raise ``ValueError`` unless every id occurs once and merges join only existing ids.

    YouTokenToMe does not check this and would read out of bounds.
    """
    # Check the counts first: a corrupt count would make the set that is built below too large.
    if (len(characters), len(merges)) != (num_characters, num_merges):
        raise ValueError(f"expected {num_characters} characters and {num_merges} merges")
    ids = {*characters.values(), *(new for _, new in merges.values())}
    if ids != set(range(NUM_SPECIALS, NUM_SPECIALS + num_characters + num_merges)):
        raise ValueError("expected every id exactly once")
    if not all(0 <= code < 0x110000 for code in characters):
        raise ValueError("expected Unicode code points")
    if not {token for pair in merges for token in pair} <= ids:
        raise ValueError("expected merges of existing ids")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPEModel:
    """Train BPE: merge the most frequent pair until ``vocab_size`` ids exist or no pair is left.

    Raises:
        ValueError: if the texts contain no word, or more distinct characters than ``vocab_size``
            allows.
    """
    counts = Counter(WORD_START + word for text in texts for word in WORD.findall(text))
    if not counts:
        raise ValueError("texts: expected at least one word to train a tokenizer, got none")
    frequency: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            frequency[character] += count
    by_frequency = sorted(frequency, key=lambda character: (-frequency[character], character))
    characters = {
        ord(character): NUM_SPECIALS + rank for rank, character in enumerate(by_frequency)
    }
    first_new = NUM_SPECIALS + len(characters)
    if first_new > vocab_size:
        raise ValueError(
            f"vocab_size must be at least {first_new} for the {len(characters)} characters of "
            f"the texts, got {vocab_size}"
        )
    words = [[characters[ord(character)] for character in word] for word in counts]
    merges = _learn_merges(words, list(counts.values()), range(first_new, vocab_size))
    return BPEModel(characters, merges)


def _learn_merges(
    words: list[list[int]], counts: list[int], new_ids: range
) -> dict[TokenPair, tuple[int, int]]:
    totals: Counter[TokenPair] = Counter()
    word_indices: defaultdict[TokenPair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            totals[pair] += counts[index]
            word_indices[pair].add(index)
    # Heap entries are never updated in place; entries with an outdated count are skipped.
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    merges: dict[TokenPair, tuple[int, int]] = {}
    for rank, new_id in enumerate(new_ids):
        while heap and -heap[0][0] != totals[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or heap[0][0] == 0:
            break
        best = heapq.heappop(heap)[1]
        merges[best] = (rank, new_id)
        changed: set[TokenPair] = set()
        for index in sorted(word_indices.pop(best)):
            old_word, words[index] = words[index], _replace_pair(words[index], best, new_id)
            for pair in pairwise(old_word):
                totals[pair] -= counts[index]
                changed.add(pair)
            for pair in pairwise(words[index]):
                totals[pair] += counts[index]
                word_indices[pair].add(index)
                changed.add(pair)
        for pair in changed - {best}:
            heapq.heappush(heap, (-totals[pair], pair))
    return merges


def _replace_pair(word: list[int], pair: TokenPair, new_id: int) -> list[int]:
    """Return a word with every occurrence of a pair replaced, scanning from the left."""
    replaced: list[int] = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            replaced.append(new_id)
            position += 2
        else:
            replaced.append(word[position])
            position += 1
    return replaced
