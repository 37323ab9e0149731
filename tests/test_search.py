"""A search: it resumes, finds the known optimum, and reports it on its page."""

import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rudolph.config.experiment_file import Experiment, Run, load_experiment
from rudolph.files.settings import ConfigError
from rudolph.reports.report import generated_part
from rudolph.reports.schema import TRIAL, Figure, Report
from rudolph.reports.search_tables import REGIONS, _tests_table, read_regions
from rudolph.reports.store import check_results_folder, export_results, write_index
from rudolph.runs.execution import Folders, run_folder
from rudolph.runs.runner import all_runs, search_of
from rudolph.runs.search import groups_sharing_pairs, search_rounds
from rudolph.tracking.event_log import EventLog

SEARCH = """
title: A search
question: Is the middle found?
settings:
  data.dataset: shapes
  vqgan.resolution: 32
  evaluation: {evaluators: [scene_accuracy], splits: [test]}
search:
  space:
    sampling.image.temperature: {low: 0.1, high: 10.0, log: true}
    sampling.image.top_p: {low: 0.1, high: 1.0}
  domains: {cold: text_to_image/scene_accuracy, hot: text_to_image/object_accuracy}
  trials: 24
  tolerance: 0.1
  settings: {evaluation.splits: [validation]}
variants:
  plain: {sampling.image.temperature: 1.0}
seeds: [3, 4]
claim: {metric: text_to_image/scene_accuracy/test, better: region_cold, than: plain}
"""

METRICS = {"cold": "text_to_image/scene_accuracy", "hot": "text_to_image/object_accuracy"}


def load(folder: Path, text: str = SEARCH) -> Experiment:
    path = folder / "search.yaml"
    path.write_text(text)
    return load_experiment(path)


def scores(run: Run) -> dict[str, float]:
    """Score a run: best at temperature 0.3 (cold) or 3 (hot), with top-p above 0.5."""
    config = run.config
    [split] = config.evaluation.splits
    temperature, top_p = config.sampling.image.temperature, config.sampling.image.top_p or 1.0
    found = {}
    for domain, best in (("cold", 0.3), ("hot", 3.0)):
        away = abs(temperature / best if temperature > best else best / temperature) - 1
        value = max(0.0, 0.9 - 0.3 * away - max(0.0, 0.5 - top_p))
        name = f"{METRICS[domain]}/{split}"
        found |= {name: value, f"{name}_low": value - 0.04, f"{name}_high": value + 0.04}
    return found


def row_of(run: Run) -> dict[str, Any]:
    return {"variant": run.variant, **run.grid, **scores(run)}


def test_trials_fill_the_space_then_close_in_and_regions_are_tested(tmp_path: Path) -> None:
    rounds = list(search_rounds(load(tmp_path), row_of))
    assert [len(runs) for runs in rounds] == [12, *[1] * 12, 4]
    runs = list(itertools.chain.from_iterable(rounds))
    trials = [run for run in runs if run.variant == TRIAL]
    assert len(trials) == 24 and len(runs) == 24 + 2 * 2
    assert len({run.config.digest for run in runs}) == len(runs)
    assert {run.config.evaluation.splits for run in trials} == {("validation",)}
    early, late = trials[:12], trials[12:]
    for domain, at in (("cold", 0), ("hot", 1)):
        name = f"{METRICS[domain]}/validation"
        mean = [sum(scores(run)[name] for run in part) for part in (early, late[at::2] * 2)]
        assert mean[1] > mean[0], "proposals are no better than even ones"
    tests = {run.name: run.config for run in runs[24:]}
    assert set(tests) == {f"region_{d}-seed{s}" for d in ("cold", "hot") for s in (3, 4)}
    for name, config in tests.items():
        best = 0.3 if "cold" in name else 3.0
        assert config.evaluation.splits == ("test",) and config.seed == int(name[-1])
        assert best / 2 < config.sampling.image.temperature < 2 * best


def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    experiment = load(tmp_path)
    whole = [run.config.digest for runs in search_rounds(experiment, row_of) for run in runs]
    known: dict[str, dict[str, Any]] = {}
    for stop in (9, 17, 26, 100):
        rounds = search_rounds(experiment, lambda r: known.get(r.name))
        for run in itertools.islice(itertools.chain.from_iterable(rounds), stop):
            known.setdefault(run.name, row_of(run))
    rounds = search_rounds(experiment, lambda r: known.get(r.name))
    again = [run.config.digest for runs in rounds for run in runs]
    assert again == whole


