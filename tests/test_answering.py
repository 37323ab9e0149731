"""Text answers: prompts of every task; texts that are searched, continued and scored."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from rudolph.generation.answering import (
    answer_prompts,
    beam_answers,
    continue_texts,
    ids_spelling,
    sample_answers,
    sample_question_images,
    score_choices,
)
from rudolph.generation.beams import search_text
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import generate_image, legal_ids
from rudolph.generation.pipeline import Pipeline
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.sequence.layout import BOS, EOS, PAD, TASK_TOKENS, SequenceLayout, Vocabulary
from rudolph.sequence.tasks import TASKS
from rudolph.sequence.tokenizer import Tokenizer

GREEDY, PLAIN = TokenSamplingConfig(top_k=1), TokenSamplingConfig()
TEXTS = ["красный круг 12", "синий крест 3", "пять звёзд 450", "а б в г д"]
LAYOUT = SequenceLayout(12, 2, 11)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = tmp_path_factory.mktemp("answering") / "bpe.model"
    tokenizer = Tokenizer.train(TEXTS * 3, vocab_size=45, path=path)
    torch.manual_seed(0)
    vocabulary = Vocabulary(45, len(TASK_TOKENS), LAYOUT.left_text_length, 7)
    decoder = MaskedDecoder(DecoderConfig(2, 24, 3), LAYOUT, vocabulary)
    with torch.no_grad():
        decoder.to_logits.bias[EOS] = 1.0
    vqgan = VQGAN(VQGANConfig(resolution=8, channels=(4, 4, 4), attention_resolutions=()))
    return Pipeline(tokenizer, vqgan, decoder, batch_size=5)


def codes(number: int) -> torch.Tensor:
    return torch.randint(7, (number, 4), generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if row.right is not None])
def test_a_prompt_is_the_beginning_of_the_filled_example(pipeline: Pipeline, task: str) -> None:
    row = TASKS[task]
    asked = TEXTS[:2] if row.has_question else None
    indices = codes(2) if row.image != "none" else None
    tokens = answer_prompts(pipeline, task, indices=indices, questions=asked, num_prompts=2)
    for at in range(2):
        texts = pipeline.texts(task, "круг", other_text=asked[at] if asked else "")
        image = torch.zeros(4, dtype=torch.long) if indices is None else indices[at]
        whole = torch.cat([texts.left, image, texts.right])
        assert torch.equal(tokens[at], whole[: tokens.shape[1]])
        assert whole[tokens.shape[1]] not in (PAD, BOS, EOS)
        assert tokens[at, -1] == pipeline.decoder.vocabulary.task_token(row.right_token)


def test_prompts_that_do_not_fit_their_task_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="expected images, got none"):
        answer_prompts(pipeline, "image_captioning", num_prompts=2)
    with pytest.raises(ValueError, match="expected questions, got none"):
        answer_prompts(pipeline, "question_answering", indices=codes(1))
    with pytest.raises(ValueError, match="one per image \\(3\\), got 2"):
        answer_prompts(pipeline, "question_answering", indices=codes(3), questions=["а", "б"])


def test_a_question_without_a_image_can_be_asked_after_a_drawn_one(pipeline: Pipeline) -> None:
    task, questions, seeds = "text_question_answering", [*TEXTS, *TEXTS][:7], list(range(3, 10))
    drawn = sample_question_images(
        pipeline, task, questions, config=replace(PLAIN, guidance=2.0), seeds=seeds
    )
    asked = answer_prompts(pipeline, task, indices=drawn, questions=questions)
    plain = answer_prompts(pipeline, task, questions=questions)
    image = slice(LAYOUT.image_start, LAYOUT.right_text_start)
    assert torch.equal(asked[:, image], drawn)
    asked[:, image] = 0
    assert torch.equal(asked, plain)
    for at, seed in enumerate(seeds):
        left = plain[at : at + 1, : LAYOUT.left_text_length]
        alone = generate_image(pipeline.decoder, left, config=PLAIN, seeds=[seed])
        assert torch.equal(drawn[at], alone[0])


def test_answers_are_the_same_whatever_the_batch(pipeline: Pipeline) -> None:
    tokens = answer_prompts(pipeline, "image_captioning", indices=codes(7))
    together = sample_answers(pipeline, tokens, config=PLAIN, seeds=range(7))
    assert together == [
        sample_answers(pipeline, tokens[at : at + 1], config=PLAIN, seeds=[at])[0]
        for at in range(7)
    ]
    assert len(set(together)) > 3


def likelihood_of(pipeline: Pipeline, prompt: torch.Tensor, ids: list[int]) -> float:
    """Sum the log-likelihoods of a text's tokens, each from a full pass over its prefix."""
    model, total = pipeline.decoder, 0.0
    is_legal = legal_ids(model, None)
    with torch.no_grad():
        for at, token in enumerate(ids):
            tokens = torch.cat([prompt, torch.tensor(ids[:at], dtype=torch.long)])[None]
            logits = model.text_logits(model.hidden(tokens)[0, -1])[: len(is_legal)]
            total += logits.masked_fill(~is_legal, -torch.inf).log_softmax(-1)[token].item()
    return total


def test_choices_are_judged_as_full_passes_judge_them(pipeline: Pipeline) -> None:
    asked = ["красный", "синий круг", "пять"]
    tokens = answer_prompts(pipeline, "question_answering", indices=codes(3), questions=asked)
    choices = [["круг", "крест 3"], ["пять", "а"], ["12", ""]]
    found = score_choices(pipeline, "question_answering", tokens, choices)
    for row in range(3):
        for column in range(2):
            ids = [*pipeline.tokenizer.encode(choices[row][column]), EOS]
            expected = likelihood_of(pipeline, tokens[row], ids)
            assert found.log_likelihoods[row, column].item() == pytest.approx(expected, abs=1e-4)
            assert found.num_tokens[row, column] == len(ids)
    torch.testing.assert_close(found.per_token, found.log_likelihoods / found.num_tokens)


