"""Text answers to prompts of any task: sampling, beam search and scoring of given choices.

A prompt ends where its answer begins: after the task token of the right text, or after the given
words when a text is continued.  The decoder computes each prompt once, for all answers that are
sampled or scored after it.

Shapes: B prompts, S samples per prompt, C choices per prompt, T tokens, I image tokens, N new
tokens, V text ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.generation.beams import search_text
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import TO_SAMPLE, generate_image, generate_text, legal_ids
from rudolph.generation.trained_models import TrainedModels
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import EOS, PAD
from rudolph.sequence.tasks import MISSING_IMAGE_CODE, TASKS

OnToken = Callable[[int, int], None]


class GeneratedText(NamedTuple):
    """A text and its log-likelihood in nats, including that of an ``EOS`` at its end."""

    text: str
    log_likelihood: float


def answer_prompts(
    pipeline: TrainedModels,
    task: str,
    *,
    indices: Tensor | None = None,
    questions: Sequence[str] | None = None,
    num_prompts: int | None = None,
) -> Tensor:
    """Build the prompts ``(B, T)`` of a task whose answer is the right text.

    A prompt is the left text, the image indices and the right text up to its task token.

    Args:
        pipeline: the tokenizer and the decoder that define the layout.
        task: a name in ``TASKS``.
        indices: ``(B, I)``, the images as VQ-GAN indices; None, for tasks without images, fills
            the image with ``MISSING_IMAGE_CODE``.
        questions: one per prompt, for tasks that have a question.
        num_prompts: the number of prompts if there are neither images nor questions; 1 by default.

    Raises:
        ValueError: if images or questions are missing, superfluous or unequal in number, or if the
            decoder has no right text.
    """
    task_row = TASKS[task]
    if task_row.image != "none" and indices is None:
        raise ValueError(f"{task}: expected images, got none")
    if task_row.has_question != (questions is not None):
        raise ValueError(
            f"{task}: expected {'questions' if task_row.has_question else 'no questions'}, "
            f"got {'none' if questions is None else 'some'}"
        )
    counts = [len(values) for values in (indices, questions) if values is not None] or [
        num_prompts or 1
    ]
    batch_size = counts[0]
    if counts[-1] != batch_size:
        raise ValueError(f"questions: expected one per image ({batch_size}), got {counts[-1]}")
    left = _encode_left_texts(pipeline, task, list(questions or [""] * batch_size))
    if indices is None:
        layout = pipeline.decoder.layout
        indices = torch.full((batch_size, layout.num_image_tokens), MISSING_IMAGE_CODE)
    right = pipeline.texts(task, "").right
    prefix = right[: int((right != PAD).sum()) - 1]
    return torch.cat([left, indices.to(left), prefix.expand(batch_size, -1)], dim=1)


def sample_question_images(
    pipeline: TrainedModels,
    task: str,
    questions: Sequence[str],
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
) -> Tensor:
    """Sample image indices ``(B, I)`` for questions, one image per seed, without guidance.

    Source: the code of Fusion Brain Challenge 2, github.com/ai-forever/fbc2_aij2022.  It samples
    such an image before it answers a question without one.

    Args:
        pipeline: the tokenizer and the decoder.
        task: the task whose task token stands in the left text, a name in ``TASKS``.
        questions: one per image.
        config: how image tokens are sampled; its ``guidance`` is ignored.
        seeds: one per question.
    """
    left = _encode_left_texts(pipeline, task, questions).to(pipeline.device)
    unguided = replace(config, guidance=None)
    batches = pipeline.batches(len(left), len(seeds))
    parts = [
        generate_image(pipeline.decoder, left[rows], config=unguided, seeds=seeds[samples])
        for rows, samples in batches
    ]
    return torch.cat(parts).cpu()


def _encode_left_texts(pipeline: TrainedModels, task: str, questions: Sequence[str]) -> Tensor:
    """Encode the questions of a task as left texts ``(B, L)``."""
    left_texts = {
        text: pipeline.texts(task, "", other_text=text).left for text in dict.fromkeys(questions)
    }
    return torch.stack([left_texts[text] for text in questions])


def sample_answers(
    pipeline: TrainedModels,
    tokens: Tensor,
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    allowed: Tensor | None = None,
    on_token: OnToken | None = None,
) -> list[str]:
    """Sample texts after prompts, S per prompt.

    Args:
        pipeline: the tokenizer and the decoder.
        tokens: ``(B, T)``, the prompts.
        config: how tokens are sampled.
        seeds: one per sample, B * S, with the samples of a prompt next to each other.
        allowed: ``(V,)`` bool, true for the BPE ids that an answer may contain.
        on_token: called with the number of tokens done and the total.

    Returns:
        B * S texts, in the order of ``seeds``.

    Raises:
        ValueError: if the number of seeds is not a multiple of the number of prompts.
    """
    if not len(tokens) or len(seeds) % len(tokens):
        raise ValueError(
            f"seeds: expected a multiple of the {len(tokens)} prompts, got {len(seeds)}"
        )
    texts: list[str] = []
    for rows, samples in pipeline.batches(len(tokens), len(seeds)):
        generated = generate_text(
            pipeline.decoder,
            tokens[rows].to(pipeline.device),
            config=config,
            seeds=seeds[samples],
            allowed=allowed,
            on_token=batch_progress(
                on_token, samples, len(seeds), pipeline.decoder, tokens.shape[1]
            ),
        )
        texts += [pipeline.tokenizer.decode(ids) for ids in generated.tolist()]
    return texts


def beam_answers(
    pipeline: TrainedModels,
    tokens: Tensor,
    *,
    num_texts: int,
    num_beams: int | None = None,
    length_penalty: float = 0.0,
    allowed: Tensor | None = None,
) -> list[list[GeneratedText]]:
    """Find the most likely texts after each prompt by beam search, best first.

    Args:
        pipeline: the tokenizer and the decoder.
        tokens: ``(B, T)``, the prompts.
        num_texts: texts returned per prompt.
        num_beams: the beam width, raised to ``num_texts`` if smaller; None means ``num_texts``.
        length_penalty: the exponent of the length, see ``search_text``.
        allowed: ``(V,)`` bool, true for the BPE ids that an answer may contain.

    Returns:
        One list of ``num_texts`` texts per prompt.
    """
    beam_width = max(num_beams or num_texts, num_texts)
    answers: list[list[GeneratedText]] = []
    for first in range(0, len(tokens), max(pipeline.batch_size // beam_width, 1)):
        prompts = tokens[first : first + max(pipeline.batch_size // beam_width, 1)]
        beams = search_text(
            pipeline.decoder,
            prompts.to(pipeline.device),
            num_beams=beam_width,
            length_penalty=length_penalty,
            allowed=allowed,
        )
        for ids, values in zip(beams.ids.tolist(), beams.log_likelihoods.tolist(), strict=True):
            pairs = zip(ids[:num_texts], values[:num_texts], strict=True)
            answers.append(
                [GeneratedText(pipeline.tokenizer.decode(text), value) for text, value in pairs]
            )
    return answers


class ChoiceLogLikelihoods(NamedTuple):
    """Log-likelihoods ``(B, C)`` of choices in nats, and their numbers of tokens ``(B, C)``."""

    log_likelihoods: Tensor
    num_tokens: Tensor

    @property
    def per_token(self) -> Tensor:
        """Mean log-likelihood per token, ``(B, C)``, which ranks texts of different lengths."""
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
    """Score each of C choices as the right text after its prompt.

    The scores use the distribution that texts are sampled from at temperature 1 without filters.
    Each prompt is computed once, and all of its choices follow in one call.

    Args:
        pipeline: the tokenizer and the decoder.
        task: a name in ``TASKS``, which gives the task token of the right text.
        tokens: ``(B, T)``, prompts from ``answer_prompts``.
        choices: one sequence of C texts per prompt.
        on_batch: called with the number of prompts done and the total.

    Raises:
        ValueError: if the prompts do not all have the same number of choices.
    """
    counts = {len(texts) for texts in choices}
    if len(counts) != 1 or len(choices) != len(tokens):
        raise ValueError(
            f"choices: expected the same number for each of {len(tokens)} prompts, "
            f"got {len(choices)} lists of {sorted(counts)} choices"
        )
    names = dict.fromkeys(name for texts in choices for name in texts)
    rights = {name: pipeline.texts(task, name).right for name in names}
    start = tokens.shape[1] - pipeline.decoder.layout.right_text_start
    longest = max(int((right != PAD).sum()) for right in rights.values())
    parts: list[ChoiceLogLikelihoods] = []
    prompts_per_batch = max(pipeline.batch_size // counts.pop(), 1)
    for first in range(0, len(tokens), prompts_per_batch):
        batch_choices = choices[first : first + prompts_per_batch]
        texts = torch.stack(
            [
                rights[name][start:longest]
                for names_of_prompt in batch_choices
                for name in names_of_prompt
            ]
        )
        scores = _score_texts(
            pipeline.decoder, tokens[first : first + prompts_per_batch], texts, pipeline.device
        )
        parts.append(
            ChoiceLogLikelihoods(*(values.view(len(batch_choices), -1).cpu() for values in scores))
        )
        if on_batch is not None:
            on_batch(min(first + prompts_per_batch, len(tokens)), len(tokens))
    return ChoiceLogLikelihoods(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _score_texts(
    model: MaskedDecoder, prompts: Tensor, texts: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Score texts ``(B * C, N)`` after prompts ``(B, T)``.

    Return their log-likelihoods and their numbers of tokens, both ``(B * C,)``.
    """
    prompts, texts = prompts.to(device), texts.to(device)
    num_choices, length = len(texts) // len(prompts), texts.shape[1]
    cache = model.new_cache(len(prompts), num_positions=model.num_leading + prompts.shape[1])
    hidden = model.hidden(prompts, cache)[:, -1:].repeat_interleave(num_choices, dim=0)
    if length > 1:
        cache = cache.expand_samples(num_choices, num_positions=length - 1)
        hidden = torch.cat([hidden, model.hidden(texts[:, :-1], cache)], dim=1)
    is_scored = texts != PAD
    is_legal = legal_ids(model, None)
    logits = model.text_logits(hidden[is_scored])[:, : len(is_legal)].float()
    logits = logits.masked_fill(~is_legal, -torch.inf)
    losses = F.cross_entropy(logits, texts[is_scored], reduction="none").double()
    log_likelihoods = torch.zeros(texts.shape, dtype=torch.float64, device=device)
    log_likelihoods[is_scored] = -losses
    return log_likelihoods.sum(1), is_scored.sum(1)


