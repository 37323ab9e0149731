"""Linear layers in the layout that this processor reads fastest: for inference, not for training.

A token costs one reading of all weights, so what counts at few rows is bytes and how they lie.
Activations stay float32; the rest of the model is as it was.

    float32    in oneDNN's layout, which reads single rows twice as fast as the usual one
    half   16-bit weights: float16 in fbgemm's layout for up to ``FEW_ROWS`` rows, which reads at
           the speed of memory; bfloat16 in oneDNN's for more, which multiplies fastest where
           the processor multiplies it natively
    int8   8-bit weights, one scale an output; each row of activations is rounded too: to 8 bits
           with VNNI, to 7 without, where fbgemm would saturate
    plain  for the steps of a single row that are compiled: weights row after row as they are, in
           float32, bfloat16 (half) or 8 bits, activations not rounded

The kernels are operators of torch that it does not document, so each is tried on a small product
before it is used; where one does not work the next one is, and at last the layer as it was.

To add a layout, write its two functions and name it in ``LAYOUTS``.

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
from rudolph.models.layers.native_types import has_exact_int8_products, has_native_bfloat16
from rudolph.models.rudolph.compiled import check_compiler, compile_function
from rudolph.models.rudolph.decoder import Head, Layer, MaskedDecoder, SegmentHead

FEW_ROWS = 4
# What is compiled multiplies a single row with weights as they lie.
SINGLE_ROWS = 1
PLAIN_LAYOUT = {"float32": torch.float32, "half": torch.bfloat16, "int8": torch.int8}
RELATIVE_TOLERANCE = {"float32": 1e-5, "half": 2e-2, "int8": 5e-2}
# fbgemm rounds to no finer steps than this.
LEAST_SCALE = 6.1e-5


class WeightLayout(NamedTuple):
    """``prepack(weight (O, I), bias (O,))`` once, ``multiply(packed, x (..., I))`` often.

    ``tolerance`` is the largest relative error that it may have on the product it is tried on.
    """

    pack: Callable[[Tensor, Tensor], Any]
    multiply: Callable[[Any, Tensor], Tensor]
    tolerance: float


class Kernel:
    """A product with one weight, ``(..., I)`` to ``(..., O)``, that compiled code calls as it is.

    What a compiler cannot look into is told by a number, so that it compiles once for all weights.
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
        if torch.compiler.is_compiling():
            found: Tensor = torch.ops.rudolph.multiply(x, self.number, self.num_outputs)
            return found
        return self.multiply(self.weight, x)


# A tenth of what ``torch.library.custom_op`` adds to a call.
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
    """A product in oneDNN's layout, with an activation after it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS + 1)

    def multiply(held: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, *held, activation, [], kind)
        return found

    return Kernel((packed, bias), multiply, len(weight))


def _pack_float32(weight: Tensor, bias: Tensor) -> Kernel:
    return _onednn(weight.float(), bias.float())


def _pack_bfloat16(weight: Tensor, bias: Tensor) -> Kernel:
    return _onednn(weight.bfloat16(), bias.bfloat16())


def _pack_float16(weight: Tensor, bias: Tensor) -> Kernel:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias.float())
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return Kernel(packed, lambda held, x: multiply(x, held), len(weight))


def _multiply_as_is(kernel: Kernel, x: Tensor) -> Tensor:
    return kernel(x)


def _multiply_bfloat16(kernel: Kernel, x: Tensor) -> Tensor:
    return kernel(x.bfloat16()).float()


class PlainWeight(NamedTuple):
    """``weight`` (O, I) as it is, times ``scale`` (O,) where it has one, and ``bias`` (O,)."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor


def _pack_plain(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> PlainWeight:
    held = torch.empty(weight.shape, dtype=dtype)
    if dtype != torch.int8:
        return PlainWeight(held.copy_(weight), None, bias.float())
    scale = torch.empty(len(weight))
    # Row after row: memory of a whole copy that is freed would stay with the process.
    for number, row in enumerate(map(Tensor.float, weight)):
        scale[number] = row.abs().max().clamp(min=1e-12) / 127
        held[number] = (row / scale[number]).round()
    return PlainWeight(held, scale, bias.float())


def _multiply_plain(plain: PlainWeight, x: Tensor) -> Tensor:
    if x.numel() <= SINGLE_ROWS * x.shape[-1]:
        multiply = _sum_row if torch.compiler.is_compiling() else compile_function(_sum_row)
        out: Tensor = multiply(plain.weight, x)
    elif plain.weight.dtype == torch.float32:
        out = F.linear(x, plain.weight)
    elif has_native_bfloat16():
        # Eight bits are exact in bfloat16.
        out = F.linear(x.bfloat16(), plain.weight.bfloat16()).float()
    else:
        out = F.linear(x, plain.weight.float())
    return (out if plain.scale is None else out * plain.scale) + plain.bias


def _sum_row(weight: Tensor, x: Tensor) -> Tensor:
    """A single row's product as sums: a compiler makes a loop over the weights as they lie."""
    # A view by strides is of memory: else what x comes from is computed anew for every output.
    x = x.as_strided(x.shape, x.stride())
    return (x.unsqueeze(-2) * weight.float()).sum(-1)


class Int8Product(NamedTuple):
    """Without its bias, and with what a shift of all inputs by 1 adds, ``(O,)`` each."""

    kernel: Kernel
    sums: Tensor
    bias: Tensor


def _pack_int8(weight: Tensor, bias: Tensor) -> Int8Product:
    wide = weight.float()
    # The norm and no copy of the weight: memory that is freed would stay with the process.
    largest = torch.linalg.vector_norm(wide, ord=torch.inf, dim=1)
    scales = largest.clamp(min=1e-12).double() / 127
    with warnings.catch_warnings():
        # Quantized tensors are to leave torch some day; then the trial fails and half is used.
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(wide), dtype=torch.long)
        rounded = torch.quantize_per_channel(wide, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(rounded, None)
        sums = (rounded.int_repr().sum(1) * scales).float()
    multiply = partial(
        torch.ops.quantized.linear_dynamic, reduce_range=max_quantization_level() < 255
    )
    kernel = Kernel(packed, lambda held, x: multiply(x, held), len(weight))
    return Int8Product(kernel, sums, bias.float())


def _multiply_int8(product: Int8Product, x: Tensor) -> Tensor:
    """Each row rounded on its own: a sample's tokens must not depend on its neighbours.

    The kernel takes one scale for all rows.  It finds that of a single row; to several it gives 1,
    when what they have become by their own scales is whole numbers from 0 to the largest level,
    both of which are there.
    """
    if x.numel() == x.shape[-1]:
        return product.kernel(x) + product.bias
    levels, scale, zero = quantize_rows(x.flatten(0, -2))
    ends = F.one_hot(torch.zeros(1, dtype=torch.long), x.shape[-1]) * float(
        max_quantization_level()
    )
    out = product.kernel(torch.cat([levels, ends]))[:-1]
    out = (out - zero * product.sums) * scale + product.bias
    return out.view(*x.shape[:-1], -1)


def max_quantization_level() -> int:
    """Return the largest whole number that an activation may become: of 8 bits, or of 7.

    Source: fbgemm, ``reduce_range``; two products of 8 bits overflow the 16 in which it adds them.
    """
    return 255 if has_exact_int8_products() else 127


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row of ``(R, I)`` as whole numbers from 0 to ``max_quantization_level``, scale
    and zero.

    Scale and zero are ``(R, 1)``.

    The range is from the row's least to its largest number or 0.

    Source: fbgemm, ``ChooseQuantizationParams``, so that many rows are rounded as one row is.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    largest = max_quantization_level()
    scale = (high - low) / largest
    zero = (-low / scale.clamp(min=1e-30)).round()
    scale = scale.clamp(min=LEAST_SCALE)
    return ((x * scale.reciprocal()).round() + zero).clamp(0, largest), scale, zero


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
WEIGHTS = ("float32", "half", "int8")


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
    return bool((found - expected).norm() <= LAYOUTS[layout].tolerance * expected.norm())


def choose_layout(weights: str, num_rows: int, is_compiled: bool = False) -> str | None:
    """The best layout that works, None when none does.

    Raises:
        ValueError: for other weights than ``WEIGHTS``.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if is_compiled and num_rows <= SINGLE_ROWS:
        return f"plain {weights}"
    order = ["float16", "bfloat16"] if num_rows <= FEW_ROWS else ["bfloat16", "float16"]
    if not has_native_bfloat16():
        order.remove("bfloat16")
    if weights != "half":
        order = [weights] if weights == "float32" else [weights, *order]
    return next((layout for layout in order if works(layout)), None)


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
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
            setattr(module, name, PackedLinear(*weight_and_bias(child), layout))
        else:
            pack_linear_layers(child, layout)


class PackedMLP(nn.Module):
    """Two linear layers in bfloat16 and the GELU between them, which the first one's kernel does.

    Source: oneDNN's post-operations.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight, bias = weight_and_bias(layer.mlp_in)
        self.first = _onednn(weight.bfloat16(), bias.bfloat16(), "gelu", layer.config.gelu)
        self.second = _pack_bfloat16(*weight_and_bias(layer.mlp_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.bfloat16())).float()


class PackedHead(nn.Module):
    """The decoder's head in two parts, of which a token needs one."""

    def __init__(self, head: SegmentHead, layout: str) -> None:
        super().__init__()
        weights, biases = (torch.split(part, head.sizes) for part in weight_and_bias(head))
        self.parts = nn.ModuleList(
            PackedLinear(weight, bias, layout)
            for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self.parts], dim=-1)

    def heads(self) -> list[Head]:
        return list(self.parts)


def prepack(
    model: MaskedDecoder, *, weights: str, num_rows: int, is_compiled: bool = False
) -> None:
    """Make a decoder ready to decode ``num_rows`` rows at once; guidance doubles them.

    It can be neither trained nor saved afterwards.  Its weights stay as they were where no layout
    works, or off the CPU; token embeddings become float16 with weights of fewer than 32 bits.

    Args:
        is_compiled: whether torch compiles a layer's step, which takes some seconds.

    Raises:
        ValueError: for other weights than ``WEIGHTS``, or where torch cannot compile.
    """
    use_layout(model, choose_layout(weights, num_rows, is_compiled), is_compiled)


def use_layout(model: MaskedDecoder, layout: str | None, is_compiled: bool) -> None:
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
    for kept in model.parameters():
        # As in ``weight_and_bias``: a view would hold the whole file.
        kept.data = kept.data.clone()


def prepack_in_own_dtype(
    model: MaskedDecoder, *, num_rows: int, is_compiled: bool = False
) -> None:
    """Pack a decoder in the number of bits that its weights are held in anyway.

    Raises:
        ValueError: where torch cannot compile.
    """
    weights = "float32" if model.final_norm.weight.dtype == torch.float32 else "half"
    if any(isinstance(part, Int8Linear) for part in model.layers.modules()):
        weights = "int8"
    layout = choose_layout(weights, num_rows, is_compiled)
    if weights == "int8" and layout is not None and "int8" not in layout:
        # Half would take more memory than was asked for.
        layout = None
    use_layout(model, layout, is_compiled)
