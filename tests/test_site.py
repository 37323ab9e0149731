"""The results site: complete, closed under its links, escaped, and equal on every build."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from damage import NUM_CASES, damage, files_of
from PIL import Image

from rudolph.cli import main
from rudolph.reports.image_grids import sample_grid
from rudolph.reports.sample_sheets import COMPARED_PARTS, cell_boxes, grid_columns
from rudolph.reports.site import build_site, web_address, write_single_page
from rudolph.reports.site_markdown import text_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
REPOSITORY = "https://github.com/somebody/rudolph"
CAPTIONED, GRIDDED = "loss_weights/reduction", "finetune/emoji_style"


class Elements(HTMLParser):
    """Tags with their attributes, and the rows of tables as text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.is_in_cell = False
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.is_in_cell = True
        if tag == "br" and self.is_in_cell:
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.is_in_cell:
            self.rows[-1][-1] += data

    def addresses(self) -> Iterator[str]:
        """Yield the targets of links and the sources of images and scripts."""
        for _, attributes in self.tags:
            yield from (attributes[key] or "" for key in ("href", "src") if key in attributes)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site of the committed results."""
    folder = tmp_path_factory.mktemp("built") / "site"
    build_site(RESULTS, folder, repository=REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Elements]:
    """Return the parsed pages of the site by path."""
    return parsed(site)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of results with one experiment, in the current directory."""
    results = tmp_path / "results"
    shutil.copytree(RESULTS / CAPTIONED, results / CAPTIONED)
    (results / "README.md").write_text(f"# Results\n\n[page]({CAPTIONED}/README.md)\n")
    monkeypatch.chdir(tmp_path)
    return results


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_of(folder)}


def parsed(folder: Path) -> dict[str, Elements]:
    return {str(page.relative_to(folder)): Elements(page) for page in folder.rglob("*.html")}


def missing_targets(folder: Path, pages: dict[str, Elements]) -> list[str]:
    """Return the relative addresses that lead to no file below the folder of the pages."""
    return [
        f"{name}: {address}"
        for name, page in pages.items()
        for address in set(page.addresses())
        if not urlsplit(address).scheme
        and not ((folder / name).parent / unquote(urlsplit(address).path)).is_file()
    ]


def test_every_link_leads_to_a_file_and_nothing_is_downloaded(
    site: Path, pages: dict[str, Elements]
) -> None:
    assert missing_targets(site, pages) == []
    for name, page in pages.items():
        for tag, attributes in page.tags:
            loaded = attributes.get("src") or (tag == "link" and attributes["href"]) or ""
            assert not urlsplit(loaded).scheme, f"{name}: {loaded}"


def test_every_claim_is_on_the_first_page(pages: dict[str, Elements]) -> None:
    lines = (RESULTS / "README.md").read_text("utf-8").splitlines()
    claims = [line.strip("| ").split(" | ") for line in lines if "` better than `" in line]
    assert len(claims) > 20
    rows = pages["index.html"].rows[1 : len(claims) + 1]
    assert [row[1:3] for row in rows] == [cells[1:3] for cells in claims]
    titles = [re.findall(r"\[(.*?)\]", cells[0])[0] for cells in claims]
    assert all(row[0].startswith(title) for row, title in zip(rows, titles, strict=True))


