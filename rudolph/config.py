"""Experiment file to runs: every run typed, frozen and checked before anything starts.

An experiment file has the keys of ``EXPERIMENT_KEYS``.  ``base`` names one file of settings;
``settings`` stand over it, a variant over those, a point of the grid over that, and the command
line over all.  So at most two files tell a run.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from rudolph import settings
from rudolph.data.splits import DataConfig
from rudolph.evaluation.report_card import DATASET_OF_QUESTION, EvaluationConfig
from rudolph.models.clip import CLIPConfig
from rudolph.models.decoder import DecoderConfig
from rudolph.models.vqgan import VQGANConfig
from rudolph.results.claims import Claim, group_of
from rudolph.sampling.filters import TokenSamplingConfig
from rudolph.sequence.layout import SequenceLayout, Vocabulary
from rudolph.sequence.tokenizer import TokenizerConfig
from rudolph.settings import STRICT, ConfigError, flat_settings, mistake, read_yaml, typed
from rudolph.speed.config import SpeedConfig
from rudolph.training.clip import CLIPLossConfig
from rudolph.training.losses import DecoderLossConfig, ReconstructionLossConfig
from rudolph.training.optim import OptimConfig
from rudolph.training.tuning import TuningConfig

# Counted up whenever a default, or what a setting means, changes: earlier runs are then others.
CONFIG_VERSION = 1
# Folders of experiments whose files are named after the folder too.
NAMING_FOLDERS = ("speed",)
# What a run can train.
MODELS = ("decoder", "clip")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


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
    or a ``clip`` with its tokenizer.
    """

    __pydantic_config__ = STRICT

    seed: int = 0
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
        if self.model not in MODELS:
            raise ValueError(f"model: must be one of {', '.join(MODELS)}, got {self.model!r}")
        # A VQ-GAN that is taken as it is reads pictures of any size that its factor divides.
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
        for name, steps, init in (
            ("vqgan_optim", self.vqgan_optim.num_steps, self.vqgan.init),
            ("decoder_optim", self.decoder_optim.num_steps, self.decoder.init),
            ("clip_optim", self.clip_optim.num_steps, None),
        ):
            if steps == 0 and init is None:
                needed = "" if name == "clip_optim" else f" without {name[:-6]}.init"
                raise ValueError(f"{name}.num_steps: must be at least 1{needed}, got 0")
        for place in self.evaluation.questions:
            named, _, question = place.rpartition("/")
            dataset = named or self.data.dataset
            if DATASET_OF_QUESTION.get(question, dataset) != dataset:
                raise ValueError(
                    f"evaluation.questions: {question} needs data.dataset "
                    f"{DATASET_OF_QUESTION[question]}, got {dataset!r}"
                )
        if self.data.dataset == "manifest" and "compositional" in self.evaluation.splits:
            raise ValueError(
                "evaluation.splits: a manifest has train, validation and test, got 'compositional'"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: must be 0 to 4294967295, got {self.seed}")

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


@dataclass(frozen=True)
class ReportConfig:
    """Which metrics the results' table, the curves' figure and the report card show.

    ``best_of`` are rankings whose curves are drawn, such as ``rerank_clip``.  In each of the
    metrics ``effects`` the variants, or points of the grid, are compared with the one ``against``.
    """

    __pydantic_config__ = STRICT

    table: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    card: tuple[str, ...] = ()
    best_of: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()
    against: str | None = None

    def __post_init__(self) -> None:
        if bool(self.effects) != (self.against is not None):
            raise ValueError("against and effects belong together: give both or none")


@dataclass(frozen=True)
class Run:
    """A run of an experiment: its name, how it differs from the others, its configuration."""

    name: str
    variant: str
    grid: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Experiment:
    """An experiment file, resolved.

    ``targets`` say what a metric should at least reach, ``claim`` what the source claims.
    """

    path: Path
    name: str
    title: str
    question: str
    source: str
    targets: Mapping[str, float]
    claim: Claim | None
    report: ReportConfig
    runs: tuple[Run, ...]


EXPERIMENT_KEYS = {
    "title": str,
    "question": str,
    "source": str,
    "base": str,
    "settings": dict,
    "variants": dict,
    "grid": dict,
    "seeds": list,
    "targets": dict,
    "claim": dict,
    "report": dict,
}


def plain(config: Any) -> Any:
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
            found[each.name] = plain(value) if is_dataclass(value) else value
    return found


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment file and expand its runs.

    Args:
        overrides: ``key=value`` settings of the command line, values in YAML.

    Raises:
        ConfigError: one line for the first mistake.
    """
    path = Path(path)
    content = read_yaml(path)
    settings.require_keys(path, content, EXPERIMENT_KEYS)
    for key in ("title", "question"):
        if not content.get(key, "").strip():
            raise ConfigError(f"{path}: {key}: is missing; every experiment has one")
    report = typed(path, ReportConfig, content.get("report", {}), "report")
    targets = typed(path, dict[str, float], content.get("targets", {}), "targets")
    claim = typed(path, Claim, content["claim"], "claim") if "claim" in content else None
    runs = tuple(_expand(path, content, _overrides(overrides)))
    _check_compared(path, claim, report, {group_of(run.name, run.config.seed) for run in runs})
    return Experiment(
        path=path,
        name=experiment_name(path),
        title=content["title"].strip(),
        question=" ".join(content["question"].split()),
        source=" ".join(content.get("source", "").split()),
        targets=targets,
        claim=claim,
        report=report,
        runs=runs,
    )


def _check_compared(
    path: Path, claim: Claim | None, report: ReportConfig, groups: set[str]
) -> None:
    """Raise ``ConfigError`` for a comparison with runs that the file does not have."""
    named = {} if claim is None else {"claim.better": claim.better, "claim.than": claim.than}
    if report.against is not None:
        named["report.against"] = report.against
    for key, name in named.items():
        if name not in groups:
            raise mistake(path, key, f"must be one of {', '.join(sorted(groups))}", name)


def experiment_name(path: Path) -> str:
    """The file's name, after its folder's where that belongs to it.

    >>> experiment_name(Path("experiments/speed/decode.yaml"))
    'speed/decode'
    >>> experiment_name(Path("experiments/finetune/captions.yaml"))
    'captions'
    """
    folder = path.resolve().parent.name
    return f"{folder}/{path.stem}" if folder in NAMING_FOLDERS else path.stem


def read_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """A resolved configuration as ``to_yaml`` wrote it, with ``key=value`` settings over it.

    Raises:
        ConfigError: when the file is missing or no such configuration.
    """
    written = flat_settings(path, RunConfig, read_yaml(path))
    return _resolve(path, written | _overrides(overrides))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, every default written out."""
    return settings.to_yaml(plain(config))


def _expand(path: Path, content: Mapping[str, Any], overrides: dict[str, Any]) -> list[Run]:
    """Every combination of variant, point of the grid and seed, in the order of the file."""
    shared = _shared_settings(path, content)
    variants = content.get("variants") or {"": {}}
    grid = _grid(path, content)
    seeds = content.get("seeds", [0])
    settings.require_distinct(path, "seeds", seeds)
    runs = []
    for variant, changes in variants.items():
        changed = shared | _variant(path, variant, changes)
        for point in itertools.product(*grid.values()):
            place = dict(zip(grid, point, strict=True))
            for seed in seeds:
                config = _resolve(path, changed | place | {"seed": seed} | overrides)
                name = _run_name(variant, place, config.seed)
                runs.append(Run(name, variant, place, config))
    return runs


def _shared_settings(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    shared: dict[str, Any] = {}
    if "base" in content:
        base = path.parent / content["base"]
        shared = _seedless(base, read_yaml(base))
        _resolve(base, shared)
    return shared | _seedless(path, content.get("settings", {}), "settings")


def _variant(path: Path, variant: str, changes: Any) -> dict[str, Any]:
    if not variant:
        return {}
    if not NAME.fullmatch(variant):
        raise mistake(path, "variants", "names must be letters, digits, _ . -", variant)
    if not isinstance(changes, dict):
        raise mistake(path, f"variants.{variant}", "must be a mapping of settings", changes)
    return _seedless(path, changes, f"variants.{variant}")


def _grid(path: Path, content: Mapping[str, Any]) -> dict[str, list[Any]]:
    grid = _seedless(path, content.get("grid", {}), "grid")
    for key, values in grid.items():
        settings.require_distinct(path, f"grid.{key}", values)
    return grid


def _seedless(path: Path, content: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Flat settings of a file, in which seeds have a key of their own."""
    if "seed" in content:
        where = f"{place}.seed" if place else "seed"
        raise mistake(path, where, "seeds are listed under `seeds:`", content["seed"])
    return flat_settings(path, RunConfig, content, place)


def _overrides(texts: Iterable[str]) -> dict[str, Any]:
    source = Path("command line")
    given: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{source}: {text!r}: must be key=value, as in decoder.num_layers=8")
        given |= flat_settings(source, RunConfig, {key: settings.parse_yaml(value)})
    return given


def _resolve(path: Path, flat: Mapping[str, Any]) -> RunConfig:
    return typed(path, RunConfig, settings.nested(flat))


def _run_name(variant: str, place: Mapping[str, Any], seed: int) -> str:
    points = [f"{key.rpartition('.')[2]}={value}" for key, value in place.items()]
    name = "-".join([*([variant] if variant else []), *points, f"seed{seed}"])
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", name)
