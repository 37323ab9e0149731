"""Evaluator of retrieval: captions by an image, and images by a caption."""

import torch

from rudolph.data.splits import Split
from rudolph.data.text_image import caption_ids
from rudolph.evaluation.context import EvaluationContext, Score
from rudolph.evaluation.metrics.answers import MetricProtocol
from rudolph.evaluation.statistics import mean_interval
from rudolph.generation.clip_ranking import RECALLS_AT, RetrievalSet


def retrieval(context: EvaluationContext, split: Split) -> list[Score]:
    """Compute recall at 1 and at 5 in both directions among the first pairs of a split.

    Pairs may share a caption or an image.  Each distinct caption or image is one query and one
    gallery entry.  A gallery entry is a right answer if it forms a pair with the query.

    Raises:
        ValueError: if the pairs have fewer than two distinct captions or images.
    """
    indices = range(context.num_examples)
    captions = [split.captions[index] for index in indices]
    ids = split.clusters(indices), caption_ids(captions)
    gallery = RetrievalSet.of(*(torch.from_numpy(group_ids) for group_ids in ids))
    for name, entries in (("images", gallery.images), ("captions", gallery.texts)):
        if len(entries) < 2:
            raise ValueError(
                f"evaluator retrieval needs at least two different {name}, which {split.name} "
                "lacks"
            )
    images = context.model.embed_image(split.image_batch(gallery.images.numpy()))
    texts = context.model.embed_text([captions[index] for index in gallery.texts])
    galleries = {"image_to_text": len(texts), "text_to_image": len(images)}
    scores = []
    for direction, ranks in gallery.ranks(images, texts).items():
        for k in RECALLS_AT:
            size, hits = galleries[direction], (ranks <= k).double().numpy()
            protocol = MetricProtocol("recall", sample_size=size, settings=f"at:{k}")
            estimate = mean_interval(hits, seed=context.seed)
            name, chance = f"{direction}/recall_at_{k}", min(k / size, 1.0)
            scores.append(Score(name, split.name, *estimate, chance, len(hits), str(protocol)))
    return scores
