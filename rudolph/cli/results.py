"""Commands for results: export, figures, check, site, sync, share and report-card."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rudolph.runs.console import print_line, stage_progress

RESULTS_FOLDER = Path("results")
# Prefix of a Hugging Face model to evaluate, ``hf:FOLDER``.
HUGGING_FACE = "hf:"
EXPERIMENTS_PAGE = Path("experiments/README.md")
# Endings of metrics for which all implementations share one axis in a figure.
ON_ONE_AXIS = ("/speedup", "/peak_bytes")


def add_results(commands: Any) -> None:
    """Add the parsers of all commands for results except ``rudolph report-card``."""
    export_results = commands.add_parser("export", help="write results/ from the finished runs")
    export_results.add_argument("file", type=Path)
    export_results.set_defaults(command=export_experiment)
    figures = commands.add_parser(
        "figures", help="rebuild figures and pages of results/ from the CSV files"
    )
    figures.add_argument("experiment", nargs="?")
    figures.add_argument(
        "--png", type=Path, metavar="FOLDER", help="write PNG files to this folder instead"
    )
    figures.set_defaults(command=redraw_figures)
    check_results_folder = commands.add_parser(
        "check", help="recompute results/ and every number in its texts"
    )
    check_results_folder.set_defaults(command=check_results)
    site = commands.add_parser(
        "site", help="write results/ as web pages with search, which open from disk"
    )
    site.add_argument("folder", type=Path, metavar="FOLDER", help="an earlier site is replaced")
    site.add_argument(
        "--repository", metavar="URL", help="web address that commits link to [git's origin]"
    )
    site.set_defaults(command=write_site)
    sync = commands.add_parser("sync", help="send records to MLflow that the server missed")
    sync.add_argument(
        "--again", action="store_true", help="send everything again, for a lost store"
    )
    sync.set_defaults(command=sync_runs)
    share = commands.add_parser(
        "share", help="copy the runs of an experiment to a folder or a server"
    )
    share.add_argument("experiment", help="name of the experiment, or a folder that `share` wrote")
    share.add_argument(
        "--to", required=True, metavar="FOLDER|URI", help="a folder, or a tracking server"
    )
    share.add_argument("--no-weights", action="store_true", help="leave the checkpoints out")
    share.set_defaults(command=share_runs)


def add_report_card(commands: Any) -> None:
    """Add the parser of ``rudolph report-card``."""
    card = commands.add_parser(
        "report-card", help="print every score of a run with interval, chance level and count"
    )
    card.add_argument(
        "run",
        help="a run's folder, the id of an MLflow run, or hf:FOLDER for a Hugging Face model",
    )
    card.add_argument("other", nargs="?", help="another run to compare score by score")
    card.add_argument("--again", action="store_true", help="run all evaluators again")
    model = card.add_argument_group("evaluation of hf:FOLDER")
    model.add_argument(
        "--experiment", type=Path, metavar="FILE", help="experiment file with data and evaluation"
    )
    model.add_argument("settings", nargs="*", metavar="key=value", help="override the file")
    model.add_argument("--output", type=Path, metavar="FILE.csv", help="also write the scores")
    card.set_defaults(command=report_card)


def runs_here() -> Path:
    """Return the folder of all runs, below the current directory."""
    return Path.cwd() / "runs"


def folders_here() -> Any:
    """Return the folders of a command: the checkout is the current directory."""
    from rudolph.runs.execution import Folders

    return Folders(Path.cwd(), runs_here())


def local_run_folder(run: str) -> Path:
    """Return the folder of a run; download an MLflow run.

    Raises:
        ValueError: If the source is no run.
    """
    from rudolph.runs.resolve import find_folder, is_run
    from rudolph.tracking.tracker import tracking_uri

    folders = folders_here()
    folder = find_folder(run, runs=folders.runs, uri=tracking_uri(folders.checkout))
    if not is_run(folder):
        raise ValueError(f"{folder}: expected the folder of a run, got no config.yaml in it")
    return folder


def write_results(loaded: Any, folders: Any) -> Path:
    """Export the results of an experiment from its finished runs.

    Args:
        loaded: The experiment.
        folders: Folders of the command.

    Returns:
        The experiment's folder in ``results/``.

    Raises:
        ConfigError: If another experiment file has results of this name.
    """
    from rudolph.reports.schema import Report
    from rudolph.reports.store import export_results, write_index
    from rudolph.runs.runner import all_runs, missing_runs, require_own_experiments
    from rudolph.runs.scale import scale_of
    from rudolph.runs.search import groups_sharing_pairs

    require_own_experiments([loaded], folders, RESULTS_FOLDER)
    source = loaded.path
    if source.resolve().is_relative_to(Path.cwd()):
        source = source.resolve().relative_to(Path.cwd())
    runs, missing = all_runs(loaded, folders), missing_runs(loaded, folders)
    # An unfinished run may describe a model that cannot even be built.
    finished = [run.config for run in runs if run.name not in missing]
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
        missing=missing,
        scale=scale_of(finished) if finished else "",
        same_pairs=groups_sharing_pairs(loaded),
    )
    run_keys = {(run.name, run.config.digest) for run in runs}
    folder = export_results(folders.runs, RESULTS_FOLDER, report=report, runs=run_keys)
    write_index(RESULTS_FOLDER)
    return folder


def _figures(loaded: Any, grid: list[str], *, by: str) -> Iterator[Any]:
    """Yield the figures of an experiment's report; ``by`` is the column that labels runs.

    The metrics of the table become lines over a one-dimensional grid and heat maps over a
    two-dimensional one.
    """
    from rudolph.reports.schema import Figure

    report = loaded.report
    claim_metrics = () if loaded.claim is None else (loaded.claim.metric,)
    compared_metrics = tuple(dict.fromkeys((*claim_metrics, *report.effects)))
    if compared_metrics:
        yield Figure("forest", compared_metrics, x="metric", by="group")
    if loaded.search is not None:
        yield Figure("regions", tuple(loaded.search.space), x="setting", by="domain")
    if report.curves:
        yield Figure("curves", report.curves, by=by)
    if report.table and len(grid) == 2:
        yield Figure("heatmap", report.table, x=grid[1], by=grid[0])
    elif report.table and len(grid) == 1:
        yield Figure("lines", report.table, x=grid[0], by="variant")
    elif report.table:
        shares_axis = all(metric.endswith(ON_ONE_AXIS) for metric in report.table)
        yield Figure("ratios" if shares_axis else "intervals", report.table, x="seed", by=by)
    if report.pareto:
        yield Figure("pareto", report.pareto, x="seed", by=by)
    if report.card:
        yield Figure("card", report.card, x="score", by="run")
    if report.best_of:
        yield Figure("best_of", report.best_of, x="score", by="run")
    if report.shots:
        yield Figure("shots", report.shots, x="score", by="run")


def export_experiment(args: Any) -> int:
    """Run ``rudolph export`` and return the exit code."""
    from rudolph.config.experiment_file import load_experiment

    print_line(f"results: {write_results(load_experiment(args.file), folders_here())}")
    return 0


def report_card(args: Any) -> int:
    """Run ``rudolph report-card`` and return the exit code."""
    from rudolph.reports.report_cards import require_same_data

    if args.run.startswith(HUGGING_FACE):
        return hugging_face_card(args)
    for option, value in (
        ("--experiment", args.experiment),
        ("--output", args.output),
        ("key=value", args.settings),
    ):
        if value:
            raise ValueError(f"{option}: expected hf:FOLDER to evaluate, got the run {args.run}")
    folders = [writable(local_run_folder(run)) for run in (args.run, args.other) if run]
    cards = [_card(folder, again=args.again) for folder in folders]
    if args.other:
        common_scores = set(cards[0]["score"]) & set(cards[1]["score"])
        common_rows = cards[0][cards[0]["score"].isin(common_scores)]
        require_same_data(folders[0], folders[1], set(common_rows["split"]))
    for line in _score_lines(*cards):
        print_line(line)
    return 0


def hugging_face_card(args: Any) -> int:
    """Run ``rudolph report-card hf:FOLDER`` and return the exit code.

    Raises:
        ValueError: If an argument is missing or does not suit a model of Hugging Face.
    """
    import pandas as pd

    from rudolph.config.experiment_file import load_experiment
    from rudolph.evaluation.report_card import card_rows
    from rudolph.reports.report_cards import write_card
    from rudolph.runs.stages.evaluation import evaluate_hugging_face

    settings = [text for text in (args.other, *args.settings) if text is not None]
    if args.other is not None and "=" not in args.other:
        raise ValueError(f"{args.run}: expected no other run to compare with, got {args.other}")
    if args.experiment is None:
        raise ValueError("--experiment: expected a file with data and evaluation, got none")
    if args.output is not None and (args.output.suffix != ".csv" or args.output.is_dir()):
        raise ValueError(f"--output: expected a file FILE.csv, got {args.output}")
    loaded = load_experiment(args.experiment, settings)
    folder = Path(args.run.removeprefix(HUGGING_FACE))
    with stage_progress() as progress:
        rows = card_rows(evaluate_hugging_face(folder, loaded, folders_here(), progress))
    for line in _score_lines(pd.DataFrame(rows).astype({"chance": float})):
        print_line(line)
    if args.output is not None:
        write_card(args.output, rows)
        print_line(f"report card: {args.output}")
    return 0


def writable(folder: Path) -> Path:
    """Return a run's folder, or a copy if it is the shipped run, which is read-only."""
    from rudolph.runs.resolve import SHIPPED_RUN

    if folder != SHIPPED_RUN:
        return folder
    copy: Path = folders_here().cache / "shipped"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return copy


