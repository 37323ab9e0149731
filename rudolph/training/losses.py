"""All losses of the decoder and the VQ-GAN, and their weights.

Cross-entropies are in nats per token and are means over the scored tokens.  A segment with weight
0 or without scored tokens adds no loss and no gradient.

Source: RuDOLPH, ``rudolph/model/model.py``, for the decoder; taming-transformers,
``modules/losses/vqperceptual.py``, for the VQ-GAN.

Shapes: B batch, T tokens, M labels, K mixture entries, D hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.files.constraints import Bounds, NonNegative, NonNegativeInt, check
from rudolph.models.layers.native_types import sum_dtype
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.models.rudolph.scoring import NOT_SCORED, label_losses, segment_labels
from rudolph.sequence.layout import SEGMENTS
from rudolph.sequence.tasks import TASKS
from rudolph.training.sharding import is_sharded

Reduction = Literal["batch", "task", "token"]
REDUCTIONS = get_args(Reduction)


@dataclass(frozen=True)
class DecoderLossConfig:
    """Weights of the segments' mean losses; the total is divided by the sum of the weights.

    Validation uses the segment softmax and fixed weights, without z-loss and label smoothing, so
    that configurations can be compared.

    Attributes:
        left_text_weight: weight of the left text's loss with ``reduction: batch``.
        image_weight: weight of the image's loss with ``reduction: batch``.
        right_text_weight: weight of the right text's loss with ``reduction: batch``.
        first_image_token: ``image_vocabulary`` scores image token 0 among image ids; ``legacy``
            scores it as a class of the text vocabulary, as ru-dolph does.
        left_padding: whether padding ids of the left text are also predicted, as in ru-dolph.
        label_smoothing: probability spread evenly over all ids.
        softmax: ``segment`` normalises over the ids of the segment; ``joint`` normalises over text
            and image ids together, as DALL-E does.
        z_loss_weight: weight of the z-loss (Chameleon: 1e-5).
        weighting: ``fixed`` uses the configured weights; ``learned`` learns a precision (inverse
            variance) per segment, which starts at 1 and needs ``reduction: batch`` (Kendall 2018,
            arXiv:1705.07115).
        reduction: ``batch`` takes each segment's mean over all examples that score it (ru-dolph).
            ``task`` takes the segments' means per mixture entry, weights them as the entry's task
            says, and averages the entries in proportion to their examples, as the code of Fusion
            Brain Challenge 2 does (fbc2_aij2022).  ``token`` averages over all labels, where each
            label has the weight that its task gives to its segment.
        task_weights: weights of left text, image and right text per task, which replace those in
            ``TASKS``.

    Raises:
        ValueError: if a setting is out of range.
    """

    left_text_weight: NonNegative = 1.0
    image_weight: NonNegative = 7.0
    right_text_weight: NonNegative = 1.0
    first_image_token: Literal["image_vocabulary", "legacy"] = "image_vocabulary"
    left_padding: bool = True
    label_smoothing: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    softmax: Literal["segment", "joint"] = "segment"
    z_loss_weight: NonNegative = 0.0
    weighting: Literal["fixed", "learned"] = "fixed"
    reduction: Reduction = "batch"
    task_weights: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a setting is out of range."""
        check(self)
        if self.left_text_weight + self.image_weight + self.right_text_weight == 0:
            raise ValueError("image_weight must be above 0 when both text weights are 0, got 0")
        if self.weighting == "learned" and self.reduction != "batch":
            raise ValueError(
                f"reduction must be batch where weights are learned, got {self.reduction!r}"
            )
        for task, weights in self.task_weights.items():
            if task not in TASKS:
                raise ValueError(
                    f"task_weights: expected tasks of {', '.join(TASKS)}, got {task!r}"
                )
            if min(weights) < 0 or max(weights) == 0:
                raise ValueError(
                    f"task_weights.{task}: expected at least 0, and one above 0, got {weights}"
                )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each segment, in the order of ``SEGMENTS``."""
        weights = (self.left_text_weight, self.image_weight, self.right_text_weight)
        return dict(zip(SEGMENTS, weights, strict=True))

    @property
    def for_validation(self) -> "DecoderLossConfig":
        """The config of validation: cross-entropy over a segment's own ids and no extra terms."""
        return replace(self, softmax="segment", z_loss_weight=0.0, label_smoothing=0.0)


class ComputedLosses(NamedTuple):
    """Losses ``(M,)`` of a segment's labels in nats, and each label's example ``(M,)``."""

    losses: Tensor
    rows: Tensor


