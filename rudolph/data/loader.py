"""Data loaders for training: seeded streams of training batches, and validation batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler


class _Batches(Dataset[Any]):
    """A dataset whose items are whole batches, indexed by lists of example numbers."""

    def __init__(self, make: Callable[[Sequence[int]], Any]) -> None:
        self.make = make

    def __getitem__(self, numbers: Any) -> Any:
        return self.make(numbers)


class _StreamSampler(Sampler[Any]):
    """A sampler of lists of example numbers that starts at batch ``start``.

    Its length is that of the whole training, because the loop counts resumed batches as done.
    """

    def __init__(
        self, batch_size: int, num_batches: int, *, rank: int, world_size: int, start: int
    ) -> None:
        self.batch_size, self.num_batches, self.rank, self.world_size, self.start = (
            batch_size,
            num_batches,
            rank,
            world_size,
            start,
        )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.num_batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class Streams(pl.LightningDataModule):
    """The data loaders of one training run.

    Args:
        train: Returns the training batch of some example numbers.
        validation: Returns the validation batch of some pair indices.
        batch_size: Examples per batch on one device.
        num_batches: Batches on one device in the whole training.
        num_validation: Number of validation examples on all devices together.
        num_workers: Worker processes per loader.
    """

    def __init__(
        self,
        train: Callable[[Sequence[int]], Any],
        validation: Callable[[Sequence[int]], Any],
        *,
        batch_size: int,
        num_batches: int,
        num_validation: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.batch_size, self.num_batches = batch_size, num_batches
        self.num_validation, self.num_workers = num_validation, num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the training batches that are still to come."""
        trainer: Any = self.trainer
        start = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        sampler = _StreamSampler(
            self.batch_size,
            self.num_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=start,
        )
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this device's validation loader, with at least 64 examples per full batch."""
        size = max(self.batch_size, 64)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        # A device without pairs would skip the validation in which the others wait for it.  It
        # evaluates all pairs instead, which leaves their relative weights unchanged.
        indices = range(rank, self.num_validation, world_size) or range(self.num_validation)
        sampler = [list(indices[first : first + size]) for first in range(0, len(indices), size)]
        return self._loader(self.validation, sampler)

    def _loader(self, make: Callable[[Sequence[int]], Any], sampler: Any) -> DataLoader[Any]:
        # The dataset returns whole batches, so the loader must not batch.
        return DataLoader(
            _Batches(make), sampler=sampler, batch_size=None, num_workers=self.num_workers
        )
