"""Worker process that runs the parts: ``python -m rudolph.gpu_check.worker full|smoke``."""

import gc
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from rudolph.gpu_check.serving import Cases, serve_parts

PACKAGES = ("numpy", "pytorch-lightning", "torchmetrics", "triton", "bitsandbytes", "safetensors")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the facts besides the code that can affect a measurement."""
    content: dict[str, Any] = {
        "device": f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: installed for name in PACKAGES if (installed := version_of(name))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        content |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": driver_version(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return content


def version_of(package: str) -> str:
    """Return the version of an installed package, or "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or "unknown" if it cannot be read."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip().splitlines()[0]


def open_parts(device: torch.device) -> Mapping[str, Cases]:
    """Return the parts keyed by name, at full size on CUDA and at the smallest size elsewhere."""
    # Imported only when a part must run, because these modules take seconds to import.
    from rudolph.gpu_check.parts import CHECK_PARTS
    from rudolph.gpu_check.sizes import full_sizes, smoke_sizes

    sizes = full_sizes(device) if device.type == "cuda" else smoke_sizes()
    return {part: partial(cases, sizes) for part, cases in CHECK_PARTS.items()}


def release(device: torch.device) -> None:
    """Wait for the device, which raises pending errors, and free the memory of a case."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def serve_sizes(name: str) -> None:
    """Serve the parts at the sizes "full" or "smoke"."""
    if name == "full" and not torch.cuda.is_available():
        sys.exit("expected a CUDA GPU, got none. Add --smoke to try the check on the CPU")
    device = torch.device("cuda", 0) if name == "full" else torch.device("cpu")
    # Checks in float32 must not use TF32; cases that measure TF32 turn it on.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if device.type == "cpu":
        torch.set_num_threads(1)
        # C++ takes a minute to compile, so the compiled variants run uncompiled on the CPU.
        torch.compiler.set_stance("force_eager")
    warnings.simplefilter("ignore", FutureWarning)
    serve_parts(
        partial(open_parts, device),
        environment(device),
        memory_errors=(MemoryError, torch.OutOfMemoryError),
        release=partial(release, device),
    )


if __name__ == "__main__":
    serve_sizes(sys.argv[1])
