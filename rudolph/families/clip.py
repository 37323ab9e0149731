"""CLIP: an image encoder and a text encoder that embed matching pairs close to each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rudolph.checkpoints import store
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Splits
from rudolph.data.text_image import TextImageExamples
from rudolph.families.interface import (
    Capabilities,
    ModelSection,
    Parts,
    RunSettings,
    TrainingFlags,
)
from rudolph.generation.clip_ranking import PLAIN_TEMPLATES, RECALLS_AT, ClipRanker
from rudolph.models.reference import to_reference
from rudolph.models.vision.clip import CLIP, CLIPConfig
from rudolph.sequence.tokenizer import Tokenizer
from rudolph.training.clip_losses import CLIPLossConfig, require_bias

if TYPE_CHECKING:
    from rudolph.training.clip import CLIPTraining

# Folder of a trained CLIP within a run's ``checkpoints``.
FOLDER = "clip"


@dataclass(frozen=True)
class CLIPModelConfig(CLIPConfig, ModelSection):
    """The ``model`` section of family ``clip``."""

    family: Literal["clip"] = "clip"
    losses: CLIPLossConfig = field(default_factory=CLIPLossConfig)

    @property
    def architecture(self) -> CLIPConfig:
        """Return the settings that determine the shape of both encoders."""
        return CLIPConfig(**{each.name: getattr(self, each.name) for each in fields(CLIPConfig)})


class CLIPCapabilities(Capabilities):
    """Embeddings of images and texts."""

    def __init__(self, ranker: ClipRanker) -> None:
        self.ranker = ranker

    def embed_image(self, images: Tensor) -> Tensor:
        """Embed images ``(B, 3, H, W)`` in [0, 1] as unit vectors ``(B, E)``."""
        return self.ranker.image_features(images)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors ``(B, E)``."""
        return self.ranker.text_features(texts)


class CLIPFamily:
    """CLIP as a ``families.interface.Family``."""

    config = CLIPModelConfig
    stage = "clip"
    reads_images = True
    is_trained = True
    can_shard = False
    weights_file = None
    capabilities = CLIPCapabilities

    def needs(self, section: Any) -> tuple[str, ...]:
        """Return the parts that a run trains or loads first."""
        return ("tokenizer",)

    def check(self, run: RunSettings) -> None:
        """Check that the loss and the logit bias fit together.

        Raises:
            ValueError: If they do not; the message names the setting.
        """
        try:
            require_bias(run.model.losses, has_bias=run.model.has_logit_bias)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error

    def check_flags(self, run: RunSettings, flags: TrainingFlags) -> None:
        """Check that no batch is split, because the loss compares all pairs of a batch.

        Raises:
            ValueError: If micro-batches are accumulated.
        """
        if flags.num_accumulated > 1:
            whole = flags.micro_batch_size * flags.num_accumulated
            raise ValueError(
                f"--micro-batch-size: expected {whole} or none for a CLIP, "
                f"got {flags.micro_batch_size}. It compares all pairs of a batch"
            )

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield the names of the logged curves."""
        yield from ("train/loss", "train/logit_scale", "val/loss")
        for direction in ("image_to_text", "text_to_image"):
            yield from (f"val/{direction}/recall_at_{k}" for k in RECALLS_AT)

    def empty(self, run: RunSettings) -> CLIP:
        """Construct the CLIP without a seed, for example to count weights on the meta device."""
        return CLIP(run.model.architecture)

    def build(self, run: RunSettings, parts: Parts) -> CLIP:
        """Build a CLIP initialised from the run's seed."""
        torch.manual_seed(mixed_seed(run.seed, self.stage))
        return self.empty(run)

    def adapt(self, source: nn.Module, target: nn.Module) -> list[str]:
        """Copy trained weights into a CLIP of the same shape."""
        assert isinstance(source, CLIP) and isinstance(target, CLIP)
        target.load_state_dict(source.state_dict())
        return []

    def examples(
        self, run: RunSettings, splits: Splits, name: str, parts: Parts
    ) -> TextImageExamples:
        """Return the text-image examples of a split."""
        assert parts.tokenizer is not None
        return TextImageExamples(
            splits(name), parts.tokenizer, run.model.architecture, seed=run.seed
        )

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> "CLIPTraining":
        """Return the Lightning module that trains a CLIP."""
        from rudolph.training.clip import CLIPTraining

        return CLIPTraining(model, run.model.losses, run.optim)

    def open(self, run: RunSettings, model: Any, parts: Parts) -> CLIPCapabilities:
        """Return the capabilities of a trained CLIP."""
        assert parts.tokenizer is not None
        return CLIPCapabilities(
            ClipRanker(model, parts.tokenizer, templates=PLAIN_TEMPLATES, batch_size=256)
        )

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        """Write a checkpoint with weights, configuration and tokenizer; return its files."""
        # The format is that of a released CLIP, so every command that loads a CLIP can load this
        # run.
        assert parts.tokenizer is not None
        family, config, tensors = to_reference(model)
        target = folder / FOLDER
        store.write_checkpoint(target, tensors, family=family, config=config, origin=origin)
        parts.tokenizer.save(target / store.TOKENIZER_FILE)
        return sorted(target.iterdir())

    def restore(self, folder: Path, run: RunSettings) -> tuple[CLIP, Parts]:
        """Load the CLIP and the tokenizer of a run on the CPU."""
        model = store.load_weights(folder / FOLDER)
        assert isinstance(model, CLIP)
        return model, Parts(Tokenizer(folder / FOLDER / store.TOKENIZER_FILE))
