"""Stable Diffusion's KL autoencoder under the key names of diffusers.

diffusers numbers the decoder's levels from the lowest resolution, this project from the highest.
The attention of diffusers has linear layers where latent-diffusion has 1x1 convolutions; their
weights have the same values in another shape.  Files from before diffusers 0.18 name these layers
query, key, value and proj_attn; both the old and the new names load.

Source: diffusers 0.42, ``models/autoencoders/autoencoder_kl.py``.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rudolph.models.reference.family import ReferenceFamily
from rudolph.models.vqgan.kl import KLAutoencoder, KLAutoencoderConfig
from rudolph.models.weights import load_exactly

# Reference arguments with one supported value each; other values change the architecture.
FIXED_KL_ARGUMENTS = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
KL_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
# The first of two names for the same layer is the one that is written.
ATTENTION_WRITTEN = {ours: theirs for theirs, ours in reversed(ATTENTION.items())}


def build_kl(config: Mapping[str, Any]) -> KLAutoencoder:
    """Return an empty module for the config of diffusers.

    Raises:
        ValueError: naming an argument whose value this project does not support.
    """
    for name, value in FIXED_KL_ARGUMENTS.items():
        if config.get(name, value) != value:
            raise ValueError(f"kl_autoencoder: {name}: expected {value!r}, got {config[name]!r}")
    channels = tuple(config["block_out_channels"])
    for name, kind in KL_BLOCK_TYPES.items():
        block_types = list(config[name])
        if block_types != [kind] * len(channels):
            raise ValueError(
                f"kl_autoencoder: {name}: expected {kind} for each of {len(channels)} levels, "
                f"got {', '.join(block_types)}"
            )
    return KLAutoencoder(
        KLAutoencoderConfig(
            resolution=config["sample_size"],
            channels=channels,
            num_res_blocks=config["layers_per_block"],
            latent_channels=config["latent_channels"],
            norm_groups=config["norm_num_groups"],
            scaling_factor=config["scaling_factor"],
        )
    )


def load_kl(model: KLAutoencoder, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of a checkpoint into the module.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    num_levels = len(model.config.channels)
    ours: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = our_kl_name(key, num_levels)
        is_linear = ".attn_1." in name and isinstance(value, Tensor) and value.dim() == 2
        ours[name] = value[..., None, None] if is_linear else value
    load_exactly(
        model,
        ours,
        family="kl_autoencoder",
        file_name_of=lambda name: their_kl_name(name, num_levels),
    )


def our_kl_name(key: str, num_levels: int) -> str:
    """Return our name for a diffusers tensor; return an unknown name unchanged.

    >>> our_kl_name("decoder.up_blocks.0.resnets.1.conv_shortcut.weight", 3)
    'decoder.up.2.block.1.nin_shortcut.weight'
    >>> our_kl_name("encoder.mid_block.attentions.0.to_out.0.bias", 3)
    'encoder.mid.attn_1.proj_out.bias'
    """
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", key):
        side, layer, kind = match.groups()
        return f"{side}.mid.attn_1.{ATTENTION.get(layer, layer)}.{kind}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d+)\.(.+)", key):
        side, index, rest = match.groups()
        name = f"{side}.mid.block_{int(index) + 1}.{rest}"
    elif match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.+)", key):
        name = f"decoder.up.{num_levels - 1 - int(match[1])}.{match[2]}"
    else:
        name = key.replace("encoder.down_blocks.", "encoder.down.")
    for theirs, ours in KL_RENAMED.items():
        name = name.replace(theirs, ours)
    return name


KL_RENAMED = {
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".conv_norm_out.": ".norm_out.",
}


def their_kl_name(name: str, num_levels: int) -> str:
    """Return the name that diffusers gives a tensor of this project."""
    if match := re.fullmatch(r"(\w+)\.mid\.attn_1\.(\w+)\.(\w+)", name):
        side, layer, kind = match.groups()
        return f"{side}.mid_block.attentions.0.{ATTENTION_WRITTEN.get(layer, layer)}.{kind}"
    for theirs, ours in KL_RENAMED.items():
        name = name.replace(ours, theirs)
    if match := re.fullmatch(r"(\w+)\.mid\.block_(\d+)\.(.+)", name):
        side, index, rest = match.groups()
        return f"{side}.mid_block.resnets.{int(index) - 1}.{rest}"
    if match := re.fullmatch(r"decoder\.up\.(\d+)\.(.+)", name):
        return f"decoder.up_blocks.{num_levels - 1 - int(match[1])}.{match[2]}"
    return name.replace("encoder.down.", "encoder.down_blocks.")


def config_of_kl(model: KLAutoencoder) -> dict[str, Any]:
    """Return the constructor's arguments, without ``kl_reduction``, which only training needs."""
    config = model.config
    num_levels = len(config.channels)
    return {
        "block_out_channels": list(config.channels),
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "sample_size": config.resolution,
        "scaling_factor": config.scaling_factor,
    } | {name: [kind] * num_levels for name, kind in KL_BLOCK_TYPES.items()}


def tensors_of_kl(model: KLAutoencoder) -> dict[str, Tensor]:
    """Return the tensors as diffusers stores them."""
    num_levels = len(model.config.channels)
    return {
        their_kl_name(name, num_levels): value[..., 0, 0]
        if ".attn_1." in name and value.dim() == 4
        else value
        for name, value in model.state_dict().items()
    }


KL_AUTOENCODER = ReferenceFamily(
    build=build_kl,
    load=load_kl,
    matches=lambda model: isinstance(model, KLAutoencoder),
    config_of=config_of_kl,
    tensors_of=tensors_of_kl,
)
