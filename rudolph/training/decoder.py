"""The masked decoder in training: batch, losses, log."""

from typing import Any

import torch
from torch import nn

from rudolph.data.module import TokenBatch
from rudolph.models.decoder import MaskedDecoder
from rudolph.models.scoring import NOT_SCORED
from rudolph.training.callbacks import require_finite
from rudolph.training.losses import (
    SEGMENTS,
    DecoderLossConfig,
    scored_labels,
    segment_losses,
    weighted_mean,
)
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import StepwiseModule


class DecoderTraining(StepwiseModule):
    """Trains a ``MaskedDecoder`` on token sequences; logs nats a token of each segment."""

    def __init__(
        self,
        model: MaskedDecoder,
        losses: DecoderLossConfig,
        optim: OptimConfig,
        *,
        num_accumulated: int = 1,
    ) -> None:
        super().__init__(optim, num_accumulated=num_accumulated)
        self.model, self.losses = model, losses

    def networks(self) -> list[nn.Module]:
        return [self.model]

    def training_step(self, batch: TokenBatch, batch_index: int) -> None:
        losses = segment_losses(
            self.model, batch.tokens, self.losses, scored=batch.scored, inputs=batch.inputs
        )
        require_finite(losses, step=self.step_of(batch_index), examples=batch.examples)
        loss = weighted_mean(losses, self.losses.weights)
        self.move(loss, batch_index)
        self.log_dict({f"train/loss/{name}": value for name, value in losses.items()})
        self.log("train/loss", loss)

    def on_validation_epoch_start(self) -> None:
        # For each segment, its loss summed over labels and how many they were.
        self.totals = torch.zeros(len(SEGMENTS), 2, device=self.device)

    def validation_step(self, batch: TokenBatch, batch_index: int) -> None:
        losses = segment_losses(self.model, batch.tokens, self.losses, scored=batch.scored)
        labels = scored_labels(self.model, batch.tokens, self.losses, scored=batch.scored)
        for name, loss in losses.items():
            count = (labels[name][1] != NOT_SCORED).sum()
            self.totals[SEGMENTS.index(name)] += torch.stack([loss * count, count])

    def on_validation_epoch_end(self) -> None:
        totals: Any = self.trainer.strategy.reduce(self.totals, reduce_op="sum")
        means = {
            name: total / count
            for name, (total, count) in zip(SEGMENTS, totals, strict=True)
            if count > 0
        }
        self.log_dict({f"val/loss/{name}": value for name, value in means.items()})
        self.log("val/loss", weighted_mean(means, self.losses.weights))
