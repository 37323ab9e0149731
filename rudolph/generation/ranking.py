"""Rerank images or texts by the decoder's own perplexity.

A perplexity belongs to one segment of a sequence, given the tokens before the segment.  There are
two kinds.  ``exp_mean_ce``, the exponential of the mean cross-entropy, is the standard definition
and the default.  ``mean_exp_ce``, the mean over tokens of the exponential, is the reference's
definition; a single unlikely token can dominate it.

Source: ru-dolph, ``rudolph/api.py`` (``self_reranking_by_text``, ``self_reranking_by_image``,
``zs_clf``); rudalle, ``pipelines.py`` (``generate_images``).

Shapes: B sequences, M labels of a segment, T tokens, I image tokens, P images, C classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.generation.trained_models import TrainedModels
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.rudolph.scoring import NOT_SCORED, label_losses, segment_labels

# Weights of the text's perplexity in the reference's sum of two perplexities.
BY_TEXT_WEIGHT, BY_IMAGE_WEIGHT = 0.95, 0.05


def exp_mean_ce(losses: Tensor, is_scored: Tensor) -> Tensor:
    """Return ``(B,)``: exp of each row's mean loss over positions where ``is_scored`` is true.

    Both inputs are ``(B, M)``.
    """
    total = losses.masked_fill(~is_scored, 0).sum(1)
    return (total / is_scored.sum(1)).exp()


def mean_exp_ce(losses: Tensor, is_scored: Tensor) -> Tensor:
    """Return ``(B,)``: the mean of exp(loss) over a row's positions where ``is_scored`` is true.

    Both inputs are ``(B, M)``.
    """
    total = losses.exp().masked_fill(~is_scored, 0).sum(1)
    return total / is_scored.sum(1)


@torch.inference_mode()
def perplexities(
    model: MaskedDecoder,
    tokens: Tensor,
    *,
    segments: Sequence[str],
    kind: str = "exp_mean_ce",
    batch_size: int = 16,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Compute the perplexity of segments of each sequence, ``(B,)`` per segment.

    The softmax of a text runs over BPE ids and special tokens without padding.  The softmax of an
    image runs over the codebook.  Padding is not scored, nor is the first token of a segment: in a
    text it is always ``BOS``, and RUDOLPH was never trained to generate the first image token.

    Args:
        model: the decoder.
        tokens: ``(B, T)``, whole sequences, or sequences up to the end of a segment.
        segments: names out of ``left_text``, ``image`` and ``right_text``.
        kind: a name in ``PERPLEXITIES``.
        batch_size: sequences per forward pass.
        on_batch: called with the number of sequences done and the total.

    Raises:
        ValueError: if the kind is unknown, or a segment of a sequence has no scored token.
    """
    if kind not in PERPLEXITIES:
        raise ValueError(f"kind must be one of {', '.join(PERPLEXITIES)}, got {kind!r}")
    parts_by_segment: dict[str, list[Tensor]] = {segment: [] for segment in segments}
    device = model.final_norm.weight.device
    for first in range(0, len(tokens), batch_size):
        batch = tokens[first : first + batch_size].to(device)
        hidden = model.hidden(batch)
        for segment in segments:
            parts_by_segment[segment].append(
                _segment_perplexity(model, batch, hidden, segment, kind)
            )
        if on_batch is not None:
            on_batch(min(first + batch_size, len(tokens)), len(tokens))
    return {segment: torch.cat(parts) for segment, parts in parts_by_segment.items()}


def _segment_perplexity(
    model: MaskedDecoder, tokens: Tensor, hidden: Tensor, segment: str, kind: str
) -> Tensor:
    vocabulary = model.vocabulary
    num_classes = vocabulary.first_left_padding if segment != "image" else vocabulary.codebook_size
    start, target = segment_labels(model, tokens, score_left_padding=False)[segment]
    if segment == "image" or (segment == "left_text" and model.num_leading):
        start, target = start + 1, target[:, 1:]
    is_scored = (target != NOT_SCORED).cpu()
    if not is_scored.any(1).all():
        raise ValueError(f"{segment}: expected at least one scored token per sequence, got none")
    # float64, because the exponential of a very unlikely token overflows float32.
    losses = torch.zeros(target.shape, dtype=torch.float64)
    scored_losses = label_losses(model, hidden, segment, (start, target), num_classes=num_classes)
    losses[is_scored] = scored_losses.cpu().double()
    return PERPLEXITIES[kind](losses, is_scored)


class Ranking(NamedTuple):
    """Scores of candidates: the total ``score`` (B,), lower is better, and its two parts."""

    score: Tensor
    text: Tensor
    image: Tensor

    def order(self) -> list[int]:
        """Return the candidates' indices, best first; ties keep their given order."""
        return torch.sort(self.score, stable=True).indices.tolist()


