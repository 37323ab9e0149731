"""The interface between model families and the code that trains, evaluates and stores a run.

A family is one file in this package, registered in ``FAMILIES`` (``families/registry.py``).
Generic code asks a family for its model, its examples and its training module.  Evaluators ask
the trained model for capabilities and never for its family.

Shapes: B texts or images, I image tokens, C choices, E embedding size, H and W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from rudolph.data.splits import DataConfig, Split, Splits
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.trained_models import ImageTokenizer
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import Tokenizer, TokenizerConfig
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule

OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class ModelSection:
    """Fields that the ``model`` section of every family has.

    ``init`` names trained weights to start from: a run, a release or a folder (null: none).
    """

    family: str
    init: str | None = None


class RunSettings(Protocol):
    """The part of a run's configuration that families read; ``config.run.RunConfig`` has it."""

    @property
    def seed(self) -> int: ...
    @property
    def model(self) -> Any: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def tokenizer(self) -> TokenizerConfig: ...
    @property
    def vqgan(self) -> VQGANConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def sequence_layout(self) -> SequenceLayout: ...
    @property
    def vocabulary(self) -> Vocabulary: ...


@dataclass(frozen=True)
class Parts:
    """What is trained or loaded before the model of a family.

    Args:
        tokenizer: the text tokenizer; None where the family needs none.
        vqgan: the image tokenizer; None where the family needs none.
        image_indices: image tokens of a split, ``(N, I)`` or ``(N, S, I)`` for S code samples.
    """

    tokenizer: Tokenizer | None = None
    vqgan: VQGAN | None = None
    image_indices: Callable[[Split], np.ndarray[Any, Any]] | None = None


@dataclass(frozen=True)
class TrainingFlags:
    """Hardware flags of ``rudolph run`` that a training module needs to know.

    Args:
        num_accumulated: micro-batches per optimizer step on each device.
        micro_batch_size: examples per micro-batch on each device.
        checkpointing: whether activations are recomputed in the backward pass.
        block_masks: whether attention skips empty blocks of its mask (FlexAttention).
        compile: whether layers are compiled.
    """

    num_accumulated: int = 1
    micro_batch_size: int = 1
    checkpointing: bool = False
    block_masks: bool = False
    compile: bool = False


class Examples(Protocol):
    """The examples of one split; example i of ``batch`` depends on (seed, i) alone."""

    @property
    def num_whole(self) -> int:
        """The number of examples that ``whole`` has."""
        ...

    def note(self) -> str:
        """Return one line for the log, such as how many texts are cut."""
        ...

    def batch(self, numbers: Sequence[int]) -> Any:
        """Return the training examples with these numbers as one batch."""
        ...

    def whole(self, indices: Sequence[int]) -> Any:
        """Return validation examples, unshuffled and unchanged, as one batch."""
        ...


class Capabilities:
    """What evaluators may ask of a trained model; a family overrides what its model can do.

    Raises:
        NotImplementedError: by every method that a family does not override.
    """

    def generate_image(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Generate images ``(B, 3, H, W)`` in [0, 1], one per caption, each from its seed."""
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
            images: ``(B, 3, H, W)`` in [0, 1] where the task has images.
            questions: one per text where the task has questions.
            allowed_characters: the only characters that a text may hold; None allows all.
            missing_image: how to generate an image for a question that has none, as
                fbc2_aij2022 does (``inference.py``); None keeps the codes of training, zeros.
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
        """Compute the log-likelihood ``(B, C)`` in nats of each choice as a task's text."""
        raise NotImplementedError

    def embed_image(self, images: Tensor) -> Tensor:
        """Embed images ``(B, 3, H, W)`` in [0, 1] as unit vectors ``(B, E)``."""
        raise NotImplementedError

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors ``(B, E)``."""
        raise NotImplementedError

    def image_tokenizer(self) -> ImageTokenizer:
        """Return the image tokenizer: ``encode``, ``decode`` and the size of its codebook."""
        raise NotImplementedError

    def token_pipeline(self) -> Pipeline:
        """Return the masked decoder with its tokenizers, for evaluators of its own tokens."""
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
    "loglikelihood",
    "embed_image",
    "embed_text",
    "image_tokenizer",
    "token_pipeline",
)


class Family(Protocol):
    """One architecture: its settings, its examples, its training and what it can be asked.

    ``config`` is the class of the ``model`` section.  ``needs`` are the parts that a run trains
    or loads first, of ``PARTS``.  ``stage`` names the training in curves, digests and the cache.
    ``is_trained`` is false where a run trains nothing beside the parts.  ``weights_file`` is the
    name of the model's weights in a run's ``checkpoints``; None where ``save`` writes them.
    """

    @property
    def config(self) -> type[Any]: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def stage(self) -> str: ...
    @property
    def is_trained(self) -> bool: ...
    @property
    def weights_file(self) -> str | None: ...
    @property
    def capabilities(self) -> type[Capabilities]: ...

    def check(self, run: RunSettings) -> None:
        """Raise ``ValueError`` with the setting's name for settings that do not fit together."""
        ...

    def check_flags(self, run: RunSettings, flags: TrainingFlags) -> None:
        """Raise ``ValueError`` with the flag or setting for a training that flags rule out."""
        ...

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield the names of what the training logs, without the stage."""
        ...

    def empty(self, run: RunSettings) -> nn.Module:
        """Construct the model without a seed, as for counting on the meta device."""
        ...

    def build(self, run: RunSettings, parts: Parts) -> nn.Module:
        """Build the model as the run's seed initialises it."""
        ...

    def adapt(self, source: nn.Module, target: nn.Module) -> list[str]:
        """Copy trained weights into ``target``; return one line per tensor that was resized.

        Raises:
            ValueError: when the weights do not fit.
        """
        ...

    def examples(self, run: RunSettings, splits: Splits, name: str, parts: Parts) -> Examples:
        """Return the examples of the split ``name`` ("train" or "validation")."""
        ...

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> ManualStepModule:
        """Return the Lightning module that computes the losses and steps the model."""
        ...

    def open(self, model: Any, parts: Parts) -> Capabilities:
        """Return the capabilities of a trained model."""
        ...

    def save(
        self, folder: Path, model: Any, parts: Parts, *, origin: Mapping[str, str]
    ) -> list[Path]:
        """Write what generation needs beside ``weights_file``; return all files.

        Args:
            folder: a run's ``checkpoints``.
            origin: the run's name and digest, for formats that record them.
        """
        ...


# Parts that a family may need before its own model.
PARTS = ("tokenizer", "vqgan")
