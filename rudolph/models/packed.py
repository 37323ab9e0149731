"""Linear layers in the layout that this processor reads fastest: for inference, not for training.

A token costs one reading of all weights, so what counts at few rows is bytes and how they lie.
Activations stay float32; the rest of the model is as it was.

    half   16-bit weights: float16 in fbgemm's layout for up to ``FEW_ROWS`` rows, which reads at
           the speed of memory; bfloat16 in oneDNN's for more, which multiplies fastest
    int8   8-bit weights, one scale an output; each row of activations is rounded to 8 bits too

The kernels are operators of torch that it does not document, so each is tried on a small product
before it is used; where one does not work the next one is, and at last the layer as it was.

To add a layout, write its two functions and name it in ``LAYOUTS``.

Shapes: B rows, I inputs, O outputs.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.models.decoder import Head, Layer, MaskedDecoder, SegmentHead
from rudolph.models.int8 import Int8Linear

FEW_ROWS = 4
# Up to so many rows of eight bits are multiplied one after the other; unpacking the weights for
# one wide product takes longer.
ROWS_ONE_BY_ONE = 256
# fbgemm rounds to no finer steps than this.
LEAST_SCALE = 6.1e-5
# The largest relative error that a layout may have on the product it is tried on.
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}


class WeightLayout(NamedTuple):
    """``pack(weight (O, I), bias (O,))`` once, ``multiply(packed, x (..., I))`` often."""

    pack: Callable[[Tensor, Tensor], Any]
    multiply: Callable[[Any, Tensor], Tensor]


def _pack_float16(weight: Tensor, bias: Tensor) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), bias.float())


def _multiply_float16(packed: Any, x: Tensor) -> Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _pointwise(x: Tensor, *rest: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, *rest)


def _pack_bfloat16(weight: Tensor, bias: Tensor) -> Any:
    low = weight.bfloat16()
    return torch.ops.mkldnn._reorder_linear_weight(low, FEW_ROWS + 1), bias.bfloat16()


def _multiply_bfloat16(packed: Any, x: Tensor) -> Tensor:
    weight, bias = packed
    return _pointwise(x.bfloat16(), weight, bias, "none", [], "").float()


def _pack_int8(weight: Tensor, bias: Tensor) -> Any:
    wide = weight.float()
    scales = wide.abs().amax(1).clamp(min=1e-12).double() / 127
    with warnings.catch_warnings():
        # Quantized tensors are to leave torch some day; then the trial fails and half is used.
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(wide), dtype=torch.long)
        rounded = torch.quantize_per_channel(wide, scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(rounded, bias.float())


def _multiply_int8(packed: Any, x: Tensor) -> Tensor:
    if x.numel() == x.shape[-1]:
        return torch.ops.quantized.linear_dynamic(x, packed)
    # The kernel takes one scale for all rows; a sample's tokens must not depend on its neighbours.
    if x.numel() <= ROWS_ONE_BY_ONE * x.shape[-1]:
        rows = torch.split(x.flatten(0, -2), 1)
        found = torch.cat([torch.ops.quantized.linear_dynamic(row, packed) for row in rows])
        return found.view(*x.shape[:-1], -1)
    weight, bias = torch.ops.quantized.linear_unpack(packed)
    return F.linear(rounded_rows(x), weight.dequantize(), bias)


def rounded_rows(x: Tensor) -> Tensor:
    """Each row of ``(..., I)`` rounded to 256 levels from its least to its largest number or 0.

    Source: fbgemm, ``ChooseQuantizationParams``, so that many rows are rounded as one row is.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale.clamp(min=1e-30)).round()
    scale = scale.clamp(min=LEAST_SCALE)
    return ((x * scale.reciprocal()).round() + zero).clamp(0, 255).sub(zero).mul(scale)


LAYOUTS = {
    "float16": WeightLayout(_pack_float16, _multiply_float16),
    "bfloat16": WeightLayout(_pack_bfloat16, _multiply_bfloat16),
    "int8": WeightLayout(_pack_int8, _multiply_int8),
}
WEIGHTS = ("half", "int8")


