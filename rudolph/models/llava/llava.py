"""LLaVA: image vectors among the word embeddings of a decoder-only language model.

``images -> vision -> connector -> vectors``; each vector replaces the embedding of one image token
of the text, and the language model reads the whole row under its causal mask.

With ``canvases``, an image becomes a whole view and tiles (LLaVA-NeXT, see ``anyres``).  Without
them, it becomes one view (LLaVA-1.5).  A row may have any number of images, or none.
``input_ids`` repeat the image token ``num_image_tokens`` times per image, so lengths are known
before the model runs.

``LLaVA.trained_choices`` lists which parts can be trained together.

Source: Liu 2023 (arXiv:2304.08485; arXiv:2310.03744); LLaVA, ``model/llava_arch.py``;
transformers, ``models/llava`` and ``models/llava_next``.

Shapes: B rows, T positions, P images, C crops per image, S pixels per side, M vectors, D channels
of the language model, V vocabulary.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rudolph.models.fusion.connectors import ConnectorConfig, ConnectorShape, build_connector
from rudolph.models.layers.partly_trained import PartlyTrained
from rudolph.models.llava.anyres import (
    LLAVA_CANVASES,
    Size,
    num_anyres_tokens,
    pack_tiles,
    tile_rows_and_columns,
)
from rudolph.models.lm.language_model import LanguageModel, LanguageModelConfig
from rudolph.models.vision.encoders import VisionEncodersConfig, build_vision_encoders


@dataclass(frozen=True)
class ImageTokenConfig:
    """How images are represented in a text.

    Attributes:
        token_id: Id of the image token; image vectors replace its embeddings.
        image_size: Side of one view in pixels, S.
        canvases: Canvas sizes (height, width) of anyres, where the first wins ties; empty for one
            view per image.
    """

    token_id: int
    image_size: int = 336
    canvases: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if self.image_size < 1:
            raise ValueError(f"image_size: expected at least 1, got {self.image_size}")
        for height, width in self.canvases:
            sides = (height % self.image_size, width % self.image_size, min(height, width) < 1)
            if any(sides):
                raise ValueError(
                    f"canvases: expected multiples of image_size ({self.image_size}), "
                    f"got {height}x{width}"
                )


@dataclass(frozen=True)
class LLaVAConfig:
    """Architecture of a LLaVA; the defaults are those of LLaVA-1.5 7B.

    Attributes:
        vision: The vision encoders.
        connector: The connector.
        language_model: The language model.
        image_token_id: Id of the image token; image vectors replace its embeddings.
        canvases: Canvas sizes (height, width) of anyres; empty for one view per image.
    """

    vision: VisionEncodersConfig = field(default_factory=VisionEncodersConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    image_token_id: int = 32_000
    canvases: tuple[Size, ...] = ()


class LLaVA(PartlyTrained):
    """``model(input_ids, attention_mask, pixel_values, image_sizes) -> logits``.

    Args:
        vision: Encodes views as tokens ``(P, N, Dv)``; see ``vision/features.py``.
        connector: Maps these tokens to vectors ``(P, M, D)``; see ``fusion/connectors.py``.
        language_model: The language model.
        images: How images are represented in a text.

    Raises:
        ValueError: If there are canvases but the vectors of a view form no square grid.
    """

    image_newline: nn.Parameter | None
    # LLaVA's first stage trains the connector, its second stage all but the vision encoder.
    trained_choices: ClassVar = {
        "all": ("vision", "connector", "image_newline", "language_model"),
        "connector": ("connector", "image_newline"),
        "without_vision": ("connector", "image_newline", "language_model"),
    }

    def __init__(
        self,
        vision: nn.Module,
        connector: nn.Module,
        language_model: LanguageModel,
        images: ImageTokenConfig,
    ) -> None:
        super().__init__()
        self.images = images
        self.vision, self.connector, self.language_model = vision, connector, language_model
        num_tokens: Any = connector.num_tokens
        grid: Any = connector.grid_out
        self.num_view_tokens: int = num_tokens
        self.grid: Size | None = grid
        newline = None
        if images.canvases:
            side = math.isqrt(num_tokens)
            if self.grid != (side, side) or side**2 != num_tokens:
                raise ValueError(
                    f"connector: expected a square grid of tokens for anyres, "
                    f"got {num_tokens} tokens in the grid {self.grid}"
                )
            size = language_model.config.hidden_size
            newline = nn.Parameter(torch.randn(size).mul_(size**-0.5))
        self.register_parameter("image_newline", newline)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``(B, T, V)``; see ``embed`` for the arguments."""
        embeddings = self.embed(input_ids, pixel_values, image_sizes)
        return self.language_model(embeddings, attention_mask=attention_mask)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> Tensor:
        """Embed words and images as inputs ``(B, T, D)`` of the language model.

        Args:
            input_ids: ``(B, T)``, with the image token repeated ``num_image_tokens`` times per
                image.
            pixel_values: Normalised views of all images, in the order of the rows:
                ``(P, 3, S, S)`` or, with canvases, ``(P, C, 3, S, S)``, padded to the
                largest number of crops.
            image_sizes: ``(P, 2)``, the (height, width) of each image in pixels; needed only with
                canvases.

        Raises:
            ValueError: If the image tokens of a row do not match its images; the message names
                the row.
        """
        is_image = input_ids == self.images.token_id
        counts = [] if pixel_values is None else self.token_counts(pixel_values, image_sizes)
        require_image_tokens(is_image.sum(1).tolist(), counts)
        words = self.language_model.embed_tokens(input_ids.masked_fill(is_image, 0))
        if pixel_values is None:
            return words
        vectors = torch.cat(self.image_vectors(pixel_values, image_sizes))
        return words.masked_scatter(is_image[..., None], vectors.to(words.dtype))

    def token_counts(self, pixel_values: Tensor, image_sizes: Tensor | None) -> list[int]:
        """Return the number of vectors of each image; see ``embed`` for the arguments."""
        if not self.images.canvases:
            return [self.num_view_tokens] * len(pixel_values)
        return [self.num_image_tokens(size) for size in size_list(image_sizes)]

    def image_vectors(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None
    ) -> list[Tensor]:
        """Return the vectors ``(M, D)`` of each image; see ``embed`` for the arguments."""
        if not self.images.canvases:
            return list(self.encode_views(pixel_values))
        sizes = size_list(image_sizes)
        tiles = [self.tiles_of(size) for size in sizes]
        counts = [1 + rows * columns for rows, columns in tiles]
        views = self.encode_views(real_crops(pixel_values, counts))
        newline, grid = self.image_newline, self.grid
        assert newline is not None and grid is not None
        parts = torch.split(views, counts)
        return [
            pack_tiles(part, size, tile, grid=grid, newline=newline)
            for part, size, tile in zip(parts, sizes, tiles, strict=True)
        ]

    def encode_views(self, views: Tensor) -> Tensor:
        """Encode normalised views ``(P, 3, S, S)`` as vectors ``(P, M, D)``."""
        if getattr(self.connector, "reads_features", True):
            return self.connector(self.vision(views)).values
        return self.connector(views.new_zeros(len(views), 0)).values

    def tiles_of(self, size: Size) -> tuple[int, int]:
        """Return the numbers of tile rows and columns for an image of (height, width) pixels."""
        return tile_rows_and_columns(size, self.images.canvases, self.images.image_size)

    def num_image_tokens(self, size: Size) -> int:
        """Return the number of vectors of an image of (height, width) pixels.

        Raises:
            ValueError: If there are canvases and the image is too long for its canvas.
        """
        if not self.images.canvases:
            return self.num_view_tokens
        assert self.grid is not None
        return num_anyres_tokens(
            size, self.images.canvases, tile=self.images.image_size, grid=self.grid
        )

    @torch.no_grad()
    def generate_greedily(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        *,
        num_tokens: int,
        end_id: int | None = None,
    ) -> Tensor:
        """Continue prompts greedily; return new tokens ``(B, S)`` without the prompt.

        Images are encoded once.  Padding may be on either side.
        """
        return self.language_model.generate_greedily(
            self.embed(input_ids, pixel_values, image_sizes),
            num_tokens=num_tokens,
            attention_mask=attention_mask,
            end_id=end_id,
        )


