"""Datasets of documents in files of published layouts: conversations and interleaved texts.

Creating a ``DocumentDataset`` reads every row and opens every image once.  It keeps the place of
each usable row and the hashes of its images, and reads the row again when it is needed.  Bad rows
are skipped, and its report counts and names them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from rudolph.data.datasets.document_layouts import (
    DOCUMENT_LAYOUTS,
    Document,
    DocumentLayout,
)
from rudolph.data.datasets.document_rows import FileRow, FileRows, list_files, open_rows
from rudolph.data.datasets.manifests import (
    examine_file,
    split_of_image,
    square_image,
)
from rudolph.data.image_files import RejectedError, RowReport
from rudolph.data.pairs import require_hash_split
from rudolph.files.constraints import Count, Fraction, check

# Part of every digest; increment it when the same files give other documents.
DOCUMENTS_VERSION = 1


@dataclass(frozen=True)
class DocumentConfig:
    """Configuration of files of documents, and the accepted fraction of bad rows.

    Attributes:
        path: A file, or a folder whose files are read in the order of their names.
        images: Folder that image paths are relative to; null for the folder of the file.
        max_images: Largest number of images of a document, which is cut before the next one; null
            for no limit.
        max_bad_fraction: Largest fraction of bad rows that is accepted, 0 to 1.
    """

    path: str = ""
    images: str | None = None
    max_images: Count | None = None
    max_bad_fraction: Fraction = 0.05

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)

    @property
    def layout_name(self) -> str:
        """Return the name of the layout in ``DOCUMENT_LAYOUTS``."""
        raise NotImplementedError

    @property
    def loses_bad_images(self) -> bool:
        """Return whether a bad image is left out, instead of its row."""
        return False

    @property
    def document_layout(self) -> DocumentLayout:
        """Return the layout of the rows."""
        return DOCUMENT_LAYOUTS[self.layout_name]

    def parse(self, row: FileRow) -> Document:
        """Return the document of a row before images are left out and texts are joined.

        Raises:
            RejectedError: With the reason, if there is none.
        """
        if row.error:
            raise RejectedError(row.error)
        return self.document_layout.parse(row.value)

    def finish(self, document: Document, left_out: Collection[int]) -> Document:
        """Leave out images, join texts, and cut the document at ``max_images``.

        Args:
            document: Result of ``parse``.
            left_out: Indices among its images.

        Raises:
            RejectedError: If the cut leaves no text to learn.
        """
        is_kept = (number not in left_out for number in count())
        parts = [part for part in document.parts if part.kind != "image" or next(is_kept)]
        whole = self.document_layout.joined(document._replace(parts=tuple(parts)))
        if self.max_images is None or len(whole.images) <= self.max_images:
            return whole
        images = [index for index, part in enumerate(whole.parts) if part.kind == "image"]
        first = whole.parts[: images[self.max_images]]
        answers = [index for index, part in enumerate(first) if part.kind == "answer"]
        if not answers:
            raise RejectedError("more than max_images images before the first text to learn")
        return whole._replace(parts=first[: answers[-1] + 1])


@dataclass(frozen=True)
class ConversationsConfig(DocumentConfig):
    """Configuration of conversations in the layout of LLaVA."""

    @property
    def layout_name(self) -> str:
        """Return the name of the layout in ``DOCUMENT_LAYOUTS``."""
        return "llava"


@dataclass(frozen=True)
class InterleavedConfig(DocumentConfig):
    """Configuration of texts with images between them.

    Attributes:
        layout: Layout of the rows.
        min_similarity: Leave out images of ``mmc4`` whose ``matched_sim`` is smaller, such as
            0.24 in OpenFlamingo; null for none.
        drop_bad_images: Whether an image that is missing or unusable is left out, instead of the
            row.  Web documents lose images when they are downloaded.
    """

    layout: Literal["mmc4", "obelics"] = "obelics"
    min_similarity: Fraction | None = None
    drop_bad_images: bool = False

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        if self.min_similarity is not None and self.layout != "mmc4":
            raise ValueError(
                f"min_similarity must be null for layout {self.layout}, got {self.min_similarity}"
            )

    @property
    def layout_name(self) -> str:
        """Return the name of the layout in ``DOCUMENT_LAYOUTS``."""
        return self.layout

    @property
    def loses_bad_images(self) -> bool:
        """Return whether a bad image is left out, instead of its row."""
        return self.drop_bad_images

    def parse(self, row: FileRow) -> Document:
        """Return the document of a row without images that are not similar to their text.

        Raises:
            RejectedError: With the reason, if there is none.
        """
        document, least = super().parse(row), self.min_similarity
        if least is None:
            return document
        images = [part for part in document.parts if part.kind == "image"]
        if any(image.similarity is None for image in images):
            raise RejectedError("no matched_sim")
        parts = (
            part for part in document.parts if part.similarity is None or part.similarity >= least
        )
        return document._replace(parts=tuple(parts))


def document_config(layout: str, **settings: Any) -> DocumentConfig:
    """Return the configuration of files of a layout, with these further settings."""
    if layout == "llava":
        return ConversationsConfig(**settings)
    return InterleavedConfig(**settings, layout=layout)  # type: ignore[arg-type]


class DocumentEntry(NamedTuple):
    """A usable row.

    Attributes:
        file: Index of its file.
        row: Index of the row in that file.
        sha256: SHA-256 of the document.
        images: SHA-256 of each image file, in order.
        split_key: SHA-256 that decides the split: of the first image, or else of the text.
        left_out: Indices of bad images among those of the row.
    """

    file: int
    row: int
    sha256: str
    images: tuple[str, ...]
    split_key: str
    left_out: tuple[int, ...] = ()

    @property
    def split(self) -> str:
        """Return its split: that of its first image, or of its text without images."""
        return split_of_image(self.split_key)


@dataclass(frozen=True)
class ExaminedDocuments:
    """Files of documents after every row was read.

    Attributes:
        files: The rows of each file.
        entries: The usable rows of all splits, in order.
        paths: Path of an image file by its SHA-256.
        report: The report of all rows.
    """

    files: list[FileRows]
    entries: list[DocumentEntry]
    paths: dict[str, str]
    report: RowReport

    def document(self, entry: DocumentEntry, config: DocumentConfig) -> Document:
        """Read the document of an entry.

        Raises:
            ValueError: If its row has changed.
        """
        rows = self.files[entry.file]
        row = rows[entry.row]
        try:
            document = config.finish(config.parse(row), entry.left_out)
        except RejectedError:
            document = Document("", ())
        if document_sha256(document) != entry.sha256:
            raise ValueError(f"{rows.path}: {row.location} changed after the data was read")
        return document


class DocumentDataset:
    """One split of the documents of some files: 90% train, 5% validation, 5% test.

    The hash of its first image decides the split of a document, that of its text if it has none.
    Documents that start with the same image are therefore in one split, and rows can be added or
    reordered without moving others.

    Args:
        config: The files and their layout.
        split: "train", "validation" or "test".
        image_size: Side of the square images, in pixels.
        progress: Called with (completed rows, all rows) while the rows are read.

    Raises:
        ValueError: In one line, if a file cannot be read, there is no document in this split, or
            more than ``max_bad_fraction`` of the rows are bad.
    """

    def __init__(
        self,
        config: DocumentConfig,
        *,
        split: str,
        image_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        require_hash_split(split, "a dataset of documents")
        self.config, self.image_size = config, image_size
        self.examined = examine_documents(config, image_size=image_size, progress=progress)
        self.report = self.examined.report
        self.report.require_usable(config.path, max_bad_fraction=config.max_bad_fraction)
        self.entries = [entry for entry in self.examined.entries if entry.split == split]
        if not self.entries:
            raise ValueError(
                f"{config.path}: none of its {self.report.num_kept} usable rows falls into the "
                f"split {split!r} (90% train, 5% validation, 5% test): give it more rows"
            )
        # Different images of the split, each with its row in the order of first use.
        different = dict.fromkeys(sha256 for entry in self.entries for sha256 in entry.images)
        self.image_rows = {sha256: row for row, sha256 in enumerate(different)}
        self.digest = self._digest()

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.entries)

    def __getitem__(self, index: int) -> Document:
        """Return the document at ``index``.

        Raises:
            ValueError: If its row has changed.
        """
        return self.examined.document(self.entries[index], self.config)

    def images(self) -> Iterator[Image.Image]:
        """Yield the different images in the order of ``image_rows``, as squares.

        Raises:
            ValueError: If one can no longer be read or has changed.
        """
        for sha256 in self.image_rows:
            path = self.examined.paths[sha256]
            read = partial(Path.read_bytes, Path(path))
            yield square_image(path, read, sha256=sha256, size=self.image_size)

    def rows_of_images(self, index: int) -> list[int]:
        """Return the row of each image of the document at ``index``."""
        return [self.image_rows[sha256] for sha256 in self.entries[index].images]

    def _digest(self) -> str:
        digest = hashlib.sha256(f"documents {DOCUMENTS_VERSION} {self.image_size}\n".encode())
        for entry in self.entries:
            digest.update(json.dumps([entry.sha256, *entry.images]).encode() + b"\n")
        return digest.hexdigest()


def examine_documents(
    config: DocumentConfig,
    *,
    image_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> ExaminedDocuments:
    """Read every row and open every image of some files.

    Args:
        config: The files and their layout.
        image_size: Smaller images are reported as enlarged, in pixels.
        progress: Called with (completed rows, all rows) after each row.

    Raises:
        ValueError: In one line, if a file cannot be read or there are no rows.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    files = [open_rows(path, config.document_layout.columns) for path in list_files(config.path)]
    examined = ExaminedDocuments(files, [], {}, RowReport())
    total, done = sum(map(len, files)), 0
    if not total:
        raise ValueError(f"{config.path}: the documents have no rows")
    for number, rows in enumerate(files):
        for index in range(len(rows)):
            _examine_document(examined, config, number, index, image_size=image_size)
            done += 1
            if progress is not None:
                progress(done, total)
    return examined


