"""Images of rendered text for text recognition: words, numbers and made-up syllables.

The text lies over a scene of synthetic shapes, in one of several fonts and colours, slightly
rotated and never covered.  Its *kind* is one of three:

=========  ================  ===================================================================
kind       example           source
=========  ================  ===================================================================
word       кошка             words in the names of the shipped emoji
number     307               random digits, without leading zeros
syllables  рупи              made up, so that a model that knows only words cannot read it
=========  ================  ===================================================================

Fonts are from the DejaVu family shipped with matplotlib; nothing else of matplotlib is used.

Splits: the hash of a text decides between train, validation and test.  The *compositional* split
has training texts in combinations of font and colour that no other split has.

To add a font, add it to ``FONTS``; it must have the Russian letters.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, features

from rudolph.data.datasets.emoji import SHIPPED_EMOJI, read_records
from rudolph.data.datasets.shapes_rendering import (
    PALETTE,
    SIGNED_DISTANCES,
    SIZES,
    SMALLEST_IMAGE,
    CoverageArray,
    SceneObject,
    as_image,
    cell_pixels,
    paint,
    require_readable_size,
)
from rudolph.data.datasets.shapes_scenes import cells, objects_text, sample_shift
from rudolph.data.datasets.synthetic import (
    choose,
    choose_distinct,
    choose_number,
    example_rng,
    json_digest,
    num_examples,
    require_choices,
    require_within,
    sample_until,
    split_by_hash,
)
from rudolph.data.pairs import Pair, require_split
from rudolph.files.constraints import Bounds, Count, check

# Part of every digest; increment it when the same configuration gives other pairs.
WORDS_VERSION = 1

FONTS = {
    "sans": "DejaVuSans.ttf",
    "sans bold": "DejaVuSans-Bold.ttf",
    "sans oblique": "DejaVuSans-Oblique.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono bold": "DejaVuSansMono-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif bold": "DejaVuSerif-Bold.ttf",
    "serif italic": "DejaVuSerif-Italic.ttf",
}
# Thin strokes in the lighter colours of the palette are invisible on white.
TEXT_COLOURS = ("red", "green", "blue", "violet", "black")

_GRID = 3
_JITTER = 0.04
_SHORTEST_WORD = 2
# Pixels that the widest letters need to be distinguishable.
_PIXELS_PER_LETTER = 9
# Sizes and positions of a text, as fractions of the image side.
_LARGEST_FONT, _READABLE_FONT, _MARGIN, _BAND = 0.34, 0.23, 0.02, 0.62
# Letters are rendered larger and then reduced, because rotated letters do not fit a pixel grid.
_OVERSAMPLING = 4
_CONSONANTS, _VOWELS = "бвгджзклмнпрстфхцчшщ", "аеёиоуыэюя"
# Random syllables can spell swear words.
_RUDE = re.compile("ху|[её]б|жоп|муд|пид|сук|сра|гов|хер")


@dataclass(frozen=True)
class WordsConfig:
    """Configuration of the texts and their rendering.

    Attributes:
        kinds: Keys of ``KINDS``.
        max_letters: Largest number of letters in a word or in syllables; an image needs 9 pixels
            per letter.
        max_digits: Largest number of digits; an image needs 9 pixels per digit.
        fonts: Keys of ``FONTS``.
        colours: Members of ``TEXT_COLOURS``.
        rotation: Largest rotation of a text, in degrees.
        noise: Largest uniform noise on a channel of a pixel, on a scale of 255.
        max_objects: Largest number of objects in the scene around the text.
        num_train: Number of pairs in the training split.
        num_validation: Number of pairs in the validation split.
        num_test: Number of pairs in the test split and in the compositional split.
        seed: Seed of the pairs; it does not change the split of a text.
    """

    kinds: tuple[str, ...] = ("word", "number", "syllables")
    max_letters: Annotated[int, Bounds(ge=3, le=12)] = 5
    max_digits: Annotated[int, Bounds(ge=1, le=12)] = 4
    fonts: tuple[str, ...] = tuple(FONTS)
    colours: tuple[str, ...] = TEXT_COLOURS
    rotation: Annotated[float, Bounds(ge=0, le=15)] = 8.0
    noise: Annotated[float, Bounds(ge=0, le=64)] = 12.0
    max_objects: int = 3
    num_train: Count = 20_000
    num_validation: Count = 500
    num_test: Count = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid field."""
        check(self)
        require_choices("kinds", self.kinds, legal=KINDS, at_least=1)
        require_choices("fonts", self.fonts, legal=FONTS, at_least=2)
        require_choices("colours", self.colours, legal=TEXT_COLOURS, at_least=2)
        require_within("max_objects", self.max_objects, 0, _GRID)

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """Return the (font, colour) combinations that only the compositional split has."""
        return frozenset(zip(self.fonts, self.colours, strict=False))


