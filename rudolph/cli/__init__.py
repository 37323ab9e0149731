"""The verbs of ``rudolph``: arguments, progress and messages, nothing else.

Exit code 0: done; 1: a run failed; 2: a mistake of the user, told in one line.

To add a verb, write its parser and its function in the module of its kind, and name the parser in
``VERBS``.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from rudolph.cli.data import add_data
from rudolph.cli.experiments import add_run, add_show
from rudolph.cli.results import add_report_card, add_results
from rudolph.cli.sampling import add_caption, add_generate
from rudolph.cli.weights import add_weights
from rudolph.files.atomic import explain_os_error
from rudolph.runs.console import print_line, silence_libraries
from rudolph.sequence.texts import decode_argument

VERBS = (
    add_run,
    add_show,
    add_results,
    add_report_card,
    add_generate,
    add_caption,
    add_weights,
    add_data,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    parser = build_parser()
    given, late = parser.parse_known_args(arguments)
    # argparse gives positional arguments that follow a flag to nobody.
    if late and not (hasattr(given, "settings") and all(map(is_setting, late))):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        given.settings += late
    for name in ("text", "question"):
        if isinstance(value := getattr(given, name, None), str):
            setattr(given, name, decode_argument(value))
    silence_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal cannot show, such as an answer in Cyrillic, must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = given.verb(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who read the output, such as head, has what it wanted; nothing more can be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print_line(f"rudolph: {explain_os_error(error)}")
        return 2
    except ValueError as error:
        print_line(f"rudolph: {error}")
        return 2
    except KeyboardInterrupt:
        print_line("rudolph: interrupted; the same command goes on from where it was")
        return 130


def is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rudolph", description="A laboratory for text-image-text transformers."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add in VERBS:
        add(verbs)
    return parser
