"""Checkpoint formats of flamingo-pytorch and OpenFlamingo: their tensor names and ours.

The resampler and the gated blocks have the same names in both.  flamingo-pytorch's PaLM computes
queries, key, value and both inputs of SwiGLU in one matrix product, which is split here.

Source: flamingo-pytorch 0.1.2, ``flamingo_palm.py``; vit-pytorch 1.26, ``vit.py``; open_flamingo
2.0.1, ``src/helpers.py``.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rudolph.models.flamingo.flamingo import Flamingo, FlamingoConfig
from rudolph.models.fusion.cross_attention import CrossAttentionConfig, GatedCrossAttentionBlock
from rudolph.models.fusion.media_mask import count_tags, media_mask, number_media
from rudolph.models.fusion.resampler import PerceiverResampler, ResamplerConfig
from rudolph.models.lm.language_model import LanguageModelConfig
from rudolph.models.reference.family import ReferenceFamily, require_expressible
from rudolph.models.reference.language_model import without_tied_copy
from rudolph.models.vision.vit import LinearPatchEncoder, ViT, ViTConfig
from rudolph.models.weights import load_exactly, meta_device

# FlamingoPaLM never sets this argument, so its resampler uses flamingo-pytorch's default.
NUM_MEDIA_EMBEDDINGS = 4
# Patch side in pixels of the image encoder if a config names no ViT.
PATCH_SIZE = 8
ROPE_THETA = 10_000.0

# Maps our names to flamingo-pytorch's; ``{}`` is a layer number and ``*`` the rest of a name.
FLAMINGO_NAMES = {
    "language_model.embed_tokens.weight": "token_emb.weight",
    "language_model.norm.weight": "to_logits.0.gamma",
    "language_model.layers.{}.input_layernorm.weight": "layers.{}.0.fn.norm.gamma",
    "language_model.layers.{}.self_attn.o_proj.weight": "layers.{}.0.fn.attn_out.weight",
    "language_model.layers.{}.mlp.down_proj.weight": "layers.{}.0.fn.ff_out.1.weight",
    "cross_blocks.{}.*": "layers.{}.1.*",
    "resampler.frame_embs": "video_frame_pos_emb",
    "resampler.*": "perceiver_resampler.*",
    "vision.class_token": "img_encoder.vit.cls_token",
    "vision.position": "img_encoder.vit.pos_embedding",
    "vision.patch_norm.*": "img_encoder.vit.to_patch_embedding.1.*",
    "vision.patch_embedding.*": "img_encoder.vit.to_patch_embedding.2.*",
    "vision.embedding_norm.*": "img_encoder.vit.to_patch_embedding.3.*",
    "vision.layers.{}.attention_norm.*": "img_encoder.vit.transformer.layers.{}.0.norm.*",
    "vision.layers.{}.to_qkv.*": "img_encoder.vit.transformer.layers.{}.0.to_qkv.*",
    "vision.layers.{}.to_out.*": "img_encoder.vit.transformer.layers.{}.0.to_out.0.*",
    "vision.layers.{}.mlp_norm.*": "img_encoder.vit.transformer.layers.{}.1.net.0.*",
    "vision.layers.{}.mlp_in.*": "img_encoder.vit.transformer.layers.{}.1.net.1.*",
    "vision.layers.{}.mlp_out.*": "img_encoder.vit.transformer.layers.{}.1.net.4.*",
    "vision.norm.*": "img_encoder.vit.transformer.norm.*",
    "vision.head.*": "img_encoder.vit.mlp_head.*",
    "vision.proj.*": "img_encoder.proj.*",
}
FUSED = "layers.{}.0.fn.fused_attn_ff_proj.weight"
# Parts of the fused projection, in flamingo-pytorch's order.
FUSED_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.up_proj",
    "mlp.gate_proj",
)
# Stored buffers that follow from the sizes: zero biases and rotary frequencies.
DERIVED = re.compile(r"(layers\.\d+\.0\.fn\.norm|to_logits\.0)\.beta|.+\.rotary_emb\.inv_freq")


def build_flamingo(config: Mapping[str, Any]) -> Flamingo:
    """Build a Flamingo from the constructor arguments of flamingo-pytorch."""
    dim, depth = config["dim"], config["depth"]
    num_heads, head_size = config.get("heads", 8), config.get("dim_head", 64)
    attends_to_last = config.get("only_attend_immediate_media", True)
    return Flamingo(
        FlamingoConfig(
            language_model=LanguageModelConfig(
                vocab_size=config["num_tokens"],
                hidden_size=dim,
                num_layers=depth,
                num_heads=num_heads,
                num_key_value_heads=1,
                head_size=head_size,
                mlp_size=config.get("ff_mult", 4) * dim,
                block="parallel",
                norm="layer",
                rope_theta=ROPE_THETA,
                tied_embeddings=True,
            ),
            resampler=ResamplerConfig(
                width=dim,
                num_layers=config.get("perceiver_depth", 2),
                num_latents=config.get("perceiver_num_latents", 64),
                num_heads=num_heads,
                head_size=head_size,
                num_media_embeddings=NUM_MEDIA_EMBEDDINGS,
                num_frame_embeddings=config.get("max_video_frames"),
            ),
            cross_attention=CrossAttentionConfig(num_heads, head_size),
            every=config.get("cross_attn_every", 3),
            place="after",
            attend_to="immediate" if attends_to_last else "all_previous",
            media_token_id=config.get("media_token_id", 3),
        ),
        build_image_encoder(config),
    )


def build_image_encoder(config: Mapping[str, Any]) -> nn.Module:
    """Build a ViT from the arguments of ``img_encoder``, or a linear patch encoder if absent."""
    arguments = config.get("img_encoder")
    if arguments is None:
        return LinearPatchEncoder(config["dim"], PATCH_SIZE)
    return ViT(
        ViTConfig(
            image_size=arguments["image_size"],
            patch_size=arguments["patch_size"],
            width=arguments["dim"],
            num_layers=arguments["depth"],
            num_heads=arguments["heads"],
            head_size=arguments.get("dim_head", 64),
            mlp_size=arguments["mlp_dim"],
            dropout=arguments.get("dropout", 0.0),
            embedding_dropout=arguments.get("emb_dropout", 0.0),
            num_classes=arguments["num_classes"],
        )
    )


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Rename by the first matching pattern; return None if none matches."""
    for pattern, replacement in names.items():
        expression = re.escape(pattern).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)")
        match = re.fullmatch(expression, name)
        if match:
            return replacement.replace("*", "{}").format(*match.groups())
    return None


