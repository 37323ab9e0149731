"""Decoding of image files to square RGB images, and reports of skipped and converted rows.

``decode_image`` decodes and converts an image, or raises ``RejectedError`` with the reason.
``center_crop`` crops and resizes it.  ``RowReport`` counts and lists the rows that were skipped or
converted.

To convert another pixel format, add its Pillow mode to ``CONVERSIONS``.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

# Pillow's own limit; checked here too, because Pillow only warns about a larger image.
MAX_PIXELS = 1024**3 // 4 // 3
MIN_SIDE = 8
NAMES_PER_REASON = 20
# Reason for skipping the table line that opens a quote which is never closed.
OPEN_QUOTE = "quote that is never closed"

# A subset of Pillow's formats: EPS would start Ghostscript, and other files would pass as TGA.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Errors of Pillow's decoders on damaged bytes; some are bugs there, but all mean a bad file.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    EOFError,
    AttributeError,
    OverflowError,
    struct.error,
    zlib.error,
)


class RejectedError(Exception):
    """A row or an image that is left out; the report counts rows by ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: upright RGB of any size, and the names of the conversions applied."""

    image: Image.Image
    changes: tuple[str, ...]


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode an image file and convert it to upright RGB on a white background.

    Args:
        data: Bytes of the whole file, in one of ``FORMATS``.
        max_pixels: Largest width times height; a larger image is rejected from its header alone.

    Raises:
        RejectedError: With the reason "corrupt image" (also for data that is not an image),
            "decompression bomb", "too small" or "unsupported pixel format".  An image is too small
            if a side is under ``MIN_SIDE`` pixels.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = _decode(data, max_pixels)
        except Image.DecompressionBombError as error:
            raise RejectedError("decompression bomb") from error
        except DAMAGE as error:
            raise RejectedError("corrupt image") from error
    changes = image.changes
    for warning in caught:
        if not issubclass(warning.category, UserWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        elif "read with a warning" not in changes:
            changes += ("read with a warning",)
    return DecodedImage(image.image, changes)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of ``image``, resized to ``size`` pixels per side.

    Resizing is bicubic with antialiasing.  If the margin is odd, the extra pixel is cut on the
    right or at the bottom.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Crop first: resize(box=...) would let pixels from outside the square bleed in.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _decode(data: bytes, max_pixels: int) -> DecodedImage:
    Image.init()
    # Pillow fails on unknown format names, and older or partial builds lack some formats.
    supported = [name for name in FORMATS if name in Image.OPEN]
    with Image.open(io.BytesIO(data), formats=supported) as image:
        if image.width * image.height > max_pixels:
            raise RejectedError("decompression bomb")
        if min(image.size) < MIN_SIDE:
            raise RejectedError("too small")
        is_16_bit = _is_16_bit(image)
        changes = ["16-bit"] if is_16_bit else []
        if getattr(image, "is_animated", False):
            changes.append("first of several frames")
        image.load()
        upright: Image.Image = image
        transpose = ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG, 1))
        if transpose is not None:
            # ImageOps.exif_transpose also rewrites the metadata, which can fail.
            upright = image.transpose(transpose)
            changes.append("EXIF orientation")
        return _to_rgb(upright, changes, is_16_bit=is_16_bit)


def _is_16_bit(image: Image.Image) -> bool:
    """Return whether the file, not yet loaded, holds unsigned 16-bit samples."""
    if image.format == "PPM" and image.mode == "I":
        return True
    layouts = [str(tile[3]) for tile in getattr(image, "tile", ())]
    return any(";16" in layout and ";16S" not in layout for layout in layouts)


CONVERSIONS = {
    "1": "1-bit",
    "L": "greyscale",
    "LA": "greyscale",
    "La": "greyscale",
    "P": "palette",
    "PA": "palette",
    "RGB": "",
    "RGBA": "",
    "RGBa": "",
    "RGBX": "",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
    "HSV": "HSV",
}


def _to_rgb(image: Image.Image, changes: list[str], *, is_16_bit: bool) -> DecodedImage:
    transparency = image.info.get("transparency")
    if is_16_bit and image.mode.startswith("I"):
        image = _grey_from_16_bit(image, transparency)
    # 32-bit and floating-point pixels do not define which value is white.
    if image.mode not in CONVERSIONS:
        raise RejectedError("unsupported pixel format")
    if CONVERSIONS[image.mode]:
        changes.append(CONVERSIONS[image.mode])
    if image.has_transparency_data:
        changes.append("alpha")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    elif isinstance(transparency, int) and is_16_bit:
        changes.append("alpha")
    return DecodedImage(image.convert("RGB"), tuple(changes))


def _grey_from_16_bit(image: Image.Image, transparency: object) -> Image.Image:
    """Scale 16-bit grey to 8 bits with rounding; Pillow's own conversion clips at 255 instead."""
    values = np.asarray(image).astype(np.int64)
    if isinstance(transparency, int):
        values[values == transparency] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


@dataclass
class ReasonCount:
    """The number of rows with one reason, and the first ``NAMES_PER_REASON`` of their names."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more row."""
        self.count += 1
        if len(self.names) < NAMES_PER_REASON:
            self.names.append(name)


