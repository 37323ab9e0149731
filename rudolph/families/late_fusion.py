"""Late fusion: a classifier that answers questions about images from two encoded vectors.

Evaluators read its answers as those of any other family: ``generate_text`` samples a class, and
``loglikelihood`` gives the log-probability of a class.  The task decides which modalities the
model gets.  So ``text_answers`` and ``caption_f1`` on a dataset of questions are controls: answers
without the image, and without the question.

Shapes: B texts or images, C choices, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rudolph.data.answer_classes import (
    AnswerExamples,
    empty_questions,
    frequent_answers,
    modalities_of,
)
from rudolph.data.documents import require_prompt
from rudolph.data.splits import Splits
from rudolph.families.interface import (
    Capabilities,
    ModelSection,
    Parts,
    RunSettings,
    TrainingFlags,
)
from rudolph.families.llava import LateFusion
from rudolph.families.single_file import SingleFileFamily
from rudolph.files.constraints import Count, Fraction, check, errors_under
from rudolph.generation.answering import OnToken
from rudolph.generation.documents import count_choices
from rudolph.generation.filters import TokenSamplingConfig, next_probabilities, sample_token
from rudolph.generation.noise import uniform_numbers
from rudolph.models.fusion.late_fusion import EQUAL_WIDTHS, FusionConfig
from rudolph.models.late_fusion.classifier import AnswerClassifier
from rudolph.models.vision.clip import CLIP, CLIPConfig, pixel_values
from rudolph.models.weights import meta_device
from rudolph.sequence.tokenizer import Tokenizer, normalize_unicode

if TYPE_CHECKING:
    from rudolph.training.answers import AnswerTraining

# Fields of ``CLIPConfig`` that decide the shape of each tower, by the name of its part.
TOWER_FIELDS = {
    "vision": (
        "embed_dim",
        "image_resolution",
        "vision_layers",
        "vision_width",
        "vision_patch_size",
    ),
    "text": (
        "embed_dim",
        "context_length",
        "vocab_size",
        "transformer_width",
        "transformer_heads",
        "transformer_layers",
        "eos_id",
    ),
}


@dataclass(frozen=True)
class TowerSources:
    """Trained CLIPs to take the encoders from; null for a new encoder.

    Attributes:
        vision: A run or release of a CLIP, whose image encoder is taken.
        text: A run or release of a CLIP, whose text encoder is taken with its tokenizer.
    """

    vision: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class ClassifierFusion(LateFusion):
    """How the two vectors become one; see ``models/fusion/late_fusion.py``.

    Attributes:
        kind: A name in ``FUSIONS``.
        width: Channels of the fused vector.
    """

    kind: str = "gmu"
    width: Count = 512

    def fusion(self, width: int) -> FusionConfig:
        """Return the fusion of two vectors of ``width`` channels.

        A fusion without projections expects two vectors of its own width instead.
        """
        settings: dict[str, Any] = asdict(self)
        expected = self.width if self.kind in EQUAL_WIDTHS else width
        return FusionConfig(widths=(expected, expected), **settings)


@dataclass(frozen=True)
class LateFusionSection(ModelSection):
    """The ``model`` section of family ``late_fusion``.

    Attributes:
        trained: ``fusion`` trains the fusion and the layer after it alone, ``without_vision`` the
            text encoder too, ``all`` everything.
        parts: Trained CLIPs to take the encoders from.
        towers: Shapes of both encoders, those of a CLIP.
        fusion: The fusion of the image vector with the question vector.
        num_answers: Number of classes: the most frequent answers of the training data.
        modality_dropout: Fraction of the training examples with image and question that lose one
            of them.
    """

    family: Literal["late_fusion"] = "late_fusion"
    trained: Literal["fusion", "without_vision", "all"] = "all"
    parts: TowerSources = field(default_factory=TowerSources)
    towers: CLIPConfig = field(default_factory=CLIPConfig)
    fusion: ClassifierFusion = field(default_factory=ClassifierFusion)
    num_answers: Count = 1000
    modality_dropout: Fraction = 0.0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        if self.init is not None and self.parts != TowerSources():
            raise ValueError("parts: expected none with init, which has all parts of the model")
        if self.towers.has_logit_bias:
            raise ValueError("towers.has_logit_bias: expected false without a CLIP loss, got true")

    @property
    def tokenizer_source(self) -> str | None:
        """Return the source of the tokenizer: that of the text encoder's ids."""
        return self.init or self.parts.text

    @property
    def part_sources(self) -> dict[str, tuple[str, type[nn.Module]]]:
        """Return source and class of each trained part to start from, by name."""
        sources = {"vision": self.parts.vision, "text": self.parts.text}
        return {name: (source, CLIP) for name, source in sources.items() if source is not None}


