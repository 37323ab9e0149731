"""Random flags, settings and experiment files passed to ``run --dry-run``.

Each is accepted, or refused in one line with exit code 2. No case ends in a traceback.
``FUZZ_CASES`` is the number of cases of each kind.
"""

import copy
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import TINY

from rudolph.cli import main
from rudolph.config.experiment_file import load_experiment
from rudolph.config.run import RunConfig, to_plain
from rudolph.files.settings import _known_keys

CASES = int(os.environ.get("FUZZ_CASES", "25"))
EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FLAGS = {
    "--accelerator": ["auto", "cpu", "gpu", "cuda", "mps", "tpu", "CPU"],
    "--devices": ["1", "2", "4", "auto", "-1", "0,1", "0,", ",", "64", "1e3"],
    "--num-nodes": ["1", "2", "4"],
    "--strategy": ["auto", "ddp", "ddp_fork", "ddp_spawn", "fsdp", "fsdp2", "dp"],
    "--precision": ["16", "32", "64", "bf16", "16-true", "bf16-mixed", "16-mixed", "64-true"],
    "--micro-batch-size": ["1", "2", "4", "8"],
    "--num-workers": ["0", "2"],
    "--index": ["0", "1"],
    "--jobs": ["1", "2"],
    "--activation-checkpointing": [],
    "--block-masks": [],
    "--compile": [],
}
WORDS = (
    *("", " ", "0", "-1", "1", "3", "1e3", "1.5", "nan", ".inf", "-.inf", "null", "~", "true"),
    *("no", "[]", "{}", "[1, 2", "{a: 1}", "a: b: c", "- 1", "&a [*a]", "*a", "&a {b: *a}"),
    *("<<: 1", "!!python/object:os.system x", "!!binary aGk=", "!!set {a, b}", "2026-01-01"),
    *("0x10", "1_000", "9" * 30, "9" * 5000, "'", '"', "\t", "\x00", "\udcff", "ё", "😀", "-"),
    *("--", "[" * 40, "[" * 5000, "[[[[1]]]]", "a" * 3000, "1e999", "../..", "/", "%s", "\n"),
    *("a\nb", "\r"),
)


def values() -> list[Any]:
    """Return values of every kind that a file can contain."""
    return [
        *(0, 1, -1, 2, 10**30, 0.5, -0.5, 1e300, True, None, "", "a", "ё\t", [], {}, [0], ["a"]),
        *(
            [[[[]]]],
            {"a": {"b": {"c": 1}}},
            {"": 1},
            [None],
            "1",
            "null",
            " ",
            [1, 1],
            {"seed": 1},
        ),
    ]


def near(value: Any, rng: random.Random) -> Any:
    """Return a similar value of the same kind, which may be valid."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value * 2, value + 1, value - 1, -value, 0, value / 2, value // 2])
    if isinstance(value, list):
        return [near(each, rng) for each in value] + rng.choice([[], value[:1]])
    if isinstance(value, dict):
        return {key: near(each, rng) for key, each in value.items()}
    return rng.choice([None, 1, value and str(value)[1:]])


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return whether a dry run accepts or refuses; a refusal prints one line."""
    try:
        code = main(["run", "--dry-run", *arguments])
    except SystemExit as stopped:
        # Argparse itself refuses what is not a number, after printing its usage.
        assert stopped.code == 2, arguments
        assert "error: " in capsys.readouterr().err.splitlines()[-1]
        return "refused"
    error = capsys.readouterr().err
    assert code in (0, 2), (arguments, error)
    if code == 2:
        assert len(error.splitlines()) == 1 and error.startswith("rudolph: "), (arguments, error)
        assert len(error) < 3000, error
    return "refused" if code else "accepted"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY, allow_unicode=True))
    (tmp_path / "base").symlink_to(EXPERIMENTS / "base")
    return tmp_path


def test_any_flags_are_accepted_or_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only a compilation shows whether a compiler exists, and it takes seconds.
    monkeypatch.setattr("rudolph.runs.execution.check_compiler", lambda device: None)
    rng, found = random.Random(1), Counter[str]()
    for _ in range(CASES):
        arguments = ["tiny.yaml"]
        for flag in rng.sample(sorted(FLAGS), rng.randint(1, 3)):
            legal = FLAGS[flag]
            given = [rng.choice(legal if rng.random() < 0.7 else WORDS)] if legal else []
            arguments += [f"{flag}={given[0]}"] if given else [flag]
        found[outcome(arguments, capsys)] += 1
    assert found["accepted"] and found["refused"], found
    print("flags", dict(found))


