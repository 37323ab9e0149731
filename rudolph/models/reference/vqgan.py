"""The family of Sber's VQ-GAN, with the plain and with the wavelet decoder.

Its YAML and key names are those of taming-transformers.  The wavelet decoder and the 1x1
convolution before it are both nested under ``model.decoder``.

Source: rudalle, ``vae/model.py`` and ``vae/decoder_dwt.py``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rudolph.models.reference.family import ReferenceFamily, Renamed, require_expressible
from rudolph.models.vqgan.model import VQGAN, VQGANConfig, haar_filters
from rudolph.models.vqgan.quantizers import QuantizerConfig
from rudolph.models.weights import load_exactly

TRAINING_ONLY = ("loss.", "model.loss.")
HIDDEN = ("decoder.decoder.", "decoder.post_quant_conv.")
WAVELET_BUFFERS = ("g0_col", "g0_row", "g1_col", "g1_row")


def build_vqgan(config: Mapping[str, Any]) -> VQGAN:
    """Return a VQ-GAN from the reference's YAML, plus ``dwt`` for the wavelet decoder.

    Raises:
        KeyError: naming a missing argument.
    """
    params = config["model"]["params"]
    shape = params["ddconfig"]
    return VQGAN(
        VQGANConfig(
            resolution=shape["resolution"],
            channels=tuple(shape["ch"] * factor for factor in shape["ch_mult"]),
            num_res_blocks=shape["num_res_blocks"],
            attention_resolutions=tuple(shape["attn_resolutions"]),
            z_channels=shape["z_channels"],
            dropout=shape.get("dropout", 0.0),
            wavelet=config.get("dwt", False),
            quantizer=QuantizerConfig(
                "gumbel", params["n_embed"], params["embed_dim"], kl_weight=params["kl_weight"]
            ),
        )
    )


def load_reference_vqgan(model: VQGAN, tensors: Mapping[str, Tensor]) -> None:
    """Load the reference's tensors, without the loss network and the wavelet constants.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    has_wavelet = model.config.wavelet
    kept = [key for key in tensors if not _is_left_out(key, has_wavelet=has_wavelet)]
    names = {_our_name(key, has_wavelet=has_wavelet): key for key in kept}
    load_exactly(
        model,
        Renamed(tensors, names),
        family="vqgan",
        file_name_of=lambda name: _their_name(name, has_wavelet=has_wavelet),
    )


def _is_left_out(key: str, *, has_wavelet: bool) -> bool:
    """Return whether a tensor belongs only to training or is a constant of the wavelet."""
    return key.startswith(TRAINING_ONLY) or (has_wavelet and ".idwt." in key)


def _our_name(key: str, *, has_wavelet: bool) -> str:
    name = key.removeprefix("model.")
    if not has_wavelet:
        return name
    if name.startswith("post_quant_conv."):
        return f"unused_{name}"
    return name.removeprefix("decoder.") if name.startswith(HIDDEN) else name


def _their_name(name: str, *, has_wavelet: bool) -> str:
    if has_wavelet and name.startswith("unused_"):
        return f"model.{name.removeprefix('unused_')}"
    if has_wavelet and name.startswith(("decoder.", "post_quant_conv.")):
        return f"model.decoder.{name}"
    return f"model.{name}"


def tensors_of_vqgan(model: VQGAN) -> dict[str, Tensor]:
    """Return the tensors of a VQ-GAN under the reference's names, wavelet constants included."""
    has_wavelet = model.config.wavelet
    tensors = {
        _their_name(name, has_wavelet=has_wavelet): value
        for name, value in model.state_dict().items()
    }
    if has_wavelet:
        low, high = haar_filters()
        for name in WAVELET_BUFFERS:
            values = low if name.startswith("g0") else high
            shape = (1, 1, 2, 1) if name.endswith("col") else (1, 1, 1, 2)
            tensors[f"model.decoder.idwt.{name}"] = values.to(model.post_quant_conv.weight).view(
                shape
            )
    return tensors


def config_of_vqgan(model: VQGAN) -> dict[str, Any]:
    """Return the reference's YAML content for a VQ-GAN.

    Raises:
        ValueError: naming a setting that the reference cannot express.
    """
    config, quantizer = model.config, model.config.quantizer
    require_expressible(quantizer.kind == "gumbel", "vqgan", f"a {quantizer.kind} quantizer")
    require_expressible(
        config.norm_groups == 32, "vqgan", f"{config.norm_groups} groups in its norms"
    )
    first = config.channels[0]
    is_multiple = all(size % first == 0 for size in config.channels)
    require_expressible(is_multiple, "vqgan", f"channels that are no multiples of {first}")
    shape = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": config.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": first,
        "ch_mult": [size // first for size in config.channels],
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
    }
    params = {
        "ddconfig": shape,
        "embed_dim": quantizer.embedding_dim,
        "n_embed": quantizer.num_codes,
        "kl_weight": quantizer.kl_weight,
    }
    return {"dwt": config.wavelet, "model": {"params": params}}


VQGAN_FAMILY = ReferenceFamily(
    build=build_vqgan,
    load=load_reference_vqgan,
    matches=lambda model: isinstance(model, VQGAN),
    config_of=config_of_vqgan,
    tensors_of=tensors_of_vqgan,
    keeps=lambda key: not key.startswith(TRAINING_ONLY),
)
