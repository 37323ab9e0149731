"""Model weights: writing, verifying, hashing and exact loading.

Modules are built on the meta device and adopt the tensors of a file.  Loading therefore needs no
memory beyond that of the file.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rudolph.files.atomic import DamagedFileError, naming_file, write_atomic


class _WithoutInitialization(TorchFunctionMode):
    """Mode in which the functions of ``torch.nn.init`` leave their tensor as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Methods of tensors have no module.
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Build modules that have shapes but no memory and no initial values.

    On the meta device, ``normal_`` and products such as ``scale * tensor`` compute nothing and yet
    import torch's compiler, which takes seconds.  Therefore initialisation is skipped here, and
    constructors scale their random tensors in place.
    """
    with torch.device("meta"), _WithoutInitialization():
        yield


def load_exactly(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    family: str,
    file_name_of: Callable[[str], str] = str,
) -> None:
    """Assign every tensor of a module; names and shapes must match exactly.

    A mapping that reads its file lazily is read one tensor at a time.

    Args:
        model: module to fill, possibly on the meta device.
        tensors: tensors, keyed by their names in ``model.state_dict()``.
        family: model family, for messages.
        file_name_of: maps a tensor's name in the model to its name in the file, for messages.

    Raises:
        ValueError: naming the first entry that is missing, unexpected, not a tensor, of another
            shape, or not floating-point.
    """
    # Keep only shapes and dtypes, so that replaced tensors are freed.
    expected = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    for key in expected:
        if key not in tensors:
            raise ValueError(f"{family}: the file lacks {file_name_of(key)}")
    for key in tensors:
        if key not in expected:
            raise ValueError(f"{family}: the file has {file_name_of(key)}, the model does not")
        value = tensors[key]
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{family}: {file_name_of(key)} must be a tensor, got {kind}")
        shape, dtype = expected[key]
        if value.shape != shape:
            raise ValueError(
                f"{family}: {file_name_of(key)} must be {tuple(shape)}, got {tuple(value.shape)}"
            )
        if dtype.is_floating_point and not value.is_floating_point():
            raise ValueError(
                f"{family}: {file_name_of(key)} must hold floating-point numbers, "
                f"got {value.dtype}"
            )
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        module.load_state_dict({name: value}, strict=False, assign=True)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors, atomically."""
    save_tensors(dict(model.state_dict()), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, atomically.

    Raises:
        OSError: naming the file, for example if the disk is full.
    """
    # Remove large temporary files of killed processes; no other process writes these weights.
    for leftover in path.parent.glob(f"{path.name}.*.new"):
        leftover.unlink(missing_ok=True)
    dense = {name: value.contiguous() for name, value in tensors.items()}
    write_atomic(path, lambda new: save_file(dense, new))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file.

    Raises:
        DamagedFileError: if the file is truncated, empty or not safetensors.
        OSError: naming the file, if it cannot be read.
    """
    try:
        # Open the file first: safetensors reports a folder as a missing device.
        with naming_file(path), path.open("rb"):
            return load_file(path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DamagedFileError(
            path, f"not a complete safetensors file: {_one_line(error)}"
        ) from error


def weights_error(path: Path, model: nn.Module | None = None) -> str:
    """Return an error message for a safetensors file, or "" if it is valid; read only its header.

    Args:
        path: safetensors file.
        model: module whose tensor names and shapes the file must match; None skips this check.
    """
    try:
        with naming_file(path), path.open("rb"), safe_open(path, "pt") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        return f"not a complete safetensors file: {_one_line(error)}"
    if model is None:
        return ""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            return f"{name}: expected {expected.get(name)}, got {shapes.get(name)}"
    return ""


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a module's tensor names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
