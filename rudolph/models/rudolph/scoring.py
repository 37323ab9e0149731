"""Which position predicts which token, and how well: the labels of a segment and their losses.

Training means these losses over a batch, ranking over a sequence; both read them here.

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
# Logits that are held at once, 128 MiB in float32: the head is the widest product of the model.
LOGITS_AT_ONCE = 2**25


def segment_labels(
    model: MaskedDecoder,
    tokens: Tensor,
    *,
    has_legacy_first_token: bool = False,
    has_left_padding: bool = True,
) -> dict[str, tuple[int, Tensor]]:
    """For each segment, the first position that predicts it and its labels, ``(B, M)``.

    A position predicts the token after it; in a model with a leading ``BOS`` every token of the
    left text is predicted too.  What is not scored has the label -1.

    Args:
        tokens: ``(B, T)``: left text, left text and image, or the whole sequence.
        has_legacy_first_token: image token 0 is a label of the left text, as in the reference.
        has_left_padding: the padding ids of the left text are labels, as in the reference.

    Raises:
        ValueError: when tokens end inside a segment.
    """
    layout, lead, length = model.layout, model.num_leading, tokens.shape[1]
    if length not in (layout.image_start, layout.right_text_start, layout.length):
        raise ValueError(
            f"tokens must end with a segment (at {layout.image_start}, {layout.right_text_start} "
            f"or {layout.length}), got {length}"
        )
    image_start, right_start = layout.image_start, layout.right_text_start
    left = model.replace_left_padding(tokens[:, :image_start])[:, 1 - lead :]
    if not has_left_padding:
        left = left.masked_fill(tokens[:, 1 - lead : image_start] == PAD, NOT_SCORED)
    has_image = length > image_start
    # Only without a leading BOS does the reference predict it with the text.
    is_legacy = has_legacy_first_token and lead == 0
    if has_image and is_legacy:
        left = torch.cat([left, tokens[:, image_start : image_start + 1]], dim=1)
    labels = {"left_text": (0, left)}
    if has_image:
        first = image_start + 1 if is_legacy else image_start
        labels["image"] = (first - 1 + lead, tokens[:, first:right_start])
    if length > right_start:
        right = tokens[:, right_start + 1 :]
        labels["right_text"] = (right_start + lead, right.masked_fill(right == PAD, NOT_SCORED))
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
    """Cross-entropy in nats of the labels that are scored, ``(number of them,)``, row by row.

    Args:
        hidden: ``(B, T, D)``, what ``model.hidden`` gave for the whole sequence.
        heads: the model's, when they serve several segments.
        num_classes: the first classes of the segment's vocabulary alone; all when None.
        is_joint: among all ids of text and image, and not among the segment's own.
        z_loss_weight: of the squared logarithm of the softmax's sum, which is added (Chameleon,
        2.3).
    """
    start, target = labels
    keep = target != NOT_SCORED
    text, image = heads or model.to_logits.heads()
    head = image if segment == "image" else text
    # Only scored positions pass through the head.
    rows, labelled = hidden[:, start : start + target.shape[1]][keep], target[keep]
    if is_joint:
        head = model.to_logits
        labelled = labelled + (model.vocabulary.text_size if segment == "image" else 0)

    def losses(rows: Tensor, labelled: Tensor) -> Tensor:
        logits = head(rows).float()[:, :num_classes]
        found = F.cross_entropy(
            logits, labelled, reduction="none", label_smoothing=label_smoothing
        )
        return found + z_loss_weight * logits.logsumexp(-1).square() if z_loss_weight else found

    text_size, image_size = model.vocabulary.text_size, model.vocabulary.image_size
    own_size = image_size if segment == "image" else text_size
    num_logits = text_size + image_size if is_joint else own_size
    at_once = max(LOGITS_AT_ONCE // num_logits, 1)
    if len(rows) <= at_once:
        return losses(rows, labelled)
    parts = zip(torch.split(rows, at_once), torch.split(labelled, at_once), strict=True)
    # Logits are computed again in the backward pass, so those of one part are held and no more.
    return torch.cat(
        [
            checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    )
