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
from rudolph.evaluation.metrics.answers import Measure
from rudolph.evaluation.statistics import Estimate, mean_interval, resampled_interval
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline

CHANCE_SHIFTS = 20
# What cuts pairs in two halves; the seed of a run does not, so that its other half stays unasked.
HALVES = 0
# What a task without a picture is answered after.
NO_IMAGE = ("zeros", "legacy")


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
    measure: str = ""
    dataset: str = ""

    @property
    def name(self) -> str:
        place = f"{self.dataset}/" if self.dataset else ""
        return f"{place}{self.metric}/{self.split}"

    def of(self, dataset: str) -> "Score":
        """The same of a dataset that is named."""
        return replace(self, dataset=dataset)


@dataclass(frozen=True)
class Subject:
    """Who is asked: the models, how they sample, how many examples, the seed of it all.

    Of pairs that are cut in two, the same way for every seed, ``half`` 0 or 1 alone is asked
    about.  ``drawn`` holds the pictures that were drawn, for other questions about the same
    captions.
    """

    pipeline: Pipeline
    image_sampling: TokenSamplingConfig
    text_sampling: TokenSamplingConfig
    num_examples: int
    seed: int
    no_image: str = "zeros"
    half: int | None = None
    on_token: Callable[[int, int], None] | None = None
    drawn: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def chosen(self, split: Split) -> list[int]:
        """Which pairs are asked about: drawn by the seed; of scenes the first different ones."""
        if not isinstance(split.dataset, Shapes):
            return self.order(split)[: self.num_examples]
        if self.half is None:
            return split.dataset.distinct(self.num_examples)
        return split.dataset.distinct(2 * self.num_examples)[self.half :: 2]

    def order(self, split: Split) -> list[int]:
        """All pairs, or those of the half, as the seed shuffles them."""
        order: list[int] = np.random.default_rng(self.seed).permutation(len(split)).tolist()
        if self.half is None:
            return order
        halves = halves_of(split)
        return [index for index in order if halves[index] == self.half]

    def seeds(self, indices: Sequence[int]) -> list[int]:
        """One seed for each pair, whatever else is asked about."""
        return [mixed_seed(self.seed, index) for index in indices]

    def pictures(self, split: Split, indices: list[int]) -> Tensor:
        """One generated picture for the caption of each pair."""
        place = (split.digest, self.image_sampling, *indices)
        if place not in self.drawn:
            self.drawn[place] = self.pipeline.pictures(
                [split.captions[index] for index in indices],
                config=self.image_sampling,
                seeds=self.seeds(indices),
                on_token=self.on_token,
            )
        return self.drawn[place]

    def codes(self, split: Split, indices: Sequence[int]) -> Tensor:
        """Image indices ``(N, I)`` of the real pictures of some pairs."""
        return self.pipeline.encode(split.pictures(indices))

    def codes_of(self, pairs: Sequence[Pair]) -> Tensor:
        """Image indices ``(N, I)`` of the pictures of pairs, in any split."""
        arrays = np.stack([np.asarray(pair.image) for pair in pairs])
        pictures = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
        return self.pipeline.encode(pictures)


def halves_of(split: Split) -> np.ndarray[Any, Any]:
    """Return the half, 0 or 1, of every pair of a split, ``(N,)``; an image is in one alone."""
    halves = np.empty(len(split), dtype=np.int64)
    halves[np.random.default_rng(HALVES).permutation(len(split))] = np.arange(len(split)) % 2
    clusters = split.clusters(range(len(split)))
    _, first, place = np.unique(clusters, return_index=True, return_inverse=True)
    return halves[first][place]


def scored(
    metric: str,
    split: Split,
    indices: Sequence[int],
    values: np.ndarray[Any, Any],
    subject: Subject,
    *,
    chance: float | None = None,
    measure: Measure | None = None,
) -> Score:
    """The mean of one value for each pair of ``indices``; those of one image count together."""
    clusters = split.clusters(indices)
    estimate = mean_interval(values, seed=subject.seed, clusters=clusters)
    return kept(metric, split, estimate, len(values), chance, measure)


def scored_together(
    metric: str,
    split: Split,
    indices: Sequence[int],
    statistic: Callable[[np.ndarray[Any, Any]], float],
    subject: Subject,
    *,
    chance: float | None = None,
    measure: Measure | None = None,
) -> Score:
    """A statistic of all pairs of ``indices``, which is no mean: it is given places in them."""
    number, clusters = len(indices), split.clusters(indices)
    estimate = resampled_interval(statistic, number, seed=subject.seed, clusters=clusters)
    return kept(metric, split, estimate, number, chance, measure)


def kept(
    metric: str,
    split: Split,
    estimate: Estimate,
    number: int,
    chance: float | None,
    measure: Measure | None,
) -> Score:
    """A number that has its interval already."""
    told = "" if measure is None else str(measure)
    return Score(metric, split.name, *estimate, chance, number, told)


def chance_level(score: Callable[[int, int], float], number: int) -> float | None:
    """The mean ``score(i, j)`` of the answer to the prompt of j as one to that of i."""
    if number < 2:
        return None
    shifts = range(1, min(CHANCE_SHIFTS, number - 1) + 1)
    values = [score(i, (i + shift) % number) for shift in shifts for i in range(number)]
    return float(np.mean(values))


def without_note(advance: Callable[[int, int, str], None], done: int, total: int) -> None:
    """Progress of work that has nothing to say but how far it is."""
    advance(done, total, "")
