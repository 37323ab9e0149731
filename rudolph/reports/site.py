"""The results site: static pages that are made from results alone and open from disk.

    index.html                  ``results/README.md``: every claim and every experiment
    runs.html                   the main metrics of every run
    <experiment>/index.html     the experiment's page, comparisons of samples, its runs and files
    search.js                   the text of all pages
    site.css, site.js           layout; sorting, filters, search and zoom

The other files of the results are copied next to the pages.  Nothing is downloaded.
"""

import csv
import html
import posixpath
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from rudolph.files.atomic import (
    DamagedFileError,
    json_text,
    naming_file,
    require_disjoint_paths,
    swapped_in,
    write_text,
)
from rudolph.reports.experiment_names import results_folders
from rudolph.reports.run_configs import BASE_CONFIG, CONFIG_LINES
from rudolph.reports.run_files import check_table
from rudolph.reports.sample_sheets import Comparison, compare_samples
from rudolph.reports.schema import CARD, Report, read_report
from rudolph.reports.site_markdown import (
    ASSETS,
    link_html,
    page_html,
    render_markdown,
    table_html,
    text_of,
    zoomable,
)

README, INDEX, RUNS_PAGE = "README.md", "index.html", "runs.html"
STATIC = ("site.css", "site.js")
RUNS_TABLE = "runs.csv"
RUN_COLUMNS = ("run", "variant", "seed", "digest", "commit", "seconds")
SHORT_COMMIT = 10
# The files of an experiment, and what they hold.
EXPERIMENT_FILES = {
    BASE_CONFIG: "all settings of the first run",
    CONFIG_LINES: "how each run differs from the first",
    RUNS_TABLE: "every score of every run",
    "curves.csv": "curves over training",
    CARD: "every score with interval, chance level and count",
    "environment.json": "commit, machine and versions",
}
RUNS_NOTE = (
    "<p>The main metrics of every run, with 95 % intervals over examples. Comparisons over seeds "
    "are on each experiment's page.</p>"
)
BOUND_ENDS = ("_low", "_high", "_chance", "_target")


class SiteExperiment(NamedTuple):
    """An experiment's report and the rows of its ``runs.csv``, as text.

    Attributes:
        name: path of its folder, relative to the top folder.
        report: content of ``report.json``.
        rows: one mapping per run.
    """

    name: str
    report: Report
    rows: list[dict[str, str]]

    @property
    def metrics(self) -> list[str]:
        """The metrics of claim, comparisons and table; all metrics if the table selects none."""
        claim_metrics = () if self.report.claim is None else (self.report.claim.metric,)
        names = list(dict.fromkeys((*claim_metrics, *self.report.effects, *self.report.columns)))
        if self.report.columns or not self.rows:
            return names
        columns = list(self.rows[0])
        later = columns[columns.index("seconds") + 1 :]
        return list(dict.fromkeys([*names, *(n for n in later if not n.endswith(BOUND_ENDS))]))


class SitePage(NamedTuple):
    """A page before it is written.

    Attributes:
        path: its path, relative to the top folder.
        title: its title, as text.
        content: its HTML without the frame.
    """

    path: str
    title: str
    content: str


