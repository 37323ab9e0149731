"""Tiled upscaling: exact seams, tiles that fit, and outputs that depend on distant pixels."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rudolph.generation.tiled_upscaling import (
    fold_factor,
    receptive_radius,
    tile_spans,
    upscale_tiled,
)
from rudolph.models.upscaler import UPSCALER_SCALES, Upscaler, UpscalerConfig


def small_upscaler(scale: int) -> Upscaler:
    """Return one block with large weights: distant pixels matter, outputs fill [0, 1]."""
    torch.manual_seed(scale)
    upscaler = Upscaler(UpscalerConfig(scale, num_channels=4, num_blocks=1, growth=2)).double()
    with torch.no_grad():
        for parameter in upscaler.parameters():
            parameter.mul_(2)
        upscaler.conv_last.bias.fill_(0.5)
    return upscaler.eval()


def random_images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def untiled(upscaler: Upscaler, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return upscaler(images).clamp(0, 1)


@pytest.mark.parametrize("scale", UPSCALER_SCALES)
def test_an_output_pixel_depends_on_the_receptive_radius_and_no_further(scale: int) -> None:
    upscaler = small_upscaler(scale)
    radius, size = receptive_radius(upscaler.config), fold_factor(upscaler.config)
    first = (radius // size + 2) * size
    images = random_images(1, 3, 2 * first, 2 * first + size).requires_grad_()
    block = slice(first * scale, (first + size) * scale)
    upscaler(images)[:, :, block, block].square().sum().backward()
    is_read = images.grad[0].abs().sum(0) > 0
    expected = list(range(first - radius, first + size + radius))
    for axis in (0, 1):
        assert is_read.any(axis).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("scale", UPSCALER_SCALES)
def test_tiles_that_overlap_by_the_receptive_radius_equal_the_untiled_image(scale: int) -> None:
    upscaler = small_upscaler(scale)
    radius = receptive_radius(upscaler.config)
    images = random_images(2, 3, 2 * radius + 4, 2 * radius + 30)
    expected = untiled(upscaler, images)
    assert expected.std() > 0.05
    totals = []
    for tile in (2 * radius + 10, 2 * radius + 22):
        larger = upscale_tiled(
            upscaler,
            images,
            tile=tile,
            overlap=radius,
            on_tile=lambda done, total: totals.append(total),
        )
        torch.testing.assert_close(larger, expected, rtol=0, atol=1e-9)
    assert min(totals) >= 4


def test_a_shorter_overlap_errs_at_the_seams_alone_and_less_the_longer_it_is() -> None:
    upscaler = small_upscaler(4)
    images = random_images(1, 3, 40, 60)
    expected = untiled(upscaler, images)
    errors = []
    for overlap in (0, 3, 6):
        larger = upscale_tiled(upscaler, images, tile=40, overlap=overlap)
        error = (larger - expected).abs().amax((0, 1, 2))
        (left, right) = tile_spans(60, tile=40, overlap=overlap)
        is_exact = torch.ones(60 * 4, dtype=torch.bool)
        radius = receptive_radius(upscaler.config)
        is_exact[(right.start - radius) * 4 :] = False
        is_exact[(left.end + radius) * 4 :] = True
        assert error[is_exact].max() < 1e-9
        errors.append(error.max().item())
    assert errors[0] > 0.01
    for longer, shorter in pairwise(errors[::-1]):
        assert longer < shorter / 2


@pytest.mark.parametrize("scale", UPSCALER_SCALES)
def test_a_image_that_fits_in_a_tile_is_the_plain_upscaler(scale: int) -> None:
    upscaler = small_upscaler(scale).float()
    images = random_images(3, 3, 12, 20).float()
    larger = upscale_tiled(upscaler, images, tile=20, overlap=8)
    assert torch.equal(larger, untiled(upscaler, images))


@pytest.mark.parametrize(("height", "width"), [(11, 14), (12, 9), (1, 1), (91, 83)])
def test_an_odd_side_at_scale_two_repeats_its_edge(height: int, width: int) -> None:
    upscaler = small_upscaler(2)
    images = random_images(1, 3, height, width)
    even = F.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
    expected = untiled(upscaler, even)[:, :, : 2 * height, : 2 * width]
    larger = upscale_tiled(upscaler, images, tile=82, overlap=receptive_radius(upscaler.config))
    torch.testing.assert_close(larger, expected, rtol=0, atol=1e-9)


@given(
    length=st.integers(1, 400),
    overlap=st.integers(0, 30),
    extra=st.integers(1, 60),
    multiple=st.sampled_from([1, 2]),
)
def test_spans_keep_every_pixel_once_and_deep_inside_a_tile(
    length: int, overlap: int, extra: int, multiple: int
) -> None:
    length, tile = length * multiple, 2 * overlap + extra * multiple
    tiles = tile_spans(length, tile=tile, overlap=overlap, multiple=multiple)
    assert [pixel for span in tiles for pixel in range(span.first, span.last)] == [*range(length)]
    assert len({span.end - span.start for span in tiles}) == 1
    for span in tiles:
        assert 0 <= span.start <= span.first < span.last <= span.end <= length
        assert span.end - span.start <= tile
        assert span.start % multiple == span.end % multiple == 0
        assert span.first == 0 or span.first - span.start >= overlap
        assert span.last == length or span.end - span.last >= overlap


def test_the_network_sees_no_more_than_a_batch_of_tiles_and_progress_is_told() -> None:
    upscaler = small_upscaler(4)
    shapes, calls = [], []
    upscaler.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    images = random_images(3, 3, 17, 31)
    results = [
        upscale_tiled(
            upscaler,
            images,
            tile=16,
            overlap=4,
            batch_size=batch_size,
            on_tile=lambda done, total: calls.append((done, total)),
        )
        for batch_size in (5, 1)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)
    assert max(shape[0] for shape in shapes) == 5
    assert max(max(shape[2:]) for shape in shapes) <= 16
    total = calls[-1][1]
    assert calls == [(min(done + 5, total), total) for done in range(0, total, 5)] + [
        (done + 1, total) for done in range(total)
    ]


def test_tiles_are_computed_in_the_precision_of_the_upscaler() -> None:
    upscaler = small_upscaler(4)
    larger = upscale_tiled(upscaler, random_images(1, 3, 9, 7).float())
    assert larger.dtype == torch.float32
    assert larger.min() >= 0 and larger.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 48, "overlap": 24}, "tile must be above twice the overlap of 24, got 48"),
        ({"tile": 51, "overlap": 20}, "tile must be a multiple of 2"),
        ({"overlap": -1}, "overlap must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_tiled_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upscale_tiled(small_upscaler(2), random_images(1, 3, 8, 8), **options)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)])
def test_what_is_no_batch_of_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be"):
        upscale_tiled(small_upscaler(4), random_images(*shape))
