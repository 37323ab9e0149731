"""Estimate of the memory that a training needs, before anything is allocated.

The estimate adds weights, gradients, optimizer state and activations.  To estimate activations, a
forward pass runs on the meta device with unfused attention.  The activations are the tensors that
it saves for the backward pass.  A fused attention kernel saves fewer tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.training.losses import DecoderLossConfig
from rudolph.training.optim import OptimConfig, optimizer_bytes

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class TrainingMemory:
    """Numbers of parameters, and the memory of each kind in bytes."""

    trainable: int
    total: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def bytes(self) -> int:
        """The total memory in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    model: MaskedDecoder,
    losses: DecoderLossConfig,
    optim: OptimConfig,
    *,
    micro_batch_size: int,
    activation_bytes: int = FLOAT32_BYTES,
) -> TrainingMemory:
    """Estimate the memory of training a model that was built on the meta device.

    Args:
        model: the decoder, on the meta device.
        losses: the losses, whose weights decide which logits are computed.
        optim: the optimizer settings.
        micro_batch_size: examples per forward pass.
        activation_bytes: bytes per activation element; 2 with half-precision matrix products.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained_parameters)
    num_bytes = count_activation_bytes(model, losses, micro_batch_size)
    ema_bytes = FLOAT32_BYTES * sum(sizes.values()) if optim.ema_decay is not None else 0
    return TrainingMemory(
        trainable=trainable,
        total=sum(sizes.values()),
        weights=FLOAT32_BYTES * sum(sizes.values()) + ema_bytes,
        gradients=FLOAT32_BYTES * trainable,
        optimizer=optimizer_bytes(model, optim),
        activations=num_bytes * activation_bytes // FLOAT32_BYTES,
    )


def count_activation_bytes(
    model: MaskedDecoder, losses: DecoderLossConfig, batch_size: int
) -> int:
    """Count the bytes that a float32 forward pass saves, each storage once, weights excluded."""
    weight_storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved_bytes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weight_storages:
            saved_bytes[storage._cdata] = storage.nbytes()
        return tensor

    tokens = torch.zeros(batch_size, model.layout.length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        hidden = model.hidden(tokens)
    vocabulary, lengths = model.vocabulary, model.layout.segment_lengths
    num_classes = (vocabulary.text_size, vocabulary.image_size, vocabulary.text_size)
    logits = sum(
        length * size
        for length, size, weight in zip(lengths, num_classes, losses.weights.values(), strict=True)
        if weight > 0
    )
    # Both the logits of each segment and their softmax are saved.
    return (
        sum(saved_bytes.values())
        + hidden.untyped_storage().nbytes()
        + 2 * FLOAT32_BYTES * batch_size * logits
    )