def size_list(image_sizes: Tensor | None) -> list[Size]:
    """Return (height, width) of each image from ``(P, 2)``.

    Raises:
        ValueError: If the sizes are missing.
    """
    if image_sizes is None:
        raise ValueError("image_sizes: expected (P, 2) for anyres, got None")
    return [(height, width) for height, width in image_sizes.tolist()]


def require_image_tokens(per_row: list[int], per_image: list[int]) -> None:
    """Raise ``ValueError`` unless consecutive images exactly fill the image tokens of each row."""
    image = 0
    for row, tokens in enumerate(per_row):
        first, vectors = image, 0
        while vectors < tokens and image < len(per_image):
            vectors += per_image[image]
            image += 1
        if vectors != tokens:
            raise ValueError(
                f"input_ids: expected {vectors} image tokens in row {row} for the vectors of "
                f"{image - first} images, got {tokens}"
            )
    if image < len(per_image):
        raise ValueError(
            f"input_ids: expected image tokens for {len(per_image)} images, got those of {image}"
        )


def real_crops(pixel_values: Tensor, counts: list[int]) -> Tensor:
    """Return the crops without padding, ``(sum of counts, 3, S, S)``.

    Raises:
        ValueError: If an image has fewer crops than its size needs; the message names the image.
    """
    if pixel_values.dim() != 5 or len(pixel_values) != len(counts):
        raise ValueError(
            f"pixel_values: expected (P, C, 3, S, S) with {len(counts)} images, "
            f"got {tuple(pixel_values.shape)}"
        )
    for index, count in enumerate(counts):
        if pixel_values.shape[1] < count:
            raise ValueError(
                f"pixel_values: expected {count} crops for the size of image {index}, "
                f"got {pixel_values.shape[1]}"
            )
    return torch.cat([crops[:count] for crops, count in zip(pixel_values, counts, strict=True)])


