"""Late fusion: one vector from the feature vectors of several modalities.

``fusion([x_1, ..., x_k]) -> z`` maps ``x_i`` (..., D_i) to ``z`` (..., D).  The leading dimensions
are rows of a batch or positions of a sequence.  The table lists each kind of fusion, its formula
and its number of parameters:

===============  =====================================================  ========================
``additive``     ``sum_i w_i x_i``, scalars w_i                         k
``linear_sum``   ``sum_i W_i x_i + b``                                  D sum D_i + D
``product``      ``w (x_1 * ... * x_k)``, a scalar w                    1
``low_rank``     ``P (tanh(U_1 x_1) * ... * tanh(U_k x_k))`` (MLB)      R (sum D_i + D)
``bilinear``     ``x_1' W x_2 + b``, two modalities                     D_1 D_2 D + D
``gated``        ``sum_i g_i P_i x_i``                                  see ``Gated``
``gmu``          ``sum_i g_i tanh(V_i x_i)``, sigmoid gates per channel 2 D sum D_i + k D
``concat``       an MLP of ``[x_1; ...; x_k]``                          see ``Concat``
===============  =====================================================  ========================

Gates g_i read all modalities: ``sigmoid`` gates are independent, ``softmax`` gates sum to 1.

A modality may be missing in some rows, where ``present`` (..., k) is false.  Sums leave out a
missing modality.  If m modalities are present, ``additive`` and ``linear_sum`` scale their sum by
k / m.  A softmax is taken over the present modalities.  The kinds ``product``, ``low_rank``,
``bilinear`` and ``concat`` need every modality.

To add a fusion, write a class ``(FusionConfig)`` and name it in ``FUSIONS``.

Source: Kim 2017 (arXiv:1610.04325) for ``low_rank``; Arevalo 2017 (arXiv:1702.01992), section 3,
for ``gmu``; torchmultimodal, ``modules/fusions/attention_fusion.py``, for ``gated``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATES = ("sigmoid", "softmax")
GATE_SIZES = ("scalar", "vector")
# Kinds that multiply or add the inputs without a projection.
EQUAL_WIDTHS = ("additive", "product")
# Kinds that need every modality in every row.
NEED_ALL = ("product", "low_rank", "bilinear", "concat")


@dataclass(frozen=True)
class FusionConfig:
    """A fusion and its sizes.

    Args:
        kind: A name in ``FUSIONS``.
        widths: Channels of each modality, D_i, in the order of the inputs.
        width: Output channels, D.
        rank: R of ``low_rank``.
        hidden: Hidden channels of ``concat``.
        gate: ``sigmoid`` or ``softmax``, for ``gated``.
        gate_size: One gate per modality (``scalar``), or one per modality and channel
            (``vector``).
    """

    kind: str
    widths: tuple[int, ...]
    width: int
    rank: int = 1200
    hidden: int = 1600
    gate: str = "sigmoid"
    gate_size: str = "vector"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        for name, legal in (("kind", FUSIONS), ("gate", GATES), ("gate_size", GATE_SIZES)):
            value = getattr(self, name)
            if value not in legal:
                raise ValueError(f"{name}: expected one of {', '.join(legal)}, got {value!r}")
        for name in ("width", "rank", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        given = list(self.widths)
        if len(given) < 2 or min(given) < 1:
            raise ValueError(f"widths: expected at least two positive numbers, got {given}")
        if self.kind in EQUAL_WIDTHS and set(given) != {self.width}:
            raise ValueError(
                f"widths: expected {self.width} (width) each for {self.kind}, got {given}"
            )
        if self.kind == "bilinear" and len(given) != 2:
            raise ValueError(f"widths: expected two modalities for bilinear, got {given}")


def build_fusion(config: FusionConfig) -> nn.Module:
    """Return the fusion that a config names."""
    return FUSIONS[config.kind](config)


class Additive(nn.Module):
    """``sum_i w_i x_i``, initialised as the mean."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        number = len(config.widths)
        self.weight = nn.Parameter(torch.full((number,), 1 / number))

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        terms = [weight * x for weight, x in zip(self.weight, inputs, strict=True)]
        return sum_of_present(terms, present)


class LinearSum(nn.Module):
    """``sum_i W_i x_i + b``."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        layers = (nn.Linear(width, config.width, bias=False) for width in config.widths)
        self.project = nn.ModuleList(layers)
        self.bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        terms = [layer(x) for layer, x in zip(self.project, inputs, strict=True)]
        return sum_of_present(terms, present) + self.bias


class Product(nn.Module):
    """``w (x_1 * ... * x_k)``, elementwise: a modality near zero suppresses the others."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        require_all_present(present, self.config)
        return self.weight * torch.stack(list(inputs)).prod(0)


