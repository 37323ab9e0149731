"""Which of several images or texts fit best, by the decoder's own perplexity.

A perplexity is of one segment of a sequence, given what stands before it.  Two are known:
``exp_mean_ce``, the exponential of the mean cross-entropy, is the proper one and the default;
``mean_exp_ce``, the mean over tokens of the exponential, is the reference's, which one unlikely
token can decide.

Source: ru-dolph, ``rudolph/api.py`` (``self_reranking_by_text``, ``self_reranking_by_image``,
``zs_clf``); rudalle, ``pipelines.py`` (``generate_images``).

Shapes: B sequences, M labels of a segment, T tokens, P images, C classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rudolph.generation.trained_models import TrainedModels
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.rudolph.scoring import NOT_SCORED, label_losses, segment_labels

# In the reference's sum of two perplexities, the weight of the text's.
BY_TEXT_WEIGHT, BY_IMAGE_WEIGHT = 0.95, 0.05


def exp_mean_ce(losses: Tensor, is_scored: Tensor) -> Tensor:
    """exp of the mean of ``losses`` (B, M) where ``is_scored`` (B, M), ``(B,)``."""
    total = losses.masked_fill(~is_scored, 0).sum(1)
    return (total / is_scored.sum(1)).exp()


def mean_exp_ce(losses: Tensor, is_scored: Tensor) -> Tensor:
    """The mean of exp of ``losses`` (B, M) where ``is_scored`` (B, M), ``(B,)``."""
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
    """The perplexity of segments of each sequence ``(B, T)``, ``(B,)`` each.

    Text is judged among BPE ids and special tokens without padding, an image among its codebook.
    Padding is not judged, nor the first token of a segment: that of a text is always ``BOS``, and
    the first image token RUDOLPH never learned to draw.

    Args:
        segments: of ``left_text``, ``image`` and ``right_text``.
        kind: a name of ``PERPLEXITIES``.

    Raises:
        ValueError: for an unknown kind, or when nothing of a segment is judged.
    """
    if kind not in PERPLEXITIES:
        raise ValueError(f"kind must be one of {', '.join(PERPLEXITIES)}, got {kind!r}")
    found: dict[str, list[Tensor]] = {segment: [] for segment in segments}
    device = model.final_norm.weight.device
    for first in range(0, len(tokens), batch_size):
        part = tokens[first : first + batch_size].to(device)
        hidden = model.hidden(part)
        for segment in segments:
            found[segment].append(_judged(model, part, hidden, segment, kind))
        if on_batch is not None:
            on_batch(min(first + batch_size, len(tokens)), len(tokens))
    return {segment: torch.cat(parts) for segment, parts in found.items()}


def _judged(
    model: MaskedDecoder, tokens: Tensor, hidden: Tensor, segment: str, kind: str
) -> Tensor:
    vocabulary = model.vocabulary
    classes = vocabulary.first_left_padding if segment != "image" else vocabulary.codebook_size
    start, target = segment_labels(model, tokens, has_left_padding=False)[segment]
    if segment == "image" or (segment == "left_text" and model.num_leading):
        start, target = start + 1, target[:, 1:]
    is_scored = (target != NOT_SCORED).cpu()
    if not is_scored.any(1).all():
        raise ValueError(f"{segment}: without a token to judge it has no perplexity")
    # In float32 the exponential of one very unlikely token is infinite.
    losses = torch.zeros(target.shape, dtype=torch.float64)
    found = label_losses(model, hidden, segment, (start, target), num_classes=classes)
    losses[is_scored] = found.cpu().double()
    return PERPLEXITIES[kind](losses, is_scored)


class Ranking(NamedTuple):
    """Candidates by what speaks for them: ``score`` (B,), lower is better, and its parts."""

    score: Tensor
    text: Tensor
    image: Tensor

    def order(self) -> list[int]:
        """The candidates, best first; equal ones in the order given."""
        return torch.sort(self.score, stable=True).indices.tolist()


def balanced_sum(
    text: Tensor, image: Tensor, *, text_weight: float, quantile: float = 0.5
) -> Ranking:
    """The reference's sum of two perplexities ``(B,)``, each on a scale from best to median.

    Where all candidates are equal, or half of them and more, the scale is that of the worst one,
    or none; the reference divides by zero there.

    Raises:
        ValueError: for a weight or a quantile that is no share.
    """
    for name, share in (("text_weight", text_weight), ("quantile", quantile)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    score = text_weight * _scaled(text, quantile) + (1 - text_weight) * _scaled(image, quantile)
    return Ranking(score, text, image)


def _scaled(values: Tensor, quantile: float) -> Tensor:
    low = values.min()
    scale = values.quantile(quantile) - low
    if scale == 0:
        scale = values.max() - low
    return (values - low) / scale if scale > 0 else torch.zeros_like(values)


def rank_images(
    pipeline: TrainedModels,
    indices: Tensor,
    caption: str,
    *,
    kind: str = "exp_mean_ce",
    text_weight: float = BY_TEXT_WEIGHT,
    on_batch: Callable[[int, int], None] | None = None,
) -> Ranking:
    """How well images ``(P, I)`` in indices fit a caption: is it told when they are seen?

    A decoder without right text is asked how likely the image is after the caption, and then
    ``text`` is that of the caption before any image, the same for all.
    """
    has_right = pipeline.decoder.layout.right_text_length > 0
    task = "image_captioning" if has_right else "text_to_image"
    texts = pipeline.texts(task, caption)
    left = texts.left.expand(len(indices), -1)
    parts = [left, indices, texts.right.expand(len(indices), -1)]
    segment = "right_text" if has_right else "left_text"
    found = perplexities(
        pipeline.decoder,
        torch.cat(parts, dim=1),
        segments=(segment, "image"),
        kind=kind,
        batch_size=pipeline.batch_size,
        on_batch=on_batch,
    )
    weight = text_weight if has_right else 0.0
    return balanced_sum(found[segment], found["image"], text_weight=weight)


def rank_captions(
    pipeline: TrainedModels,
    indices: Tensor,
    captions: Sequence[str],
    *,
    kind: str = "exp_mean_ce",
    text_weight: float = BY_IMAGE_WEIGHT,
) -> Ranking:
    """How well captions fit one image ``(I,)`` in indices: is it drawn when they are read?"""
    left = torch.stack([pipeline.texts("text_to_image", caption).left for caption in captions])
    tokens = torch.cat([left, indices.expand(len(captions), -1)], dim=1)
    found = perplexities(
        pipeline.decoder,
        tokens,
        segments=("left_text", "image"),
        kind=kind,
        batch_size=pipeline.batch_size,
    )
    return balanced_sum(found["left_text"], found["image"], text_weight=text_weight)


def classify_images(
    pipeline: TrainedModels,
    indices: Tensor,
    classes: Sequence[str],
    *,
    left_template: str = "",
    right_template: str = "{}",
    kind: str = "exp_mean_ce",
) -> Tensor:
    """Zero-shot: perplexities ``(P, C)`` of each class's name after each image; lowest wins.

    Templates hold ``{}`` where the class is named, or nothing of it; each class is judged with its
    own, and any number of classes fits.

    Args:
        indices: ``(P, I)``, images as the VQ-GAN's indices.
    """
    texts = [
        pipeline.texts(
            "image_captioning", right_template.format(name), beside=left_template.format(name)
        )
        for name in classes
    ]
    left = torch.stack([text.left for text in texts]).repeat(len(indices), 1)
    right = torch.stack([text.right for text in texts]).repeat(len(indices), 1)
    images = indices.repeat_interleave(len(classes), dim=0)
    found = perplexities(
        pipeline.decoder,
        torch.cat([left, images, right], dim=1),
        segments=("right_text",),
        kind=kind,
        batch_size=pipeline.batch_size,
    )
    return found["right_text"].view(len(indices), len(classes))


PERPLEXITIES = {"exp_mean_ce": exp_mean_ce, "mean_exp_ce": mean_exp_ce}
