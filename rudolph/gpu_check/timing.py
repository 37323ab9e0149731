"""Timing of work on a device, and the device's limits."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch

from rudolph.gpu_check.rows import Case, CheckRow
from rudolph.gpu_check.sizes import Sizes

# Dense bfloat16 operations per second, keyed by a substring of the device's name; the first match
# counts. Source: NVIDIA's data sheets.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def peak_bfloat16(name: str) -> float | None:
    """Return the bfloat16 operations per second in a device's data sheet, or None if unknown."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    work: Callable[[], object], device: torch.device, *, num_repetitions: int, warm_up: int = 2
) -> float:
    """Return the median seconds of some repetitions, measured by CUDA events on a GPU."""
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
def matmul_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of multiplying two random square matrices."""
    # Random numbers, because multiplying zeros takes less power and runs faster.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds(lambda: left @ right, device, num_repetitions=10, warm_up=3)
    return 2 * side**3 / seconds


@cache
def copy_rate(num_bytes: int, device: torch.device) -> float:
    """Return the bytes per second, read plus written, of a copy on the device."""
    source = torch.randint(127, (num_bytes // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, num_repetitions=10)
    return 2 * source.nbytes / seconds


def device_limits(sizes: Sizes) -> Iterator[Case]:
    """Yield one case that measures matrix products in each dtype, and the speed of a copy."""

    def run() -> Iterator[CheckRow]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rate = matmul_rate(sizes.roofline_side, sizes.device, dtype)
            name = str(dtype).removeprefix("torch.")
            yield CheckRow(
                f"{name}_product", rate / 1e12, "TFLOP/s", note=f"side {sizes.roofline_side}"
            )
        rate = copy_rate(sizes.roofline_bytes, sizes.device)
        yield CheckRow("copy", rate / 1e9, "GB/s", note="bytes read and written")

    yield Case("machine", run)
