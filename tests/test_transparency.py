"""Transparent backgrounds: the original image is restored, without fringes on other colours."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from rudolph.data.datasets.emoji import emoji_images
from rudolph.generation.transparency import FLECK_FACTOR, dilate, flood_fill, frame_mask, to_rgba

Array = np.ndarray
Colour = tuple[int, int, int]

WHITE = (255, 255, 255)
GROUNDS = [(0, 0, 0), (30, 60, 200), (128, 128, 128)]
SIZE, FINER = 40, 16


def over(image: Image.Image, ground: Colour) -> Array:
    plain = Image.new("RGBA", image.size, (*ground, 255))
    return np.asarray(Image.alpha_composite(plain, image).convert("RGB")).astype(int)


def alpha_of(image: Image.Image) -> Array:
    return np.asarray(image)[..., 3]


def drawn(draw: Callable[[ImageDraw.ImageDraw], object], ground: Colour) -> Array:
    """Return a drawing on a background colour, averaged down from a finer canvas."""
    image = Image.new("RGB", (SIZE * FINER, SIZE * FINER), ground)
    draw(ImageDraw.Draw(image))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [side * FINER for side in (left, top, right, bottom)]


DRAWINGS: dict[str, Callable[[ImageDraw.ImageDraw], object]] = {
    "yellow disc": lambda draw: draw.ellipse(box(5.3, 6.1, 33.6, 35.2), "#fcc21b"),
    "dark disc": lambda draw: draw.ellipse(box(9, 9, 30.5, 24.3), "#2b1a10"),
    "white disc with an outline": lambda draw: draw.ellipse(
        box(5.3, 6.1, 33.6, 35.2), "white", "#5f6c72", width=3 * FINER
    ),
    "triangle over the frame": lambda draw: draw.polygon(
        [(0, 640), (300, 100), (640, 640)], "#40c0e7"
    ),
    "stroke": lambda draw: draw.line([(90, 120), (500, 480)], "#b03030", 4 * FINER),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_over_any_ground_it_looks_as_if_drawn_there(name: str) -> None:
    rgba = to_rgba(drawn(DRAWINGS[name], WHITE))
    for ground in [WHITE, *GROUNDS]:
        assert np.abs(over(rgba, ground) - drawn(DRAWINGS[name], ground)).max() <= 2


@pytest.fixture(scope="module")
def emoji() -> Array:
    """Return every sixtieth shipped image."""
    return emoji_images(64)[1][::60]


def test_over_white_an_emoji_comes_back(emoji: Array) -> None:
    for image in emoji:
        assert np.abs(over(to_rgba(image, tolerance=2), WHITE) - image).max() <= 2
        rgba = to_rgba(image)
        error = np.abs(over(rgba, WHITE) - image).max(-1)
        assert error[alpha_of(rgba) > 0].max() <= 2
        assert error.max() <= FLECK_FACTOR * 8


def turned(image: Array, ground: Colour) -> Array:
    """Return the drawing rotated on another background, with a sharp mask and so a known edge."""
    distance = 255 - image.min(-1)
    is_drawing = ~dilate(flood_fill(distance <= 8, frame_mask(distance)), 2)
    fine = np.dstack([image, 255 * is_drawing]).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    canvas = Image.new("RGBA", fine.shape[:2], (*ground, 255))
    canvas.alpha_composite(Image.fromarray(fine).rotate(20))
    return np.asarray(canvas.convert("RGB").reduce(4)).astype(int)


def test_an_emoji_has_next_to_no_fringe_over_another_ground(emoji: Array) -> None:
    shares = []
    for image in emoji:
        on_white = turned(image, WHITE)
        rgba = to_rgba(on_white.astype(np.uint8))
        is_clear = flood_fill((on_white >= 255 - 8).all(-1), frame_mask(on_white[..., 0]))[
            ..., None
        ]
        for ground in GROUNDS:
            expected = turned(image, ground)
            error = np.abs(over(rgba, ground) - expected).mean()
            hard_cut = np.abs(np.where(is_clear, ground, on_white) - expected).mean()
            shares.append(error / max(hard_cut, 0.01))
    # The median, because the mask opens white interiors, which look like the background.
    assert np.median(shares) < 0.2


def test_most_of_an_emoji_is_opaque_and_most_of_its_frame_is_clear(emoji: Array) -> None:
    alphas = np.stack([alpha_of(to_rgba(image)) for image in emoji])
    assert 0.3 < (alphas == 255).mean() < 0.7
    assert 0.3 < (alphas == 0).mean() < 0.7
    assert (alphas[:, frame_mask(alphas[0])] == 0).mean() > 0.8


def test_a_hole_stays_opaque_and_an_open_bay_does_not() -> None:
    image = np.full((24, 24, 3), 255, dtype=np.uint8)
    image[4:20, 4:20] = (180, 40, 40)
    image[8:16, 8:16] = 255
    alpha = alpha_of(to_rgba(image))
    assert (alpha[4:20, 4:20] == 255).all()
    assert (alpha == 255).sum() == 16 * 16
    image[11:13, 16:20] = 255
    alpha = alpha_of(to_rgba(image))
    assert (alpha[8:16, 8:16] == 0).all()


def test_noise_and_flecks_of_the_ground_vanish_and_the_drawing_does_not() -> None:
    noise = np.random.default_rng(0).integers(-5, 6, (SIZE, SIZE, 3))
    image = np.clip(drawn(DRAWINGS["dark disc"], (248, 248, 248)) + noise, 0, 255)
    image[2:4, 20:22] = 230
    alpha = alpha_of(to_rgba(image.astype(np.uint8)))
    true = (255 - drawn(DRAWINGS["dark disc"], WHITE).min(-1).astype(int)) / (255 - 0x10)
    assert np.abs(alpha / 255 - true).max() < 0.06
    assert (alpha[:6] == 0).all()


def test_without_near_white_on_the_frame_nothing_changes() -> None:
    image = np.random.default_rng(0).integers(0, 200, (9, 12, 3), dtype=np.uint8)
    image[3:6, 3:6] = 255
    rgba = to_rgba(image)
    assert rgba.mode == "RGBA"
    assert (alpha_of(rgba) == 255).all()
    assert np.array_equal(over(rgba, (0, 0, 0)), image)


@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (1, 6), (2, 2)])
def test_a_plain_ground_is_clear_at_any_size(shape: tuple[int, int]) -> None:
    assert not alpha_of(to_rgba(np.full((*shape, 3), 250, dtype=np.uint8))).any()


def test_an_image_and_its_array_give_the_same(emoji: Array) -> None:
    assert to_rgba(Image.fromarray(emoji[0])).tobytes() == to_rgba(emoji[0]).tobytes()


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.4, 0.9), st.integers(0, 2**32 - 1))
def test_flooding_by_runs_equals_flooding_pixel_by_pixel(
    height: int, width: int, share: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    is_open = generator.random((height, width)) < share
    seeds = generator.random((height, width)) < 0.1
    expected = is_open & seeds
    for _ in range(height * width):
        spread = np.pad(expected, 1)
        spread = spread[:-2, 1:-1] | spread[2:, 1:-1] | spread[1:-1, :-2] | spread[1:-1, 2:]
        expected |= is_open & spread
    assert np.array_equal(flood_fill(is_open, seeds), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "image must be RGB uint8"),
        (np.zeros((4, 4, 4), dtype=np.uint8), "image must be RGB uint8"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "image must be RGB uint8"),
        (Image.new("L", (4, 4)), "image must be RGB uint8"),
    ],
)
def test_what_is_no_rgb_image_is_refused(image: Array | Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_rgba(image)


@pytest.mark.parametrize("options", [{"tolerance": -1}, {"tolerance": 256}, {"edge": 0}])
def test_options_out_of_bounds_are_refused(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        to_rgba(np.zeros((4, 4, 3), dtype=np.uint8), **options)
