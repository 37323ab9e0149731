"""Implementations that make one training step of the decoder or of the VQ-GAN: ours.

A step is what a training of this project does: losses, backward, clipped gradients, optimizers.
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
from rudolph.training.optim import OptimConfig, clip_gradients, optimizers_of


def autocast_for(kind: str) -> AbstractContextManager[object]:
    """What a forward pass is computed in: bfloat16 as Lightning's ``bf16-mixed`` does it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16")


class TrainingStep:
    """A model and its optimizers, moved by a loss."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.model, self.config = model, config
        self.optimizers = optimizers_of(model, config)

    def step(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(self.optimizers, self.config)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class DecoderTrainingWorkload:
    """One step on ``(B, T)`` tokens, every segment scored."""

    def __init__(self, case: BenchmarkCase, kind: str, folder: Path) -> None:
        self.case, self.kind = case, kind
        self.model = load_case_decoder(case, folder)
        self.tokens = load_case_inputs(folder)["tokens"]
        self.stepping = TrainingStep(self.model, case.optim)
        self.weights_bytes = module_bytes(self.model)
        self.versions: dict[str, str] = {}

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        self.model.train()
        with autocast_for(self.kind):
            losses = segment_losses(self.model, self.tokens, self.case.losses)
            loss = weighted_mean(losses, self.case.losses.weights)
        self.stepping.step(loss)
        return WorkResult(self.tokens.numel())

    def cache_bytes(self) -> int:
        return 0

    def check(self, path: Path) -> None:
        with torch.no_grad():
            logits = self.model.eval()(load_case_inputs(path.parent)["checked"])
        save_file({"logits": logits.float()}, path)


class VQGANWorkload:
    """The VQ-GAN: images to indices, indices to images, one step on its loss."""

    def __init__(self, case: BenchmarkCase, kind: str, folder: Path) -> None:
        self.case, self.kind = case, kind
        self.model = load_case_vqgan(case, folder)
        # Sampling holds the weights in the precision that it computes in.
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        self.sampled = load_case_vqgan(case, folder).to(dtype)
        inputs = load_case_inputs(folder)
        self.images, self.indices = inputs["images"], inputs["indices"]
        self.stepping = TrainingStep(self.model, case.vqgan_optim)
        self.weights_bytes = module_bytes(self.model)
        self.versions: dict[str, str] = {}

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        if part == "encode":
            self.sampled.encode_indices(self.images)
        elif part == "decode":
            self.sampled.decode_indices(self.indices)
        else:
            self.step()
        return WorkResult(len(self.images))

    def step(self) -> None:
        images = 2 * self.images - 1
        with autocast_for(self.kind):
            found = self.model.train()(images)
        loss = reconstruction_loss(found.images, images, self.case.vqgan_losses)
        self.stepping.step(loss + self.case.vqgan_losses.quantizer_weight * found.loss.float())

    def cache_bytes(self) -> int:
        return 0

    def check(self, path: Path) -> None:
        images = self.sampled.decode_indices(load_case_inputs(path.parent)["indices"][:1])
        save_file({"images": images.float()}, path)
