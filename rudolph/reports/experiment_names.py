"""Lookup of experiments by name, among exported results or among runs."""

from collections.abc import Collection
from pathlib import Path

from rudolph.files.settings import did_you_mean
from rudolph.reports.schema import experiment_folders
from rudolph.tracking.run_directory import started_runs


def results_folders(results_folder: Path, experiment: str | None) -> list[Path]:
    """Return the results folder of one experiment; None returns the folders of all experiments.

    Raises:
        ValueError: if there are no results, or no experiment has this name.
    """
    if not results_folder.is_dir():
        raise ValueError(
            f"{results_folder}: no such folder. Run the command where the results are"
        )
    folders = experiment_folders(results_folder)
    if experiment is None:
        return folders
    folder = results_folder / experiment
    if folder not in folders:
        names = [known.relative_to(results_folder).as_posix() for known in folders]
        raise unknown_experiment(experiment, results_folder, names)
    return [folder]


def experiments_with_runs(runs: Path) -> set[str]:
    """Return the names of the experiments that have a run with a summary."""
    started = started_runs(runs, "**")
    folders = {directory.path.parent.relative_to(runs) for directory in started}
    # Hidden folders are caches.
    return {folder.as_posix() for folder in folders if not folder.as_posix().startswith(".")}


def unknown_experiment(experiment: str, folder: Path, names: Collection[str]) -> ValueError:
    """Return the error for an unknown experiment, with the closest name or all names.

    Args:
        experiment: the name that is unknown.
        folder: the folder that holds the experiments.
        names: the experiments in the folder.
    """
    below = [name for name in names if name.startswith(f"{experiment.rstrip('/')}/")]
    listed = ", ".join(sorted(below or names)) or "none"
    advice = (not below and did_you_mean(experiment, names)) or f"; there are {listed}"
    return ValueError(f"{experiment}: no experiment has this name in {folder}{advice}")
