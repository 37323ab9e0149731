"""The questions that a run is asked when it is trained, and later again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rudolph.config.run import RunConfig
from rudolph.data.splits import Splits
from rudolph.evaluation.context import Score
from rudolph.evaluation.report_card import Stage, card_rows, evaluate_all
from rudolph.generation.pipeline import Pipeline
from rudolph.reports.report_cards import CARD, write_card
from rudolph.runs.execution import Execution, Folders, Hardware, ProgressCallback
from rudolph.runs.resolve import load_run, open_clip


def evaluate(execution: Execution, pipeline: Pipeline, splits: Splits) -> list[Score]:
    """Every question on every split that the configuration names; the report card is kept."""
    scores = run_evaluators(execution.config, pipeline, splits, execution.stage)
    save_card(execution, scores)
    return scores


def run_evaluators(
    config: RunConfig, pipeline: Pipeline, splits: Splits, stage: Stage
) -> list[Score]:
    """The scores of a run's questions; a CLIP ranks images too, where one is named."""
    if config.evaluation.clip is not None:
        pipeline.clip = open_clip(config.evaluation.clip)
        pipeline.clip.clip.to(pipeline.device)
    return evaluate_all(
        pipeline,
        config.evaluation,
        splits,
        samplings=(config.sampling.image, config.sampling.text),
        seed=config.seed,
        stage=stage,
    )


def save_card(execution: Execution, scores: list[Score]) -> None:
    """Write the report card of a run, if it was asked anything."""
    if scores:
        write_card(execution.folder / CARD, card_rows(scores))
        execution.tracker.log_artifact(execution.folder / CARD)


def evaluate_again(folder: Path, folders: Folders, progress: ProgressCallback) -> None:
    """Ask a finished run all its questions and write its report card anew."""
    pipeline, config = load_run(folder)
    pipeline.to(Hardware().device)

    @contextmanager
    def stage(name: str) -> Iterator[Callable[[int, int, str], None]]:
        yield partial(progress, name)

    scores = run_evaluators(config, pipeline, Splits(config.data, folders.cache), stage)
    if not scores:
        raise ValueError(f"{folder}: its config.yaml names no evaluation.questions")
    write_card(folder / CARD, card_rows(scores))
