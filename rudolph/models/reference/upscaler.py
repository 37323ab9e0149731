"""The Real-ESRGAN family: the reference's key names, which this project uses as well.

Source: rudalle, ``realesrgan/rrdbnet_arch.py``.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from rudolph.models.reference.family import ReferenceFamily
from rudolph.models.upscaler import Upscaler, UpscalerConfig
from rudolph.models.weights import load_exactly


def build_upscaler(config: Mapping[str, Any]) -> Upscaler:
    """Return an upscaler from Real-ESRGAN's constructor arguments.

    Raises:
        KeyError: if ``scale`` is missing.
    """
    names = {"num_feat": "num_channels", "num_block": "num_blocks", "num_grow_ch": "growth"}
    arguments = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return Upscaler(UpscalerConfig(scale=config["scale"], **arguments))


def load_reference_upscaler(model: Upscaler, tensors: Mapping[str, Tensor]) -> None:
    """Load Real-ESRGAN's tensors, whose names are this project's own.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    load_exactly(model, tensors, family="realesrgan")


def config_of_upscaler(model: Upscaler) -> dict[str, Any]:
    """Return Real-ESRGAN's constructor arguments for an upscaler."""
    fields = asdict(model.config)
    return {
        "num_in_ch": 3,
        "num_out_ch": 3,
        "scale": fields["scale"],
        "num_feat": fields["num_channels"],
        "num_block": fields["num_blocks"],
        "num_grow_ch": fields["growth"],
    }


REALESRGAN = ReferenceFamily(
    build=build_upscaler,
    load=load_reference_upscaler,
    matches=lambda model: isinstance(model, Upscaler),
    config_of=config_of_upscaler,
    tensors_of=lambda model: dict(model.state_dict()),
)
