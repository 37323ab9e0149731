"""Read checkpoint files of any age without executing any code that they contain.

Safetensors are read tensor by tensor.  Pickles are read by torch's unpickler restricted to
tensors, and memory-mapped if their format allows it.
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

# Prefixes of the classes that trainers store in a checkpoint besides tensors.  They are read as
# ``IgnoredObject`` or ``IgnoredMapping``, so that none of their packages is imported or run.
IGNORED_PREFIXES = (
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "argparse."),
    *("pathlib.", "numpy.", "typing.Any", "collections.defaultdict"),
    *("builtins.dict", "builtins.list", "builtins.str", "builtins.int", "builtins.float"),
)
IGNORED_MAPPING_SUFFIXES = (".AttributeDict", ".defaultdict")
ZIP_START = b"PK\x03\x04"
# Torch's unpickler raises these on a truncated or forged file.
UNREADABLE_FILE_ERRORS = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, LookupError, ValueError),
    *(AttributeError, TypeError, AssertionError, ArithmeticError, MemoryError, OSError),
)


class IgnoredObject:
    """A stand-in for a trainer's object; it accepts any arguments and state, and keeps none."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        """Ignore all arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class IgnoredMapping:
    """A stand-in for a mapping class; its instances are empty dicts, which accept any items."""

    def __new__(cls, *arguments: object) -> dict[Any, Any]:  # type: ignore[misc]
        """Return an empty dict, ignoring all arguments."""
        return {}


class SafeFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read on access.

    Raises:
        ValueError: if the file is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file: Any = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: not a complete safetensors file ({first_sentence(error)})"
            ) from error
        self.names = list(self.file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: if the file has no such tensor.
            ValueError: if the tensor cannot be read.
        """
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
        """Iterate over the names of the tensors."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.names)


class ConvertedTensors(Mapping[str, Tensor]):
    """Tensors that are converted to another dtype or device on access.

    Integer and bool tensors, such as masks, keep their dtype.

    Args:
        tensors: the original tensors by name.
        dtype: the dtype of floating-point tensors; None keeps theirs.
        device: the device of all tensors.
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
        """Return one tensor, converted."""
        tensor = self.tensors[key]
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(self.device, dtype or tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.tensors)


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint file: tensors by name, or a mapping that wraps them.

    Raises:
        ValueError: if the file is missing, truncated, or contains objects other than tensors; the
            message is one line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return SafeFile(path)
    content = _read_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected tensors by name, got {type(content).__name__}")
    return content


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START
    try:
        # Torch's warnings address the authors of checkpoints, not their readers.
        with warnings.catch_warnings(action="ignore"), _stand_ins(path if is_zip else None):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNREADABLE_FILE_ERRORS as error:
        refused_global = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused_global:
            reason = f"refused because it would run {refused_global[1]}. Nothing was run"
        elif isinstance(error, pickle.UnpicklingError):
            # Torch's own message advises loading the file anyway.
            reason = "not a checkpoint of torch.save, or damaged"
        else:
            reason = f"not a complete checkpoint file ({type(error).__name__}: "
            reason += f"{first_sentence(error)[:160]})"
        raise ValueError(f"{path}: {reason}") from error


def _stand_ins(path: Path | None) -> AbstractContextManager[Any]:
    """Return a context in which torch's unpickler ignores objects of ``IGNORED_PREFIXES``.

    Args:
        path: a zipped checkpoint; None for other formats, where nothing is replaced.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if path else []
    pairs: Any = [
        (IgnoredMapping if name.endswith(IGNORED_MAPPING_SUFFIXES) else IgnoredObject, name)
        for name in names
        if name.startswith(IGNORED_PREFIXES)
    ]
    return torch.serialization.safe_globals(pairs)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, or the error's type if that is empty."""
    words = " ".join(str(error).split())
    return words.partition(". ")[0] or type(error).__name__
