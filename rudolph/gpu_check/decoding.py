"""Speed of sampling image tokens at RUDOLPH's sizes.

It times the whole sampling loop, and single steps replayed as a CUDA graph.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from statistics import median

import torch

from rudolph.benchmarks.decoding_workload import StopDecodingError
from rudolph.benchmarks.flops import decode_bytes
from rudolph.generation.generate import generate_image
from rudolph.gpu_check.compiling import GraphedStep, started_decoding
from rudolph.gpu_check.consistency import dtype_name
from rudolph.gpu_check.rows import Case, CheckRow, UnavailableError
from rudolph.gpu_check.sizes import SAMPLING, Geometry, Sizes
from rudolph.gpu_check.timing import copy_rate, synchronize
from rudolph.models.rudolph.decoder import MaskedDecoder, run_layer

BF16, FP16 = torch.bfloat16, torch.float16


def decoding_cases(name: str, sizes: Sizes) -> Iterator[Case]:
    """Yield one case per batch size, precision and execution mode of a decoder.

    The most informative cases come first, because a part may run out of time.
    """
    geometry, batches = sizes.decoders[name], sizes.decode_batches
    variants = [(BF16, "plain", batches), (BF16, "graph", batches)]
    # Each batch size needs its own compilation, which takes seconds.
    variants += [(BF16, "compiled", (batches[0], batches[-1])), (FP16, "plain", batches)]
    for dtype, variant, variant_batches in variants:
        for batch in variant_batches:
            case = f"{dtype_name(dtype)}, {variant}, batch {batch}"
            yield Case(case, partial(MEASURES[variant], sizes, geometry, dtype, batch, variant))


def measure_loop(
    sizes: Sizes, geometry: Geometry, dtype: torch.dtype, batch: int, variant: str
) -> Iterator[CheckRow]:
    """Measure the time per token of ``generate_image``, including sampling."""
    torch._dynamo.reset()
    model = geometry.model(sizes.device).eval().to(dtype)
    model.has_compiled_layers = variant == "compiled"
    left = geometry.tokens(1, sizes.device)[:, : geometry.layout.left_text_length]
    times: list[float] = []

    def on_token(done: int) -> None:
        synchronize(sizes.device)
        times.append(time.perf_counter())
        if len(times) > geometry.num_tokens:
            raise StopDecodingError

    started = time.perf_counter()
    with suppress(StopDecodingError):
        generate_image(model, left, config=SAMPLING, seeds=range(batch), on_token=on_token)
    yield CheckRow("first token", times[0] - started, "s")
    seconds = median(later - earlier for earlier, later in pairwise(times))
    yield from token_rows(sizes, geometry, dtype, batch, seconds, note="with sampling")


def measure_graph(
    sizes: Sizes, geometry: Geometry, dtype: torch.dtype, batch: int, variant: str
) -> Iterator[CheckRow]:
    """Measure decoding steps replayed as a CUDA graph, without sampling.

    Raises:
        UnavailableError: Without CUDA.
    """
    if sizes.device.type != "cuda":
        raise UnavailableError("needs CUDA")
    model = geometry.model(sizes.device).eval().to(dtype)
    yield from graph_rows(sizes, geometry, model, batch)


@torch.inference_mode()
def graph_rows(
    sizes: Sizes, geometry: Geometry, model: MaskedDecoder, batch: int
) -> Iterator[CheckRow]:
    """Measure steps replayed as a CUDA graph, and yield their rows."""
    dtype = model.final_norm.weight.dtype
    cache, steps = started_decoding(model, geometry, batch, geometry.num_tokens)
    graph = GraphedStep(model, cache, run_layer)
    seconds = []
    for step in steps:
        started = time.perf_counter()
        graph(step)
        synchronize(sizes.device)
        seconds.append(time.perf_counter() - started)
    yield from token_rows(sizes, geometry, dtype, batch, median(seconds), note="without sampling")


def token_rows(
    sizes: Sizes,
    geometry: Geometry,
    dtype: torch.dtype,
    batch: int,
    seconds: float,
    *,
    note: str,
) -> Iterator[CheckRow]:
    """Yield the rows of a decoding step that takes ``seconds`` for one token of each image."""
    yield CheckRow("token", 1e3 * seconds, "ms", note=note)
    yield CheckRow("tokens", batch / seconds, "tokens/s")
    rate = decode_bytes(sizes.case(geometry, batch), dtype_name(dtype)) * batch / seconds
    yield CheckRow("needed bytes", rate / 1e9, "GB/s")
    yield CheckRow(
        "fraction of measured copy", rate / copy_rate(sizes.roofline_bytes, sizes.device)
    )


MEASURES: dict[str, Callable[..., Iterator[CheckRow]]] = {
    "plain": measure_loop,
    "compiled": measure_loop,
    "graph": measure_graph,
}
