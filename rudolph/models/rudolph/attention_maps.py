"""Attention weights of one layer, which the fused kernels never store.

Shapes: B batch, T tokens, N heads, D hidden size, H head size.
"""

import torch
from torch import Tensor, nn

from rudolph.models.layers.attention import FullView
from rudolph.models.rudolph.decoder import Layer, MaskedDecoder


@torch.inference_mode()
def attention_weights(model: MaskedDecoder, tokens: Tensor, layer: int) -> Tensor:
    """Return the attention weights ``(B, N, T, T)`` of one layer in float32.

    Row t holds the weights of position t over all positions; they add up to 1.  With
    ``leading_bos``, position 0 is the extra ``BOS``.

    Args:
        model: the decoder.
        tokens: ``(B, T)``, a sequence or a prefix of one.
        layer: number of the layer, from 0.

    Raises:
        ValueError: if there is no such layer.
    """
    if not 0 <= layer < len(model.layers):
        raise ValueError(f"layer must be 0 to {len(model.layers) - 1}, got {layer}")
    chosen = model.layers[layer]
    assert isinstance(chosen, Layer)
    normalised: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        normalised.append(output)

    handle = chosen.attention_norm.register_forward_hook(keep)
    try:
        model.run_layers(tokens)
    finally:
        handle.remove()
    [x] = normalised  # (B, T, D)
    batch, length, _ = x.shape
    mask = model.layer_tables[layer][:length, :length]
    query, [key_value] = FullView(mask, batch).split(chosen.project_qkv(x))  # (B * N, T, H)
    scores = query.float() @ key_value.key.float().mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.view(batch, -1, length, length)
