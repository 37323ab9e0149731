"""Group norm of channels-last maps, the memory format of fast CPU convolutions.

Except in float32, torch's own backward pass takes several times as long on such maps as on
channels-first ones.

Shapes: B batch, C channels, G groups, H and W pixels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Number of values in a chunk that fits into the processor's cache.
CHUNK_SIZE = 2**20

MapChunk = tuple[slice, slice, slice]


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Return ``norm(x)`` of maps ``(B, C, H, W)``, with a fast backward pass for their layout."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    is_slow = x.device.type == "cpu" and is_last and x.dtype != torch.float32
    if not (is_slow and torch.is_grad_enabled()):
        return norm(x)
    out: Tensor = _ChannelsLast.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # type: ignore[no-untyped-call]
    return out


def map_chunks(x: Tensor, size: int) -> Iterator[MapChunk]:
    """Yield index tuples that split maps ``(B, C, H, W)`` into chunks of at most ``size`` values.

    A chunk is one or more whole images or some rows of one image.  It has at least one row, even
    if that exceeds ``size``.

    >>> [index[2] for index in map_chunks(torch.empty(1, 2, 5, 3), 12)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    per_row, height = x.shape[1] * x.shape[3], x.shape[2]
    images = max(size // (per_row * height), 1)
    rows = min(max(size // per_row, 1), height)
    for first in range(0, x.shape[0], images):
        of_images = slice(first, min(first + images, x.shape[0]))
        for top in range(0, height, rows):
            yield of_images, slice(None), slice(top, min(top + rows, height))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of normalisation statistics, which is at least float32."""
    return torch.promote_types(dtype, torch.float32)


class _ChannelsLast(torch.autograd.Function):
    """Torch's group norm with a backward pass that sums over pixels chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        """Return the normalised maps and save mean and inverse deviation, ``(B, G)`` each."""
        batch, channels, height, width = x.shape
        out, mean, inverse = torch.native_group_norm(
            x, weight, bias, batch, channels, height * width, num_groups, eps
        )
        ctx.save_for_backward(x, weight, mean, inverse)  # mean and inverse deviation (B, G)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of the input, weight and bias."""
        x, weight, *statistics = ctx.saved_tensors
        dtype = statistics_dtype(x.dtype)
        batch, channels, height, width = x.shape
        groups = statistics[0].shape[1]
        size = channels // groups
        mean, inverse = (values.to(dtype).repeat_interleave(size, 1) for values in statistics)
        total, centered_total = _sums(gradient, x, mean)
        centered_total = centered_total * inverse

        def over_group(sums: Tensor) -> Tensor:
            group_sums = (weight.to(dtype) * sums).view(batch, groups, size).sum(2)
            return (group_sums / (size * height * width)).repeat_interleave(size, 1)

        # The gradient of x is a * gradient + b * x + c, with a, b and c of shape (B, C).
        a = weight.to(dtype) * inverse
        b = -inverse * inverse * over_group(centered_total)
        c = -inverse * over_group(total) - mean * b
        out = torch.empty_like(x)
        for index in map_chunks(x, CHUNK_SIZE):
            images = index[0]
            part = torch.addcmul(_pixels(c[images]), x[index].to(dtype), _pixels(b[images]))
            out[index] = part.addcmul_(gradient[index].to(dtype), _pixels(a[images]))
        return out, centered_total.sum(0).to(weight), total.sum(0).to(weight), None, None


def _sums(gradient: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixel sums ``(B, C)`` of the gradient and of its product with ``x - mean``."""
    total, centered_total = torch.zeros_like(mean), torch.zeros_like(mean)
    for index in map_chunks(x, CHUNK_SIZE):
        images, part = index[0], gradient[index].to(mean)
        centered = x[index].to(mean.dtype, copy=True).sub_(_pixels(mean[images]))
        total[images] += part.sum((2, 3))
        centered_total[images] += centered.mul_(part).sum((2, 3))
    return total, centered_total


def _pixels(values: Tensor) -> Tensor:
    return values[..., None, None]
