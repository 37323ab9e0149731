"""A decoding step compiled by torch: what a layer does between its products is one loop of C++.

Beside the reading of the weights, the many small operations of a token take a third of its time
when they are called one by one.  The layer is the one of ``decoder``; it is compiled for single
positions that see others in steady shapes, and all layers share a compilation.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rudolph.models.attention import Look
from rudolph.models.decoder import Layer, MaskedDecoder
from rudolph.models.steady import SteadyLook


@cache
def compiled(function: Any) -> Any:
    """A function compiled for the shapes that it gets."""
    # Loops over one position are too short to be shared among threads.
    return torch.compile(function, dynamic=False, options={"cpp.min_chunk_size": 4096})


class CompiledLayer(nn.Module):
    """A layer whose single steps are compiled."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, look: Look) -> Tensor:
        is_step = isinstance(look, SteadyLook)
        forward = compiled(Layer.forward) if is_step else Layer.forward
        out: Tensor = forward(self.layer, x, look)
        return out


def compile_layers(model: MaskedDecoder) -> None:
    """Let a decoder that only decodes from now on compile its step.

    Raises:
        ValueError: where torch cannot compile.
    """
    check_compiler()
    for name, layer in model.layers.named_children():
        assert isinstance(layer, Layer)
        model.layers.register_module(name, CompiledLayer(layer))
    model.has_steady_steps = True


@cache
def check_compiler() -> None:
    """Compile something small.

    Raises:
        ValueError: where torch cannot compile.
    """
    try:
        compiled(torch.exp)(torch.ones(3))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compiling needs a C++ compiler that torch finds: {reason}") from error
