"""The optimizer step that all training modules share: backward, clip, step, schedule.

Optimization is manual.  A discriminator needs two networks to step on one batch, and Muon trains
the matrices of a network while AdamW trains the rest.
"""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from rudolph.training.optim import OptimConfig, build_optimizers, clip_gradients, warmup_cosine


class ManualStepModule(pl.LightningModule):
    """A Lightning module whose networks step every ``num_accumulated`` micro-batches."""

    def __init__(self, optim: OptimConfig, *, num_accumulated: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optim, self.num_accumulated = optim, num_accumulated
        self.num_steps_done = 0

    def networks(self) -> list[nn.Module]:
        """Return the trained networks; the first one is saved."""
        raise NotImplementedError

    def loss_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the loss, which step with the first network without decay."""
        return []

    def step_index(self, batch_index: int) -> int:
        """Return the optimizer step that a micro-batch belongs to, counted from 0."""
        return batch_index // self.num_accumulated

    def backward_and_step(self, loss: Tensor, batch_index: int, *, network: int = 0) -> None:
        """Add a loss to the gradients of one network, and step it at the end of a global batch.

        Other networks that take part in the loss must have ``requires_grad`` off.

        Args:
            loss: the scalar loss of the micro-batch.
            batch_index: the micro-batch, counted from 0.
            network: an index into ``networks()``.
        """
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        if not isinstance(optimizers, list):
            optimizers, schedulers = [optimizers], [schedulers]
        indices = [
            index for index, owner in enumerate(self.network_of_optimizer) if owner == network
        ]
        self.manual_backward(loss / self.num_accumulated)
        if (batch_index + 1) % self.num_accumulated == 0:
            # Under 16-mixed the gradients stay scaled until Lightning's step unscales them.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            clip_gradients([optimizers[index] for index in indices], self.optim, scale=scale)
            for index in indices:
                optimizers[index].step()
                optimizers[index].zero_grad()
                schedulers[index].step()
            self.num_steps_done = self.step_index(batch_index) + 1

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
