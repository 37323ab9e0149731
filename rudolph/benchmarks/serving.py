"""Request loop of a worker process: one line of JSON per request and per answer.

This file imports nothing else from this project, because the reference's process also loads it, by
its path. In that process, ``rudolph`` is another package.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

# An answer, written to the parent as one line of JSON.
ServerAnswer = dict[str, Any]


class WorkResult(NamedTuple):
    """The work done in one repetition.

    Attributes:
        units: The number of units, such as tokens or images.
        seconds: The duration of the work; if None, the duration of the whole call counts.
    """

    units: int
    seconds: float | None = None


class Implementation(Protocol):
    """One implementation of a workload.

    Attributes:
        weights_bytes: Bytes of all its tensors.
        versions: Versions of the third-party packages that it uses.
    """

    weights_bytes: int
    versions: dict[str, str]

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Run one repetition of a part; a short one only warms up."""
        ...

    def cache_bytes(self) -> int:
        """Return the bytes of the last repetition's key/value cache, 0 if there is none."""
        ...

    def check(self, path: Path) -> None:
        """Write the model's outputs on the fixed inputs to ``path``."""
        ...


def serve_implementation(make: Callable[[Mapping[str, Any]], Implementation]) -> None:
    """Build an implementation and answer requests until input ends.

    The first line of input describes the implementation and its case. Each further line is a
    request: ``run`` (``part``, ``is_short``), ``check`` (``path``) or ``profile`` (``part``).

    Args:
        make: Builds the implementation from the first line, parsed from JSON.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Libraries print to standard output, which must hold answers only.
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    torch.manual_seed(setup["seed"])
    started = time.perf_counter()
    implementation = make(setup)
    ready = {
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
        "weights_bytes": implementation.weights_bytes,
        "versions": implementation.versions,
    }
    _answer(answers, ready)
    for line in sys.stdin:
        request = json.loads(line)
        _answer(answers, REQUESTS[request["do"]](implementation, request))


def _answer(answers: Any, content: ServerAnswer) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _run(implementation: Implementation, request: Mapping[str, Any]) -> ServerAnswer:
    gc.collect()
    restart_peak()
    started = time.perf_counter()
    work = implementation.run(request["part"], is_short=request["is_short"])
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds if work.seconds is None else work.seconds,
        "units": work.units,
        "peak_bytes": peak_bytes(),
        "cache_bytes": implementation.cache_bytes(),
    }


def _check(implementation: Implementation, request: Mapping[str, Any]) -> ServerAnswer:
    implementation.check(Path(request["path"]))
    return {}


def _profile(implementation: Implementation, request: Mapping[str, Any]) -> ServerAnswer:
    """Profile a short repetition; rows give each operation's self time, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        implementation.run(request["part"], is_short=True)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        (e.key, e.count, e.self_cpu_time_total / 1e3, e.self_cpu_time_total / total)
        for e in events
    ]
    return {"operations": rows}


REQUESTS = {"run": _run, "check": _check, "profile": _profile}


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes, since its start or ``restart_peak``."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def restart_peak() -> None:
    """Reset the peak memory, if the system supports it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return


def tensor_bytes(tensors: Any) -> int:
    """Return the bytes of tensors, counting each storage once."""
    bytes_of_storage = {}
    for tensor in tensors:
        if tensor.is_mkldnn:
            # Tensors in oneDNN's layout expose a size but no storage.
            bytes_of_storage[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            bytes_of_storage[storage.data_ptr()] = storage.nbytes()
    return sum(bytes_of_storage.values())