def test_every_main_metric_of_every_run_is_in_the_table_of_runs(
    pages: dict[str, Elements],
) -> None:
    expected = set()
    for path in RESULTS.rglob("report.json"):
        report, name = json.loads(path.read_text("utf-8")), str(path.parent.relative_to(RESULTS))
        metrics = {*report["columns"], *report.get("effects", ())}
        metrics |= {report["claim"]["metric"]} if report.get("claim") else set()
        with (path.parent / "runs.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                expected |= {(name, key, row["run"], row[key]) for key in metrics if row[key]}
    head, *rows = pages["runs.html"].rows
    assert head[:4] == ["experiment", "metric", "value", "run"]
    assert len(rows) == len(expected) > 3000
    assert {(row[0], row[1], row[3], row[2].split(" [")[0]) for row in rows} == expected


def test_the_search_index_has_the_text_of_every_page(site: Path) -> None:
    script = (site / "search.js").read_text("utf-8")
    index = json.loads(script.removeprefix("const SEARCH_INDEX = ").rstrip(";\n"))
    pages = {str(path.relative_to(site)): path.read_text("utf-8") for path in site.rglob("*.html")}
    assert {page["url"] for page in index} == pages.keys() and len(pages) == len(index)
    for page in index:
        assert page["title"] and page["text"] in text_of(pages[page["url"]])
    readmes = {f"{path.parent.relative_to(RESULTS)}/" for path in RESULTS.rglob("README.md")}
    assert {page["url"].removesuffix("index.html") or "./" for page in index} == {
        *readmes,
        "runs.html",
    }


def test_a_page_links_to_its_experiment_file_its_settings_and_its_commits(
    pages: dict[str, Elements],
) -> None:
    for name in (CAPTIONED, GRIDDED):
        environments = json.loads((RESULTS / name / "environment.json").read_text("utf-8"))
        commits = {environment["commit"] for environment in environments}
        addresses = set(pages[f"{name}/index.html"].addresses())
        assert {f"{REPOSITORY}/commit/{commit}" for commit in commits} <= addresses
        files = {f"{REPOSITORY}/blob/{commit}/experiments/{name}.yaml" for commit in commits}
        assert files & addresses and {"config.yaml", "runs.csv"} <= addresses


def test_runs_are_compared_at_one_prompt(site: Path) -> None:
    page = (site / GRIDDED / "index.html").read_text("utf-8")
    for number, prompt in enumerate(("олень", "пожарный: темный тон кожи", "смеющийся кот")):
        row = page.split(f"<h3>grid: {prompt}</h3>")[1].split("<h3>")[0]
        sources = re.findall(r'<img src="(.*?)"', row)
        assert sources == [
            f"{COMPARED_PARTS}/emojich-seed{k}-grid-{number:02d}.png" for k in (0, 1)
        ]
        captions = re.findall(r"<figcaption>(.*?)</figcaption>", row)
        assert captions == ["emojich-seed0", "emojich-seed1"]
    page = (site / CAPTIONED / "index.html").read_text("utf-8")
    assert len(re.findall(r"<h3>captions-test: image \d+</h3>", page)) == 10


@pytest.mark.parametrize(("count", "columns"), [(1, 5), (5, 5), (7, 3), (10, 5), (8, 8)])
def test_a_cell_of_a_sheet_is_its_image(tmp_path: Path, count: int, columns: int) -> None:
    random = np.random.default_rng(count)
    images = list(random.integers(0, 256, (count, 24, 24, 3), dtype=np.uint8))
    captions = ["слово " * (number % 3 * 4) for number in range(count)]
    sample_grid(images, captions, tmp_path / "sheet.png", columns=columns)
    sheet = Image.open(tmp_path / "sheet.png")
    boxes = cell_boxes(sheet.size, columns=columns, count=count)
    side = boxes[0][2] - boxes[0][0]
    for image, box in zip(images, boxes, strict=True):
        cell = np.asarray(sheet.crop(box))[:side]
        assert np.array_equal(cell, image.repeat(side // 24, 0).repeat(side // 24, 1))
    assert cell_boxes((sheet.width + 1, sheet.height), columns=7, count=10) == []
    assert cell_boxes(sheet.size, columns=columns, count=0) == []
    assert [grid_columns(number) for number in (1, 3, 4, 20)] == [8, 6, 8, 20]


def test_a_build_is_equal_in_every_byte_and_loads_no_torch(site: Path, tmp_path: Path) -> None:
    code = "import sys; from rudolph.cli import main; code = main(sys.argv[1:]); "
    code += "print(code, 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    arguments = ["site", str(tmp_path / "again"), "--repository", f"{REPOSITORY}.git/"]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "0 False False\n", run.stderr
    assert f"{tmp_path}/again/index.html: " in run.stderr
    assert contents(tmp_path / "again") == contents(site)


def test_text_of_results_is_never_markup(small: Path, tmp_path: Path) -> None:
    attack = (
        "<script>alert(1)</script><img src=x onerror=alert(2)>\"'>&amp;[a](javascript:alert(3))"
    )
    folder = small / CAPTIONED
    for name in ("runs.csv", "configs.jsonl"):
        text = (folder / name).read_text("utf-8")
        quoted = attack.replace('"', '""' if name == "runs.csv" else '\\"')
        changed = text.replace("tokens-seed1,tokens", f'"{quoted}","{quoted}"')
        (folder / name).write_text(changed.replace('"tokens-seed1"', f'"{quoted}"'))
    report = json.loads((folder / "report.json").read_text("utf-8")) | {"source": attack}
    (folder / "report.json").write_text(json.dumps(report))
    page = (folder / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(f"# {attack}\n\n| a |\n| --- |\n| {attack} |\n\n{page}")
    build_site(small, tmp_path / "site", repository=REPOSITORY)
    built = parsed(tmp_path / "site")
    for elements in built.values():
        scripts = [attributes for tag, attributes in elements.tags if tag == "script"]
        assert [Path(script["src"] or "").name for script in scripts] == ["site.js"]
        names = {name for _, attributes in elements.tags for name in attributes}
        assert not {name for name in names if name.startswith("on")}
        assert not [text for text in elements.addresses() if text.startswith("javascript:")]
    shown = [row[0] for row in built[f"{CAPTIONED}/index.html"].rows]
    assert attack in shown and missing_targets(tmp_path / "site", built) == []


def spoil(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("README.md", None, "no such file"),
        ("README.md", b"# \xff", "not UTF-8 at byte 2"),
        ("report.json", b"{", "not JSON at line 1"),
        ("report.json", b'{"figures": [], "colour": 3}', "no report: "),
        ("runs.csv", None, "no such file"),
        ("runs.csv", b"run,seed\n", "expected the columns run, variant"),
        ("runs.csv", b"run,variant,seed,digest,commit,seconds\na,b,0,d,c,x\n", "no such table"),
        ("samples/tokens-seed0-captions-test.png", None, "captions-test.png is missing"),
        ("samples/tokens-seed0-captions-test.png", b"\x89PNG", "no image that can be read"),
    ],
)
def test_a_damaged_file_is_named_in_one_line_and_the_earlier_site_stays(
    small: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, words: str
) -> None:
    assert main(["site", "site"]) == 0
    before = contents(Path("site"))
    capsys.readouterr()
    spoil(small / CAPTIONED / name, content)
    assert main(["site", "site"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    owner = "README.md" if "is missing" in words else name
    assert line.startswith(f"rudolph: results/{CAPTIONED}/{owner}: ") and words in line
    assert contents(Path("site")) == before


def test_errors_of_arguments_are_one_line(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small.parent / "empty" / "results").mkdir(parents=True)
    for arguments, words in (
        (["results/site"], "FOLDER: expected a path apart from "),
        ([".."], "which contains it"),
        (
            ["site", "--repository", "/srv/git"],
            "--repository: expected https://..., got '/srv/git'",
        ),
    ):
        assert main(["site", *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    with pytest.raises(ValueError, match="got no report"):
        build_site(small.parent / "empty" / "results", small.parent / "site", repository=None)


def test_a_single_page_needs_no_other_page(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "sampling" / "filter_order", tmp_path / "page")
    page = tmp_path / "page" / "README.md"
    page.write_text(page.read_text("utf-8") + "\n[another](../emoji/README.md)\n")
    assert write_single_page(page.parent, page.parent) == page.with_name("index.html")
    assert missing_targets(page.parent, parsed(page.parent)) == []
    assert "<span>another</span>" in page.with_name("index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/a/b.git", "https://github.com/a/b"),
        ("https://user:secret@host.org:8443/a/b/", "https://host.org:8443/a/b"),
        ("git@github.com:a/b.git", "https://github.com/a/b"),
        ("ssh://git@host.org/a/b.git", "https://host.org/a/b"),
        ("/srv/git/b.git", None),
        ("file:///srv/b", None),
        ("javascript:alert(1)", None),
        ("", None),
    ],
)
def test_a_remote_becomes_a_web_address_without_password(remote: str, address: str | None) -> None:
    assert web_address(remote) == address


@pytest.mark.skipif(not NUM_CASES, reason="FUZZ_CASES is not set")
@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_damaged_results_never_end_in_a_traceback(small: Path, seed: int) -> None:
    rng, files = Random(seed), files_of(small / CAPTIONED)
    damage(rng.choice(files), rng, others=files)
    assert main(["site", "site"]) in (0, 2)
