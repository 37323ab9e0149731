"""Comparison of a run's tokenizer and VQ-GAN with those of its initial weights."""

import torch

from rudolph.files.atomic import warn_once
from rudolph.models.vqgan.model import VQGAN
from rudolph.runs.execution import Execution
from rudolph.runs.resolve import find_tokenizer, open_vqgan
from rudolph.runs.stages.tokenizer import source_locations
from rudolph.sequence.tokenizer import Tokenizer

# The weights of a packed run are rounded to 16 bits.
RELATIVE_ROUNDING, ROUNDING = 2e-3, 1e-4


def warn_of_other_parts(execution: Execution, tokenizer: Tokenizer, vqgan: VQGAN) -> None:
    """Warn if the configured tokenizer or VQ-GAN differs from that of ``model.init``."""
    config = execution.config
    source = config.model.init
    if source is None:
        return
    locations = source_locations(execution)
    if config.tokenizer.path != source:
        original = Tokenizer(find_tokenizer(source, **locations))
        if original.digest != tokenizer.digest:
            named = config.tokenizer.path
            warn_once(f"tokenizer.path: {named} differs from the tokenizer of model.init {source}")
    if config.vqgan.init != source and not is_equal(vqgan, open_vqgan(source, **locations)):
        named = config.vqgan.init
        warn_once(f"vqgan.init: {named} differs from the VQ-GAN of model.init {source}")


def is_equal(first: VQGAN, second: VQGAN) -> bool:
    """Return whether two VQ-GANs have equal weights, up to the rounding of a packed run."""
    weights, other_weights = first.state_dict(), second.state_dict()
    if weights.keys() != other_weights.keys():
        return False
    pairs = [
        (value.float().cpu(), other_weights[name].float().cpu()) for name, value in weights.items()
    ]
    return all(
        value.shape == other_value.shape
        and torch.allclose(value, other_value, rtol=RELATIVE_ROUNDING, atol=ROUNDING)
        for value, other_value in pairs
    )
