"""The masked decoder in training: batch, losses, log."""

from torch import nn

from rudolph.data.module import TokenBatch
from rudolph.models.decoder import MaskedDecoder
from rudolph.training.callbacks import require_finite
from rudolph.training.losses import DecoderLossConfig, segment_losses, weighted_mean
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

    def validation_step(self, batch: TokenBatch, batch_index: int) -> None:
        losses = segment_losses(self.model, batch.tokens, self.losses, scored=batch.scored)
        size = len(batch.tokens)
        values = {f"val/loss/{name}": value for name, value in losses.items()}
        values["val/loss"] = weighted_mean(losses, self.losses.weights)
        self.log_dict(values, batch_size=size)
