"""Names of experiments and runs: unique and valid on every file system."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import TINY

from rudolph.config.experiment_file import load_experiment
from rudolph.config.names import LONGEST, experiment_name
from rudolph.files.settings import ConfigError

ROOT = Path(__file__).parent.parent


def write(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = TINY | {"targets": {}, "report": {}} | changes
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "values",
    [
        ["a/pairs.csv", "b/pairs.csv"],
        ["a/pairs.csv", "a_pairs.csv", "a pairs.csv"],
        ["данные", "пары"],
        ["A.csv", "a.csv"],
        ["a" * 300 + "1.csv", "a" * 300 + "2.csv"],
        ["../x.csv", "/x.csv", "x.csv", ""],
    ],
)
def test_points_of_a_grid_have_names_of_their_own(tmp_path: Path, values: list[str]) -> None:
    runs = load_experiment(write(tmp_path / "x.yaml", grid={"data.manifest.path": values})).runs
    assert [run.config.data.manifest.path for run in runs] == values
    names = {run.name.casefold() for run in runs}
    assert len(names) == len(values), names
    assert all(len(name) <= LONGEST and "/" not in name for name in names)
    # A value keeps its name at any position of the list.
    grid = {"data.manifest.path": values[::-1]}
    again = load_experiment(write(tmp_path / "x.yaml", grid=grid)).runs
    assert [run.name for run in again] == [run.name for run in runs][::-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": {"sampling.image.temperature": [0.1, 0.10000001]}}, "first six digits"),
        ({"grid": {"sampling.image.temperature": [1, 1.0]}}, "first six digits"),
        ({"grid": {"tokenizer.path": [None, "null"]}}, "first six digits"),
        ({"grid": {"tokenizer.path": ["1", "01"]}}, "first six digits"),
        ({"variants": {"null": {}}}, "empty cells"),
        ({"variants": {"Same": {}, "same": {"model.num_layers": 1}}}, "'Same-seed0' and 'same-"),
        ({"variants": {"a-seed1": {}}}, "no -seed0"),
        ({"variants": {"a/b": {}}}, "names must be letters"),
        ({"variants": {"": {"model.num_layers": 1}}}, "names must be letters"),
        ({"variants": {"a" * 200: {}}}, f"at most {LONGEST} characters"),
    ],
)
def test_runs_that_would_share_a_name_are_one_line(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path / "x.yaml", **changes))
    message = str(caught.value)
    assert words in message and message.startswith(f"{tmp_path / 'x.yaml'}: ")
    assert "\n" not in message and len(message) < 400


def test_values_of_other_kinds_have_names_that_tables_tell_apart(tmp_path: Path) -> None:
    grid = {
        "sampling.image.top_k": [None, 1],
        "model.qk_norm": [True, False],
        "evaluation.splits": [["train"], ["test"], ["train", "test"]],
    }
    runs = load_experiment(write(tmp_path / "x.yaml", grid=grid)).runs
    assert len({run.name for run in runs}) == 12
    assert runs[0].name == "top_k=None-qk_norm=True-splits=_train_-seed0"


def test_a_setting_of_the_command_line_names_the_point_and_the_seed(tmp_path: Path) -> None:
    grid = {"sampling.image.top_k": [1, 2], "sampling.image.top_p": [0.5, 0.9]}
    path = write(tmp_path / "x.yaml", grid=grid, seeds=[0, 1])
    runs = load_experiment(path, ("sampling.image.top_k=5", "seed=7")).runs
    assert [run.name for run in runs] == ["top_k=5-top_p=0.5-seed7", "top_k=5-top_p=0.9-seed7"]
    assert [run.grid["sampling.image.top_k"] for run in runs] == [5, 5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {"trial000": {}}}, "must not start with trial"),
        ({"variants": {"region_all": {}}}, "must not start with trial"),
        ({"domains": {"a/b": "text_to_image/object_accuracy"}}, "search.domains: names must be"),
        (
            {"domains": dict.fromkeys(("a", "A"), "text_to_image/object_accuracy")},
            "more than case",
        ),
    ],
)
def test_names_of_a_search_are_its_own(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    search = {
        "space": {"sampling.image.temperature": {"low": 0.1, "high": 3.0}},
        "domains": changes.pop("domains", {"all": "text_to_image/object_accuracy"}),
        "settings": {"evaluation.splits": ["train"]},
    }
    asked = {"evaluators": ["scene_accuracy"], "splits": ["test"]}
    settings = TINY["settings"] | {"evaluation": asked}
    with pytest.raises(ConfigError, match=words):
        load_experiment(write(tmp_path / "x.yaml", settings=settings, search=search, **changes))


def test_names_mirror_the_paths_of_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, name in (
        ("experiments/theme/x.yaml", "theme/x"),
        ("experiments/x.yaml", "x"),
        ("experiments/a/b/x.v2.yml", "a/b/x.v2"),
        ("./experiments/../a/x.yaml", "a/x"),
        ("x.yaml", "x"),
        ("experiments/finetune/captions.yaml", "finetune/captions"),
        ("finetune/captions.yaml", "finetune/captions"),
        ("experiments/finetune/other.yaml", "finetune/other"),
        (str(ROOT / "experiments" / "masks" / "cost.yaml"), "masks/cost"),
        (str(tmp_path.parent / "elsewhere" / "x.yaml"), "x"),
        (str(tmp_path / "b" / "x.yaml"), "b/x"),
    ):
        assert experiment_name(Path(path)) == name, path
    for path in ("experiments/a/figures.yaml", ".cache/x.yaml", "experiments/samples/x/y.yaml"):
        with pytest.raises(ConfigError, match="expected a path of names"):
            experiment_name(Path(path))
