"""Documents of images and texts: episodes with new words, ids, labels and the mixture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rudolph.data.datasets.new_words import NewWords, NewWordsConfig, placements
from rudolph.data.documents import (
    DocumentExamples,
    DocumentFormat,
    Panel,
    batch_documents,
    document_of,
    document_panels,
    longest_document,
    training_shots,
)
from rudolph.data.splits import DataConfig, Splits
from rudolph.sequence.conversation import IGNORE
from rudolph.sequence.layout import BOS, EOS, PAD
from rudolph.sequence.tokenizer import Tokenizer

SIZES = {"num_train": 70, "num_validation": 70, "num_test": 70}
IMAGE = torch.arange(12.0).view(3, 2, 2) / 12
FORMAT = DocumentFormat(60, 3, 512)


def new_words(split: str = "train", **changes: Any) -> NewWords:
    return NewWords(NewWordsConfig(**SIZES | changes), split=split, image_size=24)


@pytest.mark.parametrize("split", ["train", "validation", "test", "compositional"])
def test_a_word_means_one_kind_within_an_episode(split: str) -> None:
    dataset = new_words(split)
    seen, num_both = set(), 0
    for index in range(len(dataset)):
        pair, shots = dataset[index], dataset.shots(index, 12)
        assert dataset.shots(index, 5) == shots[:5]
        meanings = {pair.caption: pair.question}
        for shot in shots:
            shown, own = (dataset[number].attributes["objects"] for number in (shot.pair, index))
            assert shown != own
            assert meanings.setdefault(shot.caption, dataset[shot.pair].question) == (
                dataset[shot.pair].question
            )
        # Rarely, all shots are of the pair's own kind.
        assert 1 <= len(meanings) == len(set(meanings.values())) <= 2
        num_both += len(meanings) == 2
        assert set(meanings) <= set(pair.choices)
        seen.add((pair.caption, pair.question))
    assert num_both > 0.9 * len(dataset)
    # Words change their meaning between episodes.
    assert len({word for word, _ in seen}) < len(seen) / 2


def test_splits_show_other_scenes_and_the_compositional_split_other_kinds() -> None:
    shown = {
        split: {dataset[index].attributes["objects"] for index in range(len(dataset))}
        for split in ("train", "validation", "test", "compositional")
        for dataset in [new_words(split)]
    }
    for first in shown:
        for second in shown:
            assert first == second or not shown[first] & shown[second]
    kinds = {
        split: {
            objects.rpartition(" ")[0].rpartition(" ")[0].partition(" ")[2] for objects in rows
        }
        for split, rows in shown.items()
    }
    assert not kinds["train"] & kinds["compositional"] and kinds["test"] <= kinds["train"]
    parts = [placements("red", "circle", split) for split in ("train", "validation", "test")]
    assert sorted(sum(parts, ())) == sorted(placements("red", "circle", "compositional"))


def test_few_pairs_or_equal_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 60 pairs in train, two of each kind, got 5"):
        new_words(num_train=5)
    with pytest.raises(ValueError, match=r"words must be at least 2 different words, got \['ы'"):
        NewWordsConfig(words=("ы", "ы"))
    with pytest.raises(ValueError, match="max_shots must be at least 1, got 0"):
        NewWordsConfig(max_shots=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["красный круг", "синий крест", "где круг?", "дакс", "вуг", "слева"] * 3
    path = tmp_path_factory.mktemp("bpe") / "bpe.model"
    return Tokenizer.train(texts, vocab_size=60, path=path)


def test_ids_are_those_of_the_segments_and_only_answers_are_labels(tokenizer: Tokenizer) -> None:
    panels = [Panel(IMAGE, "", "дакс"), Panel(None, "где круг?", "слева"), Panel(IMAGE, "", None)]
    example = document_of(panels, FORMAT, FORMAT.tokenizer(tokenizer))
    dax, where, left = (tokenizer.encode(text) for text in ("дакс", "где круг?", "слева"))
    assert example.ids == [BOS, 60, 60, 60, *dax, EOS, *where, *left, EOS, 60, 60, 60]
    hidden = [IGNORE]
    assert example.labels == (
        hidden * 4 + [*dax, EOS] + hidden * len(where) + [*left, EOS] + hidden * 3
    )
    asked = replace(FORMAT, question_first=True)
    last = [Panel(IMAGE, "где круг?", "слева")]
    example = document_of(last, asked, asked.tokenizer(tokenizer))
    assert example.ids == [BOS, *where, 60, 60, 60, *left, EOS]
    assert example.labels == hidden * (4 + len(where)) + [*left, EOS]


def test_a_document_that_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    panels = [Panel(IMAGE, "", "дакс")] * 9
    with pytest.raises(ValueError, match=r"max_length: expected room for 9 images .* got 20 pos"):
        short = replace(FORMAT, max_length=20)
        document_of(panels, short, short.tokenizer(tokenizer))


def test_documents_that_can_be_too_long_are_refused_before_a_loader_meets_them(
    splits: Splits, tokenizer: Tokenizer
) -> None:
    entries = [(entry, splits("validation", entry.dataset)) for entry in splits.config.mixture]
    for entry, split in entries:
        made = [
            document_of(
                document_panels(split, entry.task, index, shots=training_shots(split, index)),
                FORMAT,
                FORMAT.tokenizer(tokenizer),
            )
            for index in range(70)
        ]
        bound = longest_document(split, entry.task, FORMAT, tokenizer)
        assert max(len(example.ids) for example in made) <= bound
        if entry.dataset == "shapes":
            captions = [1 + len(tokenizer.encode(text)) + 1 for text in split.captions]
            assert bound == max(captions)
    form = replace(FORMAT, max_length=20)
    with pytest.raises(
        ValueError,
        match=r"max_length: expected at least \d+, .* image_captioning in val.*got 20",
    ):
        DocumentExamples(entries, tokenizer, form, seed=0, scores_questions=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_holds_what_its_documents_hold_alone(tokenizer: Tokenizer, side: str) -> None:
    documents = [
        [Panel(IMAGE, "", "дакс"), Panel(IMAGE.flip(0), "", None)],
        [Panel(None, "где круг?", "слева")],
        [Panel(IMAGE.flip(1), "красный круг", "вуг")],
    ]

    def batch(rows: list[list[Panel]]) -> Any:
        return batch_documents(rows, FORMAT, tokenizer, side=side)

    together = batch(documents)
    assert together.images.shape == (3, 2, 3, 2, 2)
    for row, document in enumerate(documents):
        alone = batch([document])
        is_token = together.attention_mask[row].bool()
        assert torch.equal(together.input_ids[row][is_token], alone.input_ids[0])
        assert torch.equal(together.labels[row][is_token], alone.labels[0])
        assert (together.input_ids[row][~is_token] == PAD).all()
        assert is_token[-1 if side == "left" else 0]
        images = [panel.image for panel in document if panel.image is not None]
        assert together.present[row].tolist() == [True] * len(images) + [False] * (2 - len(images))
        assert all(torch.equal(*pair) for pair in zip(together.images[row], images, strict=False))
    assert batch([documents[1]]).images is None


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    data = {"num_train": 80, "num_validation": 70, "num_test": 70}
    config = DataConfig(
        dataset="new_words",
        image_size=24,
        tasks={
            "image_captioning": 2.0,
            "text_question_answering": 1.0,
            "shapes/text_to_text": 1.0,
        },
        new_words=NewWordsConfig(**data, max_shots=3),
    )
    return Splits(config, tmp_path_factory.mktemp("cache"))


def examples(splits: Splits, tokenizer: Tokenizer, **changes: Any) -> DocumentExamples:
    return DocumentExamples(
        [(entry, splits("validation", entry.dataset)) for entry in splits.config.mixture],
        tokenizer,
        DocumentFormat(60, 1, 400),
        **{"seed": 3, "scores_questions": False} | changes,
    )


def test_an_example_depends_on_its_number_alone(splits: Splits, tokenizer: Tokenizer) -> None:
    made = examples(splits, tokenizer)
    together = made.batch(range(40, 60))
    assert len(set(together.sources.tolist())) == 3
    for row in (0, 7, 19):
        alone = made.batch([40 + row])
        is_token = together.attention_mask[row].bool()
        assert torch.equal(together.input_ids[row][is_token], alone.input_ids[0])
        assert together.examples[row] == alone.examples[0]
        if alone.images is not None:
            assert torch.equal(together.images[row][together.present[row]], alone.images[0])


def test_documents_are_those_of_their_pairs(splits: Splits, tokenizer: Tokenizer) -> None:
    made = examples(splits, tokenizer)
    batch = made.whole(range(made.num_whole))
    assert np.bincount(batch.sources).tolist() == [70, 70, 500]
    for row in (0, 1, 30):
        entry, split = made.entries[batch.sources[row]]
        pair = int(batch.examples[row])
        is_label = batch.labels[row] != IGNORE
        answers = [split.captions[pair]]
        if entry.dataset == "new_words":
            answers = [*(shot.caption for shot in split.dataset.shots(pair, 3)), *answers]
        ids = [token for text in answers for token in [*tokenizer.encode(text), EOS]]
        assert batch.labels[row][is_label].tolist() == ids
        assert int(batch.present[row].sum()) == 4 * (entry.task == "image_captioning")


def test_questions_are_labels_too_if_asked_for(splits: Splits, tokenizer: Tokenizer) -> None:
    batch = examples(splits, tokenizer, scores_questions=True).whole(range(20))
    expected = batch.attention_mask.bool() & (batch.input_ids != 60)
    assert torch.equal(batch.labels != IGNORE, expected)
    assert torch.equal(batch.labels[expected], batch.input_ids[expected])


def test_a_task_that_the_pairs_cannot_serve_is_refused(splits: Splits, tmp_path: Path) -> None:
    split = splits("validation", "shapes")
    with pytest.raises(ValueError, match="text_to_image generates images, which a language"):
        document_panels(split, "text_to_image", 0)
    with pytest.raises(ValueError, match="needs questions; shapes has none"):
        document_panels(split, "question_answering", 0)
    with pytest.raises(ValueError, match="image_captioning needs images, which arithmetic lacks"):
        config = DataConfig(dataset="arithmetic", tasks={"math_question_answering": 1.0})
        document_panels(Splits(config, tmp_path)("validation"), "image_captioning", 0)
