"""A module's weights: written, named by digest, and loaded exactly.

Modules are built on the meta device and take the tensors of a file as they are, so loading needs
no memory but the file's own.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def load_exactly(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    family: str,
    their_name: Callable[[str], str] = str,
) -> None:
    """Assign every tensor of a module; none may be left, left over or of another shape.

    A mapping that reads its file lazily is read one tensor at a time.

    Args:
        their_name: what the file calls a tensor of the model, for messages.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    # Not the tensors themselves: what is replaced is freed.
    expected = {key: (own.shape, own.dtype) for key, own in model.state_dict().items()}
    for key in expected:
        if key not in tensors:
            raise ValueError(f"{family}: the file lacks {their_name(key)}")
    for key in tensors:
        if key not in expected:
            raise ValueError(f"{family}: the file has {their_name(key)}, the model has not")
        value = tensors[key]
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{family}: {their_name(key)} must be a tensor, got {kind}")
        shape, dtype = expected[key]
        if value.shape != shape:
            raise ValueError(
                f"{family}: {their_name(key)} must be {tuple(shape)}, got {tuple(value.shape)}"
            )
        if dtype != torch.bool and not value.is_floating_point():
            raise ValueError(
                f"{family}: {their_name(key)} must hold floating-point numbers, got {value.dtype}"
            )
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        module.load_state_dict({name: value}, strict=False, assign=True)


def save_weights(model: nn.Module, path: Path) -> None:
    """Weights as safetensors, whole or not at all."""
    new = path.with_suffix(".new")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, new)
    os.replace(new, path)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a module's tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
