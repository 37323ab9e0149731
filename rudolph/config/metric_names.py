"""Names of all metrics and curves of a run, known before it starts.

``metric_names`` are columns of ``runs.csv`` and scores of the report card; ``curve_names`` are
what trainings log.  A name may be missing in the end, such as that of a family of scenes of which
no example was drawn, but no run reports a name that is not here.

A question's metrics stand in ``EVALUATOR_METRICS``, or in ``evaluator_metrics`` where they depend
on the configuration.  To add a question, name its metrics here.
"""

from collections.abc import Iterable, Iterator

from rudolph.benchmarks.config import REFERENCE, ROOFLINE, WORKLOADS, SpeedConfig
from rudolph.config.run import RunConfig
from rudolph.data.datasets.emoji import GROUPS
from rudolph.evaluation.evaluators.numerics import CONVERGED
from rudolph.evaluation.evaluators.reranking import CANDIDATE_COUNTS
from rudolph.families.registry import family_of
from rudolph.generation.clip_ranking import RECALLS_AT
from rudolph.reports.report import OVERHEAD
from rudolph.reports.timings import implementation_name

# Columns of ``runs.csv`` that every run has.
COST = ("seconds", OVERHEAD)
NEAREST, SCENE_RIGHT = "text_to_image/nearest_1_percent", "text_to_image/scene_accuracy"
CAPTION_METRICS = ("cider-d", "rouge-l", "meteor-nltk", "bleu-4", "distinct")
RANKINGS = ("likelihood", "inverse_prompting", "oracle")
WITHOUT_IMAGES = ("arithmetic", "paragraphs")

# Metrics of a question, whatever its pairs.
EVALUATOR_METRICS: dict[str, tuple[str, ...]] = {
    "nearest_image": (NEAREST,),
    "nearest_image_by_group": tuple(f"{NEAREST}_{group.split()[0].lower()}" for group in GROUPS),
    "scene_accuracy": (SCENE_RIGHT, "text_to_image/object_accuracy"),
    "caption_f1": ("image_to_text/token_f1", "image_to_text/exact_match"),
    "caption_metrics": tuple(f"image_to_text/{name}" for name in CAPTION_METRICS),
    "fid_kid": ("text_to_image/fid", "text_to_image/kid"),
    "clip_score": ("text_to_image/clip_score", "real_images/clip_score"),
    "answer_f1": ("answers/token_f1", "answers/exact_match"),
    "text_answers": ("text_question_answering/token_f1", "text_question_answering/exact_match"),
    "math_answers": ("math_question_answering/token_f1", "math_question_answering/exact_match"),
    "text_recognition": tuple(
        f"text_recognition/{name}" for name in ("1-ned", "cer", "exact_match")
    ),
    "text_continuation": ("text_to_text/sentence_accuracy",),
    "multiple_choice": (),
    "zero_shot_classification": (
        "zero_shot_classification/accuracy",
        "zero_shot_classification/calibration_error",
    ),
    "text_ranking": ("text_ranking/accuracy",),
    "image_ranking": ("image_ranking/accuracy",),
    "inpainting": ("inpainting/object_accuracy",),
    "image_variation": ("image_variation/object_accuracy",),
    "self_reranking": ("self_reranking/object_accuracy",),
    "rerank_curve": (),
    "likelihood": ("text_to_image/nats", "text_to_image/bits_per_pixel", "image_to_text/nats"),
    "convergence": (CONVERGED,),
    "attention_logits": ("decoder/max_attention_logit", "decoder/attention_overflows"),
    "reconstruction": (
        *("vqgan/psnr", "vqgan/ssim"),
        *("vqgan/codebook_usage", "vqgan/codebook_perplexity"),
    ),
    "retrieval": tuple(
        f"{direction}/recall_at_{k}"
        for direction in ("image_to_text", "text_to_image")
        for k in RECALLS_AT
    ),
}


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
    dataset, found = dataset or config.data.dataset, list(EVALUATOR_METRICS[question])
    if question == "scene_accuracy":
        found += [f"{SCENE_RIGHT}_{family}" for family in config.data.shapes.families]
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