def continue_texts(
    pipeline: TrainedModels,
    texts: Sequence[str],
    *,
    config: TokenSamplingConfig,
    seeds: Sequence[int],
    on_token: OnToken | None = None,
) -> list[str]:
    """Continue each text with the decoder and return the text with its continuation.

    The continuation fills the left text segment, without an image.

    Args:
        pipeline: the tokenizer and the decoder.
        texts: the beginnings.
        config: how tokens are sampled.
        seeds: one per text.
        on_token: called with the number of tokens done and the total.

    Raises:
        ValueError: if there are no texts, the numbers of texts and seeds differ, or a text is too
            long for the left text segment.
    """
    if len(texts) != len(seeds) or not texts:
        raise ValueError(
            f"seeds: expected one per text ({len(texts)}, at least 1), got {len(seeds)}"
        )
    prefixes, length = [], pipeline.decoder.layout.left_text_length
    for text in texts:
        left, _, num_cut = pipeline.texts("text_to_text", text)
        if num_cut:
            raise ValueError(
                f"text to continue: expected at most {length} tokens, got {num_cut} more: {text!r}"
            )
        prefixes.append(left[: int((left != PAD).sum()) - 1])
    # Start all rows after the task token, so that a row's noise does not depend on other texts.
    shared = int((pipeline.texts("text_to_text", "").left != PAD).sum()) - 1
    known = torch.full((len(texts), length - shared), TO_SAMPLE)
    for row, prefix in enumerate(prefixes):
        known[row, : len(prefix) - shared] = prefix[shared:]
    prompts = torch.stack([prefix[:shared] for prefix in prefixes])
    continued: list[str] = []
    for rows, samples in pipeline.batches(len(texts), len(seeds)):
        generated = generate_text(
            pipeline.decoder,
            prompts[rows].to(pipeline.device),
            config=config,
            seeds=seeds[samples],
            known=known[rows],
            on_token=batch_progress(on_token, samples, len(seeds), pipeline.decoder, shared),
        )
        tokens = torch.cat([prompts[rows].to(generated), generated], dim=1)
        continued += [pipeline.tokenizer.decode(ids) for ids in tokens.tolist()]
    return continued


