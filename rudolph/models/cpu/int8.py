"""Linear layers with int8 weights: half the memory of float16, otherwise the same module.

Weights are rounded per row to -127..127 with one scale per row.  They are widened again before the
product, so activations keep their precision (Dettmers 2022, arXiv:2208.07339, without its
outlier handling).

Shapes: M outputs, N inputs of a layer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Suffix that turns the name of a matrix into the name of its scales.
SCALE_SUFFIX = "#scales"


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights ``(M, N)`` and a scale ``(M, 1)`` with ``weight ~ rounded * scale``.

    Scales are float32, because those of small weights underflow in float16.
    """
    weight_float32 = weight.float()
    scale = weight_float32.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight_float32 / scale).round().to(torch.int8), scale


def pack_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with every matrix in int8 and its scales under ``SCALE_SUFFIX``.

    Tensors that are not matrices are unchanged.
    """
    packed = dict(tensors)
    for name, value in tensors.items():
        if value.ndim == 2:
            packed[name], packed[name + SCALE_SUFFIX] = to_int8(value)
    return packed


def unpack_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ``pack_int8`` with all matrices in float32; others are unchanged."""
    return {
        name: value * tensors[name + SCALE_SUFFIX] if name + SCALE_SUFFIX in tensors else value
        for name, value in tensors.items()
        if not name.endswith(SCALE_SUFFIX)
    }


class Int8Linear(nn.Module):
    """A linear layer that rounds its weight to int8 when it is loaded.

    Args:
        num_inputs: N.
        num_outputs: M.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_outputs, num_inputs, dtype=torch.int8))
        # Not saved, because loading recomputes it from the weight.
        self.register_buffer("scale", torch.ones(num_outputs, 1), persistent=False)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., M)`` for ``x`` ``(..., N)``."""
        # Scale before the product, because sums of integers up to 127 overflow float16.
        weight = self.weight.to(x.dtype).mul_(self.scale.to(x.dtype))
        return F.linear(x, weight, self.bias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict:
            state_dict[key], self.scale = to_int8(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def use_int8(model: nn.Module) -> None:
    """Replace every linear layer in ``model`` by an ``Int8Linear``; load weights afterwards."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            packed = Int8Linear(child.in_features, child.out_features)
            # The inputs have the dtype of the replaced layer, so the bias must have it too.
            packed.bias = nn.Parameter(torch.zeros_like(child.bias))
            setattr(model, name, packed)
        else:
            use_int8(child)
