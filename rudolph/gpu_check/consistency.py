"""Two ways to compute the same: masks as blocks, half precision, cached steps, samples in batches.

Errors of vectors are relative: the norm of the difference over the norm of the exact one.

Shapes: R rows of attention, T positions, H head size.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rudolph.generation.generate import generate_image
from rudolph.gpu_check.rows import Case, CheckRow, UnavailableError
from rudolph.gpu_check.sizes import SAMPLING, Sizes
from rudolph.models.layers.attention import MAXIMA, KeyValue, attention, block_mask
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import SequenceLayout
from rudolph.sequence.masks import mask_table, parse_mask, right_without_left

CHECKED_MASKS = ("causal", "row", "row_block", "column", "conv(3)", "conv(7)", "conv_torus(3)")
# Largest relative errors by precision: a few roundings of its 24, 8 or 11 bits.
MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of the exact tensor."""
    exact = exact.detach().double()
    return ((found.detach().double() - exact).norm() / exact.norm()).item()


def round_digits(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mask_cases(sizes: Sizes) -> Iterator[Case]:
    """Give FlexAttention's block masks against dense masks, alone and in a model."""
    for number, layout in enumerate(sizes.mask_layouts):
        # One layout in all precisions, the others in the one that trains.
        dtypes = (torch.float32, torch.bfloat16) if number == 0 else (torch.bfloat16,)
        for dtype in dtypes:
            name = f"{round_digits(dtype)}, T={layout.length}"
            yield Case(name, partial(compare_masks, sizes, layout, dtype))
    yield Case("model gradients", partial(compare_model_gradients, sizes))


def compare_masks(sizes: Sizes, layout: SequenceLayout, dtype: torch.dtype) -> Iterator[CheckRow]:
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
        found = attend([part.to(dtype) for part in inputs], block_mask(table), direction)
        error = relative_error(found[0], exact[0])
        yield CheckRow(f"{name}, forward", error, "relative error", MAX_RELATIVE_ERROR[dtype])
        if device.type == "cuda":
            worst = max(map(relative_error, found[1:], exact[1:]))
            yield CheckRow(
                f"{name}, gradient", worst, "relative error", 2 * MAX_RELATIVE_ERROR[dtype]
            )


def attend(inputs: list[Tensor], mask: object, direction: Tensor) -> list[Tensor]:
    """Return attention ``(R, T, H)`` and, on CUDA, its gradient in query, key and value."""
    # FlexAttention has no gradient on the CPU.
    has_gradient = direction.device.type == "cuda"
    query, key, value = (part.detach().clone().requires_grad_(has_gradient) for part in inputs)
    out = attention(query, [KeyValue(key, value, mask)], pb_relax=None, dropout=0.0)
    if not has_gradient:
        return [out]
    return [out, *torch.autograd.grad(out, (query, key, value), direction.to(out.dtype))]


def compare_model_gradients(sizes: Sizes) -> Iterator[CheckRow]:
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
    """Return the gradient of all layers, flattened, of the hidden states along a fixed direction.

    Not of their square, which the last norm keeps constant.
    """
    hidden = (hidden_of or model.hidden)(tokens).float()
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(hidden.shape, generator=generator).to(hidden)
    (hidden * direction).sum().backward()  # type: ignore[no-untyped-call]
    found = [part.grad for part in model.layers.parameters() if part.grad is not None]
    return torch.cat([part.flatten().float() for part in found])


def precision_cases(sizes: Sizes) -> Iterator[Case]:
    """Give half precision against float32: whole sequences, cached steps, large scores."""
    for dtype in (torch.bfloat16, torch.float16):
        for maximum in MAXIMA:
            name = f"{round_digits(dtype)}, {maximum}"
            yield Case(f"model, {name}", partial(compare_precision, sizes, dtype, maximum))
    for relaxed in (*MAXIMA, None):
        name = f"large scores, PB-relax {relaxed}"
        yield Case(name, partial(compare_large_scores, sizes, relaxed))


@torch.no_grad()
def compare_precision(sizes: Sizes, dtype: torch.dtype, maximum: str) -> Iterator[CheckRow]:
    exact = sizes.checked.model(sizes.device, pb_relax_maximum=maximum).eval()
    half = sizes.checked.model(sizes.device, pb_relax_maximum=maximum).eval().to(dtype)
    tokens = sizes.checked.tokens(2, sizes.device)
    expected = exact.hidden(tokens)
    for quantity, found in (
        ("whole sequence", half.hidden(tokens)),
        ("cached steps", stepwise_hidden(half, tokens)),
    ):
        lost = found.numel() - found.isfinite().sum().item()
        yield CheckRow(f"{quantity}, not finite", lost, "numbers", limit=0)
        error = relative_error(found, expected)
        yield CheckRow(quantity, error, "relative error", 2 * MAX_RELATIVE_ERROR[dtype])


@torch.no_grad()
def compare_large_scores(sizes: Sizes, maximum: str | None) -> Iterator[CheckRow]:
    """Compare float16 attention whose scores exceed what float16 holds, in two parts of keys."""
    torch.manual_seed(0)
    size = sizes.head_size
    query, key, value = torch.randn(3, 8, 32, size, device=sizes.device)
    # Scores have a standard deviation of 20000, so that a few of them pass 65504.
    query, key = query * 400, key * 50
    exact = _in_two_parts(query, key, value, maximum)
    half = _in_two_parts(query.half(), key.half(), value.half(), maximum)
    lost = half.numel() - half.isfinite().sum().item()
    if maximum != "row":
        note = "rows far below the maximum are lost" if maximum else "expected without PB-relax"
        yield CheckRow("not finite", lost, "numbers", note=note)
        return
    yield CheckRow("not finite", lost, "numbers", limit=0)
    # Scores this large round to whole numbers: what matters is who wins.
    error = relative_error(half.nan_to_num(), exact)
    yield CheckRow("attention", error, "relative error", note="scores above 65504")


def _in_two_parts(query: Tensor, key: Tensor, value: Tensor, maximum: str | None) -> Tensor:
    pairs = zip(key.chunk(2, dim=1), value.chunk(2, dim=1), strict=True)
    seen = [KeyValue(*pair) for pair in pairs]
    return attention(query, seen, pb_relax=maximum, dropout=0.0)


def step_cases(sizes: Sizes) -> Iterator[Case]:
    """Give cached decoding against whole sequences, and samples alone against in a batch."""
    yield Case("cached steps", partial(compare_cached, sizes))
    yield Case("batch of one", partial(compare_batches, sizes))


@torch.no_grad()
def compare_cached(sizes: Sizes) -> Iterator[CheckRow]:
    model = sizes.checked.model(sizes.device).eval()
    tokens = sizes.checked.tokens(3, sizes.device)
    error = relative_error(stepwise_hidden(model, tokens), model.hidden(tokens))
    yield CheckRow("hidden states", error, "relative error", 1e-5)


def stepwise_hidden(model: MaskedDecoder, tokens: Tensor) -> Tensor:
    """Return the hidden states of sequences whose image and right text are read one by one."""
    left, rest = tokens.tensor_split((model.layout.left_text_length,), dim=1)
    cache = model.new_cache(len(left), num_positions=left.shape[1])
    hidden = [model.hidden(left, cache)]
    cache = cache.repeat(1, num_positions=rest.shape[1])
    hidden += [model.hidden(token, cache) for token in torch.split(rest, 1, dim=1)]
    return torch.cat(hidden, dim=1)


def compare_batches(sizes: Sizes) -> Iterator[CheckRow]:
    """Draw eight images of a text at once and each alone, from the same seeds."""
    model, seeds = sizes.checked.model(sizes.device).eval(), range(8)
    left = sizes.checked.tokens(1, sizes.device)[:, : model.layout.left_text_length]
    together = generate_image(model, left, config=SAMPLING, seeds=seeds)
    alone = [generate_image(model, left, config=SAMPLING, seeds=[seed]) for seed in seeds]
    differing = (together != torch.cat(alone)).any(1).sum().item()
    yield CheckRow("images of 8", differing, "differing images", limit=0)
    wide = generate_image(model, left, config=SAMPLING, seeds=seeds, window=4)
    differing = (together != wide).any(1).sum().item()
    yield CheckRow("window of 4, images of 8", differing, "differing images", limit=0)
