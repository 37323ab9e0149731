"""Parts of a training: refused checkpoints, the start of the discriminator, and flags."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import write

from rudolph.config.experiment_file import load_experiment
from rudolph.data.examples import ImageBatch
from rudolph.data.loader import Streams
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.runs.execution import Hardware
from rudolph.runs.trainer import make_trainer
from rudolph.training.callbacks import NonFiniteLossError, ReportProgress, ResumeCheckpoint
from rudolph.training.losses import ReconstructionLossConfig
from rudolph.training.optim import OptimConfig, clip_gradients
from rudolph.training.steps import one_scale
from rudolph.training.vqgan import VQGANTraining


def test_a_checkpoint_refuses_another_training_and_weights_that_are_not_finite() -> None:
    first = ResumeCheckpoint(Path("last.ckpt"), 2, num_steps=9, digest="one")
    first.load_state_dict(first.state_dict())
    for other, words in (
        (ResumeCheckpoint(first.path, 2, num_steps=8, digest="one"), "8 steps, got 9"),
        (ResumeCheckpoint(first.path, 2, num_steps=9, digest="two"), "other data"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(first.state_dict())
    module = torch.nn.Linear(2, 2)
    module.weight.data[1, 0] = torch.inf
    with pytest.raises(NonFiniteLossError, match="step 4: the weights are not finite"):
        first.on_train_batch_start(None, module, None, 4)  # type: ignore[arg-type]


def test_the_adversary_starts_when_it_should_and_trains_its_discriminator() -> None:
    torch.manual_seed(0)
    quantizer = QuantizerConfig("ema", 12, 4)
    config = VQGANConfig(24, (4, 8, 8), 1, (), 4, quantizer=quantizer)
    optim = OptimConfig(num_steps=4, global_batch_size=2, warmup_steps=0)
    module = VQGANTraining(VQGAN(config), ReconstructionLossConfig(discriminator_start=2), optim)
    batch = ImageBatch(torch.rand(2, 3, 24, 24) * 2 - 1, torch.arange(2))
    module.model(batch.images)
    result = module.model(batch.images)
    assert "adversary" not in module.generator_losses(result, batch.images, 1)
    losses = module.generator_losses(result, batch.images, 2)
    assert losses["adversary"].requires_grad and torch.isfinite(losses["adversary"])


def test_hardware_refuses_what_it_cannot_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_experiment(write(tmp_path)).runs[0]
    with pytest.raises(ValueError, match=r"^--block-masks: expected CUDA, got cpu"):
        Hardware(accelerator="cpu", block_masks=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"dropout must be 0 with --block-masks, got 0.1$"):
        Hardware(block_masks=True).check(run.config)
    changed = "model.attention_dropout=0", "model.tuning.lora_rank=2"
    run = load_experiment(write(tmp_path), changed).runs[0]
    Hardware(block_masks=True).check(run.config)
    with pytest.raises(ValueError, match=r"ema_decay must be null with --strategy fsdp2, got 0.9"):
        Hardware(accelerator="cpu", strategy="fsdp2").check(run.config)
    monkeypatch.setattr("rudolph.runs.execution.check_compiler", lambda device: None)
    with pytest.raises(ValueError, match=r"lora_rank must be null with --compile, got 2$"):
        Hardware(compile=True).check(run.config)


def test_gradients_of_scaled_losses_are_clipped_as_they_are() -> None:
    found = []
    for scale in (1.0, 2.0**16):
        weight = torch.nn.Parameter(torch.zeros(3))
        weight.grad = torch.tensor([3.0, 0.0, 4.0]) * scale
        clip_gradients([torch.optim.SGD([weight])], OptimConfig(gradient_clip=1.0), scale=scale)
        found.append(weight.grad / scale)
    torch.testing.assert_close(found[0], torch.tensor([0.6, 0.0, 0.8]))
    torch.testing.assert_close(found[1], found[0])


def test_optimizers_of_one_step_share_the_scale_of_their_gradients() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    scaler.scale(weights[0].sum() * torch.inf + weights[1].sum()).backward()
    with one_scale(scaler):
        for optimizer in optimizers:
            # As Lightning does for each optimizer.
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 8
    # The first overflowed and did not step; the second is unscaled as it was scaled.
    assert weights[0].tolist() == [0, 0] and weights[1].tolist() == [-1, -1]
    assert scaler.get_scale() == 4


class Kept(VQGANTraining):
    """A training that saves the weights of each process after the last step."""

    path: Path
    before: dict[str, torch.Tensor]
    found: dict[str, float]

    def on_train_end(self) -> None:
        found = {name: each.detach().clone() for name, each in self.named_parameters()}
        torch.save(found, self.path.with_suffix(f".{self.global_rank}"))


def train_with_adversary(folder: Path, *, num_validation: int, **hardware: Any) -> Kept:
    """Train a VQ-GAN for six steps, with the discriminator from the third step."""
    torch.manual_seed(0)
    config = VQGANConfig(24, (4, 8, 8), 1, (), 4, quantizer=QuantizerConfig("vq", 12, 4))
    optim = OptimConfig(num_steps=6, global_batch_size=4, warmup_steps=0, validate_every=6)
    on = Hardware(accelerator="cpu", precision="32-true", **hardware)
    module = Kept(
        VQGAN(config),
        ReconstructionLossConfig(discriminator_start=2),
        optim,
    )
    module.before = {name: each.detach().clone() for name, each in module.named_parameters()}
    module.path = folder / f"of_{on.devices}"
    images = torch.rand(24, 3, 24, 24) * 2 - 1

    def batch(numbers: Sequence[int]) -> ImageBatch:
        chosen = torch.tensor(list(numbers))
        return ImageBatch(images[chosen], chosen)

    trainer = make_trainer(
        on, num_networks=2, logger=False, val_check_interval=6, default_root_dir=folder
    )
    streams = Streams(
        batch,
        batch,
        global_batch_size=4,
        micro_batch_size=on.batches(optim)[0],
        num_steps=6,
        num_validation=num_validation,
    )
    trainer.fit(module, streams)
    module.found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return module


def test_a_discriminator_trains_on_two_devices_as_on_one(tmp_path: Path) -> None:
    one = train_with_adversary(tmp_path, num_validation=1, micro_batch_size=2)
    two = train_with_adversary(tmp_path, num_validation=1, devices=2, strategy="ddp_fork")
    first, second = (torch.load(two.path.with_suffix(f".{rank}")) for rank in range(2))
    alone = torch.load(one.path.with_suffix(".0"))
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert torch.isfinite(weight).all()
        # Six AdamW steps bound the difference: their length ignores the gradient's norm.
        torch.testing.assert_close(weight, alone[name], atol=2e-3, rtol=0)
    for network in ("model", "discriminator"):
        assert any(
            not torch.equal(weight, one.before[name])
            for name, weight in alone.items()
            if name.startswith(network)
        )
    # One pair for two devices: both devices validate it.
    assert two.found["val/psnr"] == pytest.approx(one.found["val/psnr"], abs=1e-3)


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
            # Validation time does not count as waiting for data.
            progress.on_validation_end(trainer, None)
    shares = [float(note.split()[1].rstrip("%")) for note in notes]
    assert shares == pytest.approx([0.0, 100 / 7, 100 / 10, 200 / 14], abs=0.05)
