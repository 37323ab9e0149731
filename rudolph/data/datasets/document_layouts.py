"""Published layouts of documents of images and texts: LLaVA, MMC4 and OBELICS.

A layout parses a row of a file into a ``Document`` and builds the row of a document.  No text of a
document is blank, and no two texts to learn follow each other.

- ``llava``: ``id``, ``image`` (a path, a list of paths, or none) and ``conversations``, turns of
  ``human`` and ``gpt`` in which ``<image>`` stands for the next image.
- ``mmc4``: ``text_list`` of sentences and ``image_info`` with the sentence of each image, which
  stands before that sentence.
- ``obelics``: aligned lists ``images`` and ``texts``; one of the two is null at each place.

To add a layout, write its parser and its builder, and add a row to ``DOCUMENT_LAYOUTS``.

Source: LLaVA, ``docs/Finetune_Custom_Data.md``; Zhu 2023 (arXiv:2304.06939) and mmc4,
``README.md``; Laurencon 2023 (arXiv:2306.16527) and its data card.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rudolph.data.datasets.document_rows import write_rows
from rudolph.data.datasets.manifests import checked_text, cleaned_text
from rudolph.data.image_files import RejectedError
from rudolph.files.atomic import json_text
from rudolph.sequence.texts import clean_text

IMAGE_TAG = "<image>"
# Speakers of the turns of a LLaVA conversation, and what their words are.
SPEAKERS = {"human": "question", "gpt": "answer"}


class DocumentPart(NamedTuple):
    """An image or a text of a document.

    Attributes:
        kind: ``image``, ``question`` for a text that is given, ``answer`` for one to learn.
        value: Path of the image as in the file, or the text.
        similarity: CLIP similarity of an image with the next text, where the file has it.
    """

    kind: Literal["image", "question", "answer"]
    value: str
    similarity: float | None = None


class Document(NamedTuple):
    """A document of images and texts.

    Attributes:
        name: Its id or URL, or "".
        parts: Its images and texts in order.
    """

    name: str
    parts: tuple[DocumentPart, ...]

    @property
    def images(self) -> list[str]:
        """Return the paths of its images as in the file."""
        return [part.value for part in self.parts if part.kind == "image"]


class DocumentLayout(NamedTuple):
    """A published layout.

    Attributes:
        columns: Keys that the parser reads.
        suffixes: Suffixes of the files that can be written.
        parse: Returns the document of a row before its texts are joined, or raises
            ``RejectedError`` with the reason.
        build: Returns the row of a document.
        between: Joins two texts to learn that no image separates.
    """

    columns: tuple[str, ...]
    suffixes: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Document]
    build: Callable[[Document], dict[str, Any]]
    between: str = " "

    def joined(self, document: Document) -> Document:
        """Return a document with one text in place of several that follow each other."""
        parts: list[DocumentPart] = []
        for part in document.parts:
            if part.kind == "answer" and parts and parts[-1].kind == "answer":
                before = parts.pop().value
                part = part._replace(value=f"{before}{self.between}{part.value}")
            parts.append(part)
        return document._replace(parts=tuple(parts))


def parse_llava(row: Mapping[str, Any]) -> Document:
    """Return the document of a LLaVA conversation.

    Raises:
        RejectedError: If turns, speakers or images do not fit together.
    """
    turns, images = row.get("conversations"), iter(llava_images(row.get("image")))
    if not isinstance(turns, list) or not turns:
        raise RejectedError("no list of conversations")
    parts: list[DocumentPart] = []
    for index, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise RejectedError("from is neither human nor gpt")
        if speaker != ("human", "gpt")[index % 2]:
            raise RejectedError("human and gpt do not alternate, human first")
        text = cleaned_text(turn.get("value"), SPEAKERS[speaker], "value").strip()
        if speaker == "human":
            parts += question_parts(text, images)
        elif IMAGE_TAG in text:
            raise RejectedError(f"{IMAGE_TAG} in an answer")
        else:
            parts.append(DocumentPart("answer", text))
    if len(turns) % 2:
        raise RejectedError("no answer to the last question")
    if next(images, None) is not None:
        raise RejectedError(f"fewer {IMAGE_TAG} tags than images")
    return Document(name_of(row.get("id")), tuple(parts))


def llava_images(value: object) -> list[str]:
    """Return the paths of ``image``: none, one or a list."""
    paths = value if isinstance(value, list) else [] if value is None else [value]
    return [checked_text(path, "image path", "image") for path in paths]


def question_parts(text: str, images: Iterator[str]) -> Iterator[DocumentPart]:
    """Yield the parts of a question, with the next image for each tag.

    Raises:
        RejectedError: If there are more tags than images.
    """
    for index, words in enumerate(text.split(IMAGE_TAG)):
        if index:
            image = next(images, None)
            if image is None:
                raise RejectedError(f"more {IMAGE_TAG} tags than images")
            yield DocumentPart("image", image)
        if words.strip():
            yield DocumentPart("question", words.strip())


def llava_row(document: Document) -> dict[str, Any]:
    """Return the row of a document as a LLaVA conversation."""
    turns: list[dict[str, str]] = []
    words: list[str] = []
    for part in document.parts:
        if part.kind == "answer":
            turns.append({"from": "human", "value": "\n".join(words)})
            turns.append({"from": "gpt", "value": part.value})
            words = []
        else:
            words.append(IMAGE_TAG if part.kind == "image" else part.value)
    row: dict[str, Any] = {"id": document.name}
    if document.images:
        row["image"] = document.images if len(document.images) > 1 else document.images[0]
    return row | {"conversations": turns}


def parse_mmc4(row: Mapping[str, Any]) -> Document:
    """Return the document of an MMC4 row.

    Raises:
        RejectedError: If an image has no sentence or name, or no text is there.
    """
    texts, infos = row.get("text_list"), row.get("image_info")
    if not isinstance(texts, list) or not texts:
        raise RejectedError("no text_list")
    if not isinstance(infos, list | None):
        raise RejectedError("image_info is not a list")
    images_before: list[list[DocumentPart]] = [[] for _ in texts]
    for info in infos or []:
        index = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(index) is not int or not 0 <= index < len(texts):
            raise RejectedError("matched_text_index is out of range")
        name = checked_text(info.get("image_name"), "image path", "image_name")
        similarity = similarity_of(info.get("matched_sim"))
        images_before[index].append(DocumentPart("image", name, similarity))
    parts: list[DocumentPart] = []
    for images, text in zip(images_before, texts, strict=True):
        parts += [*images, *learnt_text(text, "text_list")]
    return interleaved_document(row.get("url"), parts)


def similarity_of(value: object) -> float | None:
    """Return a similarity, or None for null; raise ``RejectedError`` for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RejectedError("matched_sim is no number")
    # NaN compares as false, and larger integers may have no float.
    if not abs(value) < 1e9:
        raise RejectedError("matched_sim is no number")
    return float(value)


