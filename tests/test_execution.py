"""Hardware flags: their meaning, and one-line refusals, also in a dry run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import run_tiny, write

from rudolph.cli import main
from rudolph.config.experiment_file import load_experiment
from rudolph.data.examples import ImageBatch
from rudolph.data.loader import Streams
from rudolph.models.layers.native_types import NativeTypes
from rudolph.models.vqgan.model import VQGAN
from rudolph.runs.execution import LIGHTNING_PRECISIONS, Hardware
from rudolph.runs.trainer import make_trainer
from rudolph.training.vqgan import VQGANTraining

FLOAT32 = frozenset({torch.float32})


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report four GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path).name


def told(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Return what ``run --dry-run`` prints to standard error, after checking its exit code."""
    found = main(["run", *arguments, "--dry-run"])
    error = capsys.readouterr().err
    assert found == code, error
    assert len(error.splitlines()) <= 1, error
    return error


@pytest.mark.parametrize(
    ("given", "number", "indices"),
    [
        (2, 2, ()),
        ("3", 3, ()),
        ("auto", 4, ()),
        ("-1", 4, ()),
        (-1, 4, ()),
        ("1,3", 2, (1, 3)),
        ("2,", 1, (2,)),
    ],
)
def test_devices_are_counted_as_lightning_counts_them(
    four_gpus: None, given: int | str, number: int, indices: tuple[int, ...]
) -> None:
    # A copy with another flag keeps the devices.
    hardware = dataclasses.replace(Hardware(devices=given), num_nodes=2)
    assert (hardware.num_devices, hardware.world) == (number, 2 * number)
    assert hardware.device_indices == indices
    assert hardware.device == torch.device("cuda", indices[0] if indices else 0)
    assert dataclasses.replace(hardware, precision="32").num_devices == number


