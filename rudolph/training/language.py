"""Training of language models that read documents of images and texts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rudolph.data.documents import DocumentBatch
from rudolph.generation.documents import DocumentReader, answer_labels, answer_losses
from rudolph.models.layers.native_types import sum_dtype
from rudolph.sequence.conversation import IGNORE
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule


class LanguageTraining(ManualStepModule):
    """The training of a document reader; it logs the mean loss per label, in nats.

    Args:
        model: The trained network.
        reader: Computes its logits.
        optim: The optimizer settings.
        sources: Names of the mixture entries.  With more than one entry, the validation loss of
            each entry is logged too.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: DocumentReader,
        optim: OptimConfig,
        *,
        sources: Sequence[str] = ("",),
    ) -> None:
        super().__init__(optim)
        self.model, self.reader, self.sources = model, reader, list(sources)

    def networks(self) -> list[nn.Module]:
        """Return the model."""
        return [self.model]

    def count_labels(self, batch: DocumentBatch) -> Tensor:
        """Return the number ``(1,)`` of labels of a micro-batch."""
        number = answer_labels(batch).ne(IGNORE).sum()
        return number.to(sum_dtype(self.device)).view(1)

    def accumulate(self, batch: DocumentBatch, step: int, totals: Tensor) -> Tensor:
        """Add the gradients of a micro-batch; return the sum ``(1,)`` of its losses."""
        losses, _ = answer_losses(self.reader, batch)
        total = losses.sum()
        self.add_gradients(total / float(totals))
        return total.detach().to(sum_dtype(self.device)).view(1)

    def step_losses(self, sums: Tensor, step: int, totals: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of the labels."""
        return {"loss": sums[0] / totals[0]}

    def finish_step(self, step: int, totals: Tensor) -> None:
        """Log the mean absolute values of the tanh gates."""
        self.log_dict({f"train/{name}": value for name, value in gate_sizes(self.model).items()})

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of losses and the counts of labels."""
        dtype = sum_dtype(self.device)
        self.totals = torch.zeros(2, len(self.sources), dtype=dtype, device=self.device)

    def validation_step(self, batch: DocumentBatch, batch_index: int) -> None:
        """Add the losses and label counts of a validation batch."""
        losses, rows = answer_losses(self.reader, batch)
        sources, number = batch.sources[rows], len(self.sources)
        sums = torch.bincount(sources, losses.to(self.totals.dtype), minlength=number)
        self.totals += torch.stack([sums, torch.bincount(sources, minlength=number)])

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss over all devices: the overall mean and one per entry."""
        sums, counts = self.sum_over_devices(self.totals)
        # The values are equal on every device; ``sync_dist`` only prevents a Lightning warning.
        self.log("val/loss", sums.sum() / counts.sum(), sync_dist=True)
        if len(self.sources) > 1:
            means = zip(self.sources, sums / counts.clamp(min=1), strict=True)
            self.log_dict({f"val/loss/{name}": mean for name, mean in means}, sync_dist=True)


def gate_sizes(model: nn.Module) -> dict[str, Tensor]:
    """Return the mean absolute value of each kind of tanh gate, keyed by the gate's name."""
    gates: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind.endswith("_gate"):
            gates.setdefault(kind, []).append(parameter.detach().tanh().abs().mean())
    return {name: torch.stack(values).mean() for name, values in gates.items()}
