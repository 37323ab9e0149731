"""Answers in words: prompts of any task, answers drawn or searched, choices judged.

A prompt ends where its answer begins: after the task token of the right text, or, where text is
continued, after the words that are given.  It is read once for all answers that are drawn or
judged after it.

Shapes: B prompts, S samples of each, C choices, T tokens, N new tokens, V text ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.generation.beams import search_text
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import FREE, generate_image, generate_text, legal_ids
from rudolph.generation.trained_models import TrainedModels
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import EOS, PAD
from rudolph.sequence.tasks import MISSING_IMAGE_CODE, TASKS

OnToken = Callable[[int, int], None]


class GeneratedText(NamedTuple):
    """A text and its log-likelihood in nats, of its ``EOS`` too where it has one."""

    text: str
    log_likelihood: float


def answer_prompts(
    pipeline: TrainedModels,
    task: str,
    *,
    indices: Tensor | None = None,
    questions: Sequence[str] | None = None,
    number: int | None = None,
) -> Tensor:
    """What stands before the answers of a task with a right text, ``(B, T)``.

    Args:
        indices: ``(B, I)``, the images; None, for the codes that stand for none, where the task
            has no images.
        questions: one for each prompt, where the task has them.
        number: of prompts, where neither says it.

    Raises:
        ValueError: when images or questions are missing, too many, or not as many.
    """
    row = TASKS[task]
    if row.image != "none" and indices is None:
        raise ValueError(f"{task}: images must be given")
    if row.has_question != (questions is not None):
        raise ValueError(f"{task}: questions must be given exactly where a task has them")
    counts = [len(each) for each in (indices, questions) if each is not None] or [number or 1]
    size = counts[0]
    if counts[-1] != size:
        raise ValueError(f"questions must be one for each of {size} images, got {counts[-1]}")
    left = _lefts(pipeline, task, list(questions or [""] * size))
    if indices is None:
        layout = pipeline.decoder.layout
        indices = torch.full((size, layout.num_image_tokens), MISSING_IMAGE_CODE)
    right = pipeline.texts(task, "").right
    begun = right[: int((right != PAD).sum()) - 1]
    return torch.cat([left, indices.to(left), begun.expand(size, -1)], dim=1)


def imagined_images(
    pipeline: TrainedModels,
    task: str,
    questions: Sequence[str],
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
) -> Tensor:
    """Images ``(B, I)`` drawn for questions, one each by its seed, without guidance.

    fbc2_aij2022 answers questions that have no image after such a one.
    """
    left = _lefts(pipeline, task, questions).to(pipeline.device)
    plain = replace(config, guidance=None)
    batches = pipeline.batches(len(left), len(seeds))
    parts = [
        generate_image(pipeline.decoder, left[rows], config=plain, seeds=seeds[own])
        for rows, own in batches
    ]
    return torch.cat(parts).cpu()


def _lefts(pipeline: TrainedModels, task: str, questions: Sequence[str]) -> Tensor:
    """Left texts ``(B, L)`` of a task that is asked."""
    lefts = {text: pipeline.texts(task, "", beside=text).left for text in dict.fromkeys(questions)}
    return torch.stack([lefts[text] for text in questions])


def sample_answers(
    pipeline: TrainedModels,
    tokens: Tensor,
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    allowed: Tensor | None = None,
    on_token: OnToken | None = None,
) -> list[str]:
    """Texts after prompts ``(B, T)``, S of each by ``seeds`` (B * S): drawn one by one.

    Args:
        allowed: ``(V,)`` bool over BPE ids, those that an answer may hold.
    """
    if not len(tokens) or len(seeds) % len(tokens):
        raise ValueError(
            f"seeds must be as many for each of {len(tokens)} prompts, got {len(seeds)}"
        )
    texts: list[str] = []
    for rows, own in pipeline.batches(len(tokens), len(seeds)):
        drawn = generate_text(
            pipeline.decoder,
            tokens[rows].to(pipeline.device),
            config=config,
            seeds=seeds[own],
            allowed=allowed,
            on_token=batch_progress(on_token, own, len(seeds), pipeline.decoder, tokens.shape[1]),
        )
        texts += [pipeline.tokenizer.decode(ids) for ids in drawn.tolist()]
    return texts


def beam_answers(
    pipeline: TrainedModels,
    tokens: Tensor,
    *,
    number: int,
    num_beams: int | None = None,
    length_penalty: float = 0.0,
    allowed: Tensor | None = None,
) -> list[list[GeneratedText]]:
    """Of each prompt ``(B, T)`` the ``number`` likeliest texts that beam search finds, best first.

    Args:
        num_beams: as many as ``number`` when None.
    """
    width = max(num_beams or number, number)
    found: list[list[GeneratedText]] = []
    for first in range(0, len(tokens), max(pipeline.batch_size // width, 1)):
        part = tokens[first : first + max(pipeline.batch_size // width, 1)]
        beams = search_text(
            pipeline.decoder,
            part.to(pipeline.device),
            num_beams=width,
            length_penalty=length_penalty,
            allowed=allowed,
        )
        for ids, values in zip(beams.ids.tolist(), beams.log_likelihoods.tolist(), strict=True):
            pairs = zip(ids[:number], values[:number], strict=True)
            found.append(
                [GeneratedText(pipeline.tokenizer.decode(text), value) for text, value in pairs]
            )
    return found


class ChoiceLogLikelihoods(NamedTuple):
    """Log-likelihoods of choices ``(B, C)``, in nats, and their numbers of tokens ``(B, C)``."""

    log_likelihoods: Tensor
    num_tokens: Tensor

    @property
    def per_token(self) -> Tensor:
        """Log-likelihood a token, ``(B, C)``: what orders texts of different lengths."""
        return self.log_likelihoods / self.num_tokens


@torch.inference_mode()
def score_choices(
    pipeline: TrainedModels,
    task: str,
    tokens: Tensor,
    choices: Sequence[Sequence[str]],
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> ChoiceLogLikelihoods:
    """How likely each of C choices is as the right text after its prompt ``(B, T)``.

    The distribution is that which texts are drawn from at temperature 1, without filters.  Every
    prompt is read once, and its choices after it in one call.
    """
    counts = {len(each) for each in choices}
    if len(counts) != 1 or len(choices) != len(tokens):
        raise ValueError("every prompt needs its choices, and all as many")
    names = dict.fromkeys(name for each in choices for name in each)
    rights = {name: pipeline.texts(task, name).right for name in names}
    start = tokens.shape[1] - pipeline.decoder.layout.right_text_start
    longest = max(int((right != PAD).sum()) for right in rights.values())
    parts: list[ChoiceLogLikelihoods] = []
    step = max(pipeline.batch_size // counts.pop(), 1)
    for first in range(0, len(tokens), step):
        own = choices[first : first + step]
        texts = torch.stack([rights[name][start:longest] for each in own for name in each])
        found = _judged(pipeline.decoder, tokens[first : first + step], texts, pipeline.device)
        parts.append(ChoiceLogLikelihoods(*(each.view(len(own), -1).cpu() for each in found)))
        if on_batch is not None:
            on_batch(min(first + step, len(tokens)), len(tokens))
    return ChoiceLogLikelihoods(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _judged(
    model: MaskedDecoder, answer_prompts: Tensor, texts: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods and lengths ``(B * C,)`` of texts ``(B * C, N)``, after ``(B, T)``."""
    answer_prompts, texts = answer_prompts.to(device), texts.to(device)
    num_choices, length = len(texts) // len(answer_prompts), texts.shape[1]
    cache = model.new_cache(
        len(answer_prompts), num_positions=model.num_leading + answer_prompts.shape[1]
    )
    hidden = model.hidden(answer_prompts, cache)[:, -1:].repeat_interleave(num_choices, dim=0)
    if length > 1:
        cache = cache.repeat(num_choices, num_positions=length - 1)
        hidden = torch.cat([hidden, model.hidden(texts[:, :-1], cache)], dim=1)
    uses_discriminator = texts != PAD
    is_legal = legal_ids(model, None)
    logits = model.text_logits(hidden[uses_discriminator])[:, : len(is_legal)].float()
    logits = logits.masked_fill(~is_legal, -torch.inf)
    losses = F.cross_entropy(logits, texts[uses_discriminator], reduction="none").double()
    total = torch.zeros(texts.shape, dtype=torch.float64, device=device)
    total[uses_discriminator] = -losses
    return total.sum(1), uses_discriminator.sum(1)


