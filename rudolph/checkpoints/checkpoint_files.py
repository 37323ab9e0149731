"""Checkpoint files of any age, read without executing anything that they hold.

Safetensors are read tensor by tensor; pickles through torch's unpickler for tensors alone, mapped
from the disk where their format allows it.
"""

import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Names that begin so are what trainers leave in a checkpoint beside its tensors.  They are read as
# ``IgnoredObject`` or ``IgnoredMapping``, so that nothing of their packages is imported or run.
TRAINERS = (
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "argparse."),
    *("pathlib.", "numpy.", "typing.Any", "collections.defaultdict"),
    *("builtins.dict", "builtins.list", "builtins.str", "builtins.int", "builtins.float"),
)
MAPPINGS = (".AttributeDict", ".defaultdict")
ZIP_START = b"PK\x03\x04"
# What torch's unpickler raises on a file that is cut off or made up.
UNREADABLE_ERRORS = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, LookupError, ValueError),
    *(AttributeError, TypeError, AssertionError, ArithmeticError, MemoryError, OSError),
)


class IgnoredObject:
    """Stands for an object of a trainer; it takes any arguments and any state, and keeps none."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        """Nothing."""

    def __setstate__(self, state: object) -> None:
        """Nothing."""


class IgnoredMapping:
    """Stands for a class of mappings; its objects are empty dicts, which take any items."""

    def __new__(cls, *arguments: object) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


class SafeFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file: Any = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: no whole safetensors file ({first_sentence(error)})"
            ) from error
        self.names = list(self.file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        try:
            tensor: Tensor = self.file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(
                f"{self.path}: cannot read {key} ({first_sentence(error)})"
            ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class ConvertedTensors(Mapping[str, Tensor]):
    """Tensors of another dtype or device; each is converted when it is asked for, masks are not.

    Args:
        dtype: of floating-point tensors; as they are when None.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tensors, self.dtype, self.device = tensors, dtype, device

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.tensors[key]
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(self.device, dtype or tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read_tensors(path: Path) -> Mapping[str, Any]:
    """What a checkpoint file holds: tensors by name, or a wrapping around them.

    Raises:
        ValueError: one line, when the file is missing, cut off, or holds what is no tensor.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return SafeFile(path)
    content = _read_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: must hold tensors by name, got {type(content).__name__}")
    return content


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START
    try:
        # Its warnings advise whoever writes checkpoints.
        with warnings.catch_warnings(action="ignore"), _stand_ins(path if is_zip else None):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNREADABLE_ERRORS as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            reason = f"refused, it asks to run {asked[1]}; nothing of it was run"
        elif isinstance(error, pickle.UnpicklingError):
            # Torch's words advise to load it all the same.
            reason = "no checkpoint of torch.save, or a damaged one"
        else:
            reason = (
                f"no whole checkpoint file ({type(error).__name__}: {first_sentence(error)[:160]})"
            )
        raise ValueError(f"{path}: {reason}") from error


def _stand_ins(path: Path | None) -> AbstractContextManager[Any]:
    """Where torch's unpickler reads what a zipped checkpoint names of ``TRAINERS`` as ignored."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if path else []
    pairs: Any = [
        (IgnoredMapping if name.endswith(MAPPINGS) else IgnoredObject, name)
        for name in names
        if name.startswith(TRAINERS)
    ]
    return torch.serialization.safe_globals(pairs)


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's words."""
    words = " ".join(str(error).split())
    return words.partition(". ")[0] or type(error).__name__
