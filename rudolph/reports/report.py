"""Reports of experiments, and the pages of ``results/`` that are made from them.

Every page has the sections Finding, Setup, Numbers, Limitations and Reproduce.  Text is written by
hand; the generated parts stand between markers and come from ``report.json`` and the CSV files.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from rudolph.evaluation.statistics import mean_over_seeds, rank_correlation
from rudolph.files.atomic import read_json
from rudolph.reports.claims import Effect, claim_lines, effects, effects_table, format_interval
from rudolph.reports.markdown import table_row
from rudolph.reports.report_cards import card_table, read_card
from rudolph.reports.schema import (
    CARD,
    OVERHEAD,
    Report,
    experiment_folders,
    format_cell_value,
    group_of,
    read_report,
)
from rudolph.reports.search_tables import is_trial, search_lines
from rudolph.reports.timings import is_speed, speed_tables

UNANSWERED = "_Not written yet: the effect with its interval, and the number of seeds._"
WITHOUT_LIMITS = "_Not written yet: what the result does not show._"
SECTIONS = ("Finding", "Setup", "Numbers", "Limitations", "Reproduce")
# A page shows at most this many images, figures first.
MAX_PAGE_IMAGES = 4
# The most informative images of a run first.
SAMPLE_ORDER = ("grid", "captions", "answers", "masks", "reconstructions")
BOUNDS = ("low", "high", "chance", "target")
# The page names at most this many missing runs.
MAX_NAMED_RUNS = 20


def read_runs(folder: Path) -> pd.DataFrame:
    """Read ``runs.csv``: one row per finished run; digests and commits are text."""
    texts = dict.fromkeys(("run", "variant", "digest", "commit"), "string")
    return pd.read_csv(folder / "runs.csv", dtype=texts)


def read_curves(folder: Path) -> pd.DataFrame:
    """Read ``curves.csv``: one row per point, joined with the run's row of ``runs.csv``."""
    curves = pd.read_csv(folder / "curves.csv", dtype={"run": "string", "metric": "string"})
    runs = read_runs(folder)
    run_columns = runs[[name for name in runs if name not in ("metric", "step", "value")]]
    return curves.merge(run_columns, on="run", how="left", validate="many_to_one")


def read_effects(folder: Path) -> list[Effect]:
    """Return the comparisons of an experiment's report, with the claim's comparison first."""
    report, runs = read_report(folder), read_runs(folder)
    # Trials of a search are not compared, so Holm's correction must not count them.
    runs = runs[~is_trial(runs)]
    return effects(runs, metrics=report.effects, against=report.against, claim=report.claim)


def core_minutes(folder: Path) -> float:
    """Return the cost of an experiment: minutes times threads, summed over its runs."""
    runs = read_runs(folder).set_index("run")
    environments = read_json(folder / "environment.json")
    return sum(
        runs["seconds"][name] / 60 * environment["machine"]["threads"]
        for environment in environments
        for name in environment["runs"]
    )


def cost_of(folder: Path) -> str:
    """Return the cost of an experiment's runs and their machines; "" if results are unreadable."""
    try:
        return f"{_cost(read_runs(folder))}, on {_machines(folder)}"
    except (OSError, ValueError, KeyError):
        return ""


def experiment_parts(folder: Path) -> dict[str, str]:
    """Return the generated parts of an experiment's page, keyed by the names of their markers."""
    report, runs = read_report(folder), read_runs(folder)
    return {
        "scale": _scale(folder, report),
        "setup": _setup(report),
        "numbers": "\n".join(_numbers(folder, report, runs)).strip("\n"),
        "reproduce": _reproduce(report, runs),
    }


def new_page(title: str) -> str:
    """Return a page whose text is still to be written."""
    texts = {"Finding": UNANSWERED, "Limitations": WITHOUT_LIMITS}
    parts = {"Setup": "setup", "Numbers": "numbers", "Reproduce": "reproduce"}
    lines = [f"# {title}", marked("scale", "")]
    for section in SECTIONS:
        lines.append(f"## {section}")
        lines.append(marked(parts[section], "") if section in parts else texts[section])
    return "\n\n".join(lines) + "\n"


def _scale(folder: Path, report: Report) -> str:
    """Return the scale of the runs and the processors or GPUs that they ran on."""
    return f"Scale: {'; '.join(filter(None, (report.scale, _machines(folder))))}."


def _machines(folder: Path) -> str:
    """Return the processors or GPUs that the runs of an experiment ran on."""
    machines = [environment["machine"] for environment in read_json(folder / "environment.json")]
    names = {
        machine["gpus"][0]
        if machine.get("gpus")
        else f"{machine.get('processor', 'unknown processor')}, threads: {machine['threads']}"
        for machine in machines
    }
    return " or ".join(sorted(names))


def _setup(report: Report) -> str:
    return f"**Question.** {' '.join(report.question.split())}"