def continue_texts(
    pipeline: TrainedModels,
    texts: Sequence[str],
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    on_token: OnToken | None = None,
) -> list[str]:
    """Texts with what the decoder goes on to say, one by each seed: text to text.

    Text is generated on the left, without an image.
    """
    if len(texts) != len(seeds) or not texts:
        raise ValueError(f"seeds must be one for each of {len(texts)} texts, got {len(seeds)}")
    begun, length = [], pipeline.decoder.layout.left_text_length
    for text in texts:
        left, _, num_cut = pipeline.texts("text_to_text", text)
        if num_cut:
            raise ValueError(
                f"a text to continue must fit into {length} tokens, {num_cut} too many: {text!r}"
            )
        begun.append(left[: int((left != PAD).sum()) - 1])
    # What is drawn at a place follows from its seed alone, whatever other texts begin with.
    shared = int((pipeline.texts("text_to_text", "").left != PAD).sum()) - 1
    known = torch.full((len(texts), length - shared), FREE)
    for row, each in enumerate(begun):
        known[row, : len(each) - shared] = each[shared:]
    answer_prompts = torch.stack([each[:shared] for each in begun])
    found: list[str] = []
    for rows, own in pipeline.batches(len(texts), len(seeds)):
        drawn = generate_text(
            pipeline.decoder,
            answer_prompts[rows].to(pipeline.device),
            config=config,
            seeds=seeds[own],
            known=known[rows],
            on_token=batch_progress(on_token, own, len(seeds), pipeline.decoder, shared),
        )
        whole = torch.cat([answer_prompts[rows].to(drawn), drawn], dim=1)
        found += [pipeline.tokenizer.decode(ids) for ids in whole.tolist()]
    return found


def ids_of(pipeline: TrainedModels, characters: str) -> Tensor:
    """The BPE ids that say nothing but some characters and spaces, ``(V,)`` bool."""
    is_legal = legal_ids(pipeline.decoder, None).cpu()
    for token in range(min(len(is_legal), pipeline.tokenizer.vocab_size)):
        text = pipeline.tokenizer.decode([token])
        is_legal[token] &= token == EOS or (token > EOS and set(text) <= {*characters, " "})
    return is_legal


def batch_progress(
    on_token: OnToken | None, rows: slice, num_rows: int, model: MaskedDecoder, start: int
) -> Callable[[int], None] | None:
    """Progress of the rows of one batch, whose segment goes on at ``start``, as that of all."""
    if on_token is None:
        return None
    layout = model.layout
    ends = (layout.left_text_length, layout.right_text_start, layout.length)
    num_new = next(end for end in ends if end > start) - start
    size = rows.stop - rows.start
    return lambda step: on_token(rows.start * num_new + step * size, num_rows * num_new)