def _card(folder: Path, *, again: bool) -> Any:
    """Return the report card of a run; evaluate first if it has none or ``again`` is true."""
    from rudolph.reports.report_cards import draw_card, read_card
    from rudolph.reports.schema import CARD
    from rudolph.runs.stages.evaluation import evaluate_again

    path = folder / CARD
    if again or not path.is_file():
        with stage_progress() as progress:
            evaluate_again(folder, folders_here(), progress)
    print_line(f"{path}, {draw_card(path)}")
    return read_card(path)


def _score_lines(card: Any, other: Any = None) -> Iterator[str]:
    """Yield one line per score; for two cards, one per score that both have.

    Raises:
        ValueError: If two scores were measured under different protocols.
    """
    from rudolph.evaluation.metrics.answers import MetricProtocol, require_comparable

    other_rows = {} if other is None else {row["score"]: row for row in other.to_dict("records")}
    for row in card.to_dict("records"):
        line = f"  {row['score']:52} {_score_text(row)}"
        if other is not None:
            if row["score"] not in other_rows:
                continue
            other_row = other_rows[row["score"]]
            protocols = [str(scored["protocol"]) for scored in (row, other_row)]
            try:
                require_comparable(*(MetricProtocol.parse(text) for text in protocols))
            except ValueError as error:
                raise ValueError(f"{row['score']}: {error}") from error
            line += f"   {_score_text(other_row)}"
        yield line


