"""Training of a decoder whose weights, gradients and optimizer states are sharded (FSDP2).

Each device keeps a part of every tensor and gathers one layer at a time.

Source: Zhao 2023 (arXiv:2304.11277); torch's ``fully_shard``.
"""

from typing import Any

from torch import nn

from rudolph.models.rudolph.decoder import MaskedDecoder


def shard_decoder(model: MaskedDecoder, mesh: Any) -> None:
    """Shard a decoder in place, layer by layer, over the devices of a one-dimensional mesh."""
    # These modules take a second to import, and few trainings need them.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Losses call ``hidden``; torch gathers the weights only in methods that are registered.
    register_fsdp_forward_method(model, "hidden")
    model.is_sharded = True


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is sharded."""
    return bool(getattr(model, "is_sharded", False))


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """Return all weights of a sharded model on the main process, and nothing on the others.

    Every process must call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
