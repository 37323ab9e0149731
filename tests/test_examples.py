"""Streams of examples: identical for any batches, workers and machines."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudolph.data.datasets.arithmetic import ArithmeticConfig
from rudolph.data.datasets.shapes import ShapesConfig
from rudolph.data.examples import ImageExamples, MixtureExamples, TokenExamples, task_texts
from rudolph.data.seeds import MAX_TABLE, mixed_seed, permuted, shuffled_pairs
from rudolph.data.splits import DataConfig, Split
from rudolph.sequence.layout import TASK_TOKENS, SequenceLayout, Vocabulary
from rudolph.sequence.tasks import TASKS, Texts, fill_texts
from rudolph.sequence.tokenizer import Tokenizer

CONFIG = DataConfig(
    dataset="shapes",
    image_size=24,
    caption_dropout=0.3,
    flip_probability=0.5,
    image_token_noise=0.4,
    shapes=ShapesConfig(num_train=13, num_validation=5),
)
LAYOUT = SequenceLayout(30, 2, 31)
VOCABULARY = Vocabulary(150, len(TASK_TOKENS), 30, 7)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return Split(CONFIG, "train", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(split: Split) -> Tokenizer:
    return Tokenizer.train(split.captions, vocab_size=150, path=split.cache / "bpe.model")


def examples_of(split: Split, tokenizer: Tokenizer, retokenise=None, **changes) -> TokenExamples:
    """Return the examples of all rows of the mixture, with random image indices."""
    config = replace(CONFIG, **changes)
    indices = np.random.default_rng(0).integers(7, size=(13, 4))
    sources = []
    for source in config.mixture:
        texts = task_texts(
            split, source.task, tokenizer=tokenizer, layout=LAYOUT, vocabulary=VOCABULARY
        )
        own = None if retokenise is None else partial(retokenise, source.task)
        sources.append(MixtureExamples(source, texts, indices, own))
    return TokenExamples(
        sources, config, layout=LAYOUT, vocabulary=VOCABULARY, num_examples=6000, seed=3
    )


@pytest.fixture(scope="module")
def examples(split: Split, tokenizer: Tokenizer) -> TokenExamples:
    return examples_of(split, tokenizer)


def test_a_split_holds_the_pairs_of_its_dataset_and_reads_them_back(split: Split) -> None:
    again = Split(CONFIG, "train", split.cache)
    for read in (split, again):
        assert len(read) == 13
        for index, caption in enumerate(read.captions):
            pair = read.dataset[index]
            assert (pair.caption, pair.key) == (caption, read.keys[index])
            image = (read.image_batch([index])[0] * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(image, np.asarray(pair.image))


def test_an_example_reads_one_of_the_drawn_sets_of_codes(
    split: Split, tokenizer: Tokenizer, examples: TokenExamples
) -> None:
    """Every set is used, and each example always uses the same one."""
    sets = np.arange(3)[None, :, None] + np.zeros((13, 3, 4), dtype=int)
    sources = [each._replace(indices=sets) for each in examples.entries]
    options = {"layout": LAYOUT, "vocabulary": VOCABULARY, "num_examples": 6000, "seed": 3}
    drawn = TokenExamples(sources, replace(CONFIG, image_token_noise=0.0), **options)
    image = slice(LAYOUT.image_start, LAYOUT.right_text_start)
    whole = drawn.batch(range(60)).tokens[:, image]
    assert (whole == whole[:, :1]).all() and set(whole[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(drawn.batch([7, 31]).tokens[:, image], whole[[7, 31]])


def test_every_epoch_is_another_permutation() -> None:
    first, second = (shuffled_pairs(range(start, start + 13), 13, seed=0) for start in (0, 13))
    assert sorted(first) == sorted(second) == list(range(13))
    assert list(first) != list(second)
    assert list(shuffled_pairs(range(13), 13, seed=1)) != list(first)


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 9))
def test_a_permutation_without_a_table_has_every_number_once(
    size: int, seed: int, epoch: int
) -> None:
    found = permuted(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(found), np.arange(size))
    alone = [permuted(np.array([place]), size, seed, epoch)[0] for place in (0, size // 2)]
    assert alone == [found[0], found[size // 2]]


def test_epochs_of_more_pairs_than_a_table_holds_are_permutations_too() -> None:
    size = MAX_TABLE + 3
    epochs = [shuffled_pairs(range(n * size, (n + 1) * size), size, seed=5) for n in (0, 1)]
    for pairs in epochs:
        assert np.array_equal(np.sort(pairs), np.arange(size))
        # Like a random permutation: about one number stays, and neighbours move apart.
        assert (pairs == np.arange(size)).sum() < 10
        assert abs(np.corrcoef(pairs[:-1], pairs[1:])[0, 1]) < 0.01
    assert (epochs[0] == epochs[1]).sum() < 10
    middle = range(size - 7, size + 9)
    assert np.array_equal(
        shuffled_pairs(middle, size, seed=5), np.concatenate([epochs[0][-7:], epochs[1][:9]])
    )


@pytest.mark.parametrize("size", [1, 4, 7, 26])
def test_examples_do_not_depend_on_the_batches_they_come_in(
    split: Split, examples: TokenExamples, size: int
) -> None:
    images = ImageExamples(split, seed=5, flip_probability=0.5)
    for source, field in ((images, "images"), (examples, "tokens")):
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
    empty = examples.entries[0].texts.empty.left
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
    # One in seven random codes equals the original.
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
    def retokenise(task: str, pair: int, generator: torch.Generator) -> Texts:
        return fill_texts(
            TASKS[task],
            split.captions[pair],
            tokenizer=tokenizer,
            layout=LAYOUT,
            vocabulary=VOCABULARY,
            dropout=0.5,
            generator=generator,
        )

    noisy = examples_of(split, tokenizer, retokenise)
    first, again = noisy.batch(range(20)), noisy.batch(range(20))
    assert torch.equal(first.tokens, again.tokens)
    plain = examples.batch(range(20))
    assert not torch.equal(first.tokens, plain.tokens)
    assert torch.equal(first.tokens[:, 30:34], plain.tokens[:, 30:34])


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
        {"tasks": {"letters/text_recognition": 1.0}},
        {"tasks": {"text_ranking": 1.0}},
        {"tasks": {"text_to_image": -1.0}},
        {"tasks": {}},
        {"flip_probability": 1.5},
    ],
)
def test_a_wrong_data_field_is_told(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        DataConfig(**fields)


MIXED = {
    "text_to_image": 1.0,
    "image_captioning": 1.0,
    "arithmetic/math_question_answering": 2.0,
    "words/text_recognition": 0.0,
}


@pytest.fixture(scope="module")
def mixed(split: Split, tokenizer: Tokenizer) -> TokenExamples:
    """Return two tasks of scenes and one of sums, which have no image."""
    config = replace(CONFIG, tasks=MIXED, arithmetic=ArithmeticConfig(num_train=5))
    sums = Split(config, "train", split.cache, dataset="arithmetic")
    indices = np.random.default_rng(0).integers(1, 7, size=(13, 4))
    sources = [
        MixtureExamples(
            source,
            task_texts(
                sums if source.dataset == "arithmetic" else split,
                source.task,
                tokenizer=tokenizer,
                layout=LAYOUT,
                vocabulary=VOCABULARY,
            ),
            None if source.dataset == "arithmetic" else indices,
        )
        for source in config.mixture
    ]
    return TokenExamples(
        sources,
        config,
        layout=LAYOUT,
        vocabulary=VOCABULARY,
        num_examples=6000,
        seed=3,
        task_weights={"image_captioning": (1, 2, 3)},
    )


def test_a_mixture_is_drawn_by_weight_and_each_row_has_its_pairs(mixed: TokenExamples) -> None:
    batch = mixed.batch(range(4000))
    shares = torch.bincount(batch.sources).double() / 4000
    assert shares.tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    for row, size in enumerate((13, 13, 5)):
        counts = torch.bincount(batch.examples[batch.sources == row], minlength=size)
        assert len(counts) == size
        assert counts.double().std() < 0.35 * counts.double().mean()
    assert torch.equal(mixed.batch(range(7, 19)).tokens, batch.tokens[7:19])


def test_a_task_without_a_image_has_code_zero_and_scores_no_image(mixed: TokenExamples) -> None:
    batch = mixed.batch(range(200))
    is_sum = batch.sources == 2
    assert (batch.tokens[is_sum][:, 30:34] == 0).all()
    assert (batch.inputs[is_sum][:, 30:34] == 0).all()
    assert (batch.tokens[~is_sum][:, 30:34] > 0).all()
    assert not batch.scored["image"][is_sum].any()
    expected = torch.tensor([TASKS["text_to_image"].weights, (1, 2, 3), (0, 0, 1)])
    assert torch.equal(batch.weights, expected[batch.sources])


def test_validation_shows_every_pair_of_a_mixture_once(mixed: TokenExamples) -> None:
    assert mixed.num_whole == 13 + 13 + 5
    batch = mixed.whole(range(31))
    seen = set(zip(batch.sources.tolist(), batch.examples.tolist(), strict=True))
    assert seen == {(row, pair) for row, size in enumerate((13, 13, 5)) for pair in range(size)}


def test_task_tokens_become_unknown_left_and_right_by_themselves(
    split: Split, tokenizer: Tokenizer
) -> None:
    plain, unknown = (
        examples_of(split, tokenizer, unknown_task_probability=share, image_token_noise=0.0)
        for share in (0.0, 0.25)
    )
    first, second = plain.batch(range(3000)), unknown.batch(range(3000))
    is_captioning = first.sources == 1
    for at, name, has_token in ((1, "<LT_UNK>", slice(None)), (35, "<RT_UNK>", is_captioning)):
        is_unknown = second.tokens[:, at] == VOCABULARY.task_token(name)
        assert is_unknown[has_token].double().mean().item() == pytest.approx(0.25, abs=0.03)
        assert torch.equal(first.tokens[~is_unknown, at], second.tokens[~is_unknown, at])
    assert not (second.tokens[~is_captioning, 34:] > 0).any()
    both = (second.tokens[is_captioning][:, [1, 35]] == torch.tensor([150, 151])).all(1)
    assert both.double().mean().item() == pytest.approx(0.25**2, abs=0.02)
    others = [at for at in range(65) if at not in (1, 35)]
    assert torch.equal(first.tokens[:, others], second.tokens[:, others])
    assert torch.equal(second.inputs, second.tokens)


def test_images_of_several_splits_are_one_stream(split: Split) -> None:
    test = Split(CONFIG, "validation", split.cache)
    both = ImageExamples(split, test, seed=5)
    assert both.num_whole == 18
    whole = both.whole(range(18)).images
    expected = torch.cat([split.image_batch(range(13)), test.image_batch(range(5))]) * 2 - 1
    assert torch.equal(whole, expected)
    batch = both.batch(range(18))
    assert sorted(batch.examples.tolist()) == list(range(18))
    assert torch.equal(batch.images, whole[batch.examples])
