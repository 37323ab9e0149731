"""Selection of evaluated pairs: disjoint halves, and equally many emoji per group."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rudolph.config.run import resolve_run
from rudolph.data.datasets.emoji import Emoji, emoji_images
from rudolph.data.seeds import mixed_seed
from rudolph.data.splits import DataConfig, Split, Splits
from rudolph.evaluation.context import EvaluationContext
from rudolph.evaluation.report_card import EVALUATORS
from rudolph.families.interface import Capabilities
from rudolph.generation.filters import TokenSamplingConfig

SAMPLING = TokenSamplingConfig()


class Copyist(EvaluationContext):
    """A context that generates the real image for every second caption, else the next image."""

    def generated_images(self, split: Split, indices: list[int]) -> Tensor:
        shown = [index if index % 2 else (index + 1) % len(split) for index in indices]
        return split.image_batch(shown)


def context(
    kind: type[EvaluationContext], number: int, *, seed: int, half: int | None = None
) -> EvaluationContext:
    """Return a context without models, because choosing pairs needs none."""
    return kind(Capabilities(), SAMPLING, SAMPLING, number, seed, eval_fold=half)


def opened(tmp_path: Path, dataset: str, size: int) -> Split:
    config = DataConfig(dataset=dataset, image_size=size)
    return Splits(config, tmp_path)("test")


@pytest.mark.parametrize(("dataset", "size"), [("emoji", 12), ("shapes", 24)])
def test_halves_share_no_pair_whatever_the_seed(tmp_path: Path, dataset: str, size: int) -> None:
    split = opened(tmp_path, dataset, size)
    asked: list[set[int]] = []
    for half in (0, 1):
        found: set[int] = set()
        for seed, number in ((0, 9), (1, 20), (5, 33)):
            chosen = context(EvaluationContext, number, seed=seed, half=half).eval_indices(split)
            assert len(chosen) == len(set(chosen)) == number
            found |= set(chosen)
        asked.append(found)
    assert not asked[0] & asked[1]
    if dataset == "emoji":
        halves = [
            sorted(context(EvaluationContext, 1, seed=3, half=half).shuffled_indices(split))
            for half in (0, 1)
        ]
        assert sorted(halves[0] + halves[1]) == list(range(len(split)))


def test_groups_are_asked_about_evenly_and_apart(tmp_path: Path) -> None:
    split = opened(tmp_path, "emoji", 12)
    emoji = split.dataset
    assert isinstance(emoji, Emoji)
    scores = EVALUATORS["nearest_image_by_group"](context(Copyist, 5, seed=2), split)
    names = {record.group for record in emoji.records}
    found = {score.metric.rpartition("_")[2]: score for score in scores}
    assert set(found) == {name.lower().split()[0] for name in names}
    # The oracle computes distances with numpy, one emoji at a time.
    keys, gallery = emoji_images(12)
    flat = gallery.reshape(len(keys), -1).astype(np.float64)
    order = context(EvaluationContext, 1, seed=2).shuffled_indices(split)
    for name in names:
        own = [at for at in order if emoji.records[at].group == name][:5]
        hits = []
        for at in own:
            shown = keys.index(split.keys[at if at % 2 else (at + 1) % len(split)])
            distances = np.square(flat - flat[shown]).sum(1)
            rank = 1 + int((distances < distances[keys.index(split.keys[at])]).sum())
            hits.append(rank <= len(keys) // 100)
        score = found[name.lower().split()[0]]
        assert score.num_examples == len(own)
        assert score.value == pytest.approx(np.mean(hits))
    assert 0 < torch.tensor([score.value for score in scores]).mean() < 1


class GridCopyist(Capabilities):
    """A model that generates the true image of a caption for even seeds, else white."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def generate_image(self, captions: Any, *, seeds: Any, **_: Any) -> Tensor:
        indices = [list(self.split.captions).index(caption) for caption in captions]
        images = self.split.image_batch(indices)
        is_white = torch.tensor(seeds)[:, None, None, None] % 2 == 1
        return torch.where(is_white, torch.ones(()), images)


def test_the_grid_is_scored_with_the_seeds_of_its_images(tmp_path: Path) -> None:
    split = opened(tmp_path, "emoji", 12)
    prompts = (split.captions[3], "a name of another split", split.captions[7], split.captions[11])
    asked = EvaluationContext(
        GridCopyist(split), SAMPLING, SAMPLING, 5, 4, grid_prompts=prompts, grid_samples=5
    )
    nearest, among = EVALUATORS["nearest_image_of_grid"](asked, split)
    hits = [mixed_seed(4, prompt, k) % 2 == 0 for prompt in (0, 2, 3) for k in range(5)]
    assert nearest.value == pytest.approx(np.mean(hits)) and 0 < nearest.value < 1
    assert nearest.num_examples == among.num_examples == 15
    assert among.value >= nearest.value and (nearest.chance, among.chance) == (1 / 3624, 36 / 3624)
    assert EVALUATORS["nearest_image_of_grid"](replace(asked, grid_prompts=()), split) == []


def test_a_half_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match=r"eval_fold must be one of 0, 1 or null, got 2"):
        resolve_run(Path("file.yaml"), {"evaluation.eval_fold": 2})
