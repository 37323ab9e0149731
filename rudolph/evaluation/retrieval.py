"""Retrieval: a picture among captions, and a caption among pictures."""

import numpy as np
import torch

from rudolph.data.splits import Split
from rudolph.data.text_image import caption_numbers
from rudolph.evaluation.asking import Score
from rudolph.evaluation.metrics import Measure
from rudolph.evaluation.statistics import mean_interval
from rudolph.sampling.clip_ranking import ClipRanker, retrieval_ranks

RECALLS_AT = (1, 5)


def retrieval(ranker: ClipRanker, split: Split, *, num_examples: int, seed: int) -> list[Score]:
    """Recall at 1 and at 5, both ways, among the first pairs of a split.

    Pairs may share a caption: it is asked for and stands among the texts once, and each of its
    pictures answers it.

    Raises:
        ValueError: when the pairs have fewer than two different captions.
    """
    indices = range(min(num_examples, len(split)))
    captions = [split.captions[index] for index in indices]
    numbers = torch.from_numpy(caption_numbers(captions))
    _, first = np.unique(numbers.numpy(), return_index=True)
    if len(first) < 2:
        raise ValueError(f"retrieval needs two different captions, {split.name} has fewer")
    pictures = ranker.image_features(split.pictures(indices))
    texts = ranker.text_features([captions[at] for at in first])
    own = numbers[torch.from_numpy(first)]
    ways = {
        "image_to_text": retrieval_ranks(pictures, texts, numbers, own),
        "text_to_image": retrieval_ranks(texts, pictures, own, numbers),
    }
    galleries = {"image_to_text": len(texts), "text_to_image": len(pictures)}
    scores = []
    for way, ranks in ways.items():
        for k in RECALLS_AT:
            size, hits = galleries[way], (ranks <= k).double().numpy()
            measure = Measure("recall", sample_size=size, settings=f"at:{k}")
            estimate = mean_interval(hits, seed=seed)
            name, chance = f"{way}/recall_at_{k}", min(k / size, 1.0)
            scores.append(Score(name, split.name, *estimate, chance, len(hits), str(measure)))
    return scores
