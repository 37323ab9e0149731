"""Linear layers with weights in the memory layout that this processor reads fastest.

They serve inference only.  A decoding step reads all weights once, so with few rows the number of
bytes and their layout decide the speed.  Activations stay float32 between layers.  The weight
formats are::

    float32    oneDNN's layout, which is twice as fast as the usual one for a single row
    half       16-bit weights; for up to ``FEW_ROWS`` rows, float16 in fbgemm's layout, which is
               read at memory speed; for more rows, bfloat16 in oneDNN's layout, which is fastest
               on processors with native bfloat16 products
    int8       8-bit weights with one scale per output; each row of activations is also rounded:
               to 8 bits with VNNI, else to 7 bits, because fbgemm would saturate with 8
    plain      for compiled single-row steps: row-major weights in float32, bfloat16 (half) or,
               with AVX512, 8 bits; activations are not rounded

The kernels are undocumented torch operators, so each one is tested on a small product before use.
If the test fails, the next layout is tried; if every layout fails, the layer stays as it was.

To add a layout, write its two functions and list it in ``LAYOUTS``.

Shapes: B rows, I inputs, O outputs.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.models.cpu.int8 import Int8Linear
from rudolph.models.layers.native_types import (
    has_avx512,
    has_exact_int8_products,
    has_native_bfloat16,
)
from rudolph.models.rudolph.compiled import check_compiler, compile_function
from rudolph.models.rudolph.decoder import Head, Layer, MaskedDecoder, SegmentHead

FEW_ROWS = 4
# Compiled code multiplies up to this many rows by plain weights.
SINGLE_ROWS = 1
PLAIN_LAYOUT = {"float32": torch.float32, "half": torch.bfloat16, "int8": torch.int8}
RELATIVE_TOLERANCE = {"float32": 1e-5, "half": 2e-2, "int8": 5e-2}
# The smallest quantization scale that fbgemm uses.
MIN_SCALE = 6.1e-5


class WeightLayout(NamedTuple):
    """A weight layout: ``pack`` runs once per weight, ``multiply`` once per product.

    Attributes:
        pack: packs ``weight`` ``(O, I)`` and ``bias`` ``(O,)``.
        multiply: multiplies a packed weight by ``x`` ``(..., I)`` and adds the bias.
        tolerance: maximum relative error of the test product.
    """

    pack: Callable[[Tensor, Tensor], Any]
    multiply: Callable[[Any, Tensor], Tensor]
    tolerance: float


class Kernel:
    """Multiplication by one packed weight, callable from compiled code.

    Calling a kernel maps ``(..., I)`` to ``(..., O)``.  A compiler cannot trace the packed weight.
    Compiled code therefore passes the kernel's number to a custom operator, so one compilation
    serves all weights.

    Args:
        weight: packed weight, passed to ``multiply``.
        multiply: product of the packed weight and an input.
        num_outputs: O.
    """

    known: ClassVar[WeakValueDictionary[int, "Kernel"]] = WeakValueDictionary()
    numbers: ClassVar[Iterator[int]] = count()

    def __init__(
        self, weight: Any, multiply: Callable[[Any, Tensor], Tensor], num_outputs: int
    ) -> None:
        self.weight, self.multiply, self.num_outputs = weight, multiply, num_outputs
        number = next(self.numbers)
        self.known[number] = self
        self.number = torch.tensor(number)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product with ``x``."""
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.rudolph.multiply(x, self.number, self.num_outputs)
            return out
        return self.multiply(self.weight, x)


