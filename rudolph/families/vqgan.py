"""The VQ-GAN alone: a run that trains an image tokenizer and no model of its tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from rudolph.data.splits import Splits
from rudolph.families.interface import (
    Capabilities,
    ModelSection,
    Parts,
    RunSettings,
    TrainingFlags,
)
from rudolph.generation.trained_models import ImageTokenizer
from rudolph.models.vqgan.model import VQGAN
from rudolph.models.weights import load_exactly, read_weights, save_weights

if TYPE_CHECKING:
    from rudolph.training.steps import ManualStepModule

# The weights in a run's ``checkpoints``.
VQGAN_FILE = "vqgan.safetensors"


@dataclass(frozen=True)
class VQGANOnlyConfig(ModelSection):
    """The ``model`` section of family ``vqgan``; the sections ``vqgan*`` hold its settings."""

    family: Literal["vqgan"] = "vqgan"


class VQGANCapabilities(Capabilities):
    """Conversion of images to tokens and back."""

    def __init__(self, vqgan: VQGAN) -> None:
        self.vqgan = vqgan

    def image_tokenizer(self) -> ImageTokenizer:
        """Return the VQ-GAN as an image tokenizer."""
        return ImageTokenizer(self.vqgan)


class VQGANFamily:
    """The VQ-GAN as a ``families.interface.Family``, trained as a part of the run."""

    config = VQGANOnlyConfig
    stage = "vqgan"
    reads_images = True
    is_trained = False
    can_shard = False
    weights_file = None
    capabilities = VQGANCapabilities

    def needs(self, section: Any) -> tuple[str, ...]:
        """Return the parts that a run trains or loads first."""
        return ("vqgan",)

    def check(self, run: RunSettings) -> None:
        """Check nothing: the settings are checked with the part."""

    def check_flags(self, run: RunSettings, flags: TrainingFlags) -> None:
        """Check nothing: every flag suits a VQ-GAN."""

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield nothing, because the VQ-GAN's training as a part logs its own curves."""
        yield from ()

    def empty(self, run: RunSettings) -> VQGAN:
        """Construct the VQ-GAN without a seed, for example to count weights on the meta device."""
        return VQGAN(run.vqgan)

    def build(self, run: RunSettings, parts: Parts) -> VQGAN:
        """Return the VQ-GAN that was trained as a part."""
        assert parts.vqgan is not None
        return parts.vqgan

    def adapt(self, source: nn.Module, target: nn.Module) -> list[str]:
        """Reject trained weights: they belong in ``vqgan.init``.

        Raises:
            ValueError: Always.
        """
        raise ValueError("model.init: family vqgan starts from vqgan.init")

    def examples(self, run: RunSettings, splits: Splits, name: str, parts: Parts) -> Any:
        """Reject the call: the training of the part has its own examples.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a run of family vqgan trains its part alone")

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> "ManualStepModule":
        """Reject the call: the run trains only the part.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a run of family vqgan trains its part alone")

    def open(self, run: RunSettings, model: Any, parts: Parts) -> VQGANCapabilities:
        """Return the capabilities of a trained VQ-GAN."""
        return VQGANCapabilities(model)

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        """Write the weights of the VQ-GAN and return the file."""
        path = folder / VQGAN_FILE
        save_weights(model, path)
        return [path]

    def restore(self, folder: Path, run: RunSettings) -> tuple[VQGAN, Parts]:
        """Load the VQ-GAN of a run on the CPU."""
        vqgan, path = VQGAN(run.vqgan), folder / VQGAN_FILE
        load_exactly(vqgan, read_weights(path), family=str(path))
        return vqgan.eval(), Parts()
