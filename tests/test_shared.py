"""Weights common to several runs: damaged ones are trained again, and their curves survive."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rudolph.files.atomic import file_sha256, write_text
from rudolph.models.weights import save_weights
from rudolph.runs.stages.shared import are_intact, checksum_of, replay_curves


class Recorder:
    """A stand-in for an execution that keeps logged metrics."""

    def __init__(self) -> None:
        self.tracker = self
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], *, step: int) -> None:
        self.logged.append((step, values))


def test_whole_weights_are_used_and_missing_ones_trained(tmp_path: Path) -> None:
    weights, model = tmp_path / "weights.safetensors", nn.Linear(3, 2)
    assert not are_intact(weights, model)
    save_weights(model, weights)
    assert are_intact(weights, nn.Linear(3, 2)) and weights.is_file()


@pytest.mark.parametrize("kind", ["empty", "cut", "another", "folder", "flipped"])
def test_damaged_weights_are_set_aside_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_weights(nn.Linear(3, 4) if kind == "another" else nn.Linear(3, 2), weights)
    if kind == "folder":
        weights.unlink()
        weights.mkdir()
    elif kind == "flipped":
        write_text(checksum_of(weights), file_sha256(weights) + "\n")
        assert are_intact(weights, nn.Linear(3, 2))
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    elif kind != "another":
        weights.write_bytes(b"" if kind == "empty" else weights.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING, "rudolph"):
        assert not are_intact(weights, nn.Linear(3, 2))
    [line] = caplog.messages
    assert line.startswith(f"{weights}: damaged (") and "training again" in line
    assert not weights.exists() and (tmp_path / "weights.safetensors.damaged").exists()


def test_curves_are_replayed_without_the_lines_that_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, recorder = tmp_path / "curves.jsonl", Recorder()
    execution: Any = recorder
    path.write_text('[4, {"loss": 2.0}]\n[5, {"lo\n[6]\n\n[8, {"loss": 1.0}]\n')
    with caplog.at_level(logging.WARNING, "rudolph"):
        replay_curves(execution, path)
        assert recorder.logged == [(4, {"loss": 2.0}), (8, {"loss": 1.0})]
        path.write_bytes(b"")
        replay_curves(execution, path)
        path.unlink()
        replay_curves(execution, path)
    assert len(recorder.logged) == 2
    assert "3 of 5 lines are left out" in caplog.messages[0]
    assert len(caplog.messages) == 3 and all(str(path) in line for line in caplog.messages)


def test_weights_of_a_shape_are_checked_without_their_numbers(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_weights(nn.Linear(3, 2), weights)
    with torch.device("meta"):
        assert are_intact(weights, nn.Linear(3, 2))
