"""Emoji images with their Russian names: about 3,600 pairs, shipped with the package.

The set has two files, both written by ``emoji_builder``.  ``emoji.csv`` has one row per pair, and
``emoji.png`` is an atlas with ``EMOJI_COLUMNS`` square tiles per row.  Pairs with equal images
share a tile.

Terms: the *base* of an emoji is the same emoji without a skin tone.  A *family* is a set of bases
that share an image, such as the flags of France and of Saint Martin.

Splits are fixed by hash.  A whole family falls into train, validation or test, so that no image of
a validation base occurs in training.  The *compositional* split has pairs of a base and a skin
tone that training shows only separately.  Training shows the base without a tone and in other
tones, and shows the tone on other bases.
"""

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from rudolph.data.datasets.fusion_brain_files import TaskRecord, write_tasks
from rudolph.data.pairs import Pair, hash_fraction, require_split
from rudolph.files.atomic import write_text

EMOJI_COLUMNS = 64
TABLE_NAME = "emoji.csv"
ATLAS_NAME = "emoji.png"
SHIPPED_EMOJI = Path(__file__).parents[1] / "emoji_64"

SKIN_TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
CAPTION_KINDS = ("name", "name_and_keywords")
# Groups of emoji-test.txt; a group that is missing here keeps its English name.
GROUPS = {
    "Smileys & Emotion": "смайлики и эмоции",
    "People & Body": "люди и тело",
    "Animals & Nature": "животные и природа",
    "Food & Drink": "еда и напитки",
    "Travel & Places": "путешествия и места",
    "Activities": "занятия",
    "Objects": "предметы",
    "Symbols": "символы",
    "Flags": "флаги",
}

NAME_QUESTION = "что на картинке?"
FLAG_QUESTION = "чей это флаг?"
SKIN_TONE_QUESTION = "какой тон кожи?"

TRAIN_FRACTION = 0.90
VALIDATION_FRACTION = 0.05
COMPOSITIONAL_FRACTION = 0.10
MAX_HELD_OUT_PER_BASE = 2


@dataclass(frozen=True)
class EmojiRecord:
    """One row of ``emoji.csv``.

    Attributes:
        key: Hexadecimal code points joined with "-", without U+FE0F.
        characters: The emoji itself.
        name: Russian name.
        keywords: Russian keywords joined with "|".
        group: English name of the Unicode group.
        subgroup: English name of the Unicode subgroup.
        skin_tone: A value of ``SKIN_TONES``, "none" or "mixed".
        base: Key of the base.
        version: Emoji version that introduced it.
        tile: Index of its tile in the atlas, row by row.
    """

    key: str
    characters: str
    name: str
    keywords: str
    group: str
    subgroup: str
    skin_tone: str
    base: str
    version: str
    tile: int


@dataclass(frozen=True)
class EmojiConfig:
    """Configuration of the captions, and the folder of the set.

    Attributes:
        captions: "name" is the CLDR name in CLDR's spelling; "name_and_keywords" adds the other
            keywords after commas.
        folder: Output folder of ``rudolph data emoji``; ``None`` is the set in the package.
    """

    captions: str = "name"
    folder: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if ``captions`` is unknown."""
        if self.captions not in CAPTION_KINDS:
            raise ValueError(
                f"captions must be one of {', '.join(CAPTION_KINDS)}, got {self.captions!r}"
            )


class Emoji:
    """One split of the emoji; see ``PairDataset``, ``HasHardNegatives`` and ``HasClasses``.

    ``classes`` are the Russian names of the Unicode groups.  The atlas is decoded once per
    process, when the first image is read.

    Args:
        config: Captions and folder of the set.
        split: Name of the split.
        image_size: Side of the images, in pixels; the shipped tiles have 64.

    Raises:
        ValueError: If the split, the size or the files are invalid.
    """

    def __init__(self, config: EmojiConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        require_image_size(image_size)
        self.config = config
        self.image_size = image_size
        self.folder = SHIPPED_EMOJI if config.folder is None else Path(config.folder)
        records = read_records(self.folder)
        self.classes = group_names(records)
        splits = assign_splits(records)
        self.records = [record for record in records if splits[record.key] == split]
        content = [config.captions, split, image_size, folder_digest(self.folder)]
        self.digest = hashlib.sha256(json.dumps(["emoji", *content]).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.records)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        return self._pair(self.records[index])

    def hard_negatives(self, index: int, number: int) -> list[Pair]:
        """Return the ``number`` emoji closest to the one at ``index``, from any split.

        Emoji of the same base come first, then those of the same subgroup, then those of the same
        group.  Within each of the three, emoji of the same skin tone come first; nearer emoji in
        Unicode order precede farther ones.  All captions and images differ from one another and
        from those at ``index``.  The list is shorter if the group has too few emoji.

        Raises:
            ValueError: If ``number`` is less than 1.
        """
        if number < 1:
            raise ValueError(f"number of negatives must be at least 1, got {number}")
        record, records = self.records[index], read_records(self.folder)
        record_position = records.index(record)

        def distance(position: int) -> tuple[int, bool, int, int]:
            candidate = records[position]
            kinship = (
                0
                if candidate.base == record.base
                else 1
                if candidate.subgroup == record.subgroup
                else 2
            )
            return (
                kinship,
                candidate.skin_tone != record.skin_tone,
                abs(position - record_position),
                position,
            )

        captions, tiles = {caption(record, self.config.captions)}, {record.tile}
        negatives: list[Pair] = []
        group = [
            position
            for position, candidate in enumerate(records)
            if candidate.group == record.group
        ]
        for candidate in (records[position] for position in sorted(group, key=distance)):
            text = caption(candidate, self.config.captions)
            if text not in captions and candidate.tile not in tiles:
                captions.add(text)
                tiles.add(candidate.tile)
                negatives.append(self._pair(candidate))
            if len(negatives) == number:
                break
        return negatives

    def class_index(self, index: int) -> int:
        """Return the index in ``classes`` of the pair's group; every emoji has one."""
        return self.classes.index(group_name(self.records[index]))

    def _pair(self, record: EmojiRecord) -> Pair:
        return Pair(
            key=record.key,
            caption=caption(record, self.config.captions),
            image=emoji_image(self.folder, record.tile, self.image_size),
            attributes=pair_attributes(record),
        )


