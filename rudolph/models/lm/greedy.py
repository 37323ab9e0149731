"""Greedy decoding of any model that gives the logits of one position after another.

Shapes: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def decode_greedily(
    logits: Tensor, step: Callable[[Tensor], Tensor], *, num_tokens: int, end_id: int | None = None
) -> Tensor:
    """Return the most likely next token, step by step: ``(B, S)`` with S at most ``num_tokens``.

    Args:
        logits: ``(B, V)``, those after the prompt.
        step: appends tokens ``(B, 1)`` and returns the logits ``(B, V)`` after them.
        end_id: a row that reached it repeats it; decoding stops when every row has.

    Raises:
        ValueError: when ``num_tokens`` is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    tokens = [logits.argmax(-1)]
    while len(tokens) < num_tokens:
        if end_id is not None and bool((tokens[-1] == end_id).all()):
            break
        token = step(tokens[-1][:, None]).argmax(-1)
        if end_id is not None:
            token = torch.where(tokens[-1] == end_id, tokens[-1], token)
        tokens.append(token)
    return torch.stack(tokens, dim=1)


def at_last_token(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return ``(B, D)``: the vector of each row's last token that is no padding.

    Args:
        x: ``(B, T, D)``.
        attention_mask: ``(B, T)``, nonzero at tokens; None for no padding.
    """
    if attention_mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=x.device)
    last = (attention_mask.bool() * positions).amax(1)
    return x[torch.arange(len(x), device=x.device), last]
