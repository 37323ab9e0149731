"""Evaluation of a run, after its training and again later."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rudolph.config.experiment_file import Experiment
from rudolph.config.run import RunConfig
from rudolph.data.splits import Splits
from rudolph.evaluation.context import Score
from rudolph.evaluation.report_card import Stage, card_rows, evaluate_all
from rudolph.families.documents import DocumentSection
from rudolph.families.hugging_face import HuggingFaceCapabilities, open_hugging_face
from rudolph.families.interface import Capabilities
from rudolph.reports.report_cards import write_card
from rudolph.reports.schema import CARD
from rudolph.runs.execution import Execution, Folders, Hardware, ProgressCallback
from rudolph.runs.resolve import open_clip, open_run
from rudolph.tracking.run_directory import CONFIG


def evaluate(execution: Execution, capabilities: Capabilities, splits: Splits) -> list[Score]:
    """Run every configured evaluator on every configured split and write the report card."""
    scores = run_evaluators(
        execution.config, capabilities, splits, execution.stage, runs=execution.folders.runs
    )
    save_card(execution, scores)
    return scores


def run_evaluators(
    config: RunConfig, capabilities: Capabilities, splits: Splits, stage: Stage, *, runs: Path
) -> list[Score]:
    """Run the evaluators of a run, with ``evaluation.clip`` as the ranker if set.

    Args:
        config: Configuration of the run.
        capabilities: Capabilities of the trained model.
        splits: Splits of the run's datasets.
        stage: Context manager that times a stage and yields its progress callback.
        runs: Folder with the runs of ``experiment:NAME``.
    """
    ranker = None
    if config.evaluation.clip is not None:
        ranker = open_clip(config.evaluation.clip, runs=runs)
        ranker.clip.to(Hardware().device)
    return evaluate_all(
        capabilities,
        config.evaluation,
        splits,
        samplings=(config.sampling.image, config.sampling.text),
        ranker=ranker,
        seed=config.seed,
        stage=stage,
    )


def save_card(execution: Execution, scores: list[Score]) -> None:
    """Write and log the report card of a run from the main process, if it has scores."""
    if scores and execution.is_main_process:
        write_card(execution.folder / CARD, card_rows(scores))
        execution.tracker.log_artifact(execution.folder / CARD)


def evaluate_again(folder: Path, folders: Folders, progress: ProgressCallback) -> None:
    """Run all evaluators of a finished run again and write its report card.

    Raises:
        ValueError: If the configuration names no evaluators.
    """
    capabilities, config = open_run(folder)
    scores = _evaluate(config, capabilities, folders, progress)
    if not scores:
        raise ValueError(f"{folder / CONFIG}: expected evaluation.evaluators, got none")
    write_card(folder / CARD, card_rows(scores))


def evaluate_hugging_face(
    folder: Path, experiment: Experiment, folders: Folders, progress: ProgressCallback
) -> list[Score]:
    """Run the evaluators of an experiment file on a Hugging Face model.

    Data, evaluation, sampling and seed come from the file's first run.  If the family of that run
    reads documents, the maximum answer length comes from it too.

    Args:
        folder: Folder of the model, see ``open_hugging_face``.
        experiment: The experiment.
        folders: Folders of the command.
        progress: Progress callback.

    Raises:
        ValueError: If the runs of the file differ in data, evaluation or sampling, if the model
            lacks what an evaluator needs, or if there is no such model.
    """
    config, path = experiment.runs[0].config, experiment.path
    for name in ("data", "evaluation", "sampling"):
        if any(getattr(run.config, name) != getattr(config, name) for run in experiment.runs):
            raise ValueError(f"{path}: {name}: expected the same in all runs, got different ones")
    if not config.evaluation.evaluators:
        raise ValueError(f"{path}: evaluation.evaluators: expected evaluators, got none")
    provided = HuggingFaceCapabilities.provided()
    config.evaluation.require_capabilities(provided, str(folder))
    limits = {}
    if isinstance(config.model, DocumentSection):
        limits["max_new_tokens"] = config.model.max_new_tokens
    capabilities = open_hugging_face(folder, device=Hardware().device, **limits)
    return _evaluate(config, capabilities, folders, progress)


def _evaluate(
    config: RunConfig, capabilities: Capabilities, folders: Folders, progress: ProgressCallback
) -> list[Score]:
    """Run all evaluators of a configuration outside of a run."""

    @contextmanager
    def stage(name: str) -> Iterator[Callable[[int, int, str], None]]:
        yield partial(progress, name)

    splits = Splits(config.data, folders.cache)
    return run_evaluators(config, capabilities, splits, stage, runs=folders.runs)
