"""Image features for connectors: tokens of any layers of a vision encoder.

An encoder has ``width`` (channels per token), ``grid`` (rows and columns of patches),
``num_tokens``, ``image_size`` and ``encoder(pixel_values) -> (P, N, width)``, with tokens in
row-major order.
Tokens without a grid form one row, and ``grid`` is (1, N).  ``encoders.py`` builds encoders from
their configs:

* ``ViTFeatures``: a CLIP vision transformer, such as LLaVA's, or the tower of a trained CLIP
* ``PatchPixels``: the pixels of each patch, for models without an encoder
* ``conv.ConvEncoder``: a convolutional network
* ``vqgan_features.VQGANCodes`` and ``VQGANLatents``: a VQ-GAN
* ``merge.py``: several encoders as one

Layers are numbered as in Hugging Face's ``hidden_states``: 0 is the input of the first layer, L
is the output of the last layer, and -1 is the same as L.  As in LLaVA, no output norm is applied
to patches.

Source: LLaVA, ``multimodal_encoder/clip_encoder.py``; Liu 2023 (arXiv:2304.08485).

Shapes: P images, N tokens, W channels of a layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.models.vision.clip import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class FeatureConfig:
    """Hidden states that a connector reads.

    Attributes:
        layers: Numbers of hidden states; several are concatenated along the channels.
        select: ``patch`` drops the class token, ``full`` keeps it first, and ``class`` keeps only
            the class token after the output norm (with layer -1, CLIP's pooled feature).
    """

    layers: tuple[int, ...] = (-2,)
    select: str = "patch"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if not self.layers:
            raise ValueError("layers: expected at least one layer, got none")
        if self.select not in SELECTIONS:
            names = ", ".join(SELECTIONS)
            raise ValueError(f"select: expected one of {names}, got {self.select!r}")


class ViTFeatures(nn.Module):
    """Hidden states of a CLIP vision transformer; layers after the last one read are skipped.

    Raises:
        ValueError: If the encoder lacks a layer; the message names it.
    """

    def __init__(self, encoder: VisionEncoder, config: FeatureConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        depth = encoder.vision_config.num_layers
        for layer in config.layers:
            if not -depth - 1 <= layer <= depth:
                raise ValueError(f"layers: expected -{depth + 1} to {depth}, got {layer}")
        self.layers = [layer % (depth + 1) for layer in config.layers]
        self.width = encoder.vision_config.width * len(config.layers)
        self.image_size = encoder.vision_config.image_size
        rows, columns = encoder.vision_config.grid
        # The class token has no position in the grid.
        grids = {"patch": (rows, columns), "full": (1, rows * columns + 1), "class": (1, 1)}
        self.grid = grids[config.select]
        self.num_tokens = math.prod(self.grid)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return tokens ``(P, N, width)`` of normalised images ``(P, 3, H, W)``."""
        side = self.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"pixel_values: expected (P, 3, {side}, {side}), got {tuple(pixel_values.shape)}"
            )
        states = [self.encoder.embed(pixel_values)]
        for block in self.encoder.transformer.resblocks[: max(self.layers)]:
            states.append(block(states[-1], None))
        select = SELECTIONS[self.config.select]
        return torch.cat([select(self.encoder, states[layer]) for layer in self.layers], dim=-1)


class PatchPixels(nn.Module):
    """An encoder without weights, whose features are the pixels of each patch.

    With a linear connector, it gives a decoder-only model that reads patches, like Fuyu.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size, self.image_size, self.grid = (
            config.patch_size,
            config.image_size,
            config.grid,
        )
        self.width, self.num_tokens = 3 * config.patch_size**2, math.prod(config.grid)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the pixels ``(P, N, width)`` of normalised images ``(P, 3, H, W)``."""
        return F.pixel_unshuffle(pixel_values, self.patch_size).flatten(2).mT


# Selections from the tokens (P, 1 + N, W) of a hidden state; the class token comes first.
SELECTIONS: dict[str, Callable[[VisionEncoder, Tensor], Tensor]] = {
    "patch": lambda encoder, x: x[:, 1:],
    "full": lambda encoder, x: x,
    "class": lambda encoder, x: encoder.ln_post(x[:, :1]),
}
