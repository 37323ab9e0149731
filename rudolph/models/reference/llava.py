"""LLaVA-1.5 and LLaVA-NeXT under the key names of Hugging Face and of LLaVA itself.

Three generations of tensor names load; only the newest is written.  CLIP's query, key and value
projections are one matrix here.

Source: transformers 5.24, ``models/llava``, ``models/llava_next`` and ``models/clip``; LLaVA,
``llava/model/llava_arch.py``.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rudolph.models.fusion.connectors import MLPConnector
from rudolph.models.llava.llava import LLaVA, LLaVAConfig, build_llava
from rudolph.models.reference.family import ReferenceFamily
from rudolph.models.reference.language_model import (
    is_llama,
    language_model_config,
    language_model_config_of,
    without_tied_copy,
)
from rudolph.models.vision.clip import VisionConfig
from rudolph.models.vision.encoders import VisionEncodersConfig
from rudolph.models.vision.features import FeatureConfig, ViTFeatures
from rudolph.models.weights import load_exactly

# The first prefix that fits a name applies; LLaVA's own language model has only ``model.``.
PREFIXES = {
    "model.vision_tower.vision_tower.vision_model.": "vision.",
    "model.vision_tower.vision_model.": "vision.",
    "model.vision_tower.": "vision.",
    "vision_tower.vision_model.": "vision.",
    "model.multi_modal_projector.linear_1.": "connector.project.0.",
    "model.multi_modal_projector.linear_2.": "connector.project.2.",
    "multi_modal_projector.linear_1.": "connector.project.0.",
    "multi_modal_projector.linear_2.": "connector.project.2.",
    "model.mm_projector.": "connector.project.",
    "model.image_newline": "image_newline",
    "model.language_model.": "language_model.",
    "language_model.model.": "language_model.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.",
}
VISION_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.": ".attn.",
}
# Buffers of older files, which are computed here instead of loaded.
LEFT_OUT = ("rotary_emb.inv_freq", "embeddings.position_ids")
QKV = ("q_proj", "k_proj", "v_proj")
# Values that Hugging Face assumes if a text config of type ``llama`` omits them.
LLAMA_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11_008,
}
FIXED_LLAVA_ARGUMENTS = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
FEATURE_STRATEGIES = {"default": "patch", "full": "full"}


def build_reference_llava(config: Mapping[str, Any], family: str) -> LLaVA:
    """Return an empty module for Hugging Face's config.

    Raises:
        ValueError: naming an argument whose value this project does not support.
    """
    for name, value in FIXED_LLAVA_ARGUMENTS.items():
        if config.get(name, value) != value:
            raise ValueError(f"{family}: {name}: expected {value!r}, got {config[name]!r}")
    text, strategy = config["text_config"], config["vision_feature_select_strategy"]
    if strategy not in FEATURE_STRATEGIES:
        names = ", ".join(FEATURE_STRATEGIES)
        raise ValueError(
            f"{family}: vision_feature_select_strategy: expected one of {names}, got {strategy!r}"
        )
    if text.get("model_type", "llama") == "llama":
        text = LLAMA_DEFAULTS | text
    layer = config["vision_feature_layer"]
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    canvases = config["image_grid_pinpoints"] if family == "llava_next" else ()
    image_token_id = config.get("image_token_id")
    return build_llava(
        LLaVAConfig(
            vision=VisionEncodersConfig(
                (vision_config(config["vision_config"]),),
                FeatureConfig(layers, FEATURE_STRATEGIES[strategy]),
            ),
            language_model=language_model_config(text),
            image_token_id=config["image_token_index"]
            if image_token_id is None
            else image_token_id,
            canvases=tuple((height, width) for height, width in canvases),
        )
    )


def vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """Return the sizes that Hugging Face's ``CLIPVisionConfig`` gives."""
    return VisionConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        activation=config.get("hidden_act", "quick_gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-5),
    )


def load_llava(model: LLaVA, tensors: Mapping[str, Tensor], family: str) -> None:
    """Load the tensors of a checkpoint into the module.

    Raises:
        ValueError: naming the first tensor that does not fit, or two names of one tensor.
    """
    kept = [key for key in tensors if not key.endswith(LEFT_OUT)]
    theirs: dict[str, str] = {}
    for key in kept:
        name = our_llava_name(key)
        if name in theirs:
            raise ValueError(f"{family}: the file has both {theirs[name]} and {key}, one tensor")
        theirs[name] = key
    ours = {name: tensors[key] for name, key in theirs.items()}
    vision: Any = model.vision
    for layer in range(vision.encoder.vision_config.num_layers):
        prefix = f"vision.encoder.transformer.resblocks.{layer}.attn."
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in QKV]
            if all(isinstance(ours.get(name), Tensor) for name in names):
                parts = [ours.pop(name) for name in names]
                ours[f"{prefix}in_proj_{kind}"] = torch.cat(parts)
    loaded: Mapping[str, Tensor] = ours
    if model.language_model.config.tied_embeddings:
        head, embeddings = "language_model.lm_head.weight", "language_model.embed_tokens.weight"
        loaded = without_tied_copy(ours, head, embeddings, family=family)
    load_exactly(
        model,
        loaded,
        family=family,
        file_name_of=lambda name: theirs.get(name) or their_llava_name(name),
    )


def our_llava_name(key: str) -> str:
    """Return our name for a checkpoint tensor; return an unknown name unchanged.

    >>> our_llava_name("vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.bias")
    'vision.encoder.transformer.resblocks.3.attn.q_proj.bias'
    >>> our_llava_name("model.layers.0.mlp.up_proj.weight")
    'language_model.layers.0.mlp.up_proj.weight'
    """
    for prefix, ours in PREFIXES.items():
        if key.startswith(prefix):
            name = ours + key.removeprefix(prefix)
            break
    else:
        return key
    if not name.startswith("vision."):
        return name
    rest = name.removeprefix("vision.")
    for theirs, ours in VISION_NAMES.items():
        rest = rest.replace(theirs, ours)
    return f"vision.encoder.{rest}"


def their_llava_name(name: str) -> str:
    """Return the name that Hugging Face gives a tensor of this project.

    >>> their_llava_name("vision.encoder.transformer.resblocks.3.ln_1.bias")
    'model.vision_tower.encoder.layers.3.layer_norm1.bias'
    >>> their_llava_name("language_model.lm_head.weight")
    'lm_head.weight'
    """
    if name.startswith("vision.encoder."):
        rest = name.removeprefix("vision.encoder.")
        for theirs, ours in VISION_NAMES.items():
            rest = rest.replace(ours, theirs)
        return f"model.vision_tower.{rest}"
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if match := re.fullmatch(r"connector\.project\.([02])\.(\w+)", name):
        return f"model.multi_modal_projector.linear_{1 + int(match[1]) // 2}.{match[2]}"
    return f"model.{name}"


def tensors_of_llava(model: LLaVA) -> dict[str, Tensor]:
    """Return the tensors as Hugging Face stores them."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        head, separator, kind = name.partition(".attn.in_proj_")
        if not separator:
            tensors[their_llava_name(name)] = value
            continue
        for part, projection in zip(value.chunk(3), QKV, strict=True):
            tensors[their_llava_name(f"{head}.attn.{projection}.{kind}")] = part
    return tensors


def config_of_llava(model: LLaVA) -> dict[str, Any]:
    """Return Hugging Face's config, without the fields that Hugging Face fills in itself."""
    features: Any = model.vision
    vision: VisionConfig = features.encoder.vision_config
    layers = list(features.config.layers)
    strategies = {ours: theirs for theirs, ours in FEATURE_STRATEGIES.items()}
    config: dict[str, Any] = {
        "text_config": language_model_config_of(model.language_model),
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_width,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.norm_eps,
        },
        "image_token_index": model.images.token_id,
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": strategies[features.config.select],
    } | FIXED_LLAVA_ARGUMENTS
    if model.images.canvases:
        config["image_grid_pinpoints"] = [list(canvas) for canvas in model.images.canvases]
    return config


def is_reference_llava(model: nn.Module, *, has_canvases: bool) -> bool:
    """Return whether Hugging Face supports the vision encoder, connector and language model."""
    return (
        isinstance(model, LLaVA)
        and isinstance(model.vision, ViTFeatures)
        and model.vision.config.select in FEATURE_STRATEGIES.values()
        and isinstance(model.connector, MLPConnector)
        and is_llama(model.language_model)
        and bool(model.images.canvases) == has_canvases
    )


def llava_family(family: str) -> ReferenceFamily:
    """Return the family of one view per image (``llava``) or of anyres (``llava_next``)."""
    has_canvases = family == "llava_next"
    return ReferenceFamily(
        build=lambda config: build_reference_llava(config, family),
        load=lambda model, tensors: load_llava(model, tensors, family),
        matches=lambda model: is_reference_llava(model, has_canvases=has_canvases),
        config_of=config_of_llava,
        tensors_of=tensors_of_llava,
        keeps=lambda key: not key.endswith(LEFT_OUT),
    )


LLAVA = llava_family("llava")
LLAVA_NEXT = llava_family("llava_next")
