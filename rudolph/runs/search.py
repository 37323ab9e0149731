"""Hyperparameter search: trials proposed by Optuna, then tests of the regions that score well.

A proposal depends only on the runs before it and on its number, so an interrupted search resumes
exactly.

Source: Bergstra 2011 (tree-structured Parzen estimator), by Optuna's ask-and-tell interface.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from rudolph.config.experiment_file import Experiment, Run
from rudolph.config.run import RunConfig, resolve_run
from rudolph.evaluation.regions import Axis, low_discrepancy_points, points_within, settings_at
from rudolph.reports.schema import REGION_PREFIX, TRIAL, Search
from rudolph.reports.search_tables import find_domain_region

# Optuna has no seed per proposal, so each proposal gets a sampler with its own seed.
SEEDS_APART = 1000

# Returns the row of a finished run in ``runs.csv``; None for an unfinished run.
RowOf = Callable[[Run], Mapping[str, Any] | None]


def search_rounds(experiment: Experiment, row_of: RowOf) -> Iterator[list[Run]]:
    """Yield the rounds of a search: low-discrepancy trials, single proposals, region tests.

    The caller executes the runs of a round, in any order or in parallel, before taking the next
    round.  Failed runs do not influence the proposals.

    Args:
        experiment: Experiment with a ``search`` section; without one there are no rounds.
        row_of: Returns the row of a finished run in ``runs.csv``, or None.
    """
    search = experiment.search
    if search is None:
        return
    domains, seeds, num_even = list(search.domains), experiment.seeds, search.trials // 2

    def trial(number: int, point: Mapping[str, Any]) -> Run:
        seed = seeds[number % len(seeds)]
        return _run(experiment, TRIAL, f"{number:03d}", point, seed, search.settings)

    even_points = low_discrepancy_points(search.trials, len(search.space), seed=seeds[0])[
        :num_even
    ]
    even_trials = [
        trial(number, settings_at(search.space, point))
        for number, point in enumerate(even_points.tolist())
    ]
    yield even_trials
    rows = [row for row in map(row_of, even_trials) if row is not None]
    if not rows:
        # Without any scored trial there is nothing to base a proposal on.
        return
    for number in range(num_even, search.trials):
        domain = domains[number % len(domains)]
        proposal_seed = seeds[0] * SEEDS_APART + number
        run = trial(number, propose(search, domain, pd.DataFrame(rows), proposal_seed))
        yield [run]
        row = row_of(run)
        if row is not None:
            rows.append(row)
    yield list(_region_tests(experiment, search, pd.DataFrame(rows)))


def _region_tests(experiment: Experiment, search: Search, rows: pd.DataFrame) -> Iterator[Run]:
    """Yield one run per domain (a metric) and seed, at points of the domain's region."""
    seeds = experiment.seeds
    for domain in search.domains:
        region = find_domain_region(search, domain, rows)
        points = points_within(region, len(seeds)).tolist()
        for point, seed in zip(points, seeds, strict=True):
            variant = f"{REGION_PREFIX}{domain}"
            yield _run(experiment, variant, "", settings_at(search.space, point), seed, {})


def _run(
    experiment: Experiment,
    variant: str,
    number: str,
    point: Mapping[str, Any],
    seed: int,
    settings: Mapping[str, Any],
) -> Run:
    flat = {**experiment.settings, **settings, **point, "seed": seed}
    config = resolve_run(experiment.path, flat)
    return Run(f"{variant}{number}-seed{seed}", variant, dict(point), config)


def groups_sharing_pairs(experiment: Experiment) -> tuple[str, ...]:
    """Return the groups of test runs that may share evaluated pairs with the trials.

    They share no pairs if the data are the same but the splits, or the folds of a split, differ.
    """
    search = experiment.search
    if search is None:
        return ()
    lowest = {name: axis.low for name, axis in search.space.items()}
    trial = resolve_run(experiment.path, {**experiment.settings, **search.settings, **lowest})
    tested = resolve_run(experiment.path, {**experiment.settings, **lowest})
    groups = {f"{REGION_PREFIX}{domain}": tested for domain in search.domains}
    groups |= {run.variant: run.config for run in experiment.runs if run.variant}
    return tuple(name for name, config in groups.items() if _may_share_pairs(config, trial))


def _may_share_pairs(config: RunConfig, other: RunConfig) -> bool:
    if config.data != other.data:
        return True
    first, second = config.evaluation, other.evaluation
    are_halves = {first.eval_fold, second.eval_fold} == {0, 1}
    return bool(set(first.splits) & set(second.splits)) and not are_halves


def propose(search: Search, domain: str, trials: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return the settings that Optuna proposes for a domain after the given trials.

    Args:
        search: The search with its space and its score.
        domain: Domain whose score is maximised.
        trials: One row per finished trial, as in ``runs.csv``.
        seed: Seed of the sampler.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

    def distribution(axis: Axis) -> BaseDistribution:
        if axis.is_whole:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return FloatDistribution(axis.low, axis.high, log=axis.log)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: distribution(axis) for name, axis in search.space.items()}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    score = search.score(domain, trials)
    for row in trials.dropna(subset=[score]).to_dict("records"):
        params = {name: axis.value(axis.unit(row[name])) for name, axis in search.space.items()}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, value=float(row[score])
            )
        )
    proposed = study.ask(distributions).params
    # Rounding to few digits makes equal settings the same run.
    return {name: axis.value(axis.unit(proposed[name])) for name, axis in search.space.items()}
