"""Logit filters and the sampling of the next token.

The default filter order follows ru-dolph and LlamaGen: temperature, then top-k, then top-p.  Top-p
values of different orders are not comparable.

Shapes: B batch, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from rudolph.files.constraints import Bounds, Count, NonNegative, check

FILTER_ORDER = ("temperature", "top_k", "top_p", "min_p")
# Beyond these bounds, scaled logits leave the range of float32.
MIN_TEMPERATURE, MAX_GUIDANCE = 1e-6, 1e6


@dataclass(frozen=True)
class TokenSamplingConfig:
    """How the next token is sampled; null turns a filter off, and 0 is an error, not "off".

    Attributes:
        temperature: divisor of the logits.
        top_k: keep that many tokens; 1 is greedy decoding.
        top_p: keep the most likely tokens that together reach that probability.
        min_p: keep tokens with at least that fraction of the highest probability (Nguyen 2024,
            arXiv:2407.01082).
        filter_order: order of the filters and the temperature.
        guidance: strength of guidance, whose meaning depends on ``guidance_kind``; null for off.
        guidance_kind: ``extrapolation`` is classifier-free guidance ``u + s (c - u)`` on logits;
            ``mixture`` is ru-dolph's ``(1 - w) c + w u`` of probabilities.

    Raises:
        ValueError: if a setting is out of range.
    """

    temperature: float = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Bounds(gt=0, le=1)] | None = None
    min_p: Annotated[float, Bounds(gt=0, le=1)] | None = None
    filter_order: tuple[str, ...] = FILTER_ORDER
    guidance: NonNegative | None = None
    guidance_kind: Literal["extrapolation", "mixture"] = "extrapolation"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a setting is out of range."""
        check(self)
        # Not "<=", so that NaN is rejected too.
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0 (greedy is top_k 1), got {self.temperature}"
            )
        if not MIN_TEMPERATURE <= self.temperature <= 1 / MIN_TEMPERATURE:
            raise ValueError(
                f"temperature must be {MIN_TEMPERATURE:g} to {1 / MIN_TEMPERATURE:g}, "
                f"got {self.temperature:g}"
            )
        if sorted(self.filter_order) != sorted(FILTER_ORDER):
            raise ValueError(
                f"filter_order must have each of {', '.join(FILTER_ORDER)}, "
                f"got {self.filter_order}"
            )
        if self.guidance is not None and self.guidance > MAX_GUIDANCE:
            raise ValueError(f"guidance must be at most {MAX_GUIDANCE:g}, got {self.guidance:g}")
        if self.guidance_kind == "mixture" and (self.guidance or 0) > 1:
            raise ValueError(f"guidance must be at most 1 for a mixture, got {self.guidance}")


def filter_logits(logits: Tensor, config: TokenSamplingConfig) -> Tensor:
    """Apply temperature and filters to logits ``(B, V)``; removed tokens become minus infinity."""
    size = logits.shape[-1]
    top_k, top_p = min(config.top_k or size, size), config.top_p or 1.0
    if top_k == size and top_p == 1 and config.min_p is None:
        return logits / config.temperature
    # Sort once and only as far as needed, since every filter keeps a prefix of the sorted logits.
    is_k_first = config.filter_order.index("top_k") < config.filter_order.index("top_p")
    values, token_ids = logits.topk(top_k if is_k_first or top_p == 1 else size)
    for name in config.filter_order:
        values = FILTERS[name](values, config)
    # Scatter, not compare with the k-th value: ties would keep more than k.
    return torch.full_like(logits, -torch.inf).scatter_(-1, token_ids, values)


def _temperature(values: Tensor, config: TokenSamplingConfig) -> Tensor:
    return values / config.temperature


def _top_k(values: Tensor, config: TokenSamplingConfig) -> Tensor:
    if config.top_k is None or config.top_k >= values.shape[-1]:
        return values
    ranks = torch.arange(values.shape[-1], device=values.device)
    return values.masked_fill(ranks >= config.top_k, -torch.inf)


def _top_p(values: Tensor, config: TokenSamplingConfig) -> Tensor:
    if config.top_p is None or config.top_p == 1:
        return values
    probabilities = values.softmax(-1)
    # Compare the mass before each token, so that the token that crosses top_p is kept.
    return values.masked_fill(probabilities.cumsum(-1) - probabilities > config.top_p, -torch.inf)


def _min_p(values: Tensor, config: TokenSamplingConfig) -> Tensor:
    if config.min_p is None:
        return values
    probabilities = values.softmax(-1)
    return values.masked_fill(probabilities < config.min_p * probabilities[..., :1], -torch.inf)


# Each filter takes logits (B, K) in descending order and masks the ones it removes.
FILTERS: dict[str, Callable[[Tensor, TokenSamplingConfig], Tensor]] = {
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
}


def next_probabilities(
    logits: Tensor, config: TokenSamplingConfig, unconditional: Tensor | None = None
) -> Tensor:
    """Compute the distribution ``(B, V)`` that the next token is sampled from.

    Args:
        logits: ``(B, V)``, conditional on the text.
        config: temperature, filters and guidance.
        unconditional: ``(B, V)``, logits without the text; None turns guidance off.
    """
    if config.guidance is None or unconditional is None:
        return filter_logits(logits.float(), config).softmax(-1)
    if config.guidance_kind == "extrapolation":
        guided = apply_guidance(logits.float(), unconditional.float(), config.guidance)
        return filter_logits(guided, config).softmax(-1)
    both = torch.stack([logits, unconditional]).float()
    probabilities = filter_logits(both.flatten(0, 1), config).softmax(-1).view_as(both)
    return torch.lerp(probabilities[0], probabilities[1], config.guidance)


def sample_token(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Sample one token per row of ``(B, V)`` by inverting the CDF at ``uniform`` (B,).

    Each row depends on its own number alone, so a sample is the same at every batch size.
    """
    cdf = probabilities.cumsum(-1)
    sampled = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    # Rounding can push a sample past the last token of non-zero probability.
    last = (
        probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1, keepdim=True)
    )
    return torch.minimum(sampled, last).squeeze(-1)


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Extrapolate logits: ``u + s (c - u)`` (Ho and Salimans 2022).

    Scale 1 is no guidance; scale 0 ignores the condition.
    """
    return unconditional + scale * (conditional - unconditional)
