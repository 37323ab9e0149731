"""Decoding of any image file to a square RGB image, and the report of rejected files."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_manifests import bomb, encoded, noise

from rudolph.data import image_files
from rudolph.data.image_files import RejectedError, RowReport, center_crop, decode_image


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def rejection(data: bytes, **options: Any) -> str:
    with pytest.raises(RejectedError) as rejected:
        decode_image(data, **options)
    return rejected.value.reason


def test_an_rgb_image_is_not_changed() -> None:
    decoded = decode_image(encoded(noise()))
    assert decoded.changes == () and decoded.image.mode == "RGB"
    np.testing.assert_array_equal(pixels(decoded.image), pixels(noise()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_image_is_upright_whatever_its_exif_orientation(orientation: int) -> None:
    # EXIF 2.32, "Orientation": the sides of the shown image where row 0 and column 0 lie.
    upright = pixels(noise())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[image_files.ORIENTATION_TAG] = orientation
    decoded = decode_image(encoded(Image.fromarray(stored.astype(np.uint8)), exif=exif))
    np.testing.assert_array_equal(pixels(decoded.image), upright)
    assert decoded.changes == (("EXIF orientation",) if orientation > 1 else ())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 96).round().astype(np.uint16).reshape(8, 12)
    decoded = decode_image(encoded(Image.fromarray(values), kind))
    expected = np.floor(values / 257 + 0.5)
    np.testing.assert_array_equal(pixels(decoded.image), expected[..., None].repeat(3, axis=2))
    assert decoded.changes == ("16-bit", "greyscale")


def test_a_transparent_16_bit_value_becomes_white() -> None:
    values = np.full((8, 8), 300, np.uint16)
    values[0, 0] = 7
    decoded = decode_image(encoded(Image.fromarray(values), transparency=7))
    assert decoded.image.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.image.getpixel((1, 0)) == (1, 1, 1)
    assert decoded.changes == ("16-bit", "greyscale", "alpha")


def test_alpha_is_laid_over_white() -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    decoded = decode_image(encoded(Image.fromarray(rgba)))
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(decoded.image) - expected).max() <= 1
    assert decoded.changes == ("alpha",)


def test_grey_with_alpha_is_laid_over_white() -> None:
    decoded = decode_image(encoded(Image.new("LA", (8, 8), (0, 0))))
    assert decoded.image.getpixel((3, 3)) == (255, 255, 255)
    assert decoded.changes == ("greyscale", "alpha")


def test_a_palette_gives_its_colours_and_its_transparent_entry_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encoded(image))
    assert decoded.image.getpixel((0, 0)) == (10, 20, 30)
    assert decoded.image.getpixel((1, 0)) == (40, 50, 60)
    assert decoded.changes == ("palette",)
    decoded = decode_image(encoded(image, transparency=0))
    assert decoded.image.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.image.getpixel((1, 0)) == (40, 50, 60)
    assert decoded.changes == ("palette", "alpha")


@pytest.mark.parametrize(
    ("image", "kind", "colour", "changes"),
    [
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255), ("1-bit",)),
        (Image.new("L", (8, 8), 99), "PNG", (99, 99, 99), ("greyscale",)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", (255, 0, 0), ("CMYK",)),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG", (0, 0, 0), ("CMYK",)),
    ],
)
def test_other_pixel_formats_become_rgb(
    image: Image.Image, kind: str, colour: tuple[int, int, int], changes: tuple[str, ...]
) -> None:
    decoded = decode_image(encoded(image, kind))
    assert np.abs(pixels(decoded.image) - colour).max() <= 2
    assert decoded.changes == changes


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    decoded = decode_image(data)
    assert decoded.image.getpixel((4, 4)) == (255, 0, 0)
    assert "first of several frames" in decoded.changes


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_a_known_white_are_rejected(mode: str) -> None:
    assert rejection(encoded(Image.new(mode, (8, 8)), "TIFF")) == "unsupported pixel format"


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_a_side_under_8_pixels_is_too_small(size: tuple[int, int]) -> None:
    assert rejection(encoded(Image.new("RGB", size))) == "too small"
    assert decode_image(encoded(Image.new("RGB", (8, 8)))).changes == ()


@pytest.mark.parametrize("side", [9500, 14000, 60000])
def test_a_decompression_bomb_is_told_by_its_header(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejection(bomb(side)) == "decompression bomb"
    assert rejection(encoded(noise(12, 9)), max_pixels=107) == "decompression bomb"
    assert decode_image(encoded(noise(12, 9)), max_pixels=108).image.size == (12, 9)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_a_truncated_image_is_corrupt(kind: str, share: float) -> None:
    data = encoded(noise(64, 48), kind)
    assert rejection(data[: int(len(data) * share)]) == "corrupt image"


@settings(max_examples=60, deadline=None)
@given(
    position=st.integers(0, 10**6),
    value=st.integers(0, 255),
    kind=st.sampled_from(image_files.FORMATS),
)
def test_a_damaged_byte_never_raises_anything_but_a_rejection(
    position: int, value: int, kind: str
) -> None:
    exif = Image.Exif()
    exif[image_files.ORIENTATION_TAG] = 6
    data = bytearray(encoded(noise(), kind, **({"exif": exif} if kind != "PPM" else {})))
    data[position % len(data)] = value
    try:
        outcome = decode_image(bytes(data), max_pixels=10_000).image.mode
    except RejectedError as rejected:
        outcome = rejected.reason
    reasons = {"corrupt image", "decompression bomb", "too small", "unsupported pixel format"}
    assert outcome in reasons | {"RGB"}


def test_what_is_no_image_is_corrupt() -> None:
    assert rejection(b"<html>not found</html>") == "corrupt image"
    # Pillow would open both formats, EPS by starting Ghostscript.
    for kind in ("EPS", "TGA"):
        assert rejection(encoded(noise(), kind)) == "corrupt image"


def test_a_readable_image_with_odd_metadata_is_kept_and_counted() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01"
    decoded = decode_image(encoded(noise(), "JPEG", exif=exif))
    assert decoded.changes == ("read with a warning",)


@pytest.mark.parametrize("size", [(30, 20), (20, 31), (20, 20)])
def test_the_centre_square_is_the_middle_of_the_longer_side(size: tuple[int, int]) -> None:
    image = noise(*size)
    left, top = (size[0] - 20) // 2, (size[1] - 20) // 2
    middle = pixels(image)[top : top + 20, left : left + 20]
    np.testing.assert_array_equal(pixels(center_crop(image, 20)), middle)


def test_shrinking_averages_where_skipping_pixels_would_alias() -> None:
    checkerboard = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    small = pixels(center_crop(Image.fromarray(checkerboard.astype(np.uint8)).convert("RGB"), 8))
    assert np.abs(small - 127.5).max() <= 4


def test_what_lies_outside_the_square_does_not_bleed_in() -> None:
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))
    assert pixels(center_crop(wide, 4)).min() == 255


def test_the_report_counts_all_and_names_the_first_twenty() -> None:
    report = RowReport()
    for index in range(25):
        report.skip(f"row {index}", "missing file")
    report.skip("row 25\nforged: line\x1b[31m", "empty caption")
    report.keep("row 26", ["alpha", "palette"])
    lines = report.summary().splitlines()
    assert lines[0] == "27 rows: 1 kept, 26 skipped (96.3%)"
    first_twenty = ", ".join(f"row {index}" for index in range(20))
    assert lines[1] == f"skipped: 25 missing file ({first_twenty}, ...)"
    assert lines[2] == "skipped: 1 empty caption (row 25 forged: line [31m)"
    assert lines[3:] == ["converted: 1 alpha (row 26)", "converted: 1 palette (row 26)"]
    as_dict = report.as_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["skipped"] == {
        "missing file": {"count": 25, "names": [f"row {index}" for index in range(20)]},
        "empty caption": {"count": 1, "names": ["row 25 forged: line [31m"]},
    }
    assert (as_dict["rows"], as_dict["kept"], as_dict["bad_fraction"]) == (27, 1, 26 / 27)