@pytest.mark.parametrize(("given", "number"), [("auto", 1), ("-1", 1), (1, 1), ("64", 64)])
def test_a_cpu_has_as_many_processes_as_are_asked_for(given: int | str, number: int) -> None:
    hardware = Hardware(accelerator="cpu", devices=given)
    assert hardware.devices == hardware.num_devices == number


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("5", "--devices: expected at most 4 on this machine, got 5"),
        ("0,4", "--devices: expected different indices below 4, got '0,4'"),
        ("1,1", "--devices: expected different indices below 4, got '1,1'"),
        ("0", "--devices must be at least 1, got 0"),
        ("-2", "--devices must be at least 1, got -2"),
        ("two", "--devices: expected auto, -1 (all), a number or indices such as 0,1, got 'two'"),
        ("1.5", "--devices: expected auto"),
        ("", "--devices: expected auto"),
    ],
)
def test_devices_that_are_not_there_are_refused(four_gpus: None, given: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        Hardware(devices=given)
    assert str(error.value).startswith(words)


REFUSED = [
    (["--devices", "two"], "--devices: expected auto"),
    (["--devices", "0,1"], "--devices: expected a number on cpu, got '0,1'"),
    (["--precision", "16-mixd"], "got '16-mixd'; did you mean "),
    (["--precision", "16"], "--precision: expected one of 32-true"),
    (["--precision", "transformer-engine"], "got 'transformer-engine'"),
    (["--accelerator", "tpu"], "--accelerator: expected one of auto, cpu"),
    (["--accelerator", "cuda"], "--accelerator: expected cpu or auto, got 'cuda'"),
    (["--strategy", "fsdp"], "--strategy: expected one of auto, ddp"),
    (["--strategy", "dp"], "did you mean ddp?"),
    (["--strategy", "fsdp2", "--precision", "64-true"], "--precision: expected 32-true or bf16"),
    (["--strategy", "fsdp2"], "optim.ema_decay must be null with --strategy fsdp2, got 0.9"),
    (["--num-nodes", "0"], "--num-nodes must be at least 1, got 0"),
    (["--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
    (["--devices", "3"], "vqgan_optim.global_batch_size: expected a multiple of 3 devices"),
    (["--micro-batch-size", "3"], "vqgan_optim.global_batch_size: expected a multiple"),
    (["--devices", "2", "--jobs", "2"], "--jobs: expected 1 with 2 devices, got 2"),
    (["--block-masks"], "--block-masks: expected CUDA, got cpu"),
    (["optim.optimizer=adamw8bit"], "optim.optimizer adamw8bit: expected"),
    (
        [
            "model.family=clip",
            "evaluation.evaluators=[]",
            "optim.global_batch_size=8",
            "--micro-batch-size",
            "4",
        ],
        "--micro-batch-size: expected 8 or none for a CLIP, got 4",
    ),
]


def test_a_dry_run_refuses_what_the_run_would_refuse(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in REFUSED:
        assert words in told(capsys, 2, file, *arguments), arguments
    for arguments in (["--devices", "auto"], ["--devices", "-1"], ["--devices", "2"]):
        assert told(capsys, 0, file, *arguments) == ""


def test_a_precision_that_is_emulated_is_said_with_the_machines_own(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only_float32 = NativeTypes(FLOAT32, FLOAT32)
    monkeypatch.setattr("rudolph.runs.execution.native_types", lambda device: only_float32)
    monkeypatch.setattr("rudolph.training.optim.has_native_bfloat16", lambda device: False)
    error = told(capsys, 0, file, "--precision", "bf16")
    assert error == (
        "--precision bf16-mixed: bfloat16 products are emulated on this processor and are 8 to "
        "60 times slower. Leave --precision out for 32-true\n"
    )
    for name in ("16-true", "bf16-true"):
        assert "products are emulated" in told(capsys, 0, file, "--precision", name)
    for name in ("32-true", "64-true", "64", "32"):
        assert told(capsys, 0, file, "--precision", name) == ""
    both = NativeTypes(FLOAT32 | {torch.bfloat16}, FLOAT32)
    monkeypatch.setattr("rudolph.runs.execution.native_types", lambda device: both)
    assert told(capsys, 0, file, "--precision", "bf16-mixed") == ""


def test_the_precision_without_a_flag_is_that_of_the_device_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "rudolph.training.optim.has_native_bfloat16", lambda device: device == "cuda"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Hardware().used_precision == "bf16-mixed"
    assert Hardware(accelerator="cpu").used_precision == "32-true"


@pytest.mark.parametrize(
    "precision", [name for name in LIGHTNING_PRECISIONS if name.endswith("true")]
)
def test_a_codebook_follows_its_latents_in_every_precision(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    config = load_experiment(write(tmp_path)).runs[0].config
    module = VQGANTraining(VQGAN(config.vqgan), config.vqgan_losses, config.vqgan_optim)
    before = module.model.quantize.codebook.clone()
    batch = ImageBatch(torch.rand(4, 3, 24, 24) * 2 - 1, torch.arange(4))
    trainer = make_trainer(
        Hardware(accelerator="cpu", precision=precision), logger=False, default_root_dir=tmp_path
    )
    streams = Streams(
        lambda _: batch,
        lambda _: batch,
        global_batch_size=4,
        micro_batch_size=4,
        num_steps=3,
        num_validation=4,
    )
    trainer.fit(module, streams)
    quantizer = module.model.quantize
    assert quantizer.codebook.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert not torch.equal(quantizer.codebook.float(), before)
    for name in quantizer.FLOAT32_BUFFERS:
        assert torch.isfinite(getattr(quantizer, name)).all()


def test_weights_of_another_precision_are_kept_in_float32(tmp_path: Path) -> None:
    short = ["vqgan_optim.num_steps=2", "optim.num_steps=2"]
    asked = ["evaluation.evaluators=[reconstruction]", "evaluation.grid_prompts=[]"]
    folder = run_tiny(tmp_path, (*short, *asked), precision="bf16-true")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["hardware"]["precision"] == "bf16-true"
    assert environment["hardware"]["devices"] == 1
    for name in ("vqgan", "decoder"):
        tensors = load_file(folder / "checkpoints" / f"{name}.safetensors").values()
        floats = [each for each in tensors if each.is_floating_point()]
        assert {each.dtype for each in floats} == FLOAT32
        assert all(torch.isfinite(each).all() for each in floats)


def test_what_measures_speed_takes_one_device(tmp_path: Path) -> None:
    speed = ("speed.workload=decode", "speed.implementations=[float32]")
    config = load_experiment(write(tmp_path, targets={}, report={}), speed).runs[0].config
    Hardware(accelerator="cpu").check(config)
    with pytest.raises(ValueError, match=r"^speed\.workload: needs --devices 1"):
        Hardware(accelerator="cpu", devices=2).check(config)
