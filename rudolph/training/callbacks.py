"""What happens around a training step: seeds, checkpoints, journal, progress."""

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from rudolph.data.seeds import mixed_seed
from rudolph.files.atomic import append_line, json_text, naming_file
from rudolph.training.checkpoints import put_checkpoint, require_same_training


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; says the step, the segment and the examples."""


def require_finite(losses: Mapping[str, Tensor], *, step: int, examples: Tensor) -> None:
    """Raise ``NonFiniteLossError`` naming what is not finite."""
    for name, loss in losses.items():
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"step {step}: the loss of {name} is {loss.item()}; examples {examples.tolist()}"
            )


class StepSeed(pl.Callback):
    """Every step draws from its own stream, so that a resumed run draws what it would have."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        torch.manual_seed(mixed_seed(self.seed, batch_index, trainer.global_rank))


class ResumeCheckpoint(pl.Callback):
    """Writes ``last.ckpt`` every so many batches, whole or not at all, with finite weights only.

    The one before it is kept as ``previous.ckpt``, for when the last is damaged.  It is written as
    the next batch starts: only then have the loops counted the last one.  It says how many batches
    its training has and what it learns from; another training refuses it with ``ValueError``,
    since it would go on from a step that is not its own.
    """

    def __init__(
        self, path: Path, every_num_batches: int, *, num_batches: int, made_of: str
    ) -> None:
        self.path, self.every = path, every_num_batches
        self.num_batches, self.made_of = num_batches, made_of

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches, "made_of": self.made_of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_same_training(
            self.path, state_dict, num_batches=self.num_batches, made_of=self.made_of
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        if batch_index % self.every == 0 and batch_index > 0:
            if not all(torch.isfinite(each).all() for each in module.parameters()):
                raise NonFiniteLossError(f"batch {batch_index}: the weights are not finite")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            try:
                with naming_file(self.path, written=new):
                    trainer.save_checkpoint(new)
                    if trainer.is_global_zero:
                        put_checkpoint(new, self.path)
            finally:
                if trainer.is_global_zero:
                    new.unlink(missing_ok=True)


class ReportProgress(pl.Callback):
    """Tells ``advance(done, total, note)`` after every step; the note is the newest loss."""

    def __init__(self, advance: Callable[[int, int, str], None], num_batches: int) -> None:
        self.advance, self.num_batches = advance, num_batches
        self.started = self.ended = 0.0
        self.seconds_waited = self.seconds_worked = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        self.started = time.perf_counter()
        # The first batch waits for workers to start, and after a validation nobody knows.
        self.seconds_waited += self.started - self.ended if self.ended else 0.0

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.ended = 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_index: int,
    ) -> None:
        metrics = trainer.callback_metrics
        shown = [name for name in ("train/loss", "train/loss/reconstruction") if name in metrics]
        note = f"loss {metrics[shown[0]].item():.3f}" if shown else ""
        if "val/psnr" in metrics:
            note += f", PSNR {metrics['val/psnr'].item():.1f} dB"
        elif "val/loss" in metrics:
            note += f", val {metrics['val/loss'].item():.3f}"
        self.ended = time.perf_counter()
        self.seconds_worked += self.ended - self.started
        waited = self.seconds_waited / (self.seconds_waited + self.seconds_worked)
        self.advance(batch_index + 1, self.num_batches, f"{note}, {waited:.1%} waiting for data")


class MetricLogger(Logger):
    """Passes Lightning's metrics on as ``log_metrics(values, step=step)``, named by their stage.

    Each is a line of ``path`` too, for the runs that will share what this stage makes.
    """

    def __init__(
        self,
        log_metrics: Callable[..., None],
        *,
        stage: str,
        path: Path,
        num_steps_done: Callable[[], int],
    ) -> None:
        super().__init__()
        self._log_metrics, self.stage = log_metrics, stage
        self.path, self.num_steps_done = path, num_steps_done

    @property
    def name(self) -> str:
        return self.stage

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """Parameters are recorded with the run, not by its trainers."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {
            f"{self.stage}/{name}": float(value)
            for name, value in metrics.items()
            if name != "epoch"
        }
        if values:
            # Lightning's step counts micro-batches, and one too many once a run was resumed.
            number = self.num_steps_done()
            self._log_metrics(values, step=number)
            append_line(self.path, json_text([number, values]))


def quiet_lightning() -> None:
    """Hints for programmers stay unsaid, and a warning about what is taken care of here."""
    # Lightning sets its level when it is imported.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # The stream of examples goes on by its own count, which Lightning cannot see.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint")
