"""Builder of the files of ``Emoji``: images from a colour font, with Russian names.

Sources: the list of emoji is Unicode's ``emoji-test.txt`` (UTS #51).  Names and keywords are the
main and derived annotations of CLDR (UTS #35, part 2).  The images come from the font.

All images have the same scale and position on white.  They are cropped to the smallest square that
holds the visible pixels of every emoji.  For Noto Color Emoji this square has
a side of 128 bitmap pixels, so tiles of 64 pixels are exactly half that size.
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
from rudolph.files.atomic import require_disjoint_paths, write_atomic, write_text

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

# A bitmap font opens only at its own size: 109 for Noto, another one for other fonts.
FONT_SIZES = (109, 160, 136, 128, 96, 72, 64)
VARIATION_SELECTOR = "\ufe0f"
# A noncharacter, which is never assigned.  Fonts render it as their image for "missing".
UNASSIGNED = "\U0010ffff"
ENTRY = re.compile(
    r"(?P<points>[0-9A-F]+( [0-9A-F]+)*) *; fully-qualified *# \S+ E(?P<version>\S+) (?P<name>.+)"
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class EmojiEntry:
    """A fully-qualified line of ``emoji-test.txt``.

    ``key`` and ``base`` have the same meaning as in ``EmojiRecord``.
    """

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
    """The numbers of written pairs, images and bytes, and the skipped keys of each reason."""

    num_pairs: int
    num_images: int
    num_bytes: int
    skipped: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        """Return one line of totals and one line per reason."""
        size = f"{self.num_bytes / 1e6:.1f} MB"
        lines = [f"{self.num_pairs} pairs, {self.num_images} different images, {size}"]
        for reason, keys in self.skipped.items():
            lines.append(f"skipped, {reason}: {len(keys)} ({', '.join(keys)})")
        return "\n".join(lines)


class EmojiFont:
    """A colour font, opened at its own bitmap size, that renders one emoji at a time.

    Raises:
        ValueError: If Pillow cannot open the font, or lacks raqm.  Only raqm joins the parts of an
            emoji sequence into one glyph.
    """

    def __init__(self, path: Path) -> None:
        if not features.check("raqm"):
            # Wheels of Pillow include raqm, but it needs the system's fribidi.
            raise ValueError(
                "Pillow has no raqm: install the Debian package libfribidi0"
                " (libraqm0 where Pillow was built on this machine)"
            )
        self.font = open_font(path)
        # Visible pixels can extend from the origin in every direction by the size of an emoji.
        self.origin = 2 * int(self.font.size)
        self.missing = self.canvas(UNASSIGNED, "RGBA").tobytes()

    def canvas(self, characters: str, mode: str) -> Image.Image:
        """Return the characters on a white canvas, which is transparent if ``mode`` is RGBA."""
        side = 3 * self.origin
        image = Image.new(mode, (side, side), (255, 255, 255, 0)[: len(mode)])
        render = ImageDraw.Draw(image)
        render.text(
            (self.origin, self.origin), characters, "black", self.font, embedded_color=True
        )
        return image

    def measure(self, characters: str) -> tuple[str | None, Box]:
        """Return the reason why the characters are not one emoji, or None, and their bounding box.

        One glyph is as wide as its widest part, while several glyphs side by side are wider.
        """
        widest_part = max(self.font.getlength(part) for part in characters)
        if self.font.getlength(characters) > widest_part + 0.5:
            return SEVERAL_GLYPHS, (0, 0, 0, 0)
        image = self.canvas(characters, "RGBA")
        box = image.getbbox()
        # Check for blank first, because Noto's image for "missing" is blank too.
        if box is None:
            return BLANK, (0, 0, 0, 0)
        return (MISSING if image.tobytes() == self.missing else None), box

    def render(self, characters: str, frame: Box, size: int) -> Image.Image:
        """Return the part of the canvas in ``frame`` as RGB, ``size`` pixels per side."""
        # Not the RGBA canvas: its half-transparent edges are already mixed with white.
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

    The same sources and the same version of Pillow give the same bytes.

    Args:
        target: Output folder.
        font: Colour font.
        annotations: CLDR annotation files; the first takes precedence.
        emoji_test: Unicode's ``emoji-test.txt``.
        size: Side of a tile, in pixels.
        on_progress: Called with the number of completed steps and of all steps.

    Raises:
        ValueError: If a source is missing or invalid, or an output file is also a source.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    for name in (ATLAS_NAME, TABLE_NAME):
        for source in (font, emoji_test, *annotations):
            require_disjoint_paths(target / name, source, "target")
    emoji_font = EmojiFont(font)
    names, keywords = read_annotations(annotations)
    entries = read_emoji_test(emoji_test)
    named_entries = [entry for entry in entries if entry.key in names]
    # Two steps per named emoji: it is measured, then rendered.
    progress = StepPrinter(2 * len(named_entries), on_progress)
    skipped, boxes = measure_all(emoji_font, named_entries, progress)
    rendered_entries = [entry for entry in named_entries if entry.key in boxes]
    if not rendered_entries:
        raise ValueError(f"{font}: expected a font with emoji of {emoji_test}, got none of them")
    frame = bounding_square(list(boxes.values()))
    tile_numbers: dict[bytes, int] = {}
    records: list[EmojiRecord] = []
    for entry in rendered_entries:
        tile = emoji_font.render(entry.characters, frame, size).tobytes()
        number = tile_numbers.setdefault(tile, len(tile_numbers))
        records.append(record_of(entry, names[entry.key], keywords.get(entry.key, ()), number))
        progress.step()
    num_bytes = write_emoji_set(target, records, list(tile_numbers), size)
    unnamed = tuple(entry.key for entry in entries if entry.key not in names)
    return BuildReport(len(records), len(tile_numbers), num_bytes, {NO_NAME: unnamed, **skipped})


class StepPrinter:
    """A counter of completed steps that reports them to a callback."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self.done = 0
        self.total = total
        self.on_progress = on_progress

    def step(self, steps: int = 1) -> None:
        """Count ``steps`` completed steps and report the total."""
        self.done += steps
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def measure_all(
    font: EmojiFont, entries: Sequence[EmojiEntry], progress: StepPrinter
) -> tuple[dict[str, tuple[str, ...]], dict[str, Box]]:
    """Return the keys without an image, grouped by reason, and the boxes of the other keys."""
    skipped: dict[str, tuple[str, ...]] = {}
    boxes: dict[str, Box] = {}
    for entry in entries:
        reason, box = font.measure(entry.characters)
        if reason is None:
            boxes[entry.key] = box
        else:
            skipped[reason] = (*skipped.get(reason, ()), entry.key)
        # An emoji that cannot be rendered completes its second step here.
        progress.step(1 if reason is None else 2)
    return skipped, boxes