@dataclass(frozen=True)
class SiteSource:
    """The results that a site is made from.

    Attributes:
        folder: top folder of the results.
        repository: address of the repository without a slash at its end; None shows commits and
            experiment files as text, without links.
        experiments: experiments, keyed by name.
        files: paths of all files, relative to ``folder``.
        commits: full commits of the runs, keyed by their first ten digits and by all digits.
    """

    folder: Path
    repository: str | None
    experiments: dict[str, SiteExperiment]
    files: frozenset[str]
    commits: dict[str, str]

    @classmethod
    def open(cls, folder: Path, repository: str | None) -> "SiteSource":
        """Read the experiments of a folder of results.

        Raises:
            DamagedFileError: if a file is not as an export writes it.
            OSError: if a file cannot be read.
            ValueError: if the folder does not exist or has no experiment.
        """
        experiments = {}
        for path in results_folders(folder, None):
            name = path.relative_to(folder).as_posix()
            experiments[name] = SiteExperiment(name, read_report(path), _read_rows(path))
        if not experiments:
            raise ValueError(f"{folder}: expected exported experiments, got no report.json")
        files = (path for path in folder.rglob("*") if path.is_file())
        names = frozenset(path.relative_to(folder).as_posix() for path in files)
        commits = {row["commit"] for item in experiments.values() for row in item.rows}
        known = {name[:length]: name for name in commits for length in (SHORT_COMMIT, len(name))}
        return cls(folder, repository, experiments, names, known)

    def commit_html(self, digits: str) -> str:
        """Return a commit as code, with a link if a run was executed at this commit."""
        code = f"<code>{html.escape(digits)}</code>"
        if self.repository is None or digits not in self.commits:
            return code
        address = f"{self.repository}/commit/{quote(self.commits[digits])}"
        return f'<a href="{html.escape(address)}">{code}</a>'

    def link_of(self, page: str, address: str) -> str | None:
        """Return the site's address for a link in ``README.md``; None if its target is missing."""
        parts = urlsplit(address)
        if parts.scheme or parts.netloc or not parts.path:
            return address
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path)))
        if path not in self.files:
            return None
        # Pages stand in for their Markdown, and fragments of GitHub's headings do not exist here.
        is_page = posixpath.basename(path) == README
        return f"{parts.path.removesuffix(README)}{INDEX}" if is_page else parts.path

    def image_of(self, page: str, address: str) -> str:
        """Return the site's address for an image in ``README.md``.

        Raises:
            DamagedFileError: if the file is missing.
        """
        target = self.link_of(page, address)
        if target is None:
            raise DamagedFileError(self.folder / page, f"{unquote(address)} is missing")
        return target


def build_site(results_folder: Path, target: Path, *, repository: str | None) -> list[Path]:
    """Write the site of all results; an earlier site in the folder is replaced.

    Args:
        results_folder: the folder of all results, by experiment.
        target: the folder of the site.
        repository: address of the repository; None for that of git's ``origin``.

    Returns:
        The paths of the pages, with the page of the claims first.

    Raises:
        ValueError: if there are no results, the folders overlap, or a file is damaged.
        OSError: if a file is missing or cannot be read or written.
    """
    require_disjoint_paths(target, results_folder, "FOLDER")
    site = SiteSource.open(results_folder, repository or origin_address(results_folder))
    with swapped_in(target) as new:
        ignored = shutil.ignore_patterns(README)
        shutil.copytree(results_folder, new, ignore=ignored, dirs_exist_ok=True)
        names = {posixpath.join(name, README) for name in site.experiments}
        names |= {name for name in site.files if posixpath.basename(name) == README}
        # The page of all claims comes first.
        ordered = [README, *sorted(names - {README})]
        pages = [*(_readme_page(site, name, new) for name in ordered), _runs_page(site)]
        for page in pages:
            _write_page(page, new, has_navigation=True)
        index = [
            {"url": quote(page.path), "title": page.title, "text": text_of(page.content)}
            for page in pages
        ]
        write_text(new / "search.js", f"const SEARCH_INDEX = {json_text(index)};\n")
        _write_static(new)
    return [target / page.path for page in pages]


def write_single_page(folder: Path, target: Path) -> Path:
    """Write the page of one experiment into a copy of its results and return its path.

    Raises:
        ValueError: if a file is damaged, or the folder has no ``report.json``.
        OSError: if a file is missing or cannot be read or written.
    """
    page = _readme_page(SiteSource.open(folder, origin_address(folder)), README, target)
    _write_page(page, target, has_navigation=False)
    _write_static(target)
    return target / page.path


def origin_address(folder: Path) -> str | None:
    """Return the web address of git's ``origin``; None if it is missing or not on a server."""
    command = ["git", "-C", str(folder), "config", "--get", "remote.origin.url"]
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return web_address(result.stdout.strip())


def web_address(remote: str) -> str | None:
    """Return the web address of a remote, without a password; None if it is not on a server.

    >>> web_address("git@github.com:ai-forever/ru-dolph.git")
    'https://github.com/ai-forever/ru-dolph'
    """
    remote = re.sub(r"^(?:ssh://)?[\w.-]+@([\w.-]+)[:/]", r"https://\1/", remote)
    parts = urlsplit(remote)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/").removesuffix(".git")


