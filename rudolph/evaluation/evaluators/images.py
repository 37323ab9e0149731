"""Evaluators of generated images, and of the image tokenizer's reconstructions.

Shapes: N examples, S images per caption, I image tokens, H and W pixels.
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
from rudolph.data.seeds import grid_seeds, mixed_seed
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
from rudolph.generation.generate import TO_SAMPLE
from rudolph.generation.ranking import rank_images
from rudolph.models.image_metrics import psnr, psnr_32px, ssim
from rudolph.models.vqgan.codes import codebook_usage

NEAREST_FRACTION = 0.01
# The number of images sampled per caption, of which the best is kept.
NUM_CANDIDATES = 8
CHECKER = "shapes-checker"


def nearest_image(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate how often the true emoji is among the 1 % of emoji nearest to a generated image."""
    emoji = emoji_of(split, "nearest_image")
    return _nearest(context, split, emoji, {"": context.eval_indices(split)})


def nearest_image_by_group(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate ``nearest_image`` per Unicode group, with at most ``num_examples`` names each."""
    emoji = emoji_of(split, "nearest_image_by_group")
    groups: dict[str, list[int]] = {}
    for index in context.shuffled_indices(split):
        # The first word names the group: "Animals & Nature" becomes "animals".
        group_indices = groups.setdefault(f"_{emoji.records[index].group.split()[0].lower()}", [])
        if len(group_indices) < context.num_examples:
            group_indices.append(index)
    return _nearest(context, split, emoji, dict(sorted(groups.items())))


def nearest_image_of_grid(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate the images of the sample grid whose prompts are names of this split.

    One score is how often the true image is the nearest of all emoji.  The other is how often it
    is among the nearest 1 %.  A split without such a name has no score.
    """
    emoji = emoji_of(split, "nearest_image_of_grid")
    captions, num_samples = list(split.captions), context.grid_samples
    seeds = grid_seeds(context.seed, len(context.grid_prompts), num_samples)
    rows = [
        (captions.index(prompt), seeds[number * num_samples + sample])
        for number, prompt in enumerate(context.grid_prompts)
        if prompt in captions
        for sample in range(num_samples)
    ]
    if not rows:
        return []
    indices = [index for index, _ in rows]
    images = context.model.generate_image(
        [captions[index] for index in indices],
        config=context.image_sampling,
        seeds=[seed for _, seed in rows],
        on_token=context.on_token,
    )
    ranks, num_emoji = _ranks(images, split, emoji, indices)
    protocol = MetricProtocol("nearest-rank", features="pixels", sample_size=num_emoji)
    name = "text_to_image/grid_nearest"
    return [
        mean_score(
            metric,
            split,
            indices,
            (ranks <= limit).double().numpy(),
            context,
            chance=limit / num_emoji,
            protocol=protocol,
        )
        for metric, limit in ((name, 1), (f"{name}_1_percent", int(NEAREST_FRACTION * num_emoji)))
    ]


def _ranks(
    images: Tensor, split: Split, emoji: Emoji, indices: Sequence[int]
) -> tuple[Tensor, int]:
    """Return the rank of each image's true emoji among all emoji, and the number of emoji."""
    keys, gallery = emoji_images(emoji.image_size, emoji.folder)
    own_indices = torch.tensor([keys.index(split.keys[index]) for index in indices])
    gallery_images = torch.from_numpy(gallery).permute(0, 3, 1, 2).float() / 255
    return nearest_ranks(images, gallery_images, own_indices), len(keys)


def _nearest(
    context: EvaluationContext, split: Split, emoji: Emoji, groups: Mapping[str, list[int]]
) -> list[Score]:
    """Return one score per group of indices; the group's key is appended to the metric name."""
    indices = [index for group in groups.values() for index in group]
    ranks, num_emoji = _ranks(context.generated_images(split, indices), split, emoji, indices)
    limit = int(NEAREST_FRACTION * num_emoji)
    protocol = MetricProtocol("nearest-rank", features="pixels", sample_size=num_emoji)
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    hits = np.split((ranks <= limit).double().numpy(), ends)
    scored_groups = zip(groups.items(), hits, strict=True)
    return [
        mean_score(
            f"text_to_image/nearest_1_percent{suffix}",
            split,
            group_indices,
            group_hits,
            context,
            chance=limit / num_emoji,
            protocol=protocol,
        )
        for (suffix, group_indices), group_hits in scored_groups
    ]


def scene_accuracy(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate text to image: how often the image shows all that its caption states.

    A checker reads the objects in the image.  Scores are accuracy over all captions, accuracy per
    family of captions, and object accuracy.

    Raises:
        ValueError: if the dataset is not ``shapes``.
    """
    world = shapes_of(split, "scene_accuracy")
    indices = context.eval_indices(split)
    scenes = [world.scene(index) for index in indices]
    readings = read_scenes(context.generated_images(split, indices), world)
    verdicts = [
        check_scene(scene, reading) for scene, reading in zip(scenes, readings, strict=True)
    ]
    is_correct = np.array([verdict.is_correct for verdict in verdicts], dtype=float)
    chance = chance_level(
        lambda i, j: float(check_scene(scenes[i], readings[j]).is_correct), len(scenes)
    )
    protocol = MetricProtocol(CHECKER)

    def score_of(name: str, values: np.ndarray[Any, Any], *, chance: float | None) -> Score:
        return mean_score(name, split, indices, values, context, chance=chance, protocol=protocol)

    name = "text_to_image/scene_accuracy"
    scores = [score_of(name, is_correct, chance=chance)]
    for family in sorted({scene.family for scene in scenes}):
        is_family = np.array([scene.family == family for scene in scenes])
        family_indices = np.array(indices)[is_family].tolist()
        score = mean_score(
            f"{name}_{family}",
            split,
            family_indices,
            is_correct[is_family],
            context,
            protocol=protocol,
        )
        scores.append(score)
    objects = np.array([verdict.object_accuracy for verdict in verdicts])
    object_chance = chance_level(
        lambda i, j: check_scene(scenes[i], readings[j]).object_accuracy, len(scenes)
    )
    return [*scores, score_of("text_to_image/object_accuracy", objects, chance=object_chance)]


def inpainting(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate inpainting: object accuracy after the lower half is regenerated from the caption.

    Raises:
        ValueError: if the dataset is not ``shapes``.
    """
    world = shapes_of(split, "inpainting")
    indices = context.eval_indices(split)
    image_indices = context.image_indices(split, indices)
    known = image_indices.clone()
    known[:, image_indices.shape[1] // 2 :] = TO_SAMPLE
    generated = context.pipeline.generate_indices(
        [split.captions[index] for index in indices],
        config=context.image_sampling,
        seeds=context.sampling_seeds(indices),
        known=known,
        on_token=context.on_token,
    )
    return [
        _object_accuracy_score(
            "inpainting/object_accuracy", context, split, world, indices, generated
        )
    ]


def image_variation(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate variations: object accuracy of an image generated from the model's own caption.

    Raises:
        ValueError: if the dataset is not ``shapes``.
    """
    world = shapes_of(split, "image_variation")
    indices = context.eval_indices(split)
    captions = context.pipeline.caption(
        split.image_batch(indices),
        config=context.text_sampling,
        seeds=context.sampling_seeds(indices),
    )
    generated = context.pipeline.generate_indices(
        captions,
        config=context.image_sampling,
        seeds=context.sampling_seeds(indices),
        on_token=context.on_token,
    )
    return [
        _object_accuracy_score(
            "image_variation/object_accuracy", context, split, world, indices, generated
        )
    ]


def self_reranking(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate reranking: object accuracy of the sampled image that makes its caption likeliest.

    The chance level is the mean object accuracy over all sampled images.

    Raises:
        ValueError: if the dataset is not ``shapes``.
    """
    world = shapes_of(split, "self_reranking")
    indices = context.eval_indices(split)
    captions = [split.captions[index] for index in indices]
    seeds = [
        mixed_seed(context.seed, index, k) for index in indices for k in range(NUM_CANDIDATES)
    ]
    generated = context.pipeline.generate_indices(
        captions, config=context.image_sampling, seeds=seeds, on_token=context.on_token
    )
    candidates = generated.view(len(captions), NUM_CANDIDATES, -1)  # (N, S, I)
    orders = [
        rank_images(context.pipeline, samples, caption, text_weight=1.0).order()
        for samples, caption in zip(candidates, captions, strict=True)
    ]
    best = torch.stack(
        [samples[order[0]] for samples, order in zip(candidates, orders, strict=True)]
    )
    score = _object_accuracy_score(
        "self_reranking/object_accuracy", context, split, world, indices, best
    )
    verdicts = matches_scenes(
        context, world, indices * NUM_CANDIDATES, candidates.transpose(0, 1).flatten(0, 1)
    )
    mean_of_candidates = float(np.mean([verdict.object_accuracy for verdict in verdicts]))
    return [replace(score, chance=mean_of_candidates)]


def reconstruction(context: EvaluationContext, split: Split) -> list[Score]:
    """Evaluate the VQ-GAN: PSNR and SSIM of reconstructed images, and codebook usage.

    ``psnr_32px`` compares VQ-GANs of different image sizes.

    Codebook usage is omitted if all pairs share one image.
    """
    indices = context.eval_indices(split)
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
        for name, metric in (("psnr", psnr), ("psnr_32px", psnr_32px), ("ssim", ssim))
    ]
    clusters = split.clusters(indices)
    if len(set(clusters.tolist())) < 2:
        return similarities
    # Usage and perplexity grow with the number of counted codes, which the protocol thus records.
    protocol = MetricProtocol("codebook", sample_size=codes.numel())
    size = tokenizer.num_codes

    def usage(index: int, selected: np.ndarray[Any, Any]) -> float:
        counts = torch.bincount(codes[torch.from_numpy(selected)].flatten().cpu(), minlength=size)
        return codebook_usage(counts)[index]

    codebook_scores = [
        score_with_interval(
            f"vqgan/codebook_{name}",
            split,
            jackknife_interval(
                partial(usage, index), len(codes), limits=(0.0, limit), clusters=clusters
            ),
            len(codes),
            None,
            protocol,
        )
        for index, (name, limit) in enumerate((("usage", 1.0), ("perplexity", float(size))))
    ]
    return [*similarities, *codebook_scores]


def read_scenes(images: Tensor, world: Shapes) -> list[Any]:
    """Return the checker's readings of images ``(N, 3, H, W)`` in [0, 1]."""
    arrays = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return [read_scene(array, grid=world.config.grid) for array in arrays]


def matches_scenes(
    context: EvaluationContext, world: Shapes, indices: Sequence[int], codes: Tensor
) -> list[SceneVerdict]:
    """Check whether each image, given as codes ``(N, I)``, shows the scene of its pair."""
    readings = read_scenes(context.pipeline.decode(codes), world)
    scenes: list[Scene] = [world.scene(index) for index in indices]
    return [check_scene(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]


def _object_accuracy_score(
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
        check_scene(scene, reading).object_accuracy
        for scene, reading in zip(scenes, readings, strict=True)
    ]
    chance = chance_level(
        lambda i, j: check_scene(scenes[i], readings[j]).object_accuracy, len(scenes)
    )
    protocol = MetricProtocol(CHECKER)
    return mean_score(
        name, split, indices, np.array(values), context, chance=chance, protocol=protocol
    )


def emoji_of(split: Split, evaluator: str) -> Emoji:
    """Return the emoji dataset of a split.

    Raises:
        ValueError: if the split has another dataset.
    """
    if not isinstance(split.dataset, Emoji):
        raise ValueError(f"evaluator {evaluator} needs the dataset emoji")
    return split.dataset


def shapes_of(split: Split, evaluator: str) -> Shapes:
    """Return the shapes dataset of a split.

    Raises:
        ValueError: if the split has another dataset.
    """
    if not isinstance(split.dataset, Shapes):
        raise ValueError(f"evaluator {evaluator} needs the dataset shapes")
    return split.dataset