def _numbers(folder: Path, report: Report, runs: pd.DataFrame) -> list[str]:
    lines = [
        *_missing(report),
        *_claimed(folder, report),
        *_tables(folder, report, runs),
    ]
    for figure in report.figures:
        if figure.kind == "card":
            lines += ["", *card_table(read_card(folder / CARD), figure.y)]
        if figure.kind == "pareto":
            lines += ["", *_ranked(runs, figure.y)]
        lines += ["", f"![{', '.join(figure.y)}](figures/{figure.file})"]
    for sample in _ordered_samples(folder)[: max(MAX_PAGE_IMAGES - len(report.figures), 0)]:
        lines += ["", f"![{sample.stem}](samples/{sample.name})"]
    return lines


def _reproduce(report: Report, runs: pd.DataFrame) -> str:
    """Return the command, and what the committed runs cost."""
    overhead = ""
    if OVERHEAD in runs and runs[OVERHEAD].notna().all():
        fraction = runs[OVERHEAD].sum() / runs["seconds"].sum()
        overhead = f", {fraction:.1%} of it overhead such as tracking and drawing"
    return (
        f"```\nrudolph run {report.source}\n```\n\n"
        f"{_cost(runs)}{overhead}, commit {_commits(runs)}. "
        "`configs.jsonl` has the settings of every run."
    )


def _cost(runs: pd.DataFrame) -> str:
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count}, {runs['seconds'].sum() / 60:.3g} minutes in all"


def _missing(report: Report) -> list[str]:
    """Return Markdown that names the unfinished runs; empty if all runs have finished."""
    if not report.missing:
        return []
    named = ", ".join(f"`{name}`" for name in report.missing[:MAX_NAMED_RUNS])
    num_others = len(report.missing) - MAX_NAMED_RUNS
    return [
        f"**Not finished:** {named}{f' and {num_others} others' if num_others > 0 else ''}.",
        "",
    ]


def _claimed(folder: Path, report: Report) -> list[str]:
    """Return Markdown of the claim's verdict and all comparisons; empty if there are none."""
    results = read_effects(folder)
    if not results:
        return []
    lines = (
        [] if report.claim is None else [*claim_lines(report.claim, results[0], len(results)), ""]
    )
    return [*lines, *effects_table(results), ""]


def _ranked(runs: pd.DataFrame, metrics: tuple[str, ...]) -> list[str]:
    """Return Markdown of the rank correlation of two metrics over groups of runs.

    The correlation is Spearman's, computed per seed.  The text is empty for fewer than three
    groups or without a correlation.
    """
    groups = pd.Series(list(map(group_of, runs["run"], runs["seed"])), index=runs.index)
    first, second = (
        runs.pivot_table(index="seed", columns=groups, values=name) for name in metrics
    )
    correlations = [
        rank_correlation(first.loc[seed].to_numpy(), second.loc[seed].to_numpy())
        for seed in first.index.intersection(second.index)
    ]
    finite = [correlation for correlation in correlations if not np.isnan(correlation)]
    num_groups = groups.nunique()
    if num_groups < 3 or not finite:
        return []
    value, low, high = mean_over_seeds(finite)
    interval = f" [{low:.2g}, {high:.2g}]" if len(finite) > 1 else ""
    names = " and ".join(f"`{name}`" for name in metrics)
    return [
        f"Rank correlation of {names} over {num_groups} groups of runs: {value:.2g}{interval}."
    ]


def _tables(folder: Path, report: Report, runs: pd.DataFrame) -> list[str]:
    if report.search is not None:
        return search_lines(folder, report.search, runs, same_pairs=report.same_pairs)
    if is_speed(folder):
        return list(speed_tables(folder, runs, report.rows))
    return _table(report, runs)


def _table(report: Report, runs: pd.DataFrame) -> list[str]:
    names = list(runs.columns)
    later = names[names.index("seconds") + 1 :]
    bounds = {f"{metric}_{bound}" for metric in later for bound in BOUNDS}
    metrics = report.columns or tuple(name for name in later if name not in bounds)
    missing = [name for name in (*report.rows, *metrics) if name not in names]
    if missing:
        raise ValueError(
            f"report.table: expected a column of {', '.join(names)}, got {missing[0]!r}"
        )
    head = [*report.rows, "runs", *metrics]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for key, group in runs.groupby(list(report.rows), sort=True, dropna=False):
        cells = [*(format_cell_value(part) for part in key), str(len(group))]
        lines.append(table_row([*cells, *(_cell(group, metric) for metric in metrics)]))
    chances = [_unique_value(runs, f"{metric}_chance") for metric in metrics]
    if any(chances):
        lines.append(table_row(["_chance_", *[""] * len(report.rows), *chances]))
    return [*lines, "", "Several runs: mean ± standard deviation.  One run: value [interval]."]


def _unique_value(runs: pd.DataFrame, column: str) -> str:
    """Return the only value of a column, or an empty text if there are several or none."""
    values = set(runs[column].dropna()) if column in runs else set()
    return f"{values.pop():.4g}" if len(values) == 1 else ""


def _ordered_samples(folder: Path) -> list[Path]:
    """Return the exported images, the most informative first."""
    return sorted((folder / "samples").glob("*.png"), key=lambda path: sample_rank(path.stem))


