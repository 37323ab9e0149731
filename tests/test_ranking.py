"""Ranking: the reference's formulas token by token, and decoders with known answers."""

import math
from statistics import fmean, median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rudolph.generation.pipeline import Pipeline
from rudolph.generation.ranking import (
    BY_IMAGE_WEIGHT,
    BY_TEXT_WEIGHT,
    PERPLEXITIES,
    Ranking,
    classify_images,
    exp_mean_ce,
    mean_exp_ce,
    perplexities,
    rank_captions,
    rank_images,
    rescaled_sum,
)
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.sequence.layout import BOS, EOS, PAD, SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer

COLOURS = ("красный", "синий", "зелёный")
LEFT, SIDE, RIGHT, CODES = 8, 3, 7, 11
NUM_IMAGE = SIDE**2
# Special tokens, length of the right text, leading BOS.
KINDS = {
    "rudolph": (6, RIGHT, False),
    "rudolph_v1": (0, RIGHT, False),
    "rudalle_v2": (0, 0, True),
    "rudalle_v3": (0, 0, False),
}
LT_T2I, LT_I2T, RT_I2T = 2, 3, 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer that encodes each of its words as one token."""
    path = tmp_path_factory.mktemp("ranking") / "bpe.model"
    words = [*COLOURS, "круг", "квадрат", "это", "фото"]
    found = Tokenizer.train([" ".join(words)], vocab_size=200, path=path)
    assert all(len(found.encode(word)) == 1 for word in words)
    return found


def pipeline_of(tokenizer: Tokenizer, decoder: MaskedDecoder, *, batch_size: int = 3) -> Pipeline:
    vqgan = VQGAN(
        VQGANConfig(4, (4,), 1, (), 4, quantizer=QuantizerConfig("vq", CODES, embedding_dim=4))
    )
    return Pipeline(tokenizer, vqgan, decoder, batch_size)


def random_pipeline(tokenizer: Tokenizer, kind: str, *, batch_size: int = 3) -> Pipeline:
    torch.manual_seed(4)
    specials, right, has_leading = KINDS[kind]
    config = DecoderConfig(
        3, 24, 3, layer_masks=("row", "column"), last_layer_mask="conv(3)", leading_bos=has_leading
    )
    vocabulary = Vocabulary(tokenizer.vocab_size, specials, LEFT, CODES, 2)
    decoder = MaskedDecoder(config, SequenceLayout(LEFT, SIDE, right), vocabulary)
    with torch.no_grad():
        decoder.to_logits.weight.mul_(3)
    return pipeline_of(tokenizer, decoder, batch_size=batch_size)


def colour_pipeline(tokenizer: Tokenizer, *, right_text_length: int = RIGHT) -> Pipeline:
    """Return a hand-set model that expects the most frequent colour so far, in texts and images.

    Token k of an image has colour k. One layer averages the colours of all earlier tokens.
    """
    config = DecoderConfig(
        1, 4, 1, layer_masks=("causal",), last_layer_mask=None, sandwich_norm=False
    )
    vocabulary = Vocabulary(tokenizer.vocab_size, 6, LEFT, CODES, 0)
    decoder = MaskedDecoder(config, SequenceLayout(LEFT, SIDE, right_text_length), vocabulary)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.fill_(float("norm" in name and name.endswith("weight")))
        decoder.layers[0].to_qkv.weight[-4:] = torch.eye(4)
        decoder.layers[0].to_out.weight[:] = 100 * torch.eye(4)
        for colour, word in enumerate(COLOURS):
            (token,) = tokenizer.encode(word)
            decoder.text_embedding.weight[token, colour] = 1
            decoder.image_embedding.weight[colour, colour] = 1
            decoder.to_logits.weight[token, colour] = 3
            decoder.to_logits.weight[vocabulary.text_size + colour, colour] = 3
    return pipeline_of(tokenizer, decoder)


def plain_images() -> Tensor:
    """Return one single-coloured image per colour, ``(3, I)``."""
    return torch.arange(len(COLOURS))[:, None].expand(-1, NUM_IMAGE)


def random_images(number: int) -> Tensor:
    return torch.randint(CODES, (number, NUM_IMAGE), generator=torch.Generator().manual_seed(7))


def segment_ids(tokenizer: Tokenizer, text: str, length: int, special: int | None) -> list[int]:
    start = [BOS] if special is None else [BOS, tokenizer.vocab_size + special]
    ids = [*start, *tokenizer.encode(text), EOS]
    return ids + [PAD] * (length - len(ids))


def sequence(
    pipeline: Pipeline, left: tuple[str, int], image: Tensor, right: tuple[str, int] | None
) -> Tensor:
    """Build one sequence ``(1, T)`` by hand; each text has the offset of its task token."""
    has_specials = pipeline.decoder.vocabulary.num_text_specials > 0
    ids = segment_ids(pipeline.tokenizer, left[0], LEFT, left[1] if has_specials else None)
    ids += image.tolist()
    if right is not None:
        special = right[1] if has_specials else None
        ids += segment_ids(pipeline.tokenizer, right[0], RIGHT, special)
    return torch.tensor([ids])


def reference_losses(model: MaskedDecoder, tokens: Tensor, segment: str) -> list[list[float]]:
    """Compute losses from the full logits, over the classes that the reference scores.

    Source: "Facts of the reference", section 2.5.
    """
    layout, vocabulary = model.layout, model.vocabulary
    image, right = layout.image_start, layout.right_text_start
    bounds = {"left_text": (0, image), "image": (image, right), "right_text": (right, None)}
    first, end = bounds[segment]
    logits = model(tokens).double()
    found = []
    for row, ids in zip(logits, tokens.tolist(), strict=True):
        losses = []
        for place in range(first + 1, end or layout.length):
            scores = row[place - 1 + model.num_leading]
            if segment == "image":
                scores = scores[vocabulary.text_size :][: vocabulary.codebook_size]
            else:
                scores = scores[: vocabulary.bpe_size + vocabulary.num_text_specials]
            if segment == "image" or ids[place] != PAD:
                losses.append((scores.logsumexp(0) - scores[ids[place]]).item())
        found.append(losses)
    return found


def reference_perplexity(losses: list[float], kind: str) -> float:
    if kind == "mean_exp_ce":
        return fmean(math.exp(loss) for loss in losses)
    return math.exp(fmean(losses))


def reference_score(text: list[float], image: list[float], weight: float) -> list[float]:
    """Compute the reference's sum, which divides by zero unless the median exceeds the minimum."""
    scales = [median(values) - min(values) for values in (text, image)]
    return [
        weight * (of_text - min(text)) / scales[0]
        + (1 - weight) * (of_image - min(image)) / scales[1]
        for of_text, of_image in zip(text, image, strict=True)
    ]


