"""Verdicts follow from the runs alone: for known effects, no effect, and too little data."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rudolph.config.experiment_file import load_experiment
from rudolph.config.run import ConfigError
from rudolph.reports.claims import (
    CONTRADICTED,
    INCONCLUSIVE,
    REPRODUCED,
    claim_lines,
    effects,
    natural_order,
)
from rudolph.reports.report import generated_part, read_effects
from rudolph.reports.schema import Claim, Report, group_of
from rudolph.reports.store import check_results_folder, export_results, write_index
from rudolph.tracking.event_log import EventLog

LOSS, RIGHT = "decoder/val/loss/image", "answers/exact_match/test"


def table(values: dict[str, list[float]], metric: str = RIGHT) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"run": f"{group}-seed{seed}", "seed": seed, metric: value}
            for group, own in values.items()
            for seed, value in enumerate(own)
        ]
    )


def verdict(one: list[float], other: list[float], metric: str = RIGHT, least: float = 0.0) -> str:
    claim = Claim(metric, "one", "other", least)
    runs = table({"one": one, "other": other}, metric)
    return effects(runs, metrics=(), against=None, claim=claim)[0].verdict


def test_equal_differences_tell_nothing_about_other_numbers_of_seeds() -> None:
    claim = Claim(RIGHT, "one", "other", 0.0)
    for shift in (0.0, 0.5):
        runs = table({"one": [shift] * 3, "other": [0.0] * 3})
        (effect,) = effects(runs, metrics=(), against=None, claim=claim)
        assert (effect.low, effect.value, effect.high) == (shift, shift, shift)
        assert np.isnan(effect.detectable) and np.isnan(effect.needed)
        assert "so its spread is unknown" in list(claim_lines(claim, effect, 1))[-1]


def test_a_verdict_is_where_the_interval_lies() -> None:
    base = [0.1, 0.5, 0.3, 0.9, 0.7]
    more = [value + 0.2 + 0.01 * k for k, value in enumerate(base)]
    assert verdict(more, base) == REPRODUCED
    assert verdict(base, more) == CONTRADICTED
    # A lower loss is better.
    assert verdict(more, base, LOSS) == CONTRADICTED
    assert verdict(base, more, LOSS) == REPRODUCED
    # With a minimum effect: surely larger, surely smaller, and neither.
    assert verdict(more, base, least=0.1) == REPRODUCED
    assert verdict(more, base, least=0.5) == CONTRADICTED
    assert verdict(more, base, least=0.22) == INCONCLUSIVE
    # Not worse than by a margin.
    assert verdict(base, more, least=-0.5) == REPRODUCED
    assert verdict(more[:1], base[:1]) == INCONCLUSIVE


def test_pairs_are_of_one_seed_whatever_the_order_of_the_runs() -> None:
    runs = table({"one": [1.0, 2.0, 9.0, 4.0], "other": [0.5, 1.6, 8.4]})
    claim = Claim(RIGHT, "one", "other")
    found = effects(runs, metrics=(), against=None, claim=claim)[0]
    shuffled = effects(runs.sample(frac=1, random_state=1), metrics=(), against=None, claim=claim)[
        0
    ]
    expected = stats.ttest_rel([1.0, 2.0, 9.0], [0.5, 1.6, 8.4])
    assert found == shuffled and found.pairs == 3
    assert found.value == pytest.approx(0.5) and found.p_value == pytest.approx(expected.pvalue)


def test_all_comparisons_share_one_correction_and_the_claim_is_made_once() -> None:
    rng = np.random.default_rng(0)
    runs = table({name: list(rng.normal(size=4)) for name in ("base", "a", "b", "c")})
    runs[LOSS] = rng.normal(size=len(runs))
    claim = Claim(RIGHT, "b", "base")
    found = effects(runs, metrics=(RIGHT, LOSS), against="base", claim=claim)
    asked = [(RIGHT, "b"), (RIGHT, "a"), (RIGHT, "c"), (LOSS, "a"), (LOSS, "b"), (LOSS, "c")]
    assert [(each.metric, each.group) for each in found] == asked
    turned = Claim(RIGHT, "base", "b")
    found_turned = effects(runs, metrics=(RIGHT, LOSS), against="base", claim=turned)
    assert [each.p_value for each in found_turned] == [each.p_value for each in found]
    assert found_turned[0].value == -found[0].value
    alone = effects(runs, metrics=(), against=None, claim=claim)[0]
    assert alone.p_value <= found[0].p_value <= min(1, 6 * alone.p_value)


def test_groups_stand_as_their_numbers_go() -> None:
    names = ["a", "k=0.5", "k=3", "k=15", "k=15-p=0.25", "k=15-p=0.8"]
    assert sorted(names[3:] + names[:3], key=natural_order) == names
    assert sorted(["w1_001", "w001_1"], key=natural_order) == ["w001_1", "w1_001"]
    runs = pd.DataFrame(
        {"run": f"{name}-seed{seed}", "seed": seed, "score": seed + at}
        for at, name in enumerate(reversed(names))
        for seed in (0, 1)
    )
    found = effects(runs, metrics=("score",), against="a", claim=None)
    assert [each.group for each in found] == names[1:]


def test_where_nothing_differs_few_experiments_find_anything() -> None:
    """A/A test: of 200 experiments with 3 comparisons, at most 5 % report an effect."""
    rng = np.random.default_rng(7)
    wrong = 0
    for _ in range(200):
        seeds = rng.normal(size=5)
        values = {name: list(seeds + 0.3 * rng.normal(size=5)) for name in "abcd"}
        found = effects(table(values), metrics=(RIGHT,), against="a", claim=None)
        wrong += any(each.verdict != INCONCLUSIVE for each in found)
    assert wrong <= 10


@pytest.mark.parametrize(
    ("run", "seed", "group"),
    [("a-seed10", 10, "a"), ("seed0", 0, ""), ("a-top_k=8-seed1", 1, "a-top_k=8")],
)
def test_a_group_is_a_run_without_its_seed(run: str, seed: int, group: str) -> None:
    assert group_of(run, seed) == group


def write_runs(folder: Path) -> None:
    for group, shift in (("row", 0.0), ("causal", 0.4)):
        for seed, value in enumerate((2.0, 2.3, 2.1)):
            run = folder / "tried" / f"{group}-seed{seed}"
            run.mkdir(parents=True)
            summary = {
                "run": run.name,
                "variant": group,
                "seed": seed,
                "digest": run.name,
                "commit": "0123456789abcdef",
                "dirty": False,
                "status": "finished",
                "seconds": {"decoder": 57.0, "overhead": 3.0},
                "metrics": {LOSS: value + shift + 0.01 * seed * shift},
            }
            (run / "summary.json").write_text(json.dumps(summary))
            EventLog(run, experiment="tried", run=run.name, digest=run.name).close()
            (run / "config.yaml").write_text(f"run: {run.name}\n")
            (run / "environment.json").write_text('{"machine": {"threads": 2}}')


def test_a_page_and_the_index_tell_verdict_interval_and_cost(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    report = Report(
        "tried", "Row or causal?", "Which?", "tried.yaml", claim=Claim(LOSS, "row", "causal")
    )
    folder = export_results(tmp_path / "runs", tmp_path / "results", report=report)
    page = folder / "README.md"
    page.write_text(page.read_text().replace("_Not written", "Row. _Not"))
    index = generated_part(write_index(tmp_path / "results"))
    found = read_effects(folder)[0]
    interval = f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"
    assert f"**Verdict: {REPRODUCED}.**" in generated_part(page)
    assert "6 runs, 6 minutes in all, 5.0% of it overhead such as tracking" in generated_part(page)
    assert (
        f"| {REPRODUCED} | {interval} |" in index
        and "| 12 |" in index
        and interval in generated_part(page)
    )
    assert check_results_folder(tmp_path / "results") == []
    page.write_text(page.read_text().replace(REPRODUCED, CONTRADICTED))
    assert "differs from runs.csv" in check_results_folder(tmp_path / "results")[0]


CLAIMED = """
title: A test
question: Is a claim read?
settings: {vqgan.resolution: 32}
variants:
  row: {model.layer_masks: [row]}
  causal: {model.layer_masks: [causal]}
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("claim: {metric: m, better: rwo, than: causal}", "claim.better: must be one of causal,"),
        ("claim: {metric: m, better: row, than: row}", "better and than must differ"),
        ("claim: {metric: m, better: row}", "claim.than"),
        ("report: {effects: [m]}", "against and effects belong together"),
        ("report: {effects: [m], against: columns}", "report.against: must be one of"),
    ],
)
def test_a_claim_about_runs_that_are_not_there_is_one_line(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "test.yaml"
    path.write_text(CLAIMED + text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
