"""Interface between the model families and the code that trains, evaluates and stores a run.

A family is one file in this package, registered in ``FAMILIES`` (``families/registry.py``).
Generic code gets its model, its examples and its training module from the family. Evaluators use
the capabilities of a trained model and never its family.

Shapes: B texts or images, I image tokens, C choices, E embedding size, H and W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor, nn

from rudolph.data.documents import Panel
from rudolph.data.splits import DataConfig, SplitArrays, Splits
from rudolph.generation.answering import OnToken
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.trained_models import ImageTokenizer
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer, TokenizerConfig
from rudolph.training.hardware_flags import HardwareFlags
from rudolph.training.optim import OptimConfig

if TYPE_CHECKING:
    # Lightning takes seconds to import, and only trainings need it.
    from rudolph.training.steps import ManualStepModule


@dataclass(frozen=True)
class ModelSection:
    """Fields that the ``model`` section of every family has.

    Attributes:
        family: A name in ``FAMILIES``.
        init: A run, a release or a folder with trained weights to start from; null for none.
    """

    family: str
    init: str | None = None

    @property
    def tokenizer_source(self) -> str | None:
        """Return the source of the tokenizer whose ids the weights use; None to train one."""
        return None

    @property
    def part_sources(self) -> dict[str, tuple[str, type[nn.Module]]]:
        """Return the source and class of each pretrained part to start from, keyed by name."""
        return {}


class RunSettings(Protocol):
    """The part of a run's configuration that families read.

    ``config.run.RunConfig`` implements it.
    """

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        ...

    @property
    def model(self) -> Any:
        """Return the ``model`` section of the family."""
        ...

    @property
    def data(self) -> DataConfig:
        """Return the datasets and tasks."""
        ...

    @property
    def tokenizer(self) -> TokenizerConfig:
        """Return the settings of the text tokenizer."""
        ...

    @property
    def vqgan(self) -> VQGANConfig:
        """Return the settings of the image tokenizer."""
        ...

    @property
    def optim(self) -> OptimConfig:
        """Return the settings of the model's training."""
        ...

    @property
    def sequence_layout(self) -> SequenceLayout:
        """Return the layout of the token sequences."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary of the model."""
        ...


@dataclass(frozen=True)
class Parts:
    """Components that are trained or loaded before the model of a family.

    Attributes:
        tokenizer: The text tokenizer; None if the family needs none.
        vqgan: The image tokenizer; None if the family needs none.
        image_indices: Returns the image tokens of a split, ``(N, I)`` or ``(N, S, I)`` for S code
            samples.
        models: Pretrained parts to start from, keyed as in ``ModelSection.part_sources``.
    """

    tokenizer: Tokenizer | None = None
    vqgan: VQGAN | None = None
    image_indices: Callable[[SplitArrays], np.ndarray[Any, Any]] | None = None
    models: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingFlags:
    """Hardware flags of a run, and the micro-batches of a training that result from them.

    Attributes:
        hardware: The flags.
        num_accumulated: Micro-batches per optimizer step on each device.
        micro_batch_size: Examples per micro-batch on each device.
    """

    hardware: HardwareFlags
    num_accumulated: int
    micro_batch_size: int


class Examples(Protocol):
    """The examples of one split; example i of ``batch`` depends only on the seed and i."""

    @property
    def num_whole(self) -> int:
        """Return the number of validation examples that ``whole`` can return."""
        ...

    def note(self) -> str:
        """Return one line for the log, such as the number of truncated texts."""
        ...

    def batch(self, numbers: Sequence[int]) -> Any:
        """Return the training examples with these numbers as one batch."""
        ...

    def whole(self, indices: Sequence[int]) -> Any:
        """Return validation examples, unshuffled and without augmentation, as one batch."""
        ...


