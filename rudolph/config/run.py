"""The configuration of a run: typed, frozen, checked before anything starts, named by digest."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rudolph.benchmarks.config import SpeedConfig
from rudolph.data.splits import DATASETS, DataConfig
from rudolph.evaluation.report_card import (
    DATASET_OF_EVALUATOR,
    MEMBER_OF_EVALUATOR,
    NEEDS,
    EvaluationConfig,
)
from rudolph.families.interface import ModelSection
from rudolph.families.registry import ModelConfig, family_of
from rudolph.families.rudolph import RudolphConfig
from rudolph.files import settings
from rudolph.files.constraints import Bounds, Seed, check
from rudolph.files.settings import (
    STRICT,
    ConfigError,
    TaggedBy,
    flat_settings,
    read_yaml,
    validate,
)
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.vqgan.model import VQGANConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import TokenizerConfig
from rudolph.training.adversary import min_image_size
from rudolph.training.losses import ReconstructionLossConfig
from rudolph.training.optim import OptimConfig

# Counted up whenever a default, or what a setting means, changes: earlier runs are then others.
CONFIG_VERSION = 2
# The window of SSIM is mirrored at the edges of an image, which must be larger than half of it.
SSIM_SIDE = 6
# The family that most experiments train needs no line of its own.
FAMILY, DEFAULT_FAMILY = "model.family", "rudolph"


@dataclass(frozen=True)
class TextLengths:
    """Lengths of both texts.

    Attributes:
        left_text_length: tokens of the left text, with ``BOS``, task token and ``EOS``.
        right_text_length: tokens of the right text, with ``BOS``, task token and ``EOS``.
    """

    left_text_length: Annotated[int, Bounds(ge=4)] = 64
    right_text_length: Annotated[int, Bounds(ge=4)] = 64

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SamplingConfig:
    """How image tokens and how right-text tokens are drawn."""

    image: TokenSamplingConfig = field(default_factory=TokenSamplingConfig)
    text: TokenSamplingConfig = field(default_factory=lambda: TokenSamplingConfig(top_k=1))


@dataclass(frozen=True)
class RunConfig:
    """One resolved run: everything that decides its numbers, and nothing else.

    Attributes:
        seed: seed of the model, the order of examples and sampling.
        vqgan_seed: seed of the VQ-GAN alone, so that runs of several seeds can share one; null
            for ``seed``.
        model: section of one family: ``rudolph``, ``clip`` or ``vqgan``.
        optim: training of that model.
        vqgan_optim: training of the VQ-GAN, where the family needs one.
    """

    __pydantic_config__ = STRICT

    seed: Seed = 0
    vqgan_seed: Seed | None = None
    model: Annotated[ModelConfig, TaggedBy("family")] = field(default_factory=RudolphConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    layout: TextLengths = field(default_factory=TextLengths)
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    vqgan_losses: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    vqgan_optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        check(self)
        self._take_parts_of_init()
        # A VQ-GAN that is taken as it is reads images of any size that its factor divides.
        is_any = self.vqgan.init is not None and self.data.image_size % self.vqgan.factor == 0
        if self.needs_vqgan and self.vqgan.resolution != self.data.image_size and not is_any:
            raise ValueError(
                f"vqgan.resolution: must equal data.image_size ({self.data.image_size}), "
                f"got {self.vqgan.resolution}"
            )
        self._check_steps()
        self._check_codes()
        self._check_side()
        family_of(self.model).check(self)
        self._check_evaluators()
        if self.data.dataset == "manifest" and "compositional" in self.evaluation.splits:
            raise ValueError(
                "evaluation.splits: a manifest has train, validation and test, got 'compositional'"
            )

    def _take_parts_of_init(self) -> None:
        """Take tokenizer and VQ-GAN from ``model.init``, unless others are named.

        The embeddings of a model fit the ids of its own tokenizer and the codes of its VQ-GAN.
        """
        source = self.model.init
        if source is None or not self.needs_vqgan or self.speed.workload is not None:
            return
        # The class is frozen for its users.
        if self.tokenizer.path is None:
            object.__setattr__(self, "tokenizer", replace(self.tokenizer, path=source))
        if self.vqgan.init is None:
            object.__setattr__(self, "vqgan", replace(self.vqgan, init=source))

    def _check_evaluators(self) -> None:
        """Raise ``ValueError`` for an evaluator that does not suit its dataset or the model."""
        provided = family_of(self.model).capabilities.provided()
        for place in self.evaluation.evaluators:
            named, _, question = place.rpartition("/")
            dataset = named or self.data.dataset
            if DATASET_OF_EVALUATOR.get(question, dataset) != dataset:
                raise ValueError(
                    f"evaluation.evaluators: {question} needs data.dataset "
                    f"{DATASET_OF_EVALUATOR[question]}, got {dataset!r}"
                )
            member = MEMBER_OF_EVALUATOR.get(question)
            if member is not None and not hasattr(DATASETS[dataset], member):
                able = ", ".join(name for name, kind in DATASETS.items() if hasattr(kind, member))
                raise ValueError(
                    f"evaluation.evaluators: {question} needs a dataset of {able}, got {dataset!r}"
                )
            lacking = [name for name in NEEDS[question] if name not in provided]
            if lacking:
                raise ValueError(
                    f"evaluation.evaluators: {question} needs a model with {lacking[0]}; family "
                    f"{self.model.family} has {', '.join(provided)}"
                )
            if question == "clip_score" and self.evaluation.clip is None:
                raise ValueError("evaluation.clip: expected a CLIP for clip_score, got null")

    def _check_side(self) -> None:
        """Raise ``ValueError`` for images that are too small for what judges a VQ-GAN."""
        if "vqgan_optim" not in self.trainings:
            return
        start, side = self.vqgan_losses.discriminator_start, self.data.image_size
        if side < SSIM_SIDE:
            raise ValueError(
                f"data.image_size: expected at least {SSIM_SIDE} for SSIM, got {side}"
            )
        if start is not None and start < self.vqgan_optim.num_steps and side < min_image_size():
            raise ValueError(
                f"data.image_size: expected at least {min_image_size()} for the discriminator of "
                f"vqgan_losses.discriminator_start, got {side}"
            )

    def _check_codes(self) -> None:
        """Raise ``ValueError`` for code samples of a quantizer without a distribution."""
        if self.data.num_code_samples and self.vqgan.quantizer.kind != "gumbel":
            raise ValueError(
                "data.num_code_samples: must be 0 but for vqgan.quantizer.kind gumbel, "
                f"got {self.data.num_code_samples} for {self.vqgan.quantizer.kind}"
            )

    def _check_steps(self) -> None:
        """Raise ``ValueError`` for a model without training steps that starts from no weights."""
        for name, init in (("vqgan_optim", "vqgan.init"), ("optim", "model.init")):
            source = self.vqgan.init if name == "vqgan_optim" else self.model.init
            if getattr(self, name).num_steps == 0 and source is None:
                raise ValueError(f"{name}.num_steps: must be at least 1 without {init}, got 0")

    @property
    def trainings(self) -> dict[str, OptimConfig]:
        """The settings of every training of this run, by their key."""
        if self.speed.workload is not None:
            return {}
        trainings = {}
        if self.needs_vqgan and self.vqgan.init is None:
            trainings["vqgan_optim"] = self.vqgan_optim
        if family_of(self.model).is_trained and self.optim.num_steps > 0:
            trainings["optim"] = self.optim
        return trainings

    @property
    def needs_vqgan(self) -> bool:
        """Whether the model's family needs a VQ-GAN."""
        return "vqgan" in family_of(self.model).needs

    @property
    def decoder(self) -> RudolphConfig:
        """The ``model`` section of a masked decoder.

        Raises:
            ValueError: for a run of another family.
        """
        if not isinstance(self.model, RudolphConfig):
            raise ValueError(f"model.family: expected rudolph, got {self.model.family}")
        return self.model

    @property
    def seed_of_vqgan(self) -> int:
        return self.seed if self.vqgan_seed is None else self.vqgan_seed

    @property
    def sequence_layout(self) -> SequenceLayout:
        side = self.data.image_size // self.vqgan.factor
        return SequenceLayout(self.layout.left_text_length, side, self.layout.right_text_length)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            bpe_size=self.tokenizer.vocab_size,
            num_text_specials=self.tokenizer.num_specials,
            num_left_paddings=self.layout.left_text_length,
            codebook_size=self.vqgan.quantizer.num_codes,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the whole run; equal digests ask the same question."""
        return digest_of(self)


def to_plain(config: Any) -> Any:
    """A dataclass as JSON holds it: mappings, lists, numbers and text."""
    return json.loads(json.dumps(asdict(config)))


def digest_of(*parts: Any) -> str:
    """SHA-256 of dataclasses, or of what JSON holds, in hexadecimal.

    Of a dataclass it takes what differs from the defaults, so that a setting which is new, and by
    default leaves all as it was, changes no digest.
    """
    content = [_changes(part) if is_dataclass(part) else part for part in parts]
    text = json.dumps([CONFIG_VERSION, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _changes(config: Any, usual: Any = None) -> dict[str, Any]:
    """Fields that differ from those of ``usual``, or from their defaults, nested ones too."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        default = _default(each) if usual is None else getattr(usual, each.name)
        if is_dataclass(value) and type(default) is type(value):
            nested = _changes(value, default)
            found |= {each.name: nested} if nested else {}
        elif isinstance(value, ModelSection):
            found[each.name] = {"family": value.family, **_changes(value)}
        elif value != default:
            found[each.name] = to_plain(value) if is_dataclass(value) else value
    return found


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def read_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """A resolved configuration as ``run_yaml`` wrote it, with ``key=value`` settings over it.

    Raises:
        ConfigError: when the file is missing or no such configuration.
    """
    return run_of(path, read_yaml(path), overrides)


