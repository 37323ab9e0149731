"""Table of all released checkpoints: location, contents and the other files that they need.

Each configuration has the arguments of the published package's constructor.  A name therefore
suffices to build the model.

To add a release, write its row in ``RELEASED``.

Source: the registries of ``rudolph`` 0.0.1rc10, ``rudalle`` 1.1.3 and ``ruclip`` 0.0.2, and the
files' pages on the Hugging Face hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UTILS = "shonenkov/rudalle-utils"
TOKENIZER = "rudalle-tokenizer"
IMAGE_TOKENIZER = "Sber-VQGAN"
NUM_BPE = 16384
NUM_CODES = 8192
DECODER_NEEDS = (IMAGE_TOKENIZER, TOKENIZER)


@dataclass(frozen=True)
class Release:
    """One released file.

    ``needs`` names the other releases that a pipeline of this one requires.  ``companions`` are
    further files of the same repository that are stored next to the weights.  ``num_parameters``
    is None for a tokenizer.
    """

    family: str
    repository: str
    file: str
    megabytes: int
    config: Mapping[str, Any]
    num_parameters: int | None = None
    needs: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    is_gated: bool = False
    licence: str = "Apache-2.0"
    note: str = ""


def decoder_shape(num_layers: int, hidden_size: int, num_heads: int) -> dict[str, int]:
    """Return the sizes of a decoder, keyed by the argument names of the published package."""
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
    }


def rudolph_release(
    repository: str,
    megabytes: int,
    num_parameters: int,
    *,
    shape: tuple[int, int, int],
    lengths: tuple[int, int, int],
    kernels: tuple[int, int] = (7, 9),
    specials: tuple[int, int] = (0, 0),
    note: str = "",
) -> Release:
    """Return the release of a RUDOLPH, a decoder of text, image and text.

    Args:
        repository: the repository on the hub.
        megabytes: the size of the file.
        num_parameters: the number of parameters.
        shape: number of layers, hidden size and number of heads.
        lengths: tokens of the left text, image tokens per side, and tokens of the right text.
        kernels: kernel sizes of the conv masks and of the last layer's conv mask.
        specials: numbers of special tokens of text and of image.
        note: a remark for the user.
    """
    left, side, right = lengths
    config = {
        **decoder_shape(*shape),
        "l_text_seq_length": left,
        "image_tokens_per_dim": side,
        "r_text_seq_length": right,
        "kernel_size": kernels[0],
        "last_kernel_size": kernels[1],
        "vocab_size": NUM_BPE + left,
        "image_vocab_size": NUM_CODES,
        "text_special_tokens": specials[0],
        "image_special_tokens": specials[1],
    }
    return Release(
        "rudolph",
        repository,
        "pytorch_model.bin",
        megabytes,
        config,
        num_parameters,
        needs=DECODER_NEEDS,
        note=note,
    )


def rudalle_release(
    repository: str,
    file: str,
    *,
    version: str = "v3",
    shape: tuple[int, int, int] = (24, 2048, 16),
    megabytes: int = 2625,
    num_parameters: int = 1_310_410_880,
    is_gated: bool = False,
    note: str = "",
) -> Release:
    """Return the release of a ruDALL-E, a decoder of text and image.

    Args:
        repository: the repository on the hub.
        file: the file in the repository.
        version: the reference's ``hf_version``.
        shape: number of layers, hidden size and number of heads.
        megabytes: the size of the file.
        num_parameters: the number of parameters.
        is_gated: whether the hub requires approved access.
        note: a remark for the user.
    """
    config = {
        **decoder_shape(*shape),
        "text_seq_length": 128,
        "image_tokens_per_dim": 32,
        "vocab_size": NUM_BPE + 128,
        "image_vocab_size": NUM_CODES,
        "hf_version": version,
        # The reference's registry turns both on, although its constructor leaves them off.
        "cogview_sandwich_layernorm": True,
        "cogview_pb_relax": True,
    }
    return Release(
        "rudalle",
        repository,
        file,
        megabytes,
        config,
        num_parameters,
        needs=DECODER_NEEDS,
        is_gated=is_gated,
        note=note,
    )


def ruclip_release(patch: int, side: int, megabytes: int, num_parameters: int) -> Release:
    """Return the release of a ruCLIP: the large one if patches have 14 pixels, else the base one.

    Args:
        patch: the side of a patch, in pixels.
        side: the side of an image, in pixels.
        megabytes: the size of the file.
        num_parameters: the number of parameters.
    """
    is_large = patch == 14
    config = {
        "embed_dim": 768 if is_large else 512,
        "image_resolution": side,
        "vision_layers": 24 if is_large else 12,
        "vision_width": 1024 if is_large else 768,
        "vision_patch_size": patch,
        "context_length": 77,
        "vocab_size": 49408,
        "transformer_width": 768 if is_large else 512,
        "transformer_heads": 12 if is_large else 8,
        "transformer_layers": 12,
    }
    size = "large" if is_large else "base"
    return Release(
        "ruclip",
        f"ai-forever/ruclip-vit-{size}-patch{patch}-{side}",
        "pytorch_model.bin",
        megabytes,
        config,
        num_parameters,
        companions=("bpe.model",),
    )


def realesrgan_release(scale: int, num_parameters: int) -> Release:
    """Return the release of the Real-ESRGAN upscaler with this scale."""
    return Release(
        "realesrgan",
        "ai-forever/Real-ESRGAN",
        f"RealESRGAN_x{scale}.pth",
        67,
        {"scale": scale, "num_feat": 64, "num_block": 23, "num_grow_ch": 32},
        num_parameters,
        licence="BSD-3-Clause",
    )


def vqgan_release(file: str, megabytes: int, num_parameters: int, *, has_wavelet: bool) -> Release:
    """Return the release of a Sber VQ-GAN; ``has_wavelet`` doubles the side of its images."""
    shape = {
        "double_z": False,
        "z_channels": 256,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 1, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [32],
        "dropout": 0.0,
    }
    params = {"ddconfig": shape, "embed_dim": 256, "n_embed": NUM_CODES, "kl_weight": 1e-8}
    config = {"dwt": has_wavelet, "model": {"params": params}}
    note = "its images are twice as large" if has_wavelet else ""
    return Release("vqgan", UTILS, file, megabytes, config, num_parameters, note=note)


RELEASED: dict[str, Release] = {
    "RUDOLPH-350M": rudolph_release(
        "shonenkov-AI/RuDOLPH-350M-v2",
        710,
        354_638_656,
        shape=(24, 1024, 16),
        lengths=(64, 16, 64),
        specials=(384, 384),
        note="the registry's 350M, also called v2",
    ),
    "RUDOLPH-350M-v1": rudolph_release(
        "ai-forever/RUDOLPH-350M",
        707,
        353_065_024,
        shape=(24, 1024, 16),
        lengths=(64, 16, 64),
        note="no special tokens; its file may hide left text from right text",
    ),
    "RUDOLPH-1.3B": rudolph_release(
        "ai-forever/RUDOLPH-1.3B",
        2650,
        1_319_327_936,
        shape=(24, 2048, 16),
        lengths=(128, 32, 128),
        kernels=(9, 11),
        specials=(2048, 64),
    ),
    "RUDOLPH-2.7B": rudolph_release(
        "ai-forever/RUDOLPH-2.7B",
        5330,
        2_657_731_968,
        shape=(32, 2560, 32),
        lengths=(384, 24, 128),
        specials=(1024, 1024),
    ),
    "RUDOLPH-2.7B-FBC2": rudolph_release(
        "ai-forever/RUDOLPH-2.7B-FBC2",
        5320,
        2_657_731_968,
        shape=(32, 2560, 32),
        lengths=(384, 24, 128),
        specials=(1024, 1024),
        note="fine-tuned on the six tasks of Fusion Brain Challenge 2",
    ),
    "Malevich": rudalle_release("ai-forever/rudalle-Malevich", "pytorch_model_v3.bin"),
    "Malevich-v2": rudalle_release(
        "ai-forever/rudalle-Malevich", "pytorch_model_v2.bin", version="v2"
    ),
    "Emojich": rudalle_release("ai-forever/rudalle-Emojich", "pytorch_model.bin", version="v2"),
    "Surrealist-XL": rudalle_release("shonenkov-AI/rudalle-xl-surrealist", "pytorch_model.bin"),
    "Kandinsky": rudalle_release(
        "ai-forever/rudalle-Kandinsky",
        "pytorch_model.bin",
        shape=(64, 3840, 60),
        megabytes=23_000,
        num_parameters=11_519_306_624,
        is_gated=True,
        note="12B; access is asked for on its page",
    ),
    "ruclip-vit-base-patch32-224": ruclip_release(32, 224, 605, 151_277_313),
    "ruclip-vit-base-patch16-224": ruclip_release(16, 224, 598, 149_620_737),
    "ruclip-vit-large-patch14-224": ruclip_release(14, 224, 1710, 427_616_513),
    "ruclip-vit-base-patch32-384": ruclip_release(32, 384, 605, 151_350_273),
    "ruclip-vit-large-patch14-336": ruclip_release(14, 336, 1712, 427_944_193),
    "ruclip-vit-base-patch16-384": ruclip_release(16, 384, 600, 149_912_577),
    IMAGE_TOKENIZER: vqgan_release(
        "vqgan.gumbelf8-sber.model.ckpt", 346, 68_995_971, has_wavelet=False
    ),
    "Sber-VQGAN-DWT": vqgan_release(
        "vqgan.gumbelf8-sber-dwt.model.ckpt", 277, 69_072_140, has_wavelet=True
    ),
    "RealESRGAN-x2": realesrgan_release(2, 16_703_171),
    "RealESRGAN-x4": realesrgan_release(4, 16_697_987),
    "RealESRGAN-x8": realesrgan_release(8, 16_734_915),
    TOKENIZER: Release("tokenizer", UTILS, "bpe.model", 1, {}, note="BPE of 16,384 ids"),
}
