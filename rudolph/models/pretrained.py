"""Reference checkpoints into this project's modules.

A table of names for each family says which key of the reference is which of ours; nothing else
differs, so loading is renaming.

Source: RuDOLPH, ``rudolph/model`` (constructor arguments and key names).
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rudolph.models.decoder import DecoderConfig, MaskedDecoder
from rudolph.sequence.layout import SequenceLayout, Vocabulary

RUDOLPH_DEFAULTS = {
    "image_special_tokens": 0,
    "text_special_tokens": 0,
    "kernel_size": 7,
    "last_kernel_size": 9,
    "cogview_sandwich_layernorm": True,
    "cogview_pb_relax": True,
    "attention_dropout_prob": 0.1,
    "output_dropout_prob": 0.1,
}

RUDOLPH_NEEDED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "l_text_seq_length",
    "r_text_seq_length",
    "image_tokens_per_dim",
    "vocab_size",
    "image_vocab_size",
)

RUDOLPH_NAMES = {
    "text_embeddings": "text_embedding",
    "image_embeddings": "image_embedding",
    "l_text_pos_embeddings": "left_position",
    "r_text_pos_embeddings": "right_position",
    "image_row_embeddings": "row_position",
    "image_col_embeddings": "column_position",
    "to_logits.0": "logits_norm",
    "to_logits.1": "to_logits",
    "transformer.final_layernorm": "final_norm",
    "input_layernorm": "attention_norm",
    "before_first_addition_layernorm": "attention_out_norm",
    "before_second_addition_layernorm": "mlp_out_norm",
    "post_attention_layernorm": "mlp_norm",
    "attention.query_key_value": "to_qkv",
    "attention.dense": "to_out",
    "mlp.dense_h_to_4h": "mlp_in",
    "mlp.dense_4h_to_h": "mlp_out",
}

RUDOLPH_MASKS = {"row_mask": 0, "col_mask": 1, "conv_mask": 3, "last_conv_mask": 4}


def rudolph_modules(config: Mapping[str, Any]) -> MaskedDecoder:
    """An empty decoder from the reference constructor's arguments.

    Raises:
        ValueError: naming an argument that the decoder needs and the mapping lacks.
    """
    given = {**RUDOLPH_DEFAULTS, **config}
    for name in RUDOLPH_NEEDED:
        if name not in given:
            raise ValueError(f"rudolph: the config lacks {name}")
    left = given["l_text_seq_length"]
    layout = SequenceLayout(left, given["image_tokens_per_dim"], given["r_text_seq_length"])
    vocabulary = Vocabulary(
        # The reference's vocab_size counts BPE ids and left paddings.
        bpe_size=given["vocab_size"] - left,
        num_text_specials=given["text_special_tokens"],
        num_left_paddings=left,
        codebook_size=given["image_vocab_size"],
        num_image_specials=given["image_special_tokens"],
    )
    decoder = DecoderConfig(
        num_layers=given["num_layers"],
        hidden_size=given["hidden_size"],
        num_heads=given["num_attention_heads"],
        layer_masks=("row", "column", "row", f"conv({given['kernel_size']})"),
        last_layer_mask=f"conv({given['last_kernel_size']})",
        sandwich_norm=given["cogview_sandwich_layernorm"],
        pb_relax=given["cogview_pb_relax"],
        attention_dropout=given["attention_dropout_prob"],
        output_dropout=given["output_dropout_prob"],
    )
    return MaskedDecoder(decoder, layout, vocabulary)


def rudolph_key(key: str) -> str:
    """Our name of a reference key: ``transformer.layers.3.mlp.dense_4h_to_h.bias``.

    Raises:
        ValueError: when the reference has no such key.
    """
    path, _, kind = key.rpartition(".")
    layer = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", path)
    name = RUDOLPH_NAMES.get(layer[2] if layer else path)
    if name is None:
        raise ValueError(f"rudolph: the reference has no tensor {key}")
    return f"layers.{layer[1]}.{name}.{kind}" if layer else f"{name}.{kind}"


def from_reference(
    family: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> nn.Module:
    """A module of this project with the weights of a reference checkpoint.

    Args:
        family: ``rudolph``.
        config: the reference constructor's arguments.
        state_dict: the reference's tensors by its key names.  Stored masks win over the rules.

    Raises:
        ValueError: for an unknown family, or naming the first tensor that is missing, not
            expected or of another shape.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family](config, state_dict)


def rudolph_from_reference(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> MaskedDecoder:
    with torch.device("meta"):
        model = rudolph_modules(config)
    stored = {key for key in state_dict if key.split(".")[-1] in RUDOLPH_MASKS}
    renamed = {rudolph_key(key): value for key, value in state_dict.items() if key not in stored}
    load_exactly(model, renamed, family="rudolph")
    model.register_masks()
    for key in sorted(stored):
        _take_stored_mask(model, key.split(".")[-1], state_dict[key].bool())
    return model


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], *, family: str) -> None:
    """Assign every tensor of a model built on the meta device; none may be left or left over."""
    expected = model.state_dict()
    for key in expected:
        if key not in tensors:
            raise ValueError(f"{family}: the file lacks {key}")
    for key, value in tensors.items():
        if key not in expected:
            raise ValueError(f"{family}: the file has {key}, which the model does not")
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{family}: {key} must be {tuple(expected[key].shape)}, got {tuple(value.shape)}"
            )
    model.load_state_dict(dict(tensors), assign=True)


def _take_stored_mask(model: MaskedDecoder, name: str, stored: Tensor) -> None:
    tables: Any = model.mask_tables
    if stored.shape != tables.shape[1:]:
        raise ValueError(
            f"rudolph: {name} must be {tuple(tables.shape[1:])}, got {tuple(stored.shape)}"
        )
    masks = (*model.config.layer_masks, model.config.last_layer_mask or "")
    names = list(dict.fromkeys(model.config.masks))
    wanted = masks[RUDOLPH_MASKS[name]]
    if wanted in names:
        tables[names.index(wanted)] = stored


def save_weights(model: nn.Module, path: Path, *, made_of: str = "") -> None:
    """Weights as safetensors, whole or not at all; ``made_of`` says what they were trained on."""
    new = path.with_suffix(".new")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, new, metadata={"made_of": made_of})
    os.replace(new, path)


def weights_made_of(path: Path) -> str:
    """What ``save_weights`` was told of the file; empty where it was told nothing."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("made_of", "")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a module's tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


FAMILIES = {"rudolph": rudolph_from_reference}
