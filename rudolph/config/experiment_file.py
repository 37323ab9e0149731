"""Expand an experiment file into runs.

An experiment file has the keys of ``EXPERIMENT_KEYS``. Later settings override earlier ones:
the ``base`` file, ``settings``, the variant, the grid point, the command line. So at most two
files define a run.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rudolph.config.metric_names import COST, all_names, metric_names
from rudolph.config.metrics import EVALUATOR_METRICS
from rudolph.config.names import (
    experiment_name,
    require_domains,
    require_own_names,
    require_variant,
    run_name,
    value_labels,
)
from rudolph.config.run import RunConfig, layered, overrides_of, resolve_run
from rudolph.files import settings
from rudolph.files.settings import (
    STRICT,
    ConfigError,
    did_you_mean,
    flat_settings,
    read_yaml,
    setting_error,
    short_repr,
    validate,
)
from rudolph.reports.schema import REGION_PREFIX, Claim, Search, group_of, without_number


@dataclass(frozen=True)
class ReportConfig:
    """Metrics that an experiment's result page shows.

    Attributes:
        table: Metrics of the table.
        curves: Training curves of the curve figure.
        card: Metrics of the report card.
        best_of: Rankings whose best-of-n curves are drawn, such as ``rerank_clip``.
        shots: Few-shot scores whose curves are drawn, with ``*`` for the number of shots, such as
            ``few_shot/accuracy_*/test``.
        pareto: Two metrics that are drawn against each other.
        effects: Metrics in which variants or grid points are compared with ``against``.
        against: Baseline of ``effects``.
    """

    __pydantic_config__ = STRICT

    table: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    card: tuple[str, ...] = ()
    best_of: tuple[str, ...] = ()
    shots: tuple[str, ...] = ()
    pareto: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()
    against: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for incomplete comparisons."""
        if bool(self.effects) != (self.against is not None):
            raise ValueError("against and effects belong together: give both or none")
        if len(self.pareto) not in (0, 2):
            raise ValueError(f"pareto must name two metrics, got {len(self.pareto)}")


@dataclass(frozen=True)
class Run:
    """One run of an experiment: its name, variant, grid point and configuration."""

    name: str
    variant: str
    grid: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Experiment:
    """A resolved experiment file.

    Attributes:
        path: The experiment file.
        name: Path of its results below ``results/``.
        title: Title of its result page.
        question: Question that the experiment answers.
        source: Paper or repository that the experiment reproduces.
        targets: Value that each metric should at least reach.
        claim: The claim of the source.
        report: Metrics of the result page.
        runs: Runs of all variants, grid points and seeds.
        settings: Settings that all runs share.
        seeds: Seeds of every variant.
        search: Search that adds runs, if any.
    """

    path: Path
    name: str
    title: str
    question: str
    source: str
    targets: Mapping[str, float]
    claim: Claim | None
    report: ReportConfig
    runs: tuple[Run, ...]
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    search: Search | None


