"""Conversations: labels are the answers, whatever the texts hold, and nothing is cut unseen."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rudolph.sequence.conversation import (
    CONVERSATION_TEMPLATES,
    IGNORE,
    ConversationTokenizer,
    ImagePart,
    Template,
    Turn,
    build_example,
    pad_examples,
)

PAD, UNK, START, END, IMAGE = range(5)
# Words that a search in the text, or a comparison of ids with the pad id, would trip over.
WORDS = ["cat", "USER:", "ASSISTANT:", "</s>", "<image>", "<unk>", "<pad>", "dog", "a"]
KNOWN = {word: 5 + index for index, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    """A tokenizer of known words; others, and nothing else, are unk."""
    return [KNOWN.get(word, UNK) for word in text.split()]


def decode(ids: list[int]) -> list[str]:
    names = {value: word for word, value in KNOWN.items()} | {UNK: "?", END: "END"}
    return [names[token] for token in ids]


def tokenizer(max_length: int = 1000) -> ConversationTokenizer:
    return ConversationTokenizer(encode, IMAGE, START, END, PAD, max_length)


TEXTS = st.lists(st.sampled_from([*WORDS, "strange"]), max_size=4).map(" ".join)
PARTS = st.lists(TEXTS | st.integers(1, 3).map(ImagePart), min_size=1, max_size=3)


@st.composite
def conversations(draw: Any) -> list[Turn]:
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn(False, tuple(draw(PARTS))))
        turns.append(Turn(True, (draw(TEXTS),)))
    return turns[:-1] if draw(st.booleans()) else turns


@given(conversations(), st.sampled_from(sorted(CONVERSATION_TEMPLATES)))
@settings(max_examples=200, deadline=None)
def test_labels_decode_to_the_answers(turns: list[Turn], name: str) -> None:
    example = build_example(turns, tokenizer(), CONVERSATION_TEMPLATES[name])
    assert len(example.ids) == len(example.labels)
    scored = [(token, label) for token, label in zip(example.ids, example.labels, strict=True)]
    assert all(label in (token, IGNORE) for token, label in scored)
    expected: list[str] = []
    for turn in turns:
        if turn.is_answer:
            words = [word if word in KNOWN else "?" for word in turn.parts[0].split()]
            expected += words + ["END"] * CONVERSATION_TEMPLATES[name].has_end_sign
    assert decode([label for label in example.labels if label != IGNORE]) == expected
    images = [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]
    assert example.num_images == len(images)
    assert example.ids.count(IMAGE) == sum(part.num_tokens for part in images)


def test_a_row_is_its_segments_in_order() -> None:
    turns = [Turn(False, ("cat", ImagePart(2), "dog")), Turn(True, ("a",)), Turn(False, ("a",))]
    template = CONVERSATION_TEMPLATES["vicuna"]
    user, assistant = KNOWN["USER:"], KNOWN["ASSISTANT:"]
    system = encode(template.system)
    first = [user, KNOWN["cat"], IMAGE, IMAGE, KNOWN["dog"], assistant]
    example = build_example(turns, tokenizer(), template)
    assert example.ids == [
        *[START, *system, *first, KNOWN["a"], END],
        # A conversation that ends with a question is the prompt of its answer.
        *[user, KNOWN["a"], assistant],
    ]
    assert [place for place, label in enumerate(example.labels) if label != IGNORE] == [
        1 + len(system) + 6,
        1 + len(system) + 7,
    ]


def test_the_first_stage_drops_the_words_of_a_question_and_keeps_its_images() -> None:
    turns = [Turn(False, ("cat", ImagePart(2), "dog")), Turn(True, ("a",))]
    example = build_example(turns, tokenizer(), CONVERSATION_TEMPLATES["plain"])
    assert example.ids == [START, IMAGE, IMAGE, KNOWN["a"]]
    assert example.labels == [IGNORE] * 3 + [KNOWN["a"]]


@given(conversations(), st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_a_row_that_is_too_long_loses_whole_rounds(turns: list[Turn], max_length: int) -> None:
    template = CONVERSATION_TEMPLATES["vicuna"]
    whole = [build_example(turns[:end], tokenizer(), template) for end in range(2, len(turns), 2)]
    whole.append(build_example(turns, tokenizer(), template))
    fitting = [example for example in whole if len(example.ids) <= max_length]
    if fitting:
        assert build_example(turns, tokenizer(max_length), template) == fitting[-1]
    else:
        with pytest.raises(
            ValueError, match=f"at most {max_length} tokens, got {len(whole[0].ids)}"
        ):
            build_example(turns, tokenizer(max_length), template)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_says_what_is_padding_not_the_id(side: str) -> None:
    template = CONVERSATION_TEMPLATES["plain"]
    rows = [
        build_example(
            [Turn(False, (ImagePart(count),)), Turn(True, (text,))], tokenizer(), template
        )
        for count, text in ((1, "<pad> strange"), (3, "a cat </s>"))
    ]
    batch = pad_examples(rows, tokenizer(), side=side)
    for index, row in enumerate(rows):
        is_token = batch.attention_mask[index] == 1
        assert batch.input_ids[index][is_token].tolist() == row.ids
        assert batch.labels[index][is_token].tolist() == row.labels
        assert (batch.labels[index][~is_token] == IGNORE).all()
        assert (batch.input_ids[index][~is_token] == PAD).all()
        kept = torch.nonzero(is_token).flatten()
        assert kept.tolist() == list(range(int(kept[0]), int(kept[0]) + len(row.ids)))
    assert bool(batch.attention_mask[:, -1 if side == "left" else 0].all())


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "expected at least one turn"),
        ([Turn(True, ("a",))], "expected the user at turn 0"),
        ([Turn(False, ("a",)), Turn(False, ("a",))], "expected the assistant at turn 1"),
        ([Turn(False, ("a",)), Turn(True, (ImagePart(1),))], "texts alone in answer 1"),
    ],
)
def test_turns_that_do_not_fit_are_named(turns: list[Turn], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_example(turns, tokenizer(), CONVERSATION_TEMPLATES["vicuna"])


def test_a_text_cannot_smuggle_in_an_image() -> None:
    leaky = ConversationTokenizer(lambda text: [IMAGE], IMAGE, START, END, PAD, 10)
    with pytest.raises(ValueError, match=r"expected no image token \(4\), got one in '<image>'"):
        build_example([Turn(False, ("<image>",))], leaky, Template())
    with pytest.raises(ValueError, match="side: expected left or right, got 'middle'"):
        pad_examples([], tokenizer(), side="middle")
