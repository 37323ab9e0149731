"""Training steps at RUDOLPH's sizes on random tokens: speed, utilisation and memory.

A step is the same as in this project's training: bfloat16 autocast, a loss on all segments,
gradient clipping and AdamW.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from rudolph.benchmarks.flops import train_operations
from rudolph.benchmarks.training_workloads import TrainingStep
from rudolph.gpu_check.rows import Case, CheckRow, UnavailableError
from rudolph.gpu_check.sizes import Geometry, Sizes
from rudolph.gpu_check.timing import matmul_rate, median_seconds, peak_bfloat16, synchronize
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.training.losses import DecoderLossConfig, segment_losses, weighted_mean
from rudolph.training.optim import OptimConfig, build_optimizers

# Variant -> the switches of ``MaskedDecoder`` that it turns on.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "compiled": ("has_compiled_layers",),
    "block masks": ("has_block_masks",),
    "checkpointing": ("has_checkpointing",),
    "compiled, block masks": ("has_compiled_layers", "has_block_masks"),
    "compiled, checkpointing": ("has_compiled_layers", "has_checkpointing"),
}


def training_cases(name: str, sizes: Sizes) -> Iterator[Case]:
    """Yield one case per variant of a decoder's training step."""
    for variant in VARIANTS:
        yield Case(variant, partial(measure_training, sizes, sizes.decoders[name], variant))


def measure_training(sizes: Sizes, geometry: Geometry, variant: str) -> Iterator[CheckRow]:
    """Measure the time, throughput and peak memory of a training step.

    Raises:
        UnavailableError: For block masks without CUDA.
    """
    device, switches = sizes.device, VARIANTS[variant]
    if device.type != "cuda" and "has_block_masks" in switches:
        raise UnavailableError("needs CUDA")
    torch._dynamo.reset()
    model = geometry.model(device).train()
    for switch in switches:
        setattr(model, switch, True)
    step = training_step(model, geometry.tokens(geometry.train_batch, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    yield CheckRow("first step", time.perf_counter() - started, "s", note="with compilation")
    seconds = median_seconds(step, device, num_repetitions=sizes.num_repetitions, warm_up=1)
    num_tokens = geometry.train_batch * geometry.layout.length
    note = f"batch {geometry.train_batch}, {geometry.layout.length} tokens, bf16 autocast, AdamW"
    yield CheckRow("step", 1e3 * seconds, "ms", note=note)
    yield CheckRow("tokens", num_tokens / seconds, "tokens/s")
    rate = train_operations(sizes.case(geometry)) * num_tokens / seconds
    yield from operation_rows(rate, sizes)
    if device.type == "cuda":
        yield CheckRow("peak memory", torch.cuda.max_memory_allocated(device) / 2**30, "GiB")


def training_step(model: MaskedDecoder, tokens: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs one training step on a fixed batch."""
    training, config = TrainingStep(model, OptimConfig()), DecoderLossConfig()

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            losses = segment_losses(model, tokens, config)
            loss = weighted_mean(losses, config.weights)
        training.step(loss)

    return step


def operation_rows(rate: float, sizes: Sizes) -> Iterator[CheckRow]:
    """Yield operations per second and their fraction of the device's bfloat16 limit."""
    yield CheckRow("operations", rate / 1e12, "TFLOP/s")
    measured = matmul_rate(sizes.roofline_side, sizes.device, torch.bfloat16)
    yield CheckRow("fraction of measured product", rate / measured)
    if sizes.device.type == "cuda":
        peak = peak_bfloat16(torch.cuda.get_device_name(sizes.device))
        if peak is not None:
            yield CheckRow(
                "model FLOPs utilisation", rate / peak, note=f"peak {peak / 1e12:g} TFLOP/s"
            )


def adam8bit_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield one case that compares 8-bit AdamW with standard AdamW."""
    yield Case("some steps", partial(compare_adam8bit, sizes))


def compare_adam8bit(sizes: Sizes) -> Iterator[CheckRow]:
    """Compare the loss after 20 steps on one batch.

    Raises:
        UnavailableError: Without CUDA or bitsandbytes.
    """
    if sizes.device.type != "cuda":
        raise UnavailableError("needs CUDA")
    try:
        import bitsandbytes
    except ImportError:
        raise UnavailableError("bitsandbytes is not installed") from None
    tokens, config = sizes.checked.tokens(8, sizes.device), DecoderLossConfig()
    final_losses = []
    for name in ("adamw", "adamw8bit"):
        model = sizes.checked.model(sizes.device).train()
        [optimizer] = build_optimizers(model, OptimConfig(optimizer=name))
        for _ in range(20):
            loss = weighted_mean(segment_losses(model, tokens, config), config.weights)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        final_losses.append(loss.item())
    difference = abs(final_losses[1] - final_losses[0]) / final_losses[0]
    note = f"bitsandbytes {bitsandbytes.__version__}"
    yield CheckRow("loss after 20 steps", difference, "relative difference", 0.02, note)
