"""The results folder in the demo: claims with their verdicts, findings and figures."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from rudolph.reports.claims import format_interval
from rudolph.reports.report import read_effects, section_of, without_generated
from rudolph.reports.schema import experiment_folders, read_report

CLAIM_COLUMNS = ("experiment", "claim", "verdict", "effect, 95 % CI")

LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True)
class ResultPage:
    """One experiment of the results folder.

    Attributes:
        title: Its title.
        text: Question, finding and limitations, in Markdown.
        figures: Each figure as a ``data:`` address of an SVG.
    """

    title: str
    text: str
    figures: list[str]


def experiments_in(results: Path) -> list[str]:
    """Return the names of the exported experiments; without the folder there are none."""
    return [folder.relative_to(results).as_posix() for folder in experiment_folders(results)]


def claim_rows(results: Path) -> list[list[str]]:
    """Return one row of ``CLAIM_COLUMNS`` per claim, recomputed from the tables of runs."""
    rows = []
    for folder in experiment_folders(results):
        claim = read_report(folder).claim
        if claim is None:
            continue
        effect = read_effects(folder)[0]
        text = f"{claim.better} better than {claim.than} in {claim.metric}"
        name = folder.relative_to(results).as_posix()
        rows.append([name, text, effect.verdict, format_interval(effect)])
    return rows


def result_page(results: Path, name: str) -> ResultPage:
    """Return the page of one experiment.

    Raises:
        ValueError: If there is no such experiment.
    """
    if name not in experiments_in(results):
        raise ValueError(f"experiment: expected one in {results}, got {str(name)[:60]!r}")
    folder = results / name
    report = read_report(folder)
    readme = folder / "README.md"
    page = without_generated(readme.read_text("utf-8")) if readme.is_file() else ""
    # The browser reaches no other page of the folder.
    page = LINK.sub(r"\1", page)
    parts = [f"### {report.title}", " ".join(report.question.split())]
    for name_of_section in ("Finding", "Limitations"):
        if text := section_of(page, name_of_section):
            parts.append(f"**{name_of_section}**\n\n{text}")
    figures = sorted((folder / "figures").glob("*.svg"))
    return ResultPage(report.title, "\n\n".join(parts), [_address(path) for path in figures])


def _address(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