def _examine_document(
    examined: ExaminedDocuments, config: DocumentConfig, file: int, index: int, *, image_size: int
) -> None:
    """Add a row to the entries and the report, or to the report alone."""
    rows, report = examined.files[file], examined.report
    row = rows[index]
    place = row.location if len(examined.files) == 1 else f"{rows.path.name} {row.location}"
    folder = rows.path.parent if config.images is None else Path(config.images)
    name, changes = place, dict[str, None]()
    images: list[str] = []
    left_out: list[int] = []
    try:
        parsed = config.parse(row)
        for number, image in enumerate(parsed.images):
            if len(images) == config.max_images:
                # The document is cut here, so later images need not exist.
                break
            name, path = f"{place} {image}", os.path.abspath(folder / image)
            try:
                found = examine_file(path, image, "image")
            except RejectedError as rejected:
                if not config.loses_bad_images:
                    raise
                left_out.append(number)
                changes[f"image left out ({rejected.reason})"] = None
                continue
            examined.paths.setdefault(found.sha256, path)
            images.append(found.sha256)
            changes |= dict.fromkeys([*found.changes, *["enlarged"] * (found.side < image_size)])
        name = place
        document = config.finish(parsed, left_out)
    except RejectedError as rejected:
        report.skip(name, rejected.reason)
        return
    num_images, num_usable = len(document.images), len(parsed.images) - len(left_out)
    changes |= dict.fromkeys(["cut at max_images"] * (num_images < num_usable))
    report.keep(place, tuple(changes))
    shown = tuple(images[:num_images])
    # The name of a text is left out: the same text under two names must be in one split.
    split_key = (*shown, document_sha256(document._replace(name="")))[0]
    sha256 = document_sha256(document)
    examined.entries.append(DocumentEntry(file, index, sha256, shown, split_key, tuple(left_out)))


def document_sha256(document: Document) -> str:
    """Return the SHA-256 of a document, without its images."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
