"""Training of the masked decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rudolph.data.examples import TokenBatch
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import SEGMENTS
from rudolph.training.callbacks import require_finite
from rudolph.training.losses import (
    DecoderLossConfig,
    LearnedWeights,
    compute_losses,
    entry_means,
    reduce_losses,
    segment_means,
    weighted_mean,
)
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule


class DecoderTraining(ManualStepModule):
    """The training of a ``MaskedDecoder``; logs the loss of each segment in nats per token.

    Args:
        model: the decoder.
        losses: the losses and their weights.
        optim: the optimizer settings.
        num_accumulated: micro-batches per optimizer step.
        sources: names of the mixture entries.  With more than one, the losses of each entry and
            its fraction of all examples so far are logged too.
    """

    def __init__(
        self,
        model: MaskedDecoder,
        losses: DecoderLossConfig,
        optim: OptimConfig,
        *,
        num_accumulated: int = 1,
        sources: Sequence[str] = ("",),
    ) -> None:
        super().__init__(optim, num_accumulated=num_accumulated)
        self.model, self.losses, self.sources = model, losses, list(sources)
        self.learned = LearnedWeights() if losses.weighting == "learned" else None
        self.register_buffer("num_seen", torch.zeros(len(self.sources), dtype=torch.long))

    num_seen: Tensor

    def networks(self) -> list[nn.Module]:
        """Return the decoder."""
        return [self.model]

    def loss_parameters(self) -> list[nn.Parameter]:
        """Return the learned loss weights, if there are any."""
        return [] if self.learned is None else list(self.learned.parameters())

    def training_step(self, batch: TokenBatch, batch_index: int) -> None:
        """Accumulate gradients of a micro-batch, step at the end of a global batch, and log."""
        losses = compute_losses(
            self.model, batch.tokens, self.losses, scored=batch.scored, inputs=batch.inputs
        )
        means = segment_means(losses)
        require_finite(means, step=self.step_index(batch_index), examples=batch.examples)
        if self.learned is not None:
            loss = self.learned(means)
            weights = self.learned.weights
            self.log_dict({f"train/weight/{name}": weight for name, weight in weights.items()})
        else:
            loss = reduce_losses(losses, self.losses, weights=batch.weights, sources=batch.sources)
        self.backward_and_step(loss, batch_index)
        self.log_dict({f"train/loss/{name}": value for name, value in means.items()})
        self.log("train/loss", loss)
        self.num_seen += torch.bincount(batch.sources, minlength=len(self.sources))
        if len(self.sources) > 1:
            entry_losses = entry_means(losses, batch.sources, len(self.sources))
            self.log_dict(self._entry_metrics("train", *entry_losses))
            fractions = self.num_seen / self.num_seen.sum()
            named_fractions = zip(self.sources, fractions, strict=True)
            self.log_dict(
                {f"train/fraction/{name}": fraction for name, fraction in named_fractions}
            )

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of losses and the counts of labels."""
        # Per mixture entry and segment: the loss summed over labels, and the number of labels.
        size = 2, len(self.sources), len(SEGMENTS)
        self.totals = torch.zeros(size, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: TokenBatch, batch_index: int) -> None:
        """Add the losses and label counts of a validation batch."""
        losses = compute_losses(
            self.model, batch.tokens, self.losses.for_validation, scored=batch.scored
        )
        means, counts = entry_means(losses, batch.sources, len(self.sources))
        self.totals += torch.stack([means * counts, counts])

    def on_validation_epoch_end(self) -> None:
        """Log validation losses over all devices, per segment and per mixture entry."""
        totals: Any = self.trainer.strategy.reduce(self.totals, reduce_op="sum")
        sums, counts = totals.sum(1)
        means = {
            name: total / count
            for name, total, count in zip(SEGMENTS, sums, counts, strict=True)
            if count > 0
        }
        # The values are equal on every device; ``sync_dist`` only prevents a Lightning warning.
        self.log_dict({f"val/loss/{name}": value for name, value in means.items()}, sync_dist=True)
        weights = (
            self.losses.weights if self.losses.reduction == "batch" else dict.fromkeys(means, 1)
        )
        self.log("val/loss", weighted_mean(means, weights), sync_dist=True)
        if len(self.sources) > 1:
            sums, counts = totals
            entry_losses = self._entry_metrics("val", sums / counts.clamp(min=1), counts)
            self.log_dict(entry_losses, sync_dist=True)

    def _entry_metrics(self, stage: str, means: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Return the losses of each mixture entry and segment with labels, by metric name."""
        return {
            f"{stage}/loss/{source}/{segment}": means[row, column]
            for row, source in enumerate(self.sources)
            for column, segment in enumerate(SEGMENTS)
            if counts[row, column] > 0
        }
