"""Our implementations of one training step of the decoder or the VQ-GAN.

A step is the same as in this project's training: losses, backward pass, gradient clipping and
optimizers.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rudolph.benchmarks.benchmark_case import (
    BenchmarkCase,
    load_case_decoder,
    load_case_inputs,
    load_case_vqgan,
)
from rudolph.benchmarks.decoding_workload import module_bytes
from rudolph.benchmarks.serving import WorkResult
from rudolph.training.losses import reconstruction_loss, segment_losses, weighted_mean
from rudolph.training.optim import OptimConfig, build_optimizers, clip_gradients


def autocast_for(dtype_name: str) -> AbstractContextManager[object]:
    """Return the autocast context of a forward pass; bfloat16 as in Lightning's ``bf16-mixed``."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype_name == "bfloat16")


class TrainingStep:
    """A model with the optimizers that update it."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.model, self.config = model, config
        self.optimizers = build_optimizers(model, config)

    def step(self, loss: Tensor) -> None:
        """Backpropagate a loss, clip the gradients and update the weights."""
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(self.optimizers, self.config)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class DecoderTrainingWorkload:
    """One training step on ``(B, T)`` tokens, with a loss on every segment."""

    def __init__(self, case: BenchmarkCase, dtype_name: str, folder: Path) -> None:
        self.case, self.dtype_name = case, dtype_name
        self.model = load_case_decoder(case, folder)
        self.tokens = load_case_inputs(folder)["tokens"]
        self.stepping = TrainingStep(self.model, case.optim)
        self.weights_bytes = module_bytes(self.model)
        self.versions: dict[str, str] = {}

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Run one training step; units are tokens."""
        self.model.train()
        with autocast_for(self.dtype_name):
            losses = segment_losses(self.model, self.tokens, self.case.losses)
            loss = weighted_mean(losses, self.case.losses.weights)
        self.stepping.step(loss)
        return WorkResult(self.tokens.numel())

    def cache_bytes(self) -> int:
        """Return 0: training has no cache."""
        return 0

    def check(self, path: Path) -> None:
        """Write the logits on the checked tokens to ``path``."""
        with torch.no_grad():
            logits = self.model.eval()(load_case_inputs(path.parent)["checked"])
        save_file({"logits": logits.float()}, path)


class VQGANWorkload:
    """Encoding, decoding and one training step of the VQ-GAN."""

    def __init__(self, case: BenchmarkCase, dtype_name: str, folder: Path) -> None:
        self.case, self.dtype_name = case, dtype_name
        self.model = load_case_vqgan(case, folder)
        # Inference holds the weights in the dtype that it computes in.
        dtype = torch.bfloat16 if dtype_name == "bfloat16" else torch.float32
        self.sampled = load_case_vqgan(case, folder).to(dtype)
        inputs = load_case_inputs(folder)
        self.images, self.indices = inputs["images"], inputs["indices"]
        self.stepping = TrainingStep(self.model, case.vqgan_optim)
        self.weights_bytes = module_bytes(self.model)
        self.versions: dict[str, str] = {}

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Run one part: ``encode``, ``decode`` or ``train``; units are images."""
        if part == "encode":
            self.sampled.encode_indices(self.images)
        elif part == "decode":
            self.sampled.decode_indices(self.indices)
        else:
            self.step()
        return WorkResult(len(self.images))

    def step(self) -> None:
        """Run one training step on reconstruction and quantizer losses."""
        images = 2 * self.images - 1
        with autocast_for(self.dtype_name):
            output = self.model.train()(images)
        loss = reconstruction_loss(output.images, images, self.case.vqgan_losses)
        self.stepping.step(loss + self.case.vqgan_losses.quantizer_weight * output.loss.float())

    def cache_bytes(self) -> int:
        """Return 0: the VQ-GAN has no cache."""
        return 0

    def check(self, path: Path) -> None:
        """Write the image decoded from the first fixed indices to ``path``."""
        images = self.sampled.decode_indices(load_case_inputs(path.parent)["indices"][:1])
        save_file({"images": images.float()}, path)