EXPERIMENT_KEYS = {
    "title": str,
    "question": str,
    "source": str,
    "base": str,
    "settings": dict,
    "variants": dict,
    "grid": dict,
    "seeds": list,
    "search": dict,
    "targets": dict,
    "claim": dict,
    "report": dict,
}


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment file and expand its runs.

    Args:
        path: The experiment file.
        overrides: ``key=value`` settings of the command line, values in YAML.

    Returns:
        The resolved experiment.

    Raises:
        ConfigError: If the file has an error; the message names the first one in one line.
    """
    path = Path(path)
    content = read_yaml(path)
    settings.require_keys(path, content, EXPERIMENT_KEYS)
    for key in ("title", "question"):
        if not content.get(key, "").strip():
            raise ConfigError(f"{path}: {key}: is missing; every experiment has one")
    report = validate(path, ReportConfig, content.get("report", {}), "report")
    targets = validate(path, dict[str, float], content.get("targets", {}), "targets")
    claim = validate(path, Claim, content["claim"], "claim") if "claim" in content else None
    changes = overrides_of(overrides, _shared_settings(path, content))
    runs, search = tuple(_expand(path, content, changes)), _search(path, content)
    groups = {group_of(run.name, run.config.seed) for run in runs}
    groups |= (
        set() if search is None else {f"{REGION_PREFIX}{domain}" for domain in search.domains}
    )
    _check_compared(path, claim, report, groups)
    if not changes:
        # A command line that changes settings may drop metrics that the report names.
        _check_metrics(path, runs, report, targets, claim)
    if search is not None:
        _check_domains(path, content, search, runs)
    return Experiment(
        path=path,
        name=experiment_name(path),
        title=content["title"].strip(),
        question=" ".join(content["question"].split()),
        source=" ".join(content.get("source", "").split()),
        targets=targets,
        claim=claim,
        report=report,
        runs=runs,
        settings=layered(_shared_settings(path, content), changes),
        seeds=tuple(content.get("seeds", [0])),
        search=search,
    )


def _check_compared(
    path: Path, claim: Claim | None, report: ReportConfig, groups: set[str]
) -> None:
    """Raise ``ConfigError`` for a comparison with runs that the file does not have."""
    named = {} if claim is None else {"claim.better": claim.better, "claim.than": claim.than}
    if report.against is not None:
        named["report.against"] = report.against
    for key, name in named.items():
        if name not in groups:
            rule = f"must be one of {', '.join(sorted(groups))}"
            hint = did_you_mean(name, groups)
            raise ConfigError(f"{path}: {key}: {rule}, got {short_repr(name)}{hint}")


def _check_metrics(
    path: Path,
    runs: Sequence[Run],
    report: ReportConfig,
    targets: Mapping[str, float],
    claim: Claim | None,
) -> None:
    """Raise ``ConfigError`` for a metric that no run of the file reports."""
    metrics, curves = all_names(run.config for run in runs)
    rankings = [name.partition("/best_of_")[0] for name in metrics if "/best_of_" in name]
    columns = [*metrics, *COST]
    for key, names, legal in (
        ("report.table", report.table, columns),
        ("report.curves", report.curves, [*curves, *metrics]),
        ("report.card", report.card, metrics),
        ("report.best_of", report.best_of, list(dict.fromkeys(rankings))),
        ("report.shots", report.shots, list(dict.fromkeys(map(without_number, metrics)))),
        ("report.pareto", report.pareto, columns),
        ("report.effects", report.effects, columns),
        ("targets", tuple(targets), metrics),
        ("claim.metric", () if claim is None else (claim.metric,), columns),
    ):
        for name in names:
            if name not in legal:
                raise _no_metric(path, key, name, legal)


def _no_metric(path: Path, key: str, name: str, legal: Sequence[str]) -> ConfigError:
    metric = name.rpartition("/")[0]
    is_reported = any(name.startswith(f"{metric}/") for name in legal)
    written = {metric, without_number(name).rpartition("/")[0]}
    evaluators = [
        evaluator
        for evaluator, metrics in EVALUATOR_METRICS.items()
        if any(member.name in written for member in metrics)
    ]
    if evaluators and not is_reported:
        hint = f"; {evaluators[0]} is not among evaluation.evaluators"
    else:
        others = ", ..." if len(legal) > 8 else ""
        known = f"; legal are {', '.join(legal[:8]) or 'none'}{others}"
        hint = did_you_mean(name, legal) or known
    return ConfigError(f"{path}: {key}: no run of this file reports {short_repr(name)}{hint}")


def _check_domains(
    path: Path, content: Mapping[str, Any], search: Search, runs: Sequence[Run]
) -> None:
    """Raise ``ConfigError`` for a domain that is not a metric of both trials and test runs."""
    flat = layered(_shared_settings(path, content), search.settings)
    trial = resolve_run(path, flat | {name: axis.low for name, axis in search.space.items()})
    tested = resolve_run(path, _shared_settings(path, content))
    for config in (trial, tested, *(run.config for run in runs)):
        metrics = metric_names(config)
        for domain, metric in search.domains.items():
            splits = [name for name in metrics if name.startswith(f"{metric}/")]
            key = f"search.domains.{domain}"
            if not splits:
                without = list(dict.fromkeys(name.rpartition("/")[0] for name in metrics))
                raise _no_metric(path, key, metric, without)
            if len(splits) > 1:
                rule = "must be a metric without its split, evaluated on one split"
                raise setting_error(path, key, rule, ", ".join(splits))


def _expand(path: Path, content: Mapping[str, Any], overrides: dict[str, Any]) -> list[Run]:
    """Return the runs of all variants, grid points and seeds in the order of the file."""
    shared = _shared_settings(path, content)
    variants = content.get("variants") or {"": {}}
    grid = _grid(path, content, overrides, shared)
    seeds = content.get("seeds", [0])
    settings.require_distinct(path, "seeds", seeds)
    labels = [value_labels(path, key, values) for key, values in grid.items()]
    expanded: dict[tuple[str, str], Run] = {}
    for variant, changes in variants.items():
        own = _variant(path, variant, changes, shared, is_searched="search" in content)
        changed = layered(shared, own)
        points = zip(itertools.product(*grid.values()), itertools.product(*labels), strict=True)
        for point, label in points:
            values = dict(zip(grid, point, strict=True))
            named = dict(zip(grid, label, strict=True))
            for seed in seeds:
                config = resolve_run(path, layered(changed, values, {"seed": seed}, overrides))
                run = Run(run_name(variant, named, config.seed), variant, values, config)
                # A seed on the command line makes all seeds of the file equal.
                expanded.setdefault((run.name, config.digest), run)
    require_own_names(path, [(run.name, run.config.seed) for run in expanded.values()])
    return list(expanded.values())


def _search(path: Path, content: Mapping[str, Any]) -> Search | None:
    """Return the checked search of an experiment file, or None."""
    if "search" not in content:
        return None
    search = validate(path, Search, content["search"], "search")
    lowest = {name: axis.low for name, axis in search.space.items()}
    highest = {name: axis.high for name, axis in search.space.items()}
    shared = _shared_settings(path, content)
    _without_seed(path, lowest, "search.space", shared)
    flat = _without_seed(path, search.settings, "search.settings", shared)
    require_domains(path, search.domains)
    for corner in (lowest, highest):
        resolve_run(path, layered(shared, flat, corner))
    return replace(search, settings=flat)


def _shared_settings(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    shared: dict[str, Any] = {}
    if "base" in content:
        base = path.parent / content["base"]
        shared = _without_seed(base, read_yaml(base))
        resolve_run(base, shared)
    return layered(shared, _without_seed(path, content.get("settings", {}), "settings", shared))


def _variant(
    path: Path, variant: str, changes: Any, shared: Mapping[str, Any], *, is_searched: bool
) -> dict[str, Any]:
    if not variant and not changes:
        return {}
    require_variant(path, variant, is_searched=is_searched)
    if not isinstance(changes, dict):
        raise setting_error(path, f"variants.{variant}", "must be a mapping of settings", changes)
    return _without_seed(path, changes, f"variants.{variant}", shared)


def _grid(
    path: Path,
    content: Mapping[str, Any],
    overrides: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """Return the values of each grid setting; a value on the command line replaces them."""
    grid = _without_seed(path, content.get("grid", {}), "grid", shared)
    for key, values in grid.items():
        settings.require_distinct(path, f"grid.{key}", values)
    return {key: [overrides[key]] if key in overrides else grid[key] for key in grid}


def _without_seed(
    path: Path,
    content: Mapping[str, Any],
    prefix: str = "",
    lower: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return flat settings; raise ``ConfigError`` for a seed, which belongs under ``seeds``."""
    if "seed" in content:
        key = f"{prefix}.seed" if prefix else "seed"
        raise setting_error(path, key, "seeds are listed under `seeds:`", content["seed"])
    return flat_settings(path, RunConfig, content, prefix, lower=lower)
