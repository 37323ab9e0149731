"""Number types that a device computes with at full speed.

A type that the processor only emulates works, but slowly: a product of bfloat16 matrices takes 8
to 60 times as long as one of float32 matrices on a processor with AVX2 only.  Optimizers,
training precision, weight layouts and benchmarks ask ``native_types`` before they choose a type.

``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` makes a newer processor behave like an older
one, for torch and for this module.

Source: oneDNN, "CPU Dispatcher Control" and "Data Types"; CUDA C++ Programming Guide, "Compute
Capabilities".
"""

import os
from dataclasses import dataclass

import torch

# Values of ONEDNN_MAX_CPU_ISA under which oneDNN multiplies 16-bit floats natively, where the
# processor can.  ALL is also the value of an unset variable.
AMX_LEVELS = {"ALL", "DEFAULT", "AVX10_1_512_AMX", "AVX512_CORE_AMX"}
AMX_FP16_LEVELS = {"ALL", "DEFAULT", "AVX10_1_512_AMX_FP16", "AVX512_CORE_AMX_FP16"}
FP16_LEVELS = AMX_LEVELS | AMX_FP16_LEVELS | {"AVX10_1_512", "AVX512_CORE_FP16"}
BFLOAT16_LEVELS = FP16_LEVELS | {"AVX512_CORE_BF16"}
# Smallest CUDA compute capability with native products.
CUDA_FLOAT16, CUDA_BFLOAT16 = (5, 3), (8, 0)


@dataclass(frozen=True)
class NativeTypes:
    """``products`` are multiplied at least as fast as float32; ``storage`` is read at full speed.

    A type in ``storage`` alone saves memory: it is widened while it is read.
    """

    products: frozenset[torch.dtype]
    storage: frozenset[torch.dtype]


def native_types(device: torch.device | str = "cpu") -> NativeTypes:
    """Return the number types that a device computes with at full speed."""
    device = torch.device(device)
    if device.type == "cpu":
        return _of_cpu()
    products = {torch.float32}
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        products |= {torch.float16} if capability >= CUDA_FLOAT16 else set()
        # AMD's devices report other numbers, so torch is asked, too.
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        products |= {torch.bfloat16} if has_bfloat16 and capability >= CUDA_BFLOAT16 else set()
    elif device.type == "mps":
        products |= {torch.float16}
    storage = {torch.float32, torch.float16, torch.bfloat16, torch.int8}
    return NativeTypes(frozenset(products), frozenset(storage))


def _of_cpu() -> NativeTypes:
    """Of x86 and ARM processors; the two variables of torch and oneDNN are heeded."""
    level = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    level, capability = level.upper(), torch.backends.cpu.get_cpu_capability()
    products = {torch.float32}
    if "AVX512" in capability or capability == "AMX":
        has_amx = torch.cpu._is_amx_tile_supported() and level in AMX_LEVELS | AMX_FP16_LEVELS
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() and level in BFLOAT16_LEVELS
        has_float16 = torch.cpu._is_amx_fp16_supported() and level in AMX_FP16_LEVELS
        products |= {torch.bfloat16} if has_amx or has_bfloat16 else set()
        products |= {torch.float16} if has_float16 else set()
    storage = {torch.float32, torch.bfloat16, torch.int8}
    # F16C, which widens float16, comes with AVX2.
    storage |= {torch.float16} if "AVX" in capability else set()
    return NativeTypes(frozenset(products), frozenset(storage))


def native_product_names(device: torch.device | str = "cpu") -> list[str]:
    """Return the names of the types that a device multiplies natively, sorted: as JSON keeps them.

    >>> "float32" in native_product_names()
    True
    """
    return sorted(str(dtype).removeprefix("torch.") for dtype in native_types(device).products)


def has_native_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Return whether a device multiplies bfloat16 matrices natively."""
    return torch.bfloat16 in native_types(device).products


def has_exact_int8_products() -> bool:
    """Return whether fbgemm adds products of 8-bit numbers without saturation (VNNI).

    Without VNNI it adds two products in 16 bits, so that activations may have 7 bits only.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.cpu._is_vnni_supported() and "AVX512" in capability
