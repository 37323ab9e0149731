"""The dtypes that a device computes with at full speed.

A dtype that the processor only emulates is usable but slow.  On a processor limited to AVX2, a
bfloat16 matrix product takes 8 to 60 times as long as a float32 one.  Optimizers, training
precision, weight layouts and benchmarks check ``native_types`` before they choose a dtype.

``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` makes a newer processor behave like an older
one, for torch and for this module.

Source: oneDNN, "CPU Dispatcher Control" and "Data Types"; CUDA C++ Programming Guide, "Compute
Capabilities".
"""

import os
from dataclasses import dataclass

import torch

# Values of ONEDNN_MAX_CPU_ISA that allow native 16-bit products if the processor has them.  An
# unset variable counts as ALL.
AMX_LEVELS = {"ALL", "DEFAULT", "AVX10_1_512_AMX", "AVX512_CORE_AMX"}
AMX_FP16_LEVELS = {"ALL", "DEFAULT", "AVX10_1_512_AMX_FP16", "AVX512_CORE_AMX_FP16"}
FP16_LEVELS = AMX_LEVELS | AMX_FP16_LEVELS | {"AVX10_1_512", "AVX512_CORE_FP16"}
BFLOAT16_LEVELS = FP16_LEVELS | {"AVX512_CORE_BF16"}
# Minimum CUDA compute capability with native products.
CUDA_FLOAT16, CUDA_BFLOAT16 = (5, 3), (8, 0)


@dataclass(frozen=True)
class NativeTypes:
    """The native dtypes of one device.

    Attributes:
        products: dtypes whose matrix products are at least as fast as in float32.
        storage: dtypes that are read at full speed.  A dtype that is only in ``storage`` saves
            memory and is widened while it is read.
    """

    products: frozenset[torch.dtype]
    storage: frozenset[torch.dtype]


def native_types(device: torch.device | str = "cpu") -> NativeTypes:
    """Return the native dtypes of a device."""
    device = torch.device(device)
    if device.type == "cpu":
        return _of_cpu()
    products = {torch.float32}
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        products |= {torch.float16} if capability >= CUDA_FLOAT16 else set()
        # AMD devices number their capabilities differently, so check torch's own answer too.
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        products |= {torch.bfloat16} if has_bfloat16 and capability >= CUDA_BFLOAT16 else set()
    elif device.type == "mps":
        products |= {torch.float16}
    storage = {torch.float32, torch.float16, torch.bfloat16, torch.int8}
    return NativeTypes(frozenset(products), frozenset(storage))


def _of_cpu() -> NativeTypes:
    """Return the native dtypes of a CPU, within the ISA limits set for torch and oneDNN."""
    level = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    level, capability = level.upper(), torch.backends.cpu.get_cpu_capability()
    products = {torch.float32}
    if has_avx512():
        has_amx = torch.cpu._is_amx_tile_supported() and level in AMX_LEVELS | AMX_FP16_LEVELS
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() and level in BFLOAT16_LEVELS
        has_float16 = torch.cpu._is_amx_fp16_supported() and level in AMX_FP16_LEVELS
        products |= {torch.bfloat16} if has_amx or has_bfloat16 else set()
        products |= {torch.float16} if has_float16 else set()
    storage = {torch.float32, torch.bfloat16, torch.int8}
    # Processors with AVX2 also have F16C, which widens float16.
    storage |= {torch.float16} if "AVX" in capability else set()
    return NativeTypes(frozenset(products), frozenset(storage))


def native_product_names(device: torch.device | str = "cpu") -> list[str]:
    """Return the sorted names of the dtypes that a device multiplies natively, as stored in JSON.

    >>> "float32" in native_product_names()
    True
    """
    return sorted(str(dtype).removeprefix("torch.") for dtype in native_types(device).products)


def has_avx512() -> bool:
    """Return whether torch uses the AVX512 instructions of this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capability or capability == "AMX"


def has_native_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Return whether a device multiplies bfloat16 matrices natively."""
    return torch.bfloat16 in native_types(device).products


def has_exact_int8_products() -> bool:
    """Return whether fbgemm accumulates int8 products without saturation, which needs VNNI.

    Without VNNI it adds two products in 16 bits, so activations are limited to 7 bits.
    """
    return torch.cpu._is_vnni_supported() and has_avx512()


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of long sums: float64, or float32 on Apple's GPUs, which lack float64."""
    return torch.float32 if device.type == "mps" else torch.float64
