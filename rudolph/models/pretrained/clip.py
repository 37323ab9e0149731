"""ruCLIP: OpenAI's key names, which are this project's own.

Source: ruclip 0.0.2, ``ruclip/model.py``; the fields of its ``config.json``.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from rudolph.models.clip import CLIP, CLIPConfig
from rudolph.models.pretrained.family import Family
from rudolph.models.weights import load_exactly


def build_clip(config: Mapping[str, Any]) -> CLIP:
    optional = {"eos_id"}
    names = [field.name for field in fields(CLIPConfig) if field.name not in optional]
    given = {name: config[name] for name in names}
    return CLIP(CLIPConfig(**given, eos_id=config.get("eos_id", 3)))


def load_clip(model: CLIP, tensors: Mapping[str, Tensor]) -> None:
    load_exactly(model, tensors, family="ruclip")


RUCLIP = Family(
    build=build_clip,
    load=load_clip,
    holds=lambda model: isinstance(model, CLIP),
    config_of=lambda model: asdict(model.config),
    tensors_of=lambda model: dict(model.state_dict()),
)