def learnt_text(text: object, column: str) -> list[DocumentPart]:
    """Return a text to learn as the only part, or nothing for a blank text."""
    if isinstance(text, str) and not text.strip():
        return []
    return [DocumentPart("answer", cleaned_text(text, "text", column).strip())]


def interleaved_document(name: object, parts: Sequence[DocumentPart]) -> Document:
    """Return the document of these parts; raise ``RejectedError`` if none is a text."""
    if not any(part.kind == "answer" for part in parts):
        raise RejectedError("no text")
    return Document(name_of(name), tuple(parts))


def mmc4_row(document: Document) -> dict[str, Any]:
    """Return the row of a document in the layout of MMC4."""
    texts: list[str] = []
    infos: list[dict[str, Any]] = []
    for part in document.parts:
        if part.kind == "image":
            info = {"image_name": part.value, "matched_text_index": len(texts)}
            known = {} if part.similarity is None else {"matched_sim": part.similarity}
            infos.append(info | known)
        else:
            texts.append(part.value)
    return {"url": document.name, "text_list": texts, "image_info": infos}


def parse_obelics(row: Mapping[str, Any]) -> Document:
    """Return the document of an OBELICS row.

    Raises:
        RejectedError: If the lists are not aligned, or no text is there.
    """
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list):
        raise RejectedError("images and texts are not two lists")
    if len(images) != len(texts):
        raise RejectedError("images and texts differ in length")
    parts: list[DocumentPart] = []
    for image, text in zip(images, texts, strict=True):
        if image is None and text is None:
            raise RejectedError("neither an image nor a text at a place")
        if image is not None and text is not None:
            raise RejectedError("both an image and a text at a place")
        if image is None:
            parts += learnt_text(text, "texts")
        else:
            parts.append(DocumentPart("image", checked_text(image, "image path", "images")))
    return interleaved_document(url_of(row.get("general_metadata")), parts)


