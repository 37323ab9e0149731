"""Streams of examples: the same whatever the batches, workers and machines."""

import numpy as np
import pytest
import torch

from rudolph.data.module import (
    DataConfig,
    ImageExamples,
    Split,
    Streams,
    TokenExamples,
    task_texts,
)
from rudolph.data.seeds import mixed_seed, shuffled
from rudolph.data.shapes import ShapesConfig
from rudolph.sequence.layout import TASK_TOKENS, SequenceLayout, Vocabulary
from rudolph.sequence.tasks import TASKS, fill_texts
from rudolph.sequence.tokenizer import Tokenizer

CONFIG = DataConfig(
    dataset="shapes",
    image_size=24,
    caption_dropout=0.3,
    flip=0.5,
    image_token_noise=0.4,
    shapes=ShapesConfig(num_train=13, num_validation=5),
)
LAYOUT = SequenceLayout(30, 2, 31)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return Split(CONFIG, "train", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(split: Split) -> Tokenizer:
    return Tokenizer.train(split.captions, vocab_size=150, path=split.cache / "bpe.model")


@pytest.fixture(scope="module")
def examples(split: Split, tokenizer: Tokenizer) -> TokenExamples:
    vocabulary = Vocabulary(150, len(TASK_TOKENS), 30, 7)
    texts = {
        task: task_texts(split, task, tokenizer=tokenizer, layout=LAYOUT, vocabulary=vocabulary)
        for task in CONFIG.tasks
    }
    indices = np.random.default_rng(0).integers(7, size=(13, 4))
    return TokenExamples(indices, texts, CONFIG, num_codes=7, num_examples=6000, seed=3)


def test_a_split_holds_the_pairs_of_its_dataset_and_reads_them_back(split: Split) -> None:
    again = Split(CONFIG, "train", split.cache)
    for read in (split, again):
        assert len(read) == 13
        for index, caption in enumerate(read.captions):
            pair = read.dataset[index]
            assert (pair.caption, pair.key) == (caption, read.keys[index])
            picture = (read.pictures([index])[0] * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(picture, np.asarray(pair.image))


def test_every_epoch_is_another_permutation() -> None:
    first, second = (shuffled(range(start, start + 13), 13, seed=0) for start in (0, 13))
    assert sorted(first) == sorted(second) == list(range(13))
    assert list(first) != list(second)
    assert list(shuffled(range(13), 13, seed=1)) != list(first)


@pytest.mark.parametrize("size", [1, 4, 7, 26])
def test_examples_do_not_depend_on_the_batches_they_come_in(
    split: Split, examples: TokenExamples, size: int
) -> None:
    pictures = ImageExamples(split, seed=5, flip=0.5)
    for source, field in ((pictures, "images"), (examples, "tokens")):
        whole = source.batch(range(26))
        parts = [source.batch(range(at, min(at + size, 26))) for at in range(0, 26, size)]
        assert torch.equal(
            torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)
        )
        assert torch.equal(torch.cat([part.examples for part in parts]), whole.examples)


def test_tasks_and_dropped_captions_have_their_shares(examples: TokenExamples) -> None:
    batch = examples.batch(range(4000))
    drawn = batch.scored["image"].double().mean().item()
    assert drawn == pytest.approx(0.5, abs=0.03)
    assert torch.equal(batch.scored["image"], ~batch.scored["right_text"])
    empty = examples.texts["text_to_image"].empty.left
    is_empty = (batch.tokens[:, :30] == empty).all(1)
    share = is_empty[batch.scored["image"]].double().mean().item()
    assert share == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("first", "share"), [(0, 0.35), (1500, 0.25), (4500, 0.05)])
def test_noise_replaces_a_share_of_the_image_tokens_that_falls_to_none(
    examples: TokenExamples, first: int, share: float
) -> None:
    batch = examples.batch(range(first, first + 1500))
    is_drawn, image = batch.scored["image"], slice(30, 34)
    assert torch.equal(batch.inputs[:, :30], batch.tokens[:, :30])
    assert torch.equal(batch.inputs[:, 34:], batch.tokens[:, 34:])
    assert torch.equal(batch.inputs[~is_drawn], batch.tokens[~is_drawn])
    changed = (batch.inputs != batch.tokens)[is_drawn][:, image].double().mean().item()
    # A random code is the right one for one of seven.
    assert changed == pytest.approx(share * 6 / 7, abs=0.03)
    assert torch.equal(examples.whole(range(8)).inputs, examples.whole(range(8)).tokens)


def test_validation_shows_every_pair_once_for_each_task(
    split: Split, examples: TokenExamples, tokenizer: Tokenizer
) -> None:
    batch = examples.whole(range(26))
    assert batch.examples.tolist() == [index // 2 for index in range(26)]
    for row, pair in enumerate(batch.examples.tolist()):
        side = batch.tokens[row, :30] if batch.scored["image"][row] else batch.tokens[row, 34:]
        assert tokenizer.decode(side.tolist()) == split.captions[pair]


def test_bpe_dropout_draws_by_the_examples_number(
    split: Split, examples: TokenExamples, tokenizer: Tokenizer
) -> None:
    vocabulary = Vocabulary(150, len(TASK_TOKENS), 30, 7)

    def redraw(pair: int, task: str, generator: torch.Generator):
        return fill_texts(
            TASKS[task],
            split.captions[pair],
            tokenizer=tokenizer,
            layout=LAYOUT,
            vocabulary=vocabulary,
            dropout=0.5,
            generator=generator,
        )

    noisy = TokenExamples(
        examples.indices,
        examples.texts,
        CONFIG,
        num_codes=7,
        num_examples=99,
        seed=3,
        redraw=redraw,
    )
    first, again = noisy.batch(range(20)), noisy.batch(range(20))
    assert torch.equal(first.tokens, again.tokens)
    plain = examples.batch(range(20))
    assert not torch.equal(first.tokens, plain.tokens)
    assert torch.equal(first.tokens[:, 30:34], plain.tokens[:, 30:34])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_ranks_and_micro_batches_share_one_stream(world: int, start: int) -> None:
    class Position:
        completed = start

    class Trainer:
        world_size = world
        global_rank = 0
        fit_loop = type("L", (), {"epoch_loop": type("E", (), {})()})()

    seen: list[list[int]] = []
    for rank in range(world):
        streams = Streams(list, list, batch_size=3, num_batches=4, num_validation=7)
        trainer = Trainer()
        trainer.global_rank = rank
        trainer.fit_loop.epoch_loop.batch_progress = type("P", (), {"current": Position})()
        streams.trainer = trainer  # type: ignore[assignment]
        loader = streams.train_dataloader()
        assert len(loader) == 4
        seen += list(loader)
        validation = [index for batch in streams.val_dataloader() for index in batch]
        assert validation == list(range(rank, 7, world))
    assert sorted(number for batch in seen for number in batch) == list(
        range(start * 3 * world, 4 * 3 * world)
    )


def test_mixed_seeds_differ_and_stay() -> None:
    seeds = {mixed_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1, 23) != mixed_seed(12, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset": "emojis"},
        {"image_size": 0},
        {"tasks": {"vqa": 1.0}},
        {"tasks": {"text_to_image": -1.0}},
        {"tasks": {}},
        {"flip": 1.5},
    ],
)
def test_a_wrong_data_field_is_told(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        DataConfig(**fields)
