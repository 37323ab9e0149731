"""The metrics of every evaluator: name, unit, direction and chance level.

To add an evaluator, name its metrics in ``EVALUATOR_METRICS``.  A final ``*`` stands for each
number of shots in ``evaluation.shots.numbers``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rudolph.data.datasets.emoji import GROUPS
from rudolph.evaluation.evaluators.chosen_shots import ANSWERS, CAPTIONS, CLASSIFICATION, CONTROLS
from rudolph.evaluation.evaluators.cost import ANSWER_COST, TRAINING_COST
from rudolph.evaluation.evaluators.few_shot import FEW_SHOT, FEW_SHOT_TEXT
from rudolph.evaluation.evaluators.numerics import CONVERGED
from rudolph.generation.clip_ranking import RECALLS_AT

NEAREST, SCENE_ACCURACY = "text_to_image/nearest_1_percent", "text_to_image/scene_accuracy"
GRID_NEAREST = "text_to_image/grid_nearest"
OTHER_PAIRS = "the same output scored for other pairs"
WORDS_OF_SHOTS = "words of the shots, without images"


@dataclass(frozen=True)
class Metric:
    """A metric of an evaluator, without its dataset and split.

    Attributes:
        name: as in ``runs.csv``.
        unit: "fraction", "dB", "nats/token" and so on.
        is_lower_better: whether a smaller value is better.
        chance: what the chance level is; empty if there is none.
    """

    name: str
    unit: str = "fraction"
    is_lower_better: bool = False
    chance: str = ""


def _text_metrics(task: str, names: Iterable[str] = ("token_f1", "exact_match")) -> list[Metric]:
    return [Metric(f"{task}/{name}", chance=OTHER_PAIRS) for name in names]


def _shot_metrics(metrics: Iterable[Metric]) -> tuple[Metric, ...]:
    """Return metrics after each number of shots and of both controls."""
    cases = ("*", *CONTROLS)
    return tuple(
        replace(metric, name=f"{metric.name}_{case}") for metric in metrics for case in cases
    )


EVALUATOR_METRICS: dict[str, tuple[Metric, ...]] = {
    "nearest_image": (Metric(NEAREST, chance="1 %"),),
    "nearest_image_by_group": tuple(
        Metric(f"{NEAREST}_{group.split()[0].lower()}", chance="1 %") for group in GROUPS
    ),
    "nearest_image_of_grid": (
        Metric(GRID_NEAREST, chance="1 of all emoji"),
        Metric(f"{GRID_NEAREST}_1_percent", chance="1 %"),
    ),
    "scene_accuracy": (
        Metric(SCENE_ACCURACY, chance=OTHER_PAIRS),
        Metric("text_to_image/object_accuracy", chance=OTHER_PAIRS),
    ),
    "caption_f1": tuple(_text_metrics("image_to_text")),
    "caption_metrics": (
        *(
            Metric(f"image_to_text/{name}", unit, chance=OTHER_PAIRS)
            for name, unit in (
                ("cider-d", "0 to 10"),
                ("rouge-l", "fraction"),
                ("meteor-nltk", "fraction"),
                ("bleu-4", "fraction"),
            )
        ),
        Metric("image_to_text/distinct"),
    ),
    "fid_kid": (
        Metric("text_to_image/fid", "squared distance", True, "images of random codes"),
        Metric("text_to_image/kid", "squared MMD", True, "images of random codes"),
    ),
    "clip_score": (
        Metric("text_to_image/clip_score", "0 to 2.5", chance="images of other captions"),
        Metric("real_images/clip_score", "0 to 2.5", chance="images of other captions"),
    ),
    "answer_f1": tuple(_text_metrics("answers")),
    "text_answers": tuple(_text_metrics("text_question_answering")),
    "math_answers": tuple(_text_metrics("math_question_answering")),
    "text_recognition": (
        Metric("text_recognition/1-ned", chance=OTHER_PAIRS),
        Metric("text_recognition/cer", "errors per character", True),
        Metric("text_recognition/exact_match"),
    ),
    "text_continuation": (
        Metric("text_to_text/sentence_accuracy", chance="words in random order"),
    ),
    "multiple_choice": (),
    "few_shot": tuple(
        Metric(f"{FEW_SHOT}_{case}", chance=WORDS_OF_SHOTS) for case in ("*", "shuffled", "blank")
    ),
    "few_shot_text": (Metric(f"{FEW_SHOT_TEXT}_*", chance=WORDS_OF_SHOTS),),
    "few_shot_captions": _shot_metrics(
        [
            *_text_metrics(CAPTIONS),
            Metric(f"{CAPTIONS}/cider-d", "0 to 10", chance=OTHER_PAIRS),
        ]
    ),
    "few_shot_answers": _shot_metrics(_text_metrics(ANSWERS)),
    "few_shot_classification": _shot_metrics(
        [Metric(f"{CLASSIFICATION}/accuracy", chance="1 / classes")]
    ),
    "cost": (
        Metric(TRAINING_COST, "MFLOP per example", True),
        Metric(ANSWER_COST, "MFLOP per example", True),
    ),
    "zero_shot_classification": (
        Metric("zero_shot_classification/accuracy", chance="1 / classes"),
        Metric("zero_shot_classification/calibration_error", is_lower_better=True),
    ),
    "text_ranking": (Metric("text_ranking/accuracy", chance="1 / choices"),),
    "image_ranking": (Metric("image_ranking/accuracy", chance="1 / choices"),),
    "inpainting": (Metric("inpainting/object_accuracy", chance=OTHER_PAIRS),),
    "image_variation": (Metric("image_variation/object_accuracy", chance=OTHER_PAIRS),),
    "self_reranking": (
        Metric("self_reranking/object_accuracy", chance="a random one of the candidates"),
    ),
    "rerank_curve": (),
    "likelihood": (
        Metric("text_to_image/nats", "nats/token", True),
        Metric("text_to_image/bits_per_pixel", "bits/pixel", True),
        Metric("image_to_text/nats", "nats/token", True),
    ),
    "convergence": (Metric(CONVERGED, "0 or 1"),),
    "attention_logits": (
        Metric("decoder/max_attention_logit", "logit", True),
        Metric("decoder/attention_overflows", is_lower_better=True),
    ),
    "reconstruction": (
        Metric("vqgan/psnr", "dB"),
        Metric("vqgan/psnr_32px", "dB"),
        Metric("vqgan/ssim", "at most 1"),
        Metric("vqgan/codebook_usage"),
        Metric("vqgan/codebook_perplexity", "codes"),
    ),
    "retrieval": tuple(
        Metric(f"{direction}/recall_at_{k}", chance="k / gallery")
        for direction in ("image_to_text", "text_to_image")
        for k in RECALLS_AT
    ),
}
