"""The GPU check: it runs on a bare machine, skips finished parts and survives failures."""

import csv
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rudolph.config.experiment_file import load_experiment
from rudolph.config.run import resolve_run, to_plain
from rudolph.files.settings import flat_settings
from rudolph.gpu_check import consistency, golden
from rudolph.gpu_check.consistency import attend, gradient_of, relative_error
from rudolph.gpu_check.parts import CHECK_PARTS
from rudolph.gpu_check.plan import PLAN, Part
from rudolph.gpu_check.quickstart import quickstart_config
from rudolph.gpu_check.rows import FAILED, OK, CheckRow
from rudolph.gpu_check.runner import Check, read_lines
from rudolph.gpu_check.sizes import Geometry, full_sizes, smoke_sizes
from rudolph.gpu_check.timing import peak_bfloat16

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# Dependencies in pyproject.toml that a lent machine lacks.
MISSING = (
    "mlflow youtokentome pydantic pydantic_core scipy sklearn optuna matplotlib seaborn rich "
    "huggingface_hub httpx2 pymorphy3 nltk rapidfuzz pyarrow bitsandbytes transformers"
)
# As sitecustomize.py it hides packages and their metadata from a new interpreter.
BARE = f"""
import sys
from importlib.machinery import PathFinder

MISSING = {MISSING.split()!r}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *given, **named):
        for found in super().find_distributions(*given, **named):
            name = found.metadata["Name"].lower().replace("-", "_")
            if name.replace("scikit_learn", "sklearn") not in MISSING:
                yield found

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def call(folder: Path, *arguments: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command from the repository; ``bare`` hides packages."""
    (folder / "site").mkdir(exist_ok=True)
    if bare:
        (folder / "site" / "sitecustomize.py").write_text(BARE)
    paths = os.pathsep.join([str(folder / "site"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OUT": ""}
    command = [sys.executable, "-m", "rudolph.gpu_check", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [row for name in ("checks.csv", "speed.csv") for row in read_lines(folder / name)]


@pytest.mark.timeout(1800)
def test_all_parts_run_on_a_bare_machine_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--smoke", "--out", str(out), "--commit", "abc", "--minutes", "60")
    first = call(tmp_path, *arguments, bare=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr
    parts, rows = read_lines(out / "parts.csv"), rows_of(out)
    assert [line["part"] for line in parts] == list(PLAN)
    assert {line["status"] for line in parts} == {OK} and {line["commit"] for line in parts} == {
        "abc"
    }
    assert {row["status"] for row in rows} == {OK, "needs CUDA"}
    measured = [row for row in rows if row["status"] == OK]
    assert all(math.isfinite(float(row["value"])) for row in measured)
    # 8-bit Adam needs CUDA; every other part measures something on the CPU too.
    assert {row["part"] for row in measured} == set(PLAN) - {"adam8bit"}
    assert {row["part"] for row in rows} == set(PLAN)
    lines = first.stdout.splitlines()
    assert all(any(line.startswith(row["part"]) for line in lines) for row in rows)
    before = {path.name: path.read_bytes() for path in out.glob("*.csv")}
    again = call(tmp_path, *arguments, bare=True)
    assert again.returncode == 0
    for name in PLAN:
        assert f"{name}: skipped, already finished" in again.stdout
    assert {path.name: path.read_bytes() for path in out.glob("*.csv")} == before


def test_the_bare_machine_of_the_test_lacks_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    code = (
        "import importlib.util, importlib.metadata as m\n"
        f"names = {MISSING.split()!r}\n"
        "held = {d.metadata['Name'].lower() for d in m.distributions()}\n"
        "print(*(n for n in names if importlib.util.find_spec(n)), *(held & set(names)))\n"
        "import numpy"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""
    assert importlib.util.find_spec("pydantic") is not None


# A worker whose parts fail in every way and report the order of their starts.
BROKEN = """
import os, sys, time
from rudolph.gpu_check.rows import Case, CheckRow, UnavailableError
from rudolph.gpu_check.serving import serve_parts

def good():
    yield CheckRow("value", 1.5, "s")

def bad():
    yield CheckRow("before", 1.0)
    raise RuntimeError("two\\nlines")

def wrong():
    yield CheckRow("error", 3.0, limit=2.0)
    yield CheckRow("loss", float("nan"))

def lacking():
    raise UnavailableError("needs CUDA")

def crash():
    yield CheckRow("before", 1.0)
    os._exit(3)

def lose():
    yield CheckRow("before", 1.0)
    lost.append(1)

def hang():
    time.sleep(60)

def slow():
    time.sleep(1.1)
    yield CheckRow("value", 1.0)

lost = []

def release():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def cases(*runs):
    return lambda: iter([Case(run.__name__, run) for run in runs])

serve_parts(
    lambda: {
        "raises": cases(bad, good),
        "wrong": cases(wrong),
        "crashes": cases(crash, good),
        "loses": cases(lose, good),
        "hangs": cases(hang),
        "late": cases(slow, slow),
        "lacks": cases(lacking, good),
        "good": cases(good),
    },
    {"device": sys.argv[1], "torch": "0"},
    release=release,
)
"""
SECONDS = {"hangs": 1.0, "late": 1.0}


NAMES = ("raises", "wrong", "crashes", "loses", "hangs", "late", "lacks", "good")


def broken_check(
    folder: Path, device: str = "none", names: tuple[str, ...] = NAMES, **changes: object
) -> int:
    plan = {name: Part("checks.csv", SECONDS.get(name, 60.0)) for name in names}
    command = [sys.executable, "-c", BROKEN, device]
    check = Check(command, folder, "smoke", **({"minutes": 5.0} | changes), plan=plan)
    return check.run(names)


def test_a_part_that_fails_crashes_or_hangs_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rudolph.gpu_check.runner.GRACE_SECONDS", 1.0)
    assert broken_check(tmp_path) == 1
    statuses = {line["part"]: line["status"] for line in read_lines(tmp_path / "parts.csv")}
    assert statuses == {
        "raises": "failed",
        "wrong": "failed",
        "crashes": "failed",
        "loses": "failed",
        "hangs": "failed",
        "late": "out of time",
        "lacks": "ok",
        "good": "ok",
    }
    rows = [
        (row["part"], row["case"], row["quantity"], row["value"], row["status"], row["note"])
        for row in read_lines(tmp_path / "checks.csv")
    ]
    assert rows == [
        ("raises", "bad", "before", "1.0", "ok", ""),
        ("raises", "bad", "error", "", "failed", "RuntimeError: two lines"),
        ("raises", "good", "value", "1.5", "ok", ""),
        ("wrong", "wrong", "error", "3.0", "failed", ""),
        ("wrong", "wrong", "loss", "nan", "failed", ""),
        ("crashes", "crash", "before", "1.0", "ok", ""),
        ("crashes", "", "error", "", "failed", "the process ended (3)"),
        ("loses", "lose", "before", "1.0", "ok", ""),
        ("loses", "", "error", "", "failed", "the device was lost"),
        ("hangs", "", "error", "", "failed", "killed after its time limit"),
        ("late", "slow", "value", "1.0", "ok", ""),
        ("lacks", "lacking", "unavailable", "", "needs CUDA", ""),
        ("lacks", "good", "value", "1.5", "ok", ""),
        ("good", "good", "value", "1.5", "ok", ""),
    ]
    assert "RuntimeError: two" in (tmp_path / "log.txt").read_text()
    assert "raises, bad: failed, error RuntimeError: two lines" in capsys.readouterr().out


def test_what_failed_runs_again_and_what_is_finished_only_on_another_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("raises", "crashes", "lacks", "good")

    def begun(device: str, **changes: object) -> set[str]:
        broken_check(tmp_path, device, names, **changes)
        out = capsys.readouterr().out
        assert len(read_lines(tmp_path / "checks.csv")) == 8
        skipped = set(re.findall(r"^(\w+): skipped", out, re.MULTILINE))
        return set(re.findall(r"^(\w+): .* rows in", out, re.MULTILINE)) - skipped

    assert begun("one") == set(names)
    assert begun("one") == {"raises", "crashes"}
    assert begun("other") == set(names)
    assert begun("other", is_again=True) == set(names)


def test_parts_without_time_are_left_out_and_said(tmp_path: Path) -> None:
    assert broken_check(tmp_path, minutes=1e-3) == 0
    assert {line["status"] for line in read_lines(tmp_path / "parts.csv")} == {"no time left"}
    assert read_lines(tmp_path / "checks.csv") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--parts", "golden,nope"), "--parts: expected some of limits, golden"),
        (("--minutes", "0"), "--minutes: expected a number above 0, got 0"),
        (("--minutes", "nan"), "--minutes: expected a number above 0, got nan"),
        (("--smoke",), "--out: expected a folder with --smoke, got none"),
        (("--out", __file__), "--out: expected a folder, got the file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    run = call(tmp_path, *arguments)
    assert run.returncode == 2 and run.stdout == ""
    assert words in run.stderr and run.stderr.count("\n") == 1


def test_no_folder_of_something_else_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("a run's")
    run = call(tmp_path, "--out", str(tmp_path))
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("--out: expected a new folder or one of an earlier check, got ")
    assert (tmp_path / "environment.json").read_text() == "a run's"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_check_says_so(tmp_path: Path) -> None:
    run = call(tmp_path, "--out", str(tmp_path / "out"))
    assert run.returncode == 2
    assert run.stderr == (
        "the worker did not start: expected a CUDA GPU, got none. "
        "Add --smoke to try the check on the CPU\n"
    )


def test_every_planned_part_exists() -> None:
    assert set(CHECK_PARTS) == set(PLAN)


@pytest.mark.parametrize("name", ["350m", "1.3b"])
def test_sizes_are_those_of_the_experiment_files(name: str) -> None:
    path = ROOT / "experiments" / "base" / f"rudolph_{name}.yaml"
    content = yaml.safe_load(path.read_text())
    content["tokenizer"].pop("path")
    content["model"].pop("init")
    content.pop("vqgan.init")
    content |= {"vqgan.resolution": content["data"]["image_size"]}
    config = resolve_run(path, flat_settings(path, type(quickstart_config()), content))
    found: Geometry = full_sizes(CPU).decoders[name]
    assert found.layout == config.sequence_layout and found.vocabulary == config.vocabulary
    same = to_plain(config.decoder.architecture) | {
        "attention_dropout": 0.0,
        "output_dropout": 0.0,
    }
    assert to_plain(found.decoder) == same
    assert full_sizes(CPU).vqgan == type(config.vqgan)()


def test_the_quickstart_is_that_of_its_experiment_file() -> None:
    [run] = load_experiment(ROOT / "experiments" / "quickstart.yaml").runs
    expected, found = to_plain(run.config), to_plain(quickstart_config())
    assert expected["evaluation"].pop("grid_prompts")
    assert found["evaluation"].pop("grid_prompts") == []
    assert found == expected


def test_a_row_is_wrong_when_it_is_not_finite_or_above_its_limit() -> None:
    assert CheckRow("x", 2.0, limit=2.0).status == OK and CheckRow("x", 1e9).status == OK
    for value in (2.1, math.nan, math.inf):
        assert CheckRow("x", value, limit=2.0).status == FAILED
    assert CheckRow("x", math.nan).status == FAILED


def test_golden_outputs_of_changed_weights_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {row.status for row in golden.compare_golden("rudalle_v3", CPU)} == {OK}
    load = golden.from_reference

    def changed(*given: object) -> torch.nn.Module:
        model = load(*given)  # type: ignore[arg-type]
        with torch.no_grad():
            model.layers[0].mlp_in.weight.mul_(1.01)  # type: ignore[union-attr,operator,index]
        return model

    monkeypatch.setattr(golden, "from_reference", changed)
    assert {row.status for row in golden.compare_golden("rudalle_v3", CPU)} == {FAILED}


def test_a_wrong_mask_is_an_error_far_above_the_tolerance() -> None:
    torch.manual_seed(0)
    *inputs, direction = torch.randn(4, 2, 9, 16)
    causal = torch.ones(9, 9).tril().bool()
    less = causal & ~torch.eye(9, dtype=torch.bool).roll(-1, 1)
    exact = attend(inputs, causal, direction)[0]
    error = relative_error(attend(inputs, less, direction)[0], exact)
    assert error > 10 * max(consistency.MAX_RELATIVE_ERROR.values())
    assert relative_error(exact, exact) == 0


def test_the_gradient_that_is_compared_is_not_rounding() -> None:
    """A second backward pass doubles the gradient; bfloat16 gives nearly the same one."""
    sizes = smoke_sizes()
    tokens = sizes.checked.tokens(4, CPU)
    models = [sizes.checked.model(CPU).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    exact, half = (gradient_of(model, tokens) for model in models)
    assert 0 < relative_error(half, exact) < 0.1
    twice = gradient_of(models[0], tokens)
    torch.testing.assert_close(twice, 2 * exact)


def test_the_peak_of_a_device_is_found_by_its_name() -> None:
    assert peak_bfloat16("NVIDIA H100 80GB HBM3") == peak_bfloat16("NVIDIA H200") == 989e12
    assert peak_bfloat16("NVIDIA H100 PCIe") == 756e12
    assert peak_bfloat16("Imagined 1") is None


@pytest.mark.parametrize(("venv", "python"), [("/nowhere", "python3"), (None, ".venv/bin/python")])
def test_make_takes_the_environment_or_the_machines_python(
    tmp_path: Path, venv: str | None, python: str
) -> None:
    if venv is None:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").touch()
    arguments = ["-n", "-f", str(ROOT / "Makefile"), "gpu-check", "GPU_FLAGS=--parts golden"]
    command = ["make", *arguments, *([f"VENV={venv}"] if venv else [])]
    # `make test` sets variables of its own, which change what make prints.
    own = ("VENV", "MAKELEVEL", "MAKEFLAGS", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{python} -m rudolph.gpu_check --parts golden\n"


def test_tables_hold_one_line_for_each_row(tmp_path: Path) -> None:
    broken_check(tmp_path, minutes=1e-3)
    with (tmp_path / "parts.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 9
