"""The machine's limits: reading from memory and multiplying matrices."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rudolph.benchmarks.benchmark_case import BenchmarkCase
from rudolph.benchmarks.serving import WorkResult

PASSES = {"read": 5, "bfloat16": 2, "packed": 2, "float32": 2}


class RooflineWorkload:
    """A few passes of reading memory or multiplying matrices, of which the fastest counts.

    ``read`` sums a tensor of ``roofline_bytes``; the other parts multiply two square matrices of
    side ``roofline_side``. ``packed`` multiplies by a bfloat16 weight in oneDNN's own layout. Both
    bfloat16 parts are left out on processors that emulate them.
    """

    def __init__(self, case: BenchmarkCase, implementation: str, folder: Path) -> None:
        speed = case.speed
        self.side = side = speed.roofline_side
        self.read = torch.ones(speed.roofline_bytes // 8, dtype=torch.int64)
        generator = torch.Generator().manual_seed(case.seed)
        x, weight = (torch.randn(side, side, generator=generator) for _ in range(2))
        self.works: dict[str, Callable[[], Tensor]] = {
            "read": lambda: self.read.sum(),
            "float32": lambda: x @ weight,
        }
        if case.speed.has_bfloat16:
            x_half, weight_half = x.bfloat16(), weight.bfloat16()
            packed = packed_weight(weight_half, num_rows=side)
            self.works["bfloat16"] = lambda: x_half @ weight_half
            self.works["packed"] = lambda: packed_product(x_half, packed)
        self.weights_bytes = 0
        self.versions: dict[str, str] = {}

    def run(self, part: str, *, is_short: bool) -> WorkResult:
        """Run the passes of one part and return the time of the fastest.

        Units are bytes for ``read`` and floating-point operations otherwise.
        """
        seconds = []
        for _ in range(1 if is_short else PASSES[part]):
            started = time.perf_counter()
            self.works[part]()
            seconds.append(time.perf_counter() - started)
        units = self.read.nbytes if part == "read" else 2 * self.side**3
        return WorkResult(units, min(seconds))

    def cache_bytes(self) -> int:
        """Return 0: there is no cache."""
        return 0

    def check(self, path: Path) -> None:
        """Do nothing: there is no model to check."""


def packed_weight(weight: Tensor, *, num_rows: int) -> Tensor:
    """Return a weight ``(out, in)`` in oneDNN's layout for inputs of ``num_rows`` rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return packed


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``x`` by the transpose of a weight, packed or not."""
    if weight.layout == torch.strided:
        return x @ weight.T
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product