def url_of(metadata: object) -> object:
    """Return the URL in the JSON of ``general_metadata``, or None."""
    try:
        content = json.loads(metadata) if isinstance(metadata, str) else None
    except (ValueError, RecursionError):
        return None
    return content.get("url") if isinstance(content, dict) else None


def obelics_row(document: Document) -> dict[str, Any]:
    """Return the row of a document in the layout of OBELICS."""
    return {
        "images": [part.value if part.kind == "image" else None for part in document.parts],
        "texts": [None if part.kind == "image" else part.value for part in document.parts],
        "general_metadata": json_text({"url": document.name}),
    }


def name_of(value: object) -> str:
    """Return an id or URL as text, or "" for anything else."""
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    return clean_text(str(value)) if is_name else ""


def _without_similarities(document: Document) -> Document:
    parts = (part._replace(similarity=None) for part in document.parts)
    return document._replace(parts=tuple(parts))


def write_documents(path: Path, documents: Iterable[Document], layout: str) -> None:
    """Write documents so that reading the file gives the same documents.

    Only the layout of MMC4 keeps similarities.

    Args:
        path: File whose suffix decides the format.
        documents: At least one document.
        layout: A name in ``DOCUMENT_LAYOUTS``.

    Raises:
        ValueError: In one line, if the layout has no such files or cannot hold a document.
    """
    chosen, suffix = DOCUMENT_LAYOUTS[layout], path.suffix.lower()
    if suffix not in chosen.suffixes:
        raise ValueError(
            f"{path}: expected one of {', '.join(chosen.suffixes)} for layout {layout}, "
            f"got {suffix or 'no suffix'}"
        )

    def rows() -> Iterator[dict[str, Any]]:
        for number, document in enumerate(documents, start=1):
            row = chosen.build(document)
            try:
                written = chosen.joined(chosen.parse(row))
                is_same = _without_similarities(written) == _without_similarities(document)
                reason = "" if is_same else "it would be read as another"
            except RejectedError as rejected:
                reason = rejected.reason
            if reason:
                raise ValueError(
                    f"{path}: expected a document that layout {layout} can hold, got document "
                    f"{number} ({reason})"
                )
            yield row

    write_rows(path, rows())


DOCUMENT_LAYOUTS: dict[str, DocumentLayout] = {
    "llava": DocumentLayout(
        ("id", "image", "conversations"), (".json", ".jsonl"), parse_llava, llava_row
    ),
    "mmc4": DocumentLayout(("url", "text_list", "image_info"), (".jsonl",), parse_mmc4, mmc4_row),
    "obelics": DocumentLayout(
        ("images", "texts", "general_metadata"),
        (".parquet", ".jsonl"),
        parse_obelics,
        obelics_row,
        # Texts of OBELICS separate their paragraphs in this way.
        between="\n\n",
    ),
}
