"""Speed of the VQ-GAN and the upscaler in images per second, by precision and memory layout."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from rudolph.benchmarks.flops import upscaler_operations, vqgan_operations
from rudolph.gpu_check.consistency import relative_error
from rudolph.gpu_check.rows import Case, CheckRow
from rudolph.gpu_check.sizes import Sizes
from rudolph.gpu_check.timing import median_seconds
from rudolph.gpu_check.training import operation_rows
from rudolph.models.cpu import tiled_conv
from rudolph.models.upscaler import Upscaler
from rudolph.models.vqgan.model import VQGAN

# Setting -> dtype of weights and images, whether TF32 is allowed, whether memory is channels last.
SETTINGS = {
    "float32": (torch.float32, False, False),
    "float32 with TF32": (torch.float32, True, False),
    "bfloat16": (torch.bfloat16, False, False),
    "bfloat16, channels last": (torch.bfloat16, False, True),
}
LARGEST_ERROR = 0.1


def image_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield one case per network and setting."""
    case = sizes.case(sizes.checked)
    measures = {
        "VQ-GAN": partial(measure_vqgan, vqgan_operations(case)),
        "upscaler": partial(measure_upscaler, upscaler_operations(case)),
    }
    for name, measure in measures.items():
        for setting in SETTINGS:
            yield Case(f"{name}, {setting}", partial(use_setting, measure, sizes, setting))


def use_setting(
    measure: Callable[[Sizes, torch.dtype, torch.memory_format], Iterator[CheckRow]],
    sizes: Sizes,
    setting: str,
) -> Iterator[CheckRow]:
    """Measure with the TF32 flag and memory layout of a setting, then restore both."""
    dtype, has_tf32, is_channels_last = SETTINGS[setting]
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    allowed_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = has_tf32
    try:
        # The networks choose a layout by device; the check measures both layouts on one device.
        with patch.object(tiled_conv, "memory_format_of", lambda x: layout), torch.no_grad():
            yield from measure(sizes, dtype, layout)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed_tf32


def random_images(sizes: Sizes) -> Tensor:
    """Return random images ``(B, 3, H, W)`` in [0, 1] at the VQ-GAN's resolution."""
    generator = torch.Generator().manual_seed(0)
    side = sizes.vqgan.resolution
    images = torch.rand(sizes.image_batch, 3, side, side, generator=generator)
    return images.to(sizes.device)


def measure_vqgan(
    operations: Mapping[str, float],
    sizes: Sizes,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Iterator[CheckRow]:
    """Measure the encoder and the decoder, and compare decoded images with float32."""
    torch.manual_seed(0)
    with sizes.device:
        model = VQGAN(sizes.vqgan).eval()
    images = random_images(sizes)
    indices = model.encode_indices(images)
    exact = model.decode_indices(indices)
    model = model.to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    works = {
        "encode": lambda: model.encode_indices(images),
        "decode": lambda: model.decode_indices(indices),
    }
    for part, work in works.items():
        yield from image_rows(sizes, part, work, operations[part])
    error = relative_error(model.decode_indices(indices), exact)
    yield CheckRow("decode", error, "relative error", LARGEST_ERROR)


def measure_upscaler(
    operations: float, sizes: Sizes, dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[CheckRow]:
    """Measure the upscaler, and compare its output with float32."""
    torch.manual_seed(0)
    with sizes.device:
        model = Upscaler(sizes.upscaler).eval()
    # A quarter of the batch: the output has sixteen times as many pixels.
    images = random_images(sizes)[: max(sizes.image_batch // 4, 1)]
    exact = model(images)
    model = model.to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    inputs = images.to(dtype)
    yield from image_rows(sizes, "upscale", lambda: model(inputs), operations, len(inputs))
    yield CheckRow(
        "upscale", relative_error(model(inputs), exact), "relative error", LARGEST_ERROR
    )


def image_rows(
    sizes: Sizes,
    part: str,
    work: Callable[[], Tensor],
    operations: float,
    batch: int | None = None,
) -> Iterator[CheckRow]:
    """Measure one batch and yield its images per second and operations per second."""
    batch = batch or sizes.image_batch
    seconds = median_seconds(work, sizes.device, num_repetitions=sizes.num_repetitions)
    note = f"batch {batch}, {sizes.vqgan.resolution} px"
    yield CheckRow(part, batch / seconds, "images/s", note=note)
    for row in operation_rows(operations * batch / seconds, sizes):
        yield CheckRow(f"{part}, {row.quantity}", row.value, row.unit, note=row.note)
