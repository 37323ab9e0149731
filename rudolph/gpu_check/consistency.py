"""Consistency checks between two ways to compute the same result.

They compare block masks with dense masks, half precision with float32, cached steps with whole
sequences, and batches of samples with single samples. Errors of vectors are relative: the norm of
the difference divided by the norm of the exact vector.

Shapes: R rows of attention, T positions, H head size.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rudolph.generation.generate import generate_image
from rudolph.gpu_check.rows import Case, CheckRow, UnavailableError
from rudolph.gpu_check.sizes import SAMPLING, Sizes
from rudolph.models.layers.attention import PB_RELAX_MAXIMA, KeyValue, attention, block_mask
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import SequenceLayout
from rudolph.sequence.masks import mask_table, parse_mask, right_without_left

CHECKED_MASKS = ("causal", "row", "row_block", "column", "conv(3)", "conv(7)", "conv_torus(3)")
# Limit of the relative error by dtype: a few rounding errors at 24, 8 or 11 significant bits.
MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the exact tensor."""
    expected = expected.detach().double()
    return ((output.detach().double() - expected).norm() / expected.norm()).item()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def mask_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield cases that compare FlexAttention's block masks with dense masks.

    They compare attention alone and a whole model.
    """
    for number, layout in enumerate(sizes.mask_layouts):
        # The first layout runs in both precisions, the others only in bfloat16, as in training.
        dtypes = (torch.float32, torch.bfloat16) if number == 0 else (torch.bfloat16,)
        for dtype in dtypes:
            name = f"{dtype_name(dtype)}, T={layout.length}"
            yield Case(name, partial(compare_masks, sizes, layout, dtype))
    yield Case("model gradients", partial(compare_model_gradients, sizes))


def compare_masks(sizes: Sizes, layout: SequenceLayout, dtype: torch.dtype) -> Iterator[CheckRow]:
    """Compare attention under block masks and dense masks; on CUDA also its gradients."""
    torch._dynamo.reset()
    device = sizes.device
    for name in (*CHECKED_MASKS, "row without left"):
        rule = parse_mask(name.split()[0])
        rule = right_without_left(rule) if "without" in name else rule
        table = mask_table(rule, layout).to(device)
        torch.manual_seed(0)
        shape = (4, 4, layout.length, sizes.head_size)
        *inputs, direction = torch.randn(shape, device=device)
        exact = attend(inputs, table, direction)
        outputs = attend([tensor.to(dtype) for tensor in inputs], block_mask(table), direction)
        error = relative_error(outputs[0], exact[0])
        yield CheckRow(f"{name}, forward", error, "relative error", MAX_RELATIVE_ERROR[dtype])
        if device.type == "cuda":
            worst = max(map(relative_error, outputs[1:], exact[1:]))
            yield CheckRow(
                f"{name}, gradient", worst, "relative error", 2 * MAX_RELATIVE_ERROR[dtype]
            )


def attend(inputs: list[Tensor], mask: object, direction: Tensor) -> list[Tensor]:
    """Return attention ``(R, T, H)`` and, on CUDA, its gradients for query, key and value."""
    # FlexAttention has no gradient on the CPU.
    has_gradient = direction.device.type == "cuda"
    query, key, value = (tensor.detach().clone().requires_grad_(has_gradient) for tensor in inputs)
    out = attention(query, [KeyValue(key, value, mask)], pb_relax=None, dropout=0.0)
    if not has_gradient:
        return [out]
    return [out, *torch.autograd.grad(out, (query, key, value), direction.to(out.dtype))]


def compare_model_gradients(sizes: Sizes) -> Iterator[CheckRow]:
    """Compare a decoder's gradients under block masks and dense masks.

    Raises:
        UnavailableError: Without CUDA.
    """
    if sizes.device.type != "cuda":
        raise UnavailableError("needs CUDA")
    gradients = []
    for has_blocks in (False, True):
        torch._dynamo.reset()
        model = sizes.checked.model(sizes.device).train()
        model.has_block_masks = has_blocks
        gradients.append(gradient_of(model, sizes.checked.tokens(4, sizes.device)))
    error = relative_error(gradients[1], gradients[0])
    yield CheckRow("block masks against dense masks", error, "relative error", 1e-3)


def gradient_of(
    model: MaskedDecoder, tokens: Tensor, hidden_of: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the flattened gradient of all layers' parameters.

    The loss is the projection of the hidden states on a fixed random direction. The squared norm
    of the hidden states would not work, because the final norm layer keeps it constant.

    Args:
        model: The decoder, with no accumulated gradients.
        tokens: ``(B, T)``.
        hidden_of: Computes the hidden states from tokens; the default is ``model.hidden``.
    """
    hidden = (hidden_of or model.hidden)(tokens).float()
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(hidden.shape, generator=generator).to(hidden)
    (hidden * direction).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in model.layers.parameters() if tensor.grad is not None]
    return torch.cat([tensor.flatten().float() for tensor in gradients])


