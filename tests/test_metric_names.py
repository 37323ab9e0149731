"""Metric names predicted before a run cover committed results and a finished run."""

import csv
import json
import re
from pathlib import Path

import pytest
from test_experiment_files import FILES, NAMES
from tiny_run import TINY, write

from rudolph.config.experiment_file import load_experiment
from rudolph.config.metric_names import (
    COST,
    all_names,
    curve_names,
    metric_names,
)
from rudolph.config.metrics import EVALUATOR_METRICS
from rudolph.config.names import experiment_name
from rudolph.evaluation.report_card import EVALUATORS, NEEDS
from rudolph.files.settings import ConfigError
from rudolph.reports.claims import LESS_IS_BETTER, ONE_OUTCOME_PER_RUN
from rudolph.reports.store import FIXED
from rudolph.runs.search import search_rounds

RESULTS = Path(__file__).parent.parent / "results"
BOUND = re.compile(r"_(low|high|chance|target)$")


def test_every_question_names_its_metrics() -> None:
    assert list(EVALUATOR_METRICS) == list(EVALUATORS)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_metrics_and_curves_of_committed_results_are_known_before_they_run(file: Path) -> None:
    experiment = load_experiment(file)
    configs = [run.config for run in experiment.runs]
    if experiment.search is not None:
        configs += [run.config for run in next(search_rounds(experiment, lambda run: None))]
    metrics, curves = map(set, all_names(configs))
    folder = RESULTS / experiment_name(file)
    if not folder.is_dir():
        return
    with (folder / "runs.csv").open() as lines:
        columns = {BOUND.sub("", name) for name in next(csv.reader(lines))}
    grid = {name for run in experiment.runs for name in run.grid}
    grid |= set() if experiment.search is None else set(experiment.search.space)
    assert columns - {*FIXED, *COST, *grid} <= metrics
    with (folder / "curves.csv").open() as lines:
        assert {row["metric"] for row in csv.DictReader(lines)} <= curves | metrics


def test_a_finished_run_has_the_names_that_were_foretold(finished: Path) -> None:
    config = load_experiment(write(finished.parent.parent.parent)).runs[0].config
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["metrics"]) <= set(metric_names(config))
    # With four scenes, some families have none.
    missing = set(metric_names(config)) - set(summary["metrics"])
    assert all("scene_accuracy_" in name for name in missing), missing
    logged: set[str] = set()
    for line in (finished / "journal.jsonl").read_text().splitlines():
        logged |= set(json.loads(line).get("metrics", {}))
    foretold = set(curve_names(config))
    assert logged - set(summary["metrics"]) <= foretold
    # Training metrics are logged every ten steps, and this run has fewer.
    assert all("/train/" in name for name in foretold - logged)
    assert {"decoder/val/loss/image", "vqgan/val/psnr"} <= logged


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"report": {"table": ["vqgan/psrn/test"]}},
            "report.table: no run of this file reports 'vqgan/psrn/test'; "
            "did you mean vqgan/psnr/test?",
        ),
        ({"report": {"table": ["vqgan/psnr/validation"]}}, "did you mean vqgan/psnr/train?"),
        (
            {"report": {"curves": ["decoder/val/loss/imag"]}},
            "report.curves: no run of this file reports 'decoder/val/loss/imag'; "
            "did you mean decoder/val/loss/image?",
        ),
        ({"report": {"curves": ["clip/val/loss"]}}, "did you mean decoder/val/loss?"),
        ({"report": {"card": ["seconds"]}}, "report.card: no run of this file reports 'seconds'"),
        (
            {"report": {"table": ["zero_shot_classification/accuracy/test"]}},
            "; zero_shot_classification is not among evaluation.evaluators",
        ),
        (
            {"report": {"table": ["few_shot_captions/token_f1_8/test"]}},
            "; few_shot_captions is not among evaluation.evaluators",
        ),
        ({"report": {"best_of": ["rerank_clip"]}}, "report.best_of: no run"),
        ({"report": {"pareto": ["seconds", "vqgan/ssim"]}}, "did you mean vqgan/ssim/t"),
        (
            {"report": {"effects": ["vqgan/ssm/test"], "against": ""}},
            "did you mean vqgan/ssim/test?",
        ),
        ({"targets": {"vqgan/psnr": 5}}, "targets: no run of this file reports 'vqgan/psnr'"),
        (
            {
                "variants": {"a": {}, "b": {"data.flip_probability": 0.1}},
                "claim": {"metric": "text_to_image/nat/test", "better": "a", "than": "b"},
            },
            "claim.metric: no run of this file reports 'text_to_image/nat/test'; "
            "did you mean text_to_image/nats/test?",
        ),
        (
            {
                "variants": {"plain": {}, "flipped": {"data.flip_probability": 0.1}},
                "claim": {
                    "metric": "text_to_image/nats/test",
                    "better": "fliped",
                    "than": "plain",
                },
            },
            "claim.better: must be one of flipped, plain, got 'fliped'; did you mean flipped?",
        ),
    ],
)
def test_a_misspelt_metric_is_refused_with_the_nearest_when_the_file_is_loaded(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    plain = {"report": {"table": ["seconds", "vqgan/psnr/test"]}, "targets": {}}
    load_experiment(write(tmp_path, **plain))
    with pytest.raises(ConfigError) as error:
        load_experiment(write(tmp_path, **(plain | changes)))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_domain_of_a_search_is_one_metric_on_one_split(tmp_path: Path) -> None:
    def searched(metric: str, splits: list[str]) -> dict[str, object]:
        space = {"sampling.image.temperature": {"low": 0.5, "high": 1.5}}
        settings = TINY["settings"]
        evaluation = settings["evaluation"] | {"splits": splits}
        return {
            "settings": settings | {"evaluation": evaluation},
            "search": {"space": space, "domains": {"scenes": metric}, "trials": 8},
            "report": {},
            "targets": {},
        }

    right = "text_to_image/scene_accuracy"
    assert load_experiment(write(tmp_path, **searched(right, ["test"]))).search is not None
    for metric, splits, words in (
        ("text_to_image/scene_rigt", ["test"], f"did you mean {right}?"),
        (right, ["train", "test"], "must be a metric without its split, evaluated on one split"),
        ("text_to_image", ["test"], "must be a metric without its split"),
    ):
        with pytest.raises(ConfigError, match=r"search\.domains\.scenes: ") as error:
            load_experiment(write(tmp_path, **searched(metric, splits)))
        assert words in str(error.value)


def test_the_direction_of_a_metric_is_that_of_claims_about_it() -> None:
    metrics = [metric for own in EVALUATOR_METRICS.values() for metric in own]
    assert len(metrics) > 40
    for metric in metrics:
        assert bool(LESS_IS_BETTER.search(metric.name)) == metric.is_lower_better, metric.name
        assert bool(ONE_OUTCOME_PER_RUN.search(metric.name)) == (metric.unit == "0 or 1")
    assert set(NEEDS) == set(EVALUATORS) == set(EVALUATOR_METRICS)
