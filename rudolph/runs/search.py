"""A search, run by run: proposals by Optuna, and then tests of the regions that were found.

Each proposal depends on the runs before it and its number alone, so a search that was interrupted
goes on as if it had not been.

Source: Bergstra 2011 (tree-structured Parzen estimator), by Optuna's ask and tell.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from rudolph.config.experiment_file import Experiment, Run
from rudolph.config.run import RunConfig, resolve_run
from rudolph.evaluation.regions import Axis, low_discrepancy_points, points_within, settings_at
from rudolph.reports.search_tables import REGION_PREFIX, TRIAL, Search, find_domain_region

# Optuna has no seed of its own for each proposal.
SEEDS_APART = 1000

# What a finished run scored, as a row of ``runs.csv``; None where it is not finished.
RowOf = Callable[[Run], Mapping[str, Any] | None]


def search_rounds(experiment: Experiment, row_of: RowOf) -> Iterator[list[Run]]:
    """The even trials of a search, its proposals one by one, and the tests of its regions.

    Whoever takes a round executes it before the next, its runs in any order or at once; what
    failed is asked nothing and tells nothing.
    """
    search = experiment.search
    if search is None:
        return
    domains, seeds, num_even = list(search.domains), experiment.seeds, search.trials // 2

    def trial(number: int, point: Mapping[str, Any]) -> Run:
        seed = seeds[number % len(seeds)]
        return _run(experiment, TRIAL, f"{number:03d}", point, seed, search.settings)

    evenly = low_discrepancy_points(search.trials, len(search.space), seed=seeds[0])[:num_even]
    found = [
        trial(at, settings_at(search.space, place)) for at, place in enumerate(evenly.tolist())
    ]
    yield found
    rows = [row for row in map(row_of, found) if row is not None]
    if not rows:
        # Nothing can be proposed after trials of which none has a score.
        return
    for number in range(num_even, search.trials):
        domain = domains[number % len(domains)]
        own_seed = seeds[0] * SEEDS_APART + number
        run = trial(number, propose(search, domain, pd.DataFrame(rows), own_seed))
        yield [run]
        row = row_of(run)
        if row is not None:
            rows.append(row)
    yield [
        _run(
            experiment, f"{REGION_PREFIX}{domain}", "", settings_at(search.space, place), seed, {}
        )
        for domain in domains
        for place, seed in zip(
            points_within(
                find_domain_region(search, domain, pd.DataFrame(rows)), len(seeds)
            ).tolist(),
            seeds,
            strict=True,
        )
    ]


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
    """Return the groups of tests that may be asked about pairs that trials were asked about.

    Pairs are others where the data are the same and the splits, or the halves of one, are not.
    """
    search = experiment.search
    if search is None:
        return ()
    least = {name: axis.low for name, axis in search.space.items()}
    trial = resolve_run(experiment.path, {**experiment.settings, **search.settings, **least})
    tested = resolve_run(experiment.path, {**experiment.settings, **least})
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
    """The settings that Optuna would try next for a domain, after some trials."""
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
        told = {name: axis.value(axis.unit(row[name])) for name, axis in search.space.items()}
        study.add_trial(
            optuna.trial.create_trial(
                params=told, distributions=distributions, value=float(row[score])
            )
        )
    asked = study.ask(distributions).params
    # Of few digits, as everywhere: the same settings are then the same run.
    return {name: axis.value(axis.unit(asked[name])) for name, axis in search.space.items()}
