"""The pages that readers open first: complete and short, with valid links and files."""

import re
from pathlib import Path

import pytest
import yaml

from rudolph.config.experiment_file import load_experiment
from rudolph.config.reference import reference_parts
from rudolph.config.run import RunConfig
from rudolph.data.splits import open_dataset
from rudolph.evaluation.report_card import EVALUATORS
from rudolph.families.interface import Parts
from rudolph.families.registry import family_of
from rudolph.models.rudolph.adapt import adapt
from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.reports.report import fill
from rudolph.runs.resolve import open_weights

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(ROOT / folder / "README.md" for folder in ("experiments", "results", "notebooks", "tests")),
    ROOT / "results" / "speed" / "README.md",
    *sorted((ROOT / "rudolph").rglob("README.md")),
]
EXAMPLES = ROOT / "experiments" / "examples"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_the_first_page_is_short_and_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200
    named = re.findall(r"(?:experiments|rudolph|results)/[\w./-]+\.(?:yaml|py|csv|md|png)", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_ablation_of_the_first_page_is_the_file() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    shown = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    contents = [yaml.safe_load(block) for block in shown]
    assert yaml.safe_load((EXAMPLES / "own_ablation.yaml").read_text("utf-8")) in contents
    table = (EXAMPLES / "own_pairs" / "pairs.csv").read_text("utf-8").splitlines()
    assert "\n".join(table[:3]) in text


def test_every_experiment_and_evaluator_is_in_the_index() -> None:
    text = (ROOT / "experiments" / "README.md").read_text("utf-8")
    folder = ROOT / "experiments"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}
    files = {name for name in files if not name.startswith("base/")}
    rows = re.findall(r"^\| `([\w/]+\.yaml)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(files)
    assert [name for name in EVALUATORS if f"`{name}`" not in text] == []
    sections = set(RunConfig.__dataclass_fields__) - {"seed", "model", "vqgan_seed", "data"}
    assert [name for name in sections if f"`{name}" not in text] == []


def test_the_demo_model_starts_on_the_pairs_of_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_experiment(EXAMPLES / "own_pairs.yaml").runs[0].config
    assert config.tokenizer.path == config.vqgan.init == config.decoder.init == "shipped"
    pairs = open_dataset(config.data, "train")
    assert len(pairs) > 80 and pairs.report.num_rows == pairs.report.num_kept == 100
    start = open_weights("shipped", MaskedDecoder, runs=tmp_path, uri="")
    assert adapt(start, family_of(config.model).build(config, Parts())) == []


def test_the_reference_of_settings_and_metrics_is_that_of_the_code() -> None:
    page = (ROOT / "experiments" / "README.md").read_text("utf-8")
    assert fill(page, reference_parts()) == page, "run `rudolph figures`"
    rows = [line for line in page.splitlines() if line.startswith("| `model.")]
    assert len(rows) > 50
    assert [row for row in rows if row.endswith("|  |")] == [], "a setting has no meaning"
