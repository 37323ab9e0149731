"""Low-rank adaptation (LoRA) of linear layers: train a small update, then merge it.

The effective weight is ``weight + alpha / rank * up @ down``, where ``up`` starts at zero.

Source: Hu 2021 (arXiv:2106.09685), section 4.1.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """The low-rank update of one weight ``(M, N)``.

    Args:
        weight: weight to update; it gives the shape, dtype and device.
        rank: rank of the update.
        alpha: scale of the update, divided by ``rank``.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        num_outputs, num_inputs = weight.shape
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, num_inputs))
        self.up = nn.Parameter(weight.new_zeros(num_outputs, rank))
        nn.init.normal_(self.down, std=num_inputs**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight ``(M, N)``."""
        return weight + self.scale * (self.up @ self.down)


def add_low_rank(layer: nn.Linear, *, rank: int, alpha: float) -> None:
    """Freeze a layer's weight and train a low-rank update of it instead."""
    layer.weight.requires_grad_(False)
    update = LowRank(layer.weight, rank=rank, alpha=alpha)
    parametrize.register_parametrization(layer, "weight", update)


def merge_low_rank(model: nn.Module) -> None:
    """Merge every low-rank update into its weight, leaving ordinary linear layers."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
