"""Callbacks and logger of a training: resume checkpoints, progress and metrics."""

import logging
import signal
import threading
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

from rudolph.data.loader import STOP_SIGNALS, ignore_signals
from rudolph.files.atomic import append_line, json_text, naming_file
from rudolph.training.checkpoints import require_same_training, rotate_checkpoints
from rudolph.training.preemption import PreemptedError

# Steps between two points of a training curve.
LOG_EVERY = 10


class NonFiniteLossError(ArithmeticError):
    """A loss or a weight became NaN or infinite; the message names the step and the cause."""


def require_finite(losses: Mapping[str, Tensor], *, step: int, where: str) -> None:
    """Raise ``NonFiniteLossError`` for the first loss that is not finite.

    Args:
        losses: scalar losses keyed by name.
        step: the optimizer step, for the message.
        where: the examples with the loss, for the message.
    """
    for name, loss in losses.items():
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"step {step}: {name} is {loss.item()}; {where}")


class ResumeCheckpoint(pl.Callback):
    """A callback that writes ``last.ckpt`` every ``every_num_steps`` steps, if weights are finite.

    Writes are atomic.  The preceding checkpoint is kept as ``previous.ckpt``, in case the last one
    is damaged.  A checkpoint is written at the start of the next step, because only then have
    Lightning's loops counted the finished step.  It records the number of steps of its training
    and a digest of what it was trained on.  It records no hardware, so the training may continue
    on other hardware.

    Raises:
        ValueError: on loading a checkpoint of another training, whose steps would not match.
        NonFiniteLossError: before writing weights that are not finite.
    """

    def __init__(
        self,
        path: Path,
        every_num_steps: int,
        *,
        num_steps: int,
        digest: str,
        is_sharded: bool = False,
    ) -> None:
        self.path, self.every = path, every_num_steps
        self.num_steps, self.digest, self.is_sharded = num_steps, digest, is_sharded

    def state_dict(self) -> dict[str, Any]:
        """Return the values that identify the training."""
        return {
            "num_steps": self.num_steps,
            "made_of": self.digest,
            "is_sharded": self.is_sharded,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ``ValueError`` if the checkpoint belongs to another training."""
        require_same_training(
            self.path,
            state_dict,
            num_steps=self.num_steps,
            digest=self.digest,
            is_sharded=self.is_sharded,
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """Write a checkpoint of the steps before this one, if one is due."""
        if batch_index % self.every == 0:
            self.write(trainer, module, batch_index)

    def write(self, trainer: pl.Trainer, module: pl.LightningModule, batch_index: int) -> None:
        """Write a checkpoint of the steps before this one, if there are any."""
        if batch_index > 0:
            if not all(torch.isfinite(parameter).all() for parameter in module.parameters()):
                raise NonFiniteLossError(f"step {batch_index}: the weights are not finite")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new_path = self.path.with_suffix(".new")
            try:
                with naming_file(self.path, written=new_path):
                    trainer.save_checkpoint(new_path)
                    if trainer.is_global_zero:
                        rotate_checkpoints(new_path, self.path)
            finally:
                if trainer.is_global_zero:
                    new_path.unlink(missing_ok=True)
            # Wait for all processes: one that ends early could end this one before the file is
            # renamed.
            trainer.strategy.barrier()


def preempted(number: int, num_steps: int) -> PreemptedError:
    """Return the error for signal ``number``, received after ``num_steps`` steps."""
    return PreemptedError(f"{signal.Signals(number).name} after {num_steps} steps")


class StopOnSignal(pl.Callback):
    """A callback that writes a checkpoint and ends the training after SIGTERM or SIGUSR1.

    Schedulers send one of these signals before they end a job.  It is enough that one device
    receives it.

    Args:
        checkpoint: Writes the checkpoint.

    Raises:
        PreemptedError: At the next step, on every device.
    """

    def __init__(self, checkpoint: ResumeCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.received = 0
        self.replaced: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace the handlers of the signals, which Lightning set before."""
        if threading.current_thread() is threading.main_thread():
            self.replaced = {each: signal.signal(each, self._receive) for each in STOP_SIGNALS}

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """Write a checkpoint and raise ``PreemptedError`` if a device received a signal."""
        strategy: Any = trainer.strategy
        received = torch.tensor(self.received, device=module.device)
        number = int(strategy.reduce(received, reduce_op="max"))
        if number:
            # If a checkpoint was due at this step, it has been written already.
            if batch_index % self.checkpoint.every:
                self.checkpoint.write(trainer, module, batch_index)
            self.replaced = {}
            # Launchers send SIGTERM to the others once a process has ended.
            ignore_signals()
            raise preempted(number, batch_index)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Restore the handlers."""
        for number, handler in self.replaced.items():
            signal.signal(number, handler)
        self.replaced = {}

    def raise_received(self) -> None:
        """Raise ``PreemptedError`` if a signal came after the last step began."""
        if self.received:
            raise preempted(self.received, self.checkpoint.num_steps)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number


class ReportProgress(pl.Callback):
    """A callback that calls ``advance(done, total, note)`` after every step.

    The note holds the newest loss, the newest validation result and the fraction of time spent
    waiting for data.
    """

    def __init__(self, advance: Callable[[int, int, str], None], num_steps: int) -> None:
        self.advance, self.num_steps = advance, num_steps
        self.started = self.ended = 0.0
        self.seconds_waited = self.seconds_worked = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """Add the time since the last batch to the time spent waiting for data."""
        self.started = time.perf_counter()
        # The wait before the first batch is worker start-up; after a validation it is unknown.
        self.seconds_waited += self.started - self.ended if self.ended else 0.0

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Exclude the time of the validation."""
        self.ended = 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_index: int,
    ) -> None:
        """Report the batch and its note."""
        metrics = trainer.callback_metrics
        loss_names = [
            name for name in ("train/loss", "train/loss/reconstruction") if name in metrics
        ]
        note = f"loss {metrics[loss_names[0]].item():.3f}" if loss_names else ""
        if "val/psnr" in metrics:
            note += f", PSNR {metrics['val/psnr'].item():.1f} dB"
        elif "val/loss" in metrics:
            note += f", val {metrics['val/loss'].item():.3f}"
        self.ended = time.perf_counter()
        self.seconds_worked += self.ended - self.started
        waiting_fraction = self.seconds_waited / (self.seconds_waited + self.seconds_worked)
        self.advance(
            batch_index + 1, self.num_steps, f"{note}, {waiting_fraction:.1%} waiting for data"
        )