class LowRankProduct(nn.Module):
    """``P (tanh(U_1 x_1) * ... * tanh(U_k x_k))``: a bilinear form of rank R, without biases."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        layers = (nn.Linear(width, config.rank, bias=False) for width in config.widths)
        self.factors = nn.ModuleList(layers)
        self.project = nn.Linear(config.rank, config.width, bias=False)

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        require_all_present(present, self.config)
        factors = [layer(x).tanh() for layer, x in zip(self.factors, inputs, strict=True)]
        return self.project(torch.stack(factors).prod(0))


class Bilinear(nn.Module):
    """``x_1' W x_2 + b`` with a full tensor W ``(D, D_1, D_2)``."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        first, second = config.widths
        self.form = nn.Bilinear(first, second, config.width)

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        require_all_present(present, self.config)
        first, second = inputs
        return self.form(first.contiguous(), second.contiguous())


class Gated(nn.Module):
    """``sum_i g_i P_i x_i`` with gates ``sigmoid`` or ``softmax`` of ``W [x_1; ...; x_k] + b``.

    P_i is a linear layer where D_i differs from D, else the identity.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        number, total = len(config.widths), sum(config.widths)
        self.gate_width = config.width if config.gate_size == "vector" else 1
        self.gate = nn.Linear(total, number * self.gate_width)
        self.project = nn.ModuleList(
            nn.Identity() if width == config.width else nn.Linear(width, config.width)
            for width in config.widths
        )

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        inputs = zero_missing(inputs, present)
        scores = self.gate(torch.cat(list(inputs), dim=-1))
        scores = scores.view(*scores.shape[:-1], len(inputs), self.gate_width)  # (..., k, D or 1)
        if present is not None:
            scores = scores.masked_fill(~present[..., None], -torch.inf)
        gates = scores.softmax(-2) if self.config.gate == "softmax" else scores.sigmoid()
        values = [layer(x) for layer, x in zip(self.project, inputs, strict=True)]
        return (gates * torch.stack(values, dim=-2)).sum(-2)


class GMU(nn.Module):
    """Gated multimodal unit: ``sum_i sigmoid(W_i [x_1; ...; x_k]) * tanh(V_i x_i)``.

    This is the paper's form for any k, except that the gates here have a bias.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        number, total = len(config.widths), sum(config.widths)
        self.gate = nn.Linear(total, number * config.width)
        layers = (nn.Linear(width, config.width, bias=False) for width in config.widths)
        self.project = nn.ModuleList(layers)

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        inputs = zero_missing(inputs, present)
        gates = self.gate(torch.cat(list(inputs), dim=-1)).sigmoid().chunk(len(inputs), dim=-1)
        # The value of a missing modality is tanh(0) = 0.
        values = [layer(x).tanh() for layer, x in zip(self.project, inputs, strict=True)]
        return torch.stack([g * value for g, value in zip(gates, values, strict=True)]).sum(0)


class Concat(nn.Module):
    """``W_2 gelu(W_1 [x_1; ...; x_k] + b_1) + b_2`` with ``hidden`` channels between."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(
            nn.Linear(sum(config.widths), config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.width),
        )

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse inputs ``(..., D_i)`` into ``(..., D)``; ``present`` is ``(..., k)`` bool."""
        require_widths(inputs, self.config)
        require_all_present(present, self.config)
        return self.mlp(torch.cat(list(inputs), dim=-1))


def require_widths(inputs: Sequence[Tensor], config: FusionConfig) -> None:
    """Raise ``ValueError`` unless the inputs have the channels of the config."""
    given = [x.shape[-1] for x in inputs]
    if given != list(config.widths):
        raise ValueError(f"{config.kind}: expected widths {list(config.widths)}, got {given}")


def require_all_present(present: Tensor | None, config: FusionConfig) -> None:
    """Raise ``ValueError`` if a modality is missing in any row."""
    if present is not None and not bool(present.all()):
        raise ValueError(f"{config.kind}: expected every modality in every row, got missing ones")


def zero_missing(inputs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
    """Set inputs to zero where ``present`` (..., k) is false."""
    if present is None:
        return list(inputs)
    flags = present.unbind(-1)
    return [x.masked_fill(~flag[..., None], 0) for x, flag in zip(inputs, flags, strict=True)]


def sum_of_present(terms: Sequence[Tensor], present: Tensor | None) -> Tensor:
    """Sum the m present terms ``(..., D)`` out of k and scale the sum by k / m."""
    total = torch.stack(zero_missing(terms, present)).sum(0)
    if present is None:
        return total
    return total * (len(terms) / present.sum(-1, keepdim=True).clamp(min=1))


# Fusion classes, keyed by name and built from a config by ``build_fusion``.
FUSIONS: dict[str, Any] = {
    "additive": Additive,
    "linear_sum": LinearSum,
    "product": Product,
    "low_rank": LowRankProduct,
    "bilinear": Bilinear,
    "gated": Gated,
    "gmu": GMU,
    "concat": Concat,
}
