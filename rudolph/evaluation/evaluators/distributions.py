"""Evaluators of generated images: FID and KID against real images, CLIPScore against captions.

Features need no download.  They come from the CLIP that the evaluation names, else from the
VQ-GAN's latents, averaged over the image.

Shapes: N images, D features, I image tokens, H and W pixels.
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
from rudolph.evaluation.context import EvaluationContext, Score, mean_score, score_with_interval
from rudolph.evaluation.metrics.answers import MetricProtocol
from rudolph.evaluation.metrics.captions import clip_score
from rudolph.evaluation.metrics.images import frechet_distance, squared_mmd
from rudolph.evaluation.statistics import jackknife_interval
from rudolph.generation.clip_ranking import ClipRanker
from rudolph.models.weights import weights_digest

Features = np.ndarray[Any, Any]


def fid_kid(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate text to image: FID and KID between generated images and the captions' real images.

    The chance level is the distance of images decoded from random codes.  The values depend on the
    number of images and on the features, so both are part of the protocol.
    """
    indices, tokenizer = context.eval_indices(split), context.model.image_tokenizer()
    name, features_of = _features(context)
    images = split.image_batch(indices)
    truth = features_of(images)
    generated = features_of(context.generated_images(split, indices))
    generator = torch.Generator().manual_seed(mixed_seed(context.seed, "random codes"))
    size = len(indices), tokenizer.encode(images[:1]).shape[1]
    random_indices = torch.randint(tokenizer.num_codes, size, generator=generator)
    noise = features_of(tokenizer.decode(random_indices))
    distances: dict[str, Callable[[Features, Features], float]] = {
        "fid": frechet_distance,
        "kid": squared_mmd,
    }
    return [
        score_with_interval(
            f"text_to_image/{metric}",
            split,
            jackknife_interval(
                partial(_distance_of_sample, distance, generated, truth),
                len(indices),
                # The estimate of KID is unbiased, so it may be negative.
                limits=(0.0 if metric == "fid" else -math.inf, math.inf),
                clusters=split.clusters(indices),
            ),
            len(indices),
            distance(noise, truth),
            MetricProtocol(metric, features=name, sample_size=len(indices)),
        )
        for metric, distance in distances.items()
    ]


def clip_score_evaluator(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate text to image: CLIPScore of generated images, and of the real images.

    Raises:
        ValueError: if the evaluation names no CLIP.
    """
    ranker = context.ranker
    if ranker is None:
        raise ValueError("evaluation.clip: expected a CLIP for clip_score, got null")
    indices = context.eval_indices(split)
    texts = ranker.text_features([split.captions[index] for index in indices]).numpy()
    protocol = MetricProtocol("clip-score", features=_clip_name(ranker), settings="plain-captions")
    scores = []
    for name, images in (
        ("text_to_image/clip_score", context.generated_images(split, indices)),
        ("real_images/clip_score", split.image_batch(indices)),
    ):
        features = ranker.image_features(images).numpy()
        values = clip_score(texts, features)
        # The chance level pairs each caption with the image of another caption.
        chance = float(clip_score(texts, np.roll(features, 1, axis=0)).mean())
        scores.append(
            mean_score(name, split, indices, values, context, chance=chance, protocol=protocol)
        )
    return scores


def _distance_of_sample(
    distance: Callable[[Features, Features], float],
    generated: Features,
    truth: Features,
    sample: np.ndarray[Any, Any],
) -> float:
    return distance(generated[sample], truth)


def _features(context: EvaluationContext) -> tuple[str, Callable[[Tensor], Features]]:
    """Return the name of the features and the function ``(N, 3, H, W) -> (N, D)``."""
    ranker, tokenizer = context.ranker, context.model.image_tokenizer()
    if ranker is not None:
        return _clip_name(ranker), lambda images: ranker.features(images).double().numpy()

    @torch.inference_mode()
    def latents(images: Tensor) -> Features:
        batches = [
            tokenizer.vqgan.encode(batch.to(tokenizer.device)).float().mean((2, 3)).cpu()
            for batch in torch.split(images, tokenizer.batch_size)
        ]
        return torch.cat(batches).double().numpy()

    return f"vqgan-{weights_digest(tokenizer.vqgan)[:8]}:latents", latents


def _clip_name(ranker: ClipRanker) -> str:
    return f"clip-{weights_digest(ranker.clip)[:8]}:images"