def rescaled_sum(
    text: Tensor, image: Tensor, *, text_weight: float, quantile: float = 0.5
) -> Ranking:
    """Add two perplexities ``(B,)`` as the reference does, each rescaled from best to median.

    The rescaled value is 0 for the best candidate and 1 at ``quantile``.  If these two coincide,
    the worst candidate becomes 1 instead.  If all candidates are equal, all become 0; the
    reference divides by zero in both cases.

    Args:
        text: ``(B,)``, perplexities of the text.
        image: ``(B,)``, perplexities of the image.
        text_weight: the weight of the text in [0, 1]; the image has the remaining weight.
        quantile: the quantile that is rescaled to 1; 0.5 is the median.

    Raises:
        ValueError: if the weight or the quantile is not in [0, 1].
    """
    for name, value in (("text_weight", text_weight), ("quantile", quantile)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    score = text_weight * _scaled(text, quantile) + (1 - text_weight) * _scaled(image, quantile)
    return Ranking(score, text, image)


def _scaled(values: Tensor, quantile: float) -> Tensor:
    lowest = values.min()
    scale = values.quantile(quantile) - lowest
    if scale == 0:
        scale = values.max() - lowest
    return (values - lowest) / scale if scale > 0 else torch.zeros_like(values)


def rank_images(
    pipeline: TrainedModels,
    indices: Tensor,
    caption: str,
    *,
    kind: str = "exp_mean_ce",
    text_weight: float = BY_TEXT_WEIGHT,
    on_batch: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Rank images for a caption by the caption's perplexity given each image.

    The image's own perplexity enters with the remaining weight.  If the decoder has no right text,
    the score is the image's perplexity given the caption alone.  In that case ``text`` is the
    perplexity of the caption before any image, which is equal for all images.

    Args:
        pipeline: the tokenizer and the decoder.
        indices: ``(P, I)``, images as VQ-GAN indices.
        caption: the text that the images should fit.
        kind: a name in ``PERPLEXITIES``.
        text_weight: the weight of the text in [0, 1]; the image has the remaining weight.
        on_batch: called with the number of images done and the total.
    """
    has_right = pipeline.decoder.layout.right_text_length > 0
    task = "image_captioning" if has_right else "text_to_image"
    texts = pipeline.texts(task, caption)
    left = texts.left.expand(len(indices), -1)
    parts = [left, indices, texts.right.expand(len(indices), -1)]
    segment = "right_text" if has_right else "left_text"
    perplexity_of = perplexities(
        pipeline.decoder,
        torch.cat(parts, dim=1),
        segments=(segment, "image"),
        kind=kind,
        batch_size=pipeline.batch_size,
        on_batch=on_batch,
    )
    weight = text_weight if has_right else 0.0
    return rescaled_sum(perplexity_of[segment], perplexity_of["image"], text_weight=weight)


def rank_captions(
    pipeline: TrainedModels,
    indices: Tensor,
    captions: Sequence[str],
    *,
    kind: str = "exp_mean_ce",
    text_weight: float = BY_IMAGE_WEIGHT,
) -> Ranking:
    """Rank captions for one image by the image's perplexity given each caption.

    Args:
        pipeline: the tokenizer and the decoder.
        indices: ``(I,)``, the image as VQ-GAN indices.
        captions: the candidates.
        kind: a name in ``PERPLEXITIES``.
        text_weight: the weight of the caption's own perplexity in [0, 1]; the image has the
            remaining weight.
    """
    left = torch.stack([pipeline.texts("text_to_image", caption).left for caption in captions])
    tokens = torch.cat([left, indices.expand(len(captions), -1)], dim=1)
    perplexity_of = perplexities(
        pipeline.decoder,
        tokens,
        segments=("left_text", "image"),
        kind=kind,
        batch_size=pipeline.batch_size,
    )
    return rescaled_sum(
        perplexity_of["left_text"], perplexity_of["image"], text_weight=text_weight
    )


def classify_images(
    pipeline: TrainedModels,
    indices: Tensor,
    classes: Sequence[str],
    *,
    left_template: str = "",
    right_template: str = "{}",
    kind: str = "exp_mean_ce",
) -> Tensor:
    """Compute the perplexity ``(P, C)`` of each class name after each image; the lowest wins.

    This is zero-shot classification.  Each class is scored with its own pair of filled templates,
    so any number of classes fits.

    Args:
        pipeline: the tokenizer and the decoder.
        indices: ``(P, I)``, images as VQ-GAN indices.
        classes: the names of the C classes.
        left_template: the left text, in which the class name replaces ``{}``, if present.
        right_template: the right text, which is scored; the class name replaces ``{}``.
        kind: a name in ``PERPLEXITIES``.
    """
    texts = [
        pipeline.texts(
            "image_captioning", right_template.format(name), other_text=left_template.format(name)
        )
        for name in classes
    ]
    left = torch.stack([text.left for text in texts]).repeat(len(indices), 1)
    right = torch.stack([text.right for text in texts]).repeat(len(indices), 1)
    images = indices.repeat_interleave(len(classes), dim=0)
    perplexity_of = perplexities(
        pipeline.decoder,
        torch.cat([left, images, right], dim=1),
        segments=("right_text",),
        kind=kind,
        batch_size=pipeline.batch_size,
    )
    return perplexity_of["right_text"].view(len(indices), len(classes))


PERPLEXITIES = {"exp_mean_ce": exp_mean_ce, "mean_exp_ce": mean_exp_ce}
