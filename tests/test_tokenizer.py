"""The tokenizer: lossless texts, two equal encoders, and long texts that keep their end token."""

import itertools
import pickle
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from rudolph.sequence.bpe import WORD_START, train_bpe
from rudolph.sequence.layout import BOS, EOS, PAD, TASK_TOKENS, UNK, SequenceLayout, Vocabulary
from rudolph.sequence.tasks import TASKS, fill_texts
from rudolph.sequence.tokenizer import Tokenizer, normalize_unicode

TEXTS = [
    "Красный круг слева от зелёного квадрата",
    "пожарный: темный тон кожи",
    "флаг: Италия",
    "два синих круга 🙂 и олень",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    return Tokenizer.train(TEXTS * 3, vocab_size=90, path=path)


def random_texts(number: int) -> list[str]:
    rng = random.Random(0)
    letters = "красный кругслевоти зелёного:🙂ЪQz\t\u00a0\u2581 "
    return ["".join(rng.choices(letters, k=rng.randrange(25))) for _ in range(number)]


@pytest.mark.parametrize("text", [*TEXTS, "", "   ", "🦌🦌", "ЪЪЪ", "\ud800 круг", "a\tb\u00a0c"])
def test_decoding_gives_the_normalised_text_wherever_all_characters_are_known(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert all(0 < token < tokenizer.vocab_size for token in ids)
    if UNK not in ids:
        assert tokenizer.decode(ids) == " ".join(normalize_unicode(text).split())


def test_the_own_encoder_equals_youtokentome_when_nothing_is_dropped(
    tokenizer: Tokenizer,
) -> None:
    generator = torch.Generator().manual_seed(0)
    for text in [*TEXTS, *random_texts(300)]:
        # The smallest dropout above 0 skips nothing in practice.
        assert tokenizer.encode(text, dropout=1e-9, generator=generator) == tokenizer.encode(text)


def test_dropout_changes_the_pieces_and_never_the_text(tokenizer: Tokenizer) -> None:
    text = "красный круг слева"
    found = set()
    for seed in range(20):
        ids = tokenizer.encode(text, dropout=0.5, generator=torch.Generator().manual_seed(seed))
        assert tokenizer.decode(ids) == text
        found.add(tuple(ids))
    again = tokenizer.encode(text, dropout=0.5, generator=torch.Generator().manual_seed(3))
    assert len(found) > 5 and tuple(again) in found


def test_training_takes_the_most_frequent_pair_again_and_again() -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices("абвг ", k=30)) for _ in range(20)]
    model = train_bpe(texts, 30)
    counts = Counter(WORD_START + word for text in texts for word in text.split())
    words = {word: [model.characters[ord(character)] for character in word] for word in counts}
    for (left, right), (_, new) in model.merges.items():
        pairs: Counter[tuple[int, int]] = Counter()
        for word, tokens in words.items():
            for pair in itertools.pairwise(tokens):
                pairs[pair] += counts[word]
        most = max(pairs.values())
        assert (left, right) == min(pair for pair, count in pairs.items() if count == most)
        for tokens in words.values():
            at = 0
            while at < len(tokens) - 1:
                if tokens[at : at + 2] == [left, right]:
                    tokens[at : at + 2] = [new]
                at += 1
    assert len(model.merges) == 30 - 4 - 5


def test_a_vocabulary_smaller_than_the_alphabet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 9 for the 5 characters of the texts, got 8"):
        train_bpe(["абвг"], 8)


def test_dropout_without_a_generator_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected one for BPE-dropout"):
        tokenizer.encode("круг", dropout=0.1)


@pytest.mark.parametrize("task_token", [None, 95])
@pytest.mark.parametrize("length", [3, 5, 8, 40])
def test_a_segment_is_framed_filled_and_says_what_was_cut(
    tokenizer: Tokenizer, length: int, task_token: int | None
) -> None:
    text = TEXTS[0]
    ids = tokenizer.encode(text)
    segment = tokenizer.encode_segment(text, length, task_token=task_token)
    frame = [BOS] if task_token is None else [BOS, task_token]
    room = length - len(frame) - 1
    kept = ids[:room]
    expected = [*frame, *kept, EOS]
    assert segment.ids.tolist() == expected + [PAD] * (length - len(expected))
    assert segment.num_cut == len(ids) - len(kept)


def test_a_segment_without_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        tokenizer.encode_segment("круг", 2, task_token=95)


def test_a_saved_and_a_pickled_tokenizer_are_the_same(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "copy.model")
    for other in (Tokenizer(tmp_path / "copy.model"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.digest == tokenizer.digest
        assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(t) for t in TEXTS]


def test_training_again_on_the_same_texts_gives_the_same_file(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    again = Tokenizer.train(iter(TEXTS * 3), vocab_size=90, path=tmp_path / "again.model")
    assert again.digest == tokenizer.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.model"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such tokenizer file"),
        ("\x00\x01 binary", "not a YouTokenToMe model"),
        ("5 5\n1 1\n", "not a YouTokenToMe model"),
        ("1 0\n9601 4\n0 1 2 3\n", "pad 0, unk 1, bos 2, eos 3"),
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "bpe.model"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_texts_without_a_word_train_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one word"):
        Tokenizer.train(["", "  "], vocab_size=50, path=tmp_path / "bpe.model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", TASKS)
def test_a_task_fills_every_layout_and_its_caption_comes_back(
    tokenizer: Tokenizer, task: str
) -> None:
    for layout in (SequenceLayout(24, 2, 24), SequenceLayout(17, 3, 30)):
        vocabulary = Vocabulary(90, len(TASK_TOKENS), layout.left_text_length, 8)
        texts = fill_texts(
            TASKS[task], TEXTS[1], tokenizer=tokenizer, layout=layout, vocabulary=vocabulary
        )
        assert len(texts.left) == layout.left_text_length
        assert len(texts.right) == layout.right_text_length
        side = texts.left if TASKS[task].caption_is_left else texts.right
        other = texts.right if TASKS[task].caption_is_left else texts.left
        assert tokenizer.decode(side.tolist()) == TEXTS[1]
        assert tokenizer.decode(other.tolist()) == ""
        assert texts.left[1] == vocabulary.task_token(TASKS[task].left_token)


def test_task_tokens_have_the_references_ids() -> None:
    released = Vocabulary(16384, 384, 64, 8192, 384)
    assert released.task_token("<LT_UNK>") == 16384
    assert released.task_token("<RT_I2T>") == 16389
    assert released.task_token("<RT_REC>") == 16400
    assert released.first_left_padding == 16768
    assert Vocabulary(16384, 0, 64).task_token("<LT_T2I>") is None
    with pytest.raises(ValueError, match="at least 17, got 6"):
        Vocabulary(16384, 6, 64).task_token("<RT_REC>")


def test_without_youtokentome_ids_and_texts_are_the_same(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An entry of None makes ``import youtokentome`` fail as if it were not installed.
    monkeypatch.setitem(sys.modules, "youtokentome", None)
    bare = Tokenizer(tokenizer.path)
    assert bare.fast is None and tokenizer.fast is not None
    assert bare.vocab_size == tokenizer.fast.vocab_size()
    for text in [*TEXTS, *random_texts(300)]:
        assert bare.encode(text) == tokenizer.encode(text)
    rng = random.Random(2)
    for _ in range(300):
        ids = rng.choices(range(bare.vocab_size), k=rng.randrange(12))
        assert bare.decode(ids) == tokenizer.decode(ids)
