"""Construction of one vision encoder, or of several merged ones, from their configs.

Source: Karamcheti 2024 (arXiv:2402.07865), section 4.2, for two encoders of one image.
"""

from dataclasses import dataclass, field

from torch import nn

from rudolph.models.vision.clip import VisionConfig, VisionEncoder
from rudolph.models.vision.conv import ConvEncoder, ConvEncoderConfig
from rudolph.models.vision.features import FeatureConfig, ViTFeatures
from rudolph.models.vision.merge import MERGES


@dataclass(frozen=True)
class VisionEncodersConfig:
    """The encoders of each image; the default is that of LLaVA-1.5.

    Attributes:
        encoders: Transformers and convolutional encoders, all for the same image size.
        features: Hidden states to read from transformers.
        merge: A name in ``MERGES``, for more than one encoder.
    """

    encoders: tuple[VisionConfig | ConvEncoderConfig, ...] = (VisionConfig(),)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    merge: str = "channels"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        if self.merge not in MERGES:
            raise ValueError(f"merge: expected one of {', '.join(MERGES)}, got {self.merge!r}")
        sizes = [encoder.image_size for encoder in self.encoders]
        if len(set(sizes)) != 1:
            raise ValueError(f"encoders: expected one image_size for all, got {sizes}")

    @property
    def image_size(self) -> int:
        """Return the side of the images in pixels."""
        return self.encoders[0].image_size


def build_vision_encoders(config: VisionEncodersConfig) -> nn.Module:
    """Build an encoder with new weights; ``features.py`` describes its interface.

    Raises:
        ValueError: If the merge needs equal grids and the grids differ.
    """
    encoders = [
        ConvEncoder(encoder)
        if isinstance(encoder, ConvEncoderConfig)
        else ViTFeatures(VisionEncoder(encoder), config.features)
        for encoder in config.encoders
    ]
    return encoders[0] if len(encoders) == 1 else MERGES[config.merge](encoders)
