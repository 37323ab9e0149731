"""What every trained module does with a loss: gradient, clip, step, schedule.

Optimization is manual: an adversary needs two networks to step on one batch, and Muon moves the
matrices of a network while AdamW moves the rest.
"""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from rudolph.training.optim import OptimConfig, clip_gradients, optimizers_of, warmup_cosine


class ManualStepModule(pl.LightningModule):
    """A Lightning module whose networks step every ``num_accumulated`` batches."""

    def __init__(self, optim: OptimConfig, *, num_accumulated: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optim, self.num_accumulated = optim, num_accumulated
        self.num_steps_done = 0

    def networks(self) -> list[nn.Module]:
        """The networks that are trained, in the order of ``move``'s index; the first is kept."""
        raise NotImplementedError

    def beside(self) -> list[nn.Parameter]:
        """Parameters of the loss itself, which move with the first network and do not decay."""
        return []

    def step_of(self, batch_index: int) -> int:
        return batch_index // self.num_accumulated

    def move(self, loss: Tensor, batch_index: int, *, network: int = 0) -> None:
        """Add a loss to the gradient of one network; at the end of a global batch, step it.

        Parameters of another network that takes part in the loss must not require a gradient.
        """
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        if not isinstance(optimizers, list):
            optimizers, schedulers = [optimizers], [schedulers]
        own = [at for at, owner in enumerate(self.owners) if owner == network]
        self.manual_backward(loss / self.num_accumulated)
        if (batch_index + 1) % self.num_accumulated == 0:
            # Gradients of 16-mixed are scaled until Lightning's step divides them.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            clip_gradients([optimizers[at] for at in own], self.optim, scale=scale)
            for at in own:
                optimizers[at].step()
                optimizers[at].zero_grad()
                schedulers[at].step()
            self.num_steps_done = self.step_of(batch_index) + 1

    def configure_optimizers(self) -> Any:
        found = [optimizers_of(network, self.optim) for network in self.networks()]
        if self.beside():
            found[0][-1].add_param_group({"params": self.beside(), "weight_decay": 0.0})
        self.owners = [at for at, group in enumerate(found) for _ in group]
        optimizers = [optimizer for group in found for optimizer in group]
        return optimizers, [warmup_cosine(optimizer, self.optim) for optimizer in optimizers]
