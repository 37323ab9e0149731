"""Questions that are answered with pictures, and what the image tokenizer keeps of one.

Shapes: N examples, S pictures of each, I image tokens, H and W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudolph.data.datasets.emoji import Emoji, emoji_pictures
from rudolph.data.datasets.shapes import Shapes
from rudolph.data.datasets.shapes_checker import Judgement, judge, read_scene
from rudolph.data.datasets.shapes_scenes import Scene
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import Split
from rudolph.evaluation.evaluator import Score, Subject, chance_level, kept, scored
from rudolph.evaluation.metrics.answers import Measure, nearest_ranks
from rudolph.evaluation.statistics import jackknife_interval
from rudolph.generation.generate import FREE
from rudolph.generation.ranking import rank_pictures
from rudolph.models.image_metrics import psnr, ssim
from rudolph.models.vqgan.codes import codebook_usage

NEAREST_SHARE = 0.01
# Pictures of one prompt of which the likeliest is kept.
NUM_CANDIDATES = 8
CHECKER = "shapes-checker"


def nearest_picture(subject: Subject, split: Split) -> list[Score]:
    """Text to image: is the generated emoji's own picture among the nearest 1 % of all emoji?"""
    emoji = emoji_of(split, "nearest_picture")
    return _nearest(subject, split, emoji, {"": subject.chosen(split)})


def nearest_in_groups(subject: Subject, split: Split) -> list[Score]:
    """The same about as many names of each group of Unicode, or all that a group has."""
    emoji = emoji_of(split, "nearest_in_groups")
    groups: dict[str, list[int]] = {}
    for index in subject.order(split):
        # "Animals & Nature" is animals.
        own = groups.setdefault(f"_{emoji.records[index].group.split()[0].lower()}", [])
        if len(own) < subject.num_examples:
            own.append(index)
    return _nearest(subject, split, emoji, dict(sorted(groups.items())))


def _nearest(
    subject: Subject, split: Split, emoji: Emoji, groups: Mapping[str, list[int]]
) -> list[Score]:
    """A score for each group of indices, under the end of its name."""
    indices = [index for own in groups.values() for index in own]
    keys, gallery = emoji_pictures(emoji.image_size, emoji.folder)
    own = torch.tensor([keys.index(split.keys[index]) for index in indices])
    pictures = torch.from_numpy(gallery).permute(0, 3, 1, 2).float() / 255
    ranks = nearest_ranks(subject.pictures(split, indices), pictures, own)
    limit = int(NEAREST_SHARE * len(keys))
    measure = Measure("nearest-rank", features="pixels", sample_size=len(keys))
    ends = np.cumsum([len(own) for own in groups.values()])[:-1]
    hits = np.split((ranks <= limit).double().numpy(), ends)
    pairs = zip(groups.items(), hits, strict=True)
    return [
        scored(
            f"text_to_image/nearest_1_percent{end}",
            split,
            own_pairs,
            each,
            subject,
            chance=limit / len(keys),
            measure=measure,
        )
        for (end, own_pairs), each in pairs
    ]


def scene_right(subject: Subject, split: Split) -> list[Score]:
    """Text to image: does the checker read from the picture all that the sentence states?"""
    world = shapes_of(split, "scene_right")
    indices = subject.chosen(split)
    scenes = [world.scene(index) for index in indices]
    readings = read(subject.pictures(split, indices), world)
    verdicts = [judge(scene, each) for scene, each in zip(scenes, readings, strict=True)]
    right = np.array([verdict.right for verdict in verdicts], dtype=float)
    chance = chance_level(lambda i, j: float(judge(scenes[i], readings[j]).right), len(scenes))
    measure = Measure(CHECKER)

    def of_each(name: str, values: np.ndarray[Any, Any], *, chance: float | None) -> Score:
        return scored(name, split, indices, values, subject, chance=chance, measure=measure)

    name = "text_to_image/scene_right"
    scores = [of_each(name, right, chance=chance)]
    for family in sorted({scene.family for scene in scenes}):
        own = np.array([scene.family == family for scene in scenes])
        its_pairs = np.array(indices)[own].tolist()
        score = scored(f"{name}_{family}", split, its_pairs, right[own], subject, measure=measure)
        scores.append(score)
    objects = np.array([verdict.objects_right for verdict in verdicts])
    by_chance = chance_level(lambda i, j: judge(scenes[i], readings[j]).objects_right, len(scenes))
    return [*scores, of_each("text_to_image/objects_right", objects, chance=by_chance)]


