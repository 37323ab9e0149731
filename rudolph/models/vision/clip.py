"""CLIP: similarity of texts and images.

``text -> transformer -> feature at EOS`` and
``image -> vision transformer -> feature of the class token``.  Logits are the scaled cosine
similarities of both features.

Module names are those of OpenAI, so ruCLIP's checkpoint keys load without renaming.

Source: Radford 2021 (arXiv:2103.00020); openai/CLIP, ``clip/model.py``; ruclip 0.0.2,
``ruclip/model.py``; Zhai 2023 (arXiv:2303.15343) for the bias.

Shapes: B texts, P images, L text tokens, N patches plus the class token, D width of a transformer,
E embedding dim, H and W pixels.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.sequence.layout import EOS

VISION_HEAD_SIZE = 64
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Initial scale of the cosines and, for the sigmoid loss, their initial bias.
SOFTMAX_SCALE = 1 / 0.07
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0


@dataclass(frozen=True)
class CLIPConfig:
    """The architecture of a CLIP model, with the field names of ruCLIP's ``config.json``.

    Vision heads have 64 channels each.

    Attributes:
        embed_dim: dimension E of the shared features.
        image_resolution: side of the input images in pixels, a multiple of ``vision_patch_size``.
        vision_layers: layers of the vision transformer.
        vision_width: width of the vision transformer.
        vision_patch_size: side of a patch in pixels.
        context_length: maximum number of text tokens.
        vocab_size: number of text ids.
        transformer_width: width of the text transformer.
        transformer_heads: attention heads of the text transformer.
        transformer_layers: layers of the text transformer.
        eos_id: id at whose position the text feature is read.
        has_logit_bias: add the learned bias of the sigmoid loss, which ruCLIP lacks.
    """

    embed_dim: int = 512
    image_resolution: int = 224
    vision_layers: int = 12
    vision_width: int = 768
    vision_patch_size: int = 32
    context_length: int = 77
    vocab_size: int = 49408
    transformer_width: int = 512
    transformer_heads: int = 8
    transformer_layers: int = 12
    eos_id: int = EOS
    has_logit_bias: bool = False

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        for field in fields(CLIPConfig):
            value = getattr(self, field.name)
            if field.name not in ("eos_id", "has_logit_bias") and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.image_resolution % self.vision_patch_size:
            raise ValueError(
                f"image_resolution must be a multiple of vision_patch_size "
                f"({self.vision_patch_size}), got {self.image_resolution}"
            )
        if self.vision_width % self.vision_heads:
            raise ValueError(
                f"vision_width must be a multiple of its {self.vision_heads} heads, "
                f"got {self.vision_width}"
            )
        if self.transformer_width % self.transformer_heads:
            raise ValueError(
                f"transformer_width must be a multiple of transformer_heads "
                f"({self.transformer_heads}), got {self.transformer_width}"
            )

    @property
    def vision_heads(self) -> int:
        """Return the number of attention heads of the vision transformer."""
        return max(self.vision_width // VISION_HEAD_SIZE, 1)


def pixel_values(
    images: Tensor,
    size: int,
    *,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Tensor:
    """Return preprocessed images ``(P, 3, size, size)`` float32.

    Crop the central square, resize it as Pillow does and normalise each channel.

    Args:
        images: ``(P, 3, H, W)`` in [0, 1].
        size: side of the result in pixels.
        mean: subtracted from each channel.
        std: divisor of each channel.

    Source: ruclip 0.0.2, ``ruclip/processor.py``.
    """
    side = min(images.shape[-2:])
    top, left = ((extent - side) // 2 for extent in images.shape[-2:])
    pixels = images[..., top : top + side, left : left + side].float()
    if side != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    shift, scale = (
        torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std)
    )
    return (pixels - shift) / scale


class QuickGELU(nn.Module):
    """The activation ``x * sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of ``x``."""
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A transformer layer: norm, attention, add; norm, MLP, add."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``(B, T, D)``; ``mask`` ``(T, T)`` is true where attention is forbidden."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A sequence of transformer layers."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(B, T, D)``; ``mask`` ``(T, T)`` is true where attention is forbidden."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    """The vision tower: normalised images ``(P, 3, H, W)`` to features ``(P, E)``."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.vision_patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        num_patches = (config.image_resolution // patch) ** 2
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the features of preprocessed images."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # (P, N - 1, D)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """A CLIP model: ``model(input_ids, pixel_values) -> (logits_per_image, logits_per_text)``."""

    logit_bias: nn.Parameter | None

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        width, num_layers = config.transformer_width, config.transformer_layers
        self.visual = VisionTransformer(config)
        self.transformer = Transformer(width, num_layers, config.transformer_heads)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        scale = SIGMOID_SCALE if config.has_logit_bias else SOFTMAX_SCALE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        bias = nn.Parameter(torch.tensor(SIGMOID_BIAS)) if config.has_logit_bias else None
        # Registering None keeps the key out of the state dict.
        self.register_parameter("logit_bias", bias)
        initialize_text_tower(self)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits per image ``(P, B)`` and per text ``(B, P)``.

        Args:
            input_ids: ``(B, L)``; each text contains an ``EOS``.
            pixel_values: preprocessed images ``(P, 3, H, W)``.

        Raises:
            ValueError: if a text is too long or lacks an ``EOS``, or the images have another
                shape.
        """
        images = F.normalize(self.encode_image(pixel_values), dim=-1)
        texts = F.normalize(self.encode_text(input_ids), dim=-1)
        logits = self.logits(images, texts)
        return logits, logits.t()

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return scaled cosines ``(P, B)``, plus the bias if there is one.

        Args:
            images: normalised features ``(P, E)``.
            texts: normalised features ``(B, E)``.
        """
        logits = self.logit_scale.exp() * images @ texts.t()
        return logits if self.logit_bias is None else logits + self.logit_bias

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Return image features ``(P, E)``, not normalised.

        Raises:
            ValueError: if the images do not have the configured resolution.
        """
        side = self.config.image_resolution
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"images must be (P, 3, {side}, {side}), got {tuple(pixel_values.shape)}"
            )
        return self.visual(pixel_values)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Return text features ``(B, E)``, not normalised, read at the first ``EOS`` of each text.

        Raises:
            ValueError: if a text is longer than the context or has no ``EOS``.
        """
        length = input_ids.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"a text has at most {self.config.context_length} tokens, got {length}"
            )
        is_end = input_ids == self.config.eos_id
        if not is_end.any(1).all():
            raise ValueError(f"each text needs an EOS ({self.config.eos_id})")
        x = self.token_embedding(input_ids) + self.positional_embedding[:length]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        ends = is_end.int().argmax(1)
        return x[torch.arange(len(x), device=x.device), ends] @ self.text_projection


def initialize_text_tower(model: CLIP) -> None:
    """Initialise the text tower like OpenAI: deeper models add less per layer at first.

    As in OpenAI's code, the layers of the vision transformer keep torch's default initialisation.
    """
    width, num_layers = model.config.transformer_width, model.config.transformer_layers
    added = width**-0.5 * (2 * num_layers) ** -0.5
    spreads = {
        "attn.in_proj_weight": width**-0.5,
        "attn.out_proj.weight": added,
        "mlp.c_fc.weight": (2 * width) ** -0.5,
        "mlp.c_proj.weight": added,
    }
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    for block in model.transformer.resblocks:
        for name, std in spreads.items():
            nn.init.normal_(block.get_parameter(name), std=std)
