"""Checkpoint files of any age, read without executing anything that they hold.

Safetensors are read tensor by tensor; pickles through torch's unpickler for tensors alone, mapped
from the disk where their format allows it.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What trainers leave in a checkpoint beside its tensors.  Objects of these packages are read as
# ``Ignored``, so that nothing of the packages is run.
TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "argparse.")
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError)


class Ignored:
    """Stands for an object of a trainer; it takes any arguments and any state, and keeps none."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        """Nothing."""

    def __setstate__(self, state: object) -> None:
        """Nothing."""

    def __hash__(self) -> int:
        return id(self)


class SafeFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file: Any = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no whole safetensors file ({one_line(error)})") from error
        self.names = list(self.file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        tensor: Tensor = self.file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Converted(Mapping[str, Tensor]):
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
    is_zip = zipfile.is_zipfile(path)
    strange = _strange_globals(path) if is_zip else []
    for name in strange:
        if not name.startswith(TRAINERS):
            raise ValueError(f"{path}: refused, it asks to run {name}; nothing of it was run")
    stand_ins: Any = [(Ignored, name) for name in strange]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNREADABLE as error:
        reason = one_line(error)
        if "GLOBAL" in reason or "Unsupported" in reason:
            raise ValueError(
                f"{path}: refused, it holds more than tensors; nothing of it was run"
            ) from error
        raise ValueError(f"{path}: no whole checkpoint file ({reason[:160]})") from error


def _strange_globals(path: Path) -> list[str]:
    """Names of what a pickle wants to import beyond what tensors need."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except UNREADABLE as error:
        reason = one_line(error)[:160]
        raise ValueError(f"{path}: no whole checkpoint file ({reason})") from error


def one_line(error: BaseException) -> str:
    """The first sentence of an error's words."""
    words = " ".join(str(error).split())
    return words.partition(". ")[0] or type(error).__name__
