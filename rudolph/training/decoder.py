"""Training of the masked decoder."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rudolph.data.examples import TokenBatch
from rudolph.models.layers.native_types import sum_dtype
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import SEGMENTS
from rudolph.training.losses import (
    ComputedLosses,
    DecoderLossConfig,
    LabelTotals,
    LearnedWeights,
    compute_losses,
    entry_sums,
    label_rows,
    label_totals,
    reduce_losses,
    scored_labels,
    segment_parts,
    weighted_mean,
)
from rudolph.training.optim import OptimConfig
from rudolph.training.sharding import gather_weights, is_sharded, shard_decoder
from rudolph.training.steps import ManualStepModule


class DecoderTraining(ManualStepModule):
    """The training of a ``MaskedDecoder``; it logs the loss of each segment in nats per token.

    Args:
        model: the decoder.
        losses: the losses and their weights.
        optim: the optimizer settings.
        sources: names of the mixture entries.  With more than one entry, the losses of each entry
            and its fraction of all examples so far are logged too.
    """

    def __init__(
        self,
        model: MaskedDecoder,
        losses: DecoderLossConfig,
        optim: OptimConfig,
        *,
        sources: Sequence[str] = ("",),
    ) -> None:
        super().__init__(optim)
        self.model, self.losses, self.sources = model, losses, list(sources)
        self.learned = LearnedWeights() if losses.weighting == "learned" else None
        self.register_buffer("num_seen", torch.zeros(len(self.sources), dtype=torch.long))

    num_seen: Tensor
    can_shard = True

    def configure_model(self) -> None:
        """Shard a copy of the decoder over the devices if the strategy shards models."""
        if self.device_mesh is not None and not is_sharded(self.model):
            self.whole = [self.model]
            self.model = copy.deepcopy(self.model)
            shard_decoder(self.model, self.device_mesh["data_parallel"])

    def whole_network(self) -> nn.Module:
        """Return the decoder with all its weights; every device must call it."""
        if not is_sharded(self.model):
            return self.model
        weights = gather_weights(self.model)
        if self.trainer.is_global_zero:
            self.whole[0].load_state_dict(weights)
        return self.whole[0]

    def networks(self) -> list[nn.Module]:
        """Return the decoder."""
        return [self.model]

    def loss_parameters(self) -> list[nn.Parameter]:
        """Return the learned loss weights, if there are any."""
        return [] if self.learned is None else list(self.learned.parameters())

    def count_labels(self, batch: TokenBatch) -> Tensor:
        """Return the label totals ``(K, 7)`` of a micro-batch with K mixture entries."""
        labels = scored_labels(self.model, batch.tokens, self.losses, scored=batch.scored)
        rows = {name: label_rows(targets) for name, (_, targets) in labels.items()}
        totals = label_totals(
            rows, weights=batch.weights, sources=batch.sources, num_sources=len(self.sources)
        )
        return torch.cat([totals.counts, totals.weights, totals.examples[:, None]], dim=1)

    def accumulate(self, batch: TokenBatch, step: int, totals: Tensor) -> Tensor:
        """Add the gradients of a micro-batch; return the sums ``(K, 4)`` of its losses.

        The first three columns are those of ``entry_sums``.  The last column has the micro-batch's
        part of the loss in its first row, and zeros below.
        """
        losses = compute_losses(
            self.model, batch.tokens, self.losses, scored=batch.scored, inputs=batch.inputs
        )
        loss = self._loss_part(losses, batch, _unpack(totals))
        self.add_gradients(loss)
        sums = entry_sums(losses, batch.sources, len(self.sources)).detach()
        column = torch.zeros_like(sums[:, :1])
        column[0] = loss.detach()
        return torch.cat([sums, column], dim=1)

    def _loss_part(
        self, losses: Mapping[str, ComputedLosses], batch: TokenBatch, totals: LabelTotals
    ) -> Tensor:
        """Return a micro-batch's part of the global batch's loss, a scalar."""
        if self.learned is not None:
            parts = segment_parts(losses, totals)
            fraction = len(batch.examples) / float(totals.examples.sum())
            return self.learned(parts, scored=totals.scored, fraction=fraction)
        if not losses and totals.scored:
            return torch.zeros((), device=self.device)
        return reduce_losses(
            losses, self.losses, weights=batch.weights, sources=batch.sources, totals=totals
        )

    def step_losses(self, sums: Tensor, step: int, totals: Tensor) -> dict[str, Tensor]:
        """Return the loss, and the mean losses of segments and mixture entries with labels."""
        counts = _unpack(totals).counts
        return {
            **{f"loss/{name}": value for name, value in _means(sums[:, :3], counts).items()},
            "loss": sums[0, 3],
            **self._entry_losses(sums[:, :3], counts),
        }

    def start_step(self, batches: Sequence[TokenBatch], step: int) -> None:
        """Log the learned weights of this step."""
        if self.learned is not None:
            weights = self.learned.weights
            self.log_dict({f"train/weight/{name}": weight for name, weight in weights.items()})

    def finish_step(self, step: int, totals: Tensor) -> None:
        """Count the examples, and log the fraction of each mixture entry so far."""
        self.num_seen += _unpack(totals).examples.to(self.num_seen)
        if len(self.sources) > 1:
            fractions = zip(self.sources, self.num_seen / self.num_seen.sum(), strict=True)
            self.log_dict({f"train/fraction/{name}": fraction for name, fraction in fractions})

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of losses and the counts of labels."""
        # For each mixture entry and segment: the loss summed over labels, and the number of
        # labels.
        size = 2, len(self.sources), len(SEGMENTS)
        self.totals = torch.zeros(size, dtype=sum_dtype(self.device), device=self.device)

    def validation_step(self, batch: TokenBatch, batch_index: int) -> None:
        """Add the losses and label counts of a validation batch."""
        losses = compute_losses(
            self.model, batch.tokens, self.losses.for_validation, scored=batch.scored
        )
        counts = _unpack(self.count_labels(batch)).counts
        self.totals += torch.stack([entry_sums(losses, batch.sources, len(counts)), counts])

    def on_validation_epoch_end(self) -> None:
        """Log validation losses over all devices, per segment and per mixture entry."""
        sums, counts = self.sum_over_devices(self.totals)
        means = _means(sums, counts)
        # The values are equal on every device; ``sync_dist`` only prevents a Lightning warning.
        self.log_dict({f"val/loss/{name}": value for name, value in means.items()}, sync_dist=True)
        weights = (
            self.losses.weights if self.losses.reduction == "batch" else dict.fromkeys(means, 1)
        )
        self.log("val/loss", weighted_mean(means, weights), sync_dist=True)
        entries = self._entry_losses(sums, counts)
        self.log_dict({f"val/{name}": value for name, value in entries.items()}, sync_dist=True)

    def _entry_losses(self, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Return mean losses per mixture entry and segment, if there are several entries.

        Args:
            sums: ``(K, 3)``, the summed losses of each entry and segment.
            counts: ``(K, 3)``, the numbers of labels.
        """
        if len(self.sources) == 1:
            return {}
        return {
            f"loss/{source}/{segment}": sums[row, column] / counts[row, column]
            for row, source in enumerate(self.sources)
            for column, segment in enumerate(SEGMENTS)
            if counts[row, column] > 0
        }


def _unpack(totals: Tensor) -> LabelTotals:
    """Unpack the label totals from the columns that ``DecoderTraining.count_labels`` returns."""
    return LabelTotals(totals[:, :3], totals[:, 3:6], totals[:, 6])


def _means(sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Compute the mean loss of each segment with labels from sums and counts, both ``(K, 3)``."""
    segments = zip(SEGMENTS, sums.sum(0), counts.sum(0), strict=True)
    return {name: total / count for name, total, count in segments if count > 0}
