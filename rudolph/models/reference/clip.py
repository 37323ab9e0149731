"""The ruCLIP family: OpenAI's key names, which this project uses as well.

Source: ruclip 0.0.2, ``ruclip/model.py``; the fields of its ``config.json``.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from rudolph.models.reference.family import ReferenceFamily
from rudolph.models.vision.clip import CLIP, CLIPConfig
from rudolph.models.weights import load_exactly


def build_clip(config: Mapping[str, Any]) -> CLIP:
    """Return a CLIP from ruCLIP's constructor arguments.

    Raises:
        KeyError: naming a missing argument.
    """
    optional = {"eos_id": 3, "has_logit_bias": False}
    names = [field.name for field in fields(CLIPConfig) if field.name not in optional]
    arguments = {name: config[name] for name in names}
    arguments |= {name: config.get(name, default) for name, default in optional.items()}
    return CLIP(CLIPConfig(**arguments))


def load_clip(model: CLIP, tensors: Mapping[str, Tensor]) -> None:
    """Load ruCLIP's tensors, whose names are this project's own.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    load_exactly(model, tensors, family="ruclip")


def config_of_clip(model: CLIP) -> dict[str, Any]:
    """Return ruCLIP's constructor arguments for a CLIP."""
    arguments = asdict(model.config)
    # ruclip's constructor lacks this argument.  For a CLIP with a bias, the argument is kept, so
    # that ruclip rejects the model instead of computing it wrongly.
    if not model.config.has_logit_bias:
        del arguments["has_logit_bias"]
    return arguments


RUCLIP = ReferenceFamily(
    build=build_clip,
    load=load_clip,
    matches=lambda model: isinstance(model, CLIP),
    config_of=config_of_clip,
    tensors_of=lambda model: dict(model.state_dict()),
)
