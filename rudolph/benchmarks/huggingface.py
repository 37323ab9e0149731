"""Implementation of decoding with Hugging Face's GPT-2.

The GPT-2 has our decoder's depth, width and number of heads, dense attention, its own decoding
loop and a static cache. It computes in bfloat16 if the processor multiplies it natively, else in
float32. Its vocabulary has the size of our image vocabulary, so its head does the same work as
ours.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rudolph.benchmarks.benchmark_case import BenchmarkCase
from rudolph.benchmarks.decoding_workload import WARM_UP_TOKENS, iter_tensors, module_bytes
from rudolph.benchmarks.serving import WorkResult, tensor_bytes


class HuggingFaceDecoding:
    """``generate`` of as many tokens as ours samples, after a prompt as long as the left text."""

    def __init__(self, case: BenchmarkCase, implementation: str, folder: Path) -> None:
        import transformers

        self.case, config = case, case.decoder
        shape = transformers.GPT2Config(
            n_layer=config.num_layers,
            n_embd=config.hidden_size,
            n_head=config.num_heads,
            n_positions=case.layout.length,
            vocab_size=case.vocabulary.image_size,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        make = transformers.AutoModelForCausalLM.from_config
        dtype = torch.bfloat16 if case.speed.has_bfloat16 else torch.float32
        self.model: Any = make(shape, dtype=dtype).eval()
        size = case.speed.batch_size, case.layout.left_text_length
        generator = torch.Generator().manual_seed(case.seed)
        self.prompt = torch.randint(1, shape.vocab_size, size, generator=generator)
        self.weights_bytes = module_bytes(self.model)
        self.versions = {"transformers": transformers.__version__}
        self._cache_bytes = 0

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Sample one batch; a short repetition samples at most ``WARM_UP_TOKENS`` per image."""
        sampling, max_tokens = self.case.sampling, self.case.num_tokens
        num_tokens = min(WARM_UP_TOKENS, max_tokens) if is_short else max_tokens
        with torch.inference_mode():
            output = self.model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k or 0,
                top_p=sampling.top_p or 1.0,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                cache_implementation="static",
                # Short repetitions allocate the full cache too, so that they warm up what is
                # timed.
                max_cache_len=self.case.layout.length,
                disable_compile=True,
                return_dict_in_generate=True,
            )
        layers = output.past_key_values.layers
        tensors = [tensor for layer in layers for tensor in iter_tensors(vars(layer))]
        self._cache_bytes = tensor_bytes(
            tensor for tensor in tensors if isinstance(tensor, Tensor)
        )
        return WorkResult(len(self.prompt) * num_tokens)

    def cache_bytes(self) -> int:
        """Return the bytes of the key/value cache in the last repetition."""
        return self._cache_bytes

    def check(self, path: Path) -> None:
        """Write an empty file: this model has no weights in common with ours."""
        save_file({}, path)