def ids_spelling(pipeline: TrainedModels, characters: str) -> Tensor:
    """Return a mask ``(V,)`` of the BPE ids that decode to only ``characters`` and spaces.

    ``EOS`` is included.
    """
    is_legal = legal_ids(pipeline.decoder, None).cpu()
    for token in range(min(len(is_legal), pipeline.tokenizer.vocab_size)):
        text = pipeline.tokenizer.decode([token])
        is_legal[token] &= token == EOS or (token > EOS and set(text) <= {*characters, " "})
    return is_legal


def batch_progress(
    on_token: OnToken | None, rows: slice, num_rows: int, model: MaskedDecoder, start: int
) -> Callable[[int], None] | None:
    """Convert the progress within one batch of rows to progress over all rows.

    Args:
        on_token: called with the number of tokens done and the total; None returns None.
        rows: the rows of the batch.
        num_rows: the number of all rows.
        model: the decoder, whose layout gives the end of the segment.
        start: the first position that is generated.
    """
    if on_token is None:
        return None
    layout = model.layout
    ends = (layout.left_text_length, layout.right_text_start, layout.length)
    num_new = next(end for end in ends if end > start) - start
    size = rows.stop - rows.start
    return lambda step: on_token(rows.start * num_new + step * size, num_rows * num_new)
