"""Our implementations of sampling image tokens for a fixed text, one per weight format.

Shapes: B images, L left-text tokens, I image tokens.
"""

import gc
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rudolph.benchmarks.benchmark_case import BenchmarkCase, load_case_decoder, load_case_inputs
from rudolph.benchmarks.serving import WorkResult, tensor_bytes
from rudolph.data.seeds import mixed_seed
from rudolph.generation.generate import generate_image
from rudolph.models.cpu.prepacked_linear import Kernel, prepack
from rudolph.models.layers.kv_cache import KeyValueCache
from rudolph.models.rudolph.decoder import MaskedDecoder

# Tokens of a repetition that only warms up or is profiled.
WARM_UP_TOKENS = 16


class StopDecodingError(Exception):
    """Raised to end a decoding loop after the requested number of tokens."""


class DecodingWorkload:
    """Sampling of whole images for one prompt, or of their first ``num_tokens`` tokens."""

    def __init__(self, case: BenchmarkCase, implementation: str, folder: Path) -> None:
        self.case = case
        self.model = prepared_decoder(case, implementation, folder)
        self.prompt = load_case_inputs(folder)["left"][None]
        self.weights_bytes = module_bytes(self.model)
        self.versions: dict[str, str] = {}
        self._cache_bytes = 0

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Sample ``batch_size`` images.

        A short repetition samples at most ``WARM_UP_TOKENS`` tokens per image.  The cache is
        measured only in short repetitions and in the memory workload.
        """
        size = self.case.speed.batch_size
        num_tokens = (
            min(WARM_UP_TOKENS, self.case.num_tokens) if is_short else self.case.num_tokens
        )

        def on_token(done: int) -> None:
            if done == num_tokens and (is_short or self.case.speed.workload == "memory"):
                self._cache_bytes = live_cache_bytes()
            if done == num_tokens < self.case.layout.num_image_tokens:
                raise StopDecodingError

        with suppress(StopDecodingError):
            generate_image(
                self.model,
                self.prompt,
                config=self.case.sampling,
                seeds=[mixed_seed(self.case.seed, row) for row in range(size)],
                on_token=on_token,
            )
        return WorkResult(size * num_tokens)

    def cache_bytes(self) -> int:
        """Return the bytes of the key/value cache in the last measured repetition."""
        return self._cache_bytes

    def check(self, path: Path) -> None:
        """Write the logits on the checked tokens to ``path``."""
        with torch.no_grad():
            logits = self.model(load_case_inputs(path.parent)["checked"])
        save_file({"logits": logits.float()}, path)


def prepared_decoder(case: BenchmarkCase, implementation: str, folder: Path) -> MaskedDecoder:
    """Load the decoder and pack its weights for decoding.

    Args:
        case: The case to run.
        implementation: The weight format.  With the prefix ``compiled_``, each layer's decoding
            step is compiled.
        folder: The folder that ``prepare_case`` filled.
    """
    model, weights = load_case_decoder(case, folder), implementation.removeprefix("compiled_")
    prepack(
        model,
        weights=weights,
        num_rows=case.speed.batch_size,
        is_compiled=weights != implementation,
    )
    return model


def live_cache_bytes() -> int:
    """Return the bytes of all key/value caches alive in this process."""
    caches = [item for item in gc.get_objects() if type(item) is KeyValueCache]
    return tensor_bytes(t for cache in caches for t in (cache.own, cache.shared) if t is not None)


def module_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors of a module, including those that are not parameters."""
    tensors = [tensor for module in model.modules() for tensor in iter_tensors(vars(module))]
    packed = [tensor for tensor in tensors if isinstance(tensor, torch.ScriptObject)]
    return tensor_bytes(tensor for tensor in tensors if isinstance(tensor, Tensor)) + sum(
        packed_bytes(tensor) for tensor in packed
    )


def packed_bytes(packed: torch.ScriptObject) -> int:
    """Return the bytes of a weight packed by fbgemm, at 8 or 16 bits per number."""
    with warnings.catch_warnings():
        # torch warns that it will drop quantized tensors, and this call creates one.
        warnings.simplefilter("ignore")
        weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0]
    return weight.numel() * (1 if weight.is_quantized else 2)


def iter_tensors(value: object) -> list[Tensor | torch.ScriptObject]:
    """Return the tensors and packed weights in nested mappings, lists and kernels."""
    if isinstance(value, Tensor | torch.ScriptObject):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in iter_tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in iter_tensors(item)]
    return iter_tensors(value.weight) if isinstance(value, Kernel) else []
