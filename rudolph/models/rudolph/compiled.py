"""Compilation of decoder layers with ``torch.compile``, for training and single decoding steps.

Besides reading the weights, a decoding step runs many small operations.  Called one by one, these
operations take a third of the step's time.  Compilation turns all operations between two matrix
products into a few C++ loops.
"""

from functools import cache
from typing import Any

import torch


@cache
def compile_function(function: Any) -> Any:
    """Return a compiled function that recompiles for every new input shape."""
    # A loop over a single position is too short to split across threads.
    return torch.compile(function, dynamic=False, options={"cpp.min_chunk_size": 4096})


@cache
def check_compiler(device: str) -> None:
    """Compile a small function to check that ``torch.compile`` works on a device such as ``cpu``.

    Raises:
        ValueError: if torch cannot compile for the device.
    """
    try:
        compile_function(torch.exp)(torch.ones(3, device=device))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        needed = "a C++ compiler" if device == "cpu" else "Triton"
        raise ValueError(f"compiling needs {needed} that torch finds: {reason}") from error
