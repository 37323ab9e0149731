"""What a trained model is asked, and its answers with an interval and the chance level.

To add a question, write a function ``(Subject, Split) -> list[Score]`` and name it in
``QUESTIONS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudolph.data.emoji import Emoji, emoji_pictures
from rudolph.data.module import Split
from rudolph.data.pairs import SPLITS
from rudolph.data.seeds import mixed_seed
from rudolph.data.shapes import Shapes
from rudolph.data.shapes_checker import judge, read_scene
from rudolph.evaluation.metrics import nearest_ranks, token_f1
from rudolph.evaluation.statistics import mean_interval
from rudolph.models.fidelity import psnr, ssim
from rudolph.sampling.filters import TokenSamplingConfig
from rudolph.sampling.pipeline import Pipeline
from rudolph.sampling.ranking import perplexities

NEAREST_SHARE = 0.01
CHANCE_SHIFTS = 20


@dataclass(frozen=True)
class EvaluationConfig:
    """``questions`` are asked on ``num_examples`` pairs of each of ``splits``.

    ``grid_prompts`` are the texts of the sample grid, ``grid_samples`` pictures each.
    """

    questions: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    num_examples: int = 200
    grid_prompts: tuple[str, ...] = ()
    grid_samples: int = 4

    def __post_init__(self) -> None:
        for name in self.questions:
            if name not in QUESTIONS:
                raise ValueError(f"questions must be of {', '.join(QUESTIONS)}, got {name!r}")
        for name in self.splits:
            if name not in SPLITS:
                raise ValueError(f"splits must be of {', '.join(SPLITS)}, got {name!r}")
        for name in ("num_examples", "grid_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Score:
    """A metric of one split: its mean, 95 % interval, chance level and number of examples."""

    metric: str
    split: str
    value: float
    low: float
    high: float
    chance: float | None
    num_examples: int

    @property
    def name(self) -> str:
        return f"{self.metric}/{self.split}"


@dataclass(frozen=True)
class Subject:
    """Who is asked: the models, how they sample, how many examples, the seed of it all."""

    pipeline: Pipeline
    image_sampling: TokenSamplingConfig
    text_sampling: TokenSamplingConfig
    num_examples: int
    seed: int
    on_token: Callable[[int, int], None] | None = None

    def chosen(self, split: Split) -> list[int]:
        """Which pairs are asked about: drawn by the seed; of scenes the first different ones."""
        if isinstance(split.dataset, Shapes):
            return split.dataset.distinct(self.num_examples)
        order = np.random.default_rng(self.seed).permutation(len(split))
        return order[: self.num_examples].tolist()

    def pictures(self, split: Split, indices: list[int]) -> Tensor:
        """One generated picture for the caption of each pair."""
        return self.pipeline.pictures(
            [split.captions[index] for index in indices],
            config=self.image_sampling,
            seeds=[mixed_seed(self.seed, index) for index in indices],
            on_token=self.on_token,
        )


def nearest_picture(subject: Subject, split: Split) -> list[Score]:
    """Text to image: is the generated emoji's own picture among the nearest 1 % of all emoji?"""
    if not isinstance(split.dataset, Emoji):
        raise ValueError("the question nearest_picture needs the dataset emoji")
    indices = subject.chosen(split)
    keys, gallery = emoji_pictures(split.images.shape[-1], split.dataset.folder)
    own = torch.tensor([keys.index(split.keys[index]) for index in indices])
    pictures = torch.from_numpy(gallery).permute(0, 3, 1, 2).float() / 255
    ranks = nearest_ranks(subject.pictures(split, indices), pictures, own)
    limit = int(NEAREST_SHARE * len(keys))
    hits = (ranks <= limit).double().numpy()
    return [_score("text_to_image/nearest_1_percent", split, hits, subject, limit / len(keys))]


def scene_right(subject: Subject, split: Split) -> list[Score]:
    """Text to image: does the checker read from the picture all that the sentence states?"""
    if not isinstance(split.dataset, Shapes):
        raise ValueError("the question scene_right needs the dataset shapes")
    indices = subject.chosen(split)
    scenes = [split.dataset.scene(index) for index in indices]
    images = subject.pictures(split, indices).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    grid = split.dataset.config.grid
    readings = [read_scene(image, grid=grid) for image in images]
    verdicts = [judge(scene, read) for scene, read in zip(scenes, readings, strict=True)]
    right = np.array([verdict.right for verdict in verdicts], dtype=float)
    chance = _chance(lambda i, j: float(judge(scenes[i], readings[j]).right), len(scenes))
    scores = [_score("text_to_image/scene_right", split, right, subject, chance)]
    for family in sorted({scene.family for scene in scenes}):
        own = np.array([scene.family == family for scene in scenes])
        name = f"text_to_image/scene_right_{family}"
        scores.append(_score(name, split, right[own], subject, None))
    objects = np.array([verdict.objects_right for verdict in verdicts])
    return [*scores, _score("text_to_image/objects_right", split, objects, subject, None)]