# A ``Library`` adds only a tenth of the call overhead of ``torch.library.custom_op``.
LIBRARY: Any = torch.library.Library("rudolph", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("multiply(Tensor x, Tensor number, int num_outputs) -> Tensor")


def _multiply(x: Tensor, number: Tensor, num_outputs: int) -> Tensor:
    kernel = Kernel.known[int(number)]
    return kernel.multiply(kernel.weight, x)


def _multiply_shape(x: Tensor, number: Tensor, num_outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs)


LIBRARY.impl("multiply", _multiply, "CPU")
torch.library.register_fake("rudolph::multiply", _multiply_shape, lib=LIBRARY)


def _onednn(weight: Tensor, bias: Tensor, activation: str = "none", kind: str = "") -> Kernel:
    """Pack a weight in oneDNN's layout, with an optional activation after the product.

    Args:
        weight: ``(O, I)``.
        bias: ``(O,)``.
        activation: name of oneDNN's post-operation.
        kind: variant of the activation, such as ``tanh`` for ``gelu``.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS + 1)

    def multiply(packed_weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, *packed_weight, activation, [], kind)
        return out

    return Kernel((packed, bias), multiply, len(weight))


def _pack_float32(weight: Tensor, bias: Tensor) -> Kernel:
    return _onednn(weight.float(), bias.float())


def _pack_bfloat16(weight: Tensor, bias: Tensor) -> Kernel:
    return _onednn(weight.bfloat16(), bias.bfloat16())


def _pack_float16(weight: Tensor, bias: Tensor) -> Kernel:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias.float())
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return Kernel(packed, lambda packed_weight, x: multiply(x, packed_weight), len(weight))


def _multiply_as_is(kernel: Kernel, x: Tensor) -> Tensor:
    return kernel(x)


def _multiply_bfloat16(kernel: Kernel, x: Tensor) -> Tensor:
    return kernel(x.bfloat16()).float()


class PlainWeight(NamedTuple):
    """A row-major weight.

    Attributes:
        weight: ``(O, I)``.
        scale: factor of each output, ``(O,)``, or None.
        bias: ``(O,)``.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor


def _pack_plain(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> PlainWeight:
    stored = torch.empty(weight.shape, dtype=dtype)
    if dtype != torch.int8:
        return PlainWeight(stored.copy_(weight), None, bias.float())
    scale = torch.empty(len(weight))
    # Convert row by row: the allocator would not return the memory of a full copy to the system.
    for index, row in enumerate(map(Tensor.float, weight)):
        scale[index] = row.abs().max().clamp(min=1e-12) / 127
        stored[index] = (row / scale[index]).round()
    return PlainWeight(stored, scale, bias.float())


def _multiply_plain(plain: PlainWeight, x: Tensor) -> Tensor:
    if x.numel() <= SINGLE_ROWS * x.shape[-1]:
        multiply = _sum_row if torch.compiler.is_compiling() else compile_function(_sum_row)
        out: Tensor = multiply(plain.weight, x)
    elif plain.weight.dtype == torch.float32:
        out = F.linear(x, plain.weight)
    elif has_native_bfloat16():
        # bfloat16 represents 8-bit integers exactly.
        out = F.linear(x.bfloat16(), plain.weight.bfloat16()).float()
    else:
        out = F.linear(x, plain.weight.float())
    return (out if plain.scale is None else out * plain.scale) + plain.bias


def _sum_row(weight: Tensor, x: Tensor) -> Tensor:
    """Return a single row's product as sums, which compile to a loop over plain weights."""
    # as_strided materialises x; otherwise x would be recomputed for every output.
    x = x.as_strided(x.shape, x.stride())
    return (x.unsqueeze(-2) * weight.float()).sum(-1)


class Int8Product(NamedTuple):
    """A packed int8 weight without its bias.

    Attributes:
        kernel: product with the packed weight.
        sums: row sums ``(O,)`` of the weight, which correct the product for zero points.
        bias: ``(O,)``.
    """

    kernel: Kernel
    sums: Tensor
    bias: Tensor


def _pack_int8(weight: Tensor, bias: Tensor) -> Int8Product:
    weight_float32 = weight.float()
    # The infinity norm avoids a copy of the weight, which would stay in the process's memory.
    row_max = torch.linalg.vector_norm(weight_float32, ord=torch.inf, dim=1)
    scales = row_max.clamp(min=1e-12).double() / 127
    with warnings.catch_warnings():
        # Once torch removes quantized tensors, as planned, the test fails and half is used.
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(weight_float32), dtype=torch.long)
        rounded = torch.quantize_per_channel(weight_float32, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(rounded, None)
        sums = (rounded.int_repr().sum(1) * scales).float()
    multiply = partial(
        torch.ops.quantized.linear_dynamic, reduce_range=max_quantization_level() < 255
    )
    kernel = Kernel(packed, lambda packed_weight, x: multiply(x, packed_weight), len(weight))
    return Int8Product(kernel, sums, bias.float())


def _multiply_int8(product: Int8Product, x: Tensor) -> Tensor:
    """Return the product with each row rounded by its own scale.

    The tokens of a sample must not depend on the other rows of its batch, but the kernel uses one
    scale for all rows.  For a single row, the kernel's scale is already right.  Several rows are
    first rounded here to integers from 0 to the largest level.  An extra row that contains both
    of these extremes then makes the kernel choose a scale of 1.
    """
    if x.numel() == x.shape[-1]:
        return product.kernel(x) + product.bias
    levels, scale, zero = quantize_rows(x.flatten(0, -2))
    extremes = F.one_hot(torch.zeros(1, dtype=torch.long), x.shape[-1]) * float(
        max_quantization_level()
    )
    out = product.kernel(torch.cat([levels, extremes]))[:-1]
    out = (out - zero * product.sums) * scale + product.bias
    return out.view(*x.shape[:-1], -1)


def max_quantization_level() -> int:
    """Return the largest integer of a rounded activation: 255 (8 bits) or 127 (7 bits).

    Source: fbgemm, ``reduce_range``; two 8-bit products overflow its 16-bit accumulator.
    """
    return 255 if has_exact_int8_products() else 127


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row of ``(B, I)`` to integers from 0 to ``max_quantization_level``.

    The range of a row spans its minimum, its maximum and 0.

    Returns:
        The integers ``(B, I)`` in the dtype of ``x``, the scales ``(B, 1)`` and the zero points
        ``(B, 1)``.

    Source: fbgemm, ``ChooseQuantizationParams``, so that many rows are rounded like a single one.
    """
    minimum, maximum = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    max_level = max_quantization_level()
    scale = (maximum - minimum) / max_level
    zero = (-minimum / scale.clamp(min=1e-30)).round()
    scale = scale.clamp(min=MIN_SCALE)
    return ((x * scale.reciprocal()).round() + zero).clamp(0, max_level), scale, zero


LAYOUTS = {
    "float32": WeightLayout(_pack_float32, _multiply_as_is, RELATIVE_TOLERANCE["float32"]),
    "float16": WeightLayout(_pack_float16, _multiply_as_is, 2e-3),
    "bfloat16": WeightLayout(_pack_bfloat16, _multiply_bfloat16, RELATIVE_TOLERANCE["half"]),
    "int8": WeightLayout(_pack_int8, _multiply_int8, RELATIVE_TOLERANCE["int8"]),
} | {
    f"plain {name}": WeightLayout(
        partial(_pack_plain, dtype=dtype), _multiply_plain, RELATIVE_TOLERANCE[name]
    )
    for name, dtype in PLAIN_LAYOUT.items()
}
WEIGHT_FORMATS = ("float32", "half", "int8")


@cache
def layout_works(layout: str) -> bool:
    """Return whether this machine and torch version multiply correctly in a layout."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((48, 64), 48, (3, 64)))
    try:
        packed = LAYOUTS[layout].pack(weight, bias)
        product = LAYOUTS[layout].multiply(packed, x)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    expected = F.linear(x, weight, bias)
    return bool((product - expected).norm() <= LAYOUTS[layout].tolerance * expected.norm())


def choose_layout(weights: str, num_rows: int, is_compiled: bool = False) -> str | None:
    """Return the best working layout, or None if none works.

    Args:
        weights: one of ``WEIGHT_FORMATS``.
        num_rows: rows per decoding step.
        is_compiled: whether the decoding step is compiled.

    Raises:
        ValueError: if ``weights`` is not one of ``WEIGHT_FORMATS``.
    """
    if weights not in WEIGHT_FORMATS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHT_FORMATS)}, got {weights!r}")
    is_plain = is_compiled and num_rows <= SINGLE_ROWS
    # Without AVX512 the compiler reads int8 one number at a time: 25 times slower than fbgemm.
    if is_plain and (weights != "int8" or has_avx512() or not layout_works("int8")):
        return f"plain {weights}"
    order = ["float16", "bfloat16"] if num_rows <= FEW_ROWS else ["bfloat16", "float16"]
    if not has_native_bfloat16():
        order.remove("bfloat16")
    if weights != "half":
        order = [weights] if weights == "float32" else [weights, *order]
    return next((layout for layout in order if layout_works(layout)), None)


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the float weight and the bias of a float or int8 linear layer."""
    assert isinstance(layer, nn.Linear | Int8Linear)
    # Copy the bias: kernels keep it, and a view would keep the whole loaded file in memory.
    weight, bias = layer.weight.detach(), layer.bias.detach().clone()
    return weight * layer.scale if isinstance(layer, Int8Linear) else weight, bias


class PackedLinear(nn.Module):
    """A linear layer whose weights can be multiplied but not read back.

    Args:
        weight: ``(O, I)``.
        bias: ``(O,)``.
        layout: a key of ``LAYOUTS``.
    """

    def __init__(self, weight: Tensor, bias: Tensor, layout: str) -> None:
        super().__init__()
        self.layout = LAYOUTS[layout]
        self.packed = self.layout.pack(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., O)`` for ``x`` ``(..., I)``."""
        return self.layout.multiply(self.packed, x)


