"""Makes the environment of this repository, and does nothing where it is made already.

Standard library only.  Environment variables, all optional:
    PYTHON  the interpreter to make it from; by default python3, python3.12 or python3.11
    VENV    where it lies, .venv by default; an activated environment does as well
    TORCH   the torch to install, such as torch==2.11.0; by default the one that is there, else
            torch==2.13.0
    EXTRAS  extras of pyproject.toml, by default test,notebook
    NO_UV   1 installs with pip alone
"""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.path.abspath(os.environ.get("VENV") or ROOT / ".venv"))
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".rudolph-setup"
NAMED = os.environ.get("PYTHON") or "python3"
TORCH = os.environ.get("TORCH") or ""
EXTRAS = os.environ.get("EXTRAS") or "test,notebook"
SUPPORTED = ("3.12", "3.11")
HELD_TORCH = "import importlib.metadata as m; print(m.version('torch'))"
# A virtual environment hands on the packages of its base, never its own.
BASE_TORCH = HELD_TORCH + "; import sys; assert sys.prefix == sys.base_prefix"
NOT_INSTALLED = "the lines above say what is missing; is the package index within reach?"
NOT_BUILT = "youtokentome needs a C++ compiler and Python.h: apt-get install g++ python3-dev"
NO_PIP = "there is no pip to begin with: apt-get install python3-venv"


def stop(reason: str) -> None:
    sys.exit(f"set-up stopped: {reason}")


def run(command: list, otherwise: str, **environment: str) -> None:
    """Run a command that must succeed; ``otherwise`` is what the user reads if it does not."""
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode:
        stop(otherwise)


def answer(*command: object) -> str:
    """What a command prints; nothing if it fails or does not exist."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version_of(python: object) -> str:
    return answer(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")


def fingerprint() -> str:
    """Everything that decides what the environment holds, as one hash."""
    files = ["pyproject.toml", ".ci/constraints.txt", ".ci/bootstrap.py", VENV / "pyvenv.cfg"]
    texts = [(ROOT / name).read_text("utf-8") for name in files if (ROOT / name).exists()]
    return hashlib.sha256(repr([texts, str(ROOT), str(VENV), EXTRAS, TORCH]).encode()).hexdigest()


def make_environment() -> None:
    """Make VENV if it is not there, and see that it holds a supported Python and pip."""
    candidates = [sys.executable, *(f"python{version}" for version in SUPPORTED)]
    python = next((name for name in candidates if version_of(name) in SUPPORTED), None)
    if python is None:
        stop(f"{NAMED} is {version_of(sys.executable)}, but 3.11 or 3.12 is needed: PYTHON=...")
    if not PYTHON.exists():
        if VENV.exists() and any(VENV.iterdir()) and not (VENV / "pyvenv.cfg").exists():
            stop(f"{VENV} is no virtual environment: choose another VENV=...")
        print(f"set-up: {VENV} with {python}", flush=True)
        keep = ["--system-site-packages"] if not TORCH and answer(python, "-c", BASE_TORCH) else []
        run([python, "-m", "venv", "--clear", "--without-pip", *keep, VENV], NO_PIP)
    held = version_of(PYTHON)
    if held not in SUPPORTED or (NAMED != "python3" and held != version_of(python)):
        stop(f"{VENV} holds Python {held}: remove it, or choose another VENV=...")
    # Debian keeps ensurepip in a package of its own; any other pip then fills the environment.
    if not answer(PYTHON, "-m", "pip", "--version") and not answer(PYTHON, "-m", "ensurepip"):
        run([python, "-m", "pip", "--python", PYTHON, "install", "--quiet", "pip"], NO_PIP)


def uv_settings() -> tuple:
    """What pip is told about indexes, as options and environment of uv, which reads none of it."""
    told = {}
    lines = answer(PYTHON, "-m", "pip", "config", "list").splitlines()
    for section in ("global.", "install.", ":env:."):  # the later wins, as in pip
        for name, _, value in (line.partition("=") for line in lines if line.startswith(section)):
            told[name[len(section) :].replace("default-", "")] = ast.literal_eval(value).split()
    spelling = {
        "find-links": "--find-links",
        "index-url": "--default-index",
        "extra-index-url": "--index",
        "trusted-host": "--allow-insecure-host",
    }
    options = [f"{new}={value}" for old, new in spelling.items() for value in told.get(old, [])]
    if told.get("no-index", ["0"])[0].lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    variables = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "timeout": "UV_HTTP_TIMEOUT"}
    environment = {new: told[old][0] for old, new in variables.items() if told.get(old)}
    # pip takes the best version of all indexes; uv by itself the first index with the name.
    return [*options, "--index-strategy=unsafe-best-match"], environment


def install() -> None:
    torch = TORCH or "torch==" + (answer(PYTHON, "-c", HELD_TORCH) or "2.13.0")
    command, environment = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"], {}
    # uv does not see packages of the base interpreter and would install a second torch.
    settings = VENV / "pyvenv.cfg"
    shared = settings.exists() and "site-packages = true" in settings.read_text("utf-8")
    if not shared and os.environ.get("NO_UV", "0") in ("", "0"):
        answer(*command, "uv")
        if answer(PYTHON, "-m", "uv", "--version"):
            options, environment = uv_settings()
            command = [PYTHON, "-m", "uv", "pip", "install", f"--python={PYTHON}", *options]
    if not sys.stderr.isatty():
        command.append("--quiet")
    constraints = ["--no-build-isolation", "-c", ROOT / ".ci" / "constraints.txt"]
    print("set-up: build tools and youtokentome", flush=True)
    run([*command, "setuptools>=77", "wheel", "cython"], NOT_INSTALLED, **environment)
    # gcc 13 and later no longer bring in <cstdint> unasked.
    flags = "-include cstdint " + os.environ.get("CFLAGS", "")
    run([*command, *constraints, "youtokentome"], NOT_BUILT, CFLAGS=flags, **environment)
    print(f"set-up: {torch} and the rest", flush=True)
    run([*command, *constraints, torch, "-e", f".[{EXTRAS}]"], NOT_INSTALLED, **environment)


def main() -> None:
    made = PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()
    if made and (NAMED == "python3" or version_of(PYTHON) == version_of(sys.executable)):
        return
    make_environment()
    STAMP.unlink(missing_ok=True)
    install()
    STAMP.write_text(fingerprint())


if __name__ == "__main__":
    main()
