"""The hardware flags of ``rudolph run``, each declared once with type, default, bound and help.

The command line is generated from them; ``runs.execution.Hardware`` checks their values.  Only the
standard library is imported, so that ``rudolph --help`` is printed at once.
"""

import argparse
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any


def _flag(default: Any, text: str, *, least: int | None = None) -> Any:
    """Return the field of a flag; ``text`` is its help and ``least`` its smallest legal value."""
    return field(default=default, metadata={"help": text, "least": least})


@dataclass(frozen=True)
class HardwareFlags:
    """Hardware flags of a run: recorded, but not part of its digest."""

    accelerator: str = _flag("auto", "auto, cpu, gpu, cuda or mps")
    devices: int | str = _flag(1, "a number, auto, -1 for all, or indices such as 0,1")
    num_nodes: int = _flag(1, "number of machines", least=1)
    strategy: str = _flag("auto", "auto, ddp, ddp_fork (Lightning) or fsdp2")
    precision: str | None = _flag(None, "32-true, bf16-mixed, ... (default: the machine's)")
    micro_batch_size: int | None = _flag(None, "examples per pass and device", least=1)
    num_workers: int = _flag(0, "data-loading processes", least=0)
    activation_checkpointing: bool = _flag(default=False, text="less memory, a third more time")
    block_masks: bool = _flag(default=False, text="FlexAttention (CUDA, no attention dropout)")
    compile: bool = _flag(default=False, text="compile the decoder's layers (no gain on a CPU)")


def option_of(name: str) -> str:
    """Return a flag as it is written on the command line.

    >>> option_of("micro_batch_size")
    '--micro-batch-size'
    """
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse._ActionsContainer, names: Collection[str] = ()) -> None:
    """Add the flags with these names to a parser; without names, add all."""
    for declared in fields(HardwareFlags):
        kind: dict[str, Any] = {"type": int if declared.type in (int, int | None) else str}
        if declared.type is bool:
            kind = {"action": "store_true"}
        if not names or declared.name in names:
            option, text = option_of(declared.name), declared.metadata["help"]
            parser.add_argument(option, default=declared.default, help=text, **kind)


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of all flags, keyed by name."""
    return {declared.name: getattr(args, declared.name) for declared in fields(HardwareFlags)}
