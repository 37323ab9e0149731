"""The table of evaluators, their configuration, and running them on a trained model.

To add an evaluator, write a function ``(EvaluationContext, Split) -> list[Score]``.  Add it to
``EVALUATORS`` and the capabilities that it needs to ``NEEDS``.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from rudolph.data.pairs import SPLITS
from rudolph.data.splits import Split, Splits, require_dataset_prefix
from rudolph.evaluation.context import EvaluationContext, Score, ignore_notes
from rudolph.evaluation.evaluators.captions import caption_f1, caption_metrics
from rudolph.evaluation.evaluators.choices import (
    image_ranking,
    multiple_choice,
    text_ranking,
    zero_shot_classification,
)
from rudolph.evaluation.evaluators.chosen_shots import (
    few_shot_answers,
    few_shot_captions,
    few_shot_classification,
)
from rudolph.evaluation.evaluators.cost import cost
from rudolph.evaluation.evaluators.distributions import clip_score_evaluator, fid_kid
from rudolph.evaluation.evaluators.few_shot import few_shot, few_shot_text
from rudolph.evaluation.evaluators.images import (
    image_variation,
    inpainting,
    nearest_image,
    nearest_image_by_group,
    nearest_image_of_grid,
    reconstruction,
    scene_accuracy,
    self_reranking,
)
from rudolph.evaluation.evaluators.numerics import attention_logits, convergence
from rudolph.evaluation.evaluators.reranking import rerank_curve
from rudolph.evaluation.evaluators.retrieval import retrieval
from rudolph.evaluation.evaluators.texts import (
    answer_f1,
    likelihood,
    math_answers,
    text_answers,
    text_continuation,
    text_recognition,
)
from rudolph.evaluation.shots import ShotConfig
from rudolph.families.interface import Capabilities
from rudolph.files.constraints import Count, check
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.sequence.texts import require_text

# Times a named stage and yields its progress callback ``advance(done, total, note)``.
Stage = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluators to run, and the pairs to run them on.

    Attributes:
        evaluators: names of ``EVALUATORS``; a prefix names another dataset than ``data.dataset``,
            as in ``words/text_recognition``.
        splits: names of the splits to evaluate.
        num_examples: number of pairs per split.
        clip: source of a CLIP that ranks and scores images and chooses similar shots; null for
            none.
        missing_image: image given to a task without one.  ``zeros`` is the image used in training;
            ``legacy`` first generates an image for the question, as the reference code of Fusion
            Brain Challenge 2 does (fbc2_aij2022, inference.py).
        eval_fold: evaluate only fold 0 or 1 of the pairs; null for all.  Choices made on one fold
            can then be tested on the other.
        grid_prompts: prompts of the sample grid.
        grid_samples: number of images per prompt in the sample grid.
        shots: shots of the few-shot evaluators.
    """

    evaluators: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    num_examples: Count = 200
    clip: str | None = None
    missing_image: Literal["zeros", "legacy"] = "zeros"
    eval_fold: Literal[0, 1] | None = None
    grid_prompts: tuple[str, ...] = ()
    grid_samples: Count = 4
    shots: ShotConfig = field(default_factory=ShotConfig)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        for entry in self.evaluators:
            require_dataset_prefix(entry, "evaluators")
            name = entry.rpartition("/")[2]
            if name not in EVALUATORS:
                raise ValueError(f"evaluators must be of {', '.join(EVALUATORS)}, got {name!r}")
        for name in self.splits:
            if name not in SPLITS:
                raise ValueError(f"splits must be of {', '.join(SPLITS)}, got {name!r}")
        for index, prompt in enumerate(self.grid_prompts):
            require_text(prompt, f"grid_prompts[{index}]")

    def require_capabilities(self, provided: Sequence[str], owner: str) -> None:
        """Check that a model can do what the evaluators need.

        Args:
            provided: Names of the model's capabilities.
            owner: Name of the model for the message.

        Raises:
            ValueError: If the model cannot; the message names the setting.
        """
        if self.missing_image == "legacy" and "generate_image" not in provided:
            raise ValueError(
                "evaluation.missing_image: legacy needs a model that generates images, "
                f"got {owner}"
            )
        for name in self.evaluators:
            evaluator = name.rpartition("/")[2]
            lacking = [need for need in NEEDS[evaluator] if need not in provided]
            if lacking:
                raise ValueError(
                    f"evaluation.evaluators: {evaluator} needs a model with {lacking[0]}; "
                    f"{owner} has {', '.join(provided)}"
                )