def assert_near(found: Tensor, expected: list[float] | Tensor) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_perplexities_of_losses_are_the_references_and_the_proper_one(parity) -> None:
    golden = parity("sampling_and_scores").io
    ce, is_scored = golden["ce"], golden["ce"] != 0
    torch.testing.assert_close(mean_exp_ce(ce, is_scored), golden["ppl"], rtol=1e-6, atol=0)
    assert not is_scored.all()
    proper = [math.exp(fmean(loss for loss in row if loss)) for row in ce.tolist()]
    torch.testing.assert_close(exp_mean_ce(ce, is_scored), torch.tensor(proper))
    assert (exp_mean_ce(ce, is_scored) < mean_exp_ce(ce, is_scored)).all()


def test_one_unlikely_token_decides_the_references_perplexity_alone() -> None:
    losses = torch.tensor([[0.1] * 9 + [5.0], [1.0] * 10])
    is_scored = torch.ones_like(losses).bool()
    assert exp_mean_ce(losses, is_scored).argmin() == 0
    assert mean_exp_ce(losses, is_scored).argmin() == 1


@pytest.mark.parametrize("kind", PERPLEXITIES)
@pytest.mark.parametrize("model", KINDS)
def test_perplexities_equal_the_references_formulas(tokenizer, model: str, kind: str) -> None:
    pipeline = random_pipeline(tokenizer, model)
    has_right = pipeline.decoder.layout.right_text_length > 0
    left = ["синий круг", "", "красный зелёный квадрат", "это это это это это"]
    right = ["фото", "синий синий круг", "", "красный круг"]
    tokens = torch.cat(
        [
            sequence(pipeline, (a, LT_T2I), image, (b, RT_I2T) if has_right else None)
            for a, b, image in zip(left, right, random_images(4), strict=True)
        ]
    )
    ends = {"left_text": LEFT, "image": LEFT + NUM_IMAGE}
    if has_right:
        ends["right_text"] = LEFT + NUM_IMAGE + RIGHT
    for last, end in ends.items():
        segments = list(ends)[: list(ends).index(last) + 1]
        found = perplexities(pipeline.decoder, tokens[:, :end], segments=segments, kind=kind)
        assert list(found) == segments
        for segment, values in found.items():
            losses = reference_losses(pipeline.decoder, tokens, segment)
            assert_near(values, [reference_perplexity(row, kind) for row in losses])


