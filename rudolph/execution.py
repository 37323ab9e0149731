"""What surrounds a run while it is executed: hardware, folders, tracking, progress, time."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from rudolph.config import RunConfig
from rudolph.disk import say_once, write_whole
from rudolph.experiment_file import Experiment, Run
from rudolph.models.compiled import check_compiler
from rudolph.models.weights import weights_fault
from rudolph.results.run_files import AGAIN, finished_summary
from rudolph.training.optim import OptimConfig

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Hardware:
    """How a run is executed, not what it asks: recorded, but outside its digest.

    ``micro_batch_size`` examples pass through a device at once (None: the whole batch);
    ``precision`` is Lightning's name of one (None: the machine's own).  With
    ``activation_checkpointing`` the decoder's layers are computed again in the backward pass.
    With ``block_masks`` attention on CUDA leaves out the empty blocks of its masks; with
    ``compile`` torch compiles the decoder's layers.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str | None = None
    micro_batch_size: int | None = None
    num_workers: int = 0
    activation_checkpointing: bool = False
    block_masks: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.block_masks and self.device.type != "cuda":
            raise ValueError("--block-masks needs CUDA; elsewhere attention takes dense masks")
        if self.compile:
            check_compiler(self.device.type)
        least = {"devices": 1, "num_nodes": 1, "micro_batch_size": 1, "num_workers": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {bound}, got {value}")

    def check(self, config: RunConfig) -> None:
        """Raise ``ValueError`` for a run that cannot be trained so."""
        share, rank = config.decoder.attention_dropout, config.decoder_tuning.lora_rank
        if config.speed.measure is None and self.block_masks and share:
            raise ValueError(
                f"decoder.attention_dropout must be 0 with --block-masks, got {share:g}"
            )
        if config.speed.measure is None and self.compile and rank is not None:
            # Each low-rank layer is a class of its own, so that each would be compiled.
            raise ValueError(f"decoder_tuning.lora_rank must be null with --compile, got {rank}")

    @property
    def device(self) -> torch.device:
        """Where this process works outside of trainings."""
        if self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def batches(self, optim: OptimConfig) -> tuple[int, int]:
        """Examples of one micro-batch on one device, and micro-batches of one step."""
        world = self.devices * self.num_nodes
        micro = self.micro_batch_size or -(-optim.global_batch_size // world)
        if optim.global_batch_size % (micro * world):
            raise ValueError(
                f"global_batch_size {optim.global_batch_size} must be a multiple of "
                f"{world} devices times micro_batch_size {micro}"
            )
        return micro, optim.global_batch_size // (micro * world)


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
        fault = weights_fault(path)
        if fault:
            say_once(f"{path}: damaged ({fault}); the run counts as unfinished, {AGAIN}")
            return False
    return True


def keep_file(source: Path, path: Path) -> None:
    """Put a file of the cache into a run's folder, which can be moved alone, or the reverse.

    On one disk they stay one file.
    """

    def put(new: Path) -> None:
        new.unlink(missing_ok=True)
        try:
            os.link(source, new)
        except OSError:
            shutil.copyfile(source, new)

    write_whole(path, put)


def is_main_process() -> bool:
    """Whether this process is the one of a multi-device run that records, caches and evaluates."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


class Recorder(Protocol):
    """Where stages put what is to be kept of a run; ``Tracker`` is one."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None: ...

    def log_tags(self, tags: Mapping[str, object]) -> None: ...

    def log_artifact(self, path: Path, folder: str = "") -> None: ...


class Unrecorded:
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
    progress: Progress
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
