"""Checks of compiled code and CUDA graphs against eager execution.

They cover training steps and decoding steps.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rudolph.gpu_check.consistency import gradient_of, relative_error
from rudolph.gpu_check.rows import Case, CheckRow, UnavailableError
from rudolph.gpu_check.sizes import Geometry, Sizes
from rudolph.models.layers.kv_cache import KeyValueCache
from rudolph.models.rudolph.decoder import MaskedDecoder, run_layer
from rudolph.models.rudolph.static_decode import StaticSelection, StaticView

NUM_DECODING_STEPS = 6


def compile_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield one case per way to compile a decoder, each compared with the uncompiled decoder."""
    yield Case("CUDA graph of a decoding step", partial(compare_graph, sizes))
    yield Case("compiled decoding steps", partial(compare_decoding, sizes))
    for has_checkpointing in (False, True):
        name = "compiled training step" + (", checkpointing" if has_checkpointing else "")
        yield Case(name, partial(compare_training, sizes, has_checkpointing))
    yield Case("reduce-overhead training step", partial(compare_reduced_overhead, sizes))


def compare_training(sizes: Sizes, has_checkpointing: bool) -> Iterator[CheckRow]:
    """Compare the gradients of compiled and uncompiled layers."""
    torch._dynamo.reset()
    tokens, gradients = sizes.checked.tokens(4, sizes.device), []
    for is_compiled in (False, True):
        model = sizes.checked.model(sizes.device).train()
        model.has_compiled_layers, model.has_checkpointing = is_compiled, has_checkpointing
        gradients.append(gradient_of(model, tokens))
    yield CheckRow("gradient", relative_error(*reversed(gradients)), "relative error", 1e-4)


def compare_reduced_overhead(sizes: Sizes) -> Iterator[CheckRow]:
    """Compare the gradient of a model compiled as a whole and replayed as a CUDA graph."""
    torch._dynamo.reset()
    tokens = sizes.checked.tokens(4, sizes.device)
    expected = gradient_of(sizes.checked.model(sizes.device).train(), tokens)
    model = sizes.checked.model(sizes.device).train()
    reduced = torch.compile(model.hidden, mode="reduce-overhead", dynamic=False)
    # The first calls warm up and record the graph; the last one replays it.
    for _ in range(1 if sizes.is_smoke else 4):
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        gradient = gradient_of(model, tokens, reduced).clone()
    yield CheckRow("gradient", relative_error(gradient, expected), "relative error", 1e-4)


@torch.inference_mode()
def compare_decoding(sizes: Sizes) -> Iterator[CheckRow]:
    """Compare the hidden states of several compiled decoding steps, at two batch sizes."""
    for batch in (1, 8):
        torch._dynamo.reset()
        hidden = []
        for is_compiled in (False, True):
            model = sizes.checked.model(sizes.device).eval()
            model.has_compiled_layers = is_compiled
            cache, steps = started_decoding(model, sizes.checked, batch)
            hidden.append(torch.cat([model.hidden(step, cache) for step in steps], dim=1))
        error = relative_error(*reversed(hidden))
        yield CheckRow(f"batch {batch}, hidden states", error, "relative error", 1e-4)
        if sizes.is_smoke:
            return


@torch.inference_mode()
def compare_graph(sizes: Sizes) -> Iterator[CheckRow]:
    """Compare the logits of a replayed CUDA graph, at two batch sizes.

    Raises:
        UnavailableError: Without CUDA.
    """
    if sizes.device.type != "cuda":
        raise UnavailableError("needs CUDA")
    model = sizes.checked.model(sizes.device).eval()
    for batch in (1, 8):
        cache, steps = started_decoding(model, sizes.checked, batch)
        expected = torch.cat(
            [model.image_logits(model.hidden(step, cache)) for step in steps], dim=1
        )
        cache, steps = started_decoding(model, sizes.checked, batch)
        graph = GraphedStep(model, cache, run_layer)
        replayed = torch.cat([graph(step).clone() for step in steps], dim=1)
        error = relative_error(replayed, expected)
        yield CheckRow(f"batch {batch}, logits", error, "relative error", 1e-5)


def started_decoding(
    model: MaskedDecoder, geometry: Geometry, batch: int, num_steps: int = NUM_DECODING_STEPS
) -> tuple[KeyValueCache, tuple[Tensor, ...]]:
    """Return a cache that holds one text, and random image tokens ``(batch, 1)`` for each step."""
    device = model.final_norm.weight.device
    left = geometry.tokens(1, device)[:, : geometry.layout.left_text_length]
    cache = model.new_cache(1, num_positions=left.shape[1])
    model.hidden(left, cache)
    generator = torch.Generator().manual_seed(1)
    shape = (batch, num_steps)
    tokens = torch.randint(geometry.vocabulary.codebook_size, shape, generator=generator)
    cache = cache.expand_samples(batch, num_positions=num_steps)
    return cache, torch.split(tokens.to(device), 1, dim=1)


class GraphedStep:
    """A decoding step recorded as a CUDA graph, with all layers and the head.

    The graph is replayed at each position and works on fixed memory. Before a replay, three inputs
    are copied there: the embedded tokens, the position of the new keys and values, and the keys to
    read.

    Args:
        model: The decoder.
        cache: A cache that holds the prompt and has room for the steps.
        run: The function that runs one layer, such as ``run_layer``.
    """

    def __init__(
        self, model: MaskedDecoder, cache: KeyValueCache, run: Callable[..., Tensor]
    ) -> None:
        self.model, self.cache, self.run_layer = model, cache, run
        views = cache.static_views(model.mask_of_layer)
        weight = model.final_norm.weight
        batch = cache.own.shape[2] * cache.own.shape[4]
        self.x = weight.new_zeros(batch, 1, len(weight))
        self.slot = views[0].slot.clone()
        # Layers with the same mask share one copy.
        self.reads: dict[int, Any] = {
            mask: tuple(read and StaticSelection(*map(_copy, read)) for read in view.reads)
            for mask, view in zip(model.mask_of_layer, views, strict=True)
        }
        self.views = [
            StaticView(view.shared, view.own, self.slot, self.reads[mask])
            for mask, view in zip(model.mask_of_layer, views, strict=True)
        ]
        self._record()

    def _record(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()

    def _step(self) -> Tensor:
        x = self.x
        for layer, view in zip(self.model.layers, self.views, strict=True):
            x = self.run_layer(layer, x, view)
        return self.model.image_logits(self.model.logits_norm(self.model.final_norm(x)))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits after tokens ``(B, 1)``; the next call overwrites them."""
        self.x.copy_(self.model.embed(tokens, self.cache.length))
        views = self.cache.static_views(self.model.mask_of_layer)
        self.slot.copy_(views[0].slot)
        for mask, view in dict(zip(self.model.mask_of_layer, views, strict=True)).items():
            for copies, selection in zip(self.reads[mask], view.reads, strict=True):
                for target, source in zip(copies or (), selection or (), strict=True):
                    if source is not None:
                        target.copy_(source)
        self.graph.replay()
        self.cache.length += 1
        return self.logits


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