class MetricLogger(Logger):
    """A Lightning logger that forwards metrics to ``log_metrics(values, step=step)``.

    Training metrics are forwarded every ``LOG_EVERY`` steps, others whenever they are computed.
    Metric names get the stage as a prefix.  Each record is also appended to ``path`` as a JSON
    line, for other runs that share the result of this stage.
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
        """The name of the stage."""
        return self.stage

    @property
    def version(self) -> str:
        """An empty version, as a stage has one log."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing, because the run records hyperparameters itself."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Forward metrics at the current optimizer step and append them to the file."""
        # Lightning's step adds up the steps of all optimizers, and is one too high after resuming.
        num_steps = self.num_steps_done()
        left_out = ("epoch",) if num_steps % LOG_EVERY == 0 else ("epoch", "train/")
        values = {
            f"{self.stage}/{name}": float(value)
            for name, value in metrics.items()
            if not name.startswith(left_out)
        }
        if values:
            self._log_metrics(values, step=num_steps)
            append_line(self.path, json_text([num_steps, values]))


def quiet_lightning() -> None:
    """Silence Lightning's hints, and its warnings about resumed epochs and frozen parts."""
    # Lightning sets its log level on import.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # The example stream resumes by its own count, which Lightning does not know.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint")
    # Sharded trainings refuse weight averaging, so this warning never applies.
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
    # Frozen parts stay in evaluation mode (``models.layers.partly_trained``).
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