class LabelTotals(NamedTuple):
    """Totals of a global batch per mixture entry, as floats.

    Attributes:
        counts: ``(K, 3)``, the numbers of labels of left text, image and right text.
        weights: ``(K, 3)``, the sums of the labels' task weights.
        examples: ``(K,)``, the numbers of examples.
    """

    counts: Tensor
    weights: Tensor
    examples: Tensor

    @property
    def scored(self) -> dict[str, float]:
        """The number of labels of each segment that has labels."""
        counts = zip(SEGMENTS, self.counts.sum(0).tolist(), strict=True)
        return {name: count for name, count in counts if count > 0}


def label_totals(
    rows: Mapping[str, Tensor], *, weights: Tensor, sources: Tensor, num_sources: int
) -> LabelTotals:
    """Count the labels of a batch.

    Args:
        rows: ``(M,)`` per segment, the example of each label.
        weights: ``(B, 3)``, the weights of each example's segments.
        sources: ``(B,)``, the mixture entry of each example, 0 to K - 1.
        num_sources: K.
    """
    dtype = sum_dtype(sources.device)
    totals = torch.zeros(2, num_sources, 3, dtype=dtype, device=sources.device)
    for name, examples in rows.items():
        column, entries = SEGMENTS.index(name), sources[examples]
        label_weights = weights[examples, column].to(dtype)
        parts = torch.stack([torch.ones_like(label_weights), label_weights])
        totals[..., column] = totals[..., column].index_add(1, entries, parts)
    examples = torch.bincount(sources, minlength=num_sources).to(dtype)
    return LabelTotals(totals[0], totals[1], examples)