def build_llava(config: LLaVAConfig) -> LLaVA:
    """Build a LLaVA with new weights."""
    vision: Any = build_vision_encoders(config.vision)
    shape = ConnectorShape(vision.width, config.language_model.hidden_size, vision.grid)
    return LLaVA(
        vision,
        build_connector(config.connector, shape),
        LanguageModel(config.language_model),
        ImageTokenConfig(config.image_token_id, config.vision.image_size, config.canvases),
    )


VICUNA_7B = LanguageModelConfig()
VICUNA_13B = replace(
    VICUNA_7B,
    hidden_size=5120,
    num_layers=40,
    num_heads=40,
    num_key_value_heads=40,
    mlp_size=13_824,
)
YI_34B = LanguageModelConfig(
    vocab_size=64_000,
    hidden_size=7168,
    num_layers=60,
    num_heads=56,
    num_key_value_heads=8,
    mlp_size=20_480,
    rope_theta=5_000_000.0,
)
LLAVA_CONFIGS: dict[str, LLaVAConfig] = {
    "llava-1.5-7b": LLaVAConfig(),
    "llava-1.5-13b": LLaVAConfig(language_model=VICUNA_13B),
    "llava-next-7b": LLaVAConfig(canvases=LLAVA_CANVASES),
    "llava-next-13b": LLaVAConfig(language_model=VICUNA_13B, canvases=LLAVA_CANVASES),
    "llava-next-34b": LLaVAConfig(
        language_model=YI_34B, image_token_id=64_000, canvases=LLAVA_CANVASES
    ),
}
