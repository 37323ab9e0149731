"""Names of all metrics and curves that a run can report, known before it starts.

``metric_names`` gives the columns of ``runs.csv`` and the scores of the report card;
``curve_names`` gives the training curves. A run may report fewer names, for example if a scene
family has no examples, but never others.

``config.metrics`` lists the metrics of an evaluator; ``evaluator_metrics`` adds those that depend
on the configuration.
"""

from collections.abc import Iterable, Iterator

from rudolph.benchmarks.config import REFERENCE, ROOFLINE, WORKLOADS, SpeedConfig
from rudolph.config.metrics import EVALUATOR_METRICS, SCENE_ACCURACY
from rudolph.config.run import RunConfig
from rudolph.evaluation.evaluators.chosen_shots import CAPTIONS, CONTROLS
from rudolph.evaluation.evaluators.reranking import CANDIDATE_COUNTS
from rudolph.families.registry import family_of
from rudolph.reports.schema import OVERHEAD, implementation_name

# Columns of ``runs.csv`` that every run has.
COST = ("seconds", OVERHEAD)
RANKINGS = ("likelihood", "inverse_prompting", "oracle")
WITHOUT_IMAGES = ("arithmetic", "paragraphs")


def metric_names(config: RunConfig) -> list[str]:
    """Return the names of all metrics that a run can report, with their splits."""
    if config.speed.workload is not None:
        return list(_speed_metrics(config.speed))
    own = [
        f"{dataset}/{metric}" if dataset else metric
        for dataset, _, evaluator in (
            name.rpartition("/") for name in config.evaluation.evaluators
        )
        for metric in evaluator_metrics(evaluator, dataset, config)
    ]
    return [f"{name}/{split}" for split in config.evaluation.splits for name in own]


def evaluator_metrics(evaluator: str, dataset: str, config: RunConfig) -> list[str]:
    """Return the metrics of an evaluator, without their split.

    Args:
        evaluator: Name of the evaluator.
        dataset: Dataset of the evaluator; empty for the dataset of the run.
        config: The run.
    """
    dataset = dataset or config.data.dataset
    metrics = [metric.name for metric in EVALUATOR_METRICS[evaluator]]
    if evaluator == "scene_accuracy":
        metrics += [f"{SCENE_ACCURACY}_{family}" for family in config.data.shapes.families]
    elif evaluator == "caption_f1" and dataset == "shapes":
        metrics.append("image_to_text/caption_accuracy")
    elif evaluator == "few_shot_captions" and dataset == "shapes":
        metrics += [f"{CAPTIONS}/caption_accuracy_{case}" for case in ("*", *CONTROLS)]
    elif evaluator == "answer_f1" and dataset == "shapes_questions":
        families = config.data.shapes_questions.families
        metrics += [f"answers/exact_match_{family}" for family in families]
    elif evaluator == "multiple_choice":
        names = {False: "answers", True: "math_question_answering"}
        # For these two datasets, only the files show whether questions have images.
        known = dataset in WITHOUT_IMAGES if dataset not in ("manifest", "fusion_brain") else None
        metrics += [
            f"{name}/choice_accuracy" for key, name in names.items() if known in (None, key)
        ]
    elif evaluator == "rerank_curve":
        for ranking in RANKINGS + (("clip",) if config.evaluation.clip is not None else ()):
            metrics += [f"rerank_{ranking}/best_of_{number}" for number in CANDIDATE_COUNTS]
            metrics += [f"rerank_{ranking}/gain_at_{number}" for number in CANDIDATE_COUNTS[1:]]
    return [name for metric in metrics for name in _numbered(metric, config)]


def _numbered(metric: str, config: RunConfig) -> list[str]:
    """Return a metric whose name ends with ``*`` once per number of shots."""
    if not metric.endswith("*"):
        return [metric]
    return [f"{metric[:-1]}{number}" for number in config.evaluation.shots.numbers]


def _speed_metrics(speed: SpeedConfig) -> Iterator[str]:
    """Yield the metrics that ``rudolph.benchmarks.metrics`` computes for a comparison."""
    measure = WORKLOADS[speed.workload or ""]
    for implementation in speed.implementations:
        # Only the machine that runs the benchmark knows which parts it can measure.
        units = measure.units_of(implementation, has_bfloat16=True)
        for part, unit in units.items():
            name = implementation_name(implementation, part if len(units) > 1 else "")
            yield f"{name}/{unit}s_per_second"
            if implementation != ROOFLINE:
                own = _quantities(speed, implementation)
                yield from (f"{name}/{metric}" for metric in (f"seconds_per_{unit}", *own))
        if implementation != ROOFLINE:
            yield from (f"{implementation}/{size}_bytes" for size in ("weights", "cache"))
    if REFERENCE in speed.implementations:
        yield "check/max_abs_difference"


def _quantities(speed: SpeedConfig, implementation: str) -> Iterator[str]:
    yield "peak_bytes"
    if implementation != REFERENCE and REFERENCE in speed.implementations:
        yield "speedup"
    if speed.workload in ("train", "vqgan", "upscaler"):
        yield "operations_per_second"
    if ROOFLINE in speed.implementations and speed.workload != "memory":
        yield "roofline_fraction"


def curve_names(config: RunConfig) -> list[str]:
    """Return the names of all curves that the trainings of a run log."""
    family = family_of(config.model)
    names: list[str] = []
    if "vqgan_optim" in config.trainings:
        names += [f"vqgan/{name}" for name in _vqgan_curves(config)]
    if "optim" in config.trainings:
        names += [f"{family.stage}/{name}" for name in family.curve_names(config)]
    return names


def _vqgan_curves(config: RunConfig) -> Iterator[str]:
    losses = ["reconstruction", "quantizer"]
    if config.vqgan_losses.discriminator_start is not None:
        losses += ["adversary", "discriminator"]
    yield from (f"train/loss/{name}" for name in losses)
    yield from ("val/psnr", "val/ssim", "val/loss/reconstruction")
    yield from ("val/codebook_usage", "val/codebook_perplexity")


def all_names(configs: Iterable[RunConfig]) -> tuple[list[str], list[str]]:
    """Return the distinct names of the metrics and of the curves of runs."""
    metrics: dict[str, None] = {}
    curves: dict[str, None] = {}
    for config in configs:
        metrics |= dict.fromkeys(metric_names(config))
        curves |= dict.fromkeys(curve_names(config))
    return list(metrics), list(curves)