def test_a_beam_as_wide_as_all_texts_finds_the_likeliest(pipeline: Pipeline) -> None:
    model = pipeline.decoder
    asked = answer_prompts(pipeline, "image_captioning", indices=codes(2))
    # Three tokens remain and few ids are allowed, so every text can be enumerated.
    given = torch.full((2, LAYOUT.length - 3 - asked.shape[1]), 7)
    tokens = torch.cat([asked, given], dim=1)
    allowed = torch.zeros(45, dtype=torch.bool)
    allowed[[5, 9, 11]] = True
    beams = search_text(model, tokens, num_beams=40, allowed=allowed)
    is_legal = legal_ids(model, allowed)
    for row in range(2):
        likelihoods = {}
        for ids in product([5, 9, 11, EOS], repeat=3):
            end = ids.index(EOS) + 1 if EOS in ids else 3
            likelihoods[ids[:end]] = exact(model, tokens[row], ids[:end], is_legal)
        best = sorted(likelihoods, key=lambda ids: -likelihoods[ids])
        for place, ids in enumerate(best):
            found = beams.ids[row, place].tolist()
            assert found == [*ids, *[PAD] * (3 - len(ids))]
            assert beams.log_likelihoods[row, place].item() == pytest.approx(
                likelihoods[ids], abs=1e-4
            )
        assert torch.isinf(beams.log_likelihoods[row, len(best) :]).all()
        shares = torch.tensor(list(likelihoods.values())).exp()
        assert shares.sum().item() == pytest.approx(1, abs=1e-4)


def exact(
    model: MaskedDecoder, prompt: torch.Tensor, ids: tuple[int, ...], is_legal: torch.Tensor
) -> float:
    tokens = torch.cat([prompt, torch.tensor(ids)])[None]
    with torch.no_grad():
        hidden = model.hidden(tokens)[0, len(prompt) - 1 : -1]
        logits = model.text_logits(hidden)[:, : len(is_legal)].masked_fill(~is_legal, -torch.inf)
    return -F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()


def test_one_beam_is_greedy_and_more_are_no_worse(pipeline: Pipeline) -> None:
    tokens = answer_prompts(pipeline, "image_captioning", indices=codes(6))
    one = beam_answers(pipeline, tokens, num_texts=1)
    assert [found[0].text for found in one] == sample_answers(
        pipeline, tokens, config=GREEDY, seeds=range(6)
    )
    many = beam_answers(pipeline, tokens, num_texts=3, num_beams=12)
    for single, several in zip(one, many, strict=True):
        assert several[0].log_likelihood >= single[0].log_likelihood - 1e-5
        values = [each.log_likelihood for each in several]
        assert len(several) == 3 and values == sorted(values, reverse=True)


def test_a_length_penalty_orders_by_likelihood_a_token(pipeline: Pipeline) -> None:
    tokens = answer_prompts(pipeline, "image_captioning", indices=codes(3))
    beams = search_text(pipeline.decoder, tokens, num_beams=9, length_penalty=1.0)
    lengths = (beams.ids != PAD).sum(-1)
    scores = beams.log_likelihoods / lengths
    assert torch.equal(scores, scores.sort(1, descending=True).values)
    with pytest.raises(ValueError, match="num_beams must be at least 1"):
        search_text(pipeline.decoder, tokens, num_beams=0)
    with pytest.raises(ValueError, match="length_penalty must be finite, got nan"):
        search_text(pipeline.decoder, tokens, num_beams=1, length_penalty=float("nan"))


def test_answers_hold_nothing_but_the_characters_allowed(pipeline: Pipeline) -> None:
    tokens = answer_prompts(pipeline, "image_captioning", indices=codes(30))
    digits = ids_spelling(pipeline, "0123456789")
    assert digits[EOS] and not digits[PAD] and not digits[BOS]
    texts = sample_answers(pipeline, tokens, config=PLAIN, seeds=range(30), allowed=digits)
    assert set("".join(texts)) <= set("0123456789 ") and len(set(texts)) > 3
    found = beam_answers(pipeline, tokens[:4], num_texts=5, allowed=digits)
    assert {letter for row in found for each in row for letter in each.text} <= set("0123456789 ")


def test_texts_of_several_lengths_are_continued_as_alone(pipeline: Pipeline) -> None:
    given = ["красный", "а б", "", "пять звёзд"]
    said = continue_texts(pipeline, given, config=PLAIN, seeds=range(4))
    for at, text in enumerate(given):
        assert said[at].startswith(text)
        alone = continue_texts(pipeline, [text], config=PLAIN, seeds=[at])
        assert said[at] == alone[0]
    assert len(set(said)) == 4
    with pytest.raises(ValueError, match="expected at most 12 tokens"):
        continue_texts(pipeline, ["а б в г д а б в г д а б"], config=PLAIN, seeds=[0])


def test_answers_tell_how_far_they_are(pipeline: Pipeline) -> None:
    tokens = answer_prompts(pipeline, "image_captioning", indices=codes(11))
    told: list[tuple[int, int]] = []
    sample_answers(
        pipeline,
        tokens,
        config=GREEDY,
        seeds=range(11),
        on_token=lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told) and {total for _, total in told} == {11 * 9}
