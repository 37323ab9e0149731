"""CLIP: similarity of texts and images.

``text -> transformer -> feature at EOS`` and
``image -> vision transformer -> feature of the class token``.  Logits are the scaled cosine
similarities between the two features.

Module names are those of OpenAI, so ruCLIP's checkpoint keys load without renaming.

Source: Radford 2021 (arXiv:2103.00020); openai/CLIP, ``clip/model.py``; ruclip 0.0.2,
``ruclip/model.py``; Zhai 2023 (arXiv:2303.15343) for the bias.

Shapes: B texts, P images, L text tokens, N patches plus the class token, D width of a transformer,
E embedding dim, H and W pixels.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.files.constraints import Count, check
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

    embed_dim: Count = 512
    image_resolution: Count = 224
    vision_layers: Count = 12
    vision_width: Count = 768
    vision_patch_size: Count = 32
    context_length: Count = 77
    vocab_size: Count = 49408
    transformer_width: Count = 512
    transformer_heads: Count = 8
    transformer_layers: Count = 12
    eos_id: int = EOS
    has_logit_bias: bool = False

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
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

    @property
    def vision(self) -> "VisionConfig":
        """Return the config of the vision transformer without the projection."""
        return VisionConfig(
            image_size=self.image_resolution,
            patch_size=self.vision_patch_size,
            width=self.vision_width,
            num_layers=self.vision_layers,
            num_heads=self.vision_heads,
            mlp_width=4 * self.vision_width,
        )


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a CLIP vision transformer; the defaults are OpenAI's ViT-L/14 at 336 pixels.

    Attributes:
        image_size: Side of the input images in pixels, a multiple of ``patch_size``.
        patch_size: Side of a patch in pixels.
        width: Channels per token.
        num_layers: Layers.
        num_heads: Attention heads, a divisor of ``width``.
        mlp_width: Channels of the MLP's inner layer.
        activation: A name in ``ACTIVATIONS``.
        norm_eps: Epsilon of the norms.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        for name in ("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, divisor in (("image_size", "patch_size"), ("width", "num_heads")):
            value, by = getattr(self, name), getattr(self, divisor)
            if value % by:
                raise ValueError(f"{name}: expected a multiple of {divisor} ({by}), got {value}")
        if self.activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: expected one of {names}, got {self.activation!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


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


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Block(nn.Module):
    """A transformer layer: norm, attention, add; norm, MLP, add."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_width: int | None = None,
        activation: str = "quick_gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = mlp_width or 4 * width
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(inner, width))
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``(B, T, D)``; ``mask`` ``(T, T)`` is true where attention is forbidden."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A sequence of transformer layers."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(B, T, D)``; ``mask`` ``(T, T)`` is true where attention is forbidden."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionEncoder(nn.Module):
    """A vision transformer without output projection: embeddings, layers and output norm.

    Subclasses and ``features.ViTFeatures`` read its hidden states.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.vision_config = config
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        rows, columns = config.grid
        scale = width**-0.5
        self.class_embedding = nn.Parameter(torch.randn(width).mul_(scale))
        self.positional_embedding = nn.Parameter(
            torch.randn(rows * columns + 1, width).mul_(scale)
        )
        self.ln_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.transformer = Transformer(
            Block(
                width,
                config.num_heads,
                mlp_width=config.mlp_width,
                activation=config.activation,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        self.ln_post = nn.LayerNorm(width, eps=config.norm_eps)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the input ``(P, N, D)`` of the first layer: class token, then patches."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # (P, N - 1, D)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)


class VisionTransformer(VisionEncoder):
    """CLIP's image tower, from normalised images ``(P, 3, H, W)`` to features ``(P, E)``."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config.vision)
        width = config.vision_width
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim).mul_(width**-0.5))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features ``(P, E)`` of normalised images ``(P, 3, H, W)``."""
        x = self.transformer(self.embed(pixel_values))
        return self.ln_post(x[:, 0]) @ self.proj


class TextTransformer(nn.Module):
    """CLIP's text tower, from token ids ``(B, L)`` to features ``(B, E)`` by ``encode_text``.

    In a checkpoint its modules stand next to the image tower, so ``CLIP`` is one itself.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.add_text_tower(config)

    def add_text_tower(self, config: CLIPConfig) -> None:
        """Create the modules of the tower with OpenAI's initial values."""
        self.config = config
        width, num_layers = config.transformer_width, config.transformer_layers
        self.transformer = Transformer(
            Block(width, config.transformer_heads) for _ in range(num_layers)
        )
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(
            torch.randn(config.context_length, width).mul_(0.01)
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim).mul_(width**-0.5))
        initialize_text_tower(self)

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


class CLIP(TextTransformer):
    """A CLIP model: ``model(input_ids, pixel_values) -> (logits_per_image, logits_per_text)``."""

    logit_bias: nn.Parameter | None

    def __init__(self, config: CLIPConfig) -> None:
        nn.Module.__init__(self)
        # The image tower comes first, since the order decides the initial values of a seed.
        self.visual = VisionTransformer(config)
        self.add_text_tower(config)
        scale = SIGMOID_SCALE if config.has_logit_bias else SOFTMAX_SCALE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        bias = nn.Parameter(torch.tensor(SIGMOID_BIAS)) if config.has_logit_bias else None
        # Registering None keeps the key out of the state dict.
        self.register_parameter("logit_bias", bias)

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


def initialize_text_tower(model: TextTransformer) -> None:
    """Initialise the text tower like OpenAI: in deeper models, each layer adds less at first.

    As in OpenAI's code, the layers of the vision transformer keep torch's default initialisation.
    """
    width, num_layers = model.config.transformer_width, model.config.transformer_layers
    residual_std = width**-0.5 * (2 * num_layers) ** -0.5
    stds = {
        "attn.in_proj_weight": width**-0.5,
        "attn.out_proj.weight": residual_std,
        "mlp.c_fc.weight": (2 * width) ** -0.5,
        "mlp.c_proj.weight": residual_std,
    }
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    for block in model.transformer.resblocks:
        for name, std in stds.items():
            nn.init.normal_(block.get_parameter(name), std=std)
