"""Devices and micro-batches change rounding alone."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_documents import Letters, build_reader

from rudolph.data.answer_classes import QuestionBatch
from rudolph.data.documents import DocumentBatch, Panel, batch_documents
from rudolph.data.examples import ImageBatch, TokenBatch
from rudolph.data.loader import Streams
from rudolph.models.fusion.late_fusion import FusionConfig
from rudolph.models.late_fusion.classifier import AnswerClassifier
from rudolph.models.rudolph.decoder import DecoderConfig, MaskedDecoder
from rudolph.models.vision.clip import CLIPConfig
from rudolph.models.vqgan.model import VQGAN, VQGANConfig
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.runs.execution import Hardware
from rudolph.runs.trainer import make_trainer
from rudolph.sequence.conversation import IGNORE
from rudolph.sequence.layout import EOS, SequenceLayout, Vocabulary
from rudolph.training.answers import AnswerTraining
from rudolph.training.callbacks import ResumeCheckpoint, quiet_lightning
from rudolph.training.checkpoints import find_checkpoint
from rudolph.training.decoder import DecoderTraining
from rudolph.training.language import LanguageTraining
from rudolph.training.losses import REDUCTIONS, DecoderLossConfig, ReconstructionLossConfig
from rudolph.training.optim import OptimConfig
from rudolph.training.steps import ManualStepModule
from rudolph.training.vqgan import VQGANTraining

NUM_STEPS, BATCH, CHECKPOINT_EVERY = 5, 8, 3
OPTIM = OptimConfig(NUM_STEPS, BATCH, warmup_steps=0, validate_every=NUM_STEPS)
# Loss weights of text-to-image, captioning, and a task that scores right texts alone.
WEIGHTS = torch.tensor([[1.0, 7.0, 0.0], [0.5, 0.0, 3.0], [0.0, 0.0, 1.0]])
LOSSES = [*({"reduction": name} for name in REDUCTIONS), {"weighting": "learned"}]
TWO_DEVICES = {"devices": 2, "strategy": "ddp_fork"}


def token_batch(numbers: Sequence[int]) -> TokenBatch:
    """Return examples of three tasks, with captions of 0 to 5 tokens."""
    rows, sources = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        row = torch.randint(4, 9, (15,), generator=generator)
        row[9 + number % 6 :] = 0
        rows.append(row)
        # The right text is rare, and absent from whole micro-batches.
        sources.append({3: 1, 6: 2}.get(number % 8, 0))
    entries, tokens = torch.tensor(sources), torch.stack(rows)
    return TokenBatch(tokens, tokens, WEIGHTS[entries], entries, torch.tensor(numbers))


def decoder_training(
    *, dropout: float = 0.0, optimizer: str = "", **losses: Any
) -> DecoderTraining:
    torch.manual_seed(2)
    rates = {"attention_dropout": dropout, "output_dropout": dropout}
    model = MaskedDecoder(
        DecoderConfig(2, 24, 3, **rates), SequenceLayout(5, 2, 6), Vocabulary(20, 3, 5, 9)
    )
    names = ("drawn", "captions", "texts")
    optim = replace(OPTIM, optimizer=optimizer or OPTIM.optimizer)
    return DecoderTraining(model, DecoderLossConfig(**losses), optim, sources=names)


def train(
    module: ManualStepModule,
    folder: Path,
    *,
    batch: Any = token_batch,
    start: Path | None = None,
    shards: bool = False,
    num_validation: int = 13,
    **hardware: Any,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train to the last step; return the logged metrics and the weights."""
    quiet_lightning()
    folder.mkdir(exist_ok=True)
    on = Hardware(accelerator="cpu", precision="32-true", **hardware)
    last, module.seed = folder / "last.ckpt", 11
    identity = {"num_steps": NUM_STEPS, "digest": "same", "is_sharded": shards}
    checkpoint = ResumeCheckpoint(last, CHECKPOINT_EVERY, **identity)
    trainer = make_trainer(
        on,
        num_networks=len(module.networks()),
        shards=shards,
        logger=False,
        callbacks=[checkpoint],
        val_check_interval=NUM_STEPS,
        default_root_dir=folder,
    )
    streams = Streams(
        batch,
        batch,
        global_batch_size=BATCH,
        micro_batch_size=on.batches(OPTIM)[0],
        num_steps=NUM_STEPS,
        num_validation=num_validation,
    )
    trainer.fit(module, streams, ckpt_path=start)
    trainer.save_checkpoint(folder / "end.ckpt")
    weights = torch.load(folder / "end.ckpt", weights_only=True)["state_dict"]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, weights


