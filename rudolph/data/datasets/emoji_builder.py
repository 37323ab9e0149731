"""Draws the emoji of a colour font and names them in Russian: writes what ``Emoji`` reads.

Sources: the list of emoji is Unicode's ``emoji-test.txt`` (UTS #51); names and keywords are the
annotations of CLDR (UTS #35, part 2), main and derived; the images are the font's.

All images have one scale and one placement, on white: the square around the ink of all of them
together.  For Noto Color Emoji that is 128 pixels of its bitmaps, so that 64 is exactly half.
"""

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from rudolph.data.datasets.emoji import (
    ATLAS_NAME,
    EMOJI_COLUMNS,
    SKIN_TONES,
    TABLE_NAME,
    EmojiRecord,
)
from rudolph.files.atomic import require_apart, write_atomic, write_text

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = (
    Path("/usr/share/unicode/cldr/common/annotations/ru.xml"),
    Path("/usr/share/unicode/cldr/common/annotationsDerived/ru.xml"),
)
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")

NO_NAME = "without a Russian name"
MISSING = "not in the font"
SEVERAL_GLYPHS = "several glyphs in the font"
BLANK = "blank in the font"

# A bitmap font opens at its own size only: 109 is Noto's, the others are of other colour fonts.
FONT_SIZES = (109, 160, 136, 128, 96, 72, 64)
VARIATION_SELECTOR = "\ufe0f"
# A noncharacter, never assigned: what a font draws for it is its image for "missing".
UNASSIGNED = "\U0010ffff"
ENTRY = re.compile(
    r"(?P<points>[0-9A-F]+( [0-9A-F]+)*) *; fully-qualified *# \S+ E(?P<version>\S+) (?P<name>.+)"
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class EmojiEntry:
    """A fully-qualified line of ``emoji-test.txt``; ``key`` and ``base`` as in ``EmojiRecord``."""

    key: str
    characters: str
    english_name: str
    group: str
    subgroup: str
    version: str
    skin_tone: str
    base: str


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote, and by reason the keys that it left out."""

    num_pairs: int
    num_images: int
    num_bytes: int
    skipped: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        size = f"{self.num_bytes / 1e6:.1f} MB"
        lines = [f"{self.num_pairs} pairs, {self.num_images} different images, {size}"]
        for reason, keys in self.skipped.items():
            lines.append(f"skipped, {reason}: {len(keys)} ({', '.join(keys)})")
        return "\n".join(lines)


class EmojiFont:
    """A font at the size it has, drawing one emoji at a time.

    Raises ``ValueError`` when the file is no font that Pillow can draw, and when Pillow cannot
    shape text: only raqm joins the parts of a sequence into one glyph.
    """

    def __init__(self, path: Path) -> None:
        if not features.check("raqm"):
            # Wheels of Pillow carry raqm, and open the system's fribidi when it is there.
            raise ValueError(
                "Pillow has no raqm: install the Debian package libfribidi0"
                " (libraqm0 where Pillow was built on this machine)"
            )
        self.font = open_font(path)
        # Ink may lie around the origin on every side, as far as an emoji is large.
        self.origin = 2 * int(self.font.size)
        self.missing = self.canvas(UNASSIGNED, "RGBA").tobytes()

    def canvas(self, characters: str, mode: str) -> Image.Image:
        """The characters on a white canvas, transparent white where ``mode`` is RGBA."""
        side = 3 * self.origin
        image = Image.new(mode, (side, side), (255, 255, 255, 0)[: len(mode)])
        draw = ImageDraw.Draw(image)
        draw.text((self.origin, self.origin), characters, "black", self.font, embedded_color=True)
        return image

    def measure(self, characters: str) -> tuple[str | None, Box]:
        """Why this cannot be drawn as one emoji, if it cannot; and the box of its ink.

        One glyph is as wide as its widest part; glyphs side by side are wider.
        """
        widest_part = max(self.font.getlength(part) for part in characters)
        if self.font.getlength(characters) > widest_part + 0.5:
            return SEVERAL_GLYPHS, (0, 0, 0, 0)
        image = self.canvas(characters, "RGBA")
        box = image.getbbox()
        # Blank first: Noto's image for "missing" is blank as well.
        if box is None:
            return BLANK, (0, 0, 0, 0)
        return (MISSING if image.tobytes() == self.missing else None), box

    def draw(self, characters: str, frame: Box, size: int) -> Image.Image:
        """The part of the canvas in ``frame``, RGB, ``size`` pixels a side."""
        # Not from the RGBA canvas: its half-transparent edges are mixed with white already.
        cropped = self.canvas(characters, "RGB").crop(frame)
        return cropped.resize((size, size), Image.Resampling.LANCZOS)


def build_emoji_set(
    target: Path,
    *,
    font: Path = FONT,
    annotations: Sequence[Path] = ANNOTATIONS,
    emoji_test: Path = EMOJI_TEST,
    size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Write ``emoji.csv`` and ``emoji.png`` into the folder ``target``.

    The same sources and the same Pillow give the same bytes.  ``size`` is the side of a tile in
    pixels; ``on_progress`` is called with the number of steps done and of all steps.

    Raises ``ValueError`` when a source is missing or not what it should be, or a file to write is
    one.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    for name in (ATLAS_NAME, TABLE_NAME):
        for source in (font, emoji_test, *annotations):
            require_apart(target / name, source, "target")
    emoji_font = EmojiFont(font)
    names, keywords = read_annotations(annotations)
    entries = read_emoji_test(emoji_test)
    named = [entry for entry in entries if entry.key in names]
    # Every named emoji is measured, then drawn: two steps each.
    progress = StepPrinter(2 * len(named), on_progress)
    faults, boxes = measure_all(emoji_font, named, progress)
    drawable = [entry for entry in named if entry.key in boxes]
    if not drawable:
        raise ValueError(f"{font}: draws none of the named emoji of {emoji_test}")
    frame = square_around(list(boxes.values()))
    tile_numbers: dict[bytes, int] = {}
    records: list[EmojiRecord] = []
    for entry in drawable:
        tile = emoji_font.draw(entry.characters, frame, size).tobytes()
        number = tile_numbers.setdefault(tile, len(tile_numbers))
        records.append(record_of(entry, names[entry.key], keywords.get(entry.key, ()), number))
        progress.step()
    num_bytes = write_emoji_set(target, records, list(tile_numbers), size)
    unnamed = tuple(entry.key for entry in entries if entry.key not in names)
    return BuildReport(len(records), len(tile_numbers), num_bytes, {NO_NAME: unnamed, **faults})


class StepPrinter:
    """Counts steps and says so."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self.done = 0
        self.total = total
        self.on_progress = on_progress

    def step(self, steps: int = 1) -> None:
        """So many steps further."""
        self.done += steps
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def measure_all(
    font: EmojiFont, entries: Sequence[EmojiEntry], progress: StepPrinter
) -> tuple[dict[str, tuple[str, ...]], dict[str, Box]]:
    """The keys that cannot be drawn, by reason, and the boxes of ink of the others, by key."""
    faults: dict[str, tuple[str, ...]] = {}
    boxes: dict[str, Box] = {}
    for entry in entries:
        fault, box = font.measure(entry.characters)
        if fault is None:
            boxes[entry.key] = box
        else:
            faults[fault] = (*faults.get(fault, ()), entry.key)
        # What is not drawn later has both its steps behind it.
        progress.step(1 if fault is None else 2)
    return faults, boxes


def square_around(boxes: Sequence[Box]) -> Box:
    """The smallest square that holds all boxes, centred on them; even where the boxes are."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    left, top, right, bottom = min(lefts), min(tops), max(rights), max(bottoms)
    side = max(right - left, bottom - top)
    left -= (side - (right - left)) // 2
    top -= (side - (bottom - top)) // 2
    return left, top, left + side, top + side


def record_of(entry: EmojiEntry, name: str, keywords: Sequence[str], tile: int) -> EmojiRecord:
    """The row of ``emoji.csv``."""
    return EmojiRecord(
        key=entry.key,
        characters=entry.characters,
        name=name,
        keywords="|".join(keywords),
        group=entry.group,
        subgroup=entry.subgroup,
        skin_tone=entry.skin_tone,
        base=entry.base,
        version=entry.version,
        tile=tile,
    )


def write_emoji_set(
    target: Path, records: Sequence[EmojiRecord], tiles: Sequence[bytes], size: int
) -> int:
    """Write both files; the number of their bytes.  ``tiles`` are RGB, row by row."""
    rows = -(-len(tiles) // EMOJI_COLUMNS)
    atlas = np.full((rows * EMOJI_COLUMNS, size, size, 3), 255, dtype=np.uint8)
    atlas[: len(tiles)] = np.frombuffer(b"".join(tiles), np.uint8).reshape(-1, size, size, 3)
    atlas = atlas.reshape(rows, EMOJI_COLUMNS, size, size, 3).swapaxes(1, 2)
    image = Image.fromarray(atlas.reshape(rows * size, EMOJI_COLUMNS * size, 3))
    table = io.StringIO()
    names = [field.name for field in fields(EmojiRecord)]
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in records)
    write_atomic(target / ATLAS_NAME, partial(image.save, format="PNG", optimize=True))
    write_text(target / TABLE_NAME, table.getvalue())
    return sum((target / name).stat().st_size for name in (ATLAS_NAME, TABLE_NAME))


def read_emoji_test(path: Path) -> list[EmojiEntry]:
    """The fully-qualified emoji in the order of the file, which is CLDR's.

    The base of a sequence is itself without skin tones, where that is an emoji.  Where it is not
    (two hands of different tones make a handshake), the base is the emoji that has the English
    name before the colon.
    """
    group = subgroup = ""
    entries: list[EmojiEntry] = []
    for line in require_source(path, "unicode-data").read_text(encoding="utf-8").split("\n"):
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := ENTRY.fullmatch(line):
            characters = "".join(chr(int(point, 16)) for point in match["points"].split())
            entries.append(
                EmojiEntry(
                    key=key_of(characters),
                    characters=characters,
                    english_name=match["name"],
                    group=group,
                    subgroup=subgroup,
                    version=match["version"],
                    skin_tone=skin_tone_of(characters),
                    base=key_of("".join(part for part in characters if part not in SKIN_TONES)),
                )
            )
    if not entries:
        raise ValueError(f"{path}: no fully-qualified emoji, is it Unicode's emoji-test.txt?")
    keys = {entry.key for entry in entries}
    key_of_name = {entry.english_name: entry.key for entry in entries}
    return [
        entry
        if entry.base in keys
        else replace(entry, base=key_of_name.get(entry.english_name.split(":")[0], entry.base))
        for entry in entries
    ]


def key_of(characters: str) -> str:
    """Code points in hexadecimal joined with "-".

    U+FE0F is left out: it only asks for the coloured image, and CLDR leaves it out too.
    """
    return "-".join(f"{ord(part):x}" for part in characters if part != VARIATION_SELECTOR)


def skin_tone_of(characters: str) -> str:
    """The name of the skin tone; "none", or "mixed" where the tones differ."""
    tones = {SKIN_TONES[part] for part in characters if part in SKIN_TONES}
    if len(tones) > 1:
        return "mixed"
    return tones.pop() if tones else "none"


def read_annotations(paths: Sequence[Path]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Names and keywords by key; where two files name an emoji, the first is right."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for path in paths:
        require_source(path, "unicode-cldr-core")
        try:
            tree = ElementTree.parse(path)
        except ElementTree.ParseError as error:
            raise ValueError(f"{path}: not the XML of CLDR annotations, {error}") from error
        for annotation in tree.iter("annotation"):
            key, text = key_of(annotation.get("cp", "")), (annotation.text or "").strip()
            if text and annotation.get("type") == "tts":
                names.setdefault(key, text)
            elif text:
                keywords.setdefault(key, tuple(word.strip() for word in text.split("|")))
    return names, keywords


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """The font at the first of ``FONT_SIZES`` that it has."""
    require_source(path, "fonts-noto-color-emoji")
    faults: list[str] = []
    for font_size in FONT_SIZES:
        try:
            return ImageFont.truetype(path, font_size, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            faults.append(f"{font_size}: {error}")
    raise ValueError(f"{path}: no font that Pillow can open at a size of {'; '.join(faults)}")


def require_source(path: Path, package: str) -> Path:
    """The path, or ``ValueError`` that names the Debian package when no file is there."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, the Debian package {package} has it")
    return path
