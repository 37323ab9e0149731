"""Check of interrupted and resumed training, with the project's own trainer and checkpoints."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from rudolph.config.experiment_file import Run
from rudolph.config.run import RunConfig
from rudolph.data.examples import TokenBatch
from rudolph.gpu_check.rows import Case, CheckRow
from rudolph.gpu_check.sizes import Sizes
from rudolph.models.vqgan.model import VQGANConfig
from rudolph.runs.execution import Execution, Folders, Hardware, NullRecorder
from rudolph.runs.trainer import fit
from rudolph.training.decoder import DecoderTraining
from rudolph.training.losses import DecoderLossConfig
from rudolph.training.optim import OptimConfig, Optimizer

NUM_TRAINING_STEPS, STOPPED_AT, CHECKPOINT_EVERY = 8, 6, 2
DROPOUT = {"attention_dropout": 0.1, "output_dropout": 0.1}


def resume_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield one case per optimizer and training precision."""
    optimizers: tuple[Optimizer, ...] = ("adamw", "muon")
    for optimizer in optimizers:
        for precision in ("32-true", "bf16-mixed"):
            run = partial(compare_resumed, sizes, optimizer, precision)
            yield Case(f"{optimizer}, {precision}", run)


def compare_resumed(sizes: Sizes, optimizer: Optimizer, precision: str) -> Iterator[CheckRow]:
    """Compare bit by bit the weights of an uninterrupted and a resumed training."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with TemporaryDirectory() as folder:
            uninterrupted, interrupted = Path(folder) / "whole", Path(folder) / "broken"
            train_checked(sizes, optimizer, precision, uninterrupted, stop_at=None)
            try:
                train_checked(sizes, optimizer, precision, interrupted, stop_at=STOPPED_AT)
            except KeyboardInterrupt:
                train_checked(sizes, optimizer, precision, interrupted, stop_at=None)
            tensors = [
                load_file(path / "weights.safetensors") for path in (uninterrupted, interrupted)
            ]
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    differing = [
        name for name, value in tensors[0].items() if not torch.equal(value, tensors[1][name])
    ]
    note = f"of {len(tensors[0])}; {NUM_TRAINING_STEPS} steps, interrupted after {STOPPED_AT}"
    yield CheckRow("weights", len(differing), "differing tensors", limit=0, note=note)


def train_checked(
    sizes: Sizes, optimizer: Optimizer, precision: str, folder: Path, *, stop_at: int | None
) -> None:
    """Train the checked decoder, from the checkpoint in the folder if there is one.

    Args:
        sizes: The sizes of the check.
        optimizer: ``adamw`` or ``muon``.
        precision: Lightning's name of a precision, such as ``bf16-mixed``.
        folder: The run folder.
        stop_at: The step after which to interrupt; None trains to the end.

    Raises:
        KeyboardInterrupt: After ``stop_at`` steps.
    """
    geometry = sizes.checked
    config = OptimConfig(
        NUM_TRAINING_STEPS,
        4,
        optimizer,
        warmup_steps=2,
        validate_every=NUM_TRAINING_STEPS,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    accelerator = "cpu" if sizes.is_smoke else "auto"
    hardware = Hardware(accelerator=accelerator, precision=precision)
    run = Run("resume", "", {}, RunConfig(vqgan=VQGANConfig(resolution=32)))
    execution = Execution(
        run, folder, Folders(folder, folder), hardware, NullRecorder(), ignore_progress
    )
    model = geometry.model(torch.device("cpu"), **DROPOUT)
    module = DecoderTraining(model, DecoderLossConfig(), config)

    def batch(numbers: Sequence[int]) -> TokenBatch:
        cpu, size = torch.device("cpu"), len(numbers)
        tokens = torch.cat([geometry.tokens(1, cpu, seed=number) for number in numbers])
        weights, sources = torch.ones(size, 3), torch.zeros(size, dtype=torch.long)
        return TokenBatch(tokens, tokens, weights, sources, torch.tensor(numbers))

    def advance(done: int, total: int, note: str) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    folder.mkdir(exist_ok=True)
    fit(
        execution,
        module,
        config,
        examples=(batch, batch, 4),
        stage="decoder",
        advance=advance,
        weights=folder / "weights.safetensors",
        digest="random tokens",
        seed=0,
    )


def ignore_progress(stage: str, done: int, total: int, note: str) -> None:
    """Ignore the reported progress."""
