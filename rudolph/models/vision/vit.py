"""Image encoders with one feature per patch: a small vision transformer and a linear layer.

Both map images ``(B, 3, S, S)`` to features in row-major order.  The linear layer returns
``(B, P, D)``; the transformer returns ``(B, 1 + P, D)`` with the class token first.

Source: Dosovitskiy 2020 (arXiv:2010.11929), as in vit-pytorch, ``vit_pytorch/vit.py``.

Shapes: B images, S side in pixels, P features per image, D width, N heads, H head size.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from rudolph.files.constraints import Bounds, Count, check
from rudolph.models.layers.multi_head import multi_head_attention, split_heads

DropoutProbability = Annotated[float, Bounds(ge=0, lt=1)]


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    Attributes:
        image_size: Side of the images in pixels, S, a multiple of ``patch_size``.
        patch_size: Side of a patch in pixels.
        width: Channels, D.
        num_layers: Layers.
        num_heads: Attention heads, N.
        head_size: Channels per head, H.
        mlp_size: Width of the MLP's inner layer.
        dropout: Dropout probability of attention weights and outputs.
        embedding_dropout: Dropout probability of embeddings.
        num_classes: Outputs of a classification head; None for no head.
    """

    image_size: Count = 256
    patch_size: Count = 32
    width: Count = 1024
    num_layers: Count = 6
    num_heads: Count = 16
    head_size: Count = 64
    mlp_size: Count = 2048
    dropout: DropoutProbability = 0.0
    embedding_dropout: DropoutProbability = 0.0
    num_classes: Count | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size ({self.patch_size}), "
                f"got {self.image_size}"
            )


class ViTBlock(nn.Module):
    """A transformer layer: norm, attention, add; norm, MLP, add."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, inner_size = config.width, config.num_heads * config.head_size
        # vit-pytorch omits the projection of a single head that is as wide as the model.
        is_projected = config.num_heads > 1 or config.head_size != width
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * inner_size, bias=False)
        self.to_out = nn.Linear(inner_size, width) if is_projected else nn.Identity()
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, config.mlp_size)
        self.activation = nn.GELU()
        self.mlp_out = nn.Linear(config.mlp_size, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, P, D)`` to ``(B, P, D)``."""
        x = x + self.dropout(self.to_out(self.attend(self.attention_norm(x))))
        hidden = self.dropout(self.activation(self.mlp_in(self.mlp_norm(x))))
        return x + self.dropout(self.mlp_out(hidden))

    def attend(self, x: Tensor) -> Tensor:
        """Return the attention output ``(B, P, N * H)`` before its projection."""
        query, key, value = (
            split_heads(part, self.config.num_heads) for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        dropout = self.config.dropout if self.training else 0.0
        return multi_head_attention(query, key, value, dropout=dropout)


class ViT(nn.Module):
    """``model(images) -> features`` of the class token and every patch, ``(B, 1 + P, D)``."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_width = config.width, 3 * config.patch_size**2
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_norm = nn.LayerNorm(patch_width)
        self.patch_embedding = nn.Linear(patch_width, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.class_token = nn.Parameter(torch.randn(1, width))
        self.position = nn.Parameter(torch.randn(1 + num_patches, width))
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(ViTBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        if config.num_classes is not None:
            # Features do not use the head; it lets a classifier's weights be loaded and saved.
            self.head = nn.Linear(width, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return features of images ``(B, 3, S, S)``.

        Raises:
            ValueError: If the images have another size.
        """
        side = self.config.image_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images must be (B, 3, {side}, {side}), got {tuple(images.shape)}")
        patches = self.patch_norm(image_patches(images, self.config.patch_size))
        x = self.embedding_norm(self.patch_embedding(patches))  # (B, P, D)
        first = self.class_token.expand(len(x), 1, -1)
        x = self.dropout(torch.cat([first, x], dim=1) + self.position)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def image_patches(images: Tensor, size: int) -> Tensor:
    """Cut ``(B, C, S, S)`` into patches ``(B, P, size * size * C)``, channels innermost."""
    batch, channels, height, width = images.shape
    grid = images.view(batch, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


class LinearPatchEncoder(nn.Module):
    """One linear layer per patch, from ``(B, 3, S, S)`` to features ``(B, P, D)``.

    Source: Fuyu, which has no other vision encoder.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(B, P, D)`` of images ``(B, 3, S, S)``."""
        return self.proj(images).flatten(2).transpose(1, 2)