@dataclass(frozen=True)
class Inscription:
    """A text and its rendering parameters.

    ``angle`` is in degrees.  ``size`` and ``position`` (down, right) are in [0, 1) and scaled by
    ``text_opacity``.
    """

    kind: str
    text: str
    font: str
    colour: str
    angle: float
    size: float
    position: tuple[float, float]
    is_at_top: bool


class Words:
    """One split of the images of text, whose captions are the texts; see ``PairDataset``.

    The ``attributes`` of a pair are ``kind``, ``font``, ``colour`` and ``objects``.

    Raises:
        ValueError: If the image is too small for the longest text, or a font is missing.
    """

    def __init__(self, config: WordsConfig, *, split: str, image_size: int) -> None:
        require_split(split)
        longest = max(config.max_letters, config.max_digits)
        require_readable_size(
            image_size, minimum=max(SMALLEST_IMAGE, _PIXELS_PER_LETTER * longest)
        )
        self.config = config
        self.split = split
        self.image_size = image_size
        styles = product(config.fonts, config.colours)
        is_compositional = split == "compositional"
        self._styles = [
            style for style in styles if (style in config.held_out) == is_compositional
        ]
        self.digest = json_digest(
            "words",
            WORDS_VERSION,
            [PALETTE, SIZES, asdict(config), split, image_size],
            known_words(config.max_letters),
            [hashlib.sha256(font_path(font).read_bytes()).hexdigest() for font in config.fonts],
            # Another release may rasterise a stroke differently.
            [PIL.__version__, features.version("freetype2")],
        )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return num_examples(self.config, self.split)

    def __getitem__(self, index: int) -> Pair:
        """Return the pair at ``index``."""
        config = self.config
        rng = example_rng(index, seed=config.seed, split=self.split, length=len(self))
        inscription = self._inscription(rng)
        opacity = text_opacity(inscription, self.image_size)
        objects = _sample_objects(config, rng, opacity)
        image = paint(objects, grid=_GRID, image_size=self.image_size)
        image += opacity[..., None] * (np.array(PALETTE[inscription.colour]) - image)
        return Pair(
            key=f"words/{self.split}/{index:06d}",
            caption=inscription.text,
            image=as_image(_noisy(image, config.noise, rng)),
            attributes={
                "kind": inscription.kind,
                "font": inscription.font,
                "colour": inscription.colour,
                "objects": objects_text(objects),
            },
        )

    def inscription(self, index: int) -> Inscription:
        """Return the text and the rendering parameters of the pair at ``index``."""
        seed, length = self.config.seed, len(self)
        return self._inscription(example_rng(index, seed=seed, split=self.split, length=length))

    def _inscription(self, rng: Random) -> Inscription:
        config = self.config
        text_split = "train" if self.split == "compositional" else self.split
        kind = choose(rng, config.kinds)
        text = sample_until(
            lambda: KINDS[kind](config, rng),
            lambda text: split_by_hash(text) == text_split,
            error_message=(
                f"max_letters and max_digits: no {kind} falls into {self.split}. Raise them"
            ),
        )
        font, colour = choose(rng, self._styles)
        angle = config.rotation * (2 * rng.random() - 1)
        size, down, right, side = (rng.random() for _ in range(4))
        return Inscription(kind, text, font, colour, angle, size, (down, right), side < 0.5)


# --- texts ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def known_words(max_letters: int) -> tuple[str, ...]:
    """Return the sorted words of 2 to ``max_letters`` letters in the names of shipped emoji."""
    words = {
        word
        for record in read_records(SHIPPED_EMOJI)
        for word in re.findall("[а-яё]+", record.name.lower())
    }
    return tuple(sorted(word for word in words if _SHORTEST_WORD <= len(word) <= max_letters))


def sample_word(config: WordsConfig, rng: Random) -> str:
    """Sample a word from the names of the shipped emoji."""
    return choose(rng, known_words(config.max_letters))


def sample_number(config: WordsConfig, rng: Random) -> str:
    """Sample a number; every length up to ``max_digits`` digits is equally likely."""
    num_digits = choose_number(rng, 1, config.max_digits)
    minimum = 10 ** (num_digits - 1) if num_digits > 1 else 0
    return str(choose_number(rng, minimum, 10**num_digits - 1))