def pair_attributes(record: EmojiRecord) -> dict[str, str]:
    """Return the attributes of an emoji's pair."""
    names = ("characters", "group", "subgroup", "skin_tone", "base")
    return {name: getattr(record, name) for name in names}


def group_name(record: EmojiRecord) -> str:
    """Return the Russian name of the emoji's group."""
    return GROUPS.get(record.group, record.group)


def group_names(records: Sequence[EmojiRecord]) -> tuple[str, ...]:
    """Return the Russian names of all groups, in the order of the records."""
    return tuple(dict.fromkeys(group_name(record) for record in records))


def emoji_images(image_size: int, folder: Path = SHIPPED_EMOJI) -> tuple[list[str], np.ndarray]:
    """Return the keys of the emoji of all splits, and images ``(N, H, W, 3)`` uint8."""
    require_image_size(image_size)
    records = read_records(folder)
    images = [np.asarray(emoji_image(folder, record.tile, image_size)) for record in records]
    return [record.key for record in records], np.stack(images)


def caption(record: EmojiRecord, captions: str) -> str:
    """Return the caption of an emoji; ``captions`` is the setting in ``EmojiConfig``."""
    if captions == "name":
        return record.name
    others = [word for word in record.keywords.split("|") if word not in ("", record.name)]
    return ", ".join([record.name, *others])


def emoji_image(folder: Path, tile: int, image_size: int) -> Image.Image:
    """Return one tile of the atlas as RGB, ``image_size`` pixels per side."""
    atlas = read_atlas(folder)
    tile_size = atlas.shape[1] // EMOJI_COLUMNS
    top, left = tile // EMOJI_COLUMNS * tile_size, tile % EMOJI_COLUMNS * tile_size
    image = Image.fromarray(atlas[top : top + tile_size, left : left + tile_size])
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS)


@lru_cache(maxsize=2)
def read_records(folder: Path) -> tuple[EmojiRecord, ...]:
    """Return the rows of ``emoji.csv`` in file order.

    Raises:
        ValueError: If the file is missing or has other columns.
    """
    path = require_file(folder / TABLE_NAME)
    names = [field.name for field in fields(EmojiRecord)]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path}: columns must be {','.join(names)}, got {reader.fieldnames}")
        return tuple(EmojiRecord(tile=int(row.pop("tile")), **row) for row in reader)


@lru_cache(maxsize=2)
def read_atlas(folder: Path) -> np.ndarray:
    """Return the decoded atlas, uint8 ``(H, W, 3)``.

    All callers share the same array, which is read-only.
    """
    with Image.open(require_file(folder / ATLAS_NAME)) as image:
        return np.asarray(image)


