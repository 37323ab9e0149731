"""Scores with their intervals, and the context in which evaluators compute them.

Shapes: N examples, I image tokens, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudolph.data.datasets.shapes import Shapes
from rudolph.data.pairs import Pair
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split
from rudolph.evaluation.metrics.answers import MetricProtocol
from rudolph.evaluation.shots import ShotConfig
from rudolph.evaluation.statistics import Estimate, bootstrap_interval, mean_interval
from rudolph.families.interface import Capabilities
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline

CHANCE_SHIFTS = 20
# The seed that cuts pairs into folds.  It is not the run's seed, so that every run leaves the
# same fold unused.
EVAL_FOLD_SEED = 0


@dataclass(frozen=True)
class Score:
    """A metric of one split: value, 95 % interval, chance level and number of examples.

    Attributes:
        metric: name of the metric, as in ``text_to_image/fid``.
        split: name of the split.
        value: the metric's value.
        low: lower bound of the 95 % interval.
        high: upper bound of the 95 % interval.
        chance: the value at chance level; None if unknown.
        num_examples: number of evaluated examples.
        protocol: ``str`` of the ``MetricProtocol``; empty if there is none.
        dataset: dataset of the evaluated pairs; empty for the run's main dataset.
    """

    metric: str
    split: str
    value: float
    low: float
    high: float
    chance: float | None
    num_examples: int
    protocol: str = ""
    dataset: str = ""

    @property
    def name(self) -> str:
        """The full name: dataset if any, metric and split, joined by ``/``."""
        prefix = f"{self.dataset}/" if self.dataset else ""
        return f"{prefix}{self.metric}/{self.split}"

    def with_dataset(self, dataset: str) -> "Score":
        """Return a copy of this score that names its dataset."""
        return replace(self, dataset=dataset)


@dataclass(frozen=True)
class EvaluationContext:
    """The model, the sampling settings and the choice of pairs that evaluators share.

    Attributes:
        model: capabilities of the trained model.
        image_sampling: how image tokens are sampled.
        text_sampling: how text tokens are sampled.
        num_examples: number of pairs to evaluate.
        seed: seed of the choice of pairs and of sampling.
        ranker: CLIP that scores images; None if the evaluation names none.
        missing_image: ``zeros`` or ``legacy``, see ``EvaluationConfig``.
        eval_fold: evaluate only fold 0 or 1 of the pairs, the same for every seed; None for all.
        grid_prompts: prompts of the sample grid.
        grid_samples: number of images per prompt in the sample grid.
        on_token: progress callback ``(done, total)``.
        generated_cache: cache of generated images, shared by evaluators of the same captions.
        shots: numbers of shots and the choice of support examples.
        support: opens the training split of the evaluated dataset; None without one.
    """

    model: Capabilities
    image_sampling: TokenSamplingConfig
    text_sampling: TokenSamplingConfig
    num_examples: int
    seed: int
    ranker: ClipRanker | None = None
    missing_image: str = "zeros"
    eval_fold: int | None = None
    grid_prompts: tuple[str, ...] = ()
    grid_samples: int = 1
    on_token: Callable[[int, int], None] | None = None
    generated_cache: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    shots: ShotConfig = field(default_factory=ShotConfig)
    support: Callable[[], Split] | None = None

    @property
    def pipeline(self) -> Pipeline:
        """Token pipeline of the model: the masked decoder with its tokenizers."""
        return self.model.token_pipeline()

    def eval_indices(self, split: Split) -> list[int]:
        """Return the indices of the pairs to evaluate, at most ``num_examples``.

        These are the first pairs in the seed's order.  For ``shapes`` they are instead the first
        pairs with distinct captions, whatever the seed.
        """
        if not isinstance(split.dataset, Shapes):
            return self.shuffled_indices(split)[: self.num_examples]
        if self.eval_fold is None:
            return split.dataset.distinct(self.num_examples)
        return split.dataset.distinct(2 * self.num_examples)[self.eval_fold :: 2]

    def shuffled_indices(self, split: Split) -> list[int]:
        """Return the indices of all pairs, or of the selected fold, shuffled by the seed."""
        order: list[int] = np.random.default_rng(self.seed).permutation(len(split)).tolist()
        if self.eval_fold is None:
            return order
        folds = eval_folds(split)
        return [index for index in order if folds[index] == self.eval_fold]

    def sampling_seeds(self, indices: Sequence[int]) -> list[int]:
        """Return one sampling seed per pair, independent of the other pairs evaluated."""
        return [mixed_seed(self.seed, index) for index in indices]

    def generated_images(self, split: Split, indices: list[int]) -> Tensor:
        """Return one generated image per caption, ``(N, 3, H, W)`` in [0, 1].

        Images are cached in ``generated_cache`` by split, sampling settings and indices.
        """
        key = (split.digest, self.image_sampling, *indices)
        if key not in self.generated_cache:
            self.generated_cache[key] = self.model.generate_image(
                [split.captions[index] for index in indices],
                config=self.image_sampling,
                seeds=self.sampling_seeds(indices),
                on_token=self.on_token,
            )
        return self.generated_cache[key]

    def image_indices(self, split: Split, indices: Sequence[int]) -> Tensor:
        """Encode the real images of some pairs as image indices ``(N, I)``."""
        return self.model.image_tokenizer().encode(split.image_batch(indices))


def images_of(pairs: Sequence[Pair]) -> Tensor:
    """Return the images ``(N, 3, H, W)`` in [0, 1] of pairs from any split."""
    arrays = np.stack([np.asarray(pair.image) for pair in pairs])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def eval_folds(split: Split) -> np.ndarray[Any, Any]:
    """Return the fold ``(N,)``, 0 or 1, of every pair of a split.

    Pairs that share an image are in the same fold.
    """
    folds = np.empty(len(split), dtype=np.int64)
    folds[np.random.default_rng(EVAL_FOLD_SEED).permutation(len(split))] = (
        np.arange(len(split)) % 2
    )
    clusters = split.clusters(range(len(split)))
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    return folds[first][inverse]


def mean_score(
    metric: str,
    split: Split,
    indices: Sequence[int],
    values: np.ndarray[Any, Any],
    context: EvaluationContext,
    *,
    chance: float | None = None,
    protocol: MetricProtocol | None = None,
) -> Score:
    """Score the mean of ``values``, one per pair of ``indices``, with its interval.

    Pairs that share an image form one cluster.
    """
    clusters = split.clusters(indices)
    estimate = mean_interval(values, seed=context.seed, clusters=clusters)
    return score_with_interval(metric, split, estimate, len(values), chance, protocol)


def corpus_score(
    metric: str,
    split: Split,
    indices: Sequence[int],
    statistic: Callable[[np.ndarray[Any, Any]], float],
    context: EvaluationContext,
    *,
    chance: float | None = None,
    protocol: MetricProtocol | None = None,
) -> Score:
    """Score a statistic that is not a mean over pairs, with its bootstrap interval.

    ``statistic`` takes positions in ``indices``.  Pairs that share an image form one cluster.
    """
    number, clusters = len(indices), split.clusters(indices)
    estimate = bootstrap_interval(statistic, number, seed=context.seed, clusters=clusters)
    return score_with_interval(metric, split, estimate, number, chance, protocol)


def score_with_interval(
    metric: str,
    split: Split,
    estimate: Estimate,
    number: int,
    chance: float | None,
    protocol: MetricProtocol | None,
) -> Score:
    """Build a score from an estimate that already has its interval."""
    protocol_text = "" if protocol is None else str(protocol)
    return Score(metric, split.name, *estimate, chance, number, protocol_text)


def chance_level(score: Callable[[int, int], float], number: int) -> float | None:
    """Return the mean score of answers to other prompts, or None for fewer than two examples.

    ``score(i, j)`` scores the answer to prompt j as an answer to prompt i.  Each prompt is paired
    with at most ``CHANCE_SHIFTS`` others.
    """
    if number < 2:
        return None
    shifts = range(1, min(CHANCE_SHIFTS, number - 1) + 1)
    values = [score(i, (i + shift) % number) for shift in shifts for i in range(number)]
    return float(np.mean(values))


def ignore_notes(advance: Callable[[int, int, str], None], done: int, total: int) -> None:
    """Report progress with an empty note."""
    advance(done, total, "")
