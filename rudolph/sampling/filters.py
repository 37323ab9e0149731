"""Which next tokens may be drawn, and the draw.

The order is fixed: temperature, then top-k, then top-p, as in ru-dolph and LlamaGen.  Other
repositories filter in other orders, so their top-p numbers are not comparable with these.

Shapes: B batch, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GUIDANCE_KINDS = ("extrapolation", "mixture")


@dataclass(frozen=True)
class TokenSamplingConfig:
    """How a next token is drawn.  ``None`` turns a filter off; 0 is an error, not "off".

    ``guidance`` is the number of its kind: for ``extrapolation`` the scale s of classifier-free
    guidance, ``u + s (c - u)`` on logits; for ``mixture`` the weight w of the unconditional
    distribution in ru-dolph's ``(1 - w) c + w u``.  Greedy decoding is ``top_k`` 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None
    guidance_kind: str = "extrapolation"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be above 0 (greedy is top_k 1), got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or null, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or null, got {self.top_p}")
        if self.guidance is not None and self.guidance < 0:
            raise ValueError(f"guidance must be at least 0 or null, got {self.guidance}")
        if self.guidance_kind not in GUIDANCE_KINDS:
            raise ValueError(
                f"guidance_kind must be one of {', '.join(GUIDANCE_KINDS)}, "
                f"got {self.guidance_kind!r}"
            )
        if self.guidance_kind == "mixture" and (self.guidance or 0) > 1:
            raise ValueError(f"guidance must be at most 1 for a mixture, got {self.guidance}")


def filter_logits(logits: Tensor, config: TokenSamplingConfig) -> Tensor:
    """Logits ``(B, V)`` over temperature, with what may not be drawn at minus infinity."""
    logits = logits / config.temperature
    top_k, top_p = min(config.top_k or logits.shape[-1], logits.shape[-1]), config.top_p or 1.0
    if top_k == logits.shape[-1] and top_p == 1:
        return logits
    # Sorted once, and no more of it than top-k leaves to top-p.
    values, kept = logits.topk(top_k)
    if top_p < 1:
        shares = values.softmax(-1)
        # The token that crosses top_p is kept: what counts is the mass before it.
        values = values.masked_fill(shares.cumsum(-1) - shares > top_p, -torch.inf)
    # Scatter, not compare with the k-th value: ties would keep more than k.
    return torch.full_like(logits, -torch.inf).scatter_(-1, kept, values)


def next_shares(
    logits: Tensor, config: TokenSamplingConfig, unconditional: Tensor | None = None
) -> Tensor:
    """The distribution that a next token is drawn from, ``(B, V)``.

    Args:
        unconditional: ``(B, V)``, what the model says without the text; guidance needs it.
    """
    if config.guidance is None or unconditional is None:
        return filter_logits(logits.float(), config).softmax(-1)
    if config.guidance_kind == "extrapolation":
        led = guided(logits.float(), unconditional.float(), config.guidance)
        return filter_logits(led, config).softmax(-1)
    both = torch.stack([logits, unconditional]).float()
    shares = filter_logits(both.flatten(0, 1), config).softmax(-1).view_as(both)
    return torch.lerp(shares[0], shares[1], config.guidance)


def draw(shares: Tensor, uniform: Tensor) -> Tensor:
    """One token a row of ``(B, V)``, by inverting the distribution function at ``uniform`` (B,).

    A row depends on its own number alone, so a sample is the same in a batch of any size.
    """
    steps = shares.cumsum(-1)
    drawn = torch.searchsorted(steps, uniform[:, None] * steps[:, -1:], right=True)
    # Rounding can carry a draw past the last token of weight above 0.
    last = shares.shape[-1] - 1 - (shares > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(drawn, last).squeeze(-1)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + s (c - u)`` (Ho and Salimans 2022): 1 is no guidance, 0 no condition."""
    return unconditional + scale * (conditional - unconditional)