@pytest.mark.parametrize("losses", LOSSES, ids=str)
def test_micro_batches_of_any_size_have_the_same_losses(
    tmp_path: Path, losses: dict[str, str]
) -> None:
    whole, _ = train(decoder_training(**losses), tmp_path / "whole")
    for size in (1, 2, 4):
        found, _ = train(
            decoder_training(**losses), tmp_path / f"size_{size}", micro_batch_size=size
        )
        assert found == pytest.approx(whole, rel=1e-6), size


@pytest.mark.parametrize("losses", LOSSES, ids=str)
def test_two_devices_have_the_losses_of_one_whatever_their_micro_batches(
    tmp_path: Path, losses: dict[str, str]
) -> None:
    one, _ = train(decoder_training(**losses), tmp_path / "one")
    module = decoder_training(**losses)
    two, _ = train(module, tmp_path / "two", micro_batch_size=1, **TWO_DEVICES)
    assert two == pytest.approx(one, rel=1e-6)
    assert {"train/loss", "train/loss/drawn/image", "train/fraction/texts"} <= one.keys()


def test_a_run_moves_between_one_device_and_two_with_the_same_bits(tmp_path: Path) -> None:
    """With equal micro-batches even dropout is the same, and so are checkpoints."""

    def run(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        return train(decoder_training(dropout=0.2), tmp_path / name, **settings)[1]

    one = run("one", micro_batch_size=4)
    two = run("two", **TWO_DEVICES)
    from_two = run("from_two", micro_batch_size=4, start=tmp_path / "two" / "last.ckpt")
    from_one = run("from_one", start=tmp_path / "one" / "last.ckpt", **TWO_DEVICES)
    for name, weight in one.items():
        for other in (two, from_two, from_one):
            assert torch.equal(other[name], weight), name
    without = train(decoder_training(), tmp_path / "without", micro_batch_size=4)[1]
    assert not all(torch.equal(without[name], weight) for name, weight in one.items())


def image_batch(numbers: Sequence[int]) -> ImageBatch:
    images = [
        torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(n % 24)) for n in numbers
    ]
    return ImageBatch(torch.stack(images) * 2 - 1, torch.tensor(numbers))


def test_a_codebook_of_running_statistics_follows_whole_steps(tmp_path: Path) -> None:
    found = {}
    variants = {"whole": {}, "parts": {"micro_batch_size": 2}, "two": TWO_DEVICES}
    for name, hardware in variants.items():
        torch.manual_seed(0)
        quantizer = QuantizerConfig("ema", 12, 4, dead_code_threshold=0.5)
        config = VQGANConfig(24, (4, 8, 8), 1, (), 4, quantizer=quantizer)
        module = VQGANTraining(VQGAN(config), ReconstructionLossConfig(), OPTIM)
        found[name] = train(module, tmp_path / name, batch=image_batch, **hardware)
    (metrics, weights), codebook = found["whole"], "model.quantize.codebook"
    for other, other_weights in (found["parts"], found["two"]):
        assert other == pytest.approx(metrics, rel=1e-3)
        torch.testing.assert_close(other_weights[codebook], weights[codebook], atol=0.02, rtol=0)