def test_any_settings_are_accepted_or_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, found = random.Random(2), Counter[str]()
    keys = sorted(_known_keys(RunConfig))
    defaults = to_plain(load_experiment("tiny.yaml").runs[0].config)
    for _ in range(CASES):
        settings = []
        for _ in range(rng.randint(1, 2)):
            key = rng.choice(keys)
            if rng.random() < 0.1:
                at = rng.randrange(len(key))
                key = key[:at] + rng.choice(["", ".", "x", " ", "=", "ё"]) + key[at + 1 :]
            default: Any = defaults
            for part in key.split("."):
                default = default.get(part) if isinstance(default, dict) else None
            kept = json.dumps(near(default, rng), ensure_ascii=False)
            value = rng.choice([*WORDS, *(json.dumps(each) for each in values())])
            value = kept if rng.random() < 0.6 else value
            settings.append(f"{key}={value}")
        found[outcome(["tiny.yaml", *settings], capsys)] += 1
    assert found["accepted"] and found["refused"], found
    print("settings", dict(found))


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all nodes in a tree of mappings and lists."""
    found = [path] if path else []
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in inner:
        place = (*path, key)
        found += nodes(value, place) if isinstance(value, dict | list) else [place]
    return found


def changed(tree: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a copy with one node replaced, misspelt, removed, wrapped or duplicated."""
    tree = copy.deepcopy(tree)
    *parents, key = rng.choice(nodes(tree))
    holder: Any = tree
    for parent in parents:
        holder = holder[parent]
    kinds = ["near", "near", "near", "replace", "remove", "list", "mapping", "misspell", "insert"]
    kind = rng.choice(kinds)
    if kind == "near":
        holder[key] = near(holder[key], rng)
    elif kind == "replace":
        holder[key] = rng.choice(values())
    elif kind == "remove":
        del holder[key]
    elif kind == "list":
        holder[key] = [holder[key]] * rng.randint(1, 3)
    elif kind == "mapping":
        holder[key] = {rng.choice(["a", "seed", "data", ""]): holder[key]}
    elif isinstance(holder, dict) and kind == "misspell":
        text = str(key)
        at = rng.randrange(len(text) or 1)
        holder[text[:at] + rng.choice(["", "x", ".", " "]) + text[at + 1 :]] = holder.pop(key)
    elif isinstance(holder, dict):
        extra = ["seeds", "grid", "variants", "search", "claim", "base", "report", "a", "targets"]
        holder[rng.choice(extra)] = rng.choice(values())
    return tree


def garbled(text: str, rng: random.Random) -> bytes:
    """Return a text with some bytes changed, as by a typing error or a disk error."""
    data = text.encode()
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(data) + 1)
        pieces = [
            b"\t",
            b"\x00",
            b"\xff\xfe",
            b"&a ",
            b"*a",
            b": ",
            b"- ",
            b"\n",
            b"'",
            b"{",
            b"]",
        ]
        pieces += [b"[" * 2000, b"!!python/name:os.system ", b"<<: *a\n", b"%YAML 9\n", b"---\n"]
        pieces += [b"? ", b"| ", b"#", b"\xe2\x80\xa8", b"&a [*a]", b"0" * 5000, b"1e400"]
        cut = at + rng.choice([0, 0, 1, 20])
        data = data[:at] + rng.choice([b"", *pieces]) + data[cut:]
    return data


def test_any_experiment_file_is_accepted_or_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, found = random.Random(3), Counter[str]()
    trees = [TINY, *(yaml.safe_load(path.read_text()) for path in EXPERIMENTS.glob("text/*.yaml"))]
    searched = yaml.safe_load((EXPERIMENTS / "sampling" / "auto_range.yaml").read_text())
    for number in range(CASES):
        tree = rng.choice([*trees, searched])
        if "base" in tree:
            tree = tree | {"base": "base/tiny.yaml"}
        for _ in range(rng.choice([1, 1, 2, 3])):
            tree = changed(tree, rng)
        data = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
        path = folder / f"{number}.yaml"
        path.write_bytes(garbled(data, rng) if number % 4 == 0 else data.encode())
        found[outcome([path.name], capsys)] += 1
    assert found["accepted"] and found["refused"], found
    print("files", dict(found))
