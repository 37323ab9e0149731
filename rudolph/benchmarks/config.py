"""Configuration of a speed experiment: its workloads and their implementations.

To add an implementation, name it in ``WORKLOADS`` and map it to a class in
``worker.IMPLEMENTATIONS``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from rudolph.files.constraints import Bounds, Count, check
from rudolph.models.layers.native_types import has_native_bfloat16

# Only these are our own code; the others are third-party packages and the machine's limits.
WEIGHT_DTYPES = ("float32", "half", "int8")
COMPILED = tuple(f"compiled_{weights}" for weights in WEIGHT_DTYPES)
OURS = (*WEIGHT_DTYPES, *COMPILED, "bfloat16")
REFERENCE, ROOFLINE, TRANSFORMERS = "reference", "roofline", "transformers"
# Without native bfloat16 products, timing these would time an emulation.
NEEDS_NATIVE_BFLOAT16 = ("bfloat16",)
ROOFLINE_UNITS = {"read": "byte", "bfloat16": "operation", "packed": "operation"} | {
    "float32": "operation"
}
ROOFLINE_BFLOAT16_PARTS = ("bfloat16", "packed")
# Environment variables that make torch, oneDNN and fbgemm use older instructions.
INSTRUCTION_SET_VARIABLES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
DECODERS = (REFERENCE, TRANSFORMERS, *WEIGHT_DTYPES, *COMPILED)


@dataclass(frozen=True)
class Workload:
    """A task that implementations are timed on.

    Attributes:
        implementations: The implementations that support it.
        units: The unit in which each part of the work is counted, such as ``{"decode": "token"}``.
    """

    implementations: tuple[str, ...]
    units: Mapping[str, str]

    def units_of(self, implementation: str, *, has_bfloat16: bool) -> Mapping[str, str]:
        """Return the unit of each part of an implementation's work, keyed by part.

        The roofline (the machine's limits) has its own parts. Its bfloat16 parts are included only
        if ``has_bfloat16`` is true.
        """
        if implementation != ROOFLINE:
            return self.units
        skipped = () if has_bfloat16 else ROOFLINE_BFLOAT16_PARTS
        return {part: unit for part, unit in ROOFLINE_UNITS.items() if part not in skipped}


WORKLOADS = {
    "decode": Workload((ROOFLINE, *DECODERS), {"decode": "token"}),
    "train": Workload((ROOFLINE, REFERENCE, "float32", "bfloat16"), {"train": "token"}),
    "vqgan": Workload(
        (ROOFLINE, REFERENCE, "float32", "bfloat16"),
        {"encode": "image", "decode": "image", "train": "image"},
    ),
    "upscaler": Workload((ROOFLINE, REFERENCE, "float32", "bfloat16"), {"upscale": "image"}),
    "pipeline": Workload((REFERENCE, *WEIGHT_DTYPES, *COMPILED), {"pipeline": "image"}),
    "memory": Workload(DECODERS, {"load": "load", "decode": "token"}),
}


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of a speed experiment; with ``workload: null`` the run is an ordinary one.

    Each implementation runs on the CPU in its own process. All of them finish repetition
    k before any starts repetition k + 1.

    Attributes:
        workload: A name in ``WORKLOADS``, or null.
        implementations: The implementations that do the same work in turn.
        batch_size: Images or sequences per batch.
        num_tokens: Tokens to sample per image in ``decode`` and ``memory``; null samples them all.
        num_repetitions: Timed repetitions per implementation.
        roofline_bytes: Bytes of the tensor whose sum measures the memory bandwidth.
        roofline_side: Side of the square matrices whose product measures the arithmetic limit.
        instruction_set: ``avx2`` limits every implementation to the AVX2 instructions that most
            laptops have; null allows all instructions of the processor.

    Raises:
        ValueError: If a setting is out of range or does not fit the workload.
    """

    workload: Literal["decode", "train", "vqgan", "upscaler", "pipeline", "memory"] | None = None
    implementations: tuple[str, ...] = ()
    batch_size: Count = 1
    num_tokens: Count | None = None
    num_repetitions: Count = 5
    roofline_bytes: Annotated[int, Bounds(ge=8)] = 2**29
    roofline_side: Count = 4096
    instruction_set: Literal["avx2"] | None = None

    @property
    def has_bfloat16(self) -> bool:
        """Return whether implementations multiply bfloat16 natively."""
        return self.instruction_set is None and has_native_bfloat16()

    @property
    def measurable_implementations(self) -> tuple[str, ...]:
        """Return the implementations, except those that would time an emulation of bfloat16."""
        skipped = () if self.has_bfloat16 else NEEDS_NATIVE_BFLOAT16
        return tuple(name for name in self.implementations if name not in skipped)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self)
        self._check_implementations()
        if self.num_tokens is not None and self.workload not in (None, "decode", "memory"):
            raise ValueError(f"num_tokens must be null for {self.workload}, got {self.num_tokens}")

    def _check_implementations(self) -> None:
        legal = WORKLOADS[self.workload].implementations if self.workload is not None else ()
        if self.workload is None and self.implementations:
            raise ValueError(
                "implementations must be empty when workload is null, "
                f"got {list(self.implementations)}"
            )
        if self.workload is not None and not self.implementations:
            raise ValueError(f"implementations must be some of {', '.join(legal)}, got none")
        for name in self.implementations:
            if name not in legal:
                raise ValueError(f"implementations must be of {', '.join(legal)}, got {name!r}")
        if len(set(self.implementations)) < len(self.implementations):
            raise ValueError(f"implementations must differ, got {list(self.implementations)}")
