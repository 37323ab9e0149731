"""Random damage to files, as left by a crash, a full disk or a wrong copy."""

import os
import shutil
from pathlib import Path
from random import Random

# Random cases per fuzz test, off by default; ``FUZZ_CASES`` sets the number.
NUM_CASES = int(os.environ.get("FUZZ_CASES", "0"))
KINDS = ("truncated", "emptied", "overwritten", "noise", "swapped", "folder", "removed", "line")


def damage(path: Path, rng: Random, *, others: list[Path]) -> str:
    """Damage one file in a random way and return a description."""
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
    """Write bytes to a new file of that name, because a run and the cache share hard links."""
    path.unlink()
    path.write_bytes(content)


def copy_run(run: Path, target: Path) -> Path:
    """Copy the folder of a run."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("*.lock*"))
    return target


def files_of(folder: Path) -> list[Path]:
    """Return the files that a run has written below a folder, without locks."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if ".lock" not in path.name]
