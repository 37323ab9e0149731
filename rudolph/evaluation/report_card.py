"""What a trained model is asked.

To add a question, write a function ``(Subject, Split) -> list[Score]`` and name it in
``EVALUATORS``.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rudolph.data.pairs import SPLITS
from rudolph.data.splits import Split, Splits, require_dataset_prefix
from rudolph.evaluation.context import NO_IMAGE, EvaluationContext, Score, ignore_notes
from rudolph.evaluation.evaluators.captions import caption_f1, caption_metrics
from rudolph.evaluation.evaluators.choices import (
    image_ranking,
    multiple_choice,
    text_ranking,
    zero_shot_classification,
)
from rudolph.evaluation.evaluators.distributions import clip_score_evaluator, fid_kid
from rudolph.evaluation.evaluators.images import (
    image_variation,
    inpainting,
    nearest_image,
    nearest_image_by_group,
    reconstruction,
    scene_accuracy,
    self_reranking,
)
from rudolph.evaluation.evaluators.numerics import attention_logits, convergence
from rudolph.evaluation.evaluators.reranking import rerank_curve
from rudolph.evaluation.evaluators.texts import (
    answer_f1,
    likelihood,
    math_answers,
    text_answers,
    text_continuation,
    text_recognition,
)
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.sequence.texts import require_text

# Times what is done under a name, and gives ``advance(done, total, note)``.
Stage = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]


@dataclass(frozen=True)
class EvaluationConfig:
    """``questions`` are asked on ``num_examples`` pairs of each of ``splits``.

    A question is asked about the pairs of ``data.dataset``, or, as ``words/recognition``, about
    those of the dataset that it names.  ``clip`` is a source of one that ranks images, too.
    ``no_image`` is what a task without an image is answered after: ``zeros``, as it was trained,
    or, ``legacy``, an image that is drawn for the question first (fbc2_aij2022, inference.py).
    With ``half`` 0 or 1 one half of the pairs is asked about: what was chosen on one can be tested
    on the other.  ``grid_prompts`` are the texts of the sample grid, ``grid_samples`` images
    each.
    """

    questions: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    num_examples: int = 200
    clip: str | None = None
    no_image: str = "zeros"
    half: int | None = None
    grid_prompts: tuple[str, ...] = ()
    grid_samples: int = 4

    def __post_init__(self) -> None:
        for place in self.questions:
            require_dataset_prefix(place, "questions")
            name = place.rpartition("/")[2]
            if name not in EVALUATORS:
                raise ValueError(f"questions must be of {', '.join(EVALUATORS)}, got {name!r}")
        for name in self.splits:
            if name not in SPLITS:
                raise ValueError(f"splits must be of {', '.join(SPLITS)}, got {name!r}")
        if self.no_image not in NO_IMAGE:
            raise ValueError(
                f"no_image must be one of {', '.join(NO_IMAGE)}, got {self.no_image!r}"
            )
        if self.half not in (None, 0, 1):
            raise ValueError(f"half must be 0, 1 or null, got {self.half}")
        for at, prompt in enumerate(self.grid_prompts):
            require_text(prompt, f"grid_prompts[{at}]")
        for name in ("num_examples", "grid_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


# Questions that only pairs of one dataset can answer.
DATASET_OF_EVALUATOR = {
    "nearest_image": "emoji",
    "nearest_image_by_group": "emoji",
    "scene_accuracy": "shapes",
    "inpainting": "shapes",
    "image_variation": "shapes",
    "self_reranking": "shapes",
    "rerank_curve": "shapes",
    "continuation": "shapes",
}
# Members that an evaluator needs of a dataset: classes, or pairs that are easily mistaken.
MEMBER_OF_EVALUATOR = {
    "zero_shot_classification": "class_index",
    "text_ranking": "hard_negatives",
    "image_ranking": "hard_negatives",
}
EVALUATORS: dict[str, Callable[[EvaluationContext, Split], list[Score]]] = {
    "nearest_image": nearest_image,
    "nearest_image_by_group": nearest_image_by_group,
    "scene_accuracy": scene_accuracy,
    "caption_f1": caption_f1,
    "caption_metrics": caption_metrics,
    "fid_kid": fid_kid,
    "clip_score_evaluator": clip_score_evaluator,
    "answer_f1": answer_f1,
    "text_answers": text_answers,
    "math_answers": math_answers,
    "recognition": text_recognition,
    "continuation": text_continuation,
    "multiple_choice": multiple_choice,
    "zero_shot_classification": zero_shot_classification,
    "text_ranking": text_ranking,
    "image_ranking": image_ranking,
    "inpainting": inpainting,
    "image_variation": image_variation,
    "self_reranking": self_reranking,
    "rerank_curve": rerank_curve,
    "likelihood": likelihood,
    "survival": convergence,
    "attention_logits": attention_logits,
    "reconstruction": reconstruction,
}


def evaluate_all(
    pipeline: Pipeline,
    config: EvaluationConfig,
    splits: Splits,
    *,
    samplings: tuple[TokenSamplingConfig, TokenSamplingConfig],
    seed: int,
    stage: Stage,
) -> list[Score]:
    """Every question on every split that the configuration names.

    Args:
        samplings: how image tokens are drawn, and how text is.
    """
    scores: list[Score] = []
    for name in config.splits:
        drawn: dict[tuple[Any, ...], Any] = {}
        for place in config.questions:
            dataset, _, question = place.rpartition("/")
            with stage(f"{place} on {name}") as advance:
                split = splits(name, dataset or None)
                context = EvaluationContext(
                    pipeline,
                    *samplings,
                    num_examples=min(config.num_examples, len(split)),
                    seed=seed,
                    no_image=config.no_image,
                    half=config.half,
                    on_token=partial(ignore_notes, advance),
                    drawn=drawn,
                )
                started = time.monotonic()
                found = [score.of(dataset) for score in EVALUATORS[question](context, split)]
                rate = context.num_examples / (time.monotonic() - started)
                first = found[0]
                told = f"{first.value:.3g} [{first.low:.3g}, {first.high:.3g}]"
                advance(1, 1, f"{told}, {rate:.3g} a second")
            scores += found
    return scores


def card_rows(scores: list[Score]) -> list[dict[str, Any]]:
    """Scores as the rows of a report card, see ``rudolph.reports.report_cards``."""
    return [vars(score) | {"score": score.name, "count": score.num_examples} for score in scores]
