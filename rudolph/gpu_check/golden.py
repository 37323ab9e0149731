"""Check of this device against golden outputs of the reference packages.

Models run in float32 without TF32.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.generate import generate_image
from rudolph.gpu_check.rows import Case, CheckRow, UnavailableError
from rudolph.gpu_check.sizes import Sizes
from rudolph.models.reference import from_reference
from rudolph.training.losses import DecoderLossConfig, segment_losses, weighted_mean

PARITY = Path(__file__).resolve().parents[2] / "tests" / "parity"
GOLDEN_FAMILIES = {
    "rudolph_350m_like": "rudolph",
    "rudolph_plain_norms": "rudolph",
    "rudolph_v1_no_specials": "rudolph",
    "rudalle_v2": "rudalle",
    "rudalle_v3": "rudalle",
    "sber_vqgan": "vqgan",
    "sber_vqgan_dwt": "vqgan",
    "ruclip": "ruclip",
    "realesrgan_x2": "realesrgan",
    "realesrgan_x4": "realesrgan",
    "realesrgan_x8": "realesrgan",
}
# The golden data was computed on a CPU; CUDA sums in another order, so its limit is larger.
MAX_ABSOLUTE_ERROR = {"cpu": 1e-5, "cuda": 1e-4}

Io = Mapping[str, Tensor]


def golden(sizes: Sizes) -> Iterator[Case]:
    """Yield one case per model of the golden data."""
    for name in GOLDEN_FAMILIES:
        yield Case(name, partial(compare_golden, name, sizes.device))


@torch.no_grad()
def compare_golden(name: str, device: torch.device) -> Iterator[CheckRow]:
    """Yield one row per output of a model.

    The number in a row is the largest absolute error for float outputs, and the number of
    differing tokens for token outputs.

    Raises:
        UnavailableError: Without the golden data in ``tests/parity``.
    """
    folder = PARITY / name
    if not folder.is_dir():
        raise UnavailableError("needs tests/parity of the repository")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    weights, io = (load_file(folder / f"{part}.safetensors") for part in ("weights", "io"))
    # In these files, uint8 tensors are booleans.
    weights = {
        key: value.bool() if value.dtype == torch.uint8 else value
        for key, value in weights.items()
    }
    model = from_reference(GOLDEN_FAMILIES[name], config, weights).eval().to(device)
    io = {key: value.to(device) for key, value in io.items()}
    for output, actual in OUTPUTS[GOLDEN_FAMILIES[name]](model, io):
        expected = io[output]
        if actual.dtype == torch.int64:
            num_differing = (actual != expected).sum().item()
            yield CheckRow(output, num_differing, "differing tokens", limit=0)
        else:
            error = (actual - expected).abs().max().item()
            yield CheckRow(output, error, "largest error", limit=MAX_ABSOLUTE_ERROR[device.type])


def rudolph_outputs(model: Any, io: Io) -> Iterator[tuple[str, Tensor]]:
    """Yield the logits, loss, gradient and greedy image tokens of a RUDOLPH model."""
    tokens, left = io["tokens"], model.layout.left_text_length
    yield "logits", model(tokens)
    yield "logits_left", model(tokens[:, :left])
    yield "logits_left_image", model(tokens[:, : model.layout.right_text_start])
    config = DecoderLossConfig(first_image_token="legacy")
    losses = segment_losses(model, tokens, config)
    yield "loss_w_1_7_1", weighted_mean(losses, config.weights)
    if "grad_qkv_0" in io:
        with torch.enable_grad():
            weighted_mean(segment_losses(model, tokens, config), config.weights).backward()  # type: ignore[no-untyped-call]
        yield "grad_qkv_0", model.layers[0].to_qkv.weight.grad
    if "greedy_image" in io:
        greedy, seeds = TokenSamplingConfig(top_k=1), range(len(tokens))
        generated = generate_image(model, tokens[:, :left], config=greedy, seeds=seeds)
        yield "greedy_image", generated


def rudalle_outputs(model: Any, io: Io) -> Iterator[tuple[str, Tensor]]:
    """Yield the logits and loss of a ruDALL-E model."""
    tokens = io["tokens"]
    yield "logits", model(tokens)
    yield "logits_text", model(tokens[:, : model.layout.left_text_length])
    config = DecoderLossConfig(1, 7, 0, first_image_token="legacy")
    yield "loss", weighted_mean(segment_losses(model, tokens, config), config.weights)


def vqgan_outputs(model: Any, io: Io) -> Iterator[tuple[str, Tensor]]:
    """Yield the indices and decoded images of a VQ-GAN."""
    yield "indices", model.encode_indices(io["images"])
    # Decode the golden indices, so that a tie between codes does not count as two errors.
    yield "decoded", model.decode_indices(io["indices"])


def ruclip_outputs(model: Any, io: Io) -> Iterator[tuple[str, Tensor]]:
    """Yield the logits and features of a ruCLIP model."""
    yield "logits_per_image", model(io["input_ids"], io["pixel_values"])[0]
    yield "text_features", model.encode_text(io["input_ids"])
    yield "image_features", model.encode_image(io["pixel_values"])


def realesrgan_outputs(model: Any, io: Io) -> Iterator[tuple[str, Tensor]]:
    """Yield the output of an upscaler."""
    yield "upscaled", model(io["images"])


OUTPUTS = {
    "rudolph": rudolph_outputs,
    "rudalle": rudalle_outputs,
    "vqgan": vqgan_outputs,
    "ruclip": ruclip_outputs,
    "realesrgan": realesrgan_outputs,
}
