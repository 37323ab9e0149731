"""Speed experiments: turns, ratios, limits, one-line errors and reproducible results."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tiny_speed import speed_subject, write_speed

from rudolph.benchmarks import comparison
from rudolph.benchmarks import config as speed_config
from rudolph.benchmarks.benchmark_case import (
    BenchmarkCase,
    load_case_decoder,
    prepare_case,
    read_case,
)
from rudolph.benchmarks.comparison import (
    ImplementationProcess,
    compare_implementations,
    compare_memory,
    implementation_command,
    reference_folder,
    turns_of,
)
from rudolph.benchmarks.config import REFERENCE, ROOFLINE, WORKLOADS
from rudolph.benchmarks.worker import IMPLEMENTATIONS
from rudolph.config.experiment_file import load_experiment
from rudolph.models.layers.native_types import has_native_bfloat16
from rudolph.reports.report import experiment_parts, fill
from rudolph.reports.schema import Report
from rudolph.reports.store import check_results_folder, export_results
from rudolph.runs.benchmark_run import compare_outputs, drop_emulated_implementations
from rudolph.runs.execution import Folders, Hardware, run_folder
from rudolph.runs.experiment import execute

NO_REFERENCE = "the reference's packages are not installed: make reference"


def run(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Execute an experiment's only run; return its folder, its summary and the progress notes."""
    experiment, told = load_experiment(path), []
    root = path.parent.parent
    folders = Folders(root, root / "runs")
    summary = execute(
        experiment,
        experiment.runs[0],
        folders=folders,
        hardware=Hardware(accelerator="cpu"),
        uri=f"sqlite:///{root}/mlflow.db",
        progress=lambda stage, done, total, note: told.append(note),
    )
    return run_folder(folders, experiment, experiment.runs[0]), summary, told


def children() -> set[int]:
    """Return the running child processes of this process."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(number) for path in tasks for number in path.read_text().split()}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[set[int]]:
    """Require that a test leaves no implementation process; yield the processes before it."""
    before = children()
    yield before
    assert children() <= before


def roofline_parts() -> list[str]:
    """Return the parts of the roofline, with bfloat16 only if it is native."""
    return (
        ["read", "bfloat16", "packed", "float32"] if has_native_bfloat16() else ["read", "float32"]
    )


def test_implementations_take_turns_and_every_part_has_its_own(tmp_path: Path) -> None:
    turns = list(turns_of(speed_subject(tmp_path, "vqgan", "float32", ROOFLINE, "bfloat16")))
    limits = [(ROOFLINE, part) for part in roofline_parts()]
    parts = [(name, p) for p in ("encode", "decode", "train") for name in ("float32", "bfloat16")]
    assert turns == [(k, name, part) for k in range(2) for name, part in [*limits, *parts]]


def test_what_a_subject_says_reaches_its_implementations_whole(tmp_path: Path) -> None:
    found = speed_subject(tmp_path, "decode", "float32")
    assert read_case(json.loads(json.dumps(found.to_plain()))) == found


def test_every_implementation_that_may_be_named_can_be_started() -> None:
    for name, workload in WORKLOADS.items():
        assert set(IMPLEMENTATIONS[name]) | {REFERENCE} == set(workload.implementations) | {
            REFERENCE
        }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Return a run of the decoding workload with the roofline and one of our implementations."""
    path = write_speed(tmp_path_factory.mktemp("measured"), "decode", ROOFLINE, "half")
    return run(path)


def test_a_run_measures_in_turns_and_leaves_repetitions_and_profiles(
    measured: tuple[Path, dict[str, Any], list[str]],
) -> None:
    folder, summary, told = measured
    table = pd.read_csv(folder / "speed" / "repetitions.csv", keep_default_na=False)
    limits = [(ROOFLINE, part) for part in roofline_parts()]
    order = [*limits, ("half", "")]
    assert list(zip(table["implementation"], table["part"], strict=True)) == order * 2
    assert (table["seconds"] > 0).all() and (table["peak_bytes"] > 2**20).all()
    assert set(table.loc[table["implementation"] == "half", "units"]) == {2 * 16}
    metrics = summary["metrics"]
    assert metrics["half/weights_bytes"] > 0
    assert 0 < metrics["half/roofline_fraction"] < 1
    assert metrics["half/cache_bytes"] > 0
    assert "half, repetition 2 of 2" in told
    profile = pd.read_csv(folder / "speed" / "half.profile.csv")
    assert profile["share"].is_monotonic_decreasing and 0.9 < profile["share"].sum() <= 1.001
    assert not (folder / "speed" / "weights").exists()


