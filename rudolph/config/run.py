"""The configuration of a run: typed, frozen, checked before anything starts, named by digest."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rudolph.benchmarks.config import SpeedConfig
from rudolph.data.splits import DATASETS, DataConfig
from rudolph.evaluation.report_card import (
    DATASET_OF_EVALUATOR,
    MEMBER_OF_EVALUATOR,
    EvaluationConfig,
)
from rudolph.files import settings
from rudolph.files.settings import STRICT, ConfigError, flat_settings, read_yaml, validate
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.models.rudolph.decoder import DecoderConfig
from rudolph.models.vision.clip import CLIPConfig
from rudolph.models.vqgan.model import VQGANConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import TokenizerConfig
from rudolph.training.adversary import min_image_size
from rudolph.training.clip_losses import CLIPLossConfig, require_bias
from rudolph.training.losses import DecoderLossConfig, ReconstructionLossConfig
from rudolph.training.optim import OptimConfig
from rudolph.training.tuning import TuningConfig

# Counted up whenever a default, or what a setting means, changes: earlier runs are then others.
CONFIG_VERSION = 1
# The window of SSIM is mirrored at the edges of an image, which must be larger than half of it.
SSIM_SIDE = 6
# What a run can train.
MODELS = ("decoder", "clip")


@dataclass(frozen=True)
class TextLengths:
    """Lengths of both texts, in tokens, with ``BOS``, task token and ``EOS``."""

    left_text_length: int = 64
    right_text_length: int = 64

    def __post_init__(self) -> None:
        for name in ("left_text_length", "right_text_length"):
            if getattr(self, name) < 4:
                raise ValueError(f"{name} must be at least 4, got {getattr(self, name)}")


@dataclass(frozen=True)
class SamplingConfig:
    """How image tokens and how right-text tokens are drawn."""

    image: TokenSamplingConfig = field(default_factory=TokenSamplingConfig)
    text: TokenSamplingConfig = field(default_factory=lambda: TokenSamplingConfig(top_k=1))


@dataclass(frozen=True)
class RunConfig:
    """One resolved run: everything that decides its numbers, and nothing else.

    ``model`` is what is trained: a ``decoder``, with the VQ-GAN and the tokenizer that it needs,
    or a ``clip`` with its tokenizer.  With ``decoder.init`` both are those of that source, unless
    ``tokenizer.path`` and ``vqgan.init`` name others.  ``vqgan_seed`` is that of the VQ-GAN alone
    (null: the same): so runs of all seeds have one.
    """

    __pydantic_config__ = STRICT

    seed: int = 0
    vqgan_seed: int | None = None
    model: str = "decoder"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    layout: TextLengths = field(default_factory=TextLengths)
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    vqgan_losses: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    vqgan_optim: OptimConfig = field(default_factory=OptimConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    decoder_losses: DecoderLossConfig = field(default_factory=DecoderLossConfig)
    decoder_optim: OptimConfig = field(default_factory=OptimConfig)
    decoder_tuning: TuningConfig = field(default_factory=TuningConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    clip_losses: CLIPLossConfig = field(default_factory=CLIPLossConfig)
    clip_optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        self._take_parts_of_init()
        if self.model not in MODELS:
            raise ValueError(f"model: must be one of {', '.join(MODELS)}, got {self.model!r}")
        # A VQ-GAN that is taken as it is reads images of any size that its factor divides.
        is_any = self.vqgan.init is not None and self.data.image_size % self.vqgan.factor == 0
        if (
            self.model == "decoder"
            and self.vqgan.resolution != self.data.image_size
            and not is_any
        ):
            raise ValueError(
                f"vqgan.resolution: must equal data.image_size ({self.data.image_size}), "
                f"got {self.vqgan.resolution}"
            )
        self._check_steps()
        self._check_codes()
        self._check_side()
        if self.model == "clip":
            try:
                require_bias(self.clip_losses, has_bias=self.clip.has_logit_bias)
            except ValueError as error:
                raise ValueError(f"clip.{error}") from error
        self._check_questions()
        if self.data.dataset == "manifest" and "compositional" in self.evaluation.splits:
            raise ValueError(
                "evaluation.splits: a manifest has train, validation and test, got 'compositional'"
            )
        for name in ("seed", "vqgan_seed"):
            seed = getattr(self, name)
            if seed is not None and not 0 <= seed < 2**32:
                raise ValueError(f"{name}: must be 0 to 4294967295, got {seed}")

    def _take_parts_of_init(self) -> None:
        """Take tokenizer and VQ-GAN from where the decoder starts, unless others are named.

        Its embeddings fit the ids of its own tokenizer and the codes of its own VQ-GAN.
        """
        source = self.decoder.init
        if source is None or self.model != "decoder" or self.speed.measure is not None:
            return
        # The class is frozen for its users.
        if self.tokenizer.path is None:
            object.__setattr__(self, "tokenizer", replace(self.tokenizer, path=source))
        if self.vqgan.init is None:
            object.__setattr__(self, "vqgan", replace(self.vqgan, init=source))

    def _check_questions(self) -> None:
        """Raise ``ValueError`` for a question that its dataset, or this run, cannot answer."""
        for place in self.evaluation.questions:
            named, _, question = place.rpartition("/")
            dataset = named or self.data.dataset
            if DATASET_OF_EVALUATOR.get(question, dataset) != dataset:
                raise ValueError(
                    f"evaluation.questions: {question} needs data.dataset "
                    f"{DATASET_OF_EVALUATOR[question]}, got {dataset!r}"
                )
            member = MEMBER_OF_EVALUATOR.get(question)
            if member is not None and not hasattr(DATASETS[dataset], member):
                able = ", ".join(name for name, kind in DATASETS.items() if hasattr(kind, member))
                raise ValueError(
                    f"evaluation.questions: {question} needs a dataset of {able}, got {dataset!r}"
                )
            if question == "clip_score_evaluator" and self.evaluation.clip is None:
                raise ValueError(
                    "evaluation.clip: expected a CLIP for clip_score_evaluator, got null"
                )

    def _check_side(self) -> None:
        """Raise ``ValueError`` for images that are too small for what judges a VQ-GAN."""
        if "vqgan_optim" not in self.trainings:
            return
        start, side = self.vqgan_losses.adversary_start, self.data.image_size
        if side < SSIM_SIDE:
            raise ValueError(
                f"data.image_size: expected at least {SSIM_SIDE} for SSIM, got {side}"
            )
        if start is not None and start < self.vqgan_optim.num_steps and side < min_image_size():
            raise ValueError(
                f"data.image_size: expected at least {min_image_size()} for the discriminator of "
                f"vqgan_losses.adversary_start, got {side}"
            )

    def _check_codes(self) -> None:
        """What labels and examples are made of must be there."""
        codes, texts = self.vocabulary.codebook_size, self.vocabulary.text_size
        if self.decoder_losses.first_image_token == "legacy" and codes > texts:
            raise ValueError(
                f"decoder_losses.first_image_token: legacy scores codes as text ids, and of "
                f"{codes} codes only {texts} are (tokenizer.vocab_size, layout.left_text_length)"
            )
        if self.data.code_draws and self.vqgan.quantizer.kind != "gumbel":
            raise ValueError(
                "data.code_draws: must be 0 but for vqgan.quantizer.kind gumbel, "
                f"got {self.data.code_draws} for {self.vqgan.quantizer.kind}"
            )

    def _check_steps(self) -> None:
        """A model that is trained by no step must be named."""
        for name, steps, init in (
            ("vqgan_optim", self.vqgan_optim.num_steps, self.vqgan.init),
            ("decoder_optim", self.decoder_optim.num_steps, self.decoder.init),
            ("clip_optim", self.clip_optim.num_steps, None),
        ):
            if steps == 0 and init is None:
                needed = "" if name == "clip_optim" else f" without {name[:-6]}.init"
                raise ValueError(f"{name}.num_steps: must be at least 1{needed}, got 0")

    @property
    def trainings(self) -> dict[str, OptimConfig]:
        """The settings of every training of this run, by their key."""
        if self.speed.measure is not None:
            return {}
        if self.model == "clip":
            return {"clip_optim": self.clip_optim}
        found = {} if self.vqgan.init is not None else {"vqgan_optim": self.vqgan_optim}
        if self.decoder_optim.num_steps > 0:
            found["decoder_optim"] = self.decoder_optim
        return found

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
    written = flat_settings(path, RunConfig, read_yaml(path))
    return resolve_run(path, written | overrides_of(overrides))


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
            raise ConfigError(f"{source}: {text!r}: must be key=value, as in decoder.num_layers=8")
        given |= flat_settings(source, RunConfig, {key: settings.parse_yaml(value)})
    return given


def resolve_run(path: Path, flat: Mapping[str, Any]) -> RunConfig:
    """A run of flat settings; ``path`` is named in messages."""
    return validate(path, RunConfig, settings.nest_settings(flat))
