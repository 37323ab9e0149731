"""The RUDOLPH and ruDALL-E families: one decoder module under two naming schemes.

Source: ru-dolph, ``rudolph/model/model.py`` and ``transformer.py``; rudalle, ``dalle/model.py``
and ``transformer.py`` (constructor arguments, key names, order of the layers' masks).
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rudolph.models.reference.family import (
    ReferenceFamily,
    Renamed,
    StoredMaskWarning,
    require_expressible,
    without_prefix,
)
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.weights import load_exactly
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.masks import mask_table, parse_mask, right_without_left

SHARED_NAMES = {
    "text_embeddings": "text_embedding",
    "image_embeddings": "image_embedding",
    "image_row_embeddings": "row_position",
    "image_col_embeddings": "column_position",
    "to_logits.0": "logits_norm",
    "to_logits.1": "to_logits",
    "transformer.final_layernorm": "final_norm",
}
POSITION_NAMES = {
    "rudolph": {
        "l_text_pos_embeddings": "left_position",
        "r_text_pos_embeddings": "right_position",
    },
    "rudalle": {"text_pos_embeddings": "left_position"},
}
LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "before_first_addition_layernorm": "attention_out_norm",
    "before_second_addition_layernorm": "mlp_out_norm",
    "post_attention_layernorm": "mlp_norm",
    "attention.query_key_value": "to_qkv",
    "attention.dense": "to_out",
    "mlp.dense_h_to_4h": "mlp_in",
    "mlp.dense_4h_to_h": "mlp_out",
}
# Mask buffers of each package; layer i uses the buffer with index i modulo 4.
MASK_NAMES = {
    "rudolph": ("row_mask", "col_mask", "row_mask", "conv_mask"),
    "rudalle": ("row_mask", "col_mask", "row_mask", "row_mask"),
}
LAST_MASK_NAME = {"rudolph": "last_conv_mask", "rudalle": "conv_mask"}
RUDALLE_KERNEL = 11


def build_rudolph(config: Mapping[str, Any]) -> MaskedDecoder:
    """Return a decoder from RUDOLPH's constructor arguments.

    Raises:
        KeyError: naming a missing argument.
    """
    kernel, last = config.get("kernel_size", 7), config.get("last_kernel_size", 9)
    layout = SequenceLayout(
        config["l_text_seq_length"], config["image_tokens_per_dim"], config["r_text_seq_length"]
    )
    vocabulary = Vocabulary(
        # The reference's vocab_size includes the left padding ids.
        bpe_size=config["vocab_size"] - layout.left_text_length,
        num_text_specials=config.get("text_special_tokens", 0),
        num_left_paddings=layout.left_text_length,
        codebook_size=config["image_vocab_size"],
        num_image_specials=config.get("image_special_tokens", 0),
    )
    masks = ("row", "column", "row", f"conv({kernel})"), f"conv({last})"
    decoder = DecoderConfig(**_block(config, masks, sandwich=True))
    return MaskedDecoder(decoder, layout, vocabulary)


def build_rudalle(config: Mapping[str, Any]) -> MaskedDecoder:
    """Return a decoder from ruDALL-E's constructor arguments.

    Raises:
        KeyError: naming a missing argument.
        ValueError: if ``hf_version`` is neither v2 nor v3.
    """
    version = config.get("hf_version", "v3")
    if version not in ("v2", "v3"):
        raise ValueError(f"rudalle: hf_version must be v2 or v3, got {version!r}")
    layout = SequenceLayout(config["text_seq_length"], config["image_tokens_per_dim"], 0)
    vocabulary = Vocabulary(
        bpe_size=config["vocab_size"] - layout.left_text_length,
        num_left_paddings=layout.left_text_length,
        codebook_size=config["image_vocab_size"],
    )
    last = f"{'conv_torus' if version == 'v2' else 'conv'}({RUDALLE_KERNEL})"
    masks = ("row", "column", "row", "row"), last
    decoder = DecoderConfig(**_block(config, masks, sandwich=False), leading_bos=version == "v2")
    return MaskedDecoder(decoder, layout, vocabulary)


def _block(
    config: Mapping[str, Any], masks: tuple[tuple[str, ...], str], *, sandwich: bool
) -> dict[str, Any]:
    """Return the decoder settings that both packages share.

    Args:
        config: constructor arguments.
        masks: layer masks and last-layer mask.
        sandwich: the package's default for CogView's sandwich norm and PB-relax.
    """
    return {
        "num_layers": config["num_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "layer_masks": masks[0],
        "last_layer_mask": masks[1],
        "sandwich_norm": config.get("cogview_sandwich_layernorm", sandwich),
        "pb_relax": config.get("cogview_pb_relax", sandwich),
        "attention_dropout": config.get("attention_dropout_prob", 0.1),
        "output_dropout": config.get("output_dropout_prob", 0.1),
    }


def our_name(key: str, family: str) -> str:
    """Return our name for a key such as ``transformer.layers.3.mlp.dense_4h_to_h.bias``.

    Raises:
        ValueError: if the reference has no such key.
    """
    path, _, kind = key.rpartition(".")
    layer = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", path)
    names = LAYER_NAMES if layer else SHARED_NAMES | POSITION_NAMES[family]
    name = names.get(layer[2] if layer else path)
    if name is None:
        raise ValueError(f"{family}: the reference has no tensor {key}")
    return f"layers.{layer[1]}.{name}.{kind}" if layer else f"{name}.{kind}"


def their_name(name: str, family: str) -> str:
    """Return the reference's key for a tensor of this project."""
    path, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    names = LAYER_NAMES if layer else SHARED_NAMES | POSITION_NAMES[family]
    key = {ours: theirs for theirs, ours in names.items()}[layer[2] if layer else path]
    return f"transformer.layers.{layer[1]}.{key}.{kind}" if layer else f"{key}.{kind}"


