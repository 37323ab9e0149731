"""Losses of CLIP, the bounds of its logit scale, and the choice of a frozen tower (encoder).

To add a loss, write its function and name it in ``CLIP_LOSSES``.

Source: Radford 2021 (arXiv:2103.00020), with open_clip for the bounds of the scale; SigLIP (Zhai
2023, arXiv:2303.15343) and LiT (Zhai 2021, arXiv:2111.07991).

Shapes: B pairs per batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.files.constraints import Positive, check

MAX_LOGIT_SCALE = 100.0


def softmax_loss(logits: Tensor, is_match: Tensor) -> Tensor:
    """Compute the scalar mean cross-entropy of both retrieval directions, in nats.

    Row i classifies the caption of image i; column i classifies the image of caption i.  Another
    pair may have the same caption or the same image.  Such a pair is neither right nor wrong, so
    its entry is left out of both sums.

    Args:
        logits: ``(B, B)``, images by captions.
        is_match: ``(B, B)`` bool, true if the column's pair has the same caption or the same image
            as the row's pair.
    """
    targets = torch.arange(len(logits), device=logits.device)
    is_other = is_match & (targets[:, None] != targets)
    logits = logits.masked_fill(is_other, -torch.inf)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2


def sigmoid_loss(logits: Tensor, is_match: Tensor) -> Tensor:
    """Compute the scalar binary cross-entropy of every image with every caption, in nats.

    The sum over all B * B combinations is divided by B.

    Args:
        logits: ``(B, B)``, images by captions.
        is_match: ``(B, B)`` bool, true if the column's pair has the same caption or the same image
            as the row's pair.
    """
    signed = torch.where(is_match, logits, -logits)
    return -F.logsigmoid(signed).sum() / len(logits)


CLIP_LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


@dataclass(frozen=True)
class CLIPLossConfig:
    """The loss of CLIP, the initial scale and bias of its logits, and the frozen tower.

    Attributes:
        kind: ``softmax`` is the loss of CLIP and keeps the logit scale in [1, 100]; ``sigmoid`` is
            the loss of SigLIP and needs a model with ``has_logit_bias``.
        initial_scale: logit scale before the first step; null keeps the model's own scale.  A new
            model has 14.3, or 10 with a logit bias.
        initial_bias: logit bias before the first step; null keeps the model's own bias, which is
            -10 in a new model.
        frozen: encoder (tower) that is not updated.

    Raises:
        ValueError: if a setting is out of range or does not fit the loss.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    initial_scale: Positive | None = None
    initial_bias: float | None = None
    frozen: Literal["none", "image", "text"] = "none"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a setting is out of range or does not fit the loss."""
        check(self)
        if self.kind == "softmax" and not 1 <= (self.initial_scale or 1) <= MAX_LOGIT_SCALE:
            raise ValueError(
                f"initial_scale must be 1 to {MAX_LOGIT_SCALE:g} for the softmax loss, "
                f"got {self.initial_scale}"
            )
        if self.kind == "softmax" and self.initial_bias is not None:
            raise ValueError(
                f"initial_bias must be null for the softmax loss, got {self.initial_bias}"
            )


def require_bias(losses: CLIPLossConfig, *, has_bias: bool) -> None:
    """Raise ``ValueError`` unless the model has a logit bias exactly when the loss trains one."""
    needs_bias = losses.kind == "sigmoid"
    if has_bias != needs_bias:
        raise ValueError(
            f"has_logit_bias must be {str(needs_bias).lower()} for the {losses.kind} loss, "
            f"got {str(has_bias).lower()}"
        )
