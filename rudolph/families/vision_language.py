"""The shared base of families with a vision encoder and a language model.

The ``model`` section names the encoders and the pretrained parts that a model starts from.  Each
family defines how the image features enter the language model.

Shapes: B documents, M images per document, P images, S x S pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rudolph.data.seeds import mixed_seed
from rudolph.families.documents import DocumentFamily, DocumentSection
from rudolph.families.interface import Parts, RunSettings, TrainingFlags
from rudolph.families.vqgan import VQGAN_FILE
from rudolph.files.constraints import Count, Positive, check
from rudolph.models.layers.lora import add_low_rank
from rudolph.models.lm.language_model import LanguageModel
from rudolph.models.vision.clip import CLIP, VisionConfig, VisionEncoder, pixel_values
from rudolph.models.vision.conv import ConvEncoder, ConvEncoderConfig
from rudolph.models.vision.features import FeatureConfig, PatchPixels, ViTFeatures
from rudolph.models.vision.merge import MERGES
from rudolph.models.vision.vqgan_features import VQGANCodes, VQGANFeatures, VQGANLatents
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import save_weights

if TYPE_CHECKING:
    from rudolph.training.language import LanguageTraining

EncoderName = Literal["vit", "conv", "patches", "codes", "latents"]


@dataclass(frozen=True)
class PartSources:
    """Pretrained parts to start from; null for a new part.

    Attributes:
        vision: A run or release of a CLIP, which provides the image encoder.
        language_model: A run of family ``language_model``, which also provides the tokenizer.
    """

    vision: str | None = None
    language_model: str | None = None


@dataclass(frozen=True)
class VisionLanguageSection(DocumentSection):
    """Fields of the ``model`` section of families with a vision encoder and a language model.

    Attributes:
        parts: Pretrained parts to start from.
        encoders: Encoders of each image: ``vit``, a vision transformer; ``conv``, a convolutional
            network; ``patches``, the raw pixels of each patch of ``vit``; ``codes`` or ``latents``
            of the run's VQ-GAN, which is trained first.
        vision: Shape of ``vit``.
        features: Hidden states of ``vit`` to read.
        conv: Shape of ``conv``.
        merge: How several encoders become one, a name in ``MERGES``.
        lora_rank: Rank of the low-rank updates (LoRA) of a frozen language model's blocks; null
            for none.  The updates are trained with the fusion and merged at the end.
        lora_alpha: The updates are scaled by ``lora_alpha / lora_rank``.
    """

    parts: PartSources = field(default_factory=PartSources)
    encoders: tuple[EncoderName, ...] = ("vit",)
    vision: VisionConfig = field(default_factory=VisionConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    conv: ConvEncoderConfig = field(default_factory=ConvEncoderConfig)
    merge: Literal["channels", "tokens", "sum"] = "channels"
    lora_rank: Count | None = None
    lora_alpha: Positive = 16.0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        if self.init is not None and self.parts != PartSources():
            raise ValueError("parts: expected none with init, which has all parts of the model")
        names = list(self.encoders)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"encoders: expected different encoders, got {names}")
        if "codes" in names and len(names) > 1:
            raise ValueError(f"encoders: expected codes alone, got {names}")
        if self.lora_rank is not None and self.trains_language_model:
            raise ValueError("lora_rank: expected null where trained includes the language model")
        if self.parts.vision is not None and "vit" not in names:
            raise ValueError(f"parts.vision: expected vit among encoders, got {names}")

    @property
    def trains_language_model(self) -> bool:
        """Return whether the weights of the language model are trained."""
        raise NotImplementedError

    @property
    def trains_on_texts(self) -> bool:
        """Return whether a document without images changes any weight in training."""
        return self.trains_language_model or self.lora_rank is not None

    @property
    def tokenizer_source(self) -> str | None:
        """Return the source of the tokenizer, which is that of the language model."""
        return self.init or self.parts.language_model

    @property
    def part_sources(self) -> dict[str, tuple[str, type[nn.Module]]]:
        """Return the source and class of each pretrained part to start from, keyed by name."""
        kinds = {"vision": CLIP, "language_model": LanguageModel}
        sources = {name: getattr(self.parts, name) for name in kinds}
        return {
            name: (source, kinds[name]) for name, source in sources.items() if source is not None
        }


# Functions that build a vision encoder with new weights from a run's settings, keyed by name.
ENCODERS: dict[str, Callable[[RunSettings], Any]] = {
    "vit": lambda run: ViTFeatures(VisionEncoder(run.model.vision), run.model.features),
    "conv": lambda run: ConvEncoder(run.model.conv),
    "patches": lambda run: PatchPixels(run.model.vision),
    "codes": lambda run: VQGANCodes(VQGAN(run.vqgan)),
    "latents": lambda run: VQGANLatents(VQGAN(run.vqgan)),
}


def build_vision(run: RunSettings) -> Any:
    """Return the vision encoder that a run's settings name, or several merged into one.

    Raises:
        ValueError: If encoders read different image sizes, or their grids cannot be merged.
    """
    encoders = [ENCODERS[name](run) for name in run.model.encoders]
    sizes = [encoder.image_size for encoder in encoders]
    if len(set(sizes)) > 1:
        raise ValueError(f"encoders: expected one image size for all, got {sizes}")
    return encoders[0] if len(encoders) == 1 else MERGES[run.model.merge](encoders)


def encoder_pixels(images: Tensor, size: int) -> Tensor:
    """Return images ``(..., 3, H, W)`` in [0, 1] as an encoder's input ``(..., 3, S, S)``."""
    pixels = pixel_values(images.flatten(0, -4), size)
    return pixels.view(*images.shape[:-3], *pixels.shape[1:])


