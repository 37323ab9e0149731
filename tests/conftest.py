"""Settings and fixtures of all tests: one thread, golden data and a finished run."""

import json
import logging
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Also for the processes that tests start.  On cores that other tests use, threads that wait for
# each other take ten times as long to sample an image.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

PARITY = Path(__file__).parent / "parity"

# These tests multiply small matrices: a second thread costs more than it computes.
torch.set_num_threads(1)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class ParityCase:
    """A case of the reference implementations, from the list in ``parity/README.md``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Return the state dict under the reference's key names."""
        return self._load("weights.safetensors")

    @cached_property
    def io(self) -> dict[str, Tensor]:
        """Return inputs and outputs by name."""
        return self._load("io.safetensors")

    def _load(self, name: str) -> dict[str, Tensor]:
        # These files store booleans as uint8, and nothing else.
        tensors = load_file(self.folder / name)
        return {
            key: value.bool() if value.dtype == torch.uint8 else value
            for key, value in tensors.items()
        }


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name sets in sorted order, so that all test processes use the same names."""
    return repr(sorted(val)) if isinstance(val, set | frozenset) else None


@pytest.fixture(scope="session")
def parity() -> Callable[[str], ParityCase]:
    """Return a loader: ``parity("rudolph_350m_like")`` has ``config``, ``weights`` and ``io``."""
    return lambda case: ParityCase(PARITY / case)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of the smallest experiment."""
    from tiny_run import run_tiny

    return run_tiny(tmp_path_factory.mktemp("finished"))
