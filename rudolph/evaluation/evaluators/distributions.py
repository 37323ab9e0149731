"""How near drawn pictures are to real ones as a whole, and to their captions by a CLIP.

Features are the project's own, so that nothing must be downloaded: those of the CLIP that the
evaluation names, else the VQ-GAN's latents, averaged over the picture.

Shapes: N pictures, D features, I image tokens, H and W pixels.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split
from rudolph.evaluation.evaluator import Score, Subject, kept, scored
from rudolph.evaluation.metrics.answers import Measure
from rudolph.evaluation.metrics.captions import clip_score
from rudolph.evaluation.metrics.images import frechet_distance, squared_mmd
from rudolph.evaluation.statistics import jackknife_interval
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.models.weights import weights_digest

Features = np.ndarray[Any, Any]


def picture_distance(subject: Subject, split: Split) -> list[Score]:
    """Text to image: FID and KID between pictures drawn for captions and those of the captions.

    Chance is the distance of pictures decoded from random codes.  Values depend on the number of
    pictures and on who gives the features; both stand in the measure.
    """
    indices, pipeline = subject.chosen(split), subject.pipeline
    name, features_of = _features(subject)
    truth = features_of(split.pictures(indices))
    drawn = features_of(subject.pictures(split, indices))
    generator = torch.Generator().manual_seed(mixed_seed(subject.seed, "random codes"))
    layout = pipeline.decoder.layout
    codes = torch.randint(
        pipeline.decoder.vocabulary.codebook_size,
        (len(indices), layout.image_tokens_per_dim**2),
        generator=generator,
    )
    noise = features_of(pipeline.decode(codes))
    distances: dict[str, Callable[[Features, Features], float]] = {
        "fid": frechet_distance,
        "kid": squared_mmd,
    }
    return [
        kept(
            f"text_to_image/{metric}",
            split,
            jackknife_interval(
                partial(_of_chosen, distance, drawn, truth),
                len(indices),
                # KID's estimate is unbiased, so that it may be below 0.
                limits=(0.0 if metric == "fid" else -math.inf, math.inf),
                clusters=split.clusters(indices),
            ),
            len(indices),
            distance(noise, truth),
            Measure(metric, features=name, sample_size=len(indices)),
        )
        for metric, distance in distances.items()
    ]


def clip_scores(subject: Subject, split: Split) -> list[Score]:
    """Text to image: CLIPScore of pictures drawn for captions, and of the real pictures."""
    ranker = subject.pipeline.clip
    if ranker is None:
        raise ValueError("the question clip_scores needs evaluation.clip")
    indices = subject.chosen(split)
    texts = ranker.text_features([split.captions[index] for index in indices]).numpy()
    measure = Measure("clip-score", features=_clip_name(ranker), settings="plain-captions")
    scores = []
    for place, images in (
        ("text_to_image/clip_score", subject.pictures(split, indices)),
        ("real_pictures/clip_score", split.pictures(indices)),
    ):
        features = ranker.image_features(images).numpy()
        values = clip_score(texts, features)
        # The picture of another caption.
        chance = float(clip_score(texts, np.roll(features, 1, axis=0)).mean())
        scores.append(
            scored(place, split, indices, values, subject, chance=chance, measure=measure)
        )
    return scores


def _of_chosen(
    distance: Callable[[Features, Features], float],
    drawn: Features,
    truth: Features,
    chosen: np.ndarray[Any, Any],
) -> float:
    return distance(drawn[chosen], truth)


def _features(subject: Subject) -> tuple[str, Callable[[Tensor], Features]]:
    """Who gives features, and the function from pictures ``(N, 3, H, W)`` to ``(N, D)``."""
    pipeline = subject.pipeline
    ranker = pipeline.clip
    if ranker is not None:
        return _clip_name(ranker), lambda images: ranker.features(images).double().numpy()

    @torch.inference_mode()
    def latents(images: Tensor) -> Features:
        parts = [
            pipeline.vqgan.encode(part.to(pipeline.device)).float().mean((2, 3)).cpu()
            for part in torch.split(images, pipeline.batch_size)
        ]
        return torch.cat(parts).double().numpy()

    return f"vqgan-{weights_digest(pipeline.vqgan)[:8]}:latents", latents


def _clip_name(ranker: ClipRanker) -> str:
    return f"clip-{weights_digest(ranker.clip)[:8]}:pictures"
