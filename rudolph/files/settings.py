"""YAML to typed, frozen, checked dataclasses: the only reader of YAML.

A setting is written ``model.num_layers: 8`` or as nested mappings.  Every mistake is a
``ConfigError`` of one line: file, key, what was given, what is legal and the nearest name.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

# Nothing is coerced and nothing unknown is ignored; dataclasses inside take it over.
STRICT: "ConfigDict" = {"extra": "forbid", "allow_inf_nan": False, "strict": True}
# PyYAML raises these besides its own: for an invalid date, thousands of digits, !!int x.
YAML_ERRORS = (RecursionError, ValueError, AttributeError, KeyError)
# No file of settings has as many values; aliases of aliases soon have.
MOST_VALUES = 100_000
KIND_NAMES: dict[type, str] = {str: "text", dict: "mapping", list: "list"}


@dataclass(frozen=True)
class TaggedBy:
    """Marks a field as a union of dataclasses that its member ``name`` tells apart.

    >>> Annotated[Circle | Square, TaggedBy("kind")]  # doctest: +SKIP
    """

    name: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Validate as pydantic's discriminated union."""
        from pydantic import Field

        return handler.generate_schema(Annotated[source, Field(discriminator=self.name)])


class ConfigError(ValueError):
    """A mistake in an experiment file, in one line."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; a key given twice is a mistake, ``1e-3`` a number."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from error
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}: not YAML ({_reason(error)})") from error
    _require_tree(path, content)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, got {short_repr(content)}")
    return content


def parse_yaml(text: str) -> Any:
    """The value of a text in YAML; ``ConfigError`` when it is not YAML."""
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML, got {short_repr(text)}") from error
    except YAML_ERRORS as error:
        raise ConfigError(f"not YAML ({_reason(error)}), got {short_repr(text)}") from error
    _require_tree(Path("command line"), content)
    return content


def _reason(error: Exception) -> str:
    """One line of an error of the YAML reader that is none of its own kind."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, AttributeError | KeyError):
        return "a value does not fit its tag"
    return short_repr(str(error)).strip("'\"")


def _require_tree(path: Path, content: Any) -> None:
    """Raise ``ConfigError`` for aliases that hold themselves or stand for millions of values."""
    sizes: dict[int, int] = {}

    def size_of(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            # An alias that is met before its own value is known lies within it.
            sizes[id(value)] = MOST_VALUES + 1
            inner = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size_of, inner))
        return sizes[id(value)]

    if size_of(content) > MOST_VALUES:
        raise ConfigError(
            f"{path}: expected at most {MOST_VALUES} values, got more. An alias (*name) holds "
            "itself or others many times"
        )


def dump_yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def json_schema(kind: Any) -> dict[str, Any]:
    return _adapter(kind).json_schema()