def precision_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield cases that compare half precision with float32.

    They cover whole sequences, cached steps and large attention scores.
    """
    for dtype in (torch.bfloat16, torch.float16):
        for maximum in PB_RELAX_MAXIMA:
            name = f"{dtype_name(dtype)}, {maximum}"
            yield Case(f"model, {name}", partial(compare_precision, sizes, dtype, maximum))
    for relaxed in (*PB_RELAX_MAXIMA, None):
        name = f"large scores, PB-relax {relaxed}"
        yield Case(name, partial(compare_large_scores, sizes, relaxed))


@torch.no_grad()
def compare_precision(sizes: Sizes, dtype: torch.dtype, maximum: str) -> Iterator[CheckRow]:
    """Compare a decoder's hidden states in half precision with those in float32."""
    model_float32 = sizes.checked.model(sizes.device, pb_relax_maximum=maximum).eval()
    half = sizes.checked.model(sizes.device, pb_relax_maximum=maximum).eval().to(dtype)
    tokens = sizes.checked.tokens(2, sizes.device)
    expected = model_float32.hidden(tokens)
    for quantity, output in (
        ("whole sequence", half.hidden(tokens)),
        ("cached steps", stepwise_hidden(half, tokens)),
    ):
        num_not_finite = output.numel() - output.isfinite().sum().item()
        yield CheckRow(f"{quantity}, not finite", num_not_finite, "numbers", limit=0)
        error = relative_error(output, expected)
        yield CheckRow(quantity, error, "relative error", 2 * MAX_RELATIVE_ERROR[dtype])


@torch.no_grad()
def compare_large_scores(sizes: Sizes, maximum: str | None) -> Iterator[CheckRow]:
    """Compare float16 with float32 attention on scores beyond float16's range, keys in two parts.

    Args:
        sizes: The sizes of the check.
        maximum: The maximum that PB-relax subtracts, from ``PB_RELAX_MAXIMA``; None turns it off.
    """
    torch.manual_seed(0)
    size = sizes.head_size
    query, key, value = torch.randn(3, 8, 32, size, device=sizes.device)
    # Scores have a standard deviation of 20000, so a few exceed 65504, the largest float16.
    query, key = query * 400, key * 50
    exact = _in_two_parts(query, key, value, maximum)
    half = _in_two_parts(query.half(), key.half(), value.half(), maximum)
    num_not_finite = half.numel() - half.isfinite().sum().item()
    if maximum != "row":
        note = "rows far below the maximum are lost" if maximum else "expected without PB-relax"
        yield CheckRow("not finite", num_not_finite, "numbers", note=note)
        return
    yield CheckRow("not finite", num_not_finite, "numbers", limit=0)
    # float16 rounds scores this large to whole numbers, so the check sets no limit on this error.
    error = relative_error(half.nan_to_num(), exact)
    yield CheckRow("attention", error, "relative error", note="scores above 65504")


def _in_two_parts(query: Tensor, key: Tensor, value: Tensor, maximum: str | None) -> Tensor:
    pairs = zip(key.chunk(2, dim=1), value.chunk(2, dim=1), strict=True)
    key_values = [KeyValue(*pair) for pair in pairs]
    return attention(query, key_values, pb_relax=maximum, dropout=0.0)


def step_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield a case for cached decoding and one for batches of samples."""
    yield Case("cached steps", partial(compare_cached, sizes))
    yield Case("batch of one", partial(compare_batches, sizes))


@torch.no_grad()
def compare_cached(sizes: Sizes) -> Iterator[CheckRow]:
    """Compare hidden states from cached decoding with hidden states of whole sequences."""
    model = sizes.checked.model(sizes.device).eval()
    tokens = sizes.checked.tokens(3, sizes.device)
    error = relative_error(stepwise_hidden(model, tokens), model.hidden(tokens))
    yield CheckRow("hidden states", error, "relative error", 1e-5)


def stepwise_hidden(model: MaskedDecoder, tokens: Tensor) -> Tensor:
    """Return hidden states of sequences, with image and right text decoded token by token."""
    left, rest = tokens.tensor_split((model.layout.left_text_length,), dim=1)
    cache = model.new_cache(len(left), num_positions=left.shape[1])
    hidden = [model.hidden(left, cache)]
    cache = cache.expand_samples(1, num_positions=rest.shape[1])
    hidden += [model.hidden(token, cache) for token in torch.split(rest, 1, dim=1)]
    return torch.cat(hidden, dim=1)


def compare_batches(sizes: Sizes) -> Iterator[CheckRow]:
    """Compare eight images sampled in one batch with the same images sampled one by one.

    Both use the same seeds. A batch sampled with a window of four tokens is also compared.
    """
    model, seeds = sizes.checked.model(sizes.device).eval(), range(8)
    left = sizes.checked.tokens(1, sizes.device)[:, : model.layout.left_text_length]
    batched = generate_image(model, left, config=SAMPLING, seeds=seeds)
    single = [generate_image(model, left, config=SAMPLING, seeds=[seed]) for seed in seeds]
    num_differing = (batched != torch.cat(single)).any(1).sum().item()
    yield CheckRow("images of 8", num_differing, "differing images", limit=0)
    wide = generate_image(model, left, config=SAMPLING, seeds=seeds, window=4)
    num_differing = (batched != wide).any(1).sum().item()
    yield CheckRow("window of 4, images of 8", num_differing, "differing images", limit=0)
