"""The newest complete checkpoint is found, whatever happened to the others."""

import logging
from pathlib import Path
from random import Random

import pytest
import torch
from damage import NUM_CASES, damage

from rudolph.training.checkpoints import (
    find_checkpoint,
    previous_of,
    read_state,
    remove_checkpoints,
    rotate_checkpoints,
)


def write_checkpoint(path: Path, step: int, *, num_steps: int = 8, digest: str = "a") -> None:
    state = {"num_steps": num_steps, "made_of": digest}
    content = {
        "state_dict": {"weight": torch.full((40, 30), float(step))},
        "optimizer_states": [{"step": step}],
        "loops": {"step": step},
        "callbacks": {"ResumeCheckpoint": state},
    }
    torch.save(content, path)


def write_two(folder: Path) -> Path:
    """Write the checkpoints of steps 3 and 6 and return the last one."""
    last = folder / "last.ckpt"
    for step in (3, 6):
        write_checkpoint(folder / "last.new", step)
        rotate_checkpoints(folder / "last.new", last)
    return last


def found_step(last: Path) -> int | None:
    found = find_checkpoint(last, num_steps=8, digest="a", is_main=True)
    return found and int(torch.load(found, weights_only=True)["loops"]["step"])


def test_the_last_checkpoint_is_used_and_the_one_before_it_kept(tmp_path: Path) -> None:
    last = write_two(tmp_path)
    assert found_step(last) == 6
    assert torch.load(previous_of(last), weights_only=True)["loops"]["step"] == 3
    # A process killed between the two renames leaves only the previous checkpoint.
    last.unlink()
    assert found_step(last) == 3
    remove_checkpoints(last)
    assert found_step(last) is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["emptied", "truncated", "flipped", "another", "folder"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    last = write_two(tmp_path)
    content = bytearray(last.read_bytes())
    if kind == "truncated":
        last.write_bytes(content[:-100])
    elif kind == "flipped":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    elif kind == "another":
        torch.save({"weight": torch.zeros(3)}, last)
    else:
        last.write_bytes(b"")
    if kind == "folder":
        last.unlink()
        last.mkdir()
    with caplog.at_level(logging.WARNING, "rudolph"):
        assert found_step(last) == 3
    [line] = caplog.messages
    assert line.startswith(f"{last}: damaged (") and "\n" not in line
    assert line.endswith("renamed last.ckpt.damaged. Training starts from previous.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt.damaged", "previous.ckpt"}


def test_without_a_whole_checkpoint_training_starts_from_the_beginning_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = write_two(tmp_path)
    last.write_bytes(b"")
    previous_of(last).write_bytes(b"PK\x03\x04")
    # A process that does not report reaches the same result and changes no file.
    assert find_checkpoint(last, num_steps=8, digest="a", is_main=False) is None
    assert last.is_file()
    with caplog.at_level(logging.WARNING, "rudolph"):
        assert found_step(last) is None
    assert len(caplog.messages) == 2
    assert all(line.endswith("Training starts from the beginning") for line in caplog.messages)


def test_a_checkpoint_of_another_training_is_refused_and_stays(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    write_checkpoint(last, 3, digest="b")
    with pytest.raises(
        ValueError, match="other data, another tokenizer or another VQ-GAN\\. Delete it"
    ):
        found_step(last)
    write_checkpoint(last, 3, num_steps=16)
    with pytest.raises(ValueError, match="training of 8 steps, got 16"):
        found_step(last)
    assert last.is_file()


def test_any_damage_gives_a_whole_checkpoint_or_none(tmp_path: Path) -> None:
    for case in range(NUM_CASES or 25):
        rng, folder = Random(case), tmp_path / str(case)
        folder.mkdir()
        last = write_two(folder)
        other = folder / "weights.bin"
        other.write_bytes(rng.randbytes(90))
        what = damage(last, rng, others=[other, previous_of(last)])
        if rng.random() < 0.3:
            what += damage(previous_of(last), rng, others=[other])
        assert found_step(last) in (None, 3, 6), what
        fault, _ = read_state(last)
        assert not fault or not last.exists(), what
