"""The capabilities of a model with the examples of each call divided among processes.

Every process runs every evaluator.  A call computes only the examples of its process and then
gathers the results of all.  So the evaluators of all processes continue with the same results.

Shapes: B examples, C choices, E channels, H and W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from rudolph.data.documents import Panel
from rudolph.families.interface import Capabilities
from rudolph.generation.answering import OnToken
from rudolph.generation.filters import TokenSamplingConfig
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.trained_models import ImageTokenizer


def num_processes() -> int:
    """Return the number of processes that train together; 1 before any training."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


class ShardedCapabilities(Capabilities):
    """The capabilities of a model of which every process has a copy.

    All processes must make the same calls in the same order.  Progress callbacks count the
    examples of their own process.  The results of ``image_tokenizer`` and ``token_pipeline`` are
    those of the copy, so each process computes all examples with them.
    """

    def __init__(self, copy: Capabilities) -> None:
        self.copy = copy

    def generate_image(
        self,
        captions: Sequence[str],
        *,
        config: TokenSamplingConfig,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Generate images ``(B, 3, H, W)`` in [0, 1]; see ``Capabilities.generate_image``."""
        return _gather_rows(
            len(captions),
            lambda mine: self.copy.generate_image(
                captions[mine], config=config, seeds=seeds[mine], on_token=on_token
            ),
        )

    def generate_text(
        self,
        task: str,
        *,
        seeds: Sequence[int],
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Generate one text per seed; see ``Capabilities.generate_text``."""
        parts = _gather(
            len(seeds),
            lambda mine: self.copy.generate_text(
                task, seeds=seeds[mine], **_given(mine, images, questions), **settings
            ),
        )
        return [text for part in parts for text in part]

    def generate_text_after_shots(
        self,
        task: str,
        shots: Sequence[Sequence[Panel]],
        *,
        seeds: Sequence[int],
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Generate one text per seed after some shots; see ``Capabilities``."""
        parts = _gather(
            len(seeds),
            lambda mine: self.copy.generate_text_after_shots(
                task,
                shots[mine],
                seeds=seeds[mine],
                **_given(mine, images, questions),
                **settings,
            ),
        )
        return [text for part in parts for text in part]

    def loglikelihood(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Compute log-likelihoods ``(B, C)``; see ``Capabilities.loglikelihood``."""
        return _gather_rows(
            len(choices),
            lambda mine: self.copy.loglikelihood(
                task, choices[mine], **_given(mine, images, questions), on_batch=on_batch
            ),
        )

    def loglikelihood_after_shots(
        self,
        task: str,
        choices: Sequence[Sequence[str]],
        shots: Sequence[Sequence[Panel]],
        *,
        images: Tensor | None = None,
        questions: Sequence[str] | None = None,
        on_batch: OnToken | None = None,
    ) -> Tensor:
        """Compute log-likelihoods ``(B, C)`` after some shots; see ``Capabilities``."""
        return _gather_rows(
            len(choices),
            lambda mine: self.copy.loglikelihood_after_shots(
                task,
                choices[mine],
                shots[mine],
                **_given(mine, images, questions),
                on_batch=on_batch,
            ),
        )

    def count_operations(
        self, task: str, answers: Sequence[str], **given: Any
    ) -> tuple[float, float]:
        """Count the operations per example, as every process does; see ``Capabilities``."""
        return self.copy.count_operations(task, answers, **given)

    def embed_image(self, images: Tensor) -> Tensor:
        """Embed images ``(B, 3, H, W)`` in [0, 1] as unit vectors ``(B, E)``."""
        return _gather_rows(len(images), lambda mine: self.copy.embed_image(images[mine]))

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors ``(B, E)``."""
        return _gather_rows(len(texts), lambda mine: self.copy.embed_text(texts[mine]))

    def image_tokenizer(self) -> ImageTokenizer:
        """Return the image tokenizer of this process."""
        return self.copy.image_tokenizer()

    def token_pipeline(self) -> Pipeline:
        """Return the masked decoder of this process with its tokenizers."""
        return self.copy.token_pipeline()


def _given(mine: slice, images: Tensor | None, questions: Sequence[str] | None) -> dict[str, Any]:
    """Return the images and questions of a slice of the examples."""
    return {
        "images": None if images is None else images[mine],
        "questions": None if questions is None else questions[mine],
    }


def _gather_rows(number: int, call: Callable[[slice], Tensor]) -> Tensor:
    """Return the rows of all examples on the CPU."""
    return torch.cat(_gather(number, lambda mine: call(mine).cpu()))


def _gather(number: int, call: Callable[[slice], Any]) -> list[Any]:
    """Call on the examples of this process; return the results of all processes that have any."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mine = slice(number * rank // world, number * (rank + 1) // world)
    results: list[Any] = [None] * world
    with errors_everywhere():
        # A model may not accept an empty batch.
        result = call(mine) if mine.start < mine.stop else None
    distributed.all_gather_object(results, result)
    return [part for part in results if part is not None]


@contextmanager
def errors_everywhere() -> Iterator[None]:
    """Raise an error of one process on all processes, which would wait for that one otherwise.

    Every process must enter the context.

    Raises:
        ValueError: If another process has an error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if num_processes() > 1:
        messages: list[str | None] = [None] * num_processes()
        distributed.all_gather_object(messages, None if error is None else str(error))
        others = [message for message in messages if message is not None]
        if error is None and others:
            raise ValueError(f"another device: {others[0]}")
    if error is not None:
        raise error
