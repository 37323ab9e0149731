"""The optimizer step that all training modules share: backward, clip, step, schedule.

A Lightning batch is one device's part of a global batch, as a list of micro-batches.  Losses are
divided by the counts of the whole global batch, so all gradients add up to those of one large
batch.  The number of devices and the size of a micro-batch therefore affect only rounding.  Random
numbers such as dropout are drawn for each micro-batch.

Optimization is manual, because one batch may need several optimizers.  A discriminator has its own
optimizer, and AdamW trains the parameters that Muon does not train.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor, nn

from rudolph.data.seeds import mixed_seed
from rudolph.models.layers.native_types import sum_dtype
from rudolph.training.callbacks import require_finite
from rudolph.training.optim import OptimConfig, build_optimizers, clip_gradients, warmup_cosine
from rudolph.training.sharding import is_sharded


class ManualStepModule(pl.LightningModule):
    """A Lightning module that takes one optimizer step per Lightning batch.

    A subclass implements ``networks``, ``accumulate`` and ``step_losses``.

    Attributes:
        seed: seed of the random numbers of every micro-batch, such as dropout.
        can_shard: whether ``configure_model`` shards the network over devices (FSDP2).
    """

    seed = 0
    can_shard = False

    def __init__(self, optim: OptimConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optim = optim
        self.num_steps_done = 0

    def networks(self) -> list[nn.Module]:
        """Return the trained networks; the first one is saved."""
        raise NotImplementedError

    def whole_network(self) -> nn.Module:
        """Return the first network with all its weights; every device must call it."""
        return self.networks()[0]

    def loss_parameters(self) -> list[nn.Parameter]:
        """Return the loss's own parameters, which step with the first network, without decay."""
        return []

    def count_labels(self, batch: Any) -> Tensor:
        """Return a micro-batch's part of the global totals: here, its number of examples."""
        dtype = sum_dtype(self.device)
        return torch.tensor([len(batch.examples)], dtype=dtype, device=self.device)

    def accumulate(self, batch: Any, step: int, totals: Tensor) -> Tensor:
        """Add the gradients of a micro-batch with ``add_gradients``.

        Args:
            batch: the micro-batch.
            step: the optimizer step, counted from 0.
            totals: the sum of ``count_labels`` over the global batch, on the CPU.

        Returns:
            Sums for ``step_losses``, of the same shape for every micro-batch.
        """
        raise NotImplementedError

    def step_losses(self, sums: Tensor, step: int, totals: Tensor) -> dict[str, Tensor]:
        """Return the scalar losses of a global batch, keyed by name; all must be finite.

        Args:
            sums: the results of ``accumulate``, summed over the global batch, on the CPU.
            step: the optimizer step, counted from 0.
            totals: as in ``accumulate``.
        """
        raise NotImplementedError

    def start_step(self, batches: Sequence[Any], step: int) -> None:
        """Prepare a step; called before its first micro-batch."""

    def finish_step(self, step: int, totals: Tensor) -> None:
        """Complete a step; called after the optimizers, with torch seeded by the step.

        Args:
            step: the optimizer step, counted from 0.
            totals: as in ``accumulate``.
        """

    def training_step(self, batches: Sequence[Any], step: int) -> None:
        """Accumulate the gradients of all micro-batches, step every network, and log.

        Raises:
            NonFiniteLossError: if a loss is not finite, before the weights change.
        """
        self._seed(step, 0)
        self.start_step(batches, step)
        counts = torch.stack([self.count_labels(batch) for batch in batches]).sum(0)
        totals = self.sum_over_devices(counts).cpu()
        position = self.global_rank * sum(len(batch.examples) for batch in batches)
        all_sums = []
        for index, batch in enumerate(batches):
            # Seed by the position in the global batch, so that no random number depends on the
            # device.
            self._seed(step, position)
            position += len(batch.examples)
            with self._synchronise_gradients(index + 1 == len(batches)):
                all_sums.append(self.accumulate(batch, step, totals))
        sums = self.sum_over_devices(torch.stack(all_sums).sum(0)).cpu()
        losses = self.step_losses(sums, step, totals)
        require_finite(losses, step=step, where=_place_of_fault(batches, all_sums))
        self._step_optimizers(step)
        self.num_steps_done = step + 1
        self._seed(step, 0)
        self.finish_step(step, totals)
        self.log_dict({f"train/{name}": value.float() for name, value in losses.items()})

    def add_gradients(self, loss: Tensor, *, network: int = 0) -> None:
        """Add the gradients of a micro-batch's part of the loss.

        The parts of all micro-batches and devices add up to the loss of the global batch.

        Args:
            loss: the part, a scalar.
            network: the network that the loss trains, an index into ``networks()``.
        """
        world_size = self.trainer.world_size
        if world_size > 1:
            # Lightning's strategies average gradients over devices.
            loss = loss * world_size
        if world_size > 1 and not is_sharded(self.networks()[network]):
            # DDP waits for a gradient of every parameter.  On a device without a right text or an
            # image, some parameters would have none.
            parameters = [*self.networks()[network].parameters(), *self.loss_parameters()]
            loss = loss + _sum_of_zeros(parameters)
        if loss.requires_grad:
            self.manual_backward(loss)

    def sum_over_devices(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all devices."""
        strategy: Any = self.trainer.strategy
        return strategy.reduce(values, reduce_op="sum")

    def _seed(self, step: int, position: int) -> None:
        torch.manual_seed(mixed_seed(self.seed, step, position))

    def _synchronise_gradients(self, is_last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between devices only in the last micro-batch's backward passes."""
        strategy = self.trainer.strategy
        if is_last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return strategy.block_backward_sync()

    def _step_optimizers(self, step: int) -> None:
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        if not isinstance(optimizers, list):
            optimizers, schedulers = [optimizers], [schedulers]
        # Under 16-mixed the gradients stay scaled until Lightning's step unscales them.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        with one_scale(scaler):
            for network in range(len(self.networks())):
                if not self.trains(network, step):
                    continue
                owners = enumerate(self.network_of_optimizer)
                indices = [index for index, owner in owners if owner == network]
                clip_gradients([optimizers[index] for index in indices], self.optim, scale=scale)
                for index in indices:
                    optimizers[index].step()
                    optimizers[index].zero_grad()
                    schedulers[index].step()

    def trains(self, network: int, step: int) -> bool:
        """Return whether a network, an index into ``networks()``, takes this step."""
        return True

    def configure_optimizers(self) -> Any:
        """Create the optimizers of all networks, and one schedule per optimizer."""
        by_network = [build_optimizers(network, self.optim) for network in self.networks()]
        if self.loss_parameters():
            by_network[0][-1].add_param_group(
                {"params": self.loss_parameters(), "weight_decay": 0.0}
            )
        self.network_of_optimizer = [
            network for network, group in enumerate(by_network) for _ in group
        ]
        optimizers = [optimizer for group in by_network for optimizer in group]
        return optimizers, [warmup_cosine(optimizer, self.optim) for optimizer in optimizers]


@contextmanager
def one_scale(scaler: Any) -> Iterator[None]:
    """Keep the gradient scale of ``16-mixed`` until all optimizers of a step are done.

    Lightning updates the scale after every optimizer, although the gradients of the next optimizer
    still have the old scale.

    Args:
        scaler: torch's ``GradScaler``; None without one.
    """
    if scaler is None:
        yield
        return
    scaler.update = lambda *arguments: None
    try:
        yield
    finally:
        del scaler.update
    scaler.update()


def _sum_of_zeros(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return a zero that gives every trained parameter a gradient of zero."""
    return torch.stack([0 * each.sum() for each in parameters if each.requires_grad]).sum()


def _place_of_fault(batches: Sequence[Any], all_sums: Sequence[Tensor]) -> str:
    """Describe the examples of the first micro-batch whose sums are not finite."""
    for batch, sums in zip(batches, all_sums, strict=True):
        if not torch.isfinite(sums).all():
            return f"examples {batch.examples.tolist()}"
    return "examples of another device"
