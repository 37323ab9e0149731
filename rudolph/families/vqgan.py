"""The VQ-GAN alone: a run that trains an image tokenizer and no model on its tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from rudolph.models.weights import save_weights
from rudolph.training.steps import ManualStepModule


@dataclass(frozen=True)
class VQGANOnlyConfig(ModelSection):
    """The ``model`` section of family ``vqgan``; the sections ``vqgan*`` hold its settings."""

    family: Literal["vqgan"] = "vqgan"


class VQGANCapabilities(Capabilities):
    """Images to tokens and back."""

    def __init__(self, vqgan: VQGAN) -> None:
        self.vqgan = vqgan

    def image_tokenizer(self) -> ImageTokenizer:
        return ImageTokenizer(self.vqgan)


class VQGANFamily:
    """The VQ-GAN as a ``families.interface.Family``: the run trains it as a part."""

    config = VQGANOnlyConfig
    needs = ("vqgan",)
    stage = "vqgan"
    is_trained = False
    weights_file = None
    capabilities = VQGANCapabilities

    def check(self, run: RunSettings) -> None:
        """Check nothing: the settings of the part are checked with it."""

    def check_flags(self, run: RunSettings, flags: TrainingFlags) -> None:
        """Check nothing: every flag suits a VQ-GAN."""

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        yield from ()

    def empty(self, run: RunSettings) -> VQGAN:
        return VQGAN(run.vqgan)

    def build(self, run: RunSettings, parts: Parts) -> VQGAN:
        assert parts.vqgan is not None
        return parts.vqgan

    def adapt(self, source: nn.Module, target: nn.Module) -> list[str]:
        raise ValueError("model.init: family vqgan starts from vqgan.init")

    def examples(self, run: RunSettings, splits: Splits, name: str, parts: Parts) -> Any:
        raise NotImplementedError("a run of family vqgan trains its part alone")

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> ManualStepModule:
        raise NotImplementedError("a run of family vqgan trains its part alone")

    def open(self, model: Any, parts: Parts) -> VQGANCapabilities:
        return VQGANCapabilities(model)

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        path = folder / "vqgan.safetensors"
        save_weights(model, path)
        return [path]
