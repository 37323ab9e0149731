"""Verdicts on an experiment's claim and comparisons, computed from ``runs.csv`` alone.

Runs of the same seed form a pair.  They train on the same data in the same order and are evaluated
on the same examples.  They also start from the same weights where shapes allow.  Groups are
therefore compared by paired differences with Student's t.  Holm's method corrects the p-values for
all comparisons of the experiment.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rudolph.evaluation.statistics import (
    exact_paired,
    holm,
    minimum_detectable_effect,
    paired_t,
    pairs_needed,
)
from rudolph.reports.markdown import table_row
from rudolph.reports.schema import Claim, group_of

# Name parts that mark a metric of which lower is better.
LESS_IS_BETTER = re.compile(
    r"loss|(?<!codebook_)perplexity|error|seconds|bytes|mflops|bits_per|attention_logit|overflows"
    r"|(^|[/_])(fid|kid|cer|wer|nats)($|[/_])"
)
# Metrics of which a run has one outcome, 0 or 1, so that an exact test compares them.
ONE_OUTCOME_PER_RUN = re.compile(r"(^|/)converged($|/)")
SIGNIFICANCE_LEVEL = 0.05
REPRODUCED, CONTRADICTED = "reproduced", "contradicted"
INCONCLUSIVE = "inconclusive at this scale"
EFFECT_NOTE = (
    "Effect: mean of the paired differences over seeds; it is above 0 if the variant is better. "
    "MDE: minimum detectable effect."
)
# More seeds than anybody will run.
MAX_SEEDS = 1000


class Effect(NamedTuple):
    """The margin by which one group of runs is better than another, over pairs of seeds.

    Attributes:
        metric: column of ``runs.csv``.
        group: the group that is compared.
        than: the group that it is compared with.
        at_least: difference that the p-value tests against.
        pairs: number of seeds that both groups have.
        value: mean difference; above 0 if ``group`` is better.
        low: lower bound of the 95 % interval.
        high: upper bound of the 95 % interval.
        p_value: p-value against a difference of ``at_least``, corrected by Holm.
        detectable: difference that this number of pairs detects at 80 % power.
        needed: number of pairs that detects ``value`` at 80 % power; infinite above
            ``MAX_SEEDS``.
    """

    metric: str
    group: str
    than: str
    at_least: float
    pairs: int
    value: float
    low: float
    high: float
    p_value: float
    detectable: float
    needed: float

    @property
    def verdict(self) -> str:
        """The verdict on a claim: reproduced, contradicted or inconclusive.

        It depends on whether the difference is significantly above or below ``at_least``.
        """
        if not self.p_value <= SIGNIFICANCE_LEVEL:
            return INCONCLUSIVE
        return REPRODUCED if self.value > self.at_least else CONTRADICTED


def natural_order(name: str) -> str:
    """Return a key that sorts names by the numbers in them, ``k=2`` before ``k=10``."""
    numbers = re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):024.9f}", name)
    # The name breaks ties between equal numbers, such as 1_001 and 001_1.
    return f"{numbers} {name}"


def effects(
    runs: pd.DataFrame, *, metrics: Sequence[str], against: str | None, claim: Claim | None
) -> list[Effect]:
    """Return all comparisons of an experiment, with the claim's comparison first.

    Args:
        runs: the table ``runs.csv``.
        metrics: metrics in which every other group is compared with ``against``.
        against: the group to compare with; None compares only the claim's groups.
        claim: the experiment's claim, if it has one.

    Raises:
        ValueError: if a metric or a group does not exist.
    """
    groups = pd.Series(list(map(group_of, runs["run"], runs["seed"])), dtype=str)
    comparisons = (
        [] if claim is None else [(claim.metric, claim.better, claim.than, claim.at_least)]
    )
    if against is not None:
        for metric in metrics:
            others = sorted(set(groups) - {against}, key=natural_order)
            comparisons += [(metric, name, against, 0.0) for name in others]
    if claim is not None:
        # The claim's comparison is not repeated, in either direction.
        claim_key = (claim.metric, {claim.better, claim.than})
        comparisons = [
            comparisons[0],
            *(item for item in comparisons[1:] if (item[0], {*item[1:3]}) != claim_key),
        ]
    results = [_effect(runs, groups, *item) for item in comparisons]
    corrected = holm([item.p_value for item in results])
    return [item._replace(p_value=p) for item, p in zip(results, corrected, strict=True)]


def _effect(
    runs: pd.DataFrame,
    groups: "pd.Series[str]",
    metric: str,
    group: str,
    than: str,
    minimum: float,
) -> Effect:
    pairs = _paired_differences(runs, groups, metric, group, than)
    value = float(pairs.mean()) if len(pairs) else np.nan
    if len(pairs) < 2:
        # A single pair has no spread and thus no interval.
        unknown = dict.fromkeys(("low", "high", "detectable", "needed"), np.nan)
        return Effect(metric, group, than, minimum, len(pairs), value, p_value=1.0, **unknown)
    if ONE_OUTCOME_PER_RUN.search(metric):
        # Zeros and ones are not normal, so their spread gives no estimate of the seeds needed.
        exact = exact_paired(pairs)
        bounds = exact.low, exact.high, exact.p_value, np.nan, np.nan
        return Effect(metric, group, than, minimum, len(pairs), exact.value, *bounds)
    difference, spread = paired_t(pairs), float(pairs.std(ddof=1))
    # Equal differences estimate no spread, so they say nothing about other numbers of seeds.
    detectable = minimum_detectable_effect(spread, len(pairs)) if spread else np.nan
    needed = _seeds_needed(spread, abs(value)) if spread else np.nan
    return Effect(
        metric,
        group,
        than,
        minimum,
        len(pairs),
        difference.value,
        difference.low,
        difference.high,
        paired_t(pairs - minimum).p_value,
        detectable,
        needed,
    )


def _paired_differences(
    runs: pd.DataFrame, groups: "pd.Series[str]", metric: str, group: str, than: str
) -> np.ndarray[Any, Any]:
    """Return the margins by which one group is better than another, one per common seed.

    Raises:
        ValueError: If the runs lack the metric or one of the groups.
    """
    if metric not in runs:
        raise ValueError(
            f"claim.metric: expected one of {', '.join(runs.columns)}, got {metric!r}"
        )
    for name in (group, than):
        if name not in set(groups):
            available = ", ".join(dict.fromkeys(groups))
            raise ValueError(f"claim: expected runs of {available}, got {name!r}")
    values = [
        runs[(groups == name).to_numpy()].set_index("seed")[metric].dropna()
        for name in (group, than)
    ]
    pairs = (values[0] - values[1]).dropna().to_numpy()
    return -pairs if LESS_IS_BETTER.search(metric) else pairs


def _seeds_needed(spread: float, effect: float) -> float:
    if effect == 0 or minimum_detectable_effect(spread, MAX_SEEDS) > effect:
        return np.inf
    return pairs_needed(spread, effect)


def claim_lines(claim: Claim, effect: Effect, number: int) -> Iterator[str]:
    """Yield the claim and its verdict as Markdown.

    Args:
        claim: The claim.
        effect: The measured effect.
        number: Number of comparisons in the experiment.
    """
    margin = f" by at least {claim.at_least:g}" if claim.at_least else ""
    yield f"**Claim.** `{claim.better}` is better than `{claim.than}` in `{claim.metric}`{margin}."
    yield ""
    line = f"**Verdict: {effect.verdict}.** "
    if effect.pairs < 2:
        yield f"{line}A claim needs at least 2 seeds that both variants have, got {effect.pairs}."
        return
    correction = f" (Holm, {number} comparisons)" if number > 1 else ""
    line += f"Effect {effect.value:.3g} (95 % CI {effect.low:.3g} to {effect.high:.3g}, "
    line += f"n = {effect.pairs} seeds), p = {effect.p_value:.2g}{correction}."
    if effect.low == effect.high:
        yield f"{line} All seeds have this difference, so its spread is unknown."
        return
    if np.isnan(effect.detectable):
        yield f"{line} Outcomes are 0 or 1 per run, so test and interval are exact."
        return
    yield (
        f"{line} Minimum detectable effect with {effect.pairs} seeds at 80 % power: "
        f"{effect.detectable:.2g}; {_seeds_text(effect.needed)} seeds would detect the observed "
        "effect."
    )


def effects_table(effects: Sequence[Effect]) -> list[str]:
    """Return a Markdown table with one row per comparison."""
    head = ["metric", "variant", "baseline", "effect, 95 % CI", "p (Holm)", "seeds"]
    head += ["MDE, 80 % power", "seeds needed"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for effect in effects:
        cells = [f"`{effect.metric}`", effect.group, effect.than, format_interval(effect)]
        cells += [f"{effect.p_value:.2g}", str(effect.pairs)]
        is_known = not np.isnan(effect.detectable)
        cells += [f"{effect.detectable:.2g}" if is_known else "", _seeds_text(effect.needed)]
        lines.append(table_row(cells))
    return [*lines, "", EFFECT_NOTE]


def format_interval(effect: Effect) -> str:
    """Format an effect as ``0.12 [0.05, 0.19]``; a single pair has no interval."""
    if effect.pairs < 2:
        return f"{effect.value:.3g}"
    return f"{effect.value:.3g} [{effect.low:.3g}, {effect.high:.3g}]"


def _seeds_text(needed: float) -> str:
    if np.isnan(needed):
        return ""
    return f"more than {MAX_SEEDS}" if np.isinf(needed) else f"{needed:.0f}"
