"""What is to be known of a reference package to read and write its checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class StoredMaskWarning(UserWarning):
    """A checkpoint's stored mask differs from the rule of its layers."""


class ReferenceCheckpoint(NamedTuple):
    """A checkpoint of a reference package: its constructor's arguments and its tensors."""

    family: str
    config: dict[str, Any]
    state_dict: dict[str, Tensor]


@dataclass(frozen=True)
class ReferenceFamily:
    """One reference package's model.

    Args:
        build: an empty module from the constructor's arguments; ``KeyError`` names a missing one.
        load: gives that module the tensors of a checkpoint, already unwrapped.
        holds: whether a module is of this family.
        config_of: the constructor's arguments of a module; ``ValueError`` where it has none.
        tensors_of: a module's tensors under the reference's names.
        keeps: whether a tensor of a checkpoint is the model's, not its trainer's.
    """

    build: Callable[[Mapping[str, Any]], nn.Module]
    load: Callable[[Any, Mapping[str, Tensor]], None]
    holds: Callable[[nn.Module], bool]
    config_of: Callable[[Any], dict[str, Any]]
    tensors_of: Callable[[Any], dict[str, Tensor]]
    keeps: Callable[[str], bool] = lambda key: True


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names, each read from ``tensors`` when it is asked for.

    Args:
        names: the name here -> the name in ``tensors``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """Tensors with ``prefix`` taken off where every name has it."""
    if not all(key.startswith(prefix) for key in tensors):
        return tensors
    return Renamed(tensors, {key.removeprefix(prefix): key for key in tensors})


def require(condition: bool, family: str, words: str) -> None:
    """``ValueError`` unless the reference can express what it is asked to."""
    if not condition:
        raise ValueError(f"{family}: the reference cannot express {words}")