def sample_rank(stem: str) -> tuple[int, str]:
    """Return the order of a sample image by its kind, then by its run.

    >>> sample_rank("seed0-grid") < sample_rank("a-seed0-masks")
    True
    """
    ranks = [rank for rank, kind in enumerate(SAMPLE_ORDER) if f"-{kind}" in f"-{stem}"]
    return (ranks[0] if ranks else len(SAMPLE_ORDER), stem)


def _cell(group: pd.DataFrame, metric: str) -> str:
    values = group[metric].dropna()
    if values.empty:
        return ""
    if len(values) > 1:
        return f"{values.mean():.4g} ± {values.std():.2g}"
    row = group.loc[values.index[0]]
    low, high = (row.get(f"{metric}_{bound}", float("nan")) for bound in ("low", "high"))
    return f"{values.iloc[0]:.4g}" + ("" if pd.isna(low) else f" [{low:.4g}, {high:.4g}]")


def index_page(results_folder: Path) -> str:
    """Return the generated part of ``results/README.md``: one row per claim and experiment."""
    claims = _claims_table(results_folder)
    return "\n".join([*claims, *([""] if claims else []), *_experiments_table(results_folder)])


def _claims_table(results_folder: Path) -> list[str]:
    head = ["claim", "verdict", "effect, 95 % CI", "scale", "core-minutes", "commit"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for folder in experiment_folders(results_folder):
        report, runs = read_report(folder), read_runs(folder)
        if report.claim is None:
            continue
        claim, effect = report.claim, read_effects(folder)[0]
        name = folder.relative_to(results_folder).as_posix()
        claim_text = f"`{claim.better}` better than `{claim.than}` in `{claim.metric}`"
        cells = [f"[{report.title}]({name}/README.md)<br>{claim_text}", effect.verdict]
        cells += [format_interval(effect), report.scale, f"{core_minutes(folder):.3g}"]
        cells.append(_commits(runs))
        lines.append(table_row(cells))
    return lines if len(lines) > 2 else []


def _experiments_table(results_folder: Path) -> list[str]:
    head = ["experiment", "question", "finding", "runs", "minutes", "commit"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for folder in experiment_folders(results_folder):
        report, runs = read_report(folder), read_runs(folder)
        name = folder.relative_to(results_folder).as_posix()
        link = f"[{report.title}]({name}/README.md)<br>`{name}`"
        cells = [link, report.question, finding_of(folder / "README.md"), str(len(runs))]
        lines.append(table_row([*cells, f"{runs['seconds'].sum() / 60:.3g}", _commits(runs)]))
    return lines


def finding_of(readme: Path) -> str:
    """Return the first sentence of a page's Finding; empty while there is none."""
    text = " ".join(section_of(readme.read_text("utf-8"), "Finding").split())
    if not text or text.startswith(UNANSWERED):
        return ""
    sentence = re.match(r".+?[.!?](?=\s|$)", text)
    return sentence[0] if sentence else text


def section_of(page: str, name: str) -> str:
    """Return the text of a section of a page, without its heading."""
    rest = re.split(rf"(?m)^## {re.escape(name)}$", page, maxsplit=1)
    return "" if len(rest) < 2 else re.split(r"(?m)^## ", rest[1], maxsplit=1)[0].strip()


def marked(name: str, text: str) -> str:
    """Return a generated part between its markers."""
    return f"<!-- generated: {name} -->\n{text.strip(chr(10))}\n<!-- end: {name} -->"


def fill(page: str, parts: Mapping[str, str]) -> str:
    """Return a page with new generated parts; a part without markers is appended."""
    for name, text in parts.items():
        pattern = rf"<!-- generated: {name} -->\n.*?<!-- end: {name} -->"
        if not re.search(pattern, page, re.DOTALL):
            page = f"{page.rstrip()}\n\n{marked(name, '')}\n"
        before, after = re.split(pattern, page, maxsplit=1, flags=re.DOTALL)
        page = before + marked(name, text) + after
    return page


def with_finding(page: str, text: str) -> str:
    """Return a page with another text in its Finding."""
    head, rest = re.split(r"(?m)^## Finding$", page, maxsplit=1)
    tail = re.search(r"(?m)^## ", rest)
    return f"{head}## Finding\n\n{text}\n\n{rest[tail.start() :] if tail else ''}"


def generated_part(readme: Path) -> str:
    """Return all generated parts of the page in a file."""
    return generated_text(readme.read_text("utf-8"))


def without_generated(page: str) -> str:
    """Return what is written by hand on a page."""
    return re.sub(r"<!-- generated: (\w+) -->.*?<!-- end: \1 -->", "", page, flags=re.DOTALL)


def generated_text(page: str) -> str:
    """Return all generated parts of a page."""
    matches = re.finditer(
        r"<!-- generated: (\w+) -->\n(.*?)\n?<!-- end: \1 -->", page, flags=re.DOTALL
    )
    return "\n".join(match[2] for match in matches)


def _commits(runs: pd.DataFrame) -> str:
    return ", ".join(f"`{commit[:10]}`" for commit in sorted(runs["commit"].unique()))
