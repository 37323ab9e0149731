"""The files of packed pairs.

::

    FOLDER/dataset.json          the shards of every split with their digests
    FOLDER/parts/00000.json      the record of one part of the source
    FOLDER/train/00000.arrow     its rows in that split: a shard

A row has a key, a caption, a question, the bytes of the image file and their SHA-256.  The files
are Arrow IPC files, whose record batches are memory-mapped and read without copies.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rudolph.data.image_files import ReasonCount, RowReport
from rudolph.files.atomic import DamagedFileError, file_sha256, read_mapping

# Part of every digest; increment it when the content of the files changes.
SHARD_VERSION = 1
# Rows of a part of the source, and of a record batch.
PART_ROWS = 10_000
BATCH_ROWS = 64
DATASET, PARTS = "dataset.json", "parts"
TEXT_COLUMNS = ("key", "caption", "question")


@dataclass(frozen=True)
class Shard:
    """One file of rows.

    Attributes:
        name: Path in the folder, as in ``train/00000.arrow``.
        rows: Number of rows.
        sha256: SHA-256 of the file.
    """

    name: str
    rows: int
    sha256: str

    def error(self, folder: Path) -> str:
        """Return why the file in this folder is not this shard, or "" if it is."""
        path = folder / self.name
        if not path.is_file():
            return "missing"
        return "" if file_sha256(path) == self.sha256 else "its SHA-256 differs"


@dataclass(frozen=True)
class PartRecord:
    """The shards of one part of the source, and the report of its rows.

    Attributes:
        source: Digest of the part and of the settings.
        shards: Its shards, at most one per split.
        report: Counts of kept, skipped and converted rows.
    """

    source: str
    shards: list[Shard]
    report: RowReport = field(default_factory=RowReport)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"version": SHARD_VERSION, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> "PartRecord":
        """Read a record.

        Raises:
            DamagedFileError: If the file is damaged.
        """
        content = read_mapping(path, source=str, shards=list, report=dict)
        report = content["report"]
        try:
            counts = {
                name: {reason: ReasonCount(**count) for reason, count in report[name].items()}
                for name in ("skipped", "converted")
            }
            shards = _shards(content["shards"])
            return cls(content["source"], shards, RowReport(report["num_kept"], **counts))
        except (TypeError, KeyError, AttributeError) as error:
            raise DamagedFileError(path, f"not a record of a part: {error}") from error


def _shards(content: list[dict[str, Any]]) -> list[Shard]:
    return [Shard(**shard) for shard in content]


def read_shards(folder: Path) -> dict[str, list[Shard]]:
    """Return the shards of every split of a packed dataset.

    Raises:
        ValueError: If the folder holds none, or one of another version.
    """
    path = folder / DATASET
    if not path.is_file():
        advice = "rudolph data pack SOURCE FOLDER writes them"
        raise ValueError(f"{folder}: expected packed pairs ({DATASET}), got none; {advice}")
    content = read_mapping(path, version=int, splits=dict)
    if content["version"] != SHARD_VERSION:
        raise ValueError(
            f"{path}: expected version {SHARD_VERSION}, got {content['version']}; pack it again"
        )
    try:
        return {name: _shards(shards) for name, shards in content["splits"].items()}
    except (TypeError, AttributeError) as error:
        raise DamagedFileError(path, f"not a list of shards: {error}") from error


def shards_digest(shards: list[Shard]) -> str:
    """Return the SHA-256 of the content of some shards, in hexadecimal."""
    content = [SHARD_VERSION, *([shard.rows, shard.sha256] for shard in shards)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def row_schema() -> Any:
    """Return the Arrow schema of a shard."""
    import pyarrow

    texts = [(name, pyarrow.string()) for name in TEXT_COLUMNS]
    return pyarrow.schema([*texts, ("image", pyarrow.binary()), ("sha256", pyarrow.binary(32))])
