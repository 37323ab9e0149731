"""Bytes and operations that one unit of work requires.

Both counts follow from the task and not from an implementation. They are equal for all
implementations, except for the width of the weights. Needless work therefore lowers the measured
fraction of the machine's limit.

Shapes: B images or sequences, T tokens, D hidden size, L layers, V vocabulary.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from rudolph.benchmarks.benchmark_case import BenchmarkCase
from rudolph.benchmarks.config import TRANSFORMERS
from rudolph.models.upscaler import Upscaler, UpscalerConfig
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import meta_device
from rudolph.sequence.masks import mask_table, parse_mask

# Bytes per weight, and bytes per element of a key or value.
WIDTHS = {
    "reference": (4, 4),
    "float32": (4, 4),
    "half": (2, 4),
    "int8": (1, 4),
    "transformers": (2, 2),
    # A GPU holds weights and cache in the same dtype.
    "bfloat16": (2, 2),
    "float16": (2, 2),
}


def layer_weights(case: BenchmarkCase) -> int:
    """Return the number of matrix weights in all layers.

    It is 12 D^2 per layer; biases and norms are not counted.
    """
    return 12 * case.decoder.hidden_size**2 * case.decoder.num_layers


def decode_bytes(case: BenchmarkCase, implementation: str) -> float:
    """Return the bytes that must be read to sample one token of one image.

    These are the weights of the layers and of the image part of the head, and the keys and values
    that the token attends to. Weights and text keys are read once per batch. The number of image
    keys is the mean over the image positions, under the masks.

    Args:
        case: The case to count.
        implementation: An implementation with an entry in ``WIDTHS``, compiled or not.
    """
    if implementation == TRANSFORMERS and not case.speed.has_bfloat16:
        implementation = "float32"
    weight_width, key_width = WIDTHS[implementation.removeprefix("compiled_")]
    head = case.vocabulary.codebook_size * case.decoder.hidden_size
    weights = (layer_weights(case) + head) * weight_width / case.speed.batch_size
    keys = sum(attended_keys(case, mask) for mask in case.decoder.masks)
    return weights + 2 * keys * case.decoder.hidden_size * key_width


def attended_keys(case: BenchmarkCase, mask: str) -> float:
    """Return the mean number of keys that a sampled image token attends to.

    Keys of the text are read once per batch, so they are divided by the batch size.
    """
    start = case.layout.image_start
    table = mask_table(parse_mask(mask), case.layout)[start : start + case.num_tokens]
    attended_text, attended_image = table[:, :start], table[:, start:]
    num_attended = attended_text.sum(1) / case.speed.batch_size + attended_image.sum(1)
    return float(num_attended.double().mean())


def train_operations(case: BenchmarkCase) -> float:
    """Return the floating-point operations that a training step requires per token.

    The forward and backward passes of the layers' matrices take 6 operations per weight. Attention
    is counted over all pairs of positions, masked or not: 12 T D per layer. The head is counted at
    each position for the vocabulary of that position's segment.
    """
    layout, vocabulary = case.layout, case.vocabulary
    size, length = case.decoder.hidden_size, layout.length
    attention = 12 * length * size * case.decoder.num_layers
    num_text = layout.left_text_length + layout.right_text_length
    scored = num_text * vocabulary.text_size + layout.num_image_tokens * vocabulary.image_size
    return 6 * layer_weights(case) + attention + 6 * size * scored / length


def vqgan_operations(case: BenchmarkCase) -> dict[str, float]:
    """Return the floating-point operations per image for each part of the VQ-GAN's work.

    torch's ``FlopCounterMode`` counts them. A training step counts as three forward passes: one
    forward, and a backward that costs two.
    """
    with meta_device():
        model = VQGAN(case.vqgan).eval()
        side = case.vqgan.resolution
        images = torch.empty(1, 3, side, side)
        grid = side // case.vqgan.factor
        latents = torch.empty(1, case.vqgan.quantizer.embedding_dim, grid, grid)
        with torch.no_grad(), FlopCounterMode(display=False) as encoding:
            model.quantize.indices(model.quant_conv(model.encoder(images)))
        with torch.no_grad(), FlopCounterMode(display=False) as decoding:
            model.decoder(model.post_quant_conv(latents))
    encode, decode = float(encoding.get_total_flops()), float(decoding.get_total_flops())
    return {"encode": encode, "decode": decode, "train": 3 * (encode + decode)}


def upscaler_operations(case: BenchmarkCase) -> float:
    """Return the floating-point operations of upscaling one image of the VQ-GAN's resolution.

    torch's ``FlopCounterMode`` counts them.
    """
    side = case.vqgan.resolution
    with meta_device(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Upscaler(UpscalerConfig()).eval()(torch.empty(1, 3, side, side))
    return float(counter.get_total_flops())