def _score_text(row: Any) -> str:
    chance = "" if row["chance"] != row["chance"] else f" chance {row['chance']:.3g}"
    interval = f"[{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['value']:7.4g} {interval}{chance} of {row['count']}"


def redraw_figures(args: Any) -> int:
    """Run ``rudolph figures`` and return the exit code."""
    from rudolph.reports.store import draw_pngs, redraw

    if args.png:
        paths = draw_pngs(RESULTS_FOLDER, args.png, experiment=args.experiment)
    else:
        paths = redraw(RESULTS_FOLDER, experiment=args.experiment)
        write_reference(EXPERIMENTS_PAGE)
    print_line("\n".join(map(str, paths)))
    return 0


def write_reference(page: Path) -> None:
    """Write the tables of settings and evaluators into a page that has their markers."""
    from rudolph.config.reference import reference_parts
    from rudolph.files.atomic import write_text
    from rudolph.reports.report import fill, marked

    if page.is_file() and marked("settings", "").splitlines()[0] in page.read_text("utf-8"):
        write_text(page, fill(page.read_text("utf-8"), reference_parts()))


def check_results(args: Any) -> int:
    """Run ``rudolph check`` and return the exit code, 1 if there are problems."""
    from rudolph.config.run import run_of
    from rudolph.reports.store import check_results_folder

    problems = check_results_folder(
        RESULTS_FOLDER, digest=lambda path, content: run_of(path, content).digest
    )
    print_line(
        "\n".join([*problems, f"{len(problems)} problems"]) if problems else "results: no problems"
    )
    return 1 if problems else 0


def write_site(args: Any) -> int:
    """Run ``rudolph site`` and return the exit code.

    Raises:
        ValueError: If ``--repository`` is no web address.
    """
    from rudolph.reports.site import build_site, web_address

    repository = args.repository and web_address(args.repository)
    if args.repository is not None and not repository:
        raise ValueError(f"--repository: expected https://..., got {args.repository!r}")
    pages = build_site(RESULTS_FOLDER, args.folder, repository=repository)
    print_line(f"{pages[0]}: {len(pages)} pages")
    return 0


def sync_runs(args: Any) -> int:
    """Run ``rudolph sync`` and return the exit code, 1 if runs are still waiting."""
    from rudolph.tracking.tracker import send_pending, tracking_uri

    sent = send_pending(runs_here(), tracking_uri(Path.cwd()), again=args.again)
    print_line(f"sent {sent.records} records of {sent.runs} runs; {sent.waiting} runs are waiting")
    return 1 if sent.waiting else 0


def share_runs(args: Any) -> int:
    """Run ``rudolph share`` and return the exit code."""
    from rudolph.reports import share
    from rudolph.reports.experiment_names import experiments_with_runs, unknown_experiment

    all_runs = runs_here()
    runs, results = all_runs / args.experiment, RESULTS_FOLDER / args.experiment
    if not runs.is_dir():
        runs = Path(args.experiment)
        results = runs / share.RESULT_FILES
    if not runs.is_dir():
        raise unknown_experiment(
            args.experiment, all_runs.relative_to(Path.cwd()), experiments_with_runs(all_runs)
        )
    if "://" in args.to:
        for name, run_id in share.send_runs(runs, results, args.to).items():
            print_line(f"{name}: MLflow run {run_id}")
        return 0
    target = Path(args.to)
    packed = share.pack_runs(runs, results, target, has_weights=not args.no_weights)
    print_line("\n".join(map(str, packed)))
    return 0