class LateFusionCapabilities(Capabilities):
    """Answers among the classes of a classifier.

    Args:
        model: The classifier.
        tokenizer: Encoder of the questions.
        batch_size: Examples per batch.
    """

    def __init__(
        self, model: AnswerClassifier, tokenizer: Tokenizer, *, batch_size: int = 256
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.answers = model.answers

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
        """Sample one class per seed like a token; see ``Capabilities.generate_text``.

        Raises:
            ValueError: If no class consists of the allowed characters.
        """
        scores = self.log_probabilities(task, len(seeds), images, questions, on_batch=on_token)
        if allowed_characters is not None:
            allowed = {*allowed_characters, " "}
            is_allowed = torch.tensor([set(answer) <= allowed for answer in self.answers])
            if not is_allowed.any():
                raise ValueError(
                    f"{task}: expected a class that consists of {allowed_characters!r}, got none"
                )
            scores = scores.masked_fill(~is_allowed, -torch.inf)
        classes = sample_token(next_probabilities(scores, config), uniform_numbers(seeds, 1)[:, 0])
        return [self.answers[number] for number in classes.tolist()]

    def loglikelihood(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Return the log-probability ``(B, C)`` in nats of each choice.

        It is minus infinity for a choice that is no class, since the model never answers so.
        """
        count_choices(choices)
        scores = self.log_probabilities(task, len(choices), images, questions, on_batch=on_batch)
        classes = {answer: number for number, answer in enumerate(self.answers)}
        unknown = len(classes)
        columns = [
            [classes.get(normalize_unicode(text), unknown) for text in row] for row in choices
        ]
        with_unknown = torch.cat([scores, torch.full((len(scores), 1), -torch.inf)], dim=1)
        return with_unknown.gather(1, torch.tensor(columns))

    @torch.inference_mode()
    def log_probabilities(
        self,
        task: str,
        number: int,
        images: Tensor | None,
        questions: Sequence[str] | None,
        *,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Return the log-probabilities ``(B, K)`` of all classes, float32 on the CPU.

        Args:
            task: A name in ``TASKS``.
            number: B.
            images: ``(B, 3, H, W)`` in [0, 1] if the task has images.
            questions: One per example if the task has questions.
            on_batch: Called with the number of examples done and the total.

        Raises:
            ValueError: If images or questions are missing or superfluous.
        """
        present = torch.tensor(modalities_of(task, key="task"))
        require_prompt(task, images=images, questions=questions)
        towers = self.model.text.config
        length, size = towers.context_length, towers.image_resolution
        ids = torch.from_numpy(empty_questions(number, self.tokenizer, length))
        if questions is not None:
            segments = (self.tokenizer.encode_segment(text, length) for text in questions)
            ids = torch.stack([segment.ids for segment in segments])
        device, parts = self.model.to_logits.weight.device, []
        for first in range(0, number, self.batch_size):
            rows = slice(first, min(first + self.batch_size, number))
            pixels = torch.zeros(rows.stop - first, 3, size, size)
            if images is not None:
                pixels = pixel_values(images[rows], size)
            shown = present.expand(len(pixels), 2)
            inputs = (part.to(device) for part in (pixels, ids[rows], shown))
            parts.append(self.model(*inputs).float().log_softmax(1).cpu())
            if on_batch is not None:
                on_batch(rows.stop, number)
        return torch.cat(parts)


class LateFusionFamily(SingleFileFamily):
    """The classifier of answers as a ``families.interface.Family``."""

    config = LateFusionSection
    stage = "late_fusion"
    capabilities = LateFusionCapabilities

    def check(self, run: RunSettings) -> None:
        """Check that the model has an embedding per id, and that it can learn the tasks.

        Raises:
            ValueError: If it does not; the message names the setting.
        """
        given, expected = run.model.towers.vocab_size, run.tokenizer.vocab_size
        if given < expected:
            raise ValueError(
                f"model.towers.vocab_size: expected at least {expected}, as in "
                f"tokenizer.vocab_size, got {given}"
            )
        for entry in run.data.mixture:
            modalities_of(entry.task, key=f"data.tasks.{entry.name}")
        self.check_unused(run)
        with errors_under("model"), meta_device():
            self.empty(run)

    def curve_names(self, run: RunSettings) -> Iterator[str]:
        """Yield the names of the logged curves."""
        yield from ("train/loss", "val/loss", "val/accuracy")

    def empty(self, run: RunSettings) -> AnswerClassifier:
        """Construct the model without a seed, as for counting on the meta device."""
        section = run.model
        with errors_under("fusion"):
            fusion = section.fusion.fusion(section.towers.embed_dim)
        return AnswerClassifier(section.towers, fusion, section.num_answers)

    def build(self, run: RunSettings, parts: Parts) -> AnswerClassifier:
        """Build the model from the run's seed and the trained parts, and freeze the others."""
        model = super().build(run, parts)
        for name, clip in parts.models.items():
            copy_tower(model, name, clip, run.model)
        model.train_only(run.model.trained)
        return model

    def examples(
        self, run: RunSettings, splits: Splits, name: str, parts: Parts
    ) -> AnswerExamples:
        """Return the examples of the data mixture in a split, with the classes of the training."""
        assert parts.tokenizer is not None
        entries, section = run.data.mixture, run.model
        datasets = dict.fromkeys(entry.dataset for entry in entries)
        with errors_under("model"):
            training_splits = [splits("train", dataset) for dataset in datasets]
            answers = frequent_answers(training_splits, section.num_answers)
        return AnswerExamples(
            [(entry, splits(name, entry.dataset)) for entry in entries],
            answers,
            parts.tokenizer,
            section.towers,
            seed=run.seed,
            modality_dropout=section.modality_dropout,
        )

    def training(
        self, run: RunSettings, model: Any, examples: Any, flags: TrainingFlags
    ) -> "AnswerTraining":
        """Return the Lightning module that trains the model on the classes of its examples.

        Raises:
            ValueError: If the model of ``model.init`` has other classes.
        """
        from rudolph.training.answers import AnswerTraining

        if any(model.answers) and model.answers != examples.answers:
            raise ValueError(
                f"model.init: expected a model with the {len(examples.answers)} most frequent "
                f"answers of the training data as its classes, got other classes in "
                f"{run.model.init}"
            )
        model.set_answers(examples.answers)
        return AnswerTraining(model, run.optim)

    def open(self, run: RunSettings, model: Any, parts: Parts) -> LateFusionCapabilities:
        """Return the capabilities of a trained model."""
        assert parts.tokenizer is not None
        return LateFusionCapabilities(model, parts.tokenizer)

    def restore(self, folder: Path, run: RunSettings) -> tuple[AnswerClassifier, Parts]:
        """Load the model and the tokenizer that ``save`` wrote, on the CPU."""
        model, parts = super().restore(folder, run)
        model.train_only(run.model.trained)
        return model, parts


def copy_tower(model: AnswerClassifier, name: str, clip: Any, section: LateFusionSection) -> None:
    """Copy a tower of a CLIP into a classifier.

    Args:
        model: The classifier.
        name: ``vision`` or ``text``.
        clip: The CLIP.
        section: Settings of the classifier.

    Raises:
        ValueError: If the shape of the tower differs; the message names the setting.
    """
    for key in TOWER_FIELDS[name]:
        given, expected = getattr(section.towers, key), getattr(clip.config, key)
        if given != expected:
            source, _ = section.part_sources[name]
            raise ValueError(
                f"model.towers.{key}: expected {expected} as in {source}, got {given}"
            )
    if name == "vision":
        model.vision.load_state_dict(clip.visual.state_dict())
    else:
        weights = clip.state_dict()
        model.text.load_state_dict({key: weights[key] for key in model.text.state_dict()})
