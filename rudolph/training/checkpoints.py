"""Resume checkpoints on disk: two generations, verified before use.

``last.ckpt`` is the newest checkpoint, and ``previous.ckpt`` is the one before it.  A damaged
checkpoint is renamed, and the other one is used.  Without an intact checkpoint, training starts
over and reproduces the same bits.
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

# Lightning's key for the state of the callback that writes the checkpoints.
STATE = "ResumeCheckpoint"
CHECKPOINT_PARTS = ("state_dict", "optimizer_states", "loops", "callbacks")
# zipfile and torch's unpickler raise these on a truncated, overwritten or foreign file.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, EOFError, OSError),
    *(RuntimeError, LookupError, ValueError, AttributeError, TypeError, AssertionError),
    *(ArithmeticError, MemoryError),
)


def previous_of(last: Path) -> Path:
    """Return the path of the checkpoint before ``last``."""
    return last.with_name("previous.ckpt")


def rotate_checkpoints(new: Path, last: Path) -> None:
    """Rename a complete checkpoint to ``last``; the old ``last`` becomes ``previous.ckpt``."""
    # Sync the content before renaming, so that a power cut cannot leave a name without content.
    with new.open("rb") as file:
        os.fsync(file.fileno())
    if last.is_file():
        os.replace(last, previous_of(last))
    os.replace(new, last)


def remove_checkpoints(last: Path) -> None:
    """Remove both checkpoints, once the weights are saved."""
    last.unlink(missing_ok=True)
    previous_of(last).unlink(missing_ok=True)


def find_checkpoint(
    last: Path, *, num_steps: int, digest: str, is_main: bool, is_sharded: bool = False
) -> Path | None:
    """Return the newest intact checkpoint of a training run, or None.

    Args:
        last: the path of ``last.ckpt``.
        num_steps: the number of steps of this training.
        digest: digest of the training's data, tokenizer and VQ-GAN.
        is_sharded: whether the training shards its optimizer states.
        is_main: whether this process renames and reports damaged checkpoints.  Every process finds
            the same checkpoint, before and after the renaming.

    Raises:
        ValueError: if the checkpoint belongs to another training; the message includes the remedy.
    """
    damaged = []
    intact = None
    for path in (last, previous_of(last)):
        if not os.path.lexists(path):
            continue
        error, state = read_state(path)
        if not error:
            require_same_training(
                path, state, num_steps=num_steps, digest=digest, is_sharded=is_sharded
            )
            intact = path
            break
        damaged.append((path, error))
    if is_main:
        start = intact.name if intact else "the beginning"
        for path, error in damaged:
            renamed = rename_damaged(path)
            warn_once(
                f"{path}: damaged ({error}), renamed {renamed.name}. Training starts from {start}"
            )
    return intact


def read_state(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a checkpoint's error, or "" if it is intact, and the state of its training."""
    try:
        with zipfile.ZipFile(path) as archive:
            # This reads every byte once and compares checksums.
            member = archive.testzip()
        if member is not None:
            return f"wrong checksum of {member}", {}
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        message = " ".join(str(error).split())[:80] or type(error).__name__
        return f"not a complete checkpoint: {message}", {}
    if not isinstance(content, Mapping):
        return f"expected a mapping, got {type(content).__name__}", {}
    for part in CHECKPOINT_PARTS:
        if part not in content:
            return f"{part} is missing", {}
    callbacks = content["callbacks"]
    state = callbacks.get(STATE) if isinstance(callbacks, Mapping) else None
    if not isinstance(state, Mapping) or not {"num_steps", "made_of"} <= set(state):
        return f"the state of {STATE} is missing", {}
    return "", dict(state)


def require_same_training(
    path: Path,
    state: Mapping[str, Any],
    *,
    num_steps: int,
    digest: str,
    is_sharded: bool = False,
) -> None:
    """Raise ``ValueError`` if a checkpoint does not fit a training.

    The checkpoint must have the same number of steps and the same data.  A sharded training
    resumes only from a sharded checkpoint, which stores optimizer states by parameter name.
    """
    if state["num_steps"] != num_steps:
        raise ValueError(
            f"{path}: expected a checkpoint of a training of {num_steps} steps, "
            f"got {state['num_steps']}. Delete it to train from the beginning"
        )
    if state["made_of"] != digest:
        raise ValueError(
            f"{path}: written with other data, another tokenizer or another VQ-GAN. "
            "Delete it to train from the beginning"
        )
    if is_sharded and not state.get("is_sharded"):
        raise ValueError(
            f"{path}: written without --strategy fsdp2. Continue without it, or delete the "
            "checkpoint to train from the beginning"
        )
