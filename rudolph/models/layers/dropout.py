"""Dropout from few random bits, for processors that generate random numbers sequentially."""

import torch
from torch import Tensor
from torch.nn import functional as F

# One 16-bit number decides each element, so probabilities are exact to 1 / 65536.
LEVELS = 2**16


def apply_dropout(x: Tensor, p: float) -> Tensor:
    """Set random elements of ``x`` to 0 and divide the rest by 1 - ``p``.

    On the CPU, one 64-bit random number decides four elements, which takes a third of the time of
    torch's own dropout.  Both use torch's default generator.

    Args:
        x: tensor of any shape.
        p: dropout probability in [0, 1].
    """
    # Compiled code has its own random numbers, and an in-place ``random_`` would break the graph.
    uses_torch = torch.compiler.is_compiling() or x.device.type != "cpu"
    if uses_torch or not 0 < p < 1:
        return F.dropout(x, p)
    random_words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    random_levels = random_words.view(torch.int16)[: x.numel()].view(x.shape)
    is_kept = random_levels >= round(p * LEVELS) - LEVELS // 2
    return x * is_kept.to(x.dtype).mul_(1 / (1 - p))
