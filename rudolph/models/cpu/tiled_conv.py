"""Convolutions of large feature maps, faster and in less memory than the plain ones.

The results are equal to those of the plain convolutions.

*Layout*: CPU convolutions take a quarter less time in channels-last format.  A network therefore
starts with ``fast_memory_format``, and its layers keep the format of their input.  On CUDA,
maps stay channels-first, because group norm would copy channels-last ones.

*Enlargement*: when a 3 x 3 kernel reads a map doubled by repetition, some of its nine weights read
the same pixel.  Those weights are summed first.  Each of the four output pixels per input pixel
then needs 2 x 2 weights, and the doubled map is never built::

    doubled     a a b b c c        weights u v w, applied at the two copies of b
    left           u v w           u a + (v + w) b
    right            u v w         (u + v) b + w c

*Strips*: in inference, a map with more than ``MAX_UNTILED_VALUES`` values per image is computed in
strips of rows.  Each strip reads one extra row above and below, and a norm uses the statistics of
the whole map, so there are no seams.  Besides the input and output maps, only a few strips are in
memory.

Shapes: B batch, C channels, H and W pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.models.cpu.group_norm import MapChunk, group_norm, map_chunks, statistics_dtype

# With Sber's VQ-GAN, images of 256 pixels stay whole and those of 512 get strips of 32 rows.
MAX_UNTILED_VALUES = 2**23
MAX_STRIP_VALUES = 2**21


def fast_memory_format(x: Tensor) -> Tensor:
    """Return the same values in the fastest memory format for convolutions on their device."""
    return x.contiguous(memory_format=memory_format_of(x))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the fastest memory format for convolutions on the device of ``x``."""
    return torch.channels_last if x.device.type == "cpu" else torch.contiguous_format


def is_tiled(x: Tensor, *, scale: int = 1) -> bool:
    """Return whether maps ``(B, C, H, W)``, once enlarged by ``scale``, are computed in strips."""
    return not torch.is_grad_enabled() and x[0].numel() * scale**2 > MAX_UNTILED_VALUES


def norm_conv(x: Tensor, norm: nn.GroupNorm, convolution: nn.Conv2d) -> Tensor:
    """Return ``convolution(silu(norm(x)))`` for a 3 x 3 convolution."""
    if not is_tiled(x):
        return convolution(norm_silu(x, norm))
    out = _empty(x, convolution.out_channels)
    for index, rows in tiled_norm_conv(x, norm, convolution):
        out[index] = rows
    return out


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Return ``silu(norm(x))``."""
    # Without a backward pass, silu may overwrite its input.
    return F.silu(group_norm(x, norm), inplace=not torch.is_grad_enabled())


def tiled_norm_conv(
    x: Tensor, norm: nn.GroupNorm, convolution: nn.Conv2d
) -> Iterator[tuple[MapChunk, Tensor]]:
    """Yield strips of ``norm_conv`` with their index tuples.

    After a strip is yielded, the caller may overwrite ``x`` at its indices.
    """
    weight, bias = (
        norm.weight.to(statistics_dtype(x.dtype)),
        norm.bias.to(statistics_dtype(x.dtype)),
    )
    for sample, image in enumerate(torch.split(x, 1)):
        mean, variance = channel_statistics(image, norm)
        above = border = torch.zeros_like(image[:, :, :1])
        for _, _, strip in map_chunks(image, MAX_STRIP_VALUES):
            input_rows = image[:, :, strip.start : strip.stop + 1]
            # With known statistics, a group norm is a batch norm in evaluation mode.
            activated = F.silu(
                F.batch_norm(input_rows, mean, variance, weight, bias, eps=norm.eps), True
            )
            below = [border] if strip.stop == x.shape[2] else []
            rows = torch.cat([above, activated, *below], dim=2)
            # Save the last row before the caller overwrites it; the copy lets the strip be freed.
            last_row = strip.stop - strip.start - 1
            above = activated[:, :, last_row : last_row + 1].clone()
            index = (slice(sample, sample + 1), slice(None), strip)
            yield index, F.conv2d(rows, convolution.weight, convolution.bias, padding=(0, 1))


def channel_statistics(image: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Return mean and variance, ``(C,)`` each, of each channel's group in a map ``(1, C, H, W)``.

    Source: Chan 1979, for combining the variances of parts.
    """
    _, channels, height, width = image.shape
    dtype, size = statistics_dtype(image.dtype), channels // norm.num_groups
    is_cpu = image.device.type == "cpu"
    ones = torch.ones(channels, dtype=dtype, device=image.device)
    means, variances, fractions = [], [], []
    for index in map_chunks(image, MAX_STRIP_VALUES):
        # On CPU, statistics have the dtype of the weight; on other devices, that of the map.
        rows = fast_memory_format(image[index] if is_cpu else image[index].to(dtype))
        _, mean, inverse = torch.native_group_norm(
            rows, ones, ones, 1, channels, rows.shape[2] * width, norm.num_groups, norm.eps
        )
        means.append(mean[0].double())
        variances.append(inverse[0].double() ** -2 - norm.eps)
        fractions.append(rows.shape[2] / height)
    fraction = torch.tensor(fractions, dtype=torch.double, device=image.device)[:, None]
    stacked_means = torch.stack(means)  # (S, G) of S strips and G groups
    mean = (fraction * stacked_means).sum(0)
    variance = (fraction * (torch.stack(variances) + (stacked_means - mean) ** 2)).sum(0)
    return mean.to(dtype).repeat_interleave(size), variance.to(dtype).repeat_interleave(size)


