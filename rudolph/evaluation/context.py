"""Who is asked, what an answer is worth, and how a number is kept with its interval.

Shapes: N examples.
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
from rudolph.evaluation.statistics import Estimate, bootstrap_interval, mean_interval
from rudolph.families.interface import Capabilities
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline

CHANCE_SHIFTS = 20
# What cuts pairs in two halves; the seed of a run does not, so that its other half stays unasked.
HALVES = 0
# What a task without an image is answered after.
MISSING_IMAGE = ("zeros", "legacy")


@dataclass(frozen=True)
class Score:
    """A metric of one split: its value, 95 % interval, chance level and number of examples.

    ``metric`` is ``task/number``, ``measure`` says under which protocol it is one, and ``dataset``
    whose pairs were asked about, where it is not the main one's.
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
        place = f"{self.dataset}/" if self.dataset else ""
        return f"{place}{self.metric}/{self.split}"

    def of(self, dataset: str) -> "Score":
        """The same of a dataset that is named."""
        return replace(self, dataset=dataset)


@dataclass(frozen=True)
class EvaluationContext:
    """Who is asked: the models, how they sample, how many examples, the seed of it all.

    Of pairs that are cut in two, the same way for every seed, ``eval_fold`` 0 or 1 alone is asked
    about.  ``drawn`` holds the images that were drawn, for other questions about the same
    captions.
    """

    model: Capabilities
    image_sampling: TokenSamplingConfig
    text_sampling: TokenSamplingConfig
    num_examples: int
    seed: int
    ranker: ClipRanker | None = None
    missing_image: str = "zeros"
    eval_fold: int | None = None
    on_token: Callable[[int, int], None] | None = None
    drawn: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def pipeline(self) -> Pipeline:
        """The masked decoder with its tokenizers."""
        return self.model.token_pipeline()

    def chosen(self, split: Split) -> list[int]:
        """Which pairs are asked about: drawn by the seed; of scenes the first different ones."""
        if not isinstance(split.dataset, Shapes):
            return self.order(split)[: self.num_examples]
        if self.eval_fold is None:
            return split.dataset.distinct(self.num_examples)
        return split.dataset.distinct(2 * self.num_examples)[self.eval_fold :: 2]

    def order(self, split: Split) -> list[int]:
        """All pairs, or those of the half, as the seed shuffles them."""
        order: list[int] = np.random.default_rng(self.seed).permutation(len(split)).tolist()
        if self.eval_fold is None:
            return order
        halves = eval_folds(split)
        return [index for index in order if halves[index] == self.eval_fold]

    def seeds(self, indices: Sequence[int]) -> list[int]:
        """One seed for each pair, whatever else is asked about."""
        return [mixed_seed(self.seed, index) for index in indices]

    def generated_images(self, split: Split, indices: list[int]) -> Tensor:
        """One generated image for the caption of each pair."""
        place = (split.digest, self.image_sampling, *indices)
        if place not in self.drawn:
            self.drawn[place] = self.model.generate_image(
                [split.captions[index] for index in indices],
                config=self.image_sampling,
                seeds=self.seeds(indices),
                on_token=self.on_token,
            )
        return self.drawn[place]

    def codes(self, split: Split, indices: Sequence[int]) -> Tensor:
        """Image indices ``(N, I)`` of the real images of some pairs."""
        return self.model.image_tokenizer().encode(split.image_batch(indices))


def images_of(pairs: Sequence[Pair]) -> Tensor:
    """Return the images of pairs of any split, ``(N, 3, H, W)`` in [0, 1]."""
    arrays = np.stack([np.asarray(pair.image) for pair in pairs])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def eval_folds(split: Split) -> np.ndarray[Any, Any]:
    """Return the half, 0 or 1, of every pair of a split, ``(N,)``; an image is in one alone."""
    halves = np.empty(len(split), dtype=np.int64)
    halves[np.random.default_rng(HALVES).permutation(len(split))] = np.arange(len(split)) % 2
    clusters = split.clusters(range(len(split)))
    _, first, place = np.unique(clusters, return_index=True, return_inverse=True)
    return halves[first][place]


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
    """The mean of one value for each pair of ``indices``; those of one image count together."""
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
    """A statistic of all pairs of ``indices``, which is no mean: it is given places in them."""
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
    """A number that has its interval already."""
    told = "" if protocol is None else str(protocol)
    return Score(metric, split.name, *estimate, chance, number, told)


def chance_level(score: Callable[[int, int], float], number: int) -> float | None:
    """The mean ``score(i, j)`` of the answer to the prompt of j as one to that of i."""
    if number < 2:
        return None
    shifts = range(1, min(CHANCE_SHIFTS, number - 1) + 1)
    values = [score(i, (i + shift) % number) for shift in shifts for i in range(number)]
    return float(np.mean(values))


def ignore_notes(advance: Callable[[int, int, str], None], done: int, total: int) -> None:
    """Progress of work that has nothing to say but how far it is."""
    advance(done, total, "")
