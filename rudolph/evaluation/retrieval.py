"""Retrieval: a picture among captions, and a caption among pictures."""

import numpy as np
import torch

from rudolph.data.shapes import Shapes
from rudolph.data.splits import Split
from rudolph.evaluation.asking import Score
from rudolph.evaluation.metrics import Measure
from rudolph.evaluation.statistics import mean_interval
from rudolph.sampling.clip_ranking import ClipRanker, retrieval_ranks

RECALLS_AT = (1, 5)


def retrieval(ranker: ClipRanker, split: Split, *, num_examples: int, seed: int) -> list[Score]:
    """Recall at 1 and at 5, both ways, among pairs of different captions.

    Raises:
        ValueError: when the split has fewer than two different captions.
    """
    indices = different_captions(split, num_examples, seed)
    if len(indices) < 2:
        raise ValueError(f"retrieval needs two different captions, {split.name} has fewer")
    pictures = ranker.image_features(split.pictures(indices))
    texts = ranker.text_features([split.captions[index] for index in indices])
    own, chance = torch.arange(len(indices)), 1 / len(indices)
    scores = []
    for way, queries, gallery in (
        ("image_to_text", pictures, texts),
        ("text_to_image", texts, pictures),
    ):
        ranks = retrieval_ranks(queries, gallery, own, own)
        for k in RECALLS_AT:
            hits = (ranks <= k).double().numpy()
            measure = Measure("recall", sample_size=len(indices), settings=f"at:{k}")
            estimate = mean_interval(hits, seed=seed)
            name, count = f"{way}/recall_at_{k}", len(indices)
            scores.append(Score(name, split.name, *estimate, k * chance, count, str(measure)))
    return scores


def different_captions(split: Split, number: int, seed: int) -> list[int]:
    """The pairs that are asked about: of each caption the first, chosen by the seed."""
    if isinstance(split.dataset, Shapes):
        return split.dataset.distinct(min(number, len(split)))
    first = {text: at for at, text in reversed(list(enumerate(split.captions)))}
    order = np.random.default_rng(seed).permutation(sorted(first.values()))
    return order[:number].tolist()
