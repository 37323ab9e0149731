"""Conversion between reference checkpoints and this project's modules, in both directions.

The *reference* of a model is its published package.  A *family* defines how the reference names
tensors and constructor arguments; nothing else differs.  Loading is therefore renaming, and
``to_reference(from_reference(...))`` reproduces the file.

To add a family, write its ``ReferenceFamily`` and list it in ``REFERENCE_FAMILIES``.

Source: the packages ``rudolph`` 0.0.1rc10, ``rudalle`` 1.1.3 and ``ruclip`` 0.0.2; for language
models and LLaVA ``transformers`` 5.24; ``flamingo-pytorch`` 0.1.2, ``vit-pytorch`` 1.26 and
``open_flamingo`` 2.0.1; ``diffusers`` 0.42.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rudolph.models.reference.clip import RUCLIP
from rudolph.models.reference.decoders import RUDALLE, RUDOLPH
from rudolph.models.reference.family import ReferenceCheckpoint, ReferenceFamily
from rudolph.models.reference.flamingo import FLAMINGO, OPEN_FLAMINGO_BLOCK
from rudolph.models.reference.kl_autoencoder import KL_AUTOENCODER
from rudolph.models.reference.language_model import LLAMA
from rudolph.models.reference.llava import LLAVA, LLAVA_NEXT
from rudolph.models.reference.upscaler import REALESRGAN
from rudolph.models.reference.vqgan import VQGAN_FAMILY
from rudolph.models.weights import meta_device


def empty_model(family: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a module on the meta device, built from the reference constructor's arguments.

    Args:
        family: a key of ``REFERENCE_FAMILIES``.
        config: the reference constructor's arguments.

    Raises:
        ValueError: if the family is unknown or an argument is missing.
    """
    if family not in REFERENCE_FAMILIES:
        raise ValueError(f"family must be one of {', '.join(REFERENCE_FAMILIES)}, got {family!r}")
    try:
        with meta_device():
            return REFERENCE_FAMILIES[family].build(config)
    except KeyError as error:
        raise ValueError(f"{family}: the config lacks {error.args[0]}") from error


def from_reference(
    family: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> nn.Module:
    """Return a module of this project with the weights of a reference checkpoint.

    Stored masks override the mask rules; if they differ, a ``StoredMaskWarning`` is issued.

    Args:
        family: one of ``REFERENCE_FAMILIES``.
        config: the reference constructor's arguments.
        state_dict: the reference's tensors by key, as in its file.  They may be wrapped in
            ``state_dict``, ``params`` or ``params_ema``, or have Lightning's ``model.`` prefix.

    Raises:
        ValueError: if the family is unknown, or if a tensor is missing, unexpected or of another
            shape; the message names the first such tensor.
    """
    model = empty_model(family, config)
    load_reference(model, family, unwrap_state_dict(state_dict))
    return model


def load_reference(model: nn.Module, family: str, tensors: Mapping[str, Tensor]) -> None:
    """Load the reference's unwrapped tensors into a module that ``empty_model`` returned.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    REFERENCE_FAMILIES[family].load(model, tensors)


def to_reference(model: nn.Module) -> ReferenceCheckpoint:
    """Return the family, constructor arguments and tensors for the reference's package.

    Raises:
        ValueError: naming what the reference cannot express.
    """
    for name, family in REFERENCE_FAMILIES.items():
        if family.matches(model):
            return ReferenceCheckpoint(name, family.config_of(model), family.tensors_of(model))
    raise ValueError(f"no reference package has a model like {type(model).__name__}")


def unwrap_state_dict(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the tensors inside the dictionaries that trainers wrap around them."""
    # The loop is bounded, because a damaged file may nest itself.
    for _ in range(len(WRAPPINGS)):
        inner = [state_dict[name] for name in WRAPPINGS if name in state_dict]
        if not inner or not isinstance(inner[0], Mapping):
            break
        state_dict = inner[0]
    return state_dict


WRAPPINGS = ("params_ema", "params", "state_dict")
REFERENCE_FAMILIES: dict[str, ReferenceFamily] = {
    "rudolph": RUDOLPH,
    "rudalle": RUDALLE,
    "vqgan": VQGAN_FAMILY,
    "ruclip": RUCLIP,
    "realesrgan": REALESRGAN,
    "llama": LLAMA,
    "flamingo": FLAMINGO,
    "open_flamingo_block": OPEN_FLAMINGO_BLOCK,
    "kl_autoencoder": KL_AUTOENCODER,
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
}
