"""Training of one module to its last step: trainer, checkpoints, curves and weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)

from rudolph.data.loader import Streams, ignore_signals
from rudolph.data.seeds import mixed_seed
from rudolph.models.layers.lora import merge_low_rank
from rudolph.models.weights import save_weights
from rudolph.runs.execution import SHARDED, Execution, Hardware
from rudolph.training.callbacks import (
    MetricLogger,
    ReportProgress,
    ResumeCheckpoint,
    StopOnSignal,
    quiet_lightning,
)
from rudolph.training.checkpoints import find_checkpoint, remove_checkpoints
from rudolph.training.optim import OptimConfig
from rudolph.training.preemption import PreemptedError
from rudolph.training.steps import ManualStepModule

CURVES = "curves.jsonl"
CHECKPOINT = "last.ckpt"


def fit(
    execution: Execution,
    module: ManualStepModule,
    optim: OptimConfig,
    *,
    examples: tuple[Any, Any, int],
    stage: str,
    advance: Callable[[int, int, str], None],
    weights: Path,
    digest: str,
    seed: int,
) -> None:
    """Train a module to its last step and write its weights.

    Training resumes from the newest intact checkpoint next to ``weights``.  Checkpoints are
    removed once the weights are written.

    Args:
        execution: The run.
        module: The module to train.
        optim: Steps, batch size, checkpoint and validation intervals.
        examples: Training batch function, validation batch function and number of validation
            examples.
        stage: Name of the training in curves and seeds.
        advance: Progress callback ``advance(done, total, note)``.
        weights: File to write.
        digest: Digest of everything that determines the training; only a checkpoint with the
            same digest is resumed.
        seed: Seed of the training.
    """
    hardware = execution.hardware
    num_steps, last = optim.num_steps, weights.with_name(CHECKPOINT)
    shards = hardware.strategy == SHARDED and module.can_shard
    identity: dict[str, Any] = {"num_steps": num_steps, "digest": digest, "is_sharded": shards}
    start = find_checkpoint(last, is_main=execution.is_main_process, **identity)
    checkpoint = ResumeCheckpoint(last, optim.checkpoint_every, **identity)
    stop = StopOnSignal(checkpoint)
    callbacks: list[pl.Callback] = [checkpoint, stop, *averaging(optim)]
    module.seed = mixed_seed(seed, stage)
    logger = MetricLogger(
        execution.tracker.log_metrics,
        stage=stage,
        path=weights.with_name(CURVES),
        num_steps_done=lambda: module.num_steps_done,
    )
    quiet_lightning()
    trainer = make_trainer(
        hardware,
        num_networks=len(module.networks()),
        shards=shards,
        logger=logger,
        callbacks=[*callbacks, ReportProgress(advance, num_steps)],
        val_check_interval=min(optim.validate_every, num_steps),
        default_root_dir=weights.parent,
    )
    streams = Streams(
        *examples[:2],
        global_batch_size=optim.global_batch_size,
        micro_batch_size=hardware.batches(optim)[0],
        num_steps=num_steps,
        num_validation=examples[2],
        num_workers=hardware.num_workers,
    )
    run_trainer(trainer, module, streams, start)
    keep_weights(module, weights)
    if execution.is_main_process:
        remove_checkpoints(last)
    trainer.strategy.barrier()
    stop.raise_received()


def keep_weights(module: ManualStepModule, weights: Path) -> None:
    """Write the trained network of a module from the main process.

    Weights are stored in float32 regardless of the training precision, because other runs read
    them.
    """
    network = module.whole_network().float()
    merge_low_rank(network)
    if module.trainer.is_global_zero:
        save_weights(network, weights)


def run_trainer(
    trainer: pl.Trainer, module: pl.LightningModule, streams: Streams, start: Path | None
) -> None:
    """Train, from the checkpoint ``start`` if there is one.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
        PreemptedError: After a scheduler's signal.
    """
    try:
        trainer.fit(module, streams, ckpt_path=start)
    except SystemExit as exit_request:
        # Lightning exits the process before the command can print how to resume.
        raise KeyboardInterrupt from exit_request
    except PreemptedError:
        # Lightning has restored the handlers that were there before the training.
        ignore_signals()
        raise


def make_trainer(
    hardware: Hardware, *, num_networks: int = 1, shards: bool = False, **settings: Any
) -> pl.Trainer:
    """Build a Lightning trainer for this hardware.

    Progress bars, summaries, checkpoints and samplers of Lightning are off: this package has its
    own.

    Raises:
        ValueError: If the machine lacks the hardware.
    """
    strategy: str | ModelParallelStrategy = hardware.strategy_for(num_networks)
    if shards:
        # Write one file with the whole state, which any number of devices can read.
        strategy = ModelParallelStrategy(hardware.world, 1, save_distributed_checkpoint=False)
    try:
        return pl.Trainer(
            max_epochs=1,
            accelerator=hardware.accelerator,
            devices=list(hardware.device_indices) or hardware.num_devices,
            num_nodes=hardware.num_nodes,
            strategy=strategy,
            precision=hardware.used_precision,  # type: ignore[arg-type]
            plugins=[*environment_plugins(hardware)],
            # The logger leaves out most steps by its own count, which is right after resuming.
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **settings,
        )
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise ValueError(f"hardware: {' '.join(str(error).split())}") from error


def environment_plugins(hardware: Hardware) -> list[ClusterEnvironment]:
    """Return Lightning's view of the processes, where its own detection would be wrong."""
    if hardware.world == 1:
        # A Slurm process that executes a run of its own must not wait for other processes.
        return [LightningEnvironment()]
    if hardware.launch.launcher == "slurm":
        # The job script requeues: if Lightning did, it would write checkpoints of its own.
        return [SLURMEnvironment(auto_requeue=False)]
    return []


def averaging(optim: OptimConfig) -> list[pl.Callback]:
    """Return the callback that averages the weights if ``ema_decay`` is set."""
    if optim.ema_decay is None:
        return []
    return [EMAWeightAveraging(decay=optim.ema_decay, use_buffers=False)]