def load_reference_decoder(
    model: MaskedDecoder, tensors: Mapping[str, Tensor], family: str
) -> None:
    """Load the reference's tensors and masks into a decoder.

    Args:
        model: decoder to fill.
        tensors: the reference's tensors by key, with or without Lightning's ``model.`` prefix.
        family: ``rudolph`` or ``rudalle``.

    Raises:
        ValueError: naming the first tensor or mask that does not fit.
    """
    tensors = without_prefix(tensors, "model.")
    is_mask = {key: key.endswith("_mask") for key in tensors}
    names = {our_name(key, family): key for key in tensors if not is_mask[key]}
    load_exactly(
        model,
        Renamed(tensors, names),
        family=family,
        file_name_of=lambda name: their_name(name, family),
    )
    model.register_masks()
    stored = {key.rpartition(".")[2]: tensors[key] for key in tensors if is_mask[key]}
    take_stored_masks(model, stored, family)


def take_stored_masks(model: MaskedDecoder, stored: Mapping[str, Tensor], family: str) -> None:
    """Use the masks of a checkpoint file; warn about those that differ from their rules.

    If stored masks differ but all equal the rules without attention from right to left text,
    ``right_attends_left`` becomes False.  If they differ otherwise, the tables replace the rules.

    Args:
        model: decoder whose masks are replaced.
        stored: ``(T, T)`` tables, keyed by mask name in the file.
        family: ``rudolph`` or ``rudalle``.

    Raises:
        ValueError: if a mask is unknown to the reference or has another shape.
    """
    rules, names = model.layer_tables, reference_mask_names(model, family)
    for name, table in stored.items():
        if name not in {*MASK_NAMES[family], LAST_MASK_NAME[family]}:
            raise ValueError(f"{family}: the reference has no mask {name}")
        if table.shape != rules[0].shape:
            shape = tuple(rules[0].shape)
            raise ValueError(f"{family}: {name} must be {shape}, got {tuple(table.shape)}")
    # Masks from rules are on the CPU, whatever the device of the weights.
    tables = {name: table.bool().cpu() for name, table in stored.items() if name in names}
    pairs = [(name, rule) for name, rule in zip(names, rules, strict=True) if name in tables]
    differing = sorted({name for name, rule in pairs if not torch.equal(tables[name], rule)})
    if not differing:
        return
    hidden = mask_table(right_without_left(parse_mask("causal")), model.layout)
    if all(torch.equal(tables[name], rule & hidden) for name, rule in pairs):
        model.config = replace(model.config, right_attends_left=False)
        model.register_masks()
        description = "in which right text does not attend to left text"
    else:
        layer_tables = [tables.get(name, rule) for name, rule in zip(names, rules, strict=True)]
        model.use_masks(layer_tables, range(len(layer_tables)))
        description = "which are not those of the rules"
    warnings.warn(
        f"{family}: the file's own masks are used ({', '.join(differing)}), {description}",
        StoredMaskWarning,
        stacklevel=4,
    )


def reference_mask_names(model: MaskedDecoder, family: str) -> list[str]:
    """Return the reference's mask name for each layer.

    A column layer keeps its own mask even as the last layer.
    """
    names = [MASK_NAMES[family][layer % 4] for layer in range(model.config.num_layers)]
    if names[-1] != "col_mask":
        names[-1] = LAST_MASK_NAME[family]
    return names


