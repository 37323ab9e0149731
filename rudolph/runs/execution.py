"""Context of a run during execution: hardware, folders, tracking, progress and time."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from rudolph.config.experiment_file import Experiment, Run
from rudolph.config.run import RunConfig
from rudolph.families.interface import TrainingFlags
from rudolph.families.registry import family_of
from rudolph.files.atomic import warn_once, write_atomic
from rudolph.files.settings import did_you_mean, short_repr
from rudolph.models.layers.native_types import native_types
from rudolph.models.rudolph.compiled import check_compiler
from rudolph.models.weights import weights_error
from rudolph.reports.run_files import RERUN_ADVICE, finished_summary
from rudolph.runs.launcher import Launch, read_launch
from rudolph.tracking.run_directory import RunDirectory
from rudolph.training.hardware_flags import HardwareFlags, option_of
from rudolph.training.optim import OptimConfig, eight_bit_adamw, machine_precision

ProgressCallback = Callable[[str, int, int, str], None]


# Dtype of matrix products under each precision, by Lightning's names.
LIGHTNING_PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
PRECISION_ALIASES = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}
# Lightning would silently replace these precisions.
NOT_ON = {"cpu": {"16-mixed"}, "mps": {"64-true"}, "cuda": set[str]()}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
# The strategies of Lightning that can train the models of this package.
FORKING = ("ddp_fork", "ddp_notebook")
UNUSED = ("_find_unused_parameters_false", "_find_unused_parameters_true")
# This strategy shards decoders over devices, and trains other networks with ddp.
SHARDED = "fsdp2"
SHARDED_PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp", SHARDED, *(f"ddp{ending}" for ending in UNUSED), *FORKING)


@dataclass(frozen=True)
class Hardware(HardwareFlags):
    """Checked hardware flags; ``devices`` is a number or indices, ``precision`` a Lightning name.

    Raises:
        ValueError: If this machine or this package does not support a flag.
    """

    def __post_init__(self) -> None:
        """Check every flag and normalise ``devices`` and ``precision``."""
        _require_one_of("accelerator", self.accelerator, ACCELERATORS)
        _require_one_of("strategy", self.strategy, STRATEGIES)
        self._check_accelerator()
        number, indices = chosen_devices(self.devices, self.kind)
        # The class is frozen, so normalised values need ``object.__setattr__``.
        object.__setattr__(
            self, "devices", ",".join(map(str, indices)) + "," if indices else number
        )
        self._join_launch()
        if self.precision is not None:
            name = PRECISION_ALIASES.get(self.precision, self.precision)
            _require_one_of("precision", name, legal_precisions(self.kind))
            object.__setattr__(self, "precision", name)
        if self.strategy == SHARDED and self.used_precision not in SHARDED_PRECISIONS:
            raise ValueError(
                f"--precision: expected {' or '.join(SHARDED_PRECISIONS)} with --strategy "
                f"{SHARDED}, got {self.used_precision}"
            )
        if self.block_masks and self.device.type != "cuda":
            raise ValueError(f"--block-masks: expected CUDA, got {self.kind}. Leave it out")
        if self.compile:
            check_compiler(self.device.type)
        for declared in fields(self):
            value, least = getattr(self, declared.name), declared.metadata["least"]
            if None not in (value, least) and value < least:
                option = option_of(declared.name)
                raise ValueError(f"{option} must be at least {least}, got {value}")

    def _check_accelerator(self) -> None:
        accelerator, kind = self.accelerator, self.kind
        if (
            accelerator != "auto"
            and accelerator != kind
            and not (accelerator == "gpu" and kind != "cpu")
        ):
            raise ValueError(
                f"--accelerator: expected {kind} or auto, got {accelerator!r}. "
                f"This machine has no {accelerator}"
            )
        if self.strategy in FORKING and kind != "cpu":
            raise ValueError(
                f"--strategy: expected auto or ddp on {kind}, got {self.strategy!r}. "
                "A process that used a GPU cannot be forked"
            )
        if self.strategy != "auto" and kind == "mps":
            raise ValueError(f"--strategy: expected auto on mps, got {self.strategy!r}")

    def _join_launch(self) -> None:
        """Take the numbers of devices and machines for which a launcher started processes."""
        started = self.launch
        if started.launcher == "torchrun":
            num_nodes = started.world_size // started.local_world_size
            numbers = {"devices": started.local_world_size, "num_nodes": num_nodes}
            for name, value in numbers.items():
                # 1 is the default, so it also means that the flag was left out.
                given = self.num_devices if name == "devices" else self.num_nodes
                if given not in (1, value):
                    raise ValueError(
                        f"{option_of(name)}: expected {value} as torchrun started, got {given}"
                    )
                if given != value:
                    object.__setattr__(self, name, value)
        if started.launcher == "slurm" and self.world > 1 and started.world_size != self.world:
            raise ValueError(
                f"--devices {self.num_devices} --num-nodes {self.num_nodes}: expected "
                f"{started.world_size} processes in all as srun started, got {self.world}"
            )

    @property
    def launch(self) -> Launch:
        """Return how this process was started."""
        return read_launch()

    @property
    def is_main_process(self) -> bool:
        """Return whether this is the process that records, caches and evaluates the run.

        If Slurm starts processes with one run each, every process is a main process.
        """
        return self.world == 1 or self.launch.is_first

    @property
    def kind(self) -> str:
        """Return the device type used for training: ``cpu``, ``cuda`` or ``mps``."""
        if self.accelerator != "cpu" and torch.cuda.is_available():
            return "cuda"
        if self.accelerator != "cpu" and torch.backends.mps.is_available():
            return "mps"
        return "cpu"

    @property
    def num_devices(self) -> int:
        """Return the number of devices per node."""
        return len(self.device_indices) or int(self.devices)

    @property
    def device_indices(self) -> tuple[int, ...]:
        """Return the GPU indices given by ``--devices``, or an empty tuple."""
        return tuple(map(int, str(self.devices).split(",")[:-1]))

    @property
    def world(self) -> int:
        """Return the number of devices on all nodes."""
        return self.num_devices * self.num_nodes

    @property
    def used_precision(self) -> str:
        """Return the precision used for training, by Lightning's name."""
        return self.precision or machine_precision(self.kind)

    @property
    def warning(self) -> str:
        """Return a warning if this machine only emulates the chosen precision, else ""."""
        dtype = LIGHTNING_PRECISIONS[self.used_precision]
        if dtype == torch.float64 or dtype in native_types(self.kind).products:
            return ""
        slowdown = (
            "processor and are 8 to 60 times slower" if self.kind == "cpu" else "GPU and slow"
        )
        return (
            f"--precision {self.precision}: {str(dtype).removeprefix('torch.')} products are "
            f"emulated on this {slowdown}. Leave --precision out for "
            f"{machine_precision(self.kind)}"
        )

    def strategy_for(self, num_networks: int) -> str:
        """Return Lightning's strategy for training several networks that step in turn.

        A backward pass of one network leaves the parameters of the others unused.
        """
        strategy = "auto" if self.strategy == SHARDED else self.strategy
        if num_networks == 1 or self.world == 1:
            return strategy
        plain_name = "ddp" if strategy == "auto" else strategy
        for ending in UNUSED:
            plain_name = plain_name.removesuffix(ending)
        return f"{plain_name}{UNUSED[1]}"

    def check(self, config: RunConfig) -> None:
        """Raise ``ValueError`` for a run that cannot be trained with these flags."""
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
        if self.strategy == SHARDED and not family_of(config.model).can_shard:
            raise ValueError(
                f"--strategy: expected auto or ddp for the family {config.model.family}, got "
                f"{SHARDED}. It shards decoders of the family rudolph"
            )
        family_of(config.model).check_flags(config, self.training_flags(config.optim))

    def training_flags(self, optim: OptimConfig) -> TrainingFlags:
        """Return what a training module needs to know about this hardware."""
        micro, num_accumulated = self.batches(optim)
        return TrainingFlags(self, num_accumulated, micro)

    @property
    def device(self) -> torch.device:
        """Return the device that this process uses outside of training."""
        if self.kind != "cuda":
            return torch.device("cpu")
        rank = self.launch.local_rank if self.world > 1 else 0
        return torch.device("cuda", self.device_indices[rank] if self.device_indices else rank)

    def batches(self, optim: OptimConfig) -> tuple[int, int]:
        """Return the micro-batch size per device and the micro-batches per optimizer step.

        Raises:
            ValueError: If ``optim.global_batch_size`` is not a multiple of devices times
                micro-batch.
        """
        world = self.world
        micro = self.micro_batch_size or -(-optim.global_batch_size // world)
        if optim.global_batch_size % (micro * world):
            raise ValueError(
                f"global_batch_size: expected a multiple of {world} devices times "
                f"micro_batch_size {micro}, got {optim.global_batch_size}"
            )
        return micro, optim.global_batch_size // (micro * world)


def legal_precisions(kind: str) -> tuple[str, ...]:
    """Return the training precisions that ``cpu``, ``cuda`` or ``mps`` supports."""
    return tuple(name for name in LIGHTNING_PRECISIONS if name not in NOT_ON[kind])


def chosen_devices(devices: int | str, kind: str) -> tuple[int, tuple[int, ...]]:
    """Return the number of devices and the GPU indices given by ``--devices``.

    Raises:
        ValueError: If the value is invalid or exceeds the devices of this machine.
    """
    text = str(devices).strip()
    # A CPU supports any number of processes.
    num_available = {"cuda": torch.cuda.device_count, "mps": lambda: 1}.get(kind, lambda: None)()
    if text in ("auto", "-1"):
        return num_available or 1, ()
    if re.fullmatch(r"(\d{1,4},)+(\d{1,4})?", text, re.ASCII):
        indices = tuple(int(part) for part in text.split(",") if part)
        if kind != "cuda":
            raise ValueError(f"--devices: expected a number on {kind}, got {text!r}")
        if len(set(indices)) < len(indices) or max(indices) >= (num_available or 0):
            raise ValueError(
                f"--devices: expected different indices below {num_available}, got {text!r}"
            )
        return len(indices), indices
    if not re.fullmatch(r"-?\d{1,6}", text, re.ASCII):
        raise ValueError(
            "--devices: expected auto, -1 (all), a number or indices such as 0,1, "
            f"got {short_repr(text)}"
        )
    num_requested = int(text)
    if num_requested < 1:
        raise ValueError(f"--devices must be at least 1, got {num_requested}")
    # Launchers such as torchrun may expose a single GPU to each process.
    is_launched = torch.distributed.is_torchelastic_launched() and num_available == 1
    if num_available is not None and num_requested > num_available and not is_launched:
        raise ValueError(
            f"--devices: expected at most {num_available} on this machine, got {num_requested}"
        )
    return num_requested, ()


def _require_one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(
            f"--{flag}: expected one of {', '.join(choices)}, got {short_repr(value)}{hint}"
        )


@dataclass(frozen=True)
class Folders:
    """Folders of a command.

    Attributes:
        checkout: Checkout whose Git commit is recorded.
        runs: Folder with one folder per run.
    """

    checkout: Path
    runs: Path

    @property
    def cache(self) -> Path:
        """Return the folder of files that runs share."""
        return self.runs / ".cache"


def run_folder(folders: Folders, experiment: Experiment, run: Run) -> Path:
    """Return the folder of a run, ``runs/<experiment>/<run>-<digest>``.

    The digest keeps the runs of a changed experiment file apart from older ones.
    """
    return folders.runs / experiment.name / f"{run.name}-{run.config.digest[:8]}"


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished run without damaged weights.

    Only quick checks are made.  A damaged file causes a warning.  Missing weights do not count as
    damage, because they were removed on purpose.
    """
    if finished_summary(folder) is None:
        return False
    for path in RunDirectory(folder).weights():
        fault = weights_error(path)
        if fault:
            warn_once(f"{path}: damaged ({fault}); the run counts as unfinished, {RERUN_ADVICE}")
            return False
    return True


def copy_to_run(source: Path, path: Path) -> None:
    """Copy a file between the cache and a run's folder, which can then be moved on its own.

    On one file system the copy is a hard link.
    """

    def put(target: Path) -> None:
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    write_atomic(path, put)


def discard_progress(stage: str, done: int, total: int, note: str) -> None:
    """Discard progress: another process reports it, or parallel runs report only their ends."""


class Recorder(Protocol):
    """Log of metrics, tags and files of a run; ``tracking.tracker.Tracker`` implements it."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log metrics at a training step."""

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Log tags."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Log a file, in a folder of the run's artifacts."""


class NullRecorder:
    """Recorder that logs nothing, for all processes except the main one."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Do nothing."""

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""


@dataclass
class Execution:
    """One run during execution.

    Attributes:
        run: The run.
        folder: Folder of the run.
        folders: Folders of the command.
        hardware: Hardware flags.
        tracker: Log of metrics, tags and files.
        progress: Called with stage, done, total and a note.
        seconds: Duration of each stage, including earlier attempts that were not killed.
        versions: Versions of packages that only this run used.
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
    def directory(self) -> RunDirectory:
        """Return the files of the run."""
        return RunDirectory(self.folder)

    @property
    def is_main_process(self) -> bool:
        """Return whether this is the process that records, caches and evaluates the run."""
        return self.hardware.is_main_process

    @property
    def config(self) -> RunConfig:
        """Return the configuration of the run."""
        return self.run.config

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """Time a stage; yield its progress callback ``advance(done, total, note)``."""
        started, before = time.monotonic(), self.seconds.get(name, 0.0)
        try:
            yield partial(self.progress, name)
        finally:
            self.seconds[name] = round(before + time.monotonic() - started, 3)
