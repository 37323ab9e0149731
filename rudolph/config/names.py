"""Names of experiments and runs, made from paths and settings.

Each name is a folder, so it must be legal on every file system: short enough, and different from
all others in more than letter case.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rudolph.files.settings import ConfigError, setting_error, short_repr
from rudolph.reports.schema import REGION_PREFIX, TRIAL, format_cell_value, group_of

EXPERIMENTS = "experiments"
# Folders inside ``results/<experiment>`` that every export replaces.
RESERVED = frozenset({"samples", "profiles", "figures"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Table cells that pandas reads as missing values.
MISSING_WORDS = frozenset({"NA", "NULL", "NaN", "None", "nan", "null"})
# File names append a digest, or a sample's name and suffix, to the name of a run.
LONGEST = 160
LONGEST_VALUE = 60
DIGITS = 8


def experiment_name(path: Path) -> str:
    """Return the path of an experiment file below ``experiments/``, without its suffix.

    Outside ``experiments/``, the name is the path below the working directory.  Outside both, it
    is the file name alone.

    >>> experiment_name(Path("experiments/speed/decode.yaml"))
    'speed/decode'
    >>> experiment_name(Path("mine/decode.yaml"))
    'mine/decode'

    Raises:
        ConfigError: If the path names a reserved or hidden folder, or is too long.
    """
    parts = _parts_below(path)
    name = "/".join((*parts[:-1], Path(parts[-1]).stem))
    for part in name.split("/"):
        if part.startswith(".") or (part in RESERVED and "/" in name):
            legal = f"not {', '.join(sorted(RESERVED))} and not starting with a dot"
            raise ConfigError(f"{path}: expected a path of names {legal}, got {name!r}")
        if len(part.encode()) > LONGEST:
            raise ConfigError(
                f"{path}: expected names of at most {LONGEST} bytes, got {len(part.encode())}"
            )
    return name


def _parts_below(path: Path) -> tuple[str, ...]:
    """Return the parts of a path below ``experiments``, or below the working directory."""
    here = Path.cwd()
    # Keep a symlink in its folder; resolve it only if the working directory is a symlink.
    for candidate in (Path(os.path.abspath(path)), path.resolve()):
        if candidate.is_relative_to(here):
            parts = candidate.relative_to(here).parts
            break
    else:
        parts = path.resolve().parts
        if EXPERIMENTS not in parts[:-1]:
            return parts[-1:]
    if EXPERIMENTS not in parts[:-1]:
        return parts
    last = len(parts) - 1 - parts[:-1][::-1].index(EXPERIMENTS)
    return parts[last:]


def value_labels(path: Path, key: str, values: Sequence[Any]) -> list[str]:
    """Return the labels of grid values in run names.

    Long values, and values with the same label, get digits of their SHA-256.

    Raises:
        ConfigError: If tables would show two values as equal.
    """
    cells: dict[str, Any] = {}
    for value in values:
        text = _read_back(format_cell_value(json.loads(json.dumps(value, default=str))))
        if text in cells:
            rule = "values must differ in their first six digits, as in tables"
            raise setting_error(path, f"grid.{key}", rule, [cells[text], value])
        cells[text] = value
    labels = [re.sub(r"[^A-Za-z0-9_.=-]+", "_", str(value)) for value in values]
    folded = [label.casefold() for label in labels]
    return [
        _with_digits(label, value)
        if len(label) > LONGEST_VALUE or folded.count(label.casefold()) > 1
        else label
        for label, value in zip(labels, values, strict=True)
    ]


def _read_back(text: str) -> str:
    """Return a table cell as pandas reads it: empty, a rounded number or the text."""
    try:
        number = float(text)
    except ValueError:
        return "" if text in MISSING_WORDS else text
    return "" if number != number else f"{number:.6g}"


def _with_digits(label: str, value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    digits = hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
    return f"{label[: LONGEST_VALUE - DIGITS]}_{digits}"


def run_name(variant: str, labels: Mapping[str, str], seed: int) -> str:
    """Return the name of a run: its variant, the labels of its grid point, its seed."""
    points = [f"{key.rpartition('.')[2]}={label}" for key, label in labels.items()]
    return "-".join([*([variant] if variant else []), *points, f"seed{seed}"])


def require_variant(path: Path, variant: str, *, is_searched: bool) -> None:
    """Raise ``ConfigError`` for a variant name that cannot be part of a run name."""
    if not NAME.fullmatch(variant) or re.search(r"-seed\d+(-|$)", variant):
        rule = "names must be letters, digits, _ . - and no -seed0"
        raise setting_error(path, "variants", rule, variant)
    if variant in MISSING_WORDS:
        rule = f"names must not be {', '.join(sorted(MISSING_WORDS))}, empty cells of tables"
        raise setting_error(path, "variants", rule, variant)
    is_search_name = variant.casefold().startswith((TRIAL, REGION_PREFIX))
    if is_searched and is_search_name:
        rule = f"names must not start with {TRIAL} or {REGION_PREFIX} in a file with a search"
        raise setting_error(path, "variants", rule, variant)


def require_domains(path: Path, domains: Iterable[str]) -> None:
    """Raise ``ConfigError`` for a domain name that cannot be part of a run name."""
    known: dict[str, str] = {}
    for domain in domains:
        if not NAME.fullmatch(domain) or domain in MISSING_WORDS:
            rule = "names must be letters, digits, _ . - and no empty cell of tables"
            raise setting_error(path, "search.domains", rule, domain)
        if known.setdefault(domain.casefold(), domain) != domain:
            rule = "names must differ in more than case"
            raise setting_error(path, "search.domains", rule, [known[domain.casefold()], domain])


def require_own_names(path: Path, runs: Iterable[tuple[str, int]]) -> None:
    """Raise ``ConfigError`` for runs, given by name and seed, that would share a folder."""
    known: dict[str, str] = {}
    for name, seed in runs:
        group = group_of(name, seed) or name
        if len(name) > LONGEST:
            rule = f"run names must have at most {LONGEST} characters"
            raise ConfigError(f"{path}: {rule}, got {len(name)} in {short_repr(group)}")
        if name.casefold() in known:
            rule = "run names must differ in more than letter case"
            both = f"{short_repr(known[name.casefold()])} and {short_repr(name)}"
            raise ConfigError(f"{path}: {rule}, got {both}")
        known[name.casefold()] = name
