"""Encoding of a word with dropout: the ids and random numbers of the plain rule, but faster."""

import random
import time
from itertools import pairwise

import pytest
import torch

from rudolph.sequence.bpe import WORD_START, BPEModel, train_bpe
from rudolph.sequence.layout import UNK

TEXT = "красный круг слева от зелёного квадрата пожарный темный тон кожи флаг"
WORDS = TEXT.split()
MODEL = train_bpe([TEXT] * 3, 90)


def merged_one_by_one(
    model: BPEModel, word: str, dropout: float, generator: torch.Generator
) -> list[int]:
    """Merge by scanning all pairs before each merge, in quadratic time (Provilkov 2020)."""
    tokens: list[int] = []
    for character in word:
        token = model.characters.get(ord(character), UNK)
        if token != UNK or tokens[-1:] != [UNK]:
            tokens.append(token)
    while True:
        pairs = enumerate(pairwise(tokens))
        found = [(model.merges[pair], at) for at, pair in pairs if pair in model.merges]
        kept = torch.rand(len(found), generator=generator) >= dropout
        found = [merge for merge, keep in zip(found, kept.tolist(), strict=True) if keep]
        if not found:
            return tokens
        (_, new), at = min(found)
        tokens[at : at + 2] = [new]


@pytest.mark.parametrize("dropout", [0.0, 1e-9, 0.1, 0.5, 0.9, 0.999])
def test_a_word_has_the_ids_and_takes_the_draws_of_the_plain_rule(dropout: float) -> None:
    rng = random.Random(0)
    for case in range(200):
        letters = rng.choice(["абв", "красныйкруг", "зелёногоквадратаQz🙂"])
        inner = "".join(rng.choices(WORDS, k=3) if case % 2 else rng.choices(letters, k=40))
        word = WORD_START + inner[: rng.randrange(41)]
        own, plain = (torch.Generator().manual_seed(case) for _ in range(2))
        expected = merged_one_by_one(MODEL, word, dropout, plain)
        assert MODEL.encode_word(word, dropout, own) == expected
        # Without dropout no random number is used.
        assert not dropout or torch.equal(own.get_state(), plain.get_state())


def test_a_word_of_20000_letters_is_encoded_with_dropout_in_seconds() -> None:
    word = WORD_START + "".join(random.Random(0).choices(WORDS, k=3000))[:20_000]
    started = time.process_time()
    ids = MODEL.encode_word(word, 0.1, torch.Generator().manual_seed(0))
    # It takes 0.8 s here; scanning all pairs before each merge takes minutes.
    assert time.process_time() - started < 10
    assert len(ids) < 15_000