def test_perplexities_do_not_depend_on_the_batch_and_tell_their_progress(tokenizer) -> None:
    pipeline = random_pipeline(tokenizer, "rudolph")
    tokens = torch.cat(
        [
            sequence(pipeline, ("круг", LT_T2I), image, (colour, RT_I2T))
            for image in random_images(3)
            for colour in COLOURS
        ]
    )[:7]
    segments, told = ("left_text", "image", "right_text"), []
    expected = perplexities(pipeline.decoder, tokens, segments=segments, batch_size=7)
    for size in (1, 2, 3, 64):
        told.clear()
        found = perplexities(
            pipeline.decoder,
            tokens,
            segments=segments,
            batch_size=size,
            on_batch=lambda *step: told.append(step),
        )
        assert told == [(min(done, 7), 7) for done in range(size, 7 + size, size)]
        for segment in segments:
            assert_near(found[segment], expected[segment])


@pytest.mark.parametrize("kind", PERPLEXITIES)
@pytest.mark.parametrize("model", KINDS)
def test_images_are_ranked_by_the_references_formula(tokenizer, model: str, kind: str) -> None:
    pipeline, images = random_pipeline(tokenizer, model), random_images(5)
    decoder, caption = pipeline.decoder, "Красный круг "
    if decoder.layout.right_text_length:
        rows = [("", LT_I2T), (caption, RT_I2T)]
        segment, weight = "right_text", BY_TEXT_WEIGHT
    else:
        rows, segment, weight = [(caption, LT_T2I), None], "left_text", 0.0
    tokens = torch.cat([sequence(pipeline, rows[0], image, rows[1]) for image in images])
    text, image = (
        [reference_perplexity(row, kind) for row in reference_losses(decoder, tokens, name)]
        for name in (segment, "image")
    )
    found = rank_images(pipeline, images, caption, kind=kind)
    assert_near(found.text, text)
    assert_near(found.image, image)
    expected = reference_score(text if weight else image, image, weight)
    assert_near(found.score, expected)
    assert found.order() == sorted(range(5), key=expected.__getitem__)


@pytest.mark.parametrize("model", KINDS)
def test_captions_are_ranked_by_the_references_formula(tokenizer, model: str) -> None:
    pipeline, image = random_pipeline(tokenizer, model), random_images(1)[0]
    captions = ["синий круг", "", "красный", "это зелёный квадрат"]
    tokens = torch.cat([sequence(pipeline, (text, LT_T2I), image, None) for text in captions])
    losses = [
        reference_losses(pipeline.decoder, tokens, segment) for segment in ("left_text", "image")
    ]
    by_text, by_image = (
        [reference_perplexity(row, "exp_mean_ce") for row in rows] for rows in losses
    )
    found = rank_captions(pipeline, image, captions)
    assert_near(found.text, by_text)
    assert_near(found.image, by_image)
    expected = reference_score(by_text, by_image, BY_IMAGE_WEIGHT)
    assert_near(found.score, expected)
    assert found.order() == sorted(range(4), key=expected.__getitem__)


@pytest.mark.parametrize("kind", PERPLEXITIES)
@pytest.mark.parametrize("right_text_length", [RIGHT, 0])
def test_the_image_of_the_captions_colour_is_ranked_first(
    tokenizer, right_text_length: int, kind: str
) -> None:
    pipeline = colour_pipeline(tokenizer, right_text_length=right_text_length)
    for colour, word in enumerate(COLOURS):
        ranking = rank_images(pipeline, plain_images(), f"{word} круг", kind=kind)
        assert ranking.order()[0] == colour and ranking.score[colour] == 0
        assert ranking.score.sum() > 0.1


def test_the_caption_of_the_images_colour_is_ranked_first(tokenizer) -> None:
    pipeline = colour_pipeline(tokenizer)
    captions = [f"{word} квадрат" for word in COLOURS]
    for colour, image in enumerate(plain_images()):
        assert rank_captions(pipeline, image, captions).order()[0] == colour


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_image_is_classified_by_its_colour(tokenizer, batch_size: int) -> None:
    pipeline = colour_pipeline(tokenizer)
    pipeline.batch_size = batch_size
    found = classify_images(pipeline, plain_images(), COLOURS, right_template="это {} круг")
    assert found.argmin(1).tolist() == [0, 1, 2]
    assert classify_images(pipeline, plain_images()[1:], COLOURS[1:]).argmin(1).tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize("kind", PERPLEXITIES)