def run_of(path: Path, content: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Return the run of a resolved configuration; ``path`` is named in messages."""
    written = flat_settings(path, RunConfig, content)
    return resolve_run(path, layered(written, overrides_of(overrides)))


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings in which later layers win.

    A layer that names another ``model.family`` also removes the model settings below it, which
    belong to the family before.

    >>> layered({"model.num_layers": 2, "seed": 1}, {"model.family": "clip"})
    {'seed': 1, 'model.family': 'clip'}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        family = merged.get(FAMILY, DEFAULT_FAMILY)
        if layer.get(FAMILY, family) != family:
            merged = {key: value for key, value in merged.items() if not key.startswith("model.")}
        merged |= layer
    return merged


def run_yaml(config: RunConfig) -> str:
    """The resolved configuration, every default written out."""
    return settings.dump_yaml(to_plain(config))


def overrides_of(texts: Iterable[str]) -> dict[str, Any]:
    """Flat settings from ``key=value``, values in YAML, as the command line has them."""
    source = Path("command line")
    given: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{source}: {text!r}: must be key=value, as in model.num_layers=8")
        given |= flat_settings(source, RunConfig, {key: settings.parse_yaml(value)})
    return given


def resolve_run(path: Path, flat: Mapping[str, Any]) -> RunConfig:
    """A run of flat settings; ``path`` is named in messages."""
    return validate(path, RunConfig, settings.nest_settings({FAMILY: DEFAULT_FAMILY} | dict(flat)))
