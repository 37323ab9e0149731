"""Dropout from few random bits, for processors that draw random numbers one by one."""

import torch
from torch import Tensor
from torch.nn import functional as F

# A number of 16 bits decides for each element: shares are exact to 1 / 65536.
LEVELS = 2**16


def apply_dropout(x: Tensor, share: float) -> Tensor:
    """``x`` with this share of its elements set to 0, and the rest divided by 1 - ``share``.

    On the CPU a draw of 64 bits decides for four elements, which takes a third of the time of
    torch's own; it draws from torch's default generator too.
    """
    # What is compiled draws in its own way; a draw in place would cut it in pieces.
    is_usual = torch.compiler.is_compiling() or x.device.type != "cpu"
    if is_usual or not 0 < share < 1:
        return F.dropout(x, share)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)
    is_kept = numbers >= round(share * LEVELS) - LEVELS // 2
    return x * is_kept.to(x.dtype).mul_(1 / (1 - share))
