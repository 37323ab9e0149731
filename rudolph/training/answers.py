"""Training of a classifier of answers: cross-entropy over its classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.data.answer_classes import QuestionBatch
from rudolph.models.late_fusion.classifier import AnswerClassifier
from rudolph.models.layers.native_types import sum_dtype
from rudolph.sequence.conversation import IGNORE
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule


class AnswerTraining(ManualStepModule):
    """The training of an ``AnswerClassifier``; logs the loss in nats and the accuracy.

    An answer that is no class is not scored by the loss and counts as wrong in the accuracy.
    """

    def __init__(self, model: AnswerClassifier, optim: OptimConfig) -> None:
        super().__init__(optim)
        self.model = model

    def networks(self) -> list[nn.Module]:
        """Return the classifier."""
        return [self.model]

    def count_labels(self, batch: QuestionBatch) -> Tensor:
        """Return the number of scored answers of a micro-batch, ``(1,)``."""
        return batch.labels.ne(IGNORE).sum().to(sum_dtype(self.device)).view(1)

    def logits(self, batch: QuestionBatch) -> Tensor:
        """Return the logits of a batch, ``(B, K)`` float32."""
        return self.model(batch.pixel_values, batch.input_ids, batch.present).float()

    def accumulate(self, batch: QuestionBatch, step: int, totals: Tensor) -> Tensor:
        """Add a micro-batch to the gradients; return the sum of its losses, ``(1,)``."""
        total = summed_loss(self.logits(batch), batch.labels)
        # A batch without any scored answer has a loss of 0.
        self.add_gradients(total / max(float(totals), 1.0))
        return total.detach().to(sum_dtype(self.device)).view(1)

    def step_losses(self, sums: Tensor, step: int, totals: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of the scored answers."""
        return {"loss": sums[0] / totals[0].clamp(min=1)}

    def on_validation_epoch_start(self) -> None:
        """Reset the sum of losses and the counts of scored, right and all answers."""
        self.totals = torch.zeros(4, dtype=sum_dtype(self.device), device=self.device)

    def validation_step(self, batch: QuestionBatch, batch_index: int) -> None:
        """Add the losses and counts of a validation batch."""
        logits, labels = self.logits(batch), batch.labels
        sums = [
            summed_loss(logits, labels),
            labels.ne(IGNORE).sum(),
            logits.argmax(1).eq(labels).sum(),
            torch.tensor(len(labels), device=self.device),
        ]
        self.totals += torch.stack([value.to(self.totals.dtype) for value in sums])

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss and the accuracy over all devices."""
        loss, num_scored, num_right, number = self.sum_over_devices(self.totals)
        metrics = {"val/loss": loss / num_scored.clamp(min=1), "val/accuracy": num_right / number}
        # The values are equal on every device; ``sync_dist`` only prevents a Lightning warning.
        self.log_dict(metrics, sync_dist=True)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats of logits ``(B, K)``, without ``IGNORE`` labels."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
