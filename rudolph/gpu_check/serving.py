"""The process that runs parts: requests on stdin, messages on stdout, one line of JSON each.

A request is ``{"part": name, "seconds": budget}``.  The messages that answer it are rows, as they
are measured, and at last ``{"end": status}``.  A case that fails is a row with the error; its
traceback goes to standard error, and the next case follows.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from rudolph.gpu_check.rows import FAILED, OK, Case, UnavailableError

Cases = Callable[[], Iterator[Case]]
Say = Callable[[Mapping[str, Any]], None]
OUT_OF_TIME, OUT_OF_MEMORY, LOST = "out of time", "out of memory", "lost"


def serve(open_parts: Callable[[], Mapping[str, Cases]], environment: Mapping[str, Any]) -> None:
    """Say what the machine is, then run the parts that are asked for until stdin ends.

    Args:
        open_parts: called with the first request.
    """
    # What libraries print must not mix with the messages.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def say(message: Mapping[str, Any]) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        parts = cache(open_parts)
        say({"environment": dict(environment)})
        for request in map(json.loads, sys.stdin):
            cases = parts()[request["part"]]
            say({"end": run_part(cases, request["seconds"], say)})


def run_part(cases: Cases, seconds: float, say: Say) -> str:
    """Run the cases of a part until its time is over and return its status."""
    started, statuses = time.monotonic(), [OK]
    for case in cases():
        if time.monotonic() - started > seconds:
            return FAILED if FAILED in statuses else OUT_OF_TIME
        statuses += run_case(case, say)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return FAILED if FAILED in statuses else OK


def run_case(case: Case, say: Say) -> list[str]:
    """Run one case, say its rows, and return their statuses."""
    statuses = []

    def tell(quantity: str, value: float | None, status: str, **rest: Any) -> None:
        row = {"case": case.name, "quantity": quantity, "value": value, "status": status}
        say({"row": {**row, **rest}})
        statuses.append(status)

    try:
        for row in case.run():
            note = {"unit": row.unit, "limit": row.limit, "note": row.note}
            tell(row.quantity, row.value, row.status, **note)
    except UnavailableError as missing:
        tell("unavailable", None, str(missing))
    except torch.OutOfMemoryError as error:
        tell("error", None, OUT_OF_MEMORY, note=_one_line(error))
    except Exception as error:
        # Whatever goes wrong in a case is what the check was made to find.
        print(f"--- {case.name}", file=sys.stderr)
        traceback.print_exc()
        tell("error", None, FAILED, note=f"{type(error).__name__}: {_one_line(error)}")
        _require_device(say)
    return statuses


def _require_device(say: Say) -> None:
    """End this process when the device is lost: after some errors CUDA answers nothing more."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        say({"end": LOST})
        sys.exit(1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