@lru_cache(maxsize=2)
def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of both files of the set."""
    sha = hashlib.sha256()
    for name in (TABLE_NAME, ATLAS_NAME):
        sha.update(hashlib.sha256(require_file(folder / name).read_bytes()).digest())
    return sha.hexdigest()


def assign_splits(records: Sequence[EmojiRecord]) -> dict[str, str]:
    """Return the split of every key.

    Validation and test hold whole families; ``compositional_keys`` defines the fourth split.
    """
    family_of = families(records)
    split_of_base = {base: split_of_family(family) for base, family in family_of.items()}
    train = [record for record in records if split_of_base[record.base] == "train"]
    held_out = compositional_keys(train)
    return {
        record.key: "compositional" if record.key in held_out else split_of_base[record.base]
        for record in records
    }


def families(records: Sequence[EmojiRecord]) -> dict[str, str]:
    """Map every base to its family, which is identified by one of the family's bases.

    Bases that share a tile belong to the same family.
    """
    parent = {record.base: record.base for record in records}

    def root(base: str) -> str:
        while parent[base] != base:
            base = parent[base]
        return base

    first_base: dict[int, str] = {}
    for record in records:
        parent[root(record.base)] = root(first_base.setdefault(record.tile, record.base))
    return {base: root(base) for base in parent}


def split_of_family(family: str) -> str:
    """Return "train", "validation" or "test", by hash."""
    fraction = hash_fraction(family)
    if fraction < TRAIN_FRACTION:
        return "train"
    return "validation" if fraction < TRAIN_FRACTION + VALIDATION_FRACTION else "test"


def compositional_keys(train: Sequence[EmojiRecord]) -> set[str]:
    """Return the keys of the (base, skin tone) pairs to hold out, chosen by a hash of the key.

    Each base loses at most ``MAX_HELD_OUT_PER_BASE`` of its tones, never all of them, and keeps
    its untoned emoji.  Every held-out tone remains on another base.  An image that several pairs
    share is never held out, because training would still show it.
    """
    untoned = {record.base for record in train if record.skin_tone == "none"}
    pairs_of_tile: dict[int, list[str]] = defaultdict(list)
    candidates: dict[str, list[tuple[float, EmojiRecord]]] = defaultdict(list)
    for record in train:
        pairs_of_tile[record.tile].append(record.key)
    for record in train:
        has_own_tile = len(pairs_of_tile[record.tile]) == 1
        if record.skin_tone in SKIN_TONES.values() and record.base in untoned and has_own_tile:
            candidates[record.base].append((hash_fraction(record.key), record))
    remaining_tones = {
        record.skin_tone
        for pairs in candidates.values()
        for fraction, record in pairs
        if fraction >= COMPOSITIONAL_FRACTION
    }
    held_out: set[str] = set()
    for pairs in candidates.values():
        pairs.sort(key=lambda pair: pair[0])
        for fraction, record in pairs[: min(MAX_HELD_OUT_PER_BASE, len(pairs) - 1)]:
            if fraction < COMPOSITIONAL_FRACTION and record.skin_tone in remaining_tones:
                held_out.add(record.key)
    return held_out


def require_file(path: Path) -> Path:
    """Return ``path``; raise ``ValueError`` if it is not a file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Write it with `rudolph data emoji`")
    return path


def require_image_size(image_size: int) -> None:
    """Raise ``ValueError`` if a size is less than one pixel."""
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")


def write_emoji_tables(folder: Path) -> tuple[int, list[str]]:
    """Write tables of pairs for a folder of emoji images that are named by code points.

    ``captions.csv`` holds the names.  ``questions.json`` and ``answers.json`` have questions about
    the object, the country of a flag and the skin tone.

    For example, ``1f468-1f3fb-200d-1f680.png`` gets the Russian name of that emoji in the shipped
    set; U+FE0F is ignored.  Emoji of any style can thus become a table of pairs.

    Returns:
        The number of pairs, and the names of the files that match no emoji of the shipped set.

    Raises:
        ValueError: If no file of the folder is named after an emoji, or ``captions.csv`` exists
            with other captions.
    """
    names = {record.key: record.name for record in read_records(SHIPPED_EMOJI)}
    rows, unknown_files = [], []
    for path in sorted(folder.glob("*.png")):
        key = _key_of_file(path.name)
        if key in names:
            rows.append((path.name, names[key]))
        else:
            unknown_files.append(path.name)
    if not rows:
        raise ValueError(
            f"{folder}: expected PNG files named after emoji, such as 1f600.png, got none"
        )
    table = folder / "captions.csv"
    _require_overwritable(table, names)
    text = io.StringIO()
    csv.writer(text).writerows([("image", "caption"), *rows])
    write_text(table, text.getvalue())
    _write_questions(folder, rows)
    return len(rows), unknown_files


def _key_of_file(name: str) -> str:
    """Return the key of the emoji whose code points form a file name, ignoring U+FE0F."""
    points = [point.lstrip("0") for point in Path(name).stem.lower().split("-")]
    return "-".join(point for point in points if point != "fe0f")


def _require_overwritable(table: Path, names: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if a table exists with captions other than the emoji names."""
    if not table.exists():
        return
    for row in csv.reader(io.StringIO(table.read_text("utf-8", errors="replace"), newline="")):
        if row and row != ["image", "caption"] and row[1:] != [names.get(_key_of_file(row[0]))]:
            raise ValueError(
                f"{table}: expected no file or a table of emoji names, got the row "
                f"{', '.join(row)[:60]!r}. "
                "Move it away"
            )


def _write_questions(folder: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write questions that the names answer, in the format of Fusion Brain."""
    records: list[TaskRecord] = []
    for image, name in rows:
        subject, _, rest = (part.strip() for part in name.partition(":"))
        if subject == "флаг" and rest:
            pairs = [(FLAG_QUESTION, rest)]
        elif rest.endswith("тон кожи"):
            pairs = [(NAME_QUESTION, subject), (SKIN_TONE_QUESTION, rest.split(",")[0])]
        else:
            pairs = [(NAME_QUESTION, name)]
        for question, answer in pairs:
            records.append(TaskRecord(str(len(records)), (question,), image, (answer,)))
    write_tasks(records, folder / "questions.json", folder / "answers.json")