def sample_syllables(config: WordsConfig, rng: Random) -> str | None:
    """Sample alternating consonants and vowels, sometimes with an extra letter at the end.

    Return None for a rude text.
    """
    length = choose_number(rng, 3, config.max_letters)
    has_end, starts = rng.random() < 0.3, choose_number(rng, 0, 1)
    text = "".join(
        choose(rng, _VOWELS if (index + starts) % 2 else _CONSONANTS)
        for index in range(length - has_end)
    )
    if has_end:
        text += choose(rng, "йнмлрскт") if text[-1] in _VOWELS else "ь"
    return None if _RUDE.search(text) else text


KINDS: dict[str, Callable[[WordsConfig, Random], str | None]] = {
    "word": sample_word,
    "number": sample_number,
    "syllables": sample_syllables,
}


# --- images ------------------------------------------------------------------------------------


def font_path(font: str) -> Path:
    """Return the path of a font in ``FONTS``.

    Raises:
        ValueError: If matplotlib is not installed or lacks the file.
    """
    spec = find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "DejaVu fonts: expected matplotlib, which provides them, got no such package. "
            "Install it"
        )
    folder = Path(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    path = folder / FONTS[font]
    if not path.is_file():
        raise ValueError(f"{path}: no such font. Reinstall matplotlib, which provides it")
    return path


def text_opacity(inscription: Inscription, image_size: int) -> CoverageArray:
    """Return the fraction of each pixel that the text covers.

    The result is ``(image_size, image_size)`` in [0, 1].  The text is rotated about its centre.
    ``inscription.size`` scales it from the smallest readable size to the largest that fits.  The
    text lies in the upper or the lower 62 % of the image, so that one row of cells stays free.
    """
    side = image_size * _OVERSAMPLING
    text = _rotated_text(inscription, side)
    margin = _margin(side)
    right = margin + round(inscription.position[1] * (side - 2 * margin - text.width))
    down = margin + round(inscription.position[0] * (_BAND * side - margin - text.height))
    top = down if inscription.is_at_top else side - down - text.height
    canvas = Image.new("L", (side, side))
    canvas.paste(text, (right, top))
    opacity: CoverageArray = np.asarray(canvas.reduce(_OVERSAMPLING)) / 255
    return opacity


def _rotated_text(inscription: Inscription, side: int) -> Image.Image:
    """Return the rotated text alone, white on black, for an image of ``side`` pixels."""
    largest = _write(inscription, round(_LARGEST_FONT * side))
    max_size = side - 2 * _margin(side), _BAND * side - _margin(side)
    scale = min(1.0, max_size[0] / largest.width, max_size[1] / largest.height)
    min_scale = min(scale, _READABLE_FONT / _LARGEST_FONT)
    points = int((min_scale + inscription.size * (scale - min_scale)) * _LARGEST_FONT * side)
    # Letters start at whole pixels, so the size of a text is not exactly linear in points.
    text = _write(inscription, points)
    while text.width > max_size[0] or text.height > max_size[1]:
        points -= 1
        text = _write(inscription, points)
    return text


def _margin(side: int) -> int:
    # At least one pixel of the final image.
    return max(_OVERSAMPLING, round(_MARGIN * side))


def _write(inscription: Inscription, points: int) -> Image.Image:
    font = _open_font(inscription.font, points)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(inscription.text))
    text = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(text).text((-left, -top), inscription.text, fill=255, font=font)
    rotated = text.rotate(inscription.angle, Image.Resampling.BICUBIC, expand=True)
    return rotated.crop(rotated.getbbox())


@lru_cache(maxsize=256)
def _open_font(font: str, points: int) -> ImageFont.FreeTypeFont:
    # Every build of Pillow has the basic layout; the raqm layout places letters differently.
    return ImageFont.truetype(font_path(font), points, layout_engine=ImageFont.Layout.BASIC)


def _sample_objects(config: WordsConfig, rng: Random, opacity: CoverageArray) -> list[SceneObject]:
    """Sample objects in cells that the text does not reach, in reading order."""
    free = [
        cell
        for cell in cells(_GRID)
        if not opacity[cell_pixels(*cell, grid=_GRID, image_size=len(opacity))].any()
    ]
    number = choose_number(rng, min(1, config.max_objects), config.max_objects)
    positions = sorted(choose_distinct(rng, free, number=min(number, len(free))))
    return [
        SceneObject(
            choose(rng, tuple(SIGNED_DISTANCES)),
            choose(rng, tuple(PALETTE)),
            choose(rng, tuple(SIZES)),
            *position,
            shift=sample_shift(_JITTER, rng),
        )
        for position in positions
    ]


def _noisy(image: CoverageArray, noise: float, rng: Random) -> CoverageArray:
    if noise == 0:
        return image
    uniform = np.array([rng.random() for _ in range(image.size)]).reshape(image.shape)
    noisy: CoverageArray = np.clip(image + noise * (2 * uniform - 1), 0, 255)
    return noisy
