"""Linear layers in eight bits: half the memory of float16, the same module otherwise.

Weights are rounded row by row to -127..127 with one scale a row and widened again before the
product, so activations keep their precision (Dettmers 2022, arXiv:2208.07339, without its
outliers).

Shapes: M outputs, N inputs of a layer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# After the name of a matrix, that of its scales.
SCALES = "#scales"


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded weight ``(M, N)`` int8 and scale ``(M, 1)`` with ``weight ~ rounded * scale``.

    Scales stay float32: those of small weights are below what float16 can hold.
    """
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (wide / scale).round().to(torch.int8), scale


def pack_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a small file holds them: matrices in eight bits, each with its scales beside it.

    What is no matrix stays.
    """
    packed = dict(tensors)
    for name, value in tensors.items():
        if value.ndim == 2:
            packed[name], packed[name + SCALES] = to_int8(value)
    return packed


def unpack_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``pack_int8`` packed, in float32; other tensors stay."""
    return {
        name: value * tensors[name + SCALES] if name + SCALES in tensors else value
        for name, value in tensors.items()
        if not name.endswith(SCALES)
    }


class Int8Linear(nn.Module):
    """A linear layer that rounds its weight when it is loaded."""

    weight: Tensor
    scale: Tensor

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_outputs, num_inputs, dtype=torch.int8))
        # Not in a file: it comes from the weight that is loaded.
        self.register_buffer("scale", torch.ones(num_outputs, 1), persistent=False)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        # Scaled before the product: sums of whole numbers up to 127 overflow float16.
        weight = self.weight.to(x.dtype).mul_(self.scale.to(x.dtype))
        return F.linear(x, weight, self.bias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict:
            state_dict[key], self.scale = to_int8(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def use_int8(model: nn.Module) -> None:
    """Put ``Int8Linear`` for every linear layer below ``model``, before its weights are loaded."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            packed = Int8Linear(child.in_features, child.out_features)
            # Inputs come in the dtype of the layer, and its bias is added to them.
            packed.bias = nn.Parameter(torch.zeros_like(child.bias))
            setattr(model, name, packed)
        else:
            use_int8(child)
