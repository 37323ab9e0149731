"""Conversion of YAML to typed, frozen, validated dataclasses; no other module reads YAML.

A setting is written ``model.num_layers: 8`` or as nested mappings.  Every error is a one-line
``ConfigError`` with the file, the key, the value, the legal values and the closest legal name.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from rudolph.files.constraints import constraint_of

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

# Forbid coercion and unknown keys; nested dataclasses inherit this.
STRICT: "ConfigDict" = {"extra": "forbid", "allow_inf_nan": False, "strict": True}
# PyYAML also raises these, for example for an invalid date, thousands of digits or ``!!int x``.
YAML_ERRORS = (RecursionError, ValueError, AttributeError, KeyError)
# Far more values than any settings file has, but nested aliases reach this limit quickly.
MOST_VALUES = 100_000
KIND_NAMES: dict[type, str] = {str: "text", dict: "mapping", list: "list"}


@dataclass(frozen=True)
class TaggedBy:
    """A marker for a union of dataclasses that the field ``name`` discriminates.

    >>> Annotated[Circle | Square, TaggedBy("kind")]  # doctest: +SKIP
    """

    name: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema of pydantic's discriminated union."""
        from pydantic import Field

        return handler.generate_schema(Annotated[source, Field(discriminator=self.name)])


class ConfigError(ValueError):
    """An error in an experiment file, in one line."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Load the mapping in a YAML file.

    Duplicate keys are an error, and ``1e-3`` is a number, unlike in plain PyYAML.

    Raises:
        ConfigError: if the file is missing or unreadable, is not YAML, or is not a mapping with
            text keys.
    """
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
    """Return the value of a YAML text from the command line.

    Raises:
        ConfigError: if the text is not YAML.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML, got {short_repr(text)}") from error
    except YAML_ERRORS as error:
        raise ConfigError(f"not YAML ({_reason(error)}), got {short_repr(text)}") from error
    _require_tree(Path("command line"), content)
    return content


def _reason(error: Exception) -> str:
    """Return one line for an error of the YAML reader that is not a ``YAMLError``."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, AttributeError | KeyError):
        return "a value does not fit its tag"
    return short_repr(str(error)).strip("'\"")


