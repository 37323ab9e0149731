"""Worker process of one implementation: ``python -m rudolph.benchmarks.worker``.

The first line of standard input names the implementation and its case. The reference has its own
worker, ``reference_worker.py``.

To add an implementation, write a ``serving.Implementation`` and name it in ``IMPLEMENTATIONS`` and
in ``config.WORKLOADS``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rudolph.benchmarks.benchmark_case import BenchmarkCase, read_case
from rudolph.benchmarks.config import COMPILED, ROOFLINE, TRANSFORMERS, WEIGHT_DTYPES
from rudolph.benchmarks.decoding_workload import DecodingWorkload
from rudolph.benchmarks.huggingface import HuggingFaceDecoding
from rudolph.benchmarks.image_workloads import GenerationWorkload, UpscalingWorkload
from rudolph.benchmarks.roofline import RooflineWorkload
from rudolph.benchmarks.serving import Implementation, serve_implementation
from rudolph.benchmarks.training_workloads import DecoderTrainingWorkload, VQGANWorkload

Make = Callable[[BenchmarkCase, str, Path], Implementation]

DECODING: dict[str, Make] = {
    ROOFLINE: RooflineWorkload,
    TRANSFORMERS: HuggingFaceDecoding,
    **dict.fromkeys((*WEIGHT_DTYPES, *COMPILED), DecodingWorkload),
}
IMPLEMENTATIONS: dict[str, dict[str, Make]] = {
    "decode": DECODING,
    "train": {
        ROOFLINE: RooflineWorkload,
        "float32": DecoderTrainingWorkload,
        "bfloat16": DecoderTrainingWorkload,
    },
    "vqgan": {ROOFLINE: RooflineWorkload, "float32": VQGANWorkload, "bfloat16": VQGANWorkload},
    "upscaler": {
        ROOFLINE: RooflineWorkload,
        "float32": UpscalingWorkload,
        "bfloat16": UpscalingWorkload,
    },
    "pipeline": dict.fromkeys((*WEIGHT_DTYPES, *COMPILED), GenerationWorkload),
    "memory": {name: make for name, make in DECODING.items() if name != ROOFLINE},
}


def implementation(setup: Mapping[str, Any]) -> Implementation:
    """Build the implementation that a request names."""
    case = read_case(setup["case"])
    make = IMPLEMENTATIONS[case.speed.workload or ""][setup["implementation"]]
    return make(case, setup["implementation"], Path(setup["folder"]))


if __name__ == "__main__":
    serve_implementation(implementation)
