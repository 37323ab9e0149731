"""Verbs of what experiments leave: export, figures, check, sync."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rudolph.runs.console import print_line, stage_progress

RESULTS_FOLDER = Path("results")
EXPERIMENTS_PAGE = Path("experiments/README.md")
# Quantities of a speed experiment whose contestants stand on one axis.
ON_ONE_AXIS = ("/speedup", "/peak_bytes")


def add_results(verbs: Any) -> None:
    export_results = verbs.add_parser("export", help="write results/ from the finished runs")
    export_results.add_argument("file", type=Path)
    export_results.set_defaults(verb=export_experiment)
    figures = verbs.add_parser("figures", help="figures and pages of results/, anew from CSV")
    figures.add_argument("experiment", nargs="?")
    figures.add_argument("--png", type=Path, metavar="FOLDER", help="as PNG, in another folder")
    figures.set_defaults(verb=redraw_figures)
    check_results_folder = verbs.add_parser(
        "check", help="recompute results/ and every number in its texts"
    )
    check_results_folder.set_defaults(verb=check_results)
    sync = verbs.add_parser("sync", help="send to MLflow what a server that was away missed")
    sync.add_argument("--again", action="store_true", help="everything, for a store that was lost")
    sync.set_defaults(verb=sync_runs)
    share = verbs.add_parser("share", help="give the runs of an experiment to others")
    share.add_argument("experiment", help="its name, or a folder that `share` made of it")
    share.add_argument(
        "--to", required=True, metavar="FOLDER|URI", help="a folder, or a tracking server"
    )
    share.add_argument("--no-weights", action="store_true", help="leave the checkpoints out")
    share.set_defaults(verb=share_runs)


def add_report_card(verbs: Any) -> None:
    card = verbs.add_parser(
        "report-card", help="every score of a run with interval, chance level and count"
    )
    card.add_argument("run", help="a run's folder, or the id of an MLflow run")
    card.add_argument("other", nargs="?", help="another run, to be compared score by score")
    card.add_argument("--again", action="store_true", help="ask all questions again")
    card.set_defaults(verb=report_card)


def folders_here() -> Any:
    """A checkout is where the command is given."""
    from rudolph.runs.execution import Folders

    return Folders(Path.cwd(), Path.cwd() / "runs")


def local_run_folder(run: str) -> Path:
    """The folder of a run, fetched if it is one of MLflow; ``ValueError`` for other sources."""
    from rudolph.runs.resolve import find_folder, is_run
    from rudolph.tracking.tracker import tracking_uri

    folders = folders_here()
    folder = find_folder(run, runs=folders.runs, uri=tracking_uri(folders.checkout))
    if not is_run(folder):
        raise ValueError(f"{folder}: must be the folder of a run, with its config.yaml")
    return folder


def write_results(loaded: Any, folders: Any) -> Path:
    from rudolph.reports.report import Report
    from rudolph.reports.store import export_results, write_index
    from rudolph.runs.runner import all_runs, missing_runs, require_own_experiments
    from rudolph.runs.scale import scale_of
    from rudolph.runs.search import groups_sharing_pairs

    require_own_experiments([loaded], folders, RESULTS_FOLDER)
    source = loaded.path
    if source.resolve().is_relative_to(Path.cwd()):
        source = source.resolve().relative_to(Path.cwd())
    runs = all_runs(loaded, folders)
    grid = sorted({key for run in loaded.runs for key in run.grid})
    names = ("variant",) if any(run.variant for run in runs) else ()
    rows = (*names, *grid) or ("run",)
    report = Report(
        experiment=loaded.name,
        title=loaded.title,
        question=loaded.question,
        source=source.as_posix(),
        rows=rows,
        columns=loaded.report.table,
        figures=tuple(_figures(loaded, grid, by=rows[0])),
        claim=loaded.claim,
        effects=loaded.report.effects,
        against=loaded.report.against,
        search=loaded.search,
        missing=missing_runs(loaded, folders),
        scale=scale_of([run.config for run in runs]),
        same_pairs=groups_sharing_pairs(loaded),
    )
    belonging = {(run.name, run.config.digest) for run in runs}
    folder = export_results(folders.runs, RESULTS_FOLDER, report=report, runs=belonging)
    write_index(RESULTS_FOLDER)
    return folder


def _figures(loaded: Any, grid: list[str], *, by: str) -> Iterator[Any]:
    """The figures that a report asks for; ``by`` tells runs apart.

    The table's metrics are lines over a grid of one setting, and heat maps over one of two.
    """
    from rudolph.reports.report import Figure

    asked = loaded.report
    claimed = () if loaded.claim is None else (loaded.claim.metric,)
    compared = tuple(dict.fromkeys((*claimed, *asked.effects)))
    if compared:
        yield Figure("forest", compared, x="metric", by="group")
    if loaded.search is not None:
        yield Figure("regions", tuple(loaded.search.space), x="setting", by="domain")
    if asked.curves:
        yield Figure("curves", asked.curves, by=by)
    if asked.table and len(grid) == 2:
        yield Figure("heatmap", asked.table, x=grid[1], by=grid[0])
    elif asked.table and len(grid) == 1:
        yield Figure("lines", asked.table, x=grid[0], by="variant")
    elif asked.table:
        is_of_one_unit = all(metric.endswith(ON_ONE_AXIS) for metric in asked.table)
        yield Figure("ratios" if is_of_one_unit else "intervals", asked.table, x="seed", by=by)
    if asked.pareto:
        yield Figure("pareto", asked.pareto, x="seed", by=by)
    if asked.card:
        yield Figure("card", asked.card, x="score", by="run")
    if asked.best_of:
        yield Figure("best_of", asked.best_of, x="score", by="run")


def export_experiment(given: Any) -> int:
    from rudolph.config.experiment_file import load_experiment

    print_line(f"results: {write_results(load_experiment(given.file), folders_here())}")
    return 0


def report_card(given: Any) -> int:
    from rudolph.reports.report_cards import require_same_data

    folders = [writable(local_run_folder(run)) for run in (given.run, given.other) if run]
    cards = [_card(folder, again=given.again) for folder in folders]
    if given.other:
        both = set(cards[0]["score"]) & set(cards[1]["score"])
        asked = cards[0][cards[0]["score"].isin(both)]
        require_same_data(folders[0], folders[1], set(asked["split"]))
    for line in _card_lines(*cards):
        print_line(line)
    return 0


def writable(folder: Path) -> Path:
    """A run's folder; of the package's own run a copy, since nothing is written into a package."""
    from rudolph.runs.resolve import SHIPPED_RUN

    if folder != SHIPPED_RUN:
        return folder
    copied: Path = folders_here().cache / "shipped"
    shutil.copytree(folder, copied, dirs_exist_ok=True)
    return copied


def _card(folder: Path, *, again: bool) -> Any:
    """The card of a run's folder: the one that it has, or its questions asked now."""
    from rudolph.reports.report_cards import CARD, draw_card, read_card
    from rudolph.runs.stages.evaluation import evaluate_again

    path = folder / CARD
    if again or not path.is_file():
        with stage_progress() as progress:
            evaluate_again(folder, folders_here(), progress)
    print_line(f"{path}, {draw_card(path)}")
    return read_card(path)


