"""The optimizer step that all training modules share: backward, clip, step, schedule.

Optimization is manual.  A discriminator needs two networks to step on one batch, and Muon trains
the matrices of a network while AdamW trains the rest.
"""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from rudolph.training.optim import OptimConfig, clip_gradients, optimizers_of, warmup_cosine


class ManualStepModule(pl.LightningModule):
    """A Lightning module whose networks step every ``num_accumulated`` micro-batches."""

    def __init__(self, optim: OptimConfig, *, num_accumulated: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optim, self.num_accumulated = optim, num_accumulated
        self.num_steps_done = 0

    def networks(self) -> list[nn.Module]:
        """Return the trained networks; ``move`` indexes them, and the first one is kept."""
        raise NotImplementedError

    def beside(self) -> list[nn.Parameter]:
        """Return the parameters of the loss, which step with the first network without decay."""
        return []

    def step_of(self, batch_index: int) -> int:
        """Return the optimizer step that a micro-batch belongs to, counted from 0."""
        return batch_index // self.num_accumulated

    def move(self, loss: Tensor, batch_index: int, *, network: int = 0) -> None:
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
        own = [at for at, owner in enumerate(self.owners) if owner == network]
        self.manual_backward(loss / self.num_accumulated)
        if (batch_index + 1) % self.num_accumulated == 0:
            # Under 16-mixed the gradients stay scaled until Lightning's step unscales them.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            clip_gradients([optimizers[at] for at in own], self.optim, scale=scale)
            for at in own:
                optimizers[at].step()
                optimizers[at].zero_grad()
                schedulers[at].step()
            self.num_steps_done = self.step_of(batch_index) + 1

    def configure_optimizers(self) -> Any:
        """Create the optimizers of all networks, and one schedule per optimizer."""
        found = [optimizers_of(network, self.optim) for network in self.networks()]
        if self.beside():
            found[0][-1].add_param_group({"params": self.beside(), "weight_decay": 0.0})
        self.owners = [at for at, group in enumerate(found) for _ in group]
        optimizers = [optimizer for group in found for optimizer in group]
        return optimizers, [warmup_cosine(optimizer, self.optim) for optimizer in optimizers]
