"""The interface of a reference family: what is needed to read and write its checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class StoredMaskWarning(UserWarning):
    """A warning that a checkpoint's stored mask differs from the rule of its layers."""


class ReferenceCheckpoint(NamedTuple):
    """A checkpoint of a reference package.

    Attributes:
        family: a key of ``REFERENCE_FAMILIES``.
        config: the reference constructor's arguments.
        state_dict: tensors under the reference's names.
    """

    family: str
    config: dict[str, Any]
    state_dict: dict[str, Tensor]


@dataclass(frozen=True)
class ReferenceFamily:
    """The conversion functions for one reference package's model.

    Attributes:
        build: returns an empty module for constructor arguments, or raises ``KeyError`` with the
            name of a missing argument.
        load: loads unwrapped tensors of a checkpoint into that module.
        matches: returns whether a module belongs to this family.
        config_of: returns a module's constructor arguments, or raises ``ValueError`` if the
            reference cannot express the module.
        tensors_of: returns a module's tensors under the reference's names.
        keeps: returns whether a tensor of a checkpoint belongs to the model, not to its trainer.
    """

    build: Callable[[Mapping[str, Any]], nn.Module]
    load: Callable[[Any, Mapping[str, Tensor]], None]
    matches: Callable[[nn.Module], bool]
    config_of: Callable[[Any], dict[str, Any]]
    tensors_of: Callable[[Any], dict[str, Tensor]]
    keeps: Callable[[str], bool] = lambda key: True


class Renamed(Mapping[str, Tensor]):
    """A read-only view of tensors under other names, which reads each tensor on access.

    Args:
        tensors: the underlying mapping.
        names: names in ``tensors``, keyed by new name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, key: str) -> Tensor:
        """Return the tensor of a new name."""
        return self.tensors[self.names[key]]

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the new names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.names)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """Remove ``prefix`` from all names; if some name lacks it, return the tensors unchanged."""
    if not all(key.startswith(prefix) for key in tensors):
        return tensors
    return Renamed(tensors, {key.removeprefix(prefix): key for key in tensors})


def require_expressible(condition: bool, family: str, words: str) -> None:
    """Raise ``ValueError`` unless ``condition`` holds.

    Args:
        condition: whether the reference can express the model.
        family: family to name in the error.
        words: description of the unsupported setting.
    """
    if not condition:
        raise ValueError(f"{family}: the reference cannot express {words}")
