"""Parts of a training by themselves: what a checkpoint refuses, when the adversary starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import write

from rudolph.data.examples import ImageBatch
from rudolph.execution import Hardware
from rudolph.experiment_file import load_experiment
from rudolph.fitting import make_trainer
from rudolph.models.quantizers import QuantizerConfig
from rudolph.models.vqgan import VQGAN, VQGANConfig
from rudolph.training.callbacks import NonFiniteLossError, ReportProgress, ResumeCheckpoint
from rudolph.training.losses import ReconstructionLossConfig
from rudolph.training.optim import OptimConfig
from rudolph.training.vqgan import VQGANTraining


def test_a_checkpoint_refuses_another_training_and_weights_that_are_not_finite() -> None:
    first = ResumeCheckpoint(Path("last.ckpt"), 2, num_batches=9, made_of="one")
    first.load_state_dict(first.state_dict())
    for other, words in (
        (ResumeCheckpoint(first.path, 2, num_batches=8, made_of="one"), "training of 9 batches"),
        (ResumeCheckpoint(first.path, 2, num_batches=9, made_of="two"), "other data"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(first.state_dict())
    module = torch.nn.Linear(2, 2)
    module.weight.data[1, 0] = torch.inf
    with pytest.raises(NonFiniteLossError, match="batch 4: the weights are not finite"):
        first.on_train_batch_start(None, module, None, 4)  # type: ignore[arg-type]


def test_the_adversary_starts_when_it_should_and_trains_its_discriminator() -> None:
    torch.manual_seed(0)
    quantizer = QuantizerConfig("ema", 12, 4)
    config = VQGANConfig(24, (4, 8, 8), 1, (), 4, quantizer=quantizer)
    optim = OptimConfig(num_steps=4, global_batch_size=2, warmup_steps=0)
    module = VQGANTraining(VQGAN(config), ReconstructionLossConfig(adversary_start=2), optim)
    batch = ImageBatch(torch.rand(2, 3, 24, 24) * 2 - 1, torch.arange(2))
    module.model(batch.images)
    result = module.model(batch.images)
    assert "adversary" not in module.generator_losses(result, batch.images, 1)
    losses = module.generator_losses(result, batch.images, 2)
    assert losses["adversary"].requires_grad and torch.isfinite(losses["adversary"])


def test_hardware_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^hardware: ") as error:
        make_trainer(Hardware(accelerator="tpu"))
    assert "\n" not in str(error.value)


def test_hardware_refuses_what_it_cannot_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_experiment(write(tmp_path)).runs[0]
    with pytest.raises(ValueError, match=r"^--block-masks needs CUDA"):
        Hardware(accelerator="cpu", block_masks=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"dropout must be 0 with --block-masks, got 0.1$"):
        Hardware(block_masks=True).check(run.config)
    changed = "decoder.attention_dropout=0", "decoder_tuning.lora_rank=2"
    run = load_experiment(write(tmp_path), changed).runs[0]
    Hardware(block_masks=True).check(run.config)
    monkeypatch.setattr("rudolph.execution.check_compiler", lambda device: None)
    with pytest.raises(ValueError, match=r"lora_rank must be null with --compile, got 2$"):
        Hardware(compile=True).check(run.config)


def test_progress_tells_the_share_of_time_that_data_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 4.0, 7.0, 20.0, 23.0, 24.0, 27.0])
    monkeypatch.setattr("rudolph.training.callbacks.time.perf_counter", lambda: next(clock))
    notes: list[str] = []
    progress = ReportProgress(lambda done, total, note: notes.append(note), 4)
    trainer = SimpleNamespace(callback_metrics={})
    for batch in range(4):
        progress.on_train_batch_start(trainer, None, None, batch)
        progress.on_train_batch_end(trainer, None, None, None, batch)
        if batch == 1:
            # What a validation takes is no waiting.
            progress.on_validation_end(trainer, None)
    shares = [float(note.split()[1].rstrip("%")) for note in notes]
    assert shares == pytest.approx([0.0, 100 / 7, 100 / 10, 200 / 14], abs=0.05)
