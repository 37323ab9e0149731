"""Verbs of what experiments leave: export, figures, check, sync."""

from pathlib import Path
from typing import Any

from rudolph.console import say

RESULTS = Path("results")


def add_results(verbs: Any) -> None:
    export = verbs.add_parser("export", help="write results/ from the finished runs")
    export.add_argument("file", type=Path)
    export.set_defaults(verb=export_experiment)
    figures = verbs.add_parser("figures", help="redraw the figures of results/ from their CSV")
    figures.add_argument("experiment", nargs="?")
    figures.set_defaults(verb=redraw_figures)
    check = verbs.add_parser("check", help="check that results/ is whole and consistent")
    check.set_defaults(verb=check_results)
    sync = verbs.add_parser("sync", help="send to MLflow what a server that was away missed")
    sync.add_argument("--again", action="store_true", help="everything, for a store that was lost")
    sync.set_defaults(verb=sync_runs)


def folders_here() -> Any:
    """A checkout is where the command is given."""
    from rudolph.execution import Folders

    return Folders(Path.cwd(), Path.cwd() / "runs")


def write_results(loaded: Any, folders: Any) -> Path:
    from rudolph.results.report import Figure, Report
    from rudolph.results.store import export, write_index

    source = loaded.path
    if source.resolve().is_relative_to(Path.cwd()):
        source = source.resolve().relative_to(Path.cwd())
    grid = sorted({key for run in loaded.runs for key in run.grid})
    rows = ("variant", *grid) if any(run.variant for run in loaded.runs) else (*grid, "run")
    table, curves = loaded.report.table, loaded.report.curves
    figures = [Figure("curves", curves, by=rows[0])] if curves else []
    if table:
        has_ratios = all(metric.endswith("/times_reference") for metric in table)
        kind = "ratios" if has_ratios else "intervals"
        figures.append(Figure(kind, table, x="seed", by=rows[0]))
    report = Report(
        experiment=loaded.name,
        title=loaded.title,
        question=loaded.question,
        source=source.as_posix(),
        rows=rows,
        columns=table,
        figures=tuple(figures),
    )
    folder = export(
        folders.runs, RESULTS, report=report, digests={run.config.digest for run in loaded.runs}
    )
    write_index(RESULTS)
    return folder


def export_experiment(given: Any) -> int:
    from rudolph.config import load_experiment

    say(f"results: {write_results(load_experiment(given.file), folders_here())}")
    return 0


def redraw_figures(given: Any) -> int:
    from rudolph.results.store import redraw

    say("\n".join(map(str, redraw(RESULTS, experiment=given.experiment))))
    return 0


def check_results(given: Any) -> int:
    from rudolph.config import read_run
    from rudolph.results.store import check

    problems = check(RESULTS, digest=lambda path: read_run(path).digest)
    say("\n".join([*problems, f"{len(problems)} problems"]) if problems else "results are whole")
    return 1 if problems else 0


def sync_runs(given: Any) -> int:
    from rudolph.results.tracking import send_pending, tracking_uri

    sent = send_pending(folders_here().runs, tracking_uri(Path.cwd()), again=given.again)
    say(f"sent {sent.records} records of {sent.runs} runs; {sent.waiting} runs wait")
    return 1 if sent.waiting else 0