def _require_tree(path: Path, content: Any) -> None:
    """Raise ``ConfigError`` if aliases are recursive or expand beyond ``MOST_VALUES`` values."""
    sizes: dict[int, int] = {}

    def size_of(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            # An alias that is reached before its own size is known is recursive.
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
    """Return a mapping as YAML, with keys in insertion order."""
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a type."""
    return _adapter(kind).json_schema()


def require_keys(path: Path, content: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise ``ConfigError`` for an illegal key or a value of another type.

    Args:
        path: file to name in the error.
        content: mapping to check.
        kinds: type of each legal key; one of ``KIND_NAMES``.
    """
    for key, value in content.items():
        if key not in kinds:
            raise unknown_key_error(path, key, key, kinds)
        if not isinstance(value, kinds[key]):
            raise setting_error(path, key, f"must be a {KIND_NAMES[kinds[key]]}", value)


def require_distinct(path: Path, key: str, values: Any) -> None:
    """Raise ``ConfigError`` unless ``values`` is a non-empty list of distinct values."""
    if not isinstance(values, list) or not values:
        raise setting_error(path, key, "must be a list with at least one value", values)
    if len({json.dumps(value, default=str) for value in values}) < len(values):
        raise setting_error(path, key, "must not hold a value twice", values)


def flat_settings(
    path: Path,
    kind: Any,
    content: Mapping[str, Any],
    prefix: str = "",
    *,
    lower: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings of a dataclass, keyed by dotted key; ``content`` may be nested or flat.

    Args:
        path: file to name in errors.
        kind: dataclass that defines the legal keys.
        content: mapping from the file.
        prefix: dotted key of the mapping itself, for errors.
        lower: flat settings that ``content`` overrides; the union tags in them decide which keys
            an error lists.

    Raises:
        ConfigError: if a key is unknown or given twice, or a section is not a mapping.
    """
    known = _known_keys(kind)
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        full_key = f"{prefix}.{key}" if prefix else key
        if key not in known:
            legal = _leaf_paths(kind, chosen_by=(content, lower or {}))
            raise unknown_key_error(path, full_key, key, legal)
        if known[key]:
            if not isinstance(value, dict):
                raise setting_error(path, full_key, "must be a mapping", value)
            for inner_key, inner_value in value.items():
                add(f"{key}.{inner_key}", inner_value)
        elif key in flat:
            raise ConfigError(f"{path}: {full_key}: is given twice, dotted and nested")
        else:
            flat[key] = value

    for key, value in content.items():
        add(key, value)
    return flat


def validate(path: Path, kind: Any, content: Any, prefix: str = "") -> Any:
    """Return ``content`` as an instance of ``kind``.

    Args:
        path: file to name in the error.
        kind: type to validate against, usually a dataclass.
        content: value from the file.
        prefix: dotted key of ``content``, for the error.

    Raises:
        ConfigError: for the first error, including NaN and infinities.
    """
    # Imported late: pydantic is needed to read files, not to build a configuration in code.
    from pydantic import ValidationError

    try:
        # Strict mode converts lists to tuples only for JSON input, and still rejects "5" for 5.
        config = _adapter(kind).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_line(error.errors()[0], kind, prefix)}") from error
    for key, value in _leaves(content, prefix):
        if isinstance(value, float) and not math.isfinite(value):
            raise setting_error(path, key, "must be a finite number", value)
    return config


def _leaves(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings and lists, each with its dotted key."""
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content


def nest_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        inner = tree
        *parents, last = key.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return tree


def unknown_key_error(path: Path, full_key: str, key: str, legal: Iterable[str]) -> ConfigError:
    """Return the ``ConfigError`` for an unknown key, with the legal keys on the same level.

    Args:
        path: file to name in the error.
        full_key: dotted key with its prefix, for the message.
        key: dotted key to compare with the legal ones.
        legal: all legal dotted keys.
    """
    legal = list(legal)
    parent = key.rpartition(".")[0]
    siblings = [name for name in legal if name.rpartition(".")[0] == parent]
    siblings = siblings or [name for name in legal if "." not in name]
    names = ", ".join(name.rpartition(".")[2] for name in siblings)
    return ConfigError(
        f"{path}: {full_key}: unknown key; legal are {names}{did_you_mean(key, legal)}"
    )


def setting_error(path: Path, key: str, rule: str, value: Any) -> ConfigError:
    """Return the ``ConfigError`` for a value that breaks a rule."""
    return ConfigError(f"{path}: {key}: {rule}, got {short_repr(value)}")


def did_you_mean(name: str, legal: Iterable[str]) -> str:
    """Return ``; did you mean ...?`` with the closest legal name, or "" if none is close."""
    legal = list(legal)
    close = difflib.get_close_matches(name, legal, n=1, cutoff=0.6)
    last = name.rpartition(".")[2]
    same_end = [other for other in legal if other.rpartition(".")[2] == last and other != name]
    best = close or same_end[:1]
    return f"; did you mean {best[0]}?" if best else ""


def short_repr(value: Any) -> str:
    """Return the ``repr`` of a value on one line, cut to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [file.name for file in folder.glob("*.y*ml")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / close[0]}?" if close else ""


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
    return f"{position}{' '.join(str(problem).split())}"


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that rejects duplicate keys and parses ``1e-3`` as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise ``MarkedYAMLError`` for a duplicate or non-text key."""
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


def _leaf_paths(
    kind: type, prefix: str = "", *, chosen_by: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Return every dotted key of a configuration, sections included.

    Args:
        kind: dataclass of the configuration.
        prefix: start of every key.
        chosen_by: layers of settings, of which the first has priority.  Their tags choose one
            member of each tagged union.  Without layers, the keys of all members are returned.
    """
    paths: dict[str, None] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        path = f"{prefix}{field.name}"
        paths[path] = None
        sections = sections_of(get_type_hints(kind)[field.name])
        if chosen_by and len(sections) > 1:
            sections = _chosen_sections(field, hints[field.name], path, chosen_by)
        for section in sections:
            paths |= dict.fromkeys(_leaf_paths(section, f"{path}.", chosen_by=chosen_by))
    return list(paths)


def _chosen_sections(
    field: Field[Any], hint: Any, path: str, layers: Sequence[Mapping[str, Any]]
) -> list[type]:
    """Return the member of a tagged union that settings choose, or all for an unknown tag."""
    union, marker = get_args(hint)
    values = (_setting(layer, f"{path}.{marker.name}") for layer in layers)
    tag = next((value for value in values if value is not None), None)
    if tag is None and callable(field.default_factory):
        return [type(field.default_factory())]
    sections = sections_of(union)
    return [section for section in sections if tag in _tags(section)] or sections


def _setting(content: Mapping[str, Any], key: str) -> Any:
    """Return the setting of a dotted key in nested or dotted settings, or None."""
    if key in content:
        return content[key]
    first, _, rest = key.partition(".")
    section = content.get(first)
    return _setting(section, rest) if rest and isinstance(section, Mapping) else None


def sections_of(hint: Any) -> list[type]:
    """Return the dataclasses that a field can hold: none, one, or those of a tagged union."""
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return [member for member in members if is_dataclass(member) and isinstance(member, type)]


@cache
def _known_keys(kind: Any) -> dict[str, bool]:
    """Return the dotted keys of a dataclass, and for each key whether others are nested in it."""
    paths = _leaf_paths(kind)
    return {path: any(other.startswith(f"{path}.") for other in paths) for path in paths}


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _line(error: Any, kind: Any, prefix: str) -> str:
    """Return one line for one of pydantic's errors."""
    names, kind = _without_tags(kind, error["loc"])
    parts = [*([prefix] if prefix else []), *names]
    key = ".".join(parts)
    if error["type"] == "value_error":
        message = re.sub(r"'([^']{80})[^']*'", r"'\1...'", str(error["ctx"]["error"]))
        return f"{key}.{message}{_nearest_value(message)}" if key else message
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [field.name for field in fields(kind)]
        return f"{key}: unknown key; legal are {', '.join(names)}{did_you_mean(parts[-1], names)}"
    if error["type"] == "union_tag_invalid":
        tag, legal = (
            error["ctx"]["tag"],
            error["ctx"]["expected_tags"].replace("'", "").split(", "),
        )
        name = error["ctx"]["discriminator"].strip("'")
        return (
            f"{key}.{name}: must be one of {', '.join(legal)}, got {short_repr(tag)}"
            f"{did_you_mean(tag, legal)}"
        )
    if error["type"] == "literal_error":
        legal = re.findall(r"'([^']*)'|(\d+)", error["ctx"]["expected"])
        names = [word or number for word, number in legal]
        hint = get_type_hints(kind, include_extras=True).get(parts[-1])
        or_null = " or null" if constraint_of(hint)[2] else ""
        return (
            f"{key} must be one of {', '.join(names)}{or_null}, got {short_repr(error['input'])}"
            f"{did_you_mean(str(error['input']), names)}"
        )
    expected = error["msg"].removeprefix("Input should be ")
    return f"{key}: must be {expected}, got {short_repr(error['input'])}"


def _without_tags(kind: Any, location: Sequence[Any]) -> tuple[list[str], Any]:
    """Return the keys in pydantic's error location and the dataclass that owns the last one.

    Pydantic inserts the tag of a tagged union after its key, but files do not contain it there.
    """
    names: list[str] = []
    owner, hint = kind, kind
    waiting = [part for part in location if part != "[key]"]
    while waiting:
        part = waiting.pop(0)
        members = sections_of(hint)
        if isinstance(hint, UnionType) and len(members) > 1:
            tags = {tag: member for member in members for tag in _tags(member)}
            hint = tags.get(part, members[0])
            if part in tags:
                continue
        owner = hint if is_dataclass(hint) else owner
        names.append(str(part))
        hint = get_type_hints(hint).get(part) if is_dataclass(hint) else None
    return names, owner


def _tags(kind: type) -> list[str]:
    """Return the value of every ``Literal`` field that has only one legal value."""
    hints = [get_args(hint) for hint in get_type_hints(kind).values() if _is_literal(hint)]
    return [values[0] for values in hints if len(values) == 1]


def _is_literal(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _nearest_value(message: str) -> str:
    """Return a suggestion for a message such as ``... one of a, b, got 'x'``."""
    match = re.search(r"must be (?:one )?of (.+?)[,;] got '([^']*)'", message)
    return did_you_mean(match[2], match[1].split(", ")) if match else ""