# Evaluators that need the pairs of one dataset.
DATASET_OF_EVALUATOR = {
    "nearest_image": "emoji",
    "nearest_image_by_group": "emoji",
    "nearest_image_of_grid": "emoji",
    "scene_accuracy": "shapes",
    "inpainting": "shapes",
    "image_variation": "shapes",
    "self_reranking": "shapes",
    "rerank_curve": "shapes",
    "text_continuation": "shapes",
}
# The dataset method that an evaluator needs: for class labels, hard negatives or shots.
MEMBER_OF_EVALUATOR = {
    "zero_shot_classification": "class_index",
    "text_ranking": "hard_negatives",
    "image_ranking": "hard_negatives",
    "few_shot": "shots",
    "few_shot_text": "shots",
    "few_shot_classification": "class_index",
}
EVALUATORS: dict[str, Callable[[EvaluationContext, Split], list[Score]]] = {
    "nearest_image": nearest_image,
    "nearest_image_by_group": nearest_image_by_group,
    "nearest_image_of_grid": nearest_image_of_grid,
    "scene_accuracy": scene_accuracy,
    "caption_f1": caption_f1,
    "caption_metrics": caption_metrics,
    "fid_kid": fid_kid,
    "clip_score": clip_score_evaluator,
    "answer_f1": answer_f1,
    "text_answers": text_answers,
    "math_answers": math_answers,
    "text_recognition": text_recognition,
    "text_continuation": text_continuation,
    "multiple_choice": multiple_choice,
    "few_shot": few_shot,
    "few_shot_text": few_shot_text,
    "few_shot_captions": few_shot_captions,
    "few_shot_answers": few_shot_answers,
    "few_shot_classification": few_shot_classification,
    "cost": cost,
    "zero_shot_classification": zero_shot_classification,
    "text_ranking": text_ranking,
    "image_ranking": image_ranking,
    "inpainting": inpainting,
    "image_variation": image_variation,
    "self_reranking": self_reranking,
    "rerank_curve": rerank_curve,
    "likelihood": likelihood,
    "convergence": convergence,
    "attention_logits": attention_logits,
    "reconstruction": reconstruction,
    "retrieval": retrieval,
}
# Evaluators that show images to a model that generates or scores texts.
SHOWS_IMAGES = frozenset(
    (
        "caption_f1",
        "caption_metrics",
        "answer_f1",
        "text_recognition",
        "few_shot",
        "few_shot_captions",
        "few_shot_answers",
        "few_shot_classification",
        "cost",
        "zero_shot_classification",
        "text_ranking",
        "image_ranking",
    )
)
# Capabilities of the model that each evaluator needs, see ``families.interface``.
NEEDS: dict[str, tuple[str, ...]] = {
    "nearest_image": ("generate_image",),
    "nearest_image_by_group": ("generate_image",),
    "nearest_image_of_grid": ("generate_image",),
    "scene_accuracy": ("generate_image",),
    "caption_f1": ("generate_text",),
    "caption_metrics": ("generate_text",),
    "fid_kid": ("generate_image", "image_tokenizer"),
    "clip_score": ("generate_image",),
    "answer_f1": ("generate_text",),
    "text_answers": ("generate_text",),
    "math_answers": ("generate_text",),
    "cost": ("count_operations",),
    "text_recognition": ("generate_text",),
    "text_continuation": ("token_pipeline",),
    "multiple_choice": ("loglikelihood",),
    "few_shot": ("loglikelihood_after_shots",),
    "few_shot_text": ("loglikelihood_after_shots",),
    "few_shot_captions": ("generate_text_after_shots",),
    "few_shot_answers": ("generate_text_after_shots",),
    "few_shot_classification": ("loglikelihood_after_shots",),
    "zero_shot_classification": ("loglikelihood",),
    "text_ranking": ("loglikelihood",),
    "image_ranking": ("loglikelihood",),
    "inpainting": ("token_pipeline",),
    "image_variation": ("token_pipeline",),
    "self_reranking": ("token_pipeline",),
    "rerank_curve": ("token_pipeline",),
    "likelihood": ("token_pipeline",),
    "convergence": ("token_pipeline",),
    "attention_logits": ("token_pipeline",),
    "reconstruction": ("image_tokenizer",),
    "retrieval": ("embed_image", "embed_text"),
}


def evaluate_all(
    model: Capabilities,
    config: EvaluationConfig,
    splits: Splits,
    *,
    samplings: tuple[TokenSamplingConfig, TokenSamplingConfig],
    ranker: ClipRanker | None = None,
    seed: int,
    stage: Stage,
) -> list[Score]:
    """Run every evaluator of the configuration on every split.

    Args:
        model: capabilities of the trained model.
        config: evaluators, splits and number of pairs.
        splits: the data, by split and dataset.
        samplings: how image tokens and how text tokens are sampled.
        ranker: CLIP that scores images, for evaluators that need one.
        seed: seed of the choice of pairs and of sampling.
        stage: times each evaluator and reports its progress, see ``Stage``.

    Returns:
        All scores, split by split, in the order of ``config.evaluators``.
    """
    scores: list[Score] = []
    for split_name in config.splits:
        generated_cache: dict[tuple[Any, ...], Any] = {}
        for name in config.evaluators:
            dataset, _, evaluator = name.rpartition("/")
            with stage(f"{name} on {split_name}") as advance:
                split = splits(split_name, dataset or None)
                context = EvaluationContext(
                    model,
                    *samplings,
                    ranker=ranker,
                    num_examples=min(config.num_examples, len(split)),
                    seed=seed,
                    missing_image=config.missing_image,
                    eval_fold=config.eval_fold,
                    grid_prompts=config.grid_prompts,
                    grid_samples=config.grid_samples,
                    on_token=partial(ignore_notes, advance),
                    generated_cache=generated_cache,
                    shots=config.shots,
                    support=partial(splits, "train", dataset or None),
                )
                started = time.monotonic()
                new_scores = [
                    score.with_dataset(dataset) for score in EVALUATORS[evaluator](context, split)
                ]
                advance(1, 1, _summary(new_scores, time.monotonic() - started))
            scores += new_scores
    return scores


def _summary(scores: list[Score], seconds: float) -> str:
    """Return an evaluator's first score and its speed, for the progress line of its stage."""
    if not scores:
        return "nothing to evaluate"
    first = scores[0]
    rate = first.num_examples / seconds
    return f"{first.value:.3g} [{first.low:.3g}, {first.high:.3g}], {rate:.3g} examples/s"


def card_rows(scores: list[Score]) -> list[dict[str, Any]]:
    """Return scores as the rows of a report card, see ``rudolph.reports.report_cards``."""
    return [vars(score) | {"score": score.name, "count": score.num_examples} for score in scores]
