"""Random access to the rows of a split of packed pairs.

Files are memory-mapped, so memory does not grow with the number of rows.  A shard is verified when
a process first reads it.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np

from rudolph.data.pairs import require_hash_split
from rudolph.data.shards.layout import BATCH_ROWS, read_shards, shards_digest


class ShardReader:
    """The rows of one split, by number.

    Args:
        folder: Folder of packed pairs.
        split: "train", "validation" or "test".

    Raises:
        ValueError: If the folder holds no packed pairs, or none of this split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        require_hash_split(split, "a packed dataset")
        self.folder, self.shards = folder, read_shards(folder)[split]
        # First row of each shard, followed by the total number of rows.
        self.starts = np.array([*accumulate((shard.rows for shard in self.shards), initial=0)])
        self.digest = shards_digest(self.shards)
        self._files: dict[int, Any] = {}
        if not len(self):
            raise ValueError(
                f"{folder}: expected pairs in the split {split!r}, got none. Pack more images, or "
                "train on the table as a manifest"
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which opens and verifies the files itself."""
        return self.__dict__ | {"_files": {}}

    def row(self, index: int) -> dict[str, Any]:
        """Return all columns of a row."""
        batch, position = self._locate(index)
        return {name: batch.column(name)[position].as_py() for name in batch.schema.names}

    def cell(self, column: str, index: int) -> Any:
        """Return one column of a row."""
        batch, position = self._locate(index)
        return batch.column(column)[position].as_py()

    def cells(self, column: str) -> Iterator[Any]:
        """Yield one column of every row, in order."""
        for number in range(len(self.shards)):
            file = self._open(number)
            for batch in range(file.num_record_batches):
                yield from file.get_batch(batch).column(column).to_pylist()

    def _locate(self, index: int) -> tuple[Any, int]:
        """Return the record batch of a row and the row's position in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index % len(self)
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        batch, position = divmod(row - int(self.starts[number]), BATCH_ROWS)
        return self._open(number).get_batch(batch), position

    def _open(self, number: int) -> Any:
        """Return the opened file of a shard, verified when it is first read.

        Raises:
            ValueError: If the file is missing or damaged.
        """
        if number not in self._files:
            import pyarrow

            shard = self.shards[number]
            error = shard.error(self.folder)
            if error:
                advice = "the same rudolph data pack writes it again"
                raise ValueError(f"{self.folder / shard.name}: {error}; {advice}")
            with pyarrow.memory_map(str(self.folder / shard.name)) as file:
                # The buffer keeps the map but no file descriptor, of which a process has few.
                mapped = file.read_buffer()
            self._files[number] = pyarrow.ipc.open_file(mapped)
        return self._files[number]


class TextColumn(Sequence[str]):
    """A column of texts that are read when they are used."""

    def __init__(self, reader: ShardReader, name: str) -> None:
        self.reader, self.name = reader, name

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.reader)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return a text, or a list of texts."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return str(self.reader.cell(self.name, index))

    def __iter__(self) -> Iterator[str]:
        """Yield the texts in order, batch by batch."""
        return self.reader.cells(self.name)