@cache
def works(layout: str) -> bool:
    """Whether this machine and this torch multiply right in a layout."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((48, 64), 48, (3, 64)))
    try:
        packed = LAYOUTS[layout].pack(weight, bias)
        found = LAYOUTS[layout].multiply(packed, x)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    expected = F.linear(x, weight, bias)
    return bool((found - expected).norm() <= TOLERANCE[layout] * expected.norm())


def choose_layout(weights: str, num_rows: int) -> str | None:
    """The best layout that works, None when none does.

    Raises:
        ValueError: for other weights than ``WEIGHTS``.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    order = ["float16", "bfloat16"] if num_rows <= FEW_ROWS else ["bfloat16", "float16"]
    if weights == "int8":
        order.insert(0, "int8")
    return next((layout for layout in order if works(layout)), None)


def numbers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer, in eight bits or not."""
    assert isinstance(layer, nn.Linear | Int8Linear)
    # A kernel keeps its bias: a view of a file that was read would hold all of it in memory.
    weight, bias = layer.weight.detach(), layer.bias.detach().clone()
    return weight * layer.scale if isinstance(layer, Int8Linear) else weight, bias


class PackedLinear(nn.Module):
    """A linear layer whose weights can only be multiplied with."""

    def __init__(self, weight: Tensor, bias: Tensor, layout: str) -> None:
        super().__init__()
        self.layout = LAYOUTS[layout]
        self.packed = self.layout.pack(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layout.multiply(self.packed, x)


def pack_linear_layers(module: nn.Module, layout: str) -> None:
    """Put a ``PackedLinear`` for every linear layer below, one after the other."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Int8Linear):
            setattr(module, name, PackedLinear(*numbers(child), layout))
        else:
            pack_linear_layers(child, layout)


class PackedMLP(nn.Module):
    """Two linear layers in bfloat16 and the GELU between them, which the first one's kernel does.

    Source: oneDNN's post-operations.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.gelu = layer.config.gelu
        self.packed = [
            _pack_bfloat16(*numbers(linear)) for linear in (layer.mlp_in, layer.mlp_out)
        ]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.packed
        hidden = _pointwise(x.bfloat16(), *first, "gelu", [], self.gelu)
        return _pointwise(hidden, *second, "none", [], "").float()


class PackedHead(nn.Module):
    """The decoder's head in two parts, of which a token needs one."""

    def __init__(self, head: SegmentHead, layout: str) -> None:
        super().__init__()
        weights, biases = (torch.split(part, head.sizes) for part in numbers(head))
        self.parts = nn.ModuleList(
            PackedLinear(weight, bias, layout)
            for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self.parts], dim=-1)

    def heads(self) -> list[Head]:
        return list(self.parts)


def pack(model: MaskedDecoder, *, weights: str, num_rows: int) -> None:
    """Make a decoder on the CPU ready to decode ``num_rows`` rows at once; guidance doubles them.

    It stays as it was where no layout works, or off the CPU; its weights can be neither trained
    nor saved afterwards.  Token embeddings become float16.

    Raises:
        ValueError: for other weights than ``WEIGHTS``.
    """
    layout = choose_layout(weights, num_rows)
    if layout is None or model.final_norm.weight.device.type != "cpu":
        return
    model.requires_grad_(False).eval()
    model.register_module("to_logits", PackedHead(model.to_logits, layout))
    if layout == "bfloat16":
        for layer in model.layers:
            assert isinstance(layer, Layer)
            parts = {"mlp_in": PackedMLP(layer), "activation": nn.Identity()}
            for name, part in (parts | {"mlp_out": nn.Identity()}).items():
                layer.register_module(name, part)
    pack_linear_layers(model.layers, layout)
    model.float()
    model.text_embedding.half()
    model.image_embedding.half()
    for kept in model.parameters():
        # As in ``numbers``: a view would hold the whole file.
        kept.data = kept.data.clone()


def pack_low_precision(model: MaskedDecoder, *, num_rows: int) -> None:
    """Pack a decoder whose weights are held in fewer than 32 bits anyway; others stay exact."""
    if any(isinstance(part, Int8Linear) for part in model.layers.modules()):
        # Half would take more memory than was asked for.
        if works("int8"):
            pack(model, weights="int8", num_rows=num_rows)
    elif model.final_norm.weight.dtype != torch.float32:
        pack(model, weights="half", num_rows=num_rows)
