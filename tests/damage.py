"""Random damage to files: what a crash, a full disk or a wrong copy leaves."""

import os
import shutil
from pathlib import Path
from random import Random

# How many random cases a fuzz test tries; more are asked for by hand.
NUM_CASES = int(os.environ.get("FUZZ_CASES", "0"))
KINDS = ("truncated", "emptied", "overwritten", "noise", "swapped", "folder", "removed", "line")


def damage(path: Path, rng: Random, *, others: list[Path]) -> str:
    """Damage one file in a random way; return what was done."""
    kind = rng.choice(KINDS)
    content = path.read_bytes()
    if kind == "truncated":
        replace(path, content[: rng.randrange(len(content) + 1)])
    elif kind == "emptied":
        replace(path, b"")
    elif kind == "overwritten" and content:
        start = rng.randrange(len(content))
        garbage = rng.randbytes(rng.randrange(1, 60))
        replace(path, content[:start] + garbage + content[start + len(garbage) :])
    elif kind == "noise":
        replace(path, rng.randbytes(rng.randrange(200)))
    elif kind == "swapped":
        replace(path, rng.choice(others).read_bytes())
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "removed":
        path.unlink()
    elif kind == "line":
        lines = content.splitlines(keepends=True)
        rng.shuffle(lines)
        replace(path, b"".join(lines[: rng.randrange(len(lines) + 1)]))
    return f"{path.name} {kind}"


def replace(path: Path, content: bytes) -> None:
    """Write bytes to a new file of that name: files of a run and a cache may be one file."""
    path.unlink()
    path.write_bytes(content)


def copy_run(run: Path, target: Path) -> Path:
    """Copy the folder of a run to another place."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("*.lock*"))
    return target


def files_of(folder: Path) -> list[Path]:
    """Return the files below a folder that a run has written, locks left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if ".lock" not in path.name]