def inpainting(subject: Subject, split: Split) -> list[Score]:
    """The lower half of a real picture is drawn anew from the caption: is the scene whole?"""
    world = shapes_of(split, "inpainting")
    indices = subject.chosen(split)
    codes = subject.codes(split, indices)
    known = codes.clone()
    known[:, codes.shape[1] // 2 :] = FREE
    drawn = subject.pipeline.generate_indices(
        [split.captions[index] for index in indices],
        config=subject.image_sampling,
        seeds=subject.seeds(indices),
        known=known,
        on_token=subject.on_token,
    )
    return [_objects_right("inpainting/objects_right", subject, split, world, indices, drawn)]


def image_variation(subject: Subject, split: Split) -> list[Score]:
    """A picture is told in words, and drawn from these words: does it show the same scene?"""
    world = shapes_of(split, "image_variation")
    indices = subject.chosen(split)
    captions = subject.pipeline.caption(
        split.pictures(indices), config=subject.text_sampling, seeds=subject.seeds(indices)
    )
    drawn = subject.pipeline.generate_indices(
        captions,
        config=subject.image_sampling,
        seeds=subject.seeds(indices),
        on_token=subject.on_token,
    )
    return [_objects_right("image_variation/objects_right", subject, split, world, indices, drawn)]


def self_reranking(subject: Subject, split: Split) -> list[Score]:
    """Of some pictures of its own, the one of which the decoder says the caption best."""
    world = shapes_of(split, "self_reranking")
    indices = subject.chosen(split)
    captions = [split.captions[index] for index in indices]
    seeds = [mixed_seed(subject.seed, at, k) for at in indices for k in range(NUM_CANDIDATES)]
    found = subject.pipeline.generate_indices(
        captions, config=subject.image_sampling, seeds=seeds, on_token=subject.on_token
    )
    drawn = found.view(len(captions), NUM_CANDIDATES, -1)  # (N, S, I)
    orders = [
        rank_pictures(subject.pipeline, own, caption, text_weight=1.0).order()
        for own, caption in zip(drawn, captions, strict=True)
    ]
    kept = torch.stack([own[order[0]] for own, order in zip(drawn, orders, strict=True)])
    score = _objects_right("self_reranking/objects_right", subject, split, world, indices, kept)
    verdicts = judged(
        subject, world, indices * NUM_CANDIDATES, drawn.transpose(0, 1).flatten(0, 1)
    )
    any_of_them = float(np.mean([verdict.objects_right for verdict in verdicts]))
    return [replace(score, chance=any_of_them)]


def reconstruction(subject: Subject, split: Split) -> list[Score]:
    """VQ-GAN: PSNR and SSIM of reconstructed pictures, and how their codes use the codebook."""
    indices = subject.chosen(split)
    images = split.pictures(indices)
    codes = subject.pipeline.encode(images)
    decoded = subject.pipeline.decode(codes)
    similarities = [
        scored(
            f"vqgan/{name}",
            split,
            indices,
            metric(decoded, images).double().numpy(),
            subject,
            measure=Measure(name, settings=f"range-1:{images.shape[-1]}px"),
        )
        for name, metric in (("psnr", psnr), ("ssim", ssim))
    ]
    clusters = split.clusters(indices)
    if len(set(clusters.tolist())) < 2:
        return similarities
    # Both grow with the number of codes that were counted.
    measure = Measure("codebook", sample_size=codes.numel())
    size = subject.pipeline.decoder.vocabulary.codebook_size

    def used(which: int, places: np.ndarray[Any, Any]) -> float:
        counts = torch.bincount(codes[torch.from_numpy(places)].flatten().cpu(), minlength=size)
        return codebook_usage(counts)[which]

    uses = [
        kept(
            f"vqgan/codebook_{name}",
            split,
            jackknife_interval(
                partial(used, which), len(codes), limits=(0.0, most), clusters=clusters
            ),
            len(codes),
            None,
            measure,
        )
        for which, (name, most) in enumerate((("usage", 1.0), ("perplexity", float(size))))
    ]
    return [*similarities, *uses]


def read(images: Tensor, world: Shapes) -> list[Any]:
    """What the checker reads from pictures ``(N, 3, H, W)`` in [0, 1]."""
    arrays = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return [read_scene(array, grid=world.config.grid) for array in arrays]


def judged(
    subject: Subject, world: Shapes, indices: Sequence[int], codes: Tensor
) -> list[Judgement]:
    """Whether pictures in codes ``(N, I)`` show the scenes of pairs."""
    readings = read(subject.pipeline.decode(codes), world)
    scenes: list[Scene] = [world.scene(index) for index in indices]
    return [judge(scene, each) for scene, each in zip(scenes, readings, strict=True)]


def _objects_right(
    name: str,
    subject: Subject,
    split: Split,
    world: Shapes,
    indices: Sequence[int],
    codes: Tensor,
) -> Score:
    readings = read(subject.pipeline.decode(codes), world)
    scenes = [world.scene(index) for index in indices]
    values = [
        judge(scene, each).objects_right for scene, each in zip(scenes, readings, strict=True)
    ]
    chance = chance_level(lambda i, j: judge(scenes[i], readings[j]).objects_right, len(scenes))
    measure = Measure(CHECKER)
    return scored(name, split, indices, np.array(values), subject, chance=chance, measure=measure)


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