def finish(experiment: Experiment, run: Run, folders: Folders) -> None:
    folder = run_folder(folders, experiment, run)
    folder.mkdir(parents=True)
    found = scores(run)
    metrics = {name: value for name, value in found.items() if not name.endswith(("low", "high"))}
    summary = {
        "run": run.name,
        "variant": run.variant,
        "grid": dict(run.grid),
        "seed": run.config.seed,
        "digest": run.config.digest,
        "commit": "0123456789abcdef",
        "dirty": False,
        "status": "finished",
        "seconds": {"decoder": 2.0},
        "metrics": metrics,
        "intervals": {name: [found[f"{name}_low"], found[f"{name}_high"]] for name in metrics},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    digest = run.config.digest
    EventLog(folder, experiment=experiment.name, run=run.name, digest=digest).close()
    (folder / "config.yaml").write_text(f"run: {run.name}\n")
    (folder / "environment.json").write_text('{"machine": {"threads": 2}}')


def test_the_page_tells_regions_and_tests_from_the_tables_alone(tmp_path: Path) -> None:
    experiment, folders = load(tmp_path), Folders(tmp_path, tmp_path / "runs")
    assert len(all_runs(experiment, folders)) == 2
    for runs in itertools.chain([experiment.runs], search_of(experiment, folders)):
        for run in runs:
            finish(experiment, run, folders)
    runs = all_runs(experiment, folders)
    assert len(runs) == 2 + 28
    report = Report(
        "search",
        "A search",
        "Is it found?",
        "search.yaml",
        figures=(Figure("regions", tuple(experiment.search.space), x="setting", by="domain"),),
        claim=experiment.claim,
        search=experiment.search,
        same_pairs=groups_sharing_pairs(experiment),
    )
    belonging = {(run.name, run.config.digest) for run in runs}
    folder = export_results(folders.runs, tmp_path / "results", report=report, runs=belonging)
    page = folder / "README.md"
    page.write_text(page.read_text().replace("_Not written", "Found. _Not"))
    write_index(tmp_path / "results")
    assert check_results_folder(tmp_path / "results") == []
    regions = read_regions(folder).set_index(["domain", "setting"])
    cold = regions.loc[("cold", "sampling.image.temperature")]
    assert 0.15 < cold["low"] < 0.3 < cold["high"] < 0.6
    said = generated_part(page)
    assert f"| {cold['low']:g} to {cold['high']:g} |" in said
    assert "comparisons)" not in said, "trials are no comparisons"
    assert "| tested on unseen pairs |" in said
    assert "**Verdict: reproduced.**" in said and "| region_hot |" in said
    tables = pd.read_csv(folder / "runs.csv")
    tests = tables[tables["variant"] == "region_hot"][f"{METRICS['hot']}/test"]
    assert f"{tests.mean():.3g} [" in said
    figure = next((folder / "figures").glob("regions-*.svg"))
    assert figure.stat().st_size > 0
    (folder / REGIONS).write_text((folder / REGIONS).read_text().replace("cold", "warm"))
    assert check_results_folder(tmp_path / "results") != []


@pytest.mark.parametrize(
    ("test", "trial", "variant", "shared"),
    [
        ("splits: [test]", "evaluation.splits: [validation]", "", ()),
        (
            "splits: [test]",
            "evaluation.splits: [test]",
            "",
            ("region_cold", "region_hot", "plain"),
        ),
        ("splits: [test]", "evaluation.eval_fold: 0", "", ("region_cold", "region_hot", "plain")),
        ("splits: [test], eval_fold: 1", "evaluation.eval_fold: 0", "", ()),
        (
            "splits: [test], eval_fold: 0",
            "evaluation.eval_fold: 0",
            "",
            ("region_cold", "region_hot", "plain"),
        ),
        (
            "splits: [test], eval_fold: 1",
            "evaluation.eval_fold: 0",
            ", evaluation.eval_fold: 0",
            ("plain",),
        ),
        (
            "splits: [test]",
            "{evaluation.splits: [validation], data.shapes.seed: 3}",
            "",
            ("region_cold", "region_hot", "plain"),
        ),
    ],
)
def test_the_page_says_whether_trials_had_the_pairs_of_tests(
    tmp_path: Path, test: str, trial: str, variant: str, shared: tuple[str, ...]
) -> None:
    text = SEARCH.replace("splits: [test]", test).replace(
        "temperature: 1.0", f"temperature: 1.0{variant}"
    )
    trial = trial if trial.startswith("{") else f"{{{trial}}}"
    experiment = load(tmp_path, text.replace("{evaluation.splits: [validation]}", trial))
    assert groups_sharing_pairs(experiment) == shared
    rows = [
        {"variant": name, f"{METRICS[domain]}/test": 0.5}
        for name in ("region_cold", "region_hot", "plain")
        for domain in METRICS
    ]
    table = "\n".join(_tests_table(experiment.search, pd.DataFrame(rows), shared))
    assert ("| tested on unseen pairs |" in table) == (not shared)
    assert all(
        f"`{name}`" in table.partition("Trials used the same pairs as")[2] for name in shared
    )
    assert "unseen pairs" not in "\n".join(
        _tests_table(experiment.search, pd.DataFrame(rows), None)
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("top_p: {low", "top_q: {low", "search.space.sampling.image.top_q: unknown"),
        ("high: 1.0}", "high: 2.0}", "top_p"),
        ("trials: 24", "trials: 3", "trials must be at least 8"),
        ("region_cold", "region_warm", "claim.better: must be one of"),
        ("low: 0.1, high: 10.0", "low: 0.1, high: 0.05", "high must be above low"),
    ],
)
def test_a_wrong_search_is_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in SEARCH
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, SEARCH.replace(old, new))
    assert words in str(caught.value) and "\n" not in str(caught.value)
