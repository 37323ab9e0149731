"""The configuration of a run: typed, frozen, checked before a run starts, identified by digest."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rudolph.benchmarks.config import SpeedConfig
from rudolph.data.splits import DATASETS, DataConfig, has_documents
from rudolph.evaluation.report_card import (
    DATASET_OF_EVALUATOR,
    MEMBER_OF_EVALUATOR,
    SHOWS_IMAGES,
    EvaluationConfig,
)
from rudolph.families.documents import DocumentSection
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

# Increase this if a default or a setting's meaning changes: old runs then get other digests.
CONFIG_VERSION = 2
# SSIM pads an image by mirroring half a window, so images must be larger than half a window.
SSIM_SIDE = 6
# A file without ``model.family`` describes a masked decoder.
FAMILY, DEFAULT_FAMILY = "model.family", "rudolph"


@dataclass(frozen=True)
class TextLengths:
    """Lengths of both texts.

    Attributes:
        left_text_length: Tokens of the left text, with ``BOS``, task token and ``EOS``.
        right_text_length: Tokens of the right text, with ``BOS``, task token and ``EOS``.
    """

    left_text_length: Annotated[int, Bounds(ge=4)] = 64
    right_text_length: Annotated[int, Bounds(ge=4)] = 64

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a length out of bounds."""
        check(self)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters of image tokens and of right-text tokens."""

    image: TokenSamplingConfig = field(default_factory=TokenSamplingConfig)
    text: TokenSamplingConfig = field(default_factory=lambda: TokenSamplingConfig(top_k=1))


@dataclass(frozen=True)
class RunConfig:
    """One resolved run: everything that decides its numbers, and nothing else.

    Attributes:
        seed: seed of the model, the order of examples and sampling.
        vqgan_seed: seed of the VQ-GAN alone, so that runs with different seeds can share one
            VQ-GAN; null means ``seed``.
        model: section of one family, such as ``rudolph`` or ``clip``.
        optim: training of that model.
        vqgan_optim: training of the VQ-GAN, if the family needs one.
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
        """Raise ``ValueError`` for settings that contradict each other."""
        check(self)
        self._take_parts_of_init()
        # A pretrained VQ-GAN encodes images of any size that is a multiple of its factor.
        is_multiple = self.data.image_size % self.vqgan.factor == 0
        fits = self.vqgan.init is not None and is_multiple
        if self.needs_vqgan and self.vqgan.resolution != self.data.image_size and not fits:
            raise ValueError(
                f"vqgan.resolution: must equal data.image_size ({self.data.image_size}), "
                f"got {self.vqgan.resolution}"
            )
        self._check_steps()
        self._check_codes()
        self._check_side()
        self._check_documents()
        family_of(self.model).check(self)
        self._check_evaluators()
        if self.data.dataset == "manifest" and "compositional" in self.evaluation.splits:
            raise ValueError(
                "evaluation.splits: a manifest has train, validation and test, got 'compositional'"
            )

    def _take_parts_of_init(self) -> None:
        """Set tokenizer and VQ-GAN to those of ``model.init``, unless the settings name others.

        The embeddings of a model belong to the ids of its tokenizer and the codes of its VQ-GAN.
        """
        if self.speed.workload is not None:
            return
        tokenizer, model = self.model.tokenizer_source, self.model.init
        # The dataclass is frozen, so ``object.__setattr__`` sets the fields.
        if tokenizer is not None and self.tokenizer.path is None:
            object.__setattr__(self, "tokenizer", replace(self.tokenizer, path=tokenizer))
        if model is not None and self.needs_vqgan and self.vqgan.init is None:
            object.__setattr__(self, "vqgan", replace(self.vqgan, init=model))

    def _check_documents(self) -> None:
        """Raise ``ValueError`` for documents that nothing can read."""
        if isinstance(self.model, DocumentSection):
            return
        for dataset in filter(has_documents, self.data.datasets):
            raise ValueError(
                f"model.family: expected one that reads the documents of {dataset}, such as llava "
                f"or flamingo, got {self.model.family}"
            )

    def _check_evaluators(self) -> None:
        """Raise ``ValueError`` for an evaluator that its dataset or the model does not support."""
        provided = family_of(self.model).capabilities.provided()
        for name in self.evaluation.evaluators:
            other, _, evaluator = name.rpartition("/")
            dataset = other or self.data.dataset
            if has_documents(dataset):
                raise ValueError(
                    f"evaluation.evaluators: {evaluator} needs a dataset of pairs, got documents "
                    f"of {dataset!r}. Name another dataset, as in shapes/{evaluator}"
                )
            if DATASET_OF_EVALUATOR.get(evaluator, dataset) != dataset:
                raise ValueError(
                    f"evaluation.evaluators: {evaluator} needs data.dataset "
                    f"{DATASET_OF_EVALUATOR[evaluator]}, got {dataset!r}"
                )
            member = MEMBER_OF_EVALUATOR.get(evaluator)
            if member is not None and not hasattr(DATASETS[dataset], member):
                able = ", ".join(name for name, kind in DATASETS.items() if hasattr(kind, member))
                raise ValueError(
                    f"evaluation.evaluators: {evaluator} needs a dataset of {able}, "
                    f"got {dataset!r}"
                )
            if evaluator in SHOWS_IMAGES and not family_of(self.model).reads_images:
                raise ValueError(
                    f"evaluation.evaluators: {evaluator} shows images, which family "
                    f"{self.model.family} cannot read"
                )
        self.evaluation.require_capabilities(provided, f"family {self.model.family}")
        evaluators = {name.rpartition("/")[2] for name in self.evaluation.evaluators}
        if "clip_score" in evaluators and self.evaluation.clip is None:
            raise ValueError("evaluation.clip: expected a CLIP for clip_score, got null")
        if self.evaluation.shots.choice == "similar" and self.evaluation.clip is None:
            raise ValueError(
                "evaluation.clip: expected a CLIP for evaluation.shots.choice similar, got null"
            )

    def _check_side(self) -> None:
        """Raise ``ValueError`` for images too small for SSIM or the discriminator."""
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
        """Raise ``ValueError`` for sampled codes of a quantizer without a distribution."""
        if self.data.num_code_samples and self.vqgan.quantizer.kind != "gumbel":
            raise ValueError(
                "data.num_code_samples: must be 0 but for vqgan.quantizer.kind gumbel, "
                f"got {self.data.num_code_samples} for {self.vqgan.quantizer.kind}"
            )

    def _check_steps(self) -> None:
        """Raise ``ValueError`` for a model with neither training steps nor pretrained weights."""
        for name, init in (("vqgan_optim", "vqgan.init"), ("optim", "model.init")):
            source = self.vqgan.init if name == "vqgan_optim" else self.model.init
            if getattr(self, name).num_steps == 0 and source is None:
                raise ValueError(f"{name}.num_steps: must be at least 1 without {init}, got 0")

    @property
    def trainings(self) -> dict[str, OptimConfig]:
        """Optimizer settings of each training of this run, keyed by section."""
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
        """True if the model's family needs a VQ-GAN."""
        return "vqgan" in family_of(self.model).needs(self.model)

    @property
    def decoder(self) -> RudolphConfig:
        """The ``model`` section of a masked decoder.

        Raises:
            ValueError: If the run has another family.
        """
        if not isinstance(self.model, RudolphConfig):
            raise ValueError(f"model.family: expected rudolph, got {self.model.family}")
        return self.model

    @property
    def seed_of_vqgan(self) -> int:
        """Seed of the VQ-GAN training."""
        return self.seed if self.vqgan_seed is None else self.vqgan_seed

    @property
    def sequence_layout(self) -> SequenceLayout:
        """Lengths of left text, image and right text."""
        side = self.data.image_size // self.vqgan.factor
        return SequenceLayout(self.layout.left_text_length, side, self.layout.right_text_length)

    @property
    def vocabulary(self) -> Vocabulary:
        """Sizes of the text and image vocabularies."""
        return Vocabulary(
            bpe_size=self.tokenizer.vocab_size,
            num_text_specials=self.tokenizer.num_specials,
            num_left_paddings=self.layout.left_text_length,
            codebook_size=self.vqgan.quantizer.num_codes,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the configuration; runs with equal digests have equal results."""
        return digest_of(self)


def to_plain(config: Any) -> Any:
    """Return a dataclass as JSON data: mappings, lists, numbers and text."""
    return json.loads(json.dumps(asdict(config)))


def digest_of(*parts: Any) -> str:
    """Return the SHA-256 of dataclasses and JSON data in hexadecimal.

    A dataclass contributes the fields that differ from their defaults. So a new setting with a
    neutral default changes no digest.
    """
    content = [_changes(part) if is_dataclass(part) else part for part in parts]
    text = json.dumps([CONFIG_VERSION, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _changes(config: Any, usual: Any = None) -> dict[str, Any]:
    """Return the fields, including nested ones, that differ from ``usual`` or their defaults."""
    changed: dict[str, Any] = {}
    for member in fields(config):
        value = getattr(config, member.name)
        default = _default(member) if usual is None else getattr(usual, member.name)
        if is_dataclass(value) and type(default) is type(value):
            nested = _changes(value, default)
            changed |= {member.name: nested} if nested else {}
        elif isinstance(value, ModelSection):
            changed[member.name] = {"family": value.family, **_changes(value)}
        elif value != default:
            changed[member.name] = to_plain(value) if is_dataclass(value) else value
    return changed


def _default(member: Field[Any]) -> Any:
    return member.default if member.default_factory is MISSING else member.default_factory()


def read_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration that ``run_yaml`` wrote and apply ``key=value`` overrides.

    Raises:
        ConfigError: If the file is missing or invalid.
    """
    return run_of(path, read_yaml(path), overrides)


def run_of(path: Path, content: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Return the run of a resolved configuration; error messages name ``path``."""
    written = flat_settings(path, RunConfig, content)
    return resolve_run(path, layered(written, overrides_of(overrides, written)))


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge flat settings; later layers override earlier ones.

    A layer that sets another ``model.family`` also removes the earlier ``model`` settings, because
    they belong to the earlier family.

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
    """Return the configuration as YAML, with all defaults."""
    return settings.dump_yaml(to_plain(config))


def overrides_of(texts: Iterable[str], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Parse ``key=value`` settings of the command line; values are YAML.

    Args:
        texts: The settings.
        lower: Flat settings that ``texts`` override; the family in ``lower`` decides which keys an
            error lists.
    """
    source = Path("command line")
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{source}: {text!r}: must be key=value, as in model.num_layers=8")
        overrides |= flat_settings(
            source, RunConfig, {key: settings.parse_yaml(value)}, lower={**lower, **overrides}
        )
    return overrides


def resolve_run(path: Path, flat: Mapping[str, Any]) -> RunConfig:
    """Return the checked run of flat settings; error messages name ``path``."""
    return validate(path, RunConfig, settings.nest_settings({FAMILY: DEFAULT_FAMILY} | dict(flat)))
