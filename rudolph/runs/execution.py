"""What surrounds a run while it is executed: hardware, folders, tracking, progress, time."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from rudolph.config.experiment_file import Experiment, Run
from rudolph.config.run import RunConfig, to_plain
from rudolph.families.interface import TrainingFlags
from rudolph.families.registry import family_of
from rudolph.files.atomic import warn_once, write_atomic
from rudolph.files.settings import did_you_mean, short_repr
from rudolph.models.layers.native_types import native_types
from rudolph.models.rudolph.compiled import check_compiler
from rudolph.models.weights import weights_error
from rudolph.reports.run_files import RERUN_ADVICE, finished_summary
from rudolph.training.optim import OptimConfig, eight_bit_adamw, machine_precision

ProgressCallback = Callable[[str, int, int, str], None]


# Number type of the products of each precision, by Lightning's names.
LIGHTNING_PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
PRECISION_ALIASES = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}
# Lightning would silently take another precision for these.
NOT_ON = {"cpu": {"16-mixed"}, "mps": {"64-true"}, "cuda": set[str]()}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
# Those of Lightning's that train what is trained here.
FORKING = ("ddp_fork", "ddp_notebook")
UNUSED = ("_find_unused_parameters_false", "_find_unused_parameters_true")
STRATEGIES = ("auto", "ddp", *(f"ddp{ending}" for ending in UNUSED), *FORKING)
LEAST = {"num_nodes": 1, "micro_batch_size": 1, "num_workers": 0}


@dataclass(frozen=True)
class Hardware:
    """How a run is executed, not what it asks: recorded, but outside its digest.

    ``devices`` is given as in Lightning: a number, ``auto``, ``-1`` (all) or indices of GPUs such
    as ``0,1``; what is kept is their number, or the indices.
    ``micro_batch_size`` examples pass through a device at once (None: the whole batch);
    ``precision`` is Lightning's name of one (None: the machine's own).  With
    ``activation_checkpointing`` the decoder's layers are computed again in the backward pass.
    With ``block_masks`` attention on CUDA leaves out the empty blocks of its masks; with
    ``compile`` torch compiles the decoder's layers.

    Raises:
        ValueError: in one line, for a flag that this machine or this package cannot serve.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str | None = None
    micro_batch_size: int | None = None
    num_workers: int = 0
    activation_checkpointing: bool = False
    block_masks: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        _require_one_of("accelerator", self.accelerator, ACCELERATORS)
        _require_one_of("strategy", self.strategy, STRATEGIES)
        self._check_accelerator()
        number, indices = chosen_devices(self.devices, self.kind)
        # The class is frozen for its users.
        object.__setattr__(
            self, "devices", ",".join(map(str, indices)) + "," if indices else number
        )
        if self.precision is not None:
            name = PRECISION_ALIASES.get(self.precision, self.precision)
            _require_one_of("precision", name, legal_precisions(self.kind))
            object.__setattr__(self, "precision", name)
        if self.block_masks and self.device.type != "cuda":
            raise ValueError("--block-masks needs CUDA; elsewhere attention takes dense masks")
        if self.compile:
            check_compiler(self.device.type)
        for name, bound in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {bound}, got {value}")

    def _check_accelerator(self) -> None:
        given, kind = self.accelerator, self.kind
        if given != "auto" and given != kind and not (given == "gpu" and kind != "cpu"):
            raise ValueError(
                f"--accelerator: expected {kind} or auto, got {given!r}. "
                f"This machine has no {given}"
            )
        if self.strategy in FORKING and kind != "cpu":
            raise ValueError(
                f"--strategy: expected auto or ddp on {kind}, got {self.strategy!r}. "
                "A process that used a GPU cannot be forked"
            )
        if self.strategy != "auto" and kind == "mps":
            raise ValueError(f"--strategy: expected auto on mps, got {self.strategy!r}")

    @property
    def kind(self) -> str:
        """``cpu``, ``cuda`` or ``mps``: what trainings use."""
        if self.accelerator != "cpu" and torch.cuda.is_available():
            return "cuda"
        if self.accelerator != "cpu" and torch.backends.mps.is_available():
            return "mps"
        return "cpu"

    @property
    def num_devices(self) -> int:
        """The number of devices of one node."""
        return len(self.device_indices) or int(self.devices)

    @property
    def device_indices(self) -> tuple[int, ...]:
        """The GPUs that were named, or nothing."""
        return tuple(map(int, str(self.devices).split(",")[:-1]))

    @property
    def world(self) -> int:
        """The number of devices of all nodes."""
        return self.num_devices * self.num_nodes

    @property
    def used_precision(self) -> str:
        """The precision of trainings, Lightning's name of it."""
        return self.precision or machine_precision(self.kind)

    @property
    def record(self) -> dict[str, Any]:
        """All flags as the environment of a run keeps them: what was used, not what was given."""
        used = {"devices": self.num_devices, "precision": self.used_precision}
        return {**to_plain(self), **used}

    @property
    def warning(self) -> str:
        """One line on a precision whose products this machine only emulates, or nothing."""
        dtype = LIGHTNING_PRECISIONS[self.used_precision]
        if dtype == torch.float64 or dtype in native_types(self.kind).products:
            return ""
        told = "processor and are 8 to 60 times slower" if self.kind == "cpu" else "GPU and slow"
        return (
            f"--precision {self.precision}: {str(dtype).removeprefix('torch.')} products are "
            f"emulated on this {told}; leave --precision out for {machine_precision(self.kind)}"
        )

    def strategy_for(self, num_networks: int) -> str:
        """Lightning's strategy for a training of so many networks that step one by one.

        The gradient of one network leaves the parameters of the others unused.
        """
        if num_networks == 1 or self.world == 1:
            return self.strategy
        plain_name = "ddp" if self.strategy == "auto" else self.strategy
        for ending in UNUSED:
            plain_name = plain_name.removesuffix(ending)
        return f"{plain_name}{UNUSED[1]}"

    def check(self, config: RunConfig) -> None:
        """Raise ``ValueError`` for a run that cannot be trained so."""
        if config.speed.workload is not None:
            if self.world > 1:
                raise ValueError("speed.workload: needs --devices 1 and --num-nodes 1")
            return
        for name, optim in config.trainings.items():
            try:
                self.batches(optim)
                if optim.optimizer == "adamw8bit":
                    eight_bit_adamw(self.kind)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        family_of(config.model).check_flags(config, self.training_flags(config.optim))

    def training_flags(self, optim: OptimConfig) -> TrainingFlags:
        """Return what a training module needs to know of this hardware."""
        micro, num_accumulated = self.batches(optim)
        return TrainingFlags(
            num_accumulated=num_accumulated,
            micro_batch_size=micro,
            checkpointing=self.activation_checkpointing,
            block_masks=self.block_masks,
            compile=self.compile,
        )

    @property
    def device(self) -> torch.device:
        """Where this process works outside of trainings."""
        if self.kind != "cuda":
            return torch.device("cpu")
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", self.device_indices[rank] if self.device_indices else rank)

    def batches(self, optim: OptimConfig) -> tuple[int, int]:
        """Examples of one micro-batch on one device, and micro-batches of one step."""
        world = self.world
        micro = self.micro_batch_size or -(-optim.global_batch_size // world)
        if optim.global_batch_size % (micro * world):
            raise ValueError(
                f"global_batch_size {optim.global_batch_size} must be a multiple of "
                f"{world} devices times micro_batch_size {micro}"
            )
        return micro, optim.global_batch_size // (micro * world)


def legal_precisions(kind: str) -> tuple[str, ...]:
    """Return the precisions that trainings can have on ``cpu``, ``cuda`` or ``mps``."""
    return tuple(name for name in LIGHTNING_PRECISIONS if name not in NOT_ON[kind])


def chosen_devices(given: int | str, kind: str) -> tuple[int, tuple[int, ...]]:
    """Return the number of devices that ``--devices`` asks for, and the indices that it names.

    Raises:
        ValueError: in one line, for what is no such number or more than the machine has.
    """
    text = str(given).strip()
    # A CPU takes any number of processes.
    there = {"cuda": torch.cuda.device_count, "mps": lambda: 1}.get(kind, lambda: None)()
    if text in ("auto", "-1"):
        return there or 1, ()
    if re.fullmatch(r"(\d{1,4},)+(\d{1,4})?", text, re.ASCII):
        indices = tuple(int(part) for part in text.split(",") if part)
        if kind != "cuda":
            raise ValueError(f"--devices: expected a number on {kind}, got {text!r}")
        if len(set(indices)) < len(indices) or max(indices) >= (there or 0):
            raise ValueError(f"--devices: expected different indices below {there}, got {text!r}")
        return len(indices), indices
    if not re.fullmatch(r"-?\d{1,6}", text, re.ASCII):
        raise ValueError(
            "--devices: expected auto, -1 (all), a number or indices such as 0,1, "
            f"got {short_repr(text)}"
        )
    number = int(text)
    if number < 1:
        raise ValueError(f"--devices must be at least 1, got {number}")
    # Launchers such as torchrun may show each process its own GPU alone.
    is_own = torch.distributed.is_torchelastic_launched() and there == 1
    if there is not None and number > there and not is_own:
        raise ValueError(f"--devices: expected at most {there} on this machine, got {number}")
    return number, ()


def _require_one_of(flag: str, given: str, legal: Sequence[str]) -> None:
    if given not in legal:
        hint = did_you_mean(given, legal)
        raise ValueError(
            f"--{flag}: expected one of {', '.join(legal)}, got {short_repr(given)}{hint}"
        )


@dataclass(frozen=True)
class Folders:
    """``runs`` has one folder a run; ``cache`` what runs share; ``checkout`` is asked by git."""

    checkout: Path
    runs: Path

    @property
    def cache(self) -> Path:
        return self.runs / ".cache"


def run_folder(folders: Folders, experiment: Experiment, run: Run) -> Path:
    """``runs/<experiment>/<run>-<digest>``: a changed file never meets an older run."""
    return folders.runs / experiment.name / f"{run.name}-{run.config.digest[:8]}"


def is_finished(folder: Path) -> bool:
    """Return whether a run's folder holds a finished run, whole as far as can be seen quickly.

    A damaged file is named in a warning.  Weights that are not there were removed on purpose.
    """
    if finished_summary(folder) is None:
        return False
    for path in sorted((folder / "checkpoints").rglob("*.safetensors")):
        fault = weights_error(path)
        if fault:
            warn_once(f"{path}: damaged ({fault}); the run counts as unfinished, {RERUN_ADVICE}")
            return False
    return True


def copy_to_run(source: Path, path: Path) -> None:
    """Put a file of the cache into a run's folder, which can be moved alone, or the reverse.

    On one disk they stay one file.
    """

    def put(new: Path) -> None:
        new.unlink(missing_ok=True)
        try:
            os.link(source, new)
        except OSError:
            shutil.copyfile(source, new)

    write_atomic(path, put)


def is_main_process() -> bool:
    """Whether this process is the one of a multi-device run that records, caches and evaluates."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


class Recorder(Protocol):
    """Where stages put what is to be kept of a run; ``Tracker`` is one."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None: ...

    def log_tags(self, tags: Mapping[str, object]) -> None: ...

    def log_artifact(self, path: Path, folder: str = "") -> None: ...


class NullRecorder:
    """The recorder of all processes but the main one: it keeps nothing."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Nothing."""

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""


@dataclass
class Execution:
    """One run being executed: where, on what, who is told, how long each stage took.

    ``seconds`` goes on from earlier attempts, but for what a kill did not let them say.
    ``versions`` are of packages that this run alone used.
    """

    run: Run
    folder: Path
    folders: Folders
    hardware: Hardware
    tracker: Recorder
    progress: ProgressCallback
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """Times a stage and gives its ``advance(done, total, note)``."""
        started, before = time.monotonic(), self.seconds.get(name, 0.0)
        try:
            yield partial(self.progress, name)
        finally:
            self.seconds[name] = round(before + time.monotonic() - started, 3)