def test_results_of_speed_are_exported_and_redrawn(
    measured: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    folder = measured[0]
    report = Report(
        experiment="speed/decode",
        title="Tiny",
        question="Is it fast?",
        source="experiments/speed/decode.yaml",
        rows=("run",),
    )
    results = tmp_path / "results"
    exported = export_results(folder.parent.parent.parent, results, report=report)
    assert exported == results / "speed" / "decode"
    page = (exported / "README.md").read_text()
    assert "| seed0 | half |" in page and "Profile of `seed0-half`" in page
    assert (exported / "profiles" / "seed0-half.csv").is_file()
    problems = check_results_folder(results)
    assert [
        line for line in problems if "is not written" not in line and "commit" not in line
    ] == []
    table = exported / "repetitions.csv"
    table.write_text(table.read_text().replace(",half,,token,0,", ",half,,token,0,9"))
    assert any("generated part" in line for line in check_results_folder(results))
    assert fill(page, experiment_parts(exported)) != page


@pytest.mark.parametrize("is_native", [True, False])
def test_a_implementation_in_emulated_bfloat16_is_left_out_and_said(
    tmp_path: Path, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_config, "has_native_bfloat16", lambda: is_native)
    case = speed_subject(tmp_path, "train", ROOFLINE, "float32", "bfloat16")
    if is_native:
        assert drop_emulated_implementations(case) == case
    else:
        with pytest.warns(UserWarning, match="left out bfloat16: this processor emulates"):
            assert drop_emulated_implementations(case).speed.implementations == (
                ROOFLINE,
                "float32",
            )
        with pytest.raises(ValueError, match="no implementation left to measure"):
            drop_emulated_implementations(speed_subject(tmp_path, "train", ROOFLINE, "bfloat16"))


def test_avx2_is_a_setting_of_the_experiment(tmp_path: Path) -> None:
    """Its implementations use older instructions, and none of them uses bfloat16."""
    case = speed_subject(tmp_path, "decode", ROOFLINE, "half", instruction_set="avx2")
    assert {part for _, name, part in turns_of(case) if name == ROOFLINE} == {"read", "float32"}
    weights = prepared(tmp_path, case)
    with comparison.started_process("half", case, weights) as (worker, _):
        variables = Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
    assert b"ATEN_CPU_CAPABILITY=avx2" in variables and b"ONEDNN_MAX_CPU_ISA=AVX2" in variables
    with pytest.raises(ValueError, match="instruction_set must be one of avx2 or null, got 'sse'"):
        speed_subject(tmp_path, "decode", "half", instruction_set="sse")


def prepared(folder: Path, case: BenchmarkCase) -> Path:
    weights = folder / "weights"
    weights.mkdir()
    prepare_case(case, weights)
    return weights


@pytest.mark.parametrize(
    ("workload", "name", "units"),
    [
        ("decode", "int8", 2 * 16),
        ("decode", "compiled_half", 2 * 16),
        ("train", "bfloat16", 2 * 40),
        ("vqgan", "float32", 2),
        ("vqgan", "bfloat16", 2),
        ("upscaler", "bfloat16", 2),
        ("pipeline", "half", 2),
    ],
)
def test_a_repetition_does_all_that_it_counts(
    tmp_path: Path, workload: str, name: str, units: int
) -> None:
    case = speed_subject(tmp_path, workload, name)
    implementation = IMPLEMENTATIONS[workload][name](case, name, prepared(tmp_path, case))
    before = {key: value.clone() for key, value in weights_of(implementation).items()}
    for part in WORKLOADS[workload].units:
        for is_short in (True, False):
            work = implementation.run(part, is_short=is_short)
        assert work.units == units
    if workload == "pipeline":
        assert len(list(tmp_path.glob("weights/half/*.png"))) == 2
    has_moved = any(
        not torch.equal(value, before[key]) for key, value in weights_of(implementation).items()
    )
    assert has_moved == (workload in ("train", "vqgan"))


def weights_of(implementation: Any) -> dict[str, torch.Tensor]:
    model = (
        implementation.pipeline.decoder
        if hasattr(implementation, "pipeline")
        else implementation.model
    )
    return {name: value.detach() for name, value in model.named_parameters()}


def test_fewer_tokens_are_sampled_where_fewer_are_requested(tmp_path: Path) -> None:
    case = speed_subject(tmp_path, "memory", "float32", num_tokens=3)
    folder = prepared(tmp_path, case)
    implementation = IMPLEMENTATIONS["memory"]["float32"](case, "float32", folder)
    assert implementation.run("decode", is_short=False).units == 2 * 3
    model = load_case_decoder(case, folder)
    assert (
        implementation.weights_bytes
        == sum(value.numel() * 4 for value in model.parameters()) + model.mask_tables.numel()
    )


# An implementation that logs its requests and takes no time.
LOGGING_IMPLEMENTATION = """
import json, sys
name = json.loads(sys.stdin.readline())["implementation"]
answer = {"seconds": 1.0, "units": 5, "peak_bytes": 7, "cache_bytes": 0, "operations": []}
answer |= {"weights_bytes": 3, "versions": {name: "1"}}
if name == FAILING: sys.exit("out of luck")
print(json.dumps(answer), flush=True)
for line in sys.stdin:
    open(LOG, "a").write(f"{name} {json.loads(line)}" + chr(10))
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace implementations by processes that log their requests to the returned file."""
    log = tmp_path / "requests"
    code = LOGGING_IMPLEMENTATION.replace("LOG", repr(str(log))).replace("FAILING", "'half'")
    monkeypatch.setattr(
        comparison, "implementation_command", lambda name: [sys.executable, "-c", code]
    )
    (tmp_path / "weights").mkdir()
    return log


def quiet(done: int, total: int, note: str) -> None:
    """Ignore progress."""


def test_repetition_k_of_all_comes_before_the_next_of_any(tmp_path: Path, requests: Path) -> None:
    case = speed_subject(tmp_path, "decode", "float32", REFERENCE, "int8", num_repetitions=3)
    checked: list[str] = []
    found = compare_implementations(
        case,
        tmp_path / "weights",
        report_progress=quiet,
        check=lambda worker: checked.append(worker.name),
    )
    names = [
        line.split()[0]
        for line in requests.read_text(encoding="utf-8").splitlines()
        if "'is_short': False" in line
    ]
    assert names == ["float32", REFERENCE, "int8"] * 3
    assert [each.implementation for each in found.timings] == names and checked == [REFERENCE]
    assert found.versions == dict.fromkeys(("float32", REFERENCE, "int8"), "1")


def test_memory_is_that_of_a_process_a_repetition(tmp_path: Path, requests: Path) -> None:
    case = speed_subject(tmp_path, "memory", REFERENCE, "float32")
    found = compare_memory(
        case, tmp_path / "weights", report_progress=quiet, check=lambda worker: None
    )
    turns = [(each.implementation, each.part) for each in found.timings]
    assert turns == [(n, part) for n in (REFERENCE, "float32") for part in ("load", "decode")] * 2
    assert {each.units for each in found.timings} == {1, 5}
    assert "True" not in requests.read_text(encoding="utf-8")


def test_a_implementation_that_fails_ends_all_the_others(tmp_path: Path, requests: Path) -> None:
    case = speed_subject(tmp_path, "decode", "float32", "half")
    with pytest.raises(ValueError, match=r"^implementation half: out of luck$"):
        compare_implementations(
            case, tmp_path / "weights", report_progress=quiet, check=lambda worker: None
        )


def test_a_key_press_leaves_no_process(
    tmp_path: Path, requests: Path, no_process_is_left: set[int]
) -> None:
    case = speed_subject(tmp_path, "decode", "float32", "int8")

    def press(done: int, total: int, note: str) -> None:
        if done == 1:
            assert len(children() - no_process_is_left) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_implementations(
            case, tmp_path / "weights", report_progress=press, check=lambda worker: None
        )


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_the_reference_does_the_same_work_of_the_same_weights(
    tmp_path: Path, workload: str
) -> None:
    if not (reference_folder() / "rudolph").is_dir():
        pytest.skip(NO_REFERENCE)
    folder, summary, _ = run(write_speed(tmp_path, workload, REFERENCE, num_repetitions=1))
    assert summary["metrics"]["check/max_abs_difference"] < 1e-4
    times = [name for name in summary["metrics"] if "/seconds_per_" in name]
    assert len(times) == len(WORKLOADS[workload].units)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["rudolph"] == "0.0.1rc10"


def test_a_reference_that_is_missing_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(comparison.REFERENCE_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"pip install --no-deps --target .*nowhere rudolph=="):
        run(write_speed(tmp_path, "decode", REFERENCE, "float32"))
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert " ".join(comparison.REFERENCE_PACKAGES) in makefile


def test_weights_that_say_something_else_stop_the_run(tmp_path: Path) -> None:
    case = speed_subject(tmp_path, "decode", "float32")
    expected, _ = prepare_case(case, tmp_path)
    outputs = {"logits": expected["logits"] + 0.02}

    class FakeWorker:
        name = "reference"

        def request(self, content: dict[str, str]) -> None:
            save_file(outputs, content["path"])

    differences: list[float] = []
    compare_outputs(FakeWorker(), expected=outputs, folder=tmp_path, differences=differences)
    assert differences == [0]
    with pytest.raises(
        ValueError, match=r"expected logits within 0\.01 of ours .* got a difference of 0\.02"
    ):
        compare_outputs(FakeWorker(), expected=expected, folder=tmp_path, differences=[])


def test_a_process_that_dies_is_one_line_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; sys.stdin.readline(); sys.exit('a trace' + chr(10) + 'out of luck')"
    worker = ImplementationProcess("half", [sys.executable, "-c", code], tmp_path / "log")
    with pytest.raises(ValueError, match=r"^implementation half: out of luck$"):
        worker.request({})
        worker.request({})
    worker.close()
    silent = ImplementationProcess(
        "half", [sys.executable, "-c", "input(); input()"], tmp_path / "log"
    )
    with pytest.raises(ValueError, match=r"^implementation half: no answer in 0.05 s$"):
        silent.request({}, timeout=0.05)
    silent.close()


def test_commands_name_the_right_programs() -> None:
    assert implementation_command("half")[-1] == "rudolph.benchmarks.worker"
    assert implementation_command(REFERENCE)[2].endswith("reference_worker.py")
