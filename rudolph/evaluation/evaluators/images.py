"""Questions that are answered with images, and what the image tokenizer keeps of one.

Shapes: N examples, S images of each, I image tokens, H and W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudolph.data.datasets.emoji import Emoji, emoji_images
from rudolph.data.datasets.shapes import Shapes
from rudolph.data.datasets.shapes_checker import SceneVerdict, check_scene, read_scene
from rudolph.data.datasets.shapes_scenes import Scene
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split
from rudolph.evaluation.context import (
    EvaluationContext,
    Score,
    chance_level,
    mean_score,
    score_with_interval,
)
from rudolph.evaluation.metrics.answers import MetricProtocol, nearest_ranks
from rudolph.evaluation.statistics import jackknife_interval
from rudolph.generation.generate import FREE
from rudolph.generation.ranking import rank_images
from rudolph.models.image_metrics import psnr, ssim
from rudolph.models.vqgan.codes import codebook_usage

NEAREST_SHARE = 0.01
# Images of one prompt of which the likeliest is kept.
NUM_CANDIDATES = 8
CHECKER = "shapes-checker"


def nearest_image(context: EvaluationContext, split: Split) -> list[Score]:
    """Text to image: is the generated emoji's own image among the nearest 1 % of all emoji?"""
    emoji = emoji_of(split, "nearest_image")
    return _nearest(context, split, emoji, {"": context.chosen(split)})


def nearest_image_by_group(context: EvaluationContext, split: Split) -> list[Score]:
    """The same about as many names of each group of Unicode, or all that a group has."""
    emoji = emoji_of(split, "nearest_image_by_group")
    groups: dict[str, list[int]] = {}
    for index in context.order(split):
        # "Animals & Nature" is animals.
        own = groups.setdefault(f"_{emoji.records[index].group.split()[0].lower()}", [])
        if len(own) < context.num_examples:
            own.append(index)
    return _nearest(context, split, emoji, dict(sorted(groups.items())))


def _nearest(
    context: EvaluationContext, split: Split, emoji: Emoji, groups: Mapping[str, list[int]]
) -> list[Score]:
    """A score for each group of indices, under the end of its name."""
    indices = [index for own in groups.values() for index in own]
    keys, gallery = emoji_images(emoji.image_size, emoji.folder)
    own = torch.tensor([keys.index(split.keys[index]) for index in indices])
    images = torch.from_numpy(gallery).permute(0, 3, 1, 2).float() / 255
    ranks = nearest_ranks(context.generated_images(split, indices), images, own)
    limit = int(NEAREST_SHARE * len(keys))
    protocol = MetricProtocol("nearest-rank", features="pixels", sample_size=len(keys))
    ends = np.cumsum([len(own) for own in groups.values()])[:-1]
    hits = np.split((ranks <= limit).double().numpy(), ends)
    pairs = zip(groups.items(), hits, strict=True)
    return [
        mean_score(
            f"text_to_image/nearest_1_percent{end}",
            split,
            own_pairs,
            each,
            context,
            chance=limit / len(keys),
            protocol=protocol,
        )
        for (end, own_pairs), each in pairs
    ]


def scene_accuracy(context: EvaluationContext, split: Split) -> list[Score]:
    """Text to image: does the checker read from the image all that the sentence states?"""
    world = shapes_of(split, "scene_accuracy")
    indices = context.chosen(split)
    scenes = [world.scene(index) for index in indices]
    readings = read_scenes(context.generated_images(split, indices), world)
    verdicts = [check_scene(scene, each) for scene, each in zip(scenes, readings, strict=True)]
    right = np.array([verdict.right for verdict in verdicts], dtype=float)
    chance = chance_level(
        lambda i, j: float(check_scene(scenes[i], readings[j]).right), len(scenes)
    )
    protocol = MetricProtocol(CHECKER)

    def of_each(name: str, values: np.ndarray[Any, Any], *, chance: float | None) -> Score:
        return mean_score(name, split, indices, values, context, chance=chance, protocol=protocol)

    name = "text_to_image/scene_accuracy"
    scores = [of_each(name, right, chance=chance)]
    for family in sorted({scene.family for scene in scenes}):
        own = np.array([scene.family == family for scene in scenes])
        its_pairs = np.array(indices)[own].tolist()
        score = mean_score(
            f"{name}_{family}", split, its_pairs, right[own], context, protocol=protocol
        )
        scores.append(score)
    objects = np.array([verdict.object_accuracy for verdict in verdicts])
    by_chance = chance_level(
        lambda i, j: check_scene(scenes[i], readings[j]).object_accuracy, len(scenes)
    )
    return [*scores, of_each("text_to_image/object_accuracy", objects, chance=by_chance)]