def segment_losses(
    model: MaskedDecoder,
    tokens: Tensor,
    config: DecoderLossConfig,
    *,
    scored: Mapping[str, Tensor] | None = None,
    inputs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return each labelled segment's mean cross-entropy in nats; see ``compute_losses``."""
    return segment_means(compute_losses(model, tokens, config, scored=scored, inputs=inputs))


def segment_means(losses: Mapping[str, ComputedLosses]) -> dict[str, Tensor]:
    """Return the mean loss of each segment over its labels."""
    return {name: segment.losses.mean() for name, segment in losses.items()}


def compute_losses(
    model: MaskedDecoder,
    tokens: Tensor,
    config: DecoderLossConfig,
    *,
    scored: Mapping[str, Tensor] | None = None,
    inputs: Tensor | None = None,
) -> dict[str, ComputedLosses]:
    """Compute the cross-entropy of every label, grouped by segment.

    Args:
        model: the decoder.
        tokens: ``(B, T)``: the left text alone, left text with image, or the whole sequence.
        config: the losses and their weights.
        scored: for some segments, a bool mask ``(B,)`` of the examples in which the segment is
            scored.
        inputs: ``(B, T)``, the model's input if it differs from ``tokens``.

    Raises:
        ValueError: if ``tokens`` end inside a segment.
    """
    segments = scored_labels(model, tokens, config, scored=scored)
    hidden = scored_hidden(model, tokens if inputs is None else inputs, segments)
    computed, heads = {}, model.to_logits.heads()
    for name, labels in segments.items():
        values = label_losses(
            model,
            hidden,
            name,
            labels,
            heads=heads,
            label_smoothing=config.label_smoothing,
            is_joint=config.softmax == "joint",
            z_loss_weight=config.z_loss_weight,
        )
        # A sharded model needs a backward pass on every device, even on a device without labels.
        if len(values) or is_sharded(model):
            computed[name] = ComputedLosses(values, label_rows(labels[1]))
    return computed


def label_rows(labels: Tensor) -> Tensor:
    """Return the example (row) of each scored label in ``(B, M)`` labels, in row-major order."""
    return (labels != NOT_SCORED).nonzero()[:, 0]


def scored_hidden(
    model: MaskedDecoder, inputs: Tensor, segments: Mapping[str, tuple[int, Tensor]]
) -> Tensor:
    """Compute the head's input ``(B, T, D)``, which is zero in right texts without labels.

    Every mask is causal, so positions after the last label of an example change no loss.  The
    layers skip them: in a mixture of text-to-image and captioning, most examples have no right
    text.

    Args:
        model: the decoder.
        inputs: ``(B, T)``, the model's input.
        segments: the first position and the labels of each segment, as ``scored_labels`` returns
            them.
    """
    end = model.layout.right_text_start
    # Compiled layers accept one batch size.  Sharded layers must run equally often on all devices.
    is_whole = model.has_compiled_layers or is_sharded(model)
    if inputs.shape[1] <= end or is_whole:
        return model.hidden(inputs)
    has_right_text = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    if "right_text" in segments:
        has_right_text = (segments["right_text"][1] != NOT_SCORED).any(1)
    if bool(has_right_text.all()):
        return model.hidden(inputs)
    short = model.hidden(inputs[~has_right_text, :end])
    parts = [F.pad(short, (0, 0, 0, inputs.shape[1] - short.shape[1]))]
    if bool(has_right_text.any()):
        parts.append(model.hidden(inputs[has_right_text]))
    # Restore the order of the batch, since examples without a right text come first in ``parts``.
    order = has_right_text.int().argsort(stable=True).argsort()
    return torch.cat(parts)[order]


def scored_labels(
    model: MaskedDecoder,
    tokens: Tensor,
    config: DecoderLossConfig,
    *,
    scored: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[int, Tensor]]:
    """Return the labels of each segment with a weight above 0, for the scored examples.

    If tasks define the weights (``reduction`` is not ``batch``), only ``scored`` decides which
    segments count.

    Args:
        model: the decoder.
        tokens: ``(B, T)``: the left text alone, left text with image, or the whole sequence.
        config: the losses and their weights.
        scored: for some segments, a bool mask ``(B,)`` of the examples in which the segment is
            scored.

    Returns:
        For each segment, the first position that predicts the segment, and its labels ``(B, M)``.
    """
    labels = segment_labels(
        model,
        tokens,
        has_legacy_first_token=config.first_image_token == "legacy",
        score_left_padding=config.left_padding,
    )
    includes_all = config.reduction != "batch"
    selected = {
        name: segment
        for name, segment in labels.items()
        if includes_all or config.weights[name] > 0
    }
    for name, (start, target) in selected.items():
        if scored is not None and name in scored:
            selected[name] = start, target.masked_fill(~scored[name][:, None], NOT_SCORED)
    return selected


def weighted_mean(
    losses: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    scored: Iterable[str] | None = None,
) -> Tensor:
    """Return the scalar weighted mean of the scored segments' losses.

    Args:
        losses: The loss of each segment with labels.
        weights: The weight of each segment.
        scored: The segments with a label anywhere in the global batch; None if ``losses`` cover
            the whole batch.

    Raises:
        ValueError: if every scored segment has weight 0.
    """
    total = sum(weights[name] for name in (losses if scored is None else scored))
    if total == 0:
        raise ValueError("no segment of weight above 0 has a label in this batch")
    weighted = [loss * weights[name] for name, loss in losses.items()]
    return torch.stack(weighted).sum() / total


class LearnedWeights(nn.Module):
    """The sum over segments of precision times loss, plus the logarithm of the variance.

    The logarithm penalises low precisions, so no segment can win by a low weight.

    Source: Kendall 2018 (arXiv:1705.07115), equation 10.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(len(SEGMENTS)))

    def forward(
        self,
        losses: Mapping[str, Tensor],
        *,
        scored: Iterable[str] | None = None,
        fraction: float = 1.0,
    ) -> Tensor:
        """Return the loss, a scalar, from the mean loss of each scored segment.

        Args:
            losses: The means, or a micro-batch's parts of them.
            scored: The segments with a label anywhere in the global batch; None if ``losses``
                cover the whole batch.
            fraction: The micro-batch's fraction of the examples, by which log-variances are
                multiplied.
        """
        total = (self._of(losses if scored is None else scored) * fraction).sum()
        if not losses:
            return total
        precisions = (-self._of(losses)).exp()
        return total + (precisions * torch.stack(list(losses.values()))).sum()

    def _of(self, segments: Iterable[str]) -> Tensor:
        return self.log_variances[[SEGMENTS.index(name) for name in segments]]

    @property
    def weights(self) -> dict[str, float]:
        """The current relative weight of each segment; they sum to 1."""
        weights = (-self.log_variances).softmax(0).tolist()
        return dict(zip(SEGMENTS, weights, strict=True))


def segment_parts(losses: Mapping[str, ComputedLosses], totals: LabelTotals) -> dict[str, Tensor]:
    """Return a micro-batch's part of each segment's mean loss; the parts add up to the mean."""
    counts = totals.scored
    return {
        name: segment.losses.sum() / counts[name]
        for name, segment in losses.items()
        if name in counts
    }


def entry_sums(losses: Mapping[str, ComputedLosses], sources: Tensor, num_sources: int) -> Tensor:
    """Return the summed losses ``(K, 3)`` of mixture entries and segments; see ``sum_dtype``.

    Args:
        losses: the losses of each segment, see ``compute_losses``.
        sources: ``(B,)``, the mixture entry of each example, 0 to K - 1.
        num_sources: K.
    """
    zeros = torch.zeros(num_sources, dtype=sum_dtype(sources.device), device=sources.device)
    columns = dict.fromkeys(SEGMENTS, zeros)
    for name, segment in losses.items():
        losses_to_add = segment.losses.to(zeros.dtype)
        columns[name] = zeros.index_add(0, sources[segment.rows], losses_to_add)
    return torch.stack([columns[name] for name in SEGMENTS], dim=-1)


def reduce_losses(
    losses: Mapping[str, ComputedLosses],
    config: DecoderLossConfig,
    *,
    weights: Tensor,
    sources: Tensor,
    totals: LabelTotals | None = None,
) -> Tensor:
    """Reduce the losses of a batch of several tasks to a scalar, as ``config.reduction`` says.

    Args:
        losses: the losses of each segment, see ``compute_losses``.
        config: the reduction and the weights of ``batch``.
        weights: ``(B, 3)``, the weights of each example's segments.
        sources: ``(B,)``, the mixture entry of each example.
        totals: the totals of the global batch, if this is one of its micro-batches.  The losses of
            all micro-batches then add up to the loss of the global batch.
    """
    if totals is None:
        rows = {name: segment.rows for name, segment in losses.items()}
        number = int(sources.max()) + 1
        totals = label_totals(rows, weights=weights, sources=sources, num_sources=number)
    if config.reduction == "batch":
        parts = segment_parts(losses, totals)
        return weighted_mean(parts, config.weights, scored=totals.scored)
    if config.reduction == "token":
        sums = [
            (segment.losses * weights[segment.rows, SEGMENTS.index(name)]).sum()
            for name, segment in losses.items()
        ]
        return torch.stack(sums).sum() / float(totals.weights.sum())
    per_label = _task_weights_per_label(totals).to(sources.device)
    return (per_label * entry_sums(losses, sources, len(per_label))).sum().float()


def _task_weights_per_label(totals: LabelTotals) -> Tensor:
    """Return the weight of one label per mixture entry and segment, for ``reduction: task``."""
    counts = totals.counts.clamp(min=1)
    entry_weights = totals.weights / counts
    least = torch.finfo(entry_weights.dtype).tiny
    fractions = totals.examples / totals.examples.sum()
    normalised = entry_weights / entry_weights.sum(1, keepdim=True).clamp(min=least)
    return fractions[:, None] * normalised / counts


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the VQ-GAN's losses; images are in [-1, 1].

    Attributes:
        l1_weight: weight of the mean absolute error.
        l2_weight: weight of the mean squared error.
        quantizer_weight: weight of the quantizer's own loss.
        discriminator_start: first step of the discriminator; null for never.
        discriminator_weight: factor on the adaptive weight of the adversarial loss.  The adaptive
            weight is the ratio of both losses' gradients at the decoder's last layer.
        perceptual_weight: weight of LPIPS, if ``lpips_weights`` is given.
        lpips_weights: file with VGG16 and LPIPS weights; null omits the perceptual loss.

    Raises:
        ValueError: if a setting is out of range.
    """

    l1_weight: NonNegative = 1.0
    l2_weight: NonNegative = 0.0
    quantizer_weight: NonNegative = 1.0
    discriminator_start: NonNegativeInt | None = None
    discriminator_weight: NonNegative = 0.8
    perceptual_weight: NonNegative = 1.0
    lpips_weights: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a setting is out of range."""
        check(self)
        if self.l1_weight + self.l2_weight == 0:
            raise ValueError("l1_weight must be above 0 when l2_weight is 0, got 0")


def reconstruction_loss(
    decoded: Tensor, images: Tensor, config: ReconstructionLossConfig
) -> Tensor:
    """Compute the scalar weighted L1 and L2 loss between images ``(B, 3, H, W)`` in [-1, 1]."""
    difference = decoded.float() - images
    return config.l1_weight * difference.abs().mean() + config.l2_weight * difference.pow(2).mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the scalar hinge loss of the discriminator (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """Compute the ratio of the losses' gradient norms at the last layer, but at most 1e4.

    Source: VQ-GAN, equation 7.
    """
    reconstruction_norm, adversarial_norm = (
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    )
    return (reconstruction_norm / (adversarial_norm + 1e-4)).clamp(0, 1e4).detach()
