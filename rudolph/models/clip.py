"""CLIP: how well a text and a picture go together.

``text -> transformer -> feature at EOS``, ``picture -> vision transformer -> feature of the class
token``; logits are the scaled cosines of both.

Names of modules are OpenAI's, so that ruCLIP's checkpoints' keys are ours.

Source: Radford 2021 (arXiv:2103.00020); ruclip 0.0.2, ``ruclip/model.py``.

Shapes: B texts, P pictures, L text tokens, N patches and the class token, E embedding dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.sequence.layout import EOS

VISION_HEAD_SIZE = 64


@dataclass(frozen=True)
class CLIPConfig:
    """Names are those of ruCLIP's ``config.json``; vision heads have 64 channels each."""

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

    def __post_init__(self) -> None:
        if self.image_resolution % self.vision_patch_size:
            raise ValueError(
                f"image_resolution must be a multiple of vision_patch_size "
                f"({self.vision_patch_size}), got {self.image_resolution}"
            )
        if self.transformer_width % self.transformer_heads:
            raise ValueError(
                f"transformer_width must be a multiple of transformer_heads "
                f"({self.transformer_heads}), got {self.transformer_width}"
            )


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Norm, attention, add; norm, MLP, add."""

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
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks in a row; ``mask`` (T, T) bool is true where a query may not look."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    """Pictures ``(P, 3, H, W)``, normalised, to features ``(P, E)``."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.vision_patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        num_patches = (config.image_resolution // patch) ** 2
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        num_heads = max(width // VISION_HEAD_SIZE, 1)
        self.transformer = Transformer(width, config.vision_layers, num_heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # (P, N - 1, W)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """``model(input_ids, pixel_values) -> (logits_per_image, logits_per_text)``."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        width = config.transformer_width
        self.visual = VisionTransformer(config)
        self.transformer = Transformer(width, config.transformer_layers, config.transformer_heads)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(P, B)`` and ``(B, P)`` of texts ``(B, L)`` and pictures ``(P, 3, H, W)``."""
        images = F.normalize(self.encode_image(pixel_values), dim=-1)
        texts = F.normalize(self.encode_text(input_ids), dim=-1)
        logits = self.logit_scale.exp() * images @ texts.t()
        return logits, logits.t()

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Features ``(P, E)``, not normalised."""
        side = self.config.image_resolution
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"pictures must be (P, 3, {side}, {side}), got {tuple(pixel_values.shape)}"
            )
        return self.visual(pixel_values)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Features ``(B, E)``, not normalised, read at the first ``EOS`` of each text.

        Raises:
            ValueError: when a text is longer than the context or has no ``EOS``.
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
