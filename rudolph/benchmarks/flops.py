"""How much work a unit is: bytes that must be read, products that must be done.

Both are what the task needs, not what an implementation does, and the same for every
implementation but for the width of its weights; so a share of the machine's limit falls with
needless work.

Shapes: B images or sequences, T tokens, D hidden size, L layers, V vocabulary.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from rudolph.benchmarks.benchmark_case import BenchmarkCase
from rudolph.benchmarks.config import TRANSFORMERS
from rudolph.models.upscaler import Upscaler, UpscalerConfig
from rudolph.models.vqgan.model import VQGAN
from rudolph.sequence.masks import mask_table, parse_mask

# Bytes of a weight and of a key's or value's number.
WIDTHS = {
    "reference": (4, 4),
    "float32": (4, 4),
    "half": (2, 4),
    "int8": (1, 4),
    "transformers": (2, 2),
    # On a GPU weights and cache are held in the same type.
    "bfloat16": (2, 2),
    "float16": (2, 2),
}


def layer_weights(case: BenchmarkCase) -> int:
    """Weights of the layers' matrices: 12 D^2 a layer; biases and norms are left out."""
    return 12 * case.decoder.hidden_size**2 * case.decoder.num_layers


def decode_bytes(case: BenchmarkCase, implementation: str) -> float:
    """What drawing one token of one image must read, in bytes.

    Weights of the layers and of the image's part of the head, and keys and values of the text,
    once for the whole batch; those that the masks let an image token see of the image, the mean
    over its positions.
    """
    if implementation == TRANSFORMERS and not case.speed.has_bfloat16:
        implementation = "float32"
    of_weight, of_key = WIDTHS[implementation.removeprefix("compiled_")]
    head = case.vocabulary.codebook_size * case.decoder.hidden_size
    weights = (layer_weights(case) + head) * of_weight / case.speed.batch_size
    keys = sum(attended_keys(case, mask) for mask in case.decoder.masks)
    return weights + 2 * keys * case.decoder.hidden_size * of_key


def attended_keys(case: BenchmarkCase, mask: str) -> float:
    """Keys that one of the drawn image tokens sees on average; the text's shared by the batch."""
    start = case.layout.image_start
    table = mask_table(parse_mask(mask), case.layout)[start : start + case.num_tokens]
    of_text, of_image = table[:, :start], table[:, start:]
    seen = of_text.sum(1) / case.speed.batch_size + of_image.sum(1)
    return float(seen.double().mean())


def train_operations(case: BenchmarkCase) -> float:
    """Products and sums that one token of a training step needs.

    Forward and backward of the layers' matrices (6 a weight), of attention over all pairs of
    positions, masked or not (12 T D a layer), and of the head where a segment is scored, over its
    own vocabulary.
    """
    layout, vocabulary = case.layout, case.vocabulary
    size, length = case.decoder.hidden_size, layout.length
    attention = 12 * length * size * case.decoder.num_layers
    num_text = layout.left_text_length + layout.right_text_length
    scored = num_text * vocabulary.text_size + layout.num_image_tokens * vocabulary.image_size
    return 6 * layer_weights(case) + attention + 6 * size * scored / length


def vqgan_operations(case: BenchmarkCase) -> dict[str, float]:
    """Products and sums that each part of the VQ-GAN's work needs for one image, as counted.

    A training step is forward and backward of all, three times the forward pass.
    """
    with torch.device("meta"):
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
    """Products and sums that one image needs, as counted; images have the VQ-GAN's sides."""
    side = case.vqgan.resolution
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        Upscaler(UpscalerConfig()).eval()(torch.empty(1, 3, side, side))
    return float(counted.get_total_flops())
