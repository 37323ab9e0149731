"""Decoding for any language model that returns the logits of the next position.

Shapes: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def most_likely(logits: Tensor, _: int) -> Tensor:
    """Return the most likely token ``(B,)`` of logits ``(B, V)``: greedy decoding."""
    return logits.argmax(-1)


def decode_tokens(
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    *,
    num_tokens: int,
    end_id: int | None = None,
    choose: Callable[[Tensor, int], Tensor] = most_likely,
) -> Tensor:
    """Decode token by token; return tokens ``(B, S)`` with S at most ``num_tokens``.

    Args:
        logits: Logits after the prompt, ``(B, V)``.
        step: Appends tokens ``(B, 1)`` and returns the logits ``(B, V)`` after them.
        num_tokens: Maximum number of new tokens.
        end_id: Id that ends a row and is then repeated; decoding stops when every row has ended.
        choose: Called with logits ``(B, V)`` and the position, from 0; returns tokens ``(B,)``.

    Raises:
        ValueError: If ``num_tokens`` is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    tokens = [choose(logits, 0)]
    while len(tokens) < num_tokens:
        if end_id is not None and bool((tokens[-1] == end_id).all()):
            break
        token = choose(step(tokens[-1][:, None]), len(tokens))
        if end_id is not None:
            token = torch.where(tokens[-1] == end_id, tokens[-1], token)
        tokens.append(token)
    return torch.stack(tokens, dim=1)


def at_last_token(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the vector ``(B, D)`` at each row's last token that is not padding.

    Args:
        x: Vectors ``(B, T, D)``.
        attention_mask: ``(B, T)``, nonzero at tokens; None for no padding.
    """
    if attention_mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=x.device)
    last = (attention_mask.bool() * positions).amax(1)
    return x[torch.arange(len(x), device=x.device), last]
