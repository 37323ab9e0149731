"""The results folder: the record of an experiment, readable without a server.

Redrawing the figures and pages checks that they follow from the tables.

    results/README.md                index of all experiments
    results/<experiment>/README.md   the handwritten answer; tables between two markers
      report.json                    title, question, and which table and figures to make
      runs.csv, curves.csv           one row per finished run; thinned curves
      report_card.csv                every score of every run, see ``report_cards``
      repetitions.csv, profiles/*.csv of speed experiments, see ``timings``
      config.yaml, configs.jsonl     the first run's settings in full; differences of each run
      environment.json, samples/<run>-*.png
      figures/*.svg                  drawn from the CSV files next to them and nothing else

Every export replaces ``samples``, ``profiles`` and ``figures``, so keep no other files there.
"""

import csv
import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from rudolph.files.atomic import (
    json_text,
    require_disjoint_paths,
    warn_once,
    write_json,
    write_text,
)
from rudolph.reports.check import known_numbers, unverified_on_page
from rudolph.reports.experiment_names import results_folders
from rudolph.reports.partial import available_report
from rudolph.reports.report import (
    BOUNDS,
    MAX_PAGE_IMAGES,
    SAMPLE_ORDER,
    SECTIONS,
    UNANSWERED,
    WITHOUT_LIMITS,
    experiment_parts,
    fill,
    finding_of,
    index_page,
    new_page,
    read_curves,
    read_effects,
    read_runs,
    sample_rank,
    section_of,
    with_finding,
)
from rudolph.reports.report_cards import export_cards, mean_card, read_card
from rudolph.reports.run_configs import CONFIG_LINES, read_configs, write_configs
from rudolph.reports.run_files import (
    FIXED,
    RERUN_ADVICE,
    finished_runs,
    run_row,
)
from rudolph.reports.schema import CARD, OVERHEAD, Report, format_cell_value, read_report
from rudolph.reports.search_tables import read_regions, write_regions
from rudolph.reports.timings import export_timings
from rudolph.tracking.event_log import file_lock, read_event_log
from rudolph.tracking.run_directory import RunDirectory

INDEX_HEAD = "# Results\n\nOne row per experiment; each folder has its answer, tables and figures."
POINTS_PER_CURVE = 200
# Jobs of one array may finish together; each waits this many seconds for another's export.
EXPORT_TIMEOUT = 300
# At most this many sheets of the first kinds in ``SAMPLE_ORDER``, with one image per prompt.
MAX_COMPARED_SAMPLES = 8
COMPARED_RANKS = range(SAMPLE_ORDER.index("answers") + 1)
_BOUND_ENDS = tuple(f"_{bound}" for bound in BOUNDS)


def export_results(
    runs_folder: Path,
    results_folder: Path,
    *,
    report: Report,
    runs: Collection[tuple[str, str]] | None = None,
) -> Path:
    """Write ``results/<experiment>`` from the finished runs; handwritten text is kept.

    Args:
        runs_folder: the folder of all runs, by experiment.
        results_folder: the folder of all results, by experiment.
        report: the report to export.
        runs: name and digest of the runs that belong to the experiment now; None for all.

    Returns:
        The experiment's results folder.

    Raises:
        ValueError: if no run has finished.
    """
    finished = _finished(runs_folder / report.experiment, runs)
    if not finished:
        raise ValueError(f"{runs_folder / report.experiment}: no finished run to export")
    folder = results_folder / report.experiment
    require_disjoint_paths(folder, runs_folder / report.experiment, "results")
    # The new folder is first completed next to the runs, so a failed export changes nothing.
    with (
        file_lock(runs_folder / "export.lock", EXPORT_TIMEOUT),
        tempfile.TemporaryDirectory(prefix=".export-", dir=runs_folder) as scratch,
    ):
        new, old = Path(scratch, "made"), Path(scratch, "before")
        if folder.exists():
            shutil.copytree(folder, new)
        _write_experiment(new, report, finished)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.move(folder, old)
        shutil.move(new, folder)
    return folder