def _read_rows(folder: Path) -> list[dict[str, str]]:
    path = folder / RUNS_TABLE
    check_table(path, RUN_COLUMNS, numbers=("seconds",))
    with naming_file(path), path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _readme_page(site: SiteSource, name: str, target: Path) -> SitePage:
    """Return the web page of a ``README.md``, and write the image regions that it compares."""
    path, folder = site.folder / name, posixpath.dirname(name)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"not UTF-8 at byte {error.start}") from error
    content = render_markdown(
        text,
        link_of=partial(site.link_of, name),
        image_of=partial(site.image_of, name),
        commit_html=site.commit_html,
    )
    experiment = site.experiments.get(folder or ".")
    if experiment is not None:
        content += "\n".join(_experiment_parts(site, experiment, target / folder))
    heading = re.search(r"<h1>(.*?)</h1>", content, re.DOTALL)
    title = text_of(heading[1]) if heading else folder or "Results"
    return SitePage(posixpath.join(folder, INDEX), title, content)


def _experiment_parts(site: SiteSource, experiment: SiteExperiment, target: Path) -> Iterator[str]:
    """Yield the HTML that follows an experiment's Markdown: samples, runs and files."""
    folder = site.folder / experiment.name
    compared = compare_samples(folder, [row["run"] for row in experiment.rows], target)
    figures = [_comparison_html(comparison) for comparison in compared]
    if figures:
        yield from ("<h2>Samples side by side</h2>", *figures)
    yield "<h2>Runs</h2>"
    head = ["run", "variant", "seed", "minutes", "commit", *experiment.metrics]
    yield table_html(
        head,
        (
            [*_run_cells(site, row), *(_value_html(row, name) for name in experiment.metrics)]
            for row in experiment.rows
        ),
    )
    yield "<h2>Files</h2>\n<ul>"
    source, commits = experiment.report.source, [row["commit"] for row in experiment.rows]
    if site.repository is not None and commits and commits[0] in site.commits:
        address = f"{site.repository}/blob/{quote(commits[0])}/{quote(source)}"
        yield f"<li>{link_html(address, source)}: the experiment</li>"
    else:
        yield f"<li><code>{html.escape(source)}</code>: the experiment</li>"
    for name, meaning in EXPERIMENT_FILES.items():
        if posixpath.normpath(posixpath.join(experiment.name, name)) in site.files:
            yield f"<li>{link_html(name, name)}: {meaning}</li>"
    yield "</ul>"


def _comparison_html(comparison: Comparison) -> str:
    figures = [
        f"<figure>{zoomable(quote(path), f'{run}, {comparison.label}')}"
        f"<figcaption>{html.escape(run)}</figcaption></figure>"
        for run, path in comparison.images.items()
    ]
    heading = f"<h3>{html.escape(comparison.label)}</h3>"
    return f'{heading}\n<div class="compared">{"".join(figures)}</div>'


def _run_cells(site: SiteSource, row: Mapping[str, str]) -> list[str]:
    texts = [row["run"], row["variant"], row["seed"], f"{float(row['seconds']) / 60:.3g}"]
    return [*map(html.escape, texts), site.commit_html(row["commit"][:SHORT_COMMIT])]


def _value_html(row: Mapping[str, str], metric: str) -> str:
    low, high = (row.get(f"{metric}_{bound}") for bound in ("low", "high"))
    interval = f" [{low}, {high}]" if low and high else ""
    return html.escape(f"{row.get(metric, '')}{interval}")


def _runs_page(site: SiteSource) -> SitePage:
    """Return the page of all runs: one row per run and main metric, to sort by any column."""
    rows = [
        [
            link_html(f"{quote(item.name)}/{INDEX}", item.name),
            html.escape(metric),
            _value_html(row, metric),
            *_run_cells(site, row),
        ]
        for item in site.experiments.values()
        for row in item.rows
        for metric in item.metrics
        if row.get(metric)
    ]
    head = ["experiment", "metric", "value", "run", "variant", "seed", "minutes", "commit"]
    return SitePage(RUNS_PAGE, "Runs", f"<h1>Runs</h1>\n{RUNS_NOTE}\n{table_html(head, rows)}")


def _write_page(page: SitePage, target: Path, *, has_navigation: bool) -> None:
    root = "../" * page.path.count("/")
    text = page_html(page.title, page.content, root=root, has_navigation=has_navigation)
    write_text(target / page.path, text)


def _write_static(target: Path) -> None:
    for name in STATIC:
        write_text(target / name, (ASSETS / name).read_text("utf-8"))