def bounding_square(boxes: Sequence[Box]) -> Box:
    """Return the smallest square that holds all bounding boxes, centred on their union."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    left, top, right, bottom = min(lefts), min(tops), max(rights), max(bottoms)
    side = max(right - left, bottom - top)
    left -= (side - (right - left)) // 2
    top -= (side - (bottom - top)) // 2
    return left, top, left + side, top + side


def record_of(entry: EmojiEntry, name: str, keywords: Sequence[str], tile: int) -> EmojiRecord:
    """Return the row of ``emoji.csv`` for an emoji."""
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
    """Write both files and return their total number of bytes.

    Args:
        target: Output folder.
        records: Rows of ``emoji.csv``.
        tiles: RGB bytes of each tile, row by row.
        size: Side of a tile, in pixels.
    """
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
    """Return the fully-qualified emoji in file order, which is CLDR's order.

    The base of a sequence is the sequence without skin tones, if that is an emoji.  Otherwise it
    is the emoji that the English name states before the colon, for example for handshakes of two
    different tones.

    Raises:
        ValueError: If the file is missing or has no fully-qualified emoji.
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
        raise ValueError(
            f"{path}: expected fully-qualified emoji, got none. Give Unicode's emoji-test.txt"
        )
    keys = {entry.key for entry in entries}
    key_of_name = {entry.english_name: entry.key for entry in entries}
    return [
        entry
        if entry.base in keys
        else replace(entry, base=key_of_name.get(entry.english_name.split(":")[0], entry.base))
        for entry in entries
    ]


def key_of(characters: str) -> str:
    """Return the hexadecimal code points joined with "-", without U+FE0F.

    U+FE0F only requests the coloured image, and CLDR leaves it out too.
    """
    return "-".join(f"{ord(part):x}" for part in characters if part != VARIATION_SELECTOR)


def skin_tone_of(characters: str) -> str:
    """Return the name of the skin tone, "none", or "mixed" for several tones."""
    tones = {SKIN_TONES[part] for part in characters if part in SKIN_TONES}
    if len(tones) > 1:
        return "mixed"
    return tones.pop() if tones else "none"


def read_annotations(paths: Sequence[Path]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return the Russian names and the keywords of emoji, both keyed by ``key_of``.

    The first file that has an emoji takes precedence.

    Raises:
        ValueError: If a file is missing or not XML.
    """
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for path in paths:
        require_source(path, "unicode-cldr-core")
        try:
            tree = ElementTree.parse(path)
        except ElementTree.ParseError as error:
            raise ValueError(
                f"{path}: expected the XML of CLDR annotations, got {error}"
            ) from error
        for annotation in tree.iter("annotation"):
            key, text = key_of(annotation.get("cp", "")), (annotation.text or "").strip()
            if text and annotation.get("type") == "tts":
                names.setdefault(key, text)
            elif text:
                keywords.setdefault(key, tuple(word.strip() for word in text.split("|")))
    return names, keywords


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Return the font at the first of ``FONT_SIZES`` that it supports.

    Raises:
        ValueError: If the file is missing or supports none of the sizes.
    """
    require_source(path, "fonts-noto-color-emoji")
    errors: list[str] = []
    for font_size in FONT_SIZES:
        try:
            return ImageFont.truetype(path, font_size, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            errors.append(f"{font_size}: {error}")
    raise ValueError(
        f"{path}: expected a font that Pillow can open, got errors at the sizes "
        f"{'; '.join(errors)}"
    )


def require_source(path: Path, package: str) -> Path:
    """Return ``path``; if it is not a file, raise ``ValueError`` that names its Debian package."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Install the Debian package {package}")
    return path
