"""Text-image pairs for CLIP: the ranker's inputs, numbered captions, and any number of workers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_clip import NUM_PAIRS, config_for, scenes

from rudolph.data.loader import Streams
from rudolph.data.splits import Split
from rudolph.data.text_image import TextImageExamples
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.models.vision.clip import CLIP
from rudolph.sequence.layout import BOS, EOS
from rudolph.sequence.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Tokenizer]:
    return scenes(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def examples(opened: tuple[Split, Tokenizer]) -> TextImageExamples:
    split, tokenizer = opened
    return TextImageExamples(split, tokenizer, config_for(tokenizer), seed=4)


def test_an_example_is_what_a_ranker_reads_of_its_pair(opened, examples) -> None:
    split, tokenizer = opened
    config = config_for(tokenizer, image_resolution=16)
    smaller = TextImageExamples(split, tokenizer, config, seed=4)
    for source in (examples, smaller):
        size = source.image_resolution
        ranker = ClipRanker(CLIP(replace(config, image_resolution=size)), tokenizer)
        batch = source.batch(range(60, 80))
        pairs = batch.examples.tolist()
        assert torch.equal(batch.pixel_values, ranker.pixel_values(split.image_batch(pairs)))
        captions = [split.captions[pair] for pair in pairs]
        assert torch.equal(batch.input_ids, ranker.input_ids(captions))
        same = [[one == other for other in captions] for one in captions]
        assert (batch.captions[:, None] == batch.captions).tolist() == same
        assert batch.pixel_values.shape == (20, 3, size, size)
    assert (batch.input_ids[:, 0] == BOS).all() and ((batch.input_ids == EOS).sum(1) == 1).all()
    assert len(set(examples.captions.tolist())) == len(set(split.captions)) < NUM_PAIRS


def test_a_caption_that_is_too_long_is_counted(opened, examples) -> None:
    split, tokenizer = opened
    config = config_for(tokenizer, context_length=5)
    found = TextImageExamples(split, tokenizer, config, seed=4)
    long = [text for text in split.captions if len(tokenizer.encode(text)) > 3]
    assert found.num_cut == len(long) > 0 == examples.num_cut
    assert (found.input_ids == EOS).any(1).all()


class Trainer:
    """The attributes of a trainer that a stream reads."""

    world_size, global_rank = 1, 0

    class fit_loop:
        class epoch_loop:
            class batch_progress:
                class current:
                    completed = 0


@pytest.mark.parametrize(("size", "num_workers"), [(6, 0), (16, 2), (48, 1)])
def test_batches_do_not_depend_on_workers_or_sizes(examples, size: int, num_workers: int) -> None:
    whole = examples.batch(range(144))
    assert sorted(whole.examples[:NUM_PAIRS].tolist()) == list(range(NUM_PAIRS))
    streams = Streams(
        examples.batch,
        examples.whole,
        global_batch_size=48,
        micro_batch_size=size,
        num_steps=3,
        num_validation=NUM_PAIRS,
        num_workers=num_workers,
    )
    trainer: Any = Trainer
    streams.trainer = trainer
    parts = [part for step in streams.train_dataloader() for part in step]
    assert [len(part.examples) for part in parts] == [size] * (144 // size)
    for field, found in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat(found), whole[field])


def test_a_tokenizer_of_more_ids_is_refused(opened) -> None:
    split, tokenizer = opened
    small = config_for(tokenizer, vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        TextImageExamples(split, tokenizer, small, seed=0)
    with pytest.raises(
        ValueError, match=r"^tokenizer: expected at most \d+ ids, as in the CLIP, got \d+"
    ):
        ClipRanker(CLIP(small), tokenizer)