class Capabilities:
    """Capabilities that evaluators use; a family overrides those that its model has.

    Raises:
        NotImplementedError: From every method that a family does not override.
    """

    def generate_image(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Generate images ``(B, 3, H, W)`` in [0, 1], one per caption, each from its own seed."""
        raise NotImplementedError

    def generate_text(
        self,
        task: str,
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        allowed_characters: str | None = None,
        missing_image: TokenSamplingConfig | None = None,
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Generate one text per seed for a task of ``sequence.tasks``.

        Args:
            task: A name in ``TASKS``.
            config: How tokens are sampled.
            seeds: One seed per text.
            images: ``(B, 3, H, W)`` in [0, 1] if the task has images.
            questions: One per text if the task has questions.
            allowed_characters: The only characters that a text may contain; None allows all.
            missing_image: How to generate an image for a question without one, as the code of
                Fusion Brain Challenge 2 does (fbc2_aij2022, ``inference.py``). None fills the
                image with code 0, as in training.
            on_token: Called with the number of generated tokens and the total.
        """
        raise NotImplementedError

    def generate_text_after_shots(
        self,
        task: str,
        shots: Sequence[Sequence[Panel]],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        allowed_characters: str | None = None,
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Generate one text per seed as ``generate_text`` does, each after some shots.

        ``shots`` has the answered panels that precede each prompt, an empty list for none.
        """
        raise NotImplementedError

    def loglikelihood(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Compute the log-likelihood ``(B, C)`` in nats of each choice as the text of a task."""
        raise NotImplementedError

    def loglikelihood_after_shots(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        shots: Sequence[Sequence[Panel]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Compute the log-likelihood ``(B, C)`` in nats of each choice after the given shots.

        ``shots`` has a list for each prompt: the answered panels before it, possibly none.
        """
        raise NotImplementedError

    def count_operations(
        self,
        task: str,
        answers: Sequence[str],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
    ) -> tuple[float, float]:
        """Count the floating-point operations per example, for training and for answering.

        Training counts a forward and a backward pass.  Answering reads the prompt and generates an
        answer of the given length.
        """
        raise NotImplementedError

    def embed_image(self, images: Tensor) -> Tensor:
        """Embed images ``(B, 3, H, W)`` in [0, 1] as unit vectors ``(B, E)``."""
        raise NotImplementedError

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors ``(B, E)``."""
        raise NotImplementedError

    def image_tokenizer(self) -> ImageTokenizer:
        """Return the image tokenizer with ``encode``, ``decode`` and its codebook size."""
        raise NotImplementedError

    def token_pipeline(self) -> Pipeline:
        """Return the masked decoder with its tokenizers, for evaluators that work on tokens."""
        raise NotImplementedError

    @classmethod
    def provided(cls) -> tuple[str, ...]:
        """Return the names of the methods that this class overrides."""
        return tuple(
            name for name in CAPABILITIES if getattr(cls, name) is not getattr(Capabilities, name)
        )


CAPABILITIES = (
    "generate_image",
    "generate_text",
    "generate_text_after_shots",
    "loglikelihood",
    "loglikelihood_after_shots",
    "count_operations",
    "embed_image",
    "embed_text",
    "image_tokenizer",
    "token_pipeline",
)


class Family(Protocol):
    """One architecture with its settings, examples, training and capabilities."""

    @property
    def config(self) -> type[Any]:
        """Return the class of the ``model`` section."""
        ...

    def needs(self, section: Any) -> tuple[str, ...]:
        """Return the parts, from ``PARTS``, that a run trains or loads first.

        Args:
            section: The run's ``model`` section.
        """
        ...

    @property
    def reads_images(self) -> bool:
        """Return whether the model can read images."""
        ...

    @property
    def stage(self) -> str:
        """Return the name of the training in curves, digests and the cache."""
        ...

    @property
    def is_trained(self) -> bool:
        """Return whether a run trains a model besides the parts."""
        ...

    @property
    def can_shard(self) -> bool:
        """Return whether ``--strategy fsdp2`` can train the model."""
        ...

    @property
    def weights_file(self) -> str | None:
        """Return the file of the weights in ``checkpoints``; None if ``save`` writes them."""
        ...

    @property
    def capabilities(self) -> type[Capabilities]:
        """Return the class of the model's capabilities."""
        ...

    def check(self, run: RunSettings) -> None:
        """Check that the settings fit together.

        Raises:
            ValueError: If they do not; the message names the setting.
        """
        ...

    def check_flags(self, run: RunSettings, flags: TrainingFlags) -> None:
        """Check that the flags suit the training.

        Raises:
            ValueError: If they do not; the message names the flag or setting.
        """
        ...

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield the names of the logged curves, without the stage's prefix."""
        ...

    def empty(self, run: RunSettings) -> nn.Module:
        """Construct the model without a seed, for example to count weights on the meta device."""
        ...

    def build(self, run: RunSettings, parts: Parts) -> nn.Module:
        """Build the model, initialised from the run's seed."""
        ...

    def adapt(self, source: nn.Module, target: nn.Module) -> list[str]:
        """Copy trained weights into ``target`` and return one line per resized tensor.

        Raises:
            ValueError: If the weights do not fit.
        """
        ...

    def examples(self, run: RunSettings, splits: Splits, name: str, parts: Parts) -> Examples:
        """Return the examples of the split ``name`` ("train" or "validation")."""
        ...

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> "ManualStepModule":
        """Return the Lightning module that computes the losses and updates the model."""
        ...

    def open(self, run: RunSettings, model: Any, parts: Parts) -> Capabilities:
        """Return the capabilities of a trained model."""
        ...

    def restore(self, folder: Path, run: RunSettings) -> tuple[Any, Parts]:
        """Load the model and the parts of a run on the CPU.

        Args:
            folder: The ``checkpoints`` folder of the run.
            run: Its configuration.

        Raises:
            ValueError: If a file is missing or does not fit.
        """
        ...

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        """Write what generation needs besides ``weights_file`` and return all files.

        Args:
            folder: The ``checkpoints`` folder of a run.
            model: The trained model.
            parts: Its tokenizers.
            origin: The run's name and digest, for formats that record them.
        """
        ...


# The parts that a family may need before its own model.
PARTS = ("tokenizer", "vqgan", "image_indices")