@dataclass
class RowReport:
    """Counts of kept, skipped and converted rows; a kept image may have several conversions."""

    num_kept: int = 0
    skipped: dict[str, ReasonCount] = field(default_factory=dict)
    converted: dict[str, ReasonCount] = field(default_factory=dict)

    def keep(self, name: str, changes: Sequence[str] = ()) -> None:
        """Count a kept row and each conversion that was applied to it."""
        self.num_kept += 1
        for change in changes:
            self.converted.setdefault(change, ReasonCount()).add(_on_one_line(name))

    def skip(self, name: str, reason: str) -> None:
        """Count a skipped row under its reason."""
        self.skipped.setdefault(reason, ReasonCount()).add(_on_one_line(name))

    def add(self, other: "RowReport") -> None:
        """Add the counts of other rows."""
        self.num_kept += other.num_kept
        for counts, others in (
            (self.skipped, other.skipped),
            (self.converted, other.converted),
        ):
            for reason, tally in others.items():
                own = counts.setdefault(reason, ReasonCount())
                own.count += tally.count
                own.names = [*own.names, *tally.names][:NAMES_PER_REASON]

    @property
    def num_skipped(self) -> int:
        """Return the number of skipped rows."""
        return sum(tally.count for tally in self.skipped.values())

    @property
    def num_rows(self) -> int:
        """Return the number of all rows."""
        return self.num_kept + self.num_skipped

    @property
    def bad_fraction(self) -> float:
        """Return the fraction of skipped rows, 0 to 1; 0 if there are no rows."""
        return self.num_skipped / self.num_rows if self.num_rows else 0.0

    def require_usable(self, source: str, *, max_bad_fraction: float) -> None:
        """Raise ``ValueError`` if too many rows are skipped.

        Args:
            source: File name that starts the error message.
            max_bad_fraction: Largest fraction of skipped rows that is accepted, 0 to 1.

        Raises:
            ValueError: With a one-line message, if no row is kept or more than
                ``max_bad_fraction`` are skipped.
        """
        if self.num_kept and self.bad_fraction <= max_bad_fraction:
            return
        self.require_closed_quotes(source)
        if not self.num_kept:
            reasons = "; ".join(
                f"{reason}, {tally.count} of {self.num_rows} rows skipped ({_first(tally, 3)})"
                for reason, tally in _commonest(self.skipped)
            )
            raise ValueError(f"{source}: expected usable rows, got none: {reasons}")
        reasons = "; ".join(
            f"{tally.count} {reason} ({_first(tally, 3)})"
            for reason, tally in _commonest(self.skipped)
        )
        raise ValueError(
            f"{source}: {self.num_skipped} of {self.num_rows} rows are bad "
            f"({self.bad_fraction:.1%}), "
            f"expected at most max_bad_fraction = {max_bad_fraction:.1%}: {reasons}. "
            "Correct them, or raise max_bad_fraction to skip them"
        )

    def require_closed_quotes(self, source: str) -> None:
        """Raise a one-line ``ValueError`` if a quote in the table is never closed."""
        tally = self.skipped.get(OPEN_QUOTE)
        if tally is not None:
            line = " ".join(tally.names[0].split()[:2])
            raise ValueError(
                f"{source}: expected closed quotes, got one that is opened in {line} and never "
                f"closed; {self.num_skipped} of {self.num_rows} rows cannot be used. "
                'Close it, or write "" for a quote inside a quoted text'
            )

    def summary(self) -> str:
        """Return a line of totals, then one line per reason, the most frequent first."""
        lines = [
            f"{self.num_rows} rows: {self.num_kept} kept, {self.num_skipped} skipped "
            f"({self.bad_fraction:.1%})"
        ]
        for heading, tallies in (("skipped", self.skipped), ("converted", self.converted)):
            for reason, tally in _commonest(tallies):
                names = _first(tally, NAMES_PER_REASON)
                lines.append(f"{heading}: {tally.count} {reason} ({names})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Return the report for JSON.

        It holds totals, and ``{reason: {count, names}}`` of skipped and of converted rows.
        """
        return {
            "rows": self.num_rows,
            "kept": self.num_kept,
            "bad_fraction": self.bad_fraction,
            "skipped": _as_dict(self.skipped),
            "converted": _as_dict(self.converted),
        }


def _commonest(tallies: dict[str, ReasonCount]) -> list[tuple[str, ReasonCount]]:
    return sorted(tallies.items(), key=lambda item: (-item[1].count, item[0]))


def _first(tally: ReasonCount, number: int) -> str:
    names = ", ".join(tally.names[:number])
    return names + ", ..." if tally.count > number else names


def _as_dict(tallies: dict[str, ReasonCount]) -> dict[str, dict[str, object]]:
    return {
        reason: {"count": tally.count, "names": list(tally.names)}
        for reason, tally in _commonest(tallies)
    }


def _on_one_line(name: str) -> str:
    """Replace non-printable characters by spaces and cut the name to 120 characters.

    Names come from untrusted files, which may hold line ends and terminal control characters.
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in name)
    return printable if len(printable) <= 120 else printable[:117] + "..."
