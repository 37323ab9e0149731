"""Data loaders of a training: one stream, for any number of ranks and micro-batches."""

import pytest

from rudolph.data.loader import Streams


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_ranks_and_micro_batches_share_one_stream(world: int, start: int) -> None:
    """Every step has the same examples, whatever the devices and the size of a micro-batch."""

    class Position:
        completed = start

    class Trainer:
        world_size = world
        global_rank = 0
        fit_loop = type("L", (), {"epoch_loop": type("E", (), {})()})()

    seen: list[list[list[int]]] = []
    for rank in range(world):
        streams = Streams(
            list,
            list,
            global_batch_size=6,
            micro_batch_size=2 if world == 1 else 3,
            num_steps=4,
            num_validation=7,
        )
        trainer = Trainer()
        trainer.global_rank = rank
        trainer.fit_loop.epoch_loop.batch_progress = type("P", (), {"current": Position})()
        streams.trainer = trainer  # type: ignore[assignment]
        loader = streams.train_dataloader()
        assert len(loader) == 4
        seen.append([[number for part in step for number in part] for step in loader])
        validation = [index for batch in streams.val_dataloader() for index in batch]
        assert validation == list(range(rank, 7, world))
    for step, shares in zip(range(start, 4), zip(*seen, strict=True), strict=True):
        assert [number for share in shares for number in share] == list(
            range(6 * step, 6 * step + 6)
        )
