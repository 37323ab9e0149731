"""What a CLIP learns from: its losses, their bounds, and which tower moves.

To add a loss, write its function and name it in ``CLIP_LOSSES``.

Source: Radford 2021 (arXiv:2103.00020); open_clip for the bounds of the scale; Zhai 2023, SigLIP
(arXiv:2303.15343); Zhai 2021, LiT (arXiv:2111.07991).

Shapes: B pairs of a batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FROZEN = ("none", "image", "text")
LARGEST_SCALE = 100.0


def softmax_loss(logits: Tensor, is_match: Tensor) -> Tensor:
    """The mean of the cross-entropies of both directions, a scalar in nats.

    Row i asks which caption belongs to image i, column i which image to caption i.  Another
    pair with the same caption or the same image is no answer and no mistake: its place is left
    out of both sums.

    Args:
        logits: ``(B, B)``, of images and captions.
        is_match: ``(B, B)`` bool, true where the pair of the column has the caption or the
            image of the row.
    """
    own = torch.arange(len(logits), device=logits.device)
    is_other = is_match & (own[:, None] != own)
    logits = logits.masked_fill(is_other, -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def sigmoid_loss(logits: Tensor, is_match: Tensor) -> Tensor:
    """The binary cross-entropies of all combinations, summed, for one image: a scalar in nats.

    Args:
        logits: ``(B, B)``, of images and captions.
        is_match: ``(B, B)`` bool, true where the pair of the column has the caption or the
            image of the row.
    """
    signed = torch.where(is_match, logits, -logits)
    return -F.logsigmoid(signed).sum() / len(logits)


CLIP_LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


@dataclass(frozen=True)
class CLIPLossConfig:
    """What is learned, and of which tower.

    ``kind: softmax`` is CLIP's loss and keeps the scale of its cosines in [1, 100]; ``sigmoid`` is
    SigLIP's and needs a model with ``has_logit_bias``.  ``initial_scale`` and ``initial_bias`` are
    those of the logits before the first step (null: the model's own, 14.3 or with a bias 10 and
    -10 when it is new).  ``frozen`` locks the ``image`` or the ``text`` tower whole.
    """

    kind: str = "softmax"
    initial_scale: float | None = None
    initial_bias: float | None = None
    frozen: str = "none"

    def __post_init__(self) -> None:
        if self.kind not in CLIP_LOSSES:
            raise ValueError(f"kind must be one of {', '.join(CLIP_LOSSES)}, got {self.kind!r}")
        if self.initial_scale is not None and not 0 < self.initial_scale < math.inf:
            raise ValueError(f"initial_scale must be above 0 or null, got {self.initial_scale}")
        if self.kind == "softmax" and not 1 <= (self.initial_scale or 1) <= LARGEST_SCALE:
            raise ValueError(
                f"initial_scale must be 1 to {LARGEST_SCALE:g} for the softmax loss, "
                f"got {self.initial_scale}"
            )
        if self.kind == "softmax" and self.initial_bias is not None:
            raise ValueError(
                f"initial_bias must be null for the softmax loss, got {self.initial_bias}"
            )
        if self.frozen not in FROZEN:
            raise ValueError(f"frozen must be one of {', '.join(FROZEN)}, got {self.frozen!r}")


def require_bias(losses: CLIPLossConfig, *, has_bias: bool) -> None:
    """Raise ``ValueError`` for a model whose bias the loss does not learn, or that lacks one."""
    needs_bias = losses.kind == "sigmoid"
    if has_bias != needs_bias:
        raise ValueError(
            f"has_logit_bias must be {str(needs_bias).lower()} for the {losses.kind} loss, "
            f"got {str(has_bias).lower()}"
        )
