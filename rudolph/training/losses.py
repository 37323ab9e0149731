"""Every loss of the project and every weight of a loss.

Cross-entropies are in nats a token, means over what is scored; a segment of weight 0, or with
nothing to score, costs nothing and gives no gradient.

Source: RuDOLPH, ``rudolph/model/model.py`` for the decoder; taming-transformers,
``modules/losses/vqperceptual.py`` for the VQ-GAN.

Shapes: B batch, T tokens, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.decoder import MaskedDecoder
from rudolph.models.scoring import NOT_SCORED, label_losses, segment_labels

FIRST_IMAGE_TOKEN = ("image_vocabulary", "legacy")
SEGMENTS = ("left_text", "image", "right_text")


@dataclass(frozen=True)
class DecoderLossConfig:
    """Weights of the segments' mean losses; the total is divided by the sum of the weights.

    ``first_image_token: legacy`` scores image token 0 as a class of the text vocabulary, as the
    reference does; by default it is scored among image ids.  ``left_padding`` says whether the
    padding ids of the left text are labels, as in the reference.
    """

    left_text_weight: float = 1.0
    image_weight: float = 7.0
    right_text_weight: float = 1.0
    first_image_token: str = "image_vocabulary"
    left_padding: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("left_text_weight", "image_weight", "right_text_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.left_text_weight + self.image_weight + self.right_text_weight == 0:
            raise ValueError("image_weight must be above 0 when both text weights are 0, got 0")
        if self.first_image_token not in FIRST_IMAGE_TOKEN:
            raise ValueError(
                f"first_image_token must be one of {', '.join(FIRST_IMAGE_TOKEN)}, "
                f"got {self.first_image_token!r}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each segment, in the order of ``SEGMENTS``."""
        weights = (self.left_text_weight, self.image_weight, self.right_text_weight)
        return dict(zip(SEGMENTS, weights, strict=True))


def segment_losses(
    model: MaskedDecoder,
    tokens: Tensor,
    config: DecoderLossConfig,
    *,
    scored: Mapping[str, Tensor] | None = None,
    inputs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Mean cross-entropy of each segment that has labels, in nats a token.

    Args:
        tokens: ``(B, T)``: left text, left text and image, or the whole sequence.
        scored: for some segments, ``(B,)`` bool: the examples whose segment is scored.
        inputs: ``(B, T)``, what the model reads where that is not ``tokens``.

    Raises:
        ValueError: when tokens end inside a segment.
    """
    hidden = model.hidden(tokens if inputs is None else inputs)
    losses, heads = {}, model.to_logits.heads()
    for name, labels in scored_labels(model, tokens, config, scored=scored).items():
        found = label_losses(
            model, hidden, name, labels, heads=heads, label_smoothing=config.label_smoothing
        )
        if len(found):
            losses[name] = found.mean()
    return losses


def scored_labels(
    model: MaskedDecoder,
    tokens: Tensor,
    config: DecoderLossConfig,
    *,
    scored: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[int, Tensor]]:
    """The labels of each segment of weight above 0, for the examples that are scored."""
    labels = segment_labels(
        model,
        tokens,
        has_legacy_first_token=config.first_image_token == "legacy",
        has_left_padding=config.left_padding,
    )
    kept = {name: found for name, found in labels.items() if config.weights[name] > 0}
    for name, (start, target) in kept.items():
        if scored is not None and name in scored:
            kept[name] = start, target.masked_fill(~scored[name][:, None], NOT_SCORED)
    return kept


def weighted_mean(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean of the segments that were scored, a scalar."""
    total = sum(weights[name] for name in losses)
    if total == 0:
        raise ValueError("no segment of weight above 0 has a label in this batch")
    weighted = [loss * weights[name] for name, loss in losses.items()]
    return torch.stack(weighted).sum() / total


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the VQ-GAN's losses; pictures are in [-1, 1].

    The adversary starts at ``adversary_start`` steps (null: never) with ``adversary_weight`` times
    the ratio of the gradients at the decoder's last layer.  ``perceptual_weights`` is a file of
    VGG16 and LPIPS weights; null leaves the perceptual loss out.
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    quantizer_weight: float = 1.0
    adversary_start: int | None = None
    adversary_weight: float = 0.8
    perceptual_weight: float = 1.0
    perceptual_weights: str | None = None

    def __post_init__(self) -> None:
        names = ("l1_weight", "l2_weight", "quantizer_weight", "adversary_weight")
        for name in (*names, "perceptual_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.l1_weight + self.l2_weight == 0:
            raise ValueError("l1_weight must be above 0 when l2_weight is 0, got 0")
        if self.adversary_start is not None and self.adversary_start < 0:
            raise ValueError(
                f"adversary_start must be at least 0 or null, got {self.adversary_start}"
            )


def reconstruction_loss(
    decoded: Tensor, images: Tensor, config: ReconstructionLossConfig
) -> Tensor:
    """Weighted L1 and L2 between pictures ``(B, 3, H, W)`` in [-1, 1], a scalar."""
    difference = decoded.float() - images
    return config.l1_weight * difference.abs().mean() + config.l2_weight * difference.pow(2).mean()


def hinge_adversary_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversary: Tensor, last_weight: Tensor) -> Tensor:
    """Ratio of both losses' gradients at the last layer, at most 1e4 (VQ-GAN, equation 7)."""
    first = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)[0].norm()
    second = torch.autograd.grad(adversary, last_weight, retain_graph=True)[0].norm()
    return (first / (second + 1e-4)).clamp(0, 1e4).detach()