def inpainting(context: EvaluationContext, split: Split) -> list[Score]:
    """The lower half of a real image is drawn anew from the caption: is the scene whole?"""
    world = shapes_of(split, "inpainting")
    indices = context.chosen(split)
    codes = context.codes(split, indices)
    known = codes.clone()
    known[:, codes.shape[1] // 2 :] = FREE
    drawn = context.pipeline.generate_indices(
        [split.captions[index] for index in indices],
        config=context.image_sampling,
        seeds=context.seeds(indices),
        known=known,
        on_token=context.on_token,
    )
    return [_objects_right("inpainting/object_accuracy", context, split, world, indices, drawn)]


def image_variation(context: EvaluationContext, split: Split) -> list[Score]:
    """An image is told in words, and drawn from these words: does it show the same scene?"""
    world = shapes_of(split, "image_variation")
    indices = context.chosen(split)
    captions = context.pipeline.caption(
        split.image_batch(indices), config=context.text_sampling, seeds=context.seeds(indices)
    )
    drawn = context.pipeline.generate_indices(
        captions,
        config=context.image_sampling,
        seeds=context.seeds(indices),
        on_token=context.on_token,
    )
    return [
        _objects_right("image_variation/object_accuracy", context, split, world, indices, drawn)
    ]


def self_reranking(context: EvaluationContext, split: Split) -> list[Score]:
    """Of some images of its own, the one of which the decoder says the caption best."""
    world = shapes_of(split, "self_reranking")
    indices = context.chosen(split)
    captions = [split.captions[index] for index in indices]
    seeds = [mixed_seed(context.seed, at, k) for at in indices for k in range(NUM_CANDIDATES)]
    found = context.pipeline.generate_indices(
        captions, config=context.image_sampling, seeds=seeds, on_token=context.on_token
    )
    drawn = found.view(len(captions), NUM_CANDIDATES, -1)  # (N, S, I)
    orders = [
        rank_images(context.pipeline, own, caption, text_weight=1.0).order()
        for own, caption in zip(drawn, captions, strict=True)
    ]
    best = torch.stack([own[order[0]] for own, order in zip(drawn, orders, strict=True)])
    score = _objects_right("self_reranking/object_accuracy", context, split, world, indices, best)
    verdicts = matches_scenes(
        context, world, indices * NUM_CANDIDATES, drawn.transpose(0, 1).flatten(0, 1)
    )
    any_of_them = float(np.mean([verdict.object_accuracy for verdict in verdicts]))
    return [replace(score, chance=any_of_them)]


def reconstruction(context: EvaluationContext, split: Split) -> list[Score]:
    """VQ-GAN: PSNR and SSIM of reconstructed images, and how their codes use the codebook."""
    indices = context.chosen(split)
    images = split.image_batch(indices)
    tokenizer = context.model.image_tokenizer()
    decoded = tokenizer.decode(codes := tokenizer.encode(images))
    similarities = [
        mean_score(
            f"vqgan/{name}",
            split,
            indices,
            metric(decoded, images).double().numpy(),
            context,
            protocol=MetricProtocol(name, settings=f"range-1:{images.shape[-1]}px"),
        )
        for name, metric in (("psnr", psnr), ("ssim", ssim))
    ]
    clusters = split.clusters(indices)
    if len(set(clusters.tolist())) < 2:
        return similarities
    # Both grow with the number of codes that were counted.
    protocol = MetricProtocol("codebook", sample_size=codes.numel())
    size = tokenizer.num_codes

    def used(which: int, places: np.ndarray[Any, Any]) -> float:
        counts = torch.bincount(codes[torch.from_numpy(places)].flatten().cpu(), minlength=size)
        return codebook_usage(counts)[which]

    uses = [
        score_with_interval(
            f"vqgan/codebook_{name}",
            split,
            jackknife_interval(
                partial(used, which), len(codes), limits=(0.0, most), clusters=clusters
            ),
            len(codes),
            None,
            protocol,
        )
        for which, (name, most) in enumerate((("usage", 1.0), ("perplexity", float(size))))
    ]
    return [*similarities, *uses]


def read_scenes(images: Tensor, world: Shapes) -> list[Any]:
    """What the checker reads from images ``(N, 3, H, W)`` in [0, 1]."""
    arrays = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return [read_scene(array, grid=world.config.grid) for array in arrays]


def matches_scenes(
    context: EvaluationContext, world: Shapes, indices: Sequence[int], codes: Tensor
) -> list[SceneVerdict]:
    """Whether images in codes ``(N, I)`` show the scenes of pairs."""
    readings = read_scenes(context.pipeline.decode(codes), world)
    scenes: list[Scene] = [world.scene(index) for index in indices]
    return [check_scene(scene, each) for scene, each in zip(scenes, readings, strict=True)]


def _objects_right(
    name: str,
    context: EvaluationContext,
    split: Split,
    world: Shapes,
    indices: Sequence[int],
    codes: Tensor,
) -> Score:
    readings = read_scenes(context.pipeline.decode(codes), world)
    scenes = [world.scene(index) for index in indices]
    values = [
        check_scene(scene, each).object_accuracy
        for scene, each in zip(scenes, readings, strict=True)
    ]
    chance = chance_level(
        lambda i, j: check_scene(scenes[i], readings[j]).object_accuracy, len(scenes)
    )
    protocol = MetricProtocol(CHECKER)
    return mean_score(
        name, split, indices, np.array(values), context, chance=chance, protocol=protocol
    )


def emoji_of(split: Split, question: str) -> Emoji:
    """The emoji that a split is of; ``ValueError`` for any other pairs."""
    if not isinstance(split.dataset, Emoji):
        raise ValueError(f"the question {question} needs the dataset emoji")
    return split.dataset


def shapes_of(split: Split, question: str) -> Shapes:
    """The world of shapes that a split is of; ``ValueError`` for any other."""
    if not isinstance(split.dataset, Shapes):
        raise ValueError(f"the question {question} needs the dataset shapes")
    return split.dataset