def caption_f1(subject: Subject, split: Split) -> list[Score]:
    """Image to text: token F1 of the caption of the real picture, and how many are exact."""
    return _compared("image_to_text", subject, split, questions=None)


def answer_f1(subject: Subject, split: Split) -> list[Score]:
    """Questions about pictures: token F1 of the answer, and how many are exact."""
    if not all(split.questions):
        raise ValueError("the question answer_f1 needs pairs that have questions")
    return _compared("answers", subject, split, questions=split.questions)


def _compared(
    name: str, subject: Subject, split: Split, *, questions: list[str] | None
) -> list[Score]:
    """Token F1 of what the decoder says of the real pictures, and how many are exact."""
    indices = subject.chosen(split)
    truths = [split.captions[index] for index in indices]
    answers = subject.pipeline.caption(
        split.pictures(indices),
        config=subject.text_sampling,
        seeds=[mixed_seed(subject.seed, index) for index in indices],
        questions=None if questions is None else [questions[index] for index in indices],
        on_token=subject.on_token,
    )
    values = np.array([token_f1(*pair) for pair in zip(answers, truths, strict=True)])
    chance = _chance(lambda i, j: token_f1(answers[j], truths[i]), len(truths))
    exact = (values == 1).astype(float)
    return [
        _score(f"{name}/token_f1", split, values, subject, chance),
        _score(f"{name}/exact", split, exact, subject, None),
    ]


def likelihood(subject: Subject, split: Split) -> list[Score]:
    """Nats a token of the real picture after its caption, and of the caption after its picture."""
    indices = subject.chosen(split)
    pipeline = subject.pipeline
    pictures = pipeline.encode(split.pictures(indices))
    scores = []
    for task, segment, metric in (
        ("text_to_image", "image", "text_to_image/nats"),
        ("image_captioning", "right_text", "image_to_text/nats"),
    ):
        texts = [pipeline.texts(task, split.captions[index]) for index in indices]
        left, right = (torch.stack(list(side)) for side in list(zip(*texts, strict=True))[:2])
        found = perplexities(
            pipeline.decoder,
            torch.cat([left, pictures, right], dim=1),
            segments=(segment,),
            batch_size=pipeline.batch_size,
        )
        nats = found[segment].log().double().numpy()
        scores.append(_score(metric, split, nats, subject, None))
    return scores


def reconstruction(subject: Subject, split: Split) -> list[Score]:
    """VQ-GAN: PSNR and SSIM of reconstructed pictures."""
    indices = subject.chosen(split)
    images = split.pictures(indices)
    decoded = subject.pipeline.decode(subject.pipeline.encode(images))
    return [
        _score(name, split, metric(decoded, images).double().numpy(), subject, None)
        for name, metric in (("vqgan/psnr", psnr), ("vqgan/ssim", ssim))
    ]


def _chance(score: Callable[[int, int], float], number: int) -> float | None:
    """The mean score of answers to other examples' prompts."""
    if number < 2:
        return None
    shifts = range(1, min(CHANCE_SHIFTS, number - 1) + 1)
    values = [score(i, (i + shift) % number) for shift in shifts for i in range(number)]
    return float(np.mean(values))


def _score(
    metric: str,
    split: Split,
    values: np.ndarray[Any, Any],
    subject: Subject,
    chance: float | None,
) -> Score:
    value, low, high = mean_interval(values, seed=subject.seed)
    return Score(metric, split.name, value, low, high, chance, len(values))


# Questions that only pairs of one dataset can answer.
DATASET_OF_QUESTION = {"nearest_picture": "emoji", "scene_right": "shapes"}
QUESTIONS: dict[str, Callable[[Subject, Split], list[Score]]] = {
    "nearest_picture": nearest_picture,
    "scene_right": scene_right,
    "caption_f1": caption_f1,
    "answer_f1": answer_f1,
    "likelihood": likelihood,
    "reconstruction": reconstruction,
}
