"""Resume checkpoints on disk: two of them, checked before one is used.

``last.ckpt`` is the newest and ``previous.ckpt`` the one before it.  A damaged one is set aside
and the other is used; without any, training starts from the beginning, to the same bits.
"""

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rudolph.files.atomic import rename_damaged, warn_once

# The callback that writes them, as Lightning names its state.
STATE = "ResumeCheckpoint"
CHECKPOINT_PARTS = ("state_dict", "optimizer_states", "loops", "callbacks")
# What zipfile and torch's unpickler raise on a file that is cut off, overwritten or another's.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, EOFError, OSError),
    *(RuntimeError, LookupError, ValueError, AttributeError, TypeError, AssertionError),
    *(ArithmeticError, MemoryError),
)


def previous_of(last: Path) -> Path:
    """Return where the checkpoint before ``last`` lies."""
    return last.with_name("previous.ckpt")


def put_checkpoint(new: Path, last: Path) -> None:
    """Move a checkpoint that is whole in place; the one that was there becomes the previous."""
    # Its bytes first, then its name: a power cut must not leave a name without bytes.
    with new.open("rb") as file:
        os.fsync(file.fileno())
    if last.is_file():
        os.replace(last, previous_of(last))
    os.replace(new, last)


def remove_checkpoints(last: Path) -> None:
    """Remove both checkpoints, once the weights are safe."""
    last.unlink(missing_ok=True)
    previous_of(last).unlink(missing_ok=True)


def find_checkpoint(last: Path, *, num_batches: int, made_of: str, is_main: bool) -> Path | None:
    """Return the newest whole checkpoint of a training, None when there is none.

    Args:
        is_main: whether this process sets the damaged ones aside and reports them; every process
            finds the same one, whether or not that was done already.

    Raises:
        ValueError: when the checkpoint is of another training, with what to do.
    """
    damaged = []
    found = None
    for path in (last, previous_of(last)):
        if not os.path.lexists(path):
            continue
        fault, state = read_state(path)
        if not fault:
            require_same_training(path, state, num_batches=num_batches, made_of=made_of)
            found = path
            break
        damaged.append((path, fault))
    if is_main:
        goes_on = f"goes on from {found.name}" if found else "starts from the beginning"
        for path, fault in damaged:
            aside = rename_damaged(path)
            warn_once(f"{path}: damaged ({fault}), renamed {aside.name}; the training {goes_on}")
    return found


def read_state(path: Path) -> tuple[str, dict[str, Any]]:
    """Return what is wrong with a checkpoint, empty if nothing, and what its training was."""
    try:
        with zipfile.ZipFile(path) as content:
            # Reads every byte once and compares checksums.
            member = content.testzip()
        if member is not None:
            return f"wrong checksum of {member}", {}
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        words = " ".join(str(error).split())[:80] or type(error).__name__
        return f"no whole checkpoint: {words}", {}
    if not isinstance(held, Mapping):
        return f"expected a mapping, got {type(held).__name__}", {}
    for part in CHECKPOINT_PARTS:
        if part not in held:
            return f"it lacks {part}", {}
    callbacks = held["callbacks"]
    state = callbacks.get(STATE) if isinstance(callbacks, Mapping) else None
    if not isinstance(state, Mapping) or not {"num_batches", "made_of"} <= set(state):
        return f"it lacks the state of {STATE}", {}
    return "", dict(state)


def require_same_training(
    path: Path, state: Mapping[str, Any], *, num_batches: int, made_of: str
) -> None:
    """Raise ``ValueError`` for a checkpoint of a training with other batches or other data."""
    if state["num_batches"] != num_batches:
        raise ValueError(
            f"{path}: was written by a training of {state['num_batches']} batches, "
            f"this one has {num_batches}; give the same --micro-batch-size, --devices "
            f"and --num-nodes, or delete it to start anew"
        )
    if state["made_of"] != made_of:
        raise ValueError(
            f"{path}: was written with other data, tokenizer or VQ-GAN; delete it to start anew"
        )
