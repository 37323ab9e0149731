"""Clustered statistics: pairs of one image count as one cluster; memory scales with the split."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rudolph.data import splits
from rudolph.data.cache import ArrayWriter, cached_array
from rudolph.data.datasets.tables import ManifestConfig
from rudolph.data.pairs import Pair
from rudolph.data.splits import DataConfig, Split
from rudolph.evaluation.context import EvaluationContext, corpus_score, mean_score
from rudolph.evaluation.evaluators.captions import _references
from rudolph.evaluation.statistics import (
    bootstrap_interval,
    cluster_members,
    effective_size,
    jackknife_interval,
    mean_interval,
    proportion_interval,
)
from rudolph.families.interface import Capabilities
from rudolph.generation.filters import TokenSamplingConfig

SIDE = 8


def copied(values: np.ndarray[Any, Any], times: int) -> tuple[np.ndarray[Any, Any], Any]:
    """Return every value ``times`` times in shuffled order, with the cluster of each."""
    clusters = np.repeat(np.arange(len(values)), times)
    order = np.argsort(np.tile(np.arange(times), len(values)), kind="stable")
    return values[clusters[order]], clusters[order]


def test_copies_of_values_say_no_more_than_the_values() -> None:
    values = np.random.default_rng(0).exponential(size=23)
    sample, clusters = copied(values, 4)
    assert mean_interval(sample, seed=3, clusters=clusters) == pytest.approx(
        mean_interval(values, seed=3)
    )
    found = bootstrap_interval(lambda at: np.median(sample[at]), 92, seed=3, clusters=clusters)
    expected = bootstrap_interval(lambda at: np.median(values[at]), 23, seed=3)
    assert found == pytest.approx(expected)
    found = jackknife_interval(lambda at: sample[at].mean(), 92, clusters=clusters)
    assert found == pytest.approx(jackknife_interval(lambda at: values[at].mean(), 23))
    # The variance of n clusters has n - 1 degrees of freedom.
    hits = (values > 1).astype(float)
    sample, clusters = copied(hits, 4)
    found, size = mean_interval(sample, seed=0, clusters=clusters), 22
    assert found == pytest.approx(proportion_interval(hits.mean() * size, size))


def test_values_without_copies_have_the_plain_interval() -> None:
    values = np.random.default_rng(0).normal(size=31)
    own = np.random.default_rng(1).permutation(31)
    for sample in (values, (values > 0).astype(float)):
        assert mean_interval(sample, seed=1, clusters=own) == mean_interval(sample, seed=1)
    plain = jackknife_interval(lambda at: values[at].std(), 31)
    assert jackknife_interval(lambda at: values[at].std(), 31, clusters=own) == plain


@pytest.mark.parametrize("kind", ["share", "mean"])
def test_nineteen_of_twenty_clustered_intervals_hold_the_truth(kind: str) -> None:
    rng = np.random.default_rng(0)
    hits = {"clustered": 0, "independent": 0}
    for seed in range(300):
        sizes = rng.integers(1, 8, size=40)
        shared = np.repeat(rng.normal(size=40), sizes)
        clusters = np.repeat(np.arange(40), sizes)
        sample = 2 * shared + rng.normal(size=len(shared))
        if kind == "share":
            sample = (sample > 0).astype(float)
        truth = 0.5 if kind == "share" else 0.0
        for name, own in (("clustered", clusters), ("independent", None)):
            found = mean_interval(sample, seed=seed, clusters=own)
            hits[name] += found.low <= truth <= found.high
    assert 0.90 <= hits["clustered"] / 300 <= 0.99
    assert hits["independent"] / 300 < 0.8


def test_shares_of_nothing_and_of_all_count_the_clusters() -> None:
    clusters = np.array([0, 0, 0, 1, 1, 1])
    members = cluster_members(clusters, 6)
    assert members is not None
    for value in (0.0, 1.0):
        assert effective_size(np.full(6, value), members) == 2
    # The effective size never exceeds the number of examples, even if clusters vary less than
    # chance.
    assert effective_size(np.array([0.0, 1, 1, 0, 1, 1]), members) == 6
    with pytest.raises(ValueError, match=r"clusters: expected one per example \(7\), got 6"):
        mean_interval(np.zeros(7), seed=0, clusters=clusters)


def test_an_interval_stays_within_what_a_share_can_be() -> None:
    seen = np.arange(40) < 39
    free = jackknife_interval(lambda at: seen[at].mean(), 40)
    assert free.high > 1
    held = jackknife_interval(lambda at: seen[at].mean(), 40, limits=(0.0, 1.0))
    assert held == (free.value, free.low, 1.0)


# --- pairs that share an image -------------------------------------------------------------------


def captioned(folder: Path, captions: list[list[str]]) -> Split:
    """Return the training split of a table; ``captions`` has one list per image."""
    folder.mkdir()
    rows = []
    for at, texts in enumerate(captions):
        pixels = np.random.default_rng(at).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{at}.png")
        rows += [{"image": f"{at}.png", "caption": text} for text in texts]
    rows.sort(key=lambda row: row["caption"])
    table = folder / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig("manifest", SIDE, manifest=ManifestConfig(str(table)))
    return Split(config, "train", folder / "cache")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Split:
    texts = [[f"{letter} {at}" for letter in "abc"] for at in range(24)]
    return captioned(tmp_path_factory.mktemp("several") / "pairs", texts)


def context(*, half: int | None = None) -> EvaluationContext:
    """Return a context without models, which can only choose pairs."""
    return EvaluationContext(
        Capabilities(), TokenSamplingConfig(), TokenSamplingConfig(), 9, 0, eval_fold=half
    )


def test_pairs_of_one_image_count_as_one_in_every_score(several: Split) -> None:
    indices = list(range(len(several)))
    images = [caption.split()[1] for caption in several.captions]
    numbers = several.clusters(indices)
    for one in indices:
        same = [other for other in indices if images[other] == images[one]]
        assert [other for other in indices if numbers[other] == numbers[one]] == same
        assert len(same) == 3
    values = np.array([hash(image) % 97 / 97 for image in images])
    first = [images.index(image) for image in dict.fromkeys(images)]
    of_images = mean_interval(values[first], seed=0)
    for score in (
        mean_score("x", several, indices, values, context()),
        corpus_score("x", several, indices, lambda at: values[at].mean(), context()),
    ):
        assert score.num_examples == len(several)
        assert (score.low, score.high) == pytest.approx(of_images[1:], abs=1e-3)


def test_an_image_is_in_one_half_alone(several: Split) -> None:
    halves = [
        {several.captions[at].split()[1] for at in context(half=half).shuffled_indices(several)}
        for half in (0, 1)
    ]
    assert not halves[0] & halves[1]
    assert all(len(half) > 3 for half in halves)


def test_all_captions_of_an_image_are_references(several: Split) -> None:
    for at, references in zip(range(9), _references(several, range(9)), strict=True):
        number = several.captions[at].split()[1]
        assert references[0] == several.captions[at]
        assert sorted(references) == [f"{letter} {number}" for letter in "abc"]


# --- memory and disk in proportion to the data ---------------------------------------------------


def test_one_long_caption_costs_its_own_letters(tmp_path: Path) -> None:
    long = "ж" * 30_000
    split = captioned(tmp_path / "pairs", [[f"кот {at}"] for at in range(30)] + [[long]] * 8)
    assert long in split.captions and "кот 3" in split.captions
    assert split.keys[split.captions.index(long)].endswith(long)
    size = sum(path.stat().st_size for path in (tmp_path / "pairs" / "cache").iterdir())
    assert size < 8 * 2 * 8 * len(long)


class Drawn:
    """A dataset that generates its images on access."""

    digest = "drawn"
    number = 300

    def __init__(self, config: Any, *, split: str, image_size: int) -> None:
        self.image_size = image_size

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Pair:
        pixels = np.full((self.image_size, self.image_size, 3), index % 256, dtype=np.uint8)
        return Pair(str(index), f"номер {index}", Image.fromarray(pixels))


def test_images_are_never_in_memory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(splits.DATASETS, "emoji", Drawn)
    tracemalloc.start()
    try:
        split = Split(DataConfig("emoji", 128), "train", tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert split.images is not None and split.images.shape == (300, 3, 128, 128)
    assert split.images[:, 1, 5, 7].tolist() == [at % 256 for at in range(300)]
    assert split.captions[299] == "номер 299"
    assert peak < split.images.nbytes / 4


def test_rows_that_are_written_one_by_one_are_the_array(tmp_path: Path) -> None:
    array = np.arange(42, dtype=np.int16).reshape(7, 2, 3)
    parts = {"kind": "rows", "data": "d"}
    found = cached_array(
        tmp_path, parts=parts, compute=lambda: ArrayWriter(array.shape, array.dtype, iter(array))
    )
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    wrong = {
        "a cached array: expected 8 rows, got 7": ArrayWriter((8, 2, 3), array.dtype, iter(array)),
        r"row 0 of a cached array: expected int16 \(3, 2\), got int16 \(2, 3\)": ArrayWriter(
            (7, 3, 2), array.dtype, iter(array)
        ),
    }
    for at, (said, given) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=said):
            cached_array(
                tmp_path, parts=parts | {"data": str(at)}, compute=lambda given=given: given
            )
    assert not list(tmp_path.glob("*.partial"))