class VisionLanguageFamily(DocumentFamily):
    """A family whose network is ``PartlyTrained``: ``model.trained`` names the parts to train."""

    def needs(self, section: Any) -> tuple[str, ...]:
        """Return the parts that a run trains or loads first."""
        has_vqgan = {"codes", "latents"} & set(section.encoders)
        return ("tokenizer", "vqgan") if has_vqgan else ("tokenizer",)

    def build(self, run: RunSettings, parts: Parts) -> Any:
        """Build the model, load its pretrained parts, and freeze all but ``model.trained``."""
        model = super().build(run, parts)
        load_parts(model, run, parts)
        model.train_only(run.model.trained)
        return model

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> "LanguageTraining":
        """Return the Lightning module that trains the model, with its low-rank updates."""
        rank, alpha = run.model.lora_rank, run.model.lora_alpha
        if rank is not None:
            torch.manual_seed(mixed_seed(run.seed, self.stage, "lora"))
            for layer in list(model.language_model.layers.modules()):
                if isinstance(layer, nn.Linear):
                    add_low_rank(layer, rank=rank, alpha=alpha)
        return super().training(run, model, examples, flags)

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        """Write the tokenizer and the VQ-GAN; return their files and the weights file."""
        files = super().save(folder, model, parts, origin=origin)
        if parts.vqgan is not None:
            files.append(folder / VQGAN_FILE)
            save_weights(parts.vqgan, files[-1])
        return files

    def restore(self, folder: Path, run: RunSettings) -> tuple[Any, Parts]:
        """Load the model and the tokenizer that ``save`` wrote, on the CPU."""
        model, parts = super().restore(folder, run)
        model.train_only(run.model.trained)
        return model, parts


def load_parts(model: Any, run: RunSettings, parts: Parts) -> None:
    """Copy the pretrained parts that a run starts from into its model.

    Raises:
        ValueError: If the settings of a part differ from the run's settings; the message names
            both.
    """
    for encoder in model.vision.modules():
        if isinstance(encoder, VQGANFeatures):
            assert parts.vqgan is not None
            encoder.vqgan.load_state_dict(parts.vqgan.state_dict())
        elif isinstance(encoder, VisionEncoder) and "vision" in parts.models:
            copy_vision(encoder, parts.models["vision"], run.model.parts.vision)
    part = parts.models.get("language_model")
    if part is None:
        return
    target = model.language_model
    if part.config != target.config:
        raise ValueError(
            f"model.language_model: expected the settings of {run.model.parts.language_model}, "
            f"{part.config}, got {target.config}"
        )
    target.load_state_dict(part.state_dict())


def copy_vision(encoder: VisionEncoder, clip: Any, source: str) -> None:
    """Copy the image encoder of a CLIP, without its projection.

    Raises:
        ValueError: If its shape differs from the encoder's; the message names both.
    """
    given, config = encoder.vision_config, clip.visual.vision_config
    if given != config:
        raise ValueError(f"model.vision: expected {config}, the encoder of {source}, got {given}")
    own = encoder.state_dict()
    encoder.load_state_dict({name: clip.visual.state_dict()[name] for name in own})
