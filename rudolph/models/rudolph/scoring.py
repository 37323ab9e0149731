"""Labels and losses of each segment: which position predicts which token, and how well.

Training averages these losses over a batch; ranking averages them over a sequence.

Shapes: B batch, T tokens, M labels of a segment, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rudolph.models.rudolph.decoder import Head, MaskedDecoder
from rudolph.sequence.layout import PAD

NOT_SCORED = -1
# Maximum number of logits in memory, 128 MiB in float32: the head is the widest layer.
MAX_LOGITS_IN_MEMORY = 2**25


def segment_labels(
    model: MaskedDecoder,
    tokens: Tensor,
    *,
    has_legacy_first_token: bool = False,
    score_left_padding: bool = True,
) -> dict[str, tuple[int, Tensor]]:
    """Return, for each segment, the first predicting position and the labels ``(B, M)``.

    A position predicts the token after it.  A model with a leading ``BOS`` therefore also predicts
    the first token of the left text.  Unscored labels are ``NOT_SCORED``.

    Args:
        model: decoder that defines layout, vocabulary and leading positions.
        tokens: ``(B, T)``: left text, left text and image, or the whole sequence.
        has_legacy_first_token: count image token 0 as a left-text label, as in the reference.
        score_left_padding: score the padding ids of the left text, as in the reference.

    Raises:
        ValueError: if the tokens end inside a segment.
    """
    layout, num_leading, length = model.layout, model.num_leading, tokens.shape[1]
    if length not in (layout.image_start, layout.right_text_start, layout.length):
        raise ValueError(
            f"tokens must end with a segment (at {layout.image_start}, {layout.right_text_start} "
            f"or {layout.length}), got {length}"
        )
    image_start, right_start = layout.image_start, layout.right_text_start
    left = model.replace_left_padding(tokens[:, :image_start])[:, 1 - num_leading :]
    if not score_left_padding:
        left = left.masked_fill(tokens[:, 1 - num_leading : image_start] == PAD, NOT_SCORED)
    has_image = length > image_start
    # With a leading BOS, the reference does not count this token as text.
    is_legacy = has_legacy_first_token and num_leading == 0
    if has_image and is_legacy:
        left = torch.cat([left, tokens[:, image_start : image_start + 1]], dim=1)
    labels = {"left_text": (0, left)}
    if has_image:
        first = image_start + 1 if is_legacy else image_start
        labels["image"] = (first - 1 + num_leading, tokens[:, first:right_start])
    if length > right_start:
        right = tokens[:, right_start + 1 :]
        labels["right_text"] = (
            right_start + num_leading,
            right.masked_fill(right == PAD, NOT_SCORED),
        )
    return labels


def label_losses(
    model: MaskedDecoder,
    hidden: Tensor,
    segment: str,
    labels: tuple[int, Tensor],
    *,
    heads: Sequence[Head] | None = None,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
    is_joint: bool = False,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """Return the cross-entropy of each scored label in nats, as a flat tensor in row-major order.

    Args:
        model: decoder whose head computes the logits.
        hidden: ``(B, T, D)``, output of ``model.hidden`` for the whole sequence.
        segment: name of the segment, one of ``SEGMENTS``.
        labels: the segment's entry of ``segment_labels``.
        heads: result of ``model.to_logits.heads()``, to share it between segments.
        num_classes: restrict the softmax to this many first classes; None uses all.
        label_smoothing: label smoothing of the cross-entropy.
        is_joint: normalise over all text and image ids instead of the segment's own.
        z_loss_weight: weight of the added z-loss, the squared log-partition function (Chameleon,
            section 2.3).
    """
    start, target = labels
    is_scored = target != NOT_SCORED
    text, image = heads or model.to_logits.heads()
    head = image if segment == "image" else text
    # The head is the widest layer, so only scored positions pass through it.
    states, targets = hidden[:, start : start + target.shape[1]][is_scored], target[is_scored]
    if is_joint:
        head = model.to_logits
        targets = targets + (model.vocabulary.text_size if segment == "image" else 0)

    def cross_entropies(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float()[:, :num_classes]
        values = F.cross_entropy(
            logits, targets, reduction="none", label_smoothing=label_smoothing
        )
        return values + z_loss_weight * logits.logsumexp(-1).square() if z_loss_weight else values

    text_size, image_size = model.vocabulary.text_size, model.vocabulary.image_size
    segment_size = image_size if segment == "image" else text_size
    num_logits = text_size + image_size if is_joint else segment_size
    rows_per_part = max(MAX_LOGITS_IN_MEMORY // num_logits, 1)
    if len(states) <= rows_per_part:
        return cross_entropies(states, targets)
    parts = zip(
        torch.split(states, rows_per_part), torch.split(targets, rows_per_part), strict=True
    )
    # Recomputing logits in the backward pass keeps only one part of them in memory.
    return torch.cat(
        [
            checkpoint(cross_entropies, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    )