def _write_experiment(
    folder: Path, report: Report, finished: Sequence[tuple[Path, dict[str, Any]]]
) -> None:
    for name in ("samples", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    previous = _written_before(folder)
    write_text(folder / "runs.csv", _csv(_run_rows([summary for _, summary in finished])))
    write_text(folder / "curves.csv", _csv(_curve_rows(finished, report)))
    write_text(folder / "environment.json", _environments(finished))
    _copy_samples(folder, finished, max(MAX_PAGE_IMAGES - len(report.figures), 0))
    runs = {str(summary["run"]): run_folder for run_folder, summary in finished}
    write_configs(
        folder,
        {name: RunDirectory(run_folder).config for name, run_folder in runs.items()},
        {str(summary["run"]): str(summary["digest"]) for _, summary in finished},
    )
    export_timings(runs, folder)
    export_cards(runs, folder)
    report = available_report(report, folder)
    _write_report(folder, report)
    if report.search is not None:
        write_regions(folder, report.search, read_runs(folder))
    _draw(folder, folder / "figures")
    if previous is not None:
        digests = set(read_runs(folder)["digest"])
        _keep_answer_apart(folder / "README.md", previous, report, digests)
    _write_page(folder)


def _write_report(folder: Path, report: Report) -> None:
    content = asdict(report)
    if not report.missing:
        del content["missing"]
    if report.search is None:
        del content["same_pairs"]
    write_json(folder / "report.json", content)


def _copy_samples(
    folder: Path, finished: Sequence[tuple[Path, dict[str, Any]]], num_samples: int
) -> None:
    """Copy the last images of the first run of each variant.

    At most ``num_samples`` are for the page; sheets that compare the variants follow.
    """
    samples: dict[str, Path] = {}
    first_runs: dict[str, str] = {}
    for name, variant in sorted(
        (str(summary["run"]), str(summary["variant"])) for _, summary in finished
    ):
        first_runs.setdefault(variant, name)
    for run_folder, summary in finished:
        if summary["run"] in first_runs.values():
            for sample in _last_samples(RunDirectory(run_folder).samples):
                samples[f"{summary['run']}-{sample.name}"] = sample
    ordered = sorted(samples, key=lambda name: sample_rank(Path(name).stem))
    compared = [name for name in ordered if sample_rank(Path(name).stem)[0] in COMPARED_RANKS]
    for name in {*ordered[:num_samples], *compared[:MAX_COMPARED_SAMPLES]}:
        shutil.copyfile(samples[name], folder / "samples" / name)


def _written_before(folder: Path) -> tuple[Report, set[str]] | None:
    """Return the report and digests of an earlier export; None if they cannot be read."""
    try:
        return read_report(folder), set(read_runs(folder)["digest"])
    except (OSError, ValueError, KeyError):
        return None


def _keep_answer_apart(
    readme: Path, before: tuple[Report, set[str]], report: Report, digests: set[str]
) -> None:
    """Update a page's title; put a note above an answer that belongs to another question."""
    if not readme.is_file():
        return
    old, old_digests = before
    page = readme.read_text("utf-8")
    heading = f"# {old.title}\n"
    if page.startswith(heading):
        page = f"# {report.title}\n{page.removeprefix(heading)}"
    is_other = old.question != report.question and not digests & old_digests
    if is_other and finding_of(readme):
        page = with_finding(page, f"{UNANSWERED}\n\n{section_of(page, 'Finding')}")
        warn_once(f"{report.experiment}: its answer was written for another question. Rewrite it")
    write_text(readme, page)


def _write_page(folder: Path) -> None:
    """Write the README of an experiment; handwritten text is kept."""
    readme = folder / "README.md"
    page = readme.read_text("utf-8") if readme.exists() else new_page(read_report(folder).title)
    write_text(readme, fill(page, experiment_parts(folder)))


def redraw(results_folder: Path, *, experiment: str | None = None) -> list[Path]:
    """Draw the figures and write the pages of one experiment, or of all, from their CSV files.

    Figures that a report no longer names are deleted, and the index is rewritten.

    Returns:
        The paths of the figures.

    Raises:
        ValueError: if there are no results, or no experiment has this name.
    """
    paths = []
    for folder in results_folders(results_folder, experiment):
        new_paths = _draw(folder, folder / "figures")
        # Remove figures that the report no longer includes.
        for path in set((folder / "figures").glob("*")) - set(new_paths):
            path.unlink()
        paths += new_paths
        _write_page(folder)
    write_index(results_folder)
    return paths


def draw_pngs(results_folder: Path, target: Path, *, experiment: str | None = None) -> list[Path]:
    """Draw the same figures as PNG, for slides, in a folder per experiment below ``target``.

    Raises:
        ValueError: if there are no results, no experiment has this name, or ``target`` overlaps
            with the results.
    """
    folders = results_folders(results_folder, experiment)
    targets = {folder: target / folder.relative_to(results_folder) for folder in folders}
    for target_folder, folder in itertools.product(targets.values(), folders):
        require_disjoint_paths(target_folder, folder, "--png")
    return [
        path
        for folder, target_folder in targets.items()
        for path in _draw(folder, target_folder, ".png")
    ]


def write_index(results_folder: Path) -> Path:
    """Write the generated part of ``results/README.md``; handwritten text is kept."""
    path = results_folder / "README.md"
    text = path.read_text("utf-8") if path.exists() else INDEX_HEAD + "\n"
    write_text(path, fill(text, {"index": index_page(results_folder)}))
    return path


def check_results_folder(
    results_folder: Path, *, digest: Callable[[Path, Mapping[str, Any]], str] | None = None
) -> list[str]:
    """Return the problems of the results, one line each; empty if all is as an export left it.

    Args:
        results_folder: the folder of all results.
        digest: computes the digest of a configuration, to compare with ``runs.csv``; its path
            argument is named in messages.

    Raises:
        ValueError: if there is no folder of results.
    """
    tables = {path.parent for path in results_folder.rglob("runs.csv")}
    folders = sorted(tables | set(results_folders(results_folder, None)))
    problems = [line for folder in folders for line in _check(folder, digest)]
    if not problems:
        # Each page may name any experiment.
        known = cache(known_numbers)
        pages = [folder / "README.md" for folder in folders]
        for page in (*pages, results_folder.parent / "README.md"):
            numbers = unverified_on_page(page, results_folder, known) if page.is_file() else ()
            problems += [
                f"{page}: {number}: not found in any file that the page names"
                for number in numbers
            ]
        index = results_folder / "README.md"
        text = index.read_text("utf-8") if index.exists() else ""
        if fill(text, {"index": index_page(results_folder)}) != text:
            problems.append(f"{index}: the index differs from the folders. Write it again")
    return problems


def _finished(
    folder: Path, runs: Collection[tuple[str, str]] | None
) -> list[tuple[Path, dict[str, Any]]]:
    """Return folder and summary of each finished run; damaged runs are named in a warning."""
    summaries = finished_runs(folder, advice=f"it is skipped; {RERUN_ADVICE}")
    return [
        (path, summary)
        for path, summary in summaries
        if runs is None or (summary["run"], summary["digest"]) in runs
    ]


def _run_rows(summaries: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    grid = sorted({name for summary in summaries for name in summary.get("grid", {})})
    metrics = sorted({name for summary in summaries for name in summary["metrics"]})
    rows = [run_row(summary) for summary in summaries]
    present = {name for row in rows for name in row}
    values = [f"{metric}{bound}" for metric in metrics for bound in ("", *_BOUND_ENDS)]
    overhead = [OVERHEAD] if OVERHEAD in present else []
    header = [*FIXED[:2], *grid, *FIXED[2:-1], *overhead, FIXED[-1]]
    header += [name for name in values if name in present]
    yield header
    for row in sorted(rows, key=lambda row: str(row["run"])):
        yield [format_cell_value(row.get(name)) for name in header]


def _curve_rows(
    finished: Sequence[tuple[Path, Mapping[str, Any]]], report: Report
) -> Iterator[list[str]]:
    """Yield the curves of validation metrics and those that a figure shows."""
    drawn_metrics = {
        metric for figure in report.figures if figure.kind == "curves" for metric in figure.y
    }
    yield ["run", "metric", "step", "value"]
    for folder, summary in sorted(finished, key=lambda pair: str(pair[1]["run"])):
        points: dict[str, dict[int, float]] = {}
        for _, record in read_event_log(RunDirectory(folder).event_log):
            # A run that was continued repeats steps: the later value is the one that counted.
            for name, value in record.get("metrics", {}).items():
                points.setdefault(name, {})[record["step"]] = value
        kept = {name for name in points if name in drawn_metrics or "/val/" in name}
        for name, curve in sorted((name, points[name]) for name in kept):
            for step, value in _thinned(sorted(curve.items())):
                yield [summary["run"], name, str(step), format_cell_value(value)]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most ``POINTS_PER_CURVE`` evenly spaced points, with the first and the last."""
    last, last_index = len(points) - 1, POINTS_PER_CURVE - 1
    if last <= last_index:
        return points
    return [
        points[(number * last + last_index // 2) // last_index] for number in range(last_index + 1)
    ]


def _csv(rows: Iterator[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _environments(finished: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """Return the JSON of each distinct environment, with the runs executed in it."""
    runs_of_environment: dict[str, list[str]] = {}
    for folder, summary in finished:
        environment = RunDirectory(folder).read_environment()
        key = json.dumps(environment, sort_keys=True, ensure_ascii=False)
        runs_of_environment.setdefault(key, []).append(summary["run"])
    entries = [
        {"runs": sorted(runs)} | json.loads(key) for key, runs in runs_of_environment.items()
    ]
    entries.sort(key=lambda entry: str(entry["runs"]))
    return json_text(entries, indent=1) + "\n"


def _last_samples(folder: Path) -> list[Path]:
    """Return the last image of each numbered series, and every image without a number."""
    series: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        stem = path.stem.rstrip("0123456789")
        series.setdefault(stem, []).append((int(path.stem[len(stem) :] or 0), path))
    return [max(images)[1] for _, images in sorted(series.items())]


# The table that a figure is drawn from, unless it is ``runs.csv``.
FRAMES: dict[str, Callable[[Path], pd.DataFrame]] = {
    "curves": read_curves,
    "card": lambda folder: read_card(folder / CARD),
    "best_of": lambda folder: read_card(folder / CARD),
    "shots": lambda folder: mean_card(read_card(folder / CARD)),
    "regions": read_regions,
    "forest": lambda folder: pd.DataFrame(read_effects(folder)),
}


def _draw(folder: Path, target: Path, suffix: str = ".svg") -> list[Path]:
    # Drawing needs matplotlib; exporting tables and checking texts does not wait for it.
    from rudolph.reports.figures import FIGURES
    from rudolph.reports.style import warned_drawing

    paths = []
    for figure in read_report(folder).figures:
        if figure.kind not in FIGURES:
            raise ValueError(
                f"figure: expected a kind of {', '.join(FIGURES)}, got {figure.kind!r}"
            )
        frame = FRAMES.get(figure.kind, read_runs)(folder)
        path = (target / figure.file).with_suffix(suffix)
        with warned_drawing():
            FIGURES[figure.kind](frame, path, y=figure.y, x=figure.x, group_column=figure.by)
            paths.append(path)
    return paths


def _check(folder: Path, digest: Callable[[Path, Mapping[str, Any]], str] | None) -> Iterator[str]:
    needed = ("report.json", "README.md", "runs.csv", "curves.csv", "environment.json")
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        yield f"{folder}: {', '.join(missing)} missing"
        return
    runs = read_runs(folder)
    yield from _check_runs(folder, runs, digest)
    try:
        yield from _check_figures(folder)
        page = (folder / "README.md").read_text("utf-8")
        if fill(page, experiment_parts(folder)) != page:
            yield f"{folder}/README.md: the generated part differs from runs.csv. Export again"
    except ValueError as error:
        yield f"{folder}: {error}"
    page = (folder / "README.md").read_text("utf-8")
    headings = tuple(re.findall(r"(?m)^## (.+)$", page))
    if headings != SECTIONS:
        yield (
            f"{folder}/README.md: expected the sections {', '.join(SECTIONS)}, "
            f"got {', '.join(headings) or 'none'}"
        )
    for section in ("Finding", "Limitations"):
        text = section_of(page, section)
        if not text or text.startswith((UNANSWERED, WITHOUT_LIMITS)):
            yield f"{folder}/README.md: {section} is not written"


def _check_runs(
    folder: Path, runs: pd.DataFrame, digest: Callable[[Path, Mapping[str, Any]], str] | None
) -> Iterator[str]:
    try:
        configs = {name: content for name, _, content in read_configs(folder)}
    except (OSError, ValueError) as error:
        yield str(error)
        configs = {}
    names = set(runs["run"])
    for name in sorted(names ^ set(configs)):
        file_name = "runs.csv" if name in configs else CONFIG_LINES
        yield f"{folder}: run {name} is missing in {file_name}"
    for name in sorted(set(pd.read_csv(folder / "curves.csv", dtype=str)["run"]) - names):
        yield f"{folder}/curves.csv: run {name} is missing in runs.csv"
    for row in runs.to_dict("records"):
        if row["dirty"] or row["commit"] == "unknown":
            yield f"{folder}: run {row['run']} used code that differs from its commit"
        content = configs.get(row["run"])
        if digest is None or content is None:
            continue
        if digest(folder / CONFIG_LINES, content) != row["digest"]:
            yield f"{folder / CONFIG_LINES}: the digest of {row['run']} differs from runs.csv"


def _check_figures(folder: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as scratch:
        expected = {path.name: path.read_bytes() for path in _draw(folder, Path(scratch))}
    actual = {path.name: path.read_bytes() for path in (folder / "figures").glob("*")}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            yield f"{folder}/figures/{name}: differs from the CSV files. Redraw it"
