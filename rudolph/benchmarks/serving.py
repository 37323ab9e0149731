"""An implementation's side of the talk: one JSON line is asked, one is answered, until input ends.

Nothing of the project is imported here: the reference's process, in which ``rudolph`` is another
package, loads this file by its path.
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

# Read by the parent from the end of the log of a process that failed.
ServerAnswer = dict[str, Any]


class WorkResult(NamedTuple):
    """What one repetition did; ``seconds`` None are those that the clock says around it."""

    units: int
    seconds: float | None = None


class Implementation(Protocol):
    """One way of doing the work; ``weights_bytes`` are those of all its tensors."""

    weights_bytes: int
    versions: dict[str, str]

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """One repetition; a short one only warms up."""
        ...

    def cache_bytes(self) -> int:
        """What the keys and values of the last repetition took; 0 where there are none."""
        ...

    def check(self, path: Path) -> None:
        """Write what the model says of the fixed inputs."""
        ...


def serve_implementation(make: Callable[[Mapping[str, Any]], Implementation]) -> None:
    """Read what to be, become it, and answer requests.

    Requests are ``run`` (``part``, ``is_short``), ``check`` (``path``) and ``profile``
    (``part``).
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print goes to the log and never into an answer.
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    started = time.perf_counter()
    implementation = make(asked)
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
    """Each operation's own time, without those that it calls, longest first."""
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
    """The most memory that this process has held since its start, or since ``restart_peak``."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def restart_peak() -> None:
    """Count the peak from now on, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return


def tensor_bytes(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    found = {}
    for tensor in tensors:
        if tensor.is_mkldnn:
            # Opaque to torch: no storage, but a size.
            found[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
