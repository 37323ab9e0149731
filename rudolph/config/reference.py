"""The Markdown reference of all settings and metrics, generated from the code that uses them."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import islice
from typing import Any, get_args, get_type_hints

from rudolph.config.metrics import EVALUATOR_METRICS
from rudolph.config.run import RunConfig, to_plain
from rudolph.evaluation.report_card import NEEDS
from rudolph.files.constraints import constraint_of, one_of
from rudolph.files.settings import sections_of
from rudolph.reports.markdown import table_row

TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "text"}


def reference_parts() -> dict[str, str]:
    """Return the generated parts of ``experiments/README.md`` keyed by their markers' names."""
    return {"evaluators": evaluators_reference(), "settings": settings_reference()}


def settings_reference() -> str:
    """Return one table per section of a run: key, type with bounds, default and meaning."""
    lines: list[str] = []
    for title, kind, prefix in _sections(RunConfig, ""):
        rows = list(_rows(kind, prefix))
        if rows:
            head = ["key", "type", "default", "meaning"]
            lines += [f"### {title}", "", table_row(head), table_row(["---"] * len(head))]
            lines += [*map(table_row, rows), ""]
    return "\n".join(lines).strip()


def evaluators_reference() -> str:
    """Return a table of all evaluators: capability, metric, unit, direction and chance level."""
    head = ["evaluator", "needs", "metric", "unit", "better", "chance level"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for evaluator, metrics in EVALUATOR_METRICS.items():
        needs = ", ".join(f"`{name}`" for name in NEEDS[evaluator])
        if not metrics:
            lines.append(table_row([f"`{evaluator}`", needs, "by dataset", "", "", ""]))
        for metric in metrics:
            direction = "lower" if metric.is_lower_better else "higher"
            cells = [f"`{evaluator}`", needs, f"`{metric.name}`", metric.unit]
            lines.append(table_row([*cells, direction, metric.chance]))
    return "\n".join(lines)


def _sections(kind: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield title, class and key prefix of a configuration and of every section below it."""
    yield (f"`{prefix.rstrip('.')}`" if prefix else "The run"), kind, prefix
    hints = get_type_hints(kind)
    for field in fields(kind):
        members = sections_of(hints[field.name])
        for member in members:
            below = f"{prefix}{field.name}."
            if len(members) == 1:
                yield from _sections(member, below)
                continue
            tag = get_args(get_type_hints(member)["family"])[0]
            yield f"`{prefix}{field.name}` of family `{tag}`", member, below
            # The first one is the member itself.
            for title, inner, path in islice(_sections(member, below), 1, None):
                yield f"{title} of family `{tag}`", inner, path


def _rows(kind: Any, prefix: str) -> Iterator[list[str]]:
    hints = get_type_hints(kind, include_extras=True)
    meanings = _meanings(kind)
    for field in fields(kind):
        if sections_of(get_type_hints(kind)[field.name]):
            continue
        default = _default(field)
        yield [
            f"`{prefix}{field.name}`",
            _type_name(hints[field.name]),
            f"`{default}`" if default else "",
            meanings.get(field.name, ""),
        ]


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return ""
    plain = to_plain(value) if is_dataclass(value) else value
    text = {None: "null", True: "true", False: "false"}.get(plain) if _is_word(plain) else None
    if text is None:
        text = str(list(plain)) if isinstance(plain, tuple) else str(plain)
    return text.replace("'", "")


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _type_name(hint: Any) -> str:
    """Return a type in words, with its bounds or legal values."""
    bounds, legal, is_optional = constraint_of(hint)
    or_null = " or null" if is_optional else ""
    if legal:
        return f"{one_of(legal)}{or_null}"
    members = [member for member in get_args(hint) if member is not type(None)] or [hint]
    inner = members[0] if is_optional or bounds else hint
    while get_args(inner) and get_args(inner)[0] in TYPE_NAMES and bounds:
        inner = get_args(inner)[0]
    name = TYPE_NAMES.get(inner)
    if name is None:
        text = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(inner))
        name = (
            "list" if text.startswith("tuple") else "mapping" if text.startswith("dict") else text
        )
    return f"{name}{f' {bounds}' if bounds else ''}{or_null}"


@cache
def _meanings(kind: Any) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say about each field."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "") if is_dataclass(base) else ""
        block = re.split(r"(?m)^(?:Attributes|Args):$", text)
        if len(block) < 2:
            continue
        name = ""
        for line in block[1].splitlines():
            if entry := re.match(r"    (\w+): (.+)", line):
                name = entry[1]
                meanings[name] = entry[2]
            elif name and line.startswith("        "):
                meanings[name] += f" {line.strip()}"
            elif line and not line.startswith(" "):
                break
    return {name: text.replace("|", "\\|").replace("``", "`") for name, text in meanings.items()}
