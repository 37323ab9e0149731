"""Fast convolutions: each equals the plain one at uneven sizes, whole and in strips."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from rudolph.generation.tiled_upscaling import upscale_tiled
from rudolph.models.cpu import group_norm, tiled_conv
from rudolph.models.cpu.tiled_conv import norm_conv, upsample_conv
from rudolph.models.upscaler import Upscaler, UpscalerConfig
from rudolph.models.vqgan import model as vqgan
from rudolph.models.vqgan.model import VQGAN, ResnetBlock, VQGANConfig
from rudolph.models.vqgan.quantizers import QuantizerConfig

SMALL = VQGANConfig(
    16, (8, 12, 16), 1, (4,), 10, norm_groups=4, quantizer=QuantizerConfig("vq", 30, 12)
)
LAYOUTS = [torch.channels_last, torch.contiguous_format]
UNEVEN = [(1, 7, 5), (2, 4, 9), (3, 1, 1)]


def maps(batch: int, channels: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, height, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def layers(channels_in: int, channels_out: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
    torch.manual_seed(1)
    norm = nn.GroupNorm(3, channels_in, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, nn.Conv2d(channels_in, channels_out, 3, padding=1).double()


@pytest.fixture
def small_strips(monkeypatch) -> Callable[[int], None]:
    """Return a function that sets the strip size of feature maps and of attention at inference."""

    def set_strips(size: int) -> None:
        monkeypatch.setattr(tiled_conv, "MAX_UNTILED_VALUES", 0)
        monkeypatch.setattr(tiled_conv, "MAX_STRIP_VALUES", size)
        monkeypatch.setattr(vqgan, "MAX_STRIP_VALUES", size)

    return set_strips


def small_vqgan(**changes: object) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(replace(SMALL, **changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "height", "width"), UNEVEN)
def test_an_enlarged_convolution_is_that_of_the_doubled_map_with_its_gradient(
    batch: int, height: int, width: int, layout: torch.memory_format
) -> None:
    _, convolution = layers(6, 5)
    x = maps(batch, 6, height, width).contiguous(memory_format=layout).requires_grad_()
    doubled = convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    found = upsample_conv(x, convolution)
    torch.testing.assert_close(found, doubled)
    weights = maps(*doubled.shape, seed=1)
    read = [x, convolution.weight, convolution.bias]
    expected = torch.autograd.grad((doubled * weights).sum(), read)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), read), expected)


@pytest.mark.parametrize("part", [1, 20, 70, 2**20])
@pytest.mark.parametrize(("batch", "height", "width"), UNEVEN)
def test_a_group_norm_with_channels_last_has_torchs_gradient(
    batch: int, height: int, width: int, part: int, monkeypatch
) -> None:
    monkeypatch.setattr(group_norm, "CHUNK_SIZE", part)
    norm, _ = layers(6, 6)
    x = maps(batch, 6, height, width).requires_grad_()
    weights = maps(batch, 6, height, width, seed=1)
    read = [x, norm.weight, norm.bias]
    plain = norm(x)
    expected = torch.autograd.grad((plain * weights).sum(), read)
    found = group_norm.group_norm(x.contiguous(memory_format=torch.channels_last), norm)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), read), expected, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 70, 100_000])
@pytest.mark.parametrize(("batch", "height", "width"), UNEVEN)
def test_strips_are_the_plain_convolutions(
    batch: int, height: int, width: int, size: int, layout: torch.memory_format, small_strips
) -> None:
    norm, convolution = layers(6, 5)
    x = maps(batch, 6, height, width).contiguous(memory_format=layout)
    expected = convolution(F.silu(norm(x)))
    doubled = convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    small_strips(size)
    with torch.no_grad():
        # Variances are recovered as d^-2 - eps, in float64 because eps dominates where they are 0.
        torch.testing.assert_close(norm_conv(x, norm, convolution), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(upsample_conv(x, convolution), doubled)


@pytest.mark.parametrize("channels_out", [6, 9])
def test_a_block_in_strips_is_the_plain_block_and_leaves_its_input(
    channels_out: int, small_strips
) -> None:
    torch.manual_seed(0)
    block = ResnetBlock(6, channels_out, replace(SMALL, norm_groups=3)).double().eval()
    x = maps(2, 6, 11, 5)
    before = x.clone()
    with torch.no_grad():
        expected = block(x)
        small_strips(100)
        torch.testing.assert_close(block(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("wavelet", [False, True])
def test_a_vqgan_in_strips_finds_the_same_indices_and_images(wavelet: bool, small_strips) -> None:
    model = small_vqgan(wavelet=wavelet)
    images = maps(2, 3, 28, 20).float().sigmoid()
    indices = torch.arange(2 * 7 * 5).view(2, 35) % 30
    encoded, decoded = model.encode_indices(images), model.decode_indices(indices, height=7)
    assert len(encoded.unique()) > 3
    small_strips(150)
    assert torch.equal(model.encode_indices(images), encoded)
    found = model.decode_indices(indices, height=7)
    torch.testing.assert_close(found, decoded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_tiled", [False, True])
def test_a_vqgan_in_half_precision_gives_nearly_the_same_images(
    is_tiled: bool, small_strips
) -> None:
    model = small_vqgan()
    indices = torch.arange(35)[None] % 30
    expected = model.decode_indices(indices, height=7)
    assert expected.std() > 0.1
    if is_tiled:
        small_strips(150)
    found = model.bfloat16().decode_indices(indices, height=7)
    assert found.dtype == torch.float32
    assert (found - expected).square().mean().sqrt() < 0.02
    images = maps(1, 3, 28, 20).float().sigmoid()
    assert model.encode_indices(images).shape == (1, 35)


def test_an_upscaler_in_half_precision_gives_nearly_the_same_images() -> None:
    torch.manual_seed(0)
    upscaler = Upscaler(UpscalerConfig(4, num_channels=8, num_blocks=2, growth=4)).eval()
    images = maps(1, 3, 11, 14).float().sigmoid()
    expected = upscale_tiled(upscaler, images, tile=10, overlap=2)
    found = upscale_tiled(upscaler.bfloat16(), images, tile=10, overlap=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of memory allocated during a call, beyond the memory before it."""
    with profile(profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return int(torch.tensor([size for _, size in changes]).cumsum(0).max())


def test_strips_need_memory_for_two_maps_and_a_few_strips(small_strips) -> None:
    model = small_vqgan(channels=(8, 8, 16))
    images = maps(1, 3, 96, 80).float().sigmoid()
    indices = torch.arange(24 * 20)[None] % 30
    largest, strip = 4 * 8 * 96 * 80, 4 * 2000
    calls = (
        lambda: model.encode_indices(images),
        lambda: model.decode_indices(indices, height=24),
    )
    plain = [peak_bytes(call) for call in calls]
    small_strips(strip // 4)
    whole = [peak_bytes(call) for call in calls]
    # The remainder is the image, and its padded copy that the encoder downsamples.
    assert max(whole) < 2.6 * largest + 10 * strip
    assert min(plain) > 3.5 * largest
