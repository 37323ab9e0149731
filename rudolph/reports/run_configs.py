"""The configurations of an experiment's runs: one base in full, and one line per run.

config.yaml      the resolved configuration of the first run, every default written out
configs.jsonl    per run: its name, its digest, and its differences from ``config.yaml``
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rudolph.files.atomic import DamagedFileError, json_text, write_text
from rudolph.files.settings import dump_yaml, read_yaml

BASE_CONFIG, CONFIG_LINES = "config.yaml", "configs.jsonl"


def write_configs(folder: Path, configs: Mapping[str, Path], digests: Mapping[str, str]) -> None:
    """Write both files from the ``config.yaml`` of each run; runs are sorted by name.

    Args:
        folder: results folder of the experiment.
        configs: paths of the configuration files, keyed by run name.
        digests: digests of the configurations, keyed by run name.
    """
    names = sorted(configs)
    contents = {name: read_yaml(configs[name]) for name in names}
    base = contents[names[0]]
    lines = []
    for name in names:
        changed, unset = difference(base, contents[name])
        line: dict[str, Any] = {"run": name, "digest": digests[name], "settings": changed}
        lines.append(json_text(line | ({"unset": unset} if unset else {})))
    write_text(folder / BASE_CONFIG, dump_yaml(base))
    write_text(folder / CONFIG_LINES, "\n".join(lines) + "\n")


def read_configs(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, digest and resolved configuration of each run of a results folder.

    Raises:
        DamagedFileError: if a line is not as ``write_configs`` writes it.
    """
    base = read_yaml(folder / BASE_CONFIG)
    for number, text in enumerate(
        (folder / CONFIG_LINES).read_text("utf-8").splitlines(), start=1
    ):
        try:
            line = json.loads(text)
            name, digest, changed = line["run"], line["digest"], line["settings"]
            content = merged(base, changed, line.get("unset", []))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(folder / CONFIG_LINES, f"line {number}: {error}") from error
        yield name, digest, content


def difference(
    base: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[dict[str, Any], list[list[str]]]:
    """Return the nested settings that differ in ``other``, and the paths that it lacks.

    >>> difference({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5}})
    ({'b': {'c': 5}}, [['b', 'd']])
    """
    changed: dict[str, Any] = {}
    unset = [[key] for key in base if key not in other]
    for key, value in other.items():
        if key not in base:
            changed[key] = value
        elif isinstance(value, Mapping) and isinstance(base[key], Mapping):
            inner, missing = difference(base[key], value)
            changed |= {key: inner} if inner else {}
            unset += [[key, *path] for path in missing]
        elif value != base[key] or type(value) is not type(base[key]):
            changed[key] = value
    return changed, unset


def merged(
    base: Mapping[str, Any], changed: Mapping[str, Any], unset: list[list[str]]
) -> dict[str, Any]:
    """Return the configuration whose ``difference`` from ``base`` is given."""
    content = dict(base)
    for key, value in changed.items():
        is_nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        content[key] = merged(base[key], value, []) if is_nested else value
    for path in unset:
        inner = content
        for key in path[:-1]:
            inner[key] = dict(inner[key])
            inner = inner[key]
        del inner[path[-1]]
    return content
