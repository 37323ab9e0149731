"""Names of all metrics and curves of a run, known before it starts.

``metric_names`` are columns of ``runs.csv`` and scores of the report card; ``curve_names`` are
what trainings log.  A run may lack a name, such as that of a scene family without examples, but it
reports no name that is not here.

The metrics of an evaluator stand in ``config.metrics``, or in ``evaluator_metrics`` where they
depend on the configuration.
"""

from collections.abc import Iterable, Iterator

from rudolph.benchmarks.config import REFERENCE, ROOFLINE, WORKLOADS, SpeedConfig
from rudolph.config.metrics import EVALUATOR_METRICS, SCENE_ACCURACY
from rudolph.config.run import RunConfig
from rudolph.evaluation.evaluators.reranking import CANDIDATE_COUNTS
from rudolph.families.registry import family_of
from rudolph.reports.report import OVERHEAD
from rudolph.reports.timings import implementation_name

# Columns of ``runs.csv`` that every run has.
COST = ("seconds", OVERHEAD)
RANKINGS = ("likelihood", "inverse_prompting", "oracle")
WITHOUT_IMAGES = ("arithmetic", "paragraphs")


def metric_names(config: RunConfig) -> list[str]:
    """Return the names of all metrics that a run can report, the likeliest first."""
    if config.speed.workload is not None:
        return list(_speed_metrics(config.speed))
    own = [
        f"{dataset}/{metric}" if dataset else metric
        for dataset, _, question in (
            place.rpartition("/") for place in config.evaluation.evaluators
        )
        for metric in evaluator_metrics(question, dataset, config)
    ]
    return [f"{name}/{split}" for split in config.evaluation.splits for name in own]


def evaluator_metrics(question: str, dataset: str, config: RunConfig) -> list[str]:
    """Return the metrics of a question, without their split, about pairs of a dataset.

    Args:
        dataset: empty for that of the run.
    """
    dataset, found = (
        dataset or config.data.dataset,
        [metric.name for metric in EVALUATOR_METRICS[question]],
    )
    if question == "scene_accuracy":
        found += [f"{SCENE_ACCURACY}_{family}" for family in config.data.shapes.families]
    elif question == "caption_f1" and dataset == "shapes":
        found.append("image_to_text/caption_accuracy")
    elif question == "multiple_choice":
        names = {False: "answers", True: "math_question_answering"}
        # Those of other datasets have images or not, as their files say.
        known = dataset in WITHOUT_IMAGES if dataset not in ("manifest", "fusion_brain") else None
        found += [f"{name}/choice_accuracy" for key, name in names.items() if known in (None, key)]
    elif question == "rerank_curve":
        for ranking in RANKINGS + (("clip",) if config.evaluation.clip is not None else ()):
            found += [f"rerank_{ranking}/best_of_{number}" for number in CANDIDATE_COUNTS]
            found += [f"rerank_{ranking}/gain_at_{number}" for number in CANDIDATE_COUNTS[1:]]
    return found


def _speed_metrics(speed: SpeedConfig) -> Iterator[str]:
    """Names of what ``rudolph.benchmarks.metrics`` computes of a contest."""
    measure = WORKLOADS[speed.workload or ""]
    for implementation in speed.implementations:
        # Only the machine that runs the benchmark knows which parts it can measure.
        units = measure.units_of(implementation, has_bfloat16=True)
        for part, unit in units.items():
            name = implementation_name(implementation, part if len(units) > 1 else "")
            yield f"{name}/{unit}s_per_second"
            if implementation != ROOFLINE:
                own = _quantities(speed, implementation)
                yield from (f"{name}/{each}" for each in (f"seconds_per_{unit}", *own))
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
    """Return the names of everything that the trainings of a run log."""
    family = family_of(config.model)
    names: list[str] = []
    if "vqgan_optim" in config.trainings:
        names += [f"vqgan/{name}" for name in _of_vqgan(config)]
    if "optim" in config.trainings:
        names += [f"{family.stage}/{name}" for name in family.curve_names(config)]
    return names


def _of_vqgan(config: RunConfig) -> Iterator[str]:
    losses = ["reconstruction", "quantizer"]
    if config.vqgan_losses.discriminator_start is not None:
        losses += ["adversary", "discriminator"]
    yield from (f"train/loss/{name}" for name in losses)
    yield from ("val/psnr", "val/ssim", "val/loss/reconstruction")
    yield from ("val/codebook_usage", "val/codebook_perplexity")


def all_names(configs: Iterable[RunConfig]) -> tuple[list[str], list[str]]:
    """Return the metrics and the curves of some runs, each name once."""
    metrics: dict[str, None] = {}
    curves: dict[str, None] = {}
    for config in configs:
        metrics |= dict.fromkeys(metric_names(config))
        curves |= dict.fromkeys(curve_names(config))
    return list(metrics), list(curves)