@pytest.mark.parametrize("family", ["language_model", "flamingo"])
def test_documents_in_micro_batches_have_the_same_loss(tmp_path: Path, family: str) -> None:
    found = []
    for size in (BATCH, 2):
        model, reader, form = build_reader(family)

        def batch(numbers: Sequence[int], form: Any = form) -> DocumentBatch:
            rows = []
            for number in numbers:
                generator = torch.Generator().manual_seed(number)
                image = torch.rand(3, 24, 24, generator=generator)
                # Answers of 1 to 5 letters; the language model reads no image.
                shown = image if family == "flamingo" else None
                rows.append([Panel(shown, "ab", "c" * (1 + number % 5))])
            documents = batch_documents(rows, form, Letters(), side="right")
            return documents._replace(examples=torch.tensor(numbers))

        module = LanguageTraining(model.train(), reader, OPTIM)
        found.append(train(module, tmp_path / f"of_{size}", batch=batch, micro_batch_size=size)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert {"train/loss", "val/loss"} <= found[0].keys()


def question_batch(numbers: Sequence[int]) -> QuestionBatch:
    """Return examples of which some lack a modality, and some have an answer that is no class."""
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    pixels = torch.stack([torch.randn(3, 16, 16, generator=each) for each in generators])
    ids = torch.stack([torch.randint(4, 30, (5,), generator=each) for each in generators])
    ids[:, -1], rows = EOS, torch.tensor(numbers)
    present = torch.stack([rows % 5 != 1, rows % 5 != 2], dim=1)
    # The first micro-batch of two examples has no label at all.
    labels = torch.where(rows % 8 < 2, IGNORE, rows % 4)
    return QuestionBatch(pixels, ids, present, labels, rows)


def test_answers_in_micro_batches_and_on_two_devices_have_the_same_loss(tmp_path: Path) -> None:
    found = []
    for name, hardware in (
        ("whole", {}),
        ("parts", {"micro_batch_size": 2}),
        ("two", TWO_DEVICES),
    ):
        torch.manual_seed(0)
        towers = CLIPConfig(12, 16, 1, 16, 8, 5, 30, 16, 2, 1)
        model = AnswerClassifier(towers, FusionConfig("gmu", (12, 12), 6), 4)
        module = AnswerTraining(model, OPTIM)
        found.append(train(module, tmp_path / name, batch=question_batch, **hardware)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert found[0].keys() == {"train/loss", "val/loss", "val/accuracy"}


SHARDED_TRAINING = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
import test_hardware_independence as t
folder = Path({folder!r})
for optimizer in ("adamw", "muon"):
    t.OPTIM = t.replace(t.OPTIM, optimizer=optimizer)
    module = t.decoder_training()
    settings = dict(shards=True, strategy="fsdp2", num_validation=129)
    metrics, _ = t.train(module, folder / optimizer, **settings)
    whole = module.whole_network()
    if module.global_rank == 0:
        assert module.model.is_sharded and not whole.is_sharded
        torch.save((metrics, whole.state_dict()), folder / (optimizer + ".pt"))
    start = folder / optimizer / "last.ckpt"
    again, _ = t.train(t.decoder_training(), folder / "again", start=start, **settings)
    assert again == metrics, (again, metrics)
"""


def test_a_sharded_decoder_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    """FSDP2 on two processes; a checkpoint of it continues on one."""
    code = SHARDED_TRAINING.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    script = tmp_path / "script.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    for optimizer in ("adamw", "muon"):
        metrics, weights = torch.load(tmp_path / f"{optimizer}.pt")
        module = decoder_training(optimizer=optimizer)
        before = {name: weight.clone() for name, weight in module.model.state_dict().items()}
        one = {"micro_batch_size": 4, "num_validation": 129}
        expected, _ = train(module, tmp_path / f"one_{optimizer}", **one)
        assert metrics == pytest.approx(expected, rel=1e-6)
        for name, weight in weights.items():
            assert not torch.equal(weight, before[name]), name
            torch.testing.assert_close(weight, module.model.state_dict()[name], atol=1e-4, rtol=0)
    last = tmp_path / "adamw" / "last.ckpt"
    found, _ = train(decoder_training(), tmp_path / "next", start=last, **one)
    metrics, _ = torch.load(tmp_path / "adamw.pt")
    assert found["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-6)


def test_a_sharded_training_continues_its_own_checkpoints_alone(tmp_path: Path) -> None:
    train(decoder_training(), tmp_path / "one")
    message = r"last\.ckpt: written without --strategy fsdp2\. Continue without it"
    with pytest.raises(ValueError, match=message):
        find_checkpoint(
            tmp_path / "one" / "last.ckpt",
            num_steps=NUM_STEPS,
            digest="same",
            is_main=True,
            is_sharded=True,
        )
