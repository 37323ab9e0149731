"""Data loaders for training: seeded streams of training batches, and validation batches."""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler

# By which a scheduler ends a job.  Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class _Batches(Dataset[Any]):
    """A dataset that maps a list of example numbers to a whole batch."""

    def __init__(self, make: Callable[[Sequence[int]], Any]) -> None:
        self.make = make

    def __getitem__(self, numbers: Any) -> Any:
        return self.make(numbers)


class _StepSampler(Sampler[Any]):
    """A sampler that yields one device's example numbers, step by step from ``start``.

    Each device takes a contiguous part of a global batch.  The length counts all steps of the
    training, because the training loop counts the steps before ``start`` as done.
    """

    def __init__(
        self, global_batch_size: int, num_steps: int, *, rank: int, world_size: int, start: int
    ) -> None:
        self.global_batch_size, self.num_steps, self.start = global_batch_size, num_steps, start
        self.share = global_batch_size // world_size
        self.offset = rank * self.share

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[range]:
        for step in range(self.start, self.num_steps):
            first = step * self.global_batch_size + self.offset
            yield range(first, first + self.share)


def ignore_signals(worker: int = 0) -> None:
    """Ignore the signals by which a scheduler ends a job.

    Workers leave them to the main process, which still needs its workers then.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Streams(pl.LightningDataModule):
    """The data loaders of one training run.

    A training batch is one device's part of a global batch, as a list of micro-batches.

    Args:
        train: Returns the training batch for a list of example numbers.
        validation: Returns the validation batch for a list of pair indices.
        global_batch_size: Examples per step on all devices together.
        micro_batch_size: Examples per micro-batch.
        num_steps: Steps in the whole training.
        num_validation: Number of validation examples on all devices together.
        num_workers: Worker processes per loader.
    """

    def __init__(
        self,
        train: Callable[[Sequence[int]], Any],
        validation: Callable[[Sequence[int]], Any],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        num_steps: int,
        num_validation: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.num_steps, self.num_validation = num_steps, num_validation
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the training steps that are still to come."""
        trainer: Any = self.trainer
        sampler = _StepSampler(
            self.global_batch_size,
            self.num_steps,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=trainer.fit_loop.epoch_loop.batch_progress.current.completed,
        )
        return self._loader(self._micro_batches, sampler)

    def _micro_batches(self, numbers: Sequence[int]) -> list[Any]:
        size = self.micro_batch_size
        starts = range(0, len(numbers), size)
        return [self.train(list(numbers[first : first + size])) for first in starts]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this device's validation loader, with at least 64 examples per full batch."""
        size = max(self.micro_batch_size, 64)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        # A device without pairs would skip validation, while the other devices wait for it there.
        # Such a device evaluates all pairs instead, which leaves their relative weights unchanged.
        indices = range(rank, self.num_validation, world_size) or range(self.num_validation)
        # Sharded models need the same number of batches on all devices, so no batch is empty.
        number = -(-self.num_validation // (world_size * size))
        starts = [min(index * size, len(indices) - number + index) for index in range(number)]
        ends = [*starts[1:], len(indices)]
        sampler = [list(indices[first:end]) for first, end in zip(starts, ends, strict=True)]
        return self._loader(self.validation, sampler)

    def _loader(self, make: Callable[[Sequence[int]], Any], sampler: Any) -> DataLoader[Any]:
        # The dataset returns whole batches, so the loader must not batch.
        return DataLoader(
            _Batches(make),
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
        )
