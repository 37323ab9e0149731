"""Weights that runs share: trained by the first run that needs them, in the cache."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from torch import nn

from rudolph.files.atomic import naming_file, rename_damaged, warn_once, write_text
from rudolph.models.weights import read_weights, weights_error
from rudolph.runs.execution import Execution, is_main_process
from rudolph.runs.trainer import CURVES
from rudolph.tracking.event_log import file_lock

SHARED_WEIGHTS = "weights.safetensors"
# In a run's folder, the folders of the cache that it took from, a line each.
TAKEN = "shared.txt"
DAY = 24 * 3600


def shared_weights(
    execution: Execution, name: str, model: nn.Module, train: Callable[[Path], None]
) -> Path:
    """Give ``model`` the weights in the folder ``name`` of the cache; return their path.

    Where they are not yet, or damaged, ``train(weights)`` makes them.  Runs that need them at once
    wait for the one that trains.  Its curves are those of all of them.

    Args:
        name: of what is trained and the digest of all that decides it.
    """
    folder = execution.folders.cache / name
    weights = folder / SHARED_WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    # The other processes of a multi-device run train with the one that holds the lock.
    lock = file_lock(folder / "training.lock", DAY) if is_main_process() else nullcontext()
    taken = execution.folder / TAKEN
    known = taken.read_text("utf-8", errors="replace").split() if taken.is_file() else []
    with ExitStack() as stack:
        # Another run's training is no overhead of this one.
        with execution.stage(f"waiting for {name.partition('-')[0]}"):
            stack.enter_context(lock)
        if not are_whole(weights, model):
            if is_main_process():
                checksum_of(weights).unlink(missing_ok=True)
            train(weights)
            if is_main_process():
                write_text(checksum_of(weights), sha256_of(weights) + "\n")
        elif name not in known:
            replay_curves(execution, folder / CURVES)
    if is_main_process() and name not in known:
        write_text(taken, "\n".join([*known, name]) + "\n")
    model.load_state_dict(read_weights(weights))
    return weights


def are_whole(weights: Path, model: nn.Module) -> bool:
    """Return whether weights in the cache are there and whole; damaged ones are set aside."""
    if not os.path.lexists(weights):
        return False
    fault = weights_error(weights, model) or checksum_fault(weights)
    if fault and is_main_process():
        with suppress(FileNotFoundError):
            aside = rename_damaged(weights)
            warn_once(f"{weights}: damaged ({fault}), renamed {aside.name}; it is trained again")
    return not fault


def checksum_of(weights: Path) -> Path:
    """Return where the SHA-256 of weights in the cache is noted."""
    return weights.with_suffix(".sha256")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with naming_file(path), path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def checksum_fault(weights: Path) -> str:
    """Return that weights differ from their checksum, empty if not or if none is noted."""
    noted = checksum_of(weights)
    text = noted.read_text("utf-8", errors="replace").strip() if noted.is_file() else ""
    is_known = re.fullmatch(r"[0-9a-f]{64}", text) is not None
    return "its SHA-256 is another" if is_known and sha256_of(weights) != text else ""


def replay_curves(execution: Execution, path: Path) -> None:
    """Record the curves of a stage that another run trained as this run's own.

    Lines that cannot be read are left out, which is said.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        warn_once(
            f"{path}: {str(error.strerror).lower()}; the curves of its training are left out"
        )
        return
    num_damaged = 0
    for line in lines:
        try:
            step, values = json.loads(line)
            values = {str(name): float(value) for name, value in values.items()}
            execution.tracker.log_metrics(values, step=int(step))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            num_damaged += 1
    if num_damaged or not lines:
        warn_once(
            f"{path}: damaged, {num_damaged} of {len(lines)} lines are left out; to have whole "
            f"curves delete {path.parent} and run its experiments again"
        )
