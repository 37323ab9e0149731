"""How long work takes on a device, and the most that the device can do."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch

from rudolph.gpu_check.rows import Case, CheckRow
from rudolph.gpu_check.sizes import Sizes

# Dense bfloat16 products in operations per second, by a part of the device's name; the first that
# fits counts.  Source: NVIDIA's data sheets.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def peak_bfloat16(name: str) -> float | None:
    """Return the data sheet's bfloat16 operations per second of a device, None if not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    work: Callable[[], object], device: torch.device, *, num_repetitions: int, warm_up: int = 2
) -> float:
    """Return the median time of some repetitions, by CUDA events where there are any."""
    for _ in range(warm_up):
        work()
    synchronize(device)
    return statistics.median(_seconds(work, device) for _ in range(num_repetitions))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        first, last = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@cache
def product_limit(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of the product of two square random matrices."""
    # Random numbers: products of zeros draw less power and run faster.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds(lambda: left @ right, device, num_repetitions=10, warm_up=3)
    return 2 * side**3 / seconds


@cache
def copy_limit(num_bytes: int, device: torch.device) -> float:
    """Return bytes per second, read and written, of a copy on the device."""
    source = torch.randint(127, (num_bytes // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, num_repetitions=10)
    return 2 * source.nbytes / seconds


def device_limits(sizes: Sizes) -> Iterator[Case]:
    """Give what the machine can do: products of each type, and copies."""

    def run() -> Iterator[CheckRow]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rate = product_limit(sizes.roofline_side, sizes.device, dtype)
            name = str(dtype).removeprefix("torch.")
            yield CheckRow(
                f"{name}_product", rate / 1e12, "TFLOP/s", note=f"side {sizes.roofline_side}"
            )
        rate = copy_limit(sizes.roofline_bytes, sizes.device)
        yield CheckRow("copy", rate / 1e9, "GB/s", note="bytes read and written")

    yield Case("machine", run)
