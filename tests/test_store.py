"""Exports follow from their runs and are reproducible; edits by hand are detected."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rudolph.cli import main
from rudolph.config.run import run_of
from rudolph.reports.report import (
    MAX_PAGE_IMAGES,
    UNANSWERED,
    WITHOUT_LIMITS,
    fill,
    finding_of,
    marked,
    read_curves,
    read_runs,
    with_finding,
    without_generated,
)
from rudolph.reports.run_configs import CONFIG_LINES, read_configs
from rudolph.reports.schema import Figure, Report, read_report
from rudolph.reports.store import (
    POINTS_PER_CURVE,
    check_results_folder,
    draw_pngs,
    export_results,
    redraw,
    write_index,
)
from rudolph.tracking.event_log import EventLog

LOSS, LATE = "val/loss/image", "decoder/val/late"
REPORT = Report(
    experiment="masks/patterns",
    title="Which mask | is needed?",
    question="Does the row mask\nlose anything?",
    source="experiments/masks/patterns.yaml",
    rows=("variant", "model.num_layers"),
    columns=(LOSS, "accuracy"),
    figures=(
        Figure("curves", (LOSS,)),
        Figure("intervals", ("accuracy",), x="seed"),
        Figure("lines", ("accuracy",), x="model.num_layers"),
    ),
)
VARIANTS = ("causal", "row")


def loss_at(variant: str, seed: int, step: int) -> float:
    return 3 * math.exp(-step / 50) + VARIANTS.index(variant) + 0.1 * seed


def write_run(runs: Path, variant: str, seed: int, **changes: Any) -> Path:
    run = f"{variant}-layers=2-s{seed}"
    folder = runs / REPORT.experiment / run
    journal = EventLog(folder, experiment=REPORT.experiment, run=run, digest=f"digest-{run}")
    for step in range(0, 1000, 3):
        journal.append("metrics", step=step, metrics={LOSS: loss_at(variant, seed, step)})
    journal.close()
    accuracy = 0.5 + 0.1 * VARIANTS.index(variant) + seed / 100
    summary = {
        "experiment": REPORT.experiment,
        "run": run,
        "variant": variant,
        "grid": {"model.num_layers": 2},
        "seed": seed,
        "digest": f"digest-{run}",
        "status": "finished",
        "metrics": {LOSS: loss_at(variant, seed, 999), "accuracy": accuracy},
        "intervals": {"accuracy": [accuracy - 0.05, accuracy + 0.05]},
        "chance": {"accuracy": 0.25},
        "seconds": {"train": 60, "evaluate": 30.0},
        "commit": "0123456789abcdef",
        "dirty": False,
    } | changes
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    (folder / "config.yaml").write_text(f"run: {run}\n", "utf-8")
    (folder / "environment.json").write_text('{"machine": {"threads": 2}}', "utf-8")
    (folder / "samples").mkdir()
    for name in ("grid-000100", "grid-000900", "masks"):
        Image.new("RGB", (4, 4), "red").save(folder / "samples" / f"{name}.png")
    return folder


def write_runs(runs: Path) -> None:
    for variant in VARIANTS:
        for seed in (0, 1):
            write_run(runs, variant, seed)
    write_run(runs, "row", 2, status="failed")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def answer_by_hand(readme: Path, text: str) -> None:
    page = with_finding(readme.read_text("utf-8"), text)
    readme.write_text(page.replace(WITHOUT_LIMITS, "One layer, made-up numbers."), "utf-8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    runs, results = (tmp_path_factory.mktemp(name) for name in ("runs", "results"))
    write_runs(runs)
    folder = export_results(runs, results, report=REPORT)
    answer_by_hand(folder / "README.md", "Ряд теряет 1.0 нат. Проверено дважды.")
    write_index(results)
    return runs, results


def copy_of(results: Path, target: Path) -> Path:
    for name, content in contents(results).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return target


def test_a_second_export_is_equal_in_every_byte_and_keeps_the_answer(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    runs, results = exported
    again = copy_of(results, tmp_path)
    export_results(runs, again, report=REPORT)
    write_index(again)
    assert contents(again) == contents(results)
    page = (again / REPORT.experiment / "README.md").read_text("utf-8")
    assert "Ряд теряет 1.0 нат." in page and page.count("<!-- generated: numbers -->") == 1
    assert check_results_folder(again) == []


def test_the_rows_are_the_finished_runs(exported: tuple[Path, Path]) -> None:
    folder = exported[1] / REPORT.experiment
    runs = read_runs(folder).set_index("run")
    assert list(runs.index) == [f"{v}-layers=2-s{s}" for v in VARIANTS for s in (0, 1)]
    assert list(runs.columns) == [
        "variant", "model.num_layers", "seed", "digest", "commit", "dirty", "seconds",
        "accuracy", "accuracy_low", "accuracy_high", "accuracy_chance", LOSS,
    ]  # fmt: skip
    row = runs.loc["row-layers=2-s1"]
    assert row["seconds"] == 90 and row["accuracy_low"] == pytest.approx(0.56)
    assert row[LOSS] == pytest.approx(loss_at("row", 1, 999), rel=1e-5)
    assert [name for name, _, _ in read_configs(folder)] == list(runs.index)


def test_curves_are_thinned_to_their_own_points_with_both_ends(
    exported: tuple[Path, Path],
) -> None:
    curves = read_curves(exported[1] / REPORT.experiment)
    for run, curve in curves.groupby("run"):
        variant, seed = curve[["variant", "seed"]].iloc[0]
        steps = list(curve["step"])
        assert (len(steps), steps[0], steps[-1]) == (POINTS_PER_CURVE, 0, 999), run
        assert steps == sorted(set(steps)) and max(np.diff(steps)) <= 6
        exact = [loss_at(variant, seed, step) for step in steps]
        assert list(curve["value"]) == pytest.approx(exact, rel=1e-5)


def test_a_continued_run_keeps_the_later_value_of_a_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs", "row", 0)
    run = folder.name
    journal = EventLog(folder, experiment=REPORT.experiment, run=run, digest=f"digest-{run}")
    journal.append("metrics", step=999, metrics={LOSS: 7.0, LATE: "nan", "decoder/train/loss": 1})
    journal.close()
    curves = read_curves(export_results(tmp_path / "runs", tmp_path / "results", report=REPORT))
    by_metric = curves.set_index(["metric", "step"])["value"]
    assert by_metric[LOSS, 999] == 7.0 and math.isnan(by_metric[LATE, 999])
    # In a sweep, training curves would make up most of the tables.
    assert set(curves["metric"]) == {LOSS, LATE}


def test_the_table_says_mean_spread_and_chance(exported: tuple[Path, Path]) -> None:
    page = (exported[1] / REPORT.experiment / "README.md").read_text("utf-8")
    accuracies = [0.6, 0.61]
    mean, spread = np.mean(accuracies), np.std(accuracies, ddof=1)
    losses = [float(f"{loss_at('row', seed, 999):.6g}") for seed in (0, 1)]
    loss = f"{np.mean(losses):.4g} ± {np.std(losses, ddof=1):.2g}"
    assert f"| row | 2 | 2 | {loss} | {mean:.4g} ± {spread:.2g} |" in page
    assert "| _chance_ |  |  |  | 0.25 |" in page
    assert "4 runs, 6 minutes in all, commit `0123456789`" in page


def test_one_run_is_shown_with_its_interval(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "row", 0)
    folder = export_results(tmp_path / "runs", tmp_path / "results", report=REPORT)
    assert "0.6 [0.55, 0.65]" in (folder / "README.md").read_text("utf-8")


def test_of_a_series_of_samples_the_last_is_kept(exported: tuple[Path, Path]) -> None:
    samples = exported[1] / REPORT.experiment / "samples"
    names = sorted(path.name for path in samples.iterdir())
    # All variants have a sheet of prompts, so that a site can compare them.
    assert names == [f"{variant}-layers=2-s0-grid-000900.png" for variant in VARIANTS]
    # The page has room for the figures and the most informative images alone.
    page = (samples.parent / "README.md").read_text("utf-8")
    assert page.count("](samples/") == MAX_PAGE_IMAGES - len(REPORT.figures) == 1


def test_the_index_has_question_answer_and_cost(exported: tuple[Path, Path]) -> None:
    (row,) = [
        line
        for line in (exported[1] / "README.md").read_text("utf-8").splitlines()
        if REPORT.experiment in line
    ]
    assert row.replace(r"\|", "").count("|") == 7
    assert "Does the row mask lose anything?" in row and "| 4 | 6 | `0123456789` |" in row
    assert "Ряд теряет 1.0 нат. |" in row and "дважды" not in row


def test_a_redraw_needs_nothing_but_the_csv_files(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    original = exported[1] / REPORT.experiment
    folder = tmp_path / REPORT.experiment
    folder.mkdir(parents=True)
    for name in ("report.json", "runs.csv", "curves.csv", "environment.json"):
        (folder / name).write_bytes((original / name).read_bytes())
    drawn = redraw(tmp_path)
    assert [path.name for path in drawn] == [figure.file for figure in REPORT.figures]
    assert contents(folder / "figures") == contents(original / "figures")
    # The page is regenerated too, around the text written by hand.
    answer_by_hand(folder / "README.md", "Ряд теряет 1.0 нат. Проверено дважды.")
    redraw(tmp_path, experiment=REPORT.experiment)
    page, whole = (each / "README.md" for each in (folder, original))
    assert (
        page.read_text("utf-8").partition("![")[0] == whole.read_text("utf-8").partition("![")[0]
    )
    for path in draw_pngs(tmp_path, tmp_path / "slides"):
        assert path.read_bytes()[1:4] == b"PNG" and path.parent.name == folder.name


def test_results_never_meet_the_runs_and_slides_never_the_results(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    runs, results = exported
    before = contents(results)
    for target in (results, results / REPORT.experiment, results / REPORT.experiment / "slides"):
        with pytest.raises(ValueError, match=r"^--png: expected a path apart from "):
            draw_pngs(results, target)
    assert contents(results) == before
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "results").symlink_to("runs")
    before = contents(tmp_path / "runs")
    with pytest.raises(ValueError, match=r"^results: expected a path apart from "):
        export_results(tmp_path / "runs", tmp_path / "results", report=REPORT)
    assert contents(tmp_path / "runs") == before


def test_the_report_is_read_back_as_it_was(exported: tuple[Path, Path]) -> None:
    assert read_report(exported[1] / REPORT.experiment) == REPORT


def edit_cell(path: Path, column: str, value: str) -> None:
    rows = list(csv.reader(path.read_text("utf-8").splitlines()))
    rows[1][rows[0].index(column)] = value
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def forge(folder: Path, what: str) -> None:
    if what == "figure":
        figure = folder / "figures" / REPORT.figures[0].file
        figure.write_bytes(figure.read_bytes().replace(b"</svg>", b"<!-- --></svg>"))
    elif what == "value":
        edit_cell(folder / "runs.csv", "accuracy", "0.9")
    elif what == "dirty":
        edit_cell(folder / "runs.csv", "dirty", "true")
    elif what == "config":
        lines = (folder / CONFIG_LINES).read_text("utf-8").splitlines(keepends=True)
        (folder / CONFIG_LINES).write_text("".join(lines[1:]), "utf-8")
    elif what == "file":
        (folder / "environment.json").unlink()
    elif what == "report":
        (folder / "report.json").unlink()
    elif what == "number":
        answer_by_hand(folder / "README.md", "Ряд теряет 1.3 нат. Проверено дважды.")
    elif what == "answer":
        readme = folder / "README.md"
        readme.write_text(with_finding(readme.read_text("utf-8"), UNANSWERED), "utf-8")
    elif what == "section":
        readme = folder / "README.md"
        readme.write_text(readme.read_text("utf-8").replace("## Setup", "## Method"), "utf-8")


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("figure", "curves-val-loss-image.svg: differs from the CSV files"),
        ("value", "generated part differs from runs.csv"),
        ("dirty", "used code that differs from its commit"),
        ("config", "is missing in configs.jsonl"),
        ("file", "environment.json missing"),
        ("report", "report.json missing"),
        ("number", "README.md: 1.3: not found in any file that the page names"),
        ("answer", "Finding is not written"),
        ("section", "expected the sections Finding, Setup"),
    ],
)
def test_a_change_by_hand_is_found(
    exported: tuple[Path, Path], tmp_path: Path, what: str, problem: str
) -> None:
    results = copy_of(exported[1], tmp_path)
    assert what == "figure" or check_results_folder(results) == []
    forge(results / REPORT.experiment, what)
    assert any(problem in line for line in check_results_folder(results)), check_results_folder(
        results
    )


def test_a_wrong_digest_and_an_old_index_are_found(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    results = copy_of(exported[1], tmp_path)
    assert (
        check_results_folder(results, digest=lambda _, content: f"digest-{content['run']}") == []
    )
    assert len(check_results_folder(results, digest=lambda *_: "other")) == 4
    answer_by_hand(results / REPORT.experiment / "README.md", "Иначе!")
    assert ["index" in line for line in check_results_folder(results)] == [True]


def test_the_results_of_this_repository_are_whole() -> None:
    assert (
        check_results_folder(
            Path(__file__).parent.parent / "results",
            digest=lambda path, content: run_of(path, content).digest,
        )
        == []
    )


def test_only_the_named_runs_are_exported_and_none_is_an_error(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    report = Report("masks/patterns", "Title", "Question?", "x.yaml")
    places = tmp_path / "runs", tmp_path / "results"
    runs = {("row-layers=2-s0", "digest-row-layers=2-s0")}
    assert list(read_runs(export_results(*places, report=report, runs=runs))["run"]) == [
        "row-layers=2-s0"
    ]
    # A failed run does not match, nor does a name with the digest of another run.
    for name in ("row-layers=2-s2", "row-layers=2-s0"):
        with pytest.raises(ValueError, match="no finished run to export"):
            export_results(*places, report=report, runs={(name, "digest-row-layers=2-s2")})


@pytest.mark.parametrize("has_answer", [True, False])
def test_an_export_that_fails_changes_nothing(
    exported: tuple[Path, Path], tmp_path: Path, has_answer: bool
) -> None:
    runs, results = exported
    before = copy_of(results, tmp_path / "results") if has_answer else tmp_path / "results"
    kept = contents(before)
    with pytest.raises(ValueError, match=r"report\.table: expected a column of .*, got 'speed'"):
        export_results(runs, before, report=replace(REPORT, columns=("speed",)))
    assert contents(before) == kept
    assert not list(runs.glob(".export-*"))


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "row", 0)
    report = Report("masks/patterns", "T", "Q?", "x.yaml", columns=("val/los",))
    with pytest.raises(
        ValueError, match=r"expected a column of .*val/loss/image.*, got 'val/los'"
    ):
        export_results(tmp_path / "runs", tmp_path / "results", report=report)


def test_replacing_the_generated_part_keeps_the_text_around_it() -> None:
    page = fill("# T\n\nAnswer.\n", {"numbers": "one"})
    page += "\nAfter.\n"
    again = fill(page, {"numbers": "two"})
    assert again == f"# T\n\nAnswer.\n\n{marked('numbers', 'two')}\n\nAfter.\n"
    assert fill(again, {"numbers": "two"}) == again
    assert without_generated(again).split() == ["#", "T", "Answer.", "After."]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# T\n\n## Finding\n\nIt loses 0.3 nats.  Twice.", "It loses 0.3 nats."),
        ("# T\n\n## Finding\n\nНет\nответа\n\n## Setup", "Нет ответа"),
        ("# T\n\n## Finding\n\n## Setup\n\nText.", ""),
        ("# T\n", ""),
    ],
)
def test_the_answer_is_the_first_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "README.md").write_text(f"{text}\n", "utf-8")
    assert finding_of(tmp_path / "README.md") == sentence


def test_numbers_survive_the_csv_files(tmp_path: Path) -> None:
    values = {"a": 1 / 3, "b": 1e-12, "c": float("inf"), "d": 10_000_019}
    write_run(tmp_path / "runs", "row", 0, metrics=values, intervals={}, chance={})
    report = Report("masks/patterns", "T", "Q?", "x.yaml")
    frame = read_runs(export_results(tmp_path / "runs", tmp_path / "results", report=report))
    assert isinstance(frame, pd.DataFrame)
    assert {name: frame[name][0] for name in values} == pytest.approx(values, rel=1e-5)
    assert frame["d"][0] == 10_000_019


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("masks/pattern", "; did you mean masks/patterns?"),
        ("masks", "; there are masks/patterns"),
        ("nothing", "; there are masks/patterns"),
    ],
)
def test_an_unknown_experiment_is_answered_with_the_known_ones(
    tmp_path: Path, monkeypatch, capsys, name: str, advice: str
) -> None:
    (tmp_path / "results" / REPORT.experiment).mkdir(parents=True)
    (tmp_path / "results" / REPORT.experiment / "report.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--png", "slides"]):
        assert main(["figures", name, *flags]) == 2
        message = capsys.readouterr().err
        assert message == f"rudolph: {name}: no experiment has this name in results{advice}\n"


@pytest.mark.parametrize("command", ["check", "figures"])
def test_a_command_for_results_asks_for_their_folder(
    tmp_path: Path, monkeypatch, capsys, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 2
    assert capsys.readouterr().err.startswith("rudolph: results: no such folder")
    assert list(tmp_path.iterdir()) == []