def our_flamingo_name(key: str) -> str:
    """Return our name for a flamingo-pytorch tensor, or its unchanged name if we have none."""
    return _renamed(key, {theirs: ours for ours, theirs in FLAMINGO_NAMES.items()}) or key


def their_flamingo_name(name: str) -> str:
    """Return flamingo-pytorch's name for one of our tensors.

    A part of a fused tensor gets the name of the fused tensor.
    """
    parts = {f"language_model.layers.{{}}.{part}.weight": FUSED for part in FUSED_PARTS}
    return _renamed(name, FLAMINGO_NAMES | parts) or name


def load_flamingo(model: Flamingo, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of a flamingo-pytorch checkpoint.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape, or a norm has a bias.
    """
    tensors = without_tied_copy(
        tensors, "to_logits.1.weight", "token_emb.weight", family="flamingo"
    )
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        fused = re.fullmatch(r"layers\.(\d+)\.0\.fn\.fused_attn_ff_proj\.weight", key)
        if fused and int(fused[1]) < model.config.language_model.num_layers:
            renamed |= split_fused(model, fused[1], key, value)
        elif not DERIVED.fullmatch(key):
            renamed[our_flamingo_name(key)] = value
        elif key.endswith("beta") and isinstance(value, Tensor) and bool(value.any()):
            raise ValueError(f"flamingo: {key} must be 0, the norms have no bias")
    load_exactly(model, renamed, family="flamingo", file_name_of=their_flamingo_name)


def split_fused(model: Flamingo, layer: str, key: str, value: Tensor) -> dict[str, Tensor]:
    """Return the parts of a fused projection under our names.

    Raises:
        ValueError: If the projection has another shape.
    """
    prefix = f"language_model.layers.{layer}."
    parts = [model.get_parameter(f"{prefix}{part}.weight") for part in FUSED_PARTS]
    sizes = [len(part) for part in parts]
    expected = (sum(sizes), parts[0].shape[1])
    if not isinstance(value, Tensor) or value.shape != expected:
        actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"flamingo: {key} must be {expected}, got {actual}")
    return {
        f"{prefix}{part}.weight": piece
        for part, piece in zip(FUSED_PARTS, torch.split(value, sizes), strict=True)
    }


def tensors_of_flamingo(model: Flamingo) -> dict[str, Tensor]:
    """Return the tensors under flamingo-pytorch's names, with its derived buffers."""
    ours = dict(model.state_dict())
    tensors = {}
    for layer in range(model.config.language_model.num_layers):
        names = [f"language_model.layers.{layer}.{part}.weight" for part in FUSED_PARTS]
        tensors[FUSED.format(layer)] = torch.cat([ours.pop(name) for name in names])
    tensors |= {their_flamingo_name(name): value for name, value in ours.items()}
    # safetensors rejects two names for the same memory, hence the copy.
    tensors["to_logits.1.weight"] = tensors["token_emb.weight"].clone()
    return tensors | dict(derived_tensors(model, tensors))


def derived_tensors(
    model: Flamingo, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that flamingo-pytorch stores and this project derives."""
    size = model.config.language_model.head_size
    channels = torch.arange(0, size, 2).float()
    for key, value in tensors.items():
        if key.endswith(".gamma"):
            yield key.removesuffix("gamma") + "beta", torch.zeros_like(value)
        if key.endswith(".fn.norm.gamma"):
            name = key.replace("norm.gamma", "rotary_emb.inv_freq")
            yield name, 1.0 / ROPE_THETA ** (channels / size)


def flamingo_config_of(model: Flamingo) -> dict[str, Any]:
    """Return flamingo-pytorch's constructor arguments for a Flamingo.

    Raises:
        ValueError: If flamingo-pytorch cannot express the model.
    """
    config, text = model.config, model.config.language_model
    # All other settings must equal those that the reference's constructor derives.
    arguments: dict[str, Any] = {
        "dim": text.hidden_size,
        "num_tokens": text.vocab_size,
        "depth": text.num_layers,
        "dim_head": text.head_size,
        "heads": text.num_heads,
        "ff_mult": text.mlp_size // text.hidden_size,
        "media_token_id": config.media_token_id,
        "cross_attn_every": config.every,
        "perceiver_num_latents": config.resampler.num_latents,
        "perceiver_depth": config.resampler.num_layers,
        "max_video_frames": config.resampler.num_frame_embeddings,
        "only_attend_immediate_media": config.attend_to == "immediate",
    }
    if isinstance(model.vision, ViT):
        arguments["img_encoder"] = vit_config_of(model.vision)
    with meta_device():
        rebuilt = build_flamingo(arguments)
    for name in ("language_model", "resampler", "cross_attention"):
        ours, theirs = getattr(config, name), getattr(rebuilt.config, name)
        require_expressible(ours == theirs, "flamingo", f"{ours}; the nearest is {theirs}")
    require_expressible(
        config == rebuilt.config, "flamingo", f"place, offset or document_end_id of {config}"
    )
    expected_shapes = {key: value.shape for key, value in rebuilt.state_dict().items()}
    ours_shapes = {key: value.shape for key, value in model.state_dict().items()}
    require_expressible(
        expected_shapes == ours_shapes,
        "flamingo",
        f"the vision encoder {type(model.vision).__name__}",
    )
    return arguments


def vit_config_of(model: ViT) -> dict[str, Any]:
    """Return vit-pytorch's constructor arguments for a ViT.

    Raises:
        ValueError: If the ViT has no classification head.
    """
    config = model.config
    require_expressible(
        config.num_classes is not None, "flamingo", "a ViT without a classifier's head"
    )
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "dim": config.width,
        "depth": config.num_layers,
        "heads": config.num_heads,
        "mlp_dim": config.mlp_size,
        "dim_head": config.head_size,
        "dropout": config.dropout,
        "emb_dropout": config.embedding_dropout,
    }


class OpenFlamingoBlock(nn.Module):
    """The parts that OpenFlamingo trains for one layer: resampler and gated cross-attention.

    Module names are those of its checkpoints.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        num_heads, head_size = config["heads"], config["dim_head"]
        width = config["dim_visual"]
        self.perceiver = PerceiverResampler(
            ResamplerConfig(
                width=width,
                num_layers=config["depth"],
                num_latents=config["num_latents"],
                num_heads=num_heads,
                head_size=head_size,
            )
        )
        self.gated_cross_attn_layer = GatedCrossAttentionBlock(
            config["dim"], width, CrossAttentionConfig(num_heads, head_size)
        )

    def forward(
        self, vision_x: Tensor, x: Tensor, media_locations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return latents ``(B, M, R, E)`` and text states ``(B, T, D)``.

        Args:
            vision_x: Features ``(B, M, F, P, E)``.
            x: Text states ``(B, T, D)``.
            media_locations: ``(B, T)`` bool, true at media tags.
        """
        latents = self.perceiver(vision_x)
        numbers = number_media(latents.new_ones(latents.shape[:2], dtype=torch.bool))
        rule = "immediate" if self.config["only_attend_immediate_media"] else "all_previous"
        mask = media_mask(rule, count_tags(media_locations), numbers)
        mask = mask.repeat_interleave(latents.shape[2], dim=-1)
        block = self.gated_cross_attn_layer
        return latents, block(x, block.attn.keys_values(latents.flatten(1, 2)), mask)


def load_block(model: OpenFlamingoBlock, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of one OpenFlamingo layer, whose names are the same here."""
    load_exactly(model, tensors, family="open_flamingo_block")


FLAMINGO = ReferenceFamily(
    build=build_flamingo,
    load=load_flamingo,
    matches=lambda model: isinstance(model, Flamingo),
    config_of=flamingo_config_of,
    tensors_of=tensors_of_flamingo,
)
OPEN_FLAMINGO_BLOCK = ReferenceFamily(
    build=OpenFlamingoBlock,
    load=load_block,
    matches=lambda model: isinstance(model, OpenFlamingoBlock),
    config_of=lambda model: dict(model.config),
    tensors_of=lambda model: dict(model.state_dict()),
)