@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_each_class_is_judged_with_its_own_templates(
    tokenizer, batch_size: int, kind: str
) -> None:
    pipeline = random_pipeline(tokenizer, "rudolph", batch_size=batch_size)
    images, classes = random_images(2), [*COLOURS, "круг", "квадрат"]
    templates = {"left_template": "фото {}", "right_template": "это {} круг"}
    found = classify_images(pipeline, images, classes, kind=kind, **templates)
    assert found.shape == (2, 5)
    for column, name in enumerate(classes):
        alone = classify_images(pipeline, images, [name], kind=kind, **templates)
        assert_near(alone[:, 0], found[:, column])
        for image, value in zip(images, found[:, column], strict=True):
            left, right = (f"фото {name}", LT_I2T), (f"это {name} круг", RT_I2T)
            tokens = sequence(pipeline, left, image, right)
            (losses,) = reference_losses(pipeline.decoder, tokens, "right_text")
            assert_near(value, reference_perplexity(losses, kind))
    without = classify_images(pipeline, images, classes, right_template="это {} круг", kind=kind)
    assert not torch.isclose(without, found, rtol=1e-3).any()


PERPLEXITY = st.floats(1, 1e5)
PAIRS = st.lists(st.tuples(PERPLEXITY, PERPLEXITY), min_size=1, max_size=9)


@given(PAIRS, st.floats(0, 1))
def test_balanced_is_the_references_sum_where_that_is_a_number(
    pairs: list[tuple[float, float]], weight: float
) -> None:
    text, image = ([pair[side] for pair in pairs] for side in (0, 1))
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (text, image))
    ranking = rescaled_sum(*tensors, text_weight=weight)
    if all(median(values) - min(values) > 1e-6 for values in (text, image)):
        expected = torch.tensor(reference_score(text, image, weight), dtype=torch.float64)
        torch.testing.assert_close(ranking.score, expected, rtol=1e-6, atol=1e-9)
    assert ranking.score.isfinite().all() and (ranking.score >= 0).all()
    scores = ranking.score.tolist()
    assert ranking.order() == sorted(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], [0.0]),
        ([4.0, 4.0, 4.0], [0.0, 0.0, 0.0]),
        ([2.0, 2.0, 2.0, 6.0], [0.0, 0.0, 0.0, 1.0]),
        ([3.0, 5.0], [0.0, 2.0]),
    ],
)
def test_equal_and_single_candidates_have_scores(
    values: list[float], expected: list[float]
) -> None:
    tensor = torch.tensor(values)
    assert rescaled_sum(tensor, tensor, text_weight=0.3).score.tolist() == expected


@pytest.mark.parametrize("weight", [math.nan, math.inf, -0.1, 1.1])
def test_a_weight_is_a_share(weight: float) -> None:
    values = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"text_weight must be in \[0, 1\], got"):
        rescaled_sum(values, values, text_weight=weight)


def test_equal_candidates_keep_their_order() -> None:
    score = torch.tensor([2.0, 1.0] * 30)
    assert Ranking(score, score, score).order() == [*range(1, 60, 2), *range(0, 60, 2)]


@pytest.mark.parametrize("model", ["rudolph", "rudalle_v2"])
def test_one_candidate_is_ranked_by_the_decoder_too(tokenizer, model: str) -> None:
    pipeline, images = random_pipeline(tokenizer, model), random_images(1)
    for ranking in (
        rank_images(pipeline, images, "круг"),
        rank_captions(pipeline, images[0], ["круг"]),
    ):
        assert ranking.score.tolist() == [0.0] and ranking.order() == [0]
        assert ranking.text.isfinite().all() and ranking.image.isfinite().all()


@pytest.mark.parametrize("kind", PERPLEXITIES)
def test_a_token_that_can_hardly_be_leaves_a_number(tokenizer, kind: str) -> None:
    pipeline = random_pipeline(tokenizer, "rudolph")
    with torch.no_grad():
        pipeline.decoder.to_logits.bias[tokenizer.encode("синий")] = -300
    found = classify_images(pipeline, random_images(2), COLOURS, kind=kind)
    assert found.isfinite().all() and found.argmax(1).tolist() == [1, 1]


def test_what_cannot_be_judged_is_refused(tokenizer) -> None:
    pipeline, images = random_pipeline(tokenizer, "rudolph"), random_images(1)
    tokens = sequence(pipeline, ("круг", LT_T2I), images[0], ("круг", RT_I2T))
    with pytest.raises(ValueError, match="kind must be one of exp_mean_ce, mean_exp_ce, got 'p'"):
        perplexities(pipeline.decoder, tokens, segments=("image",), kind="p")
    tokens[:, LEFT + NUM_IMAGE :] = PAD
    with pytest.raises(ValueError, match="right_text: expected at least one scored token"):
        perplexities(pipeline.decoder, tokens, segments=("right_text",))
    with pytest.raises(ValueError, match="image_captioning: expected a decoder with a right text"):
        classify_images(random_pipeline(tokenizer, "rudalle_v3"), images, COLOURS)
