"""Compare the tokenizer and the VQ-GAN of a run with those of its initial weights."""

import torch

from rudolph.files.atomic import warn_once
from rudolph.models.vqgan.model import VQGAN
from rudolph.runs.execution import Execution
from rudolph.runs.resolve import find_tokenizer, open_vqgan
from rudolph.runs.stages.tokenizer import source_locations
from rudolph.sequence.tokenizer import Tokenizer

# Weights of a packed run differ from the trained ones by the rounding to 16 bits.
RELATIVE_ROUNDING, ROUNDING = 2e-3, 1e-4


def warn_of_other_parts(execution: Execution, tokenizer: Tokenizer, vqgan: VQGAN) -> None:
    """Warn of a named tokenizer or VQ-GAN that ``model.init`` was not trained with."""
    config = execution.config
    source = config.model.init
    if source is None:
        return
    place = source_locations(execution)
    if config.tokenizer.path != source:
        own = Tokenizer(find_tokenizer(source, **place))
        if own.digest != tokenizer.digest:
            named = config.tokenizer.path
            warn_once(f"tokenizer.path: {named} differs from the tokenizer of model.init {source}")
    if config.vqgan.init != source and not is_equal(vqgan, open_vqgan(source, **place)):
        named = config.vqgan.init
        warn_once(f"vqgan.init: {named} differs from the VQ-GAN of model.init {source}")


def is_equal(first: VQGAN, second: VQGAN) -> bool:
    """Return whether two VQ-GANs have the same weights up to the rounding of a packed run."""
    weights, others = first.state_dict(), second.state_dict()
    if weights.keys() != others.keys():
        return False
    pairs = [(value.float().cpu(), others[name].float().cpu()) for name, value in weights.items()]
    return all(
        own.shape == other.shape
        and torch.allclose(own, other, rtol=RELATIVE_ROUNDING, atol=ROUNDING)
        for own, other in pairs
    )
