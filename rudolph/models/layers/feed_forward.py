"""The feed-forward layer of Flamingo's resampler and gated blocks."""

from torch import nn


def feed_forward(width: int, ratio: int) -> nn.Sequential:
    """Return LayerNorm, a linear layer to ``ratio * width`` channels, GELU, a linear layer back.

    The linear layers have no bias.

    Source: flamingo-pytorch, ``flamingo_pytorch.py``, and open_flamingo, ``src/helpers.py``.
    """
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, ratio * width, bias=False),
        nn.GELU(),
        nn.Linear(ratio * width, width, bias=False),
    )