def _card_lines(card: Any, other: Any = None) -> Iterator[str]:
    """A line a score; of two cards those that both have, if they were measured alike."""
    from rudolph.evaluation.metrics.answers import MetricProtocol, require_comparable

    beside = {} if other is None else {row["score"]: row for row in other.to_dict("records")}
    for row in card.to_dict("records"):
        line = f"  {row['score']:52} {_told(row)}"
        if other is not None:
            if row["score"] not in beside:
                continue
            second = beside[row["score"]]
            protocols = [str(each["protocol"]) for each in (row, second)]
            try:
                require_comparable(*(MetricProtocol.parse(each) for each in protocols))
            except ValueError as error:
                raise ValueError(f"{row['score']}: {error}") from error
            line += f"   {_told(second)}"
        yield line


def _told(row: Any) -> str:
    chance = "" if row["chance"] != row["chance"] else f" chance {row['chance']:.3g}"
    interval = f"[{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['value']:7.4g} {interval}{chance} of {row['count']}"


def redraw_figures(given: Any) -> int:
    from rudolph.reports.store import draw_pngs, redraw

    if given.png:
        drawn = draw_pngs(RESULTS_FOLDER, given.png, experiment=given.experiment)
    else:
        drawn = redraw(RESULTS_FOLDER, experiment=given.experiment)
        write_reference(EXPERIMENTS_PAGE)
    print_line("\n".join(map(str, drawn)))
    return 0


def write_reference(page: Path) -> None:
    """Write the tables of settings and evaluators into a page that has their markers."""
    from rudolph.config.reference import reference_parts
    from rudolph.files.atomic import write_text
    from rudolph.reports.report import fill, marked

    if page.is_file() and marked("settings", "").splitlines()[0] in page.read_text("utf-8"):
        write_text(page, fill(page.read_text("utf-8"), reference_parts()))


def check_results(given: Any) -> int:
    from rudolph.config.run import run_of
    from rudolph.reports.store import check_results_folder

    problems = check_results_folder(
        RESULTS_FOLDER, digest=lambda path, content: run_of(path, content).digest
    )
    print_line(
        "\n".join([*problems, f"{len(problems)} problems"]) if problems else "results are whole"
    )
    return 1 if problems else 0


def sync_runs(given: Any) -> int:
    from rudolph.tracking.tracker import send_pending, tracking_uri

    sent = send_pending(folders_here().runs, tracking_uri(Path.cwd()), again=given.again)
    print_line(f"sent {sent.records} records of {sent.runs} runs; {sent.waiting} runs wait")
    return 1 if sent.waiting else 0


def share_runs(given: Any) -> int:
    from rudolph.reports import share

    runs, results = folders_here().runs / given.experiment, RESULTS_FOLDER / given.experiment
    if not runs.is_dir():
        runs = Path(given.experiment)
        results = runs / share.RESULT_FILES
    if not runs.is_dir():
        raise ValueError(f"{given.experiment}: neither an experiment in runs/ nor a folder")
    if "://" in given.to:
        for name, run_id in share.send_runs(runs, results, given.to).items():
            print_line(f"{name}: MLflow run {run_id}")
        return 0
    target = Path(given.to)
    packed = share.pack_runs(runs, results, target, has_weights=not given.no_weights)
    print_line("\n".join(map(str, packed)))
    return 0
