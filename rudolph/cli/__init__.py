"""Command line of ``rudolph``: arguments, progress and messages.

Exit codes: 0 for success, 1 for a failed run, and 2 for a user error, which is printed as one
line.  After SIGTERM or SIGUSR1 the code is 75, for schedulers that requeue.

To add a command, write its parser and its function in a module of this package and name the parser
in ``COMMANDS``.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from rudolph.cli.data import add_data
from rudolph.cli.demo import add_demo
from rudolph.cli.experiments import add_run, add_show
from rudolph.cli.results import add_report_card, add_results
from rudolph.cli.sampling import add_caption, add_generate
from rudolph.cli.weights import add_weights
from rudolph.files.atomic import explain_os_error
from rudolph.runs.console import print_line, silence_libraries
from rudolph.runs.launcher import read_launch
from rudolph.sequence.texts import decode_argument
from rudolph.training.preemption import REQUEUE, PreemptedError

COMMANDS = (
    add_run,
    add_show,
    add_results,
    add_report_card,
    add_generate,
    add_caption,
    add_demo,
    add_weights,
    add_data,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    args, extra = parser.parse_known_args(arguments)
    # argparse does not assign positional arguments that follow a flag.
    if extra and not (hasattr(args, "settings") and all(map(is_setting, extra))):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.settings += extra
    for name in ("text", "question"):
        if isinstance(value := getattr(args, name, None), str):
            setattr(args, name, decode_argument(value))
    silence_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that a terminal cannot show, such as Cyrillic, must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        exit_code: int = args.command(args)
        sys.stdout.flush()
        return exit_code
    except BrokenPipeError:
        # The reader of the output, such as head, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print_line(f"rudolph: {explain_os_error(error)}")
        return 2
    except ValueError as error:
        print_line(f"rudolph: {error}")
        return 2
    except KeyboardInterrupt:
        print_line("rudolph: interrupted. Run the same command again to resume")
        return 130
    except PreemptedError as error:
        print_line(f"rudolph: ended by {error}. Run the same command again to resume")
        # Lightning kills the first process if one that it started ends with another code than 0.
        launch = read_launch()
        return 0 if launch.launcher == "lightning" and not launch.is_first else REQUEUE


def is_setting(argument: str) -> bool:
    """Return whether a command-line argument is ``key=value``."""
    return "=" in argument and not argument.startswith("-")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="rudolph", description="Train, evaluate and sample text-image-text transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser
