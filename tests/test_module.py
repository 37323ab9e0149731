"""Data loaders of a training: one stream, for any number of ranks and micro-batches."""

import pytest

from rudolph.data.loader import Streams


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_ranks_and_micro_batches_share_one_stream(world: int, start: int) -> None:
    class Position:
        completed = start

    class Trainer:
        world_size = world
        global_rank = 0
        fit_loop = type("L", (), {"epoch_loop": type("E", (), {})()})()

    seen: list[list[int]] = []
    for rank in range(world):
        streams = Streams(list, list, batch_size=3, num_batches=4, num_validation=7)
        trainer = Trainer()
        trainer.global_rank = rank
        trainer.fit_loop.epoch_loop.batch_progress = type("P", (), {"current": Position})()
        streams.trainer = trainer  # type: ignore[assignment]
        loader = streams.train_dataloader()
        assert len(loader) == 4
        seen += list(loader)
        validation = [index for batch in streams.val_dataloader() for index in batch]
        assert validation == list(range(rank, 7, world))
    assert sorted(number for batch in seen for number in batch) == list(
        range(start * 3 * world, 4 * 3 * world)
    )