def pack_linear_layers(module: nn.Module, layout: str) -> None:
    """Replace every linear layer below ``module`` by a ``PackedLinear``, one at a time."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Int8Linear):
            setattr(module, name, PackedLinear(*weight_and_bias(child), layout))
        else:
            pack_linear_layers(child, layout)


class PackedMLP(nn.Module):
    """A layer's MLP in bfloat16, with the GELU fused into the first product.

    Source: oneDNN's post-operations.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight, bias = weight_and_bias(layer.mlp_in)
        self.first = _onednn(weight.bfloat16(), bias.bfloat16(), "gelu", layer.config.gelu)
        self.second = _pack_bfloat16(*weight_and_bias(layer.mlp_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP output in float32."""
        return self.second(self.first(x.bfloat16())).float()


class PackedHead(nn.Module):
    """The decoder's output layer in two packed parts; each position needs only one."""

    def __init__(self, head: SegmentHead, layout: str) -> None:
        super().__init__()
        weights, biases = (torch.split(part, head.sizes) for part in weight_and_bias(head))
        self.parts = nn.ModuleList(
            PackedLinear(weight, bias, layout)
            for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return text logits followed by image logits."""
        return torch.cat([part(hidden) for part in self.parts], dim=-1)

    def heads(self) -> list[Head]:
        """Return the text head and the image head."""
        return list(self.parts)


def prepack(
    model: MaskedDecoder, *, weights: str, num_rows: int, is_compiled: bool = False
) -> None:
    """Prepare a decoder for decoding a fixed number of rows.

    The decoder can neither be trained nor saved afterwards.  The weights stay as they were if no
    layout works or if the decoder is not on the CPU.  Token embeddings become float16 if the
    weights have fewer than 32 bits.

    Args:
        model: decoder to change in place.
        weights: one of ``WEIGHT_FORMATS``.
        num_rows: rows per decoding step, already doubled if guidance is used.
        is_compiled: compile the decoding step of a layer, which takes some seconds.

    Raises:
        ValueError: if ``weights`` is not one of ``WEIGHT_FORMATS``, or torch cannot compile.
    """
    use_layout(model, choose_layout(weights, num_rows, is_compiled), is_compiled)


def use_layout(model: MaskedDecoder, layout: str | None, is_compiled: bool) -> None:
    """Prepare a decoder with a given layout; see ``prepack``.

    Args:
        model: decoder to change in place.
        layout: a key of ``LAYOUTS``; None keeps the weights as they are.
        is_compiled: compile the decoding step of a layer.

    Raises:
        ValueError: if torch cannot compile.
    """
    device = model.final_norm.weight.device.type
    if is_compiled:
        check_compiler(device)
    model.requires_grad_(False).eval()
    if layout is not None and device == "cpu":
        _pack(model, layout)
    model.has_compiled_layers = is_compiled


def _pack(model: MaskedDecoder, layout: str) -> None:
    model.register_module("to_logits", PackedHead(model.to_logits, layout))
    if layout == "bfloat16":
        for layer in model.layers:
            assert isinstance(layer, Layer)
            parts = {"mlp_in": PackedMLP(layer), "activation": nn.Identity()}
            for name, part in (parts | {"mlp_out": nn.Identity()}).items():
                layer.register_module(name, part)
    pack_linear_layers(model.layers, layout)
    model.float()
    if not layout.endswith("float32"):
        model.text_embedding.half()
        model.image_embedding.half()
    for parameter in model.parameters():
        # As in ``weight_and_bias``, a view would keep the whole file in memory.
        parameter.data = parameter.data.clone()


def prepack_in_own_dtype(
    model: MaskedDecoder, *, num_rows: int, is_compiled: bool = False
) -> None:
    """Prepare a decoder and keep the number of bits per weight; see ``prepack``.

    Raises:
        ValueError: if torch cannot compile.
    """
    weights = "float32" if model.final_norm.weight.dtype == torch.float32 else "half"
    if any(isinstance(part, Int8Linear) for part in model.layers.modules()):
        weights = "int8"
    layout = choose_layout(weights, num_rows, is_compiled)
    if weights == "int8" and layout is not None and "int8" not in layout:
        # Half precision would need more memory than the int8 weights.
        layout = None
    use_layout(model, layout, is_compiled)
