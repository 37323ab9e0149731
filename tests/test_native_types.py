"""Native dtypes: a dtype that the processor emulates is never chosen."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rudolph.models.layers import native_types
from rudolph.models.layers.native_types import has_exact_int8_products, has_native_bfloat16

MODERN = {
    "_is_amx_tile_supported": True,
    "_is_amx_fp16_supported": True,
    "_is_avx512_bf16_supported": True,
    "_is_vnni_supported": True,
}


def use_processor(
    monkeypatch: pytest.MonkeyPatch, capability: str, level: str = "", **supported: bool
) -> None:
    """Simulate a processor, with ``level`` as oneDNN's variable."""
    for name, value in (MODERN | supported).items():
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if level:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)


@pytest.mark.parametrize(
    ("capability", "level", "supported", "expected"),
    [
        ("AVX512", "", {}, {"bfloat16", "float16"}),
        ("AVX512", "", {"_is_amx_fp16_supported": False}, {"bfloat16"}),
        (
            "AVX512",
            "",
            {"_is_amx_tile_supported": False, "_is_amx_fp16_supported": False},
            {"bfloat16"},
        ),
        ("AVX512", "", dict.fromkeys(MODERN, False), set()),
        ("AVX512", "avx512_core_bf16", {}, {"bfloat16"}),
        ("AVX512", "avx512_core_vnni", {}, set()),
        ("AVX512", "AVX2", {}, set()),
        ("AVX2", "", {}, set()),
        ("DEFAULT", "", dict.fromkeys(MODERN, False), set()),
    ],
)
def test_products_of_a_processor(
    capability: str,
    level: str,
    supported: dict[str, bool],
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_processor(monkeypatch, capability, level, **supported)
    found = native_types.native_types("cpu").products
    assert found == {torch.float32, *(getattr(torch, name) for name in expected)}
    assert has_native_bfloat16() == ("bfloat16" in expected)


def test_float16_is_stored_where_f16c_widens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use_processor(monkeypatch, "AVX2")
    assert torch.float16 in native_types.native_types().storage
    use_processor(monkeypatch, "DEFAULT")
    assert torch.float16 not in native_types.native_types().storage


def test_sums_of_8_bit_products_are_exact_with_vnni_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use_processor(monkeypatch, "AVX512")
    assert has_exact_int8_products()
    use_processor(monkeypatch, "AVX512", _is_vnni_supported=False)
    assert not has_exact_int8_products()
    use_processor(monkeypatch, "AVX2")
    assert not has_exact_int8_products()


@pytest.mark.parametrize(
    ("capability", "has_bfloat16", "expected"),
    [
        ((9, 0), True, {"float16", "bfloat16"}),
        ((7, 5), False, {"float16"}),
        ((5, 2), False, set()),
    ],
)
def test_products_of_a_gpu(
    capability: tuple[int, int],
    has_bfloat16: bool,
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimpleNamespace(
        get_device_capability=lambda device: capability,
        is_bf16_supported=lambda including_emulation: has_bfloat16 or including_emulation,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    found = native_types.native_types("cuda").products
    assert found == {torch.float32, *(getattr(torch, name) for name in expected)}


def test_the_variables_of_torch_and_onednn_make_a_processor_old() -> None:
    code = "from rudolph.models.layers.native_types import *; print(native_types().products)"
    old = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **old}, capture_output=True
    )
    assert run.stdout.decode().strip() == "frozenset({torch.float32})", run.stderr
