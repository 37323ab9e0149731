"""Command line of the GPU check: ``python -m rudolph.gpu_check``, or ``make gpu-check``.

It needs few of the package's dependencies: torch, Lightning, torchmetrics, NumPy, pandas, PyYAML,
Pillow and safetensors.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from rudolph.gpu_check.plan import PLAN
from rudolph.gpu_check.runner import ENVIRONMENT_FILE, PART_NAMES, ROOT, Check, worker_command


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rudolph.gpu_check",
        description="Check and measure the package on one GPU; finished parts are skipped.",
    )
    parser.add_argument("--out", type=Path, help="results go here [$OUT or results/speed/gpu]")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts [8]")
    parser.add_argument("--parts", help=f"some of {','.join(PLAN)} [all]")
    parser.add_argument("--again", action="store_true", help="repeat finished parts")
    parser.add_argument("--smoke", action="store_true", help="smallest sizes, on the CPU")
    parser.add_argument("--commit", help="recorded with the results [git rev-parse HEAD]")
    return parser


def commit_here() -> str:
    """Return the commit of the checkout, or "unknown" without git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    """Run the check and return its exit code: 1 if a part failed, else 0.

    Raises:
        ValueError: If an option is invalid.
    """
    args = arguments().parse_args()
    names = args.parts.split(",") if args.parts else list(PLAN)
    unknown = [name for name in names if name not in PLAN]
    if unknown:
        names_of_parts = ", ".join(PLAN)
        raise ValueError(
            f"--parts: expected some of {names_of_parts}, got {unknown[0]!r}. Change the name"
        )
    if not args.minutes > 0:
        raise ValueError(
            f"--minutes: expected a number above 0, got {args.minutes:g}. Give more time"
        )
    sizes = "smoke" if args.smoke else "full"
    folder = args.out or Path(os.environ.get("OUT") or "results/speed/gpu")
    if args.smoke and args.out is None:
        raise ValueError("--out: expected a folder with --smoke, got none. Name one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {folder}. Name another")
    if (folder / ENVIRONMENT_FILE).exists() and not (folder / PART_NAMES).exists():
        raise ValueError(
            f"--out: expected a new folder or one of an earlier check, got {folder} with "
            f"{ENVIRONMENT_FILE} and no {PART_NAMES}. Name another"
        )
    # The time budgets assume a GPU; a slow CPU core needs far longer.
    plan = {name: replace(part, seconds=1800.0) for name, part in PLAN.items()}
    check = Check(
        worker_command(sizes),
        folder,
        sizes,
        args.minutes,
        is_again=args.again,
        commit=args.commit or commit_here(),
        plan=plan if args.smoke else PLAN,
    )
    return check.run([name for name in PLAN if name in names])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
