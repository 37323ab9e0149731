"""Checkpoints of LLaMA, Vicuna and Mistral, with Hugging Face's names of tensors.

Our names omit the prefix ``model.``.

Source: transformers, ``models/llama/modeling_llama.py`` and ``configuration_llama.py``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rudolph.models.lm.language_model import LanguageModel, LanguageModelConfig
from rudolph.models.reference.family import ReferenceFamily, Renamed
from rudolph.models.weights import load_exactly

# Hugging Face's arguments of which our block supports only these values.
FIXED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "rope_scaling": (None,),
}


def language_model_config(config: Mapping[str, Any]) -> LanguageModelConfig:
    """Return our config for a ``config.json`` of LLaMA, Vicuna or Mistral.

    Raises:
        ValueError: If the block does not support an argument; the message names it.
    """
    for name, allowed in FIXED_ARGUMENTS.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"llama: {name} must be {allowed[0]}, got {config[name]!r}")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"llama: rope_type must be default, got {rope['rope_type']!r}")
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    return LanguageModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden_size,
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_key_value_heads=config.get("num_key_value_heads") or num_heads,
        head_size=config.get("head_dim") or hidden_size // num_heads,
        mlp_size=config["intermediate_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def their_llama_name(name: str) -> str:
    """Return Hugging Face's name for one of our tensors."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def our_llama_name(key: str) -> str:
    """Return our name for one of Hugging Face's tensors."""
    return key.removeprefix("model.")


def without_tied_copy(
    tensors: Mapping[str, Tensor], copy: str, original: str, *, family: str
) -> Mapping[str, Tensor]:
    """Remove the second copy of a tensor that two layers share.

    Raises:
        ValueError: If the two copies differ.
    """
    if copy not in tensors or original not in tensors:
        return tensors
    if not torch.equal(tensors[copy], tensors[original]):
        raise ValueError(f"{family}: {copy} must equal {original}, to which it is tied")
    return Renamed(tensors, {key: key for key in tensors if key != copy})


def load_language_model(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of a Hugging Face checkpoint.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    if model.config.tied_embeddings:
        tensors = without_tied_copy(
            tensors, "lm_head.weight", "model.embed_tokens.weight", family="llama"
        )
    # Early files store the rotary frequencies, which are derived here.
    kept = [key for key in tensors if not key.endswith("rotary_emb.inv_freq")]
    renamed = Renamed(tensors, {our_llama_name(key): key for key in kept})
    load_exactly(model, renamed, family="llama", file_name_of=their_llama_name)


def language_model_config_of(model: LanguageModel) -> dict[str, Any]:
    """Return Hugging Face's ``config.json`` for a language model."""
    config = model.config
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
    }


def is_llama(model: object) -> bool:
    """Return whether an object is a language model with the blocks and norms of LLaMA."""
    return (
        isinstance(model, LanguageModel)
        and model.config.block == "sequential"
        and model.config.norm == "rms"
    )


LLAMA = ReferenceFamily(
    build=lambda config: LanguageModel(language_model_config(config)),
    load=load_language_model,
    matches=is_llama,
    config_of=language_model_config_of,
    tensors_of=lambda model: {
        their_llama_name(name): value for name, value in model.state_dict().items()
    },
)
