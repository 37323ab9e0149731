"""How much memory a training will need, before anything is allocated.

Weights, gradients and the optimizer's state are counted.  Activations are those that a forward
pass on the meta device keeps for its backward pass, attention written out; a fused attention
kernel keeps less.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.training.losses import DecoderLossConfig
from rudolph.training.optim import OptimConfig, optimizer_bytes

FLOAT = 4


@dataclass(frozen=True)
class TrainingMemory:
    """Parameters, and bytes of each kind."""

    trainable: int
    total: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    model: MaskedDecoder,
    losses: DecoderLossConfig,
    optim: OptimConfig,
    *,
    micro_batch_size: int,
    activation_bytes: int = FLOAT,
) -> TrainingMemory:
    """The memory of training a model that was built on the meta device.

    Args:
        micro_batch_size: examples that pass through the model at once.
        activation_bytes: of a number, 2 where matrices are multiplied in half precision.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    kept = count_activation_bytes(model, losses, micro_batch_size)
    averaged = FLOAT * sum(sizes.values()) if optim.ema_decay is not None else 0
    return TrainingMemory(
        trainable=trainable,
        total=sum(sizes.values()),
        weights=FLOAT * sum(sizes.values()) + averaged,
        gradients=FLOAT * trainable,
        optimizer=optimizer_bytes(model, optim),
        activations=kept * activation_bytes // FLOAT,
    )


def count_activation_bytes(
    model: MaskedDecoder, losses: DecoderLossConfig, batch_size: int
) -> int:
    """Bytes in float32 that a forward pass keeps, each memory once, weights left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    tokens = torch.zeros(batch_size, model.layout.length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(tokens)
    vocabulary, lengths = model.vocabulary, model.layout.segment_lengths
    classes = (vocabulary.text_size, vocabulary.image_size, vocabulary.text_size)
    logits = sum(
        length * size
        for length, size, weight in zip(lengths, classes, losses.weights.values(), strict=True)
        if weight > 0
    )
    # Of each segment's logits their softmax is kept as well.
    return sum(seen.values()) + hidden.untyped_storage().nbytes() + 2 * FLOAT * batch_size * logits