def require_keys(path: Path, content: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise ``ConfigError`` for a key that is not legal or a value that is of another kind."""
    for key, value in content.items():
        if key not in kinds:
            raise unknown_key_error(path, key, key, kinds)
        if not isinstance(value, kinds[key]):
            raise setting_error(path, key, f"must be a {KIND_NAMES[kinds[key]]}", value)


def require_distinct(path: Path, place: str, values: Any) -> None:
    """Raise ``ConfigError`` unless ``values`` is a list of different values, at least one."""
    if not isinstance(values, list) or not values:
        raise setting_error(path, place, "must be a list with at least one value", values)
    if len({json.dumps(value, default=str) for value in values}) < len(values):
        raise setting_error(path, place, "must not hold a value twice", values)


def flat_settings(
    path: Path, kind: Any, content: Mapping[str, Any], place: str = ""
) -> dict[str, Any]:
    """Settings of a dataclass by their dotted key, whether the file nests or dots them."""
    known = _known_keys(kind)
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        where = f"{place}.{key}" if place else key
        if key not in known:
            raise unknown_key_error(path, where, key, known)
        if known[key]:
            if not isinstance(value, dict):
                raise setting_error(path, where, "must be a mapping", value)
            for inner, below in value.items():
                add(f"{key}.{inner}", below)
        elif key in flat:
            raise ConfigError(f"{path}: {where}: is given twice, dotted and nested")
        else:
            flat[key] = value

    for key, value in content.items():
        add(key, value)
    return flat


def validate(path: Path, kind: Any, content: Any, place: str = "") -> Any:
    """``content`` as ``kind``; ``ConfigError`` for its first mistake."""
    # Needed only to read files, not to build a configuration in code.
    from pydantic import ValidationError

    try:
        # Through JSON, so that lists become tuples while "5" does not become 5.
        found = _adapter(kind).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {_line(first, kind, place)}") from error
    for where, value in _leaves(content, place):
        if isinstance(value, float) and not math.isfinite(value):
            raise setting_error(path, where, "must be a finite number", value)
    return found


def _leaves(content: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings and lists, each with its dotted key."""
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, content


def nest_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        inner = tree
        *parents, last = key.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return tree


def unknown_key_error(path: Path, place: str, key: str, legal: Iterable[str]) -> ConfigError:
    legal = list(legal)
    parent = key.rpartition(".")[0]
    beside = [each for each in legal if each.rpartition(".")[0] == parent]
    beside = beside or [each for each in legal if "." not in each]
    names = ", ".join(each.rpartition(".")[2] for each in beside)
    return ConfigError(
        f"{path}: {place}: unknown key; legal are {names}{did_you_mean(key, legal)}"
    )


def setting_error(path: Path, place: str, rule: str, value: Any) -> ConfigError:
    return ConfigError(f"{path}: {place}: {rule}, got {short_repr(value)}")


def did_you_mean(given: str, legal: Iterable[str]) -> str:
    """``; did you mean ...?`` for the nearest legal name, or nothing."""
    legal = list(legal)
    close = difflib.get_close_matches(given, legal, n=1, cutoff=0.6)
    last = given.rpartition(".")[2]
    same = [each for each in legal if each.rpartition(".")[2] == last and each != given]
    best = close or same[:1]
    return f"; did you mean {best[0]}?" if best else ""


def short_repr(value: Any) -> str:
    """A value on one line, cut to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [each.name for each in folder.glob("*.y*ml")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / close[0]}?" if close else ""


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
    return f"{place}{' '.join(str(problem).split())}"


class _Loader(yaml.SafeLoader):
    """Safe YAML without its traps: keys once, and 1e-3 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    None, None, f"key {key!r} must be text", node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"key {key} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _leaf_paths(kind: type, prefix: str = "") -> list[str]:
    """Every dotted key that a configuration has."""
    paths: dict[str, None] = {}
    hints = get_type_hints(kind)
    for each in fields(kind):
        path = f"{prefix}{each.name}"
        paths[path] = None
        for member in _sections(hints[each.name]):
            paths |= dict.fromkeys(_leaf_paths(member, f"{path}."))
    return list(paths)


def _sections(hint: Any) -> list[type]:
    """Return the dataclasses that a field can hold: one, those of a tagged union, or none."""
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return [member for member in members if is_dataclass(member) and isinstance(member, type)]


@cache
def _known_keys(kind: Any) -> dict[str, bool]:
    """Dotted keys of a dataclass; true where more keys lie below."""
    paths = _leaf_paths(kind)
    return {path: any(each.startswith(f"{path}.") for each in paths) for path in paths}


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _line(found: Any, kind: Any, place: str) -> str:
    """One line for one of pydantic's errors."""
    names, kind = _without_tags(kind, found["loc"])
    parts = [*([place] if place else []), *names]
    key = ".".join(parts)
    if found["type"] == "value_error":
        message = re.sub(r"'([^']{80})[^']*'", r"'\1...'", str(found["ctx"]["error"]))
        return f"{key}.{message}{_nearest_value(message)}" if key else message
    if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [each.name for each in fields(kind)]
        return f"{key}: unknown key; legal are {', '.join(names)}{did_you_mean(parts[-1], names)}"
    if found["type"] == "union_tag_invalid":
        tag, legal = (
            found["ctx"]["tag"],
            found["ctx"]["expected_tags"].replace("'", "").split(", "),
        )
        name = found["ctx"]["discriminator"].strip("'")
        return (
            f"{key}.{name}: must be one of {', '.join(legal)}, got {short_repr(tag)}"
            f"{did_you_mean(tag, legal)}"
        )
    expected = found["msg"].removeprefix("Input should be ")
    return f"{key}: must be {expected}, got {short_repr(found['input'])}"


def _without_tags(kind: Any, location: Sequence[Any]) -> tuple[list[str], Any]:
    """Return the keys of pydantic's location, and the dataclass that has the last of them.

    Pydantic puts the tag of a tagged union after its key, which no file does.
    """
    names: list[str] = []
    owner, hint = kind, kind
    waiting = [part for part in location if part != "[key]"]
    while waiting:
        part = waiting.pop(0)
        members = _sections(hint)
        if isinstance(hint, UnionType) and len(members) > 1:
            tags = {tag: each for each in members for tag in _tags(each)}
            hint = tags.get(part, members[0])
            if part in tags:
                continue
        owner = hint if is_dataclass(hint) else owner
        names.append(str(part))
        hint = get_type_hints(hint).get(part) if is_dataclass(hint) else None
    return names, owner


def _tags(kind: type) -> list[str]:
    """Return the values of the fields of a dataclass that can hold one value alone."""
    hints = [get_args(hint) for hint in get_type_hints(kind).values() if _is_literal(hint)]
    return [values[0] for values in hints if len(values) == 1]


def _is_literal(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _nearest_value(message: str) -> str:
    """For ``... one of a, b, got 'x'``: the nearest of the legal values."""
    match = re.search(r"must be (?:one )?of (.+?)[,;] got '([^']*)'", message)
    return did_you_mean(match[2], match[1].split(", ")) if match else ""
