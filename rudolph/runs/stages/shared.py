"""Cached weights that runs share, trained by the first run that needs them."""

import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from torch import nn

from rudolph.files.atomic import file_sha256, rename_damaged, warn_once, write_text
from rudolph.models.weights import read_weights, weights_error
from rudolph.runs.execution import Execution
from rudolph.runs.trainer import CURVES
from rudolph.tracking.event_log import file_lock

SHARED_WEIGHTS = "weights.safetensors"
DAY = 24 * 3600


def shared_weights(
    execution: Execution, name: str, model: nn.Module, train: Callable[[Path], None]
) -> Path:
    """Load shared weights from the cache into ``model`` and return their path.

    Missing or damaged weights are trained first.  Other runs that need the weights wait for that
    training; then each of these runs also logs the curves of that training.

    Args:
        execution: The run.
        name: Name of the cache folder: the stage and the digest of everything that determines it.
        model: Receives the weights.
        train: Trains and writes the weights at a path.
    """
    folder = execution.folders.cache / name
    weights = folder / SHARED_WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    # In a multi-device run, only the main process takes the lock; the others train along.
    lock = file_lock(folder / "training.lock", DAY) if execution.is_main_process else nullcontext()
    shared = execution.directory.shared
    known_names = shared.read_text("utf-8", errors="replace").split() if shared.is_file() else []
    with ExitStack() as stack:
        # Waiting for another run's training must not count as overhead of this one.
        with execution.stage(f"waiting for {name.partition('-')[0]}"):
            stack.enter_context(lock)
        if not are_intact(weights, model, is_main=execution.is_main_process):
            if execution.is_main_process:
                checksum_of(weights).unlink(missing_ok=True)
            train(weights)
            if execution.is_main_process:
                write_text(checksum_of(weights), file_sha256(weights) + "\n")
        elif name not in known_names:
            replay_curves(execution, folder / CURVES)
    if execution.is_main_process and name not in known_names:
        write_text(shared, "\n".join([*known_names, name]) + "\n")
    model.load_state_dict(read_weights(weights))
    return weights


def are_intact(weights: Path, model: nn.Module, *, is_main: bool = True) -> bool:
    """Return whether cached weights are intact; the main process renames damaged ones."""
    if not os.path.lexists(weights):
        return False
    fault = weights_error(weights, model) or checksum_error(weights)
    if fault and is_main:
        with suppress(FileNotFoundError):
            renamed = rename_damaged(weights)
            warn_once(f"{weights}: damaged ({fault}), renamed {renamed.name}; training again")
    return not fault


def checksum_of(weights: Path) -> Path:
    """Return the path of the file with the SHA-256 of cached weights."""
    return weights.with_suffix(".sha256")


def checksum_error(weights: Path) -> str:
    """Return an error message if weights differ from their recorded checksum, else ""."""
    path = checksum_of(weights)
    text = path.read_text("utf-8", errors="replace").strip() if path.is_file() else ""
    is_digest = re.fullmatch(r"[0-9a-f]{64}", text) is not None
    return "its SHA-256 differs" if is_digest and file_sha256(weights) != text else ""


def replay_curves(execution: Execution, path: Path) -> None:
    """Log the curves of a stage that another run trained.

    Unreadable lines are left out with a warning.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        warn_once(f"{path}: {str(error.strerror).lower()}; the training curves are left out")
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
            f"{path}: damaged, {num_damaged} of {len(lines)} lines are left out. For complete "
            f"curves delete {path.parent} and run its experiments again"
        )
