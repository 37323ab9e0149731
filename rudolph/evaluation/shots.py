"""Support examples of few-shot prompts: how many, which, and in which order.

Support examples come from the training split.  ``similar`` is RICES, retrieval-based in-context
example selection: the support images that a frozen image encoder embeds closest to the query's
image, by cosine similarity.

Source: Yang 2022 (arXiv:2109.05014); Alayrac 2022 (arXiv:2204.14198), which puts the most similar
example last; open_flamingo 2.0.1, ``eval/rices.py``.

Shapes: N queries, P support pairs, K shots, E embedding size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split
from rudolph.files.constraints import Count, check
from rudolph.generation.clip_ranking import ClipRanker

# Number of shots of the controls, or the largest number of shots if that is smaller.
CONTROL_SHOTS = 8
# Support images held in memory at once.
EMBEDDED_AT_ONCE = 256

PairIndices = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ShotConfig:
    """Shots of the few-shot evaluators.  ``few_shot`` and ``few_shot_text`` use ``numbers`` alone.

    The seed of the run decides which pairs are support examples and which are sampled.

    Attributes:
        numbers: Numbers of shots, ascending.
        choice: Which support examples precede a query: ``random`` ones, or those whose images are
            most ``similar`` to the query's by the embeddings of ``evaluation.clip`` (RICES).
        order: With ``given``, the most similar shot is the last one before the query; with
            ``reversed``, it is the first.
        num_support: Number of training pairs to choose from, sampled by the seed.
    """

    numbers: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    choice: Literal["random", "similar"] = "random"
    order: Literal["given", "reversed"] = "given"
    num_support: Count = 2048

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        numbers = list(self.numbers)
        if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 0:
            raise ValueError(f"numbers: expected ascending numbers from 0 on, got {numbers}")

    @property
    def num_control(self) -> int:
        """Return the number of shots of the controls."""
        return min(CONTROL_SHOTS, self.numbers[-1])

    def protocol(self, number: int) -> str:
        """Return how a number of shots is chosen, as ``MetricProtocol.settings``."""
        return f"shots:{number}-{self.choice}-{self.order}-of:{self.num_support}"

    def ordered(self, ranked: Sequence[int]) -> list[int]:
        """Return support examples, the best first, in the order of the prompt."""
        return list(ranked) if self.order == "reversed" else list(ranked)[::-1]


class SupportSet:
    """The training pairs that can be shots of a few-shot prompt.

    Args:
        split: The training split.
        config: How many pairs to choose from, and how to choose among them.
        seed: Seed of these pairs and of ``random``.
        is_eligible: Returns whether the pair at an index can be a shot.
    """

    def __init__(
        self,
        split: Split,
        config: ShotConfig,
        *,
        seed: int,
        is_eligible: Callable[[int], bool] = lambda index: True,
    ) -> None:
        self.split, self.config, self.seed = split, config, seed
        shuffled = np.random.default_rng(mixed_seed(seed, "support")).permutation(len(split))
        eligible = (index for index in shuffled.tolist() if is_eligible(index))
        self.indices = np.array(list(islice(eligible, config.num_support)), dtype=np.int64)

    def choose(
        self, queries: Split, indices: Sequence[int], *, ranker: ClipRanker | None = None
    ) -> PairIndices:
        """Return the support examples of each query, the best first, ``(N, K)``.

        K is the largest number of shots; fewer shots are the first ones of a row.  A row depends
        on the seed and its query alone.  The image of a query is never one of its shots.

        Args:
            queries: Split of the queries.
            indices: The queries, as indices of ``queries``.
            ranker: CLIP whose image embeddings ``similar`` compares.

        Raises:
            ValueError: If there are too few support examples.
        """
        if self.config.choice == "random":
            rankings = self._random(queries, indices)
        else:
            assert ranker is not None
            rankings = self._similar(queries, indices, ranker)
        number, rows = self.config.numbers[-1], []
        for index, ranked in zip(indices, rankings, strict=True):
            if queries is self.split:
                ranked = ranked[queries.clusters(ranked) != queries.clusters([index])]
            if len(ranked) < number:
                raise ValueError(
                    f"evaluation.shots.numbers: expected at most {len(ranked)}, the support "
                    f"examples of {queries.dataset_name}, got {number}"
                )
            rows.append(ranked[:number])
        return np.stack(rows)

    def _random(self, queries: Split, indices: Sequence[int]) -> Iterator[PairIndices]:
        """Yield the support examples ``(P,)`` of each query in a random order."""
        for index in indices:
            rng = np.random.default_rng(mixed_seed(self.seed, queries.name, index))
            yield rng.permutation(self.indices)

    def _similar(
        self, queries: Split, indices: Sequence[int], ranker: ClipRanker
    ) -> Iterator[PairIndices]:
        """Yield the support examples ``(P,)`` of each query, the most similar first."""
        support = image_embeddings(ranker, self.split, self.indices)
        for similarities in (image_embeddings(ranker, queries, indices) @ support.T).numpy():
            # Equally similar examples keep the order of the seed.
            yield self.indices[np.argsort(-similarities, kind="stable")]


def image_embeddings(
    ranker: ClipRanker, split: Split, indices: Sequence[int] | PairIndices
) -> Tensor:
    """Return the embeddings of some images of a split as unit vectors ``(N, E)``."""
    parts = [
        ranker.image_features(split.image_batch(indices[first : first + EMBEDDED_AT_ONCE]))
        for first in range(0, len(indices), EMBEDDED_AT_ONCE)
    ]
    return torch.cat(parts)