def tensors_of_decoder(model: MaskedDecoder, family: str) -> dict[str, Tensor]:
    """Return the weights and masks of a decoder under the reference's names.

    Raises:
        ValueError: if layers that share a reference mask have different masks.
    """
    tensors = {their_name(name, family): value for name, value in model.state_dict().items()}
    layers = list(zip(reference_mask_names(model, family), model.layer_tables, strict=True))
    for name in sorted({*MASK_NAMES[family], LAST_MASK_NAME[family]}):
        tables = [table for mask_name, table in layers if mask_name == name]
        is_same = all(torch.equal(table, tables[0]) for table in tables)
        require_expressible(is_same, family, f"different masks in the layers of {name}")
        # The reference also stores masks that a shallow model, or one that ends with a column
        # layer, does not use.
        table = tables[0] if tables else _unused_mask(model, name, family)
        tensors[f"transformer.{name}"] = table
    return tensors


def _unused_mask(model: MaskedDecoder, name: str, family: str) -> Tensor:
    """Return the table of a mask that no layer uses, computed from its rule."""
    pattern, last = model.config.layer_masks, model.config.last_layer_mask
    if name == LAST_MASK_NAME[family]:
        text = last or pattern[-1]
    else:
        text = pattern[MASK_NAMES[family].index(name) % len(pattern)]
    rule = parse_mask(text)
    if not model.config.right_attends_left:
        rule = right_without_left(rule)
    return mask_table(rule, model.layout)


def rudolph_config_of(model: MaskedDecoder) -> dict[str, Any]:
    """Return RUDOLPH's constructor arguments for a decoder.

    Raises:
        ValueError: naming a setting that RUDOLPH cannot express.
    """
    kernels = [_kernel(mask, 7) for mask in model.config.layer_masks]
    return {
        **_shared_config(model, "rudolph"),
        "l_text_seq_length": model.layout.left_text_length,
        "r_text_seq_length": model.layout.right_text_length,
        # Masks are stored with the weights, so kernel sizes have no effect on the loaded model.
        "kernel_size": kernels[3 % len(kernels)],
        "last_kernel_size": _kernel(model.config.last_layer_mask or "", 9),
        "text_special_tokens": model.vocabulary.num_text_specials,
        "image_special_tokens": model.vocabulary.num_image_specials,
    }


def rudalle_config_of(model: MaskedDecoder) -> dict[str, Any]:
    """Return ruDALL-E's constructor arguments for a decoder.

    Raises:
        ValueError: naming a setting that ruDALL-E cannot express.
    """
    has_specials = model.vocabulary.num_text_specials + model.vocabulary.num_image_specials > 0
    require_expressible(not has_specials, "rudalle", "special tokens")
    return {
        **_shared_config(model, "rudalle"),
        "text_seq_length": model.layout.left_text_length,
        "hf_version": "v2" if model.config.leading_bos else "v3",
        "loss_img_weight": 7,
    }


def _shared_config(model: MaskedDecoder, family: str) -> dict[str, Any]:
    config, vocabulary = model.config, model.vocabulary
    require_expressible(config.double_final_norm, family, "a decoder without double_final_norm")
    require_expressible(not config.qk_norm, family, "qk_norm")
    require_expressible(config.positional_padding, family, "one padding id for all positions")
    require_expressible(config.gelu == "tanh", family, f"gelu {config.gelu}")
    require_expressible(family == "rudalle" or not config.leading_bos, family, "leading_bos")
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "image_tokens_per_dim": model.layout.image_tokens_per_dim,
        "vocab_size": vocabulary.bpe_size + vocabulary.num_left_paddings,
        "image_vocab_size": vocabulary.codebook_size,
        "cogview_sandwich_layernorm": config.sandwich_norm,
        "cogview_pb_relax": config.pb_relax,
        "attention_dropout_prob": config.attention_dropout,
        "output_dropout_prob": config.output_dropout,
        # The reference constructs this dropout but never applies it.
        "embedding_dropout_prob": 0.1,
    }


def _kernel(mask: str, default: int) -> int:
    match = re.search(r"\((\d+)\)", mask)
    return int(match[1]) if match else default


def _is_decoder(model: object, *, has_right_text: bool) -> bool:
    return (
        isinstance(model, MaskedDecoder) and (model.layout.right_text_length > 0) == has_right_text
    )


RUDOLPH = ReferenceFamily(
    build=build_rudolph,
    load=lambda model, tensors: load_reference_decoder(model, tensors, "rudolph"),
    matches=lambda model: _is_decoder(model, has_right_text=True),
    config_of=rudolph_config_of,
    tensors_of=lambda model: tensors_of_decoder(model, "rudolph"),
)
RUDALLE = ReferenceFamily(
    build=build_rudalle,
    load=lambda model, tensors: load_reference_decoder(model, tensors, "rudalle"),
    matches=lambda model: _is_decoder(model, has_right_text=False),
    config_of=rudalle_config_of,
    tensors_of=lambda model: tensors_of_decoder(model, "rudalle"),
)
