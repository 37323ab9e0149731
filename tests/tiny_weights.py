"""Folders of small random weights of every released kind, as ``--model`` and stages open them."""

from pathlib import Path
from typing import Any

import torch

from rudolph.checkpoints import store
from rudolph.models.reference import REFERENCE_FAMILIES, to_reference
from rudolph.sequence.tokenizer import Tokenizer

WORDS = "красный синий зелёный круг квадрат на картинке фото изображение"
LEFT, SIDE, CODES = 12, 4, 24
DECODER = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "image_tokens_per_dim": SIDE,
    "image_vocab_size": CODES,
}
RUDOLPH = {
    "l_text_seq_length": LEFT,
    "r_text_seq_length": 9,
    "kernel_size": 3,
    "last_kernel_size": 3,
    "text_special_tokens": 6,
    "image_special_tokens": 1,
}
VQGAN = {
    "resolution": 8,
    "ch": 4,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "z_channels": 4,
}
CODEBOOK = {"embed_dim": 4, "n_embed": CODES, "kl_weight": 1e-8}
CLIP = {
    "embed_dim": 8,
    "image_resolution": 8,
    "vision_layers": 1,
    "vision_width": 8,
    "vision_patch_size": 4,
    "context_length": 16,
    "transformer_width": 8,
    "transformer_heads": 2,
    "transformer_layers": 1,
}
UPSCALER = {"num_feat": 4, "num_block": 1, "num_grow_ch": 2}
# Name, family and constructor arguments; the tokenizer determines the vocabulary size.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rudolph": ("rudolph", DECODER | RUDOLPH),
    "rudalle_v2": ("rudalle", DECODER | {"text_seq_length": LEFT, "hf_version": "v2"}),
    "rudalle_v3": ("rudalle", DECODER | {"text_seq_length": LEFT, "hf_version": "v3"}),
    "vqgan": ("vqgan", {"model": {"params": {"ddconfig": VQGAN, **CODEBOOK}}}),
    "clip": ("ruclip", CLIP),
    "x2": ("realesrgan", UPSCALER | {"scale": 2}),
    "x4": ("realesrgan", UPSCALER | {"scale": 4}),
}


def write_weights(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    """Write one model with its tokenizer, and a decoder also with its VQ-GAN."""
    torch.manual_seed(len(name))
    family, config = KINDS[name]
    is_decoder = family in ("rudolph", "rudalle")
    # The reference counts the padding ids of a decoder's left text.
    vocab_size = tokenizer.vocab_size + (LEFT if is_decoder else 0)
    model = REFERENCE_FAMILIES[family].build(config | {"vocab_size": vocab_size})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    family, config, tensors = to_reference(model)
    store.write_checkpoint(folder, tensors, family=family, config=config)
    tokenizer.save(folder / store.TOKENIZER_FILE)
    if is_decoder:
        write_weights(folder / "vqgan", "vqgan", tokenizer)


def write_all(home: Path) -> Path:
    """Write one folder per kind below ``home``."""
    tokenizer = Tokenizer.train([WORDS], vocab_size=90, path=home / "bpe.model")
    for name in KINDS:
        write_weights(home / name, name, tokenizer)
    return home
