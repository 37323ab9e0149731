"""Weights that runs share: trained by the first run that needs them, in the cache."""

import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from rudolph.execution import Execution, is_main_process
from rudolph.fitting import CURVES
from rudolph.results.journal import exclusive

WEIGHTS = "weights.safetensors"
# In a run's folder, the folders of the cache that it took from, a line each.
TAKEN = "shared.txt"
DAY = 24 * 3600


def shared_weights(execution: Execution, name: str, train: Callable[[Path], None]) -> Path:
    """The weights in the folder ``name`` of the cache; where they are not yet, ``train(weights)``.

    Runs that need them at once wait for the one that trains.  Its curves are those of all of them.

    Args:
        name: of what is trained and the digest of all that decides it.
    """
    folder = execution.folders.cache / name
    weights = folder / WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    # The other processes of a multi-device run train with the one that holds the lock.
    lock = exclusive(folder / "training.lock", DAY) if is_main_process() else nullcontext()
    taken = execution.folder / TAKEN
    known = taken.read_text().split() if taken.is_file() else []
    with ExitStack() as stack:
        # Another run's training is no overhead of this one.
        with execution.stage(f"waiting for {name.partition('-')[0]}"):
            stack.enter_context(lock)
        if not weights.is_file():
            train(weights)
        elif name not in known:
            replay_curves(execution, folder / CURVES)
    if is_main_process() and name not in known:
        taken.write_text("\n".join([*known, name]) + "\n")
    return weights


def replay_curves(execution: Execution, path: Path) -> None:
    """Record the curves of a stage that another run trained as this run's own."""
    for line in path.read_text().splitlines():
        step, values = json.loads(line)
        execution.tracker.log_metrics(values, step=step)
