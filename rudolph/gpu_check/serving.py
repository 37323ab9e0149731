"""Protocol of the worker process: requests on stdin, messages on stdout, one line of JSON each.

A request is ``{"part": name, "seconds": budget}``. The worker answers with one message per row as
it is measured, and finally ``{"end": status}``. A failed case yields a row with the error and
prints its traceback to standard error; then the next case runs.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from rudolph.files.atomic import json_text
from rudolph.gpu_check.rows import FAILED, OK, Case, UnavailableError

Cases = Callable[[], Iterator[Case]]
OUT_OF_TIME, OUT_OF_MEMORY, LOST = "out of time", "out of memory", "lost"


def do_nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Server:
    """A server that runs the cases of parts and sends their rows.

    Attributes:
        send: Sends one message.
        memory_errors: Exceptions that are reported as out of memory rather than as a failure.
        release: Called after each case; a ``RuntimeError`` means that the device is lost.
    """

    send: Callable[[Mapping[str, Any]], None]
    memory_errors: tuple[type[Exception], ...] = (MemoryError,)
    release: Callable[[], None] = do_nothing

    def run_part(self, cases: Cases, seconds: float) -> str:
        """Run the cases of a part until its time is over, and return its status."""
        started, statuses = time.monotonic(), [OK]
        for case in cases():
            if time.monotonic() - started > seconds:
                return FAILED if FAILED in statuses else OUT_OF_TIME
            statuses += self.run_case(case)
            try:
                self.release()
            except RuntimeError:
                traceback.print_exc()
                return LOST
        return FAILED if FAILED in statuses else OK

    def run_case(self, case: Case) -> list[str]:
        """Run one case, send its rows, and return their statuses."""
        statuses = []

        def send_row(quantity: str, value: float | None, status: str, **fields: Any) -> None:
            row = {"case": case.name, "quantity": quantity, "value": value, "status": status}
            self.send({"row": {**row, **fields}})
            statuses.append(status)

        try:
            for row in case.run():
                fields = {"unit": row.unit, "limit": row.limit, "note": row.note}
                send_row(row.quantity, row.value, row.status, **fields)
        except UnavailableError as reason:
            send_row("unavailable", None, str(reason))
        except self.memory_errors as error:
            send_row("error", None, OUT_OF_MEMORY, note=_one_line(error))
        except Exception as error:
            # The check exists to find errors of any kind in a case.
            print(f"--- {case.name}", file=sys.stderr)
            traceback.print_exc()
            send_row("error", None, FAILED, note=f"{type(error).__name__}: {_one_line(error)}")
        return statuses


def serve_parts(
    open_parts: Callable[[], Mapping[str, Cases]], environment: Mapping[str, Any], **settings: Any
) -> None:
    """Send the environment, then run the requested parts until stdin ends.

    Args:
        open_parts: Returns the parts keyed by name; called once, at the first request.
        environment: The machine and package versions to send.
        **settings: Fields of ``Server`` other than ``send``.
    """
    # Libraries print to standard output, which must hold messages only.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def send(message: Mapping[str, Any]) -> None:
            channel.write(json_text(message) + "\n")
            channel.flush()

        server, parts = Server(send, **settings), cache(open_parts)
        send({"environment": dict(environment)})
        for request in map(json.loads, sys.stdin):
            status = server.run_part(parts()[request["part"]], request["seconds"])
            send({"end": status})
            if status == LOST:
                # After some errors CUDA is unusable for the rest of the process.
                return


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
