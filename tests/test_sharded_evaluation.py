"""Evaluation by several processes: each computes its examples, and all have all results."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from rudolph.families.interface import CAPABILITIES, Capabilities
from rudolph.families.sharded import ShardedCapabilities
from rudolph.generation.filters import TokenSamplingConfig

CONFIG = TokenSamplingConfig()
CAPTIONS = ["а", "бб", "ввв", "гггг", "ддддд"]
SEEDS = [3, 1, 4, 1, 5]


class Recording(Capabilities):
    """Capabilities whose results are functions of each example; they record the batch sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def generate_image(
        self, captions: Any, *, config: Any, seeds: Any, on_token: Any = None
    ) -> Tensor:
        rows = [len(caption) * 10 + seed for caption, seed in zip(captions, seeds, strict=True)]
        return self._rows(rows)[:, None, None, None].expand(-1, 3, 2, 2)

    def generate_text(
        self,
        task: str,
        *,
        config: Any,
        seeds: Any,
        images: Any = None,
        questions: Any = None,
        **rest: Any,
    ) -> list[str]:
        self.sizes.append(len(seeds))
        shown = [""] * len(seeds) if images is None else [f"{image.sum():g}" for image in images]
        asked = questions or [""] * len(seeds)
        return [f"{task} {row}" for row in zip(seeds, shown, asked, strict=True)]

    def generate_text_after_shots(
        self, task: str, shots: Any, *, config: Any, seeds: Any, **given: Any
    ) -> list[str]:
        texts = self.generate_text(task, config=config, seeds=seeds, **given)
        return [f"{len(own)} {text}" for own, text in zip(shots, texts, strict=True)]

    def loglikelihood(
        self,
        task: str,
        choices: Any,
        *,
        images: Any = None,
        questions: Any = None,
        on_batch: Any = None,
    ) -> Tensor:
        asked = questions or [""] * len(choices)
        rows = [[len(c) + len(q) for c in row] for row, q in zip(choices, asked, strict=True)]
        return self._rows(rows)

    def loglikelihood_after_shots(
        self,
        task: str,
        choices: Any,
        shots: Any,
        *,
        images: Any = None,
        questions: Any = None,
        on_batch: Any = None,
    ) -> Tensor:
        pairs = zip(choices, shots, strict=True)
        return self._rows([[len(c) * 100 + len(own) for c in row] for row, own in pairs])

    def embed_image(self, images: Tensor) -> Tensor:
        return self._rows(images.sum((1, 2, 3)).tolist())[:, None]

    def embed_text(self, texts: Any) -> Tensor:
        return self._rows([len(text) for text in texts])[:, None]

    def count_operations(self, task: str, answers: Any, **given: Any) -> tuple[float, float]:
        return float(len(answers)), 2.0

    def _rows(self, rows: list[Any]) -> Tensor:
        self.sizes.append(len(rows))
        return torch.tensor(rows, dtype=torch.float64)


def calls() -> dict[str, Callable[[Capabilities], Any]]:
    """Return one call of each capability whose examples are divided."""
    images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    choices = [[caption, caption * 2] for caption in CAPTIONS]
    shots: Any = [[None] * number for number in range(5)]
    given: Any = {"images": images, "questions": CAPTIONS[::-1]}
    return {
        "generate_image": lambda c: c.generate_image(CAPTIONS, config=CONFIG, seeds=SEEDS),
        "generate_text": lambda c: c.generate_text("task", config=CONFIG, seeds=SEEDS, **given),
        "generate_text_after_shots": lambda c: c.generate_text_after_shots(
            "task", shots, config=CONFIG, seeds=SEEDS, **given
        ),
        "loglikelihood": lambda c: c.loglikelihood("task", choices, **given),
        "loglikelihood_after_shots": lambda c: c.loglikelihood_after_shots(
            "task", choices, shots, **given
        ),
        "embed_image": lambda c: c.embed_image(images),
        "embed_text": lambda c: c.embed_text(CAPTIONS),
    }


@pytest.fixture
def in_group(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], list[Any]]:
    """Return a function that calls another in threads that stand for the processes of a group."""

    def run(world: int, call: Callable[[], Any]) -> list[Any]:
        parts, barrier, place = [None] * world, Barrier(world, timeout=10), local()

        def gather(results: list[Any], part: Any) -> None:
            parts[place.rank] = part
            barrier.wait()
            results[:] = parts
            barrier.wait()

        def process(rank: int) -> Any:
            place.rank = rank
            return call()

        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: world)
        monkeypatch.setattr(distributed, "get_rank", lambda: place.rank)
        monkeypatch.setattr(distributed, "all_gather_object", gather)
        with ThreadPoolExecutor(world) as pool:
            return [*pool.map(process, range(world))]

    return run


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("name", calls())
def test_processes_share_the_examples_and_have_all_results(
    name: str, world: int, in_group: Callable[[int, Callable[[], Any]], list[Any]]
) -> None:
    call, models = calls()[name], []

    def process() -> Any:
        models.append(Recording())
        return call(ShardedCapabilities(models[-1]))

    results, expected = in_group(world, process), call(Recording())
    sizes = [size for model in models for size in model.sizes]
    assert sum(sizes) == 5 and min(sizes) > 0 and max(sizes) == -(-5 // world)
    for result in results:
        same = (
            torch.equal(result, expected) if isinstance(expected, Tensor) else result == expected
        )
        assert same


def test_every_capability_reaches_the_model() -> None:
    """A capability added to the interface must be added to the divided ones too."""
    assert ShardedCapabilities.provided() == CAPABILITIES
    assert {*calls()} == {*CAPABILITIES} - {
        "count_operations",
        "image_tokenizer",
        "token_pipeline",
    }
    whole = Recording()
    assert ShardedCapabilities(whole).count_operations("task", CAPTIONS) == (5.0, 2.0)
    with pytest.raises(NotImplementedError):
        ShardedCapabilities(whole).token_pipeline()


def test_an_error_of_one_process_is_raised_on_all(
    in_group: Callable[[int, Callable[[], Any]], list[Any]],
) -> None:
    def process() -> str:
        def embed(texts: Sequence[str]) -> Tensor:
            if "ввв" in texts:
                raise OSError("the disk is full")
            return torch.zeros(len(texts), 1)

        model = Recording()
        model.embed_text = embed  # type: ignore[method-assign]
        with pytest.raises((ValueError, OSError)) as error:
            ShardedCapabilities(model).embed_text(CAPTIONS)
        return str(error.value)

    own, other = "the disk is full", "another device: the disk is full"
    assert in_group(3, process) == [other, own, other]
