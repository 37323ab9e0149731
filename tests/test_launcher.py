"""Processes started by torchrun, Slurm and Lightning: who records, how many, and their end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import run_tiny, write

from rudolph.cli import main
from rudolph.runs.execution import Hardware
from rudolph.runs.launcher import Launch, read_launch
from rudolph.training.preemption import REQUEUE

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"PATH": "/bin", "RANK": "3"}, Launch()),
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}, Launch("torchrun", True, 0, 4, 2)),
        ({**TORCHRUN, "RANK": "3", "LOCAL_RANK": "1"}, Launch("torchrun", False, 1, 4, 2)),
        ({**SLURM, "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, Launch("slurm", False, 0, 4, 2)),
        ({**SLURM, "SLURM_PROCID": "1", "SLURM_JOB_NAME": "bash"}, Launch()),
        ({"LOCAL_RANK": "0"}, Launch("lightning", True, 0)),
        ({"LOCAL_RANK": "1"}, Launch("lightning", False, 1)),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, Launch("lightning", False, 0)),
    ],
)
def test_the_environment_tells_the_place_of_a_process(
    environment: dict[str, str], expected: Launch
) -> None:
    assert read_launch(environment) == expected


def test_a_launcher_without_a_rank_is_told() -> None:
    with pytest.raises(ValueError, match=r"^RANK: expected a number from the launcher, got ''$"):
        read_launch(TORCHRUN)


def test_torchrun_sets_the_devices_and_other_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**TORCHRUN, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    hardware = Hardware(accelerator="cpu")
    assert (hardware.devices, hardware.num_nodes, hardware.is_main_process) == (2, 2, False)
    with pytest.raises(ValueError, match=r"^--devices: expected 2 as torchrun started, got 3$"):
        Hardware(accelerator="cpu", devices=3)


def test_processes_of_slurm_join_one_run_or_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Hardware(accelerator="cpu").is_main_process
    assert not Hardware(accelerator="cpu", devices=2, num_nodes=2).is_main_process
    with pytest.raises(ValueError, match="expected 4 processes in all as srun started, got 2"):
        Hardware(accelerator="cpu", devices=2)


def test_a_process_of_slurms_records_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    short = ["vqgan_optim.num_steps=2", "optim.num_steps=2", "evaluation.grid_prompts=[]"]
    folder = run_tiny(tmp_path, (*short, "evaluation.evaluators=[reconstruction]"))
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


FLAGS = ["--accelerator", "cpu", "--precision", "32-true", "--micro-batch-size", "2"]


def test_a_run_of_two_processes_ends_at_a_signal_and_continues_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's signal reaches one process, and both end after the same step."""
    settings = {"optim.num_steps": 120, "optim.checkpoint_every": 120}
    settings |= {"evaluation.evaluators": ["reconstruction"], "evaluation.grid_prompts": []}
    write(tmp_path, variants={"long": settings})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", "-m", "rudolph", "run", "tiny.yaml", *FLAGS],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("runs/.cache/decoder-*/curves.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = ["pgrep", "-P", str(process.pid)]
    ranks = subprocess.run(children, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGUSR1)
    output = process.communicate(timeout=200)[0]
    ended = re.search(r"rudolph: ended by SIGUSR1 after (\d+) steps. Run the same", output)
    assert ended and f"exitcode  : {REQUEUE}" in output and "PreemptedError" not in output
    [last] = tmp_path.glob("runs/.cache/decoder-*/last.ckpt")
    loops = torch.load(last, weights_only=True)["loops"]["fit_loop"]
    done = loops["epoch_loop.batch_progress"]["current"]["completed"]
    assert done == int(ended[1]) < 120
    monkeypatch.chdir(tmp_path)
    assert main(["run", "tiny.yaml", *FLAGS]) == 0
    [summary] = tmp_path.glob("runs/tiny/*/summary.json")
    assert json.loads(summary.read_text())["status"] == "finished"
    # The second run continued: no step was logged twice.
    lines = last.with_name("curves.jsonl").read_text().splitlines()
    steps = [json.loads(line)[0] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] > done
    assert all(step % 10 == 0 for step in steps)
