"""Reference checkpoints into this project's modules, and back.

A family says how the reference names its tensors and constructor arguments; nothing else differs,
so loading is renaming and ``to_reference(from_reference(...))`` is the same file again.

To add a family, write its ``ReferenceFamily`` and name it in ``FAMILIES``.

Source: the packages ``rudolph`` 0.0.1rc10, ``rudalle`` 1.1.3 and ``ruclip`` 0.0.2.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rudolph.models.reference.clip import RUCLIP
from rudolph.models.reference.decoders import RUDALLE, RUDOLPH
from rudolph.models.reference.family import ReferenceCheckpoint, ReferenceFamily
from rudolph.models.reference.upscaler import REALESRGAN
from rudolph.models.reference.vqgan import VQGAN_FAMILY


def empty_model(family: str, config: Mapping[str, Any]) -> nn.Module:
    """A module on the meta device from the reference constructor's arguments.

    Raises:
        ValueError: for an unknown family, or naming an argument that is missing.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    try:
        with torch.device("meta"):
            return FAMILIES[family].build(config)
    except KeyError as error:
        raise ValueError(f"{family}: the config lacks {error.args[0]}") from error


def from_reference(
    family: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> nn.Module:
    """A module of this project with the weights of a reference checkpoint.

    Args:
        family: ``rudolph``, ``rudalle``, ``vqgan``, ``ruclip`` or ``realesrgan``.
        config: the reference constructor's arguments.
        state_dict: the reference's tensors by its key names, as they are in its file: wrapped in
            ``state_dict``, ``params`` or ``params_ema``, or with Lightning's ``model.`` before
            each.  Masks that are stored win over the rules, and a difference is a warning.

    Raises:
        ValueError: for an unknown family, or naming the first tensor that is missing, not
            expected or of another shape.
    """
    model = empty_model(family, config)
    load_reference(model, family, unwrap_state_dict(state_dict))
    return model


def load_reference(model: nn.Module, family: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a module of ``empty_model`` the reference's tensors, already unwrapped.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    FAMILIES[family].load(model, tensors)


def to_reference(model: nn.Module) -> ReferenceCheckpoint:
    """The family, constructor arguments and tensors that the reference's package loads.

    Raises:
        ValueError: naming what the reference cannot express.
    """
    for name, family in FAMILIES.items():
        if family.holds(model):
            return ReferenceCheckpoint(name, family.config_of(model), family.tensors_of(model))
    raise ValueError(f"no reference package has a model like {type(model).__name__}")


def unwrap_state_dict(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors themselves, out of what trainers wrap around them."""
    # Bounded, since a file may hold itself.
    for _ in range(len(WRAPPINGS)):
        inner = [state_dict[name] for name in WRAPPINGS if name in state_dict]
        if not inner or not isinstance(inner[0], Mapping):
            break
        state_dict = inner[0]
    return state_dict


WRAPPINGS = ("params_ema", "params", "state_dict")
FAMILIES: dict[str, ReferenceFamily] = {
    "rudolph": RUDOLPH,
    "rudalle": RUDALLE,
    "vqgan": VQGAN_FAMILY,
    "ruclip": RUCLIP,
    "realesrgan": REALESRGAN,
}