def upsample_conv(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Double ``x`` by repetition and return its 3 x 3 convolution ``(B, C_out, 2H, 2W)``."""
    kernels = upsample_kernels(convolution.weight)
    if not is_tiled(x, scale=2):
        return _upsample(F.pad(x, (1, 1, 1, 1)), kernels, convolution.bias)
    out = _empty(x, convolution.out_channels, scale=2)
    for images, _, strip in map_chunks(x, MAX_STRIP_VALUES // 4):
        halo = (1, 1, int(strip.start == 0), int(strip.stop == x.shape[2]))
        rows = F.pad(x[images, :, max(strip.start - 1, 0) : strip.stop + 1], halo)
        upsampled = _upsample(rows, kernels, convolution.bias)
        out[images, :, 2 * strip.start : 2 * strip.stop] = upsampled
    return out


def upsample_kernels(weight: Tensor) -> list[list[Tensor]]:
    """Return one kernel ``(O, I, 2, 2)`` for each output pixel, indexed by its row and column.

    Each input pixel has 2 x 2 output pixels.

    Args:
        weight: 3 x 3 kernel ``(O, I, 3, 3)``.
    """
    above, middle, below = weight.unbind(2)
    kernels = []
    for rows in ([above, middle + below], [above + middle, below]):
        left, center, right = torch.stack(rows, dim=2).unbind(3)
        pairs = ([left, center + right], [left + center, right])
        kernels.append([torch.stack(pair, dim=3) for pair in pairs])
    return kernels


def _upsample(x: Tensor, kernels: list[list[Tensor]], bias: Tensor | None) -> Tensor:
    """Return pixels ``(B, O, 2H, 2W)`` of maps ``(B, I, H + 2, W + 2)``, border of 1 included."""
    height, width = x.shape[2] - 1, x.shape[3] - 1
    rows = []
    for top, pair in enumerate(kernels):
        columns = [
            F.conv2d(x[:, :, top : top + height, left : left + width], kernel, bias)
            for left, kernel in enumerate(pair)
        ]
        # Stack with channels last, so that a channels-last input gives a channels-last output.
        rows.append(torch.stack([part.permute(0, 2, 3, 1) for part in columns], dim=3))
    pixels = torch.stack(rows, dim=2)  # (B, H, 2, W, 2, O)
    return pixels.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _empty(x: Tensor, channels: int, *, scale: int = 1) -> Tensor:
    shape = (len(x), channels, scale * x.shape[2], scale * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
