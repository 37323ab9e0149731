"""Best of N: quality of the image that a ranking puts first, as N grows.

For each caption, K images are sampled once and ordered by each ranking.  Finding the best of any N
of them needs no further sampling.  Candidates are numbered from the best, i = 0.  Candidate i is
the best in a fraction C(K - 1 - i, N - 1) / C(K, N) of all subsets of size N.  Each point is
therefore the exact mean over all subsets, and the points of a curve share their images.

Shapes: P captions, K candidates of each, I image tokens.
"""

from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext, Score, mean_score
from rudolph.evaluation.evaluators.images import CHECKER, matches_scenes, shapes_of
from rudolph.evaluation.metrics.answers import MetricProtocol
from rudolph.generation.answering import answer_prompts, score_choices
from rudolph.generation.ranking import perplexities

CANDIDATE_COUNTS = (1, 2, 4, 8, 16, 32, 64)


def best_probabilities(num_candidates: int, number: int) -> np.ndarray[Any, Any]:
    """Return ``(K,)``: the probability that each candidate, best first, is the best of ``number``.

    >>> best_probabilities(3, 2).round(3).tolist()
    [0.667, 0.333, 0.0]
    """
    num_subsets = [comb(num_candidates - 1 - rank, number - 1) for rank in range(num_candidates)]
    return np.array(num_subsets) / comb(num_candidates, number)


def rerank_curve(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate best of N ranked by likelihood, by inverse prompting, by CLIP and by an oracle.

    CLIP is omitted if the evaluation names none.
    """
    world = shapes_of(split, "rerank_curve")
    indices, num_samples = context.eval_indices(split), CANDIDATE_COUNTS[-1]
    captions = [split.captions[index] for index in indices]
    seeds = [mixed_seed(context.seed, index, k) for index in indices for k in range(num_samples)]
    codes = context.pipeline.generate_indices(
        captions, config=context.image_sampling, seeds=seeds, on_token=context.on_token
    )
    verdicts = matches_scenes(
        context, world, [index for index in indices for _ in range(num_samples)], codes
    )
    size = len(captions), num_samples
    is_correct = np.array([verdict.is_correct for verdict in verdicts], dtype=float).reshape(size)
    objects = np.array([verdict.object_accuracy for verdict in verdicts]).reshape(size)
    rankings = {name: rank.view(size).numpy() for name, rank in _ranked(context, captions, codes)}
    rankings["oracle"] = is_correct + objects
    chance = float(is_correct.mean())
    protocol = MetricProtocol(CHECKER, settings=f"best-of:{num_samples}-candidates")

    def score_of(name: str, values: np.ndarray[Any, Any], *, chance: float) -> Score:
        return mean_score(name, split, indices, values, context, chance=chance, protocol=protocol)

    scores = []
    for name, values in rankings.items():
        order = np.argsort(-values, axis=1, kind="stable")
        best_first = np.take_along_axis(is_correct, order, axis=1)
        expected = [
            best_first @ best_probabilities(num_samples, number) for number in CANDIDATE_COUNTS
        ]
        for number, expected_values in zip(CANDIDATE_COUNTS, expected, strict=True):
            metric = f"rerank_{name}/best_of_{number}"
            scores.append(score_of(metric, expected_values, chance=chance))
        # The gain of the last doubling per caption; its interval includes 0 once doubling stops
        # helping.
        for number, (fewer, more) in zip(CANDIDATE_COUNTS[1:], pairwise(expected), strict=True):
            metric = f"rerank_{name}/gain_at_{number}"
            scores.append(score_of(metric, more - fewer, chance=0.0))
    return scores


def _ranked(
    context: EvaluationContext, captions: list[str], codes: Tensor
) -> list[tuple[str, Tensor]]:
    """Return scores ``(P * K,)`` of images ``(P * K, I)`` by each ranking; higher is better."""
    pipeline, num_candidates = context.pipeline, len(codes) // len(captions)
    repeated = [caption for caption in captions for _ in range(num_candidates)]
    lefts = {text: pipeline.texts("text_to_image", text).left for text in captions}
    left = torch.stack([lefts[text] for text in repeated])
    image_perplexities = perplexities(
        pipeline.decoder,
        torch.cat([left, codes], dim=1),
        segments=("image",),
        batch_size=pipeline.batch_size,
    )["image"]
    caption_log_likelihoods = score_choices(
        pipeline,
        "image_captioning",
        answer_prompts(pipeline, "image_captioning", indices=codes),
        [[caption] for caption in repeated],
        on_batch=context.on_token,
    ).log_likelihoods[:, 0]
    rankings = [
        ("likelihood", -image_perplexities),
        ("inverse_prompting", caption_log_likelihoods),
    ]
    if context.ranker is not None:
        images = context.ranker.image_features(pipeline.decode(codes))
        texts = context.ranker.text_features(captions).repeat_interleave(num_candidates, dim=0)
        rankings.append(("clip", (images * texts).sum(1)))
    return rankings
