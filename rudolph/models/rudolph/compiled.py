"""What torch compiles: the layers of a decoder, in training and for single steps of a decoding.

Beside the reading of the weights, the many small operations of a token take a third of its time
when they are called one by one; compiled, what a layer does between its products is a few loops
of C++.
"""

from functools import cache
from typing import Any

import torch


@cache
def compile_function(function: Any) -> Any:
    """A function compiled for the shapes that it gets, for each anew."""
    # Loops over one position are too short to be shared among threads.
    return torch.compile(function, dynamic=False, options={"cpp.min_chunk_size": 4096})


@cache
def check_compiler(device: str) -> None:
    """Compile something small for a device, as ``cpu``.

    Raises:
        ValueError: where torch cannot compile.
    """
    try:
        compile_function(torch.exp)(torch.ones(3, device=device))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        needed = "a C++ compiler" if device == "cpu" else "Triton"
        raise ValueError(f"compiling needs {needed} that torch finds: {reason}") from error
