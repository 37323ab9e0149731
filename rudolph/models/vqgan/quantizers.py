"""From continuous latents to codes: every quantizer has one call shape.

``quantizer(z) -> Quantized(z_q, indices, loss)`` and ``quantizer.codes(indices) -> z_q``; gradient
reaches ``z`` through the straight-through estimator.  Usage is counted from the indices.

To add a quantizer, write a class ``(QuantizerConfig)`` and name it in ``QUANTIZERS``.

Shapes: B batch, E embedding dim, H and W the grid of latents, K the number of codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rudolph.models.vqgan.codes import (
    Quantized,
    channels,
    largest_logit,
    nearest_map,
    straight_through,
)


@dataclass(frozen=True)
class QuantizerConfig:
    """The codebook.

    ``beta`` weighs the commitment term.  ``decay`` and ``dead_code_threshold`` are of ``ema``: a
    code is replaced by a latent of the batch when its running count falls below that share of the
    mean.
    ``entropy_weight`` is of ``lfq``, whose codes are a power of two.
    ``code_dim`` is the dimension of ``cosine``.  ``levels`` are of ``fsq``; their product is its
    number of codes.  ``kl_weight`` and ``temperature`` are of ``gumbel``.
    """

    kind: str = "gumbel"
    num_codes: int = 8192
    embedding_dim: int = 256
    beta: float = 0.25
    decay: float = 0.99
    dead_code_threshold: float = 0.1
    code_dim: int = 8
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)
    kl_weight: float = 1e-8
    temperature: float = 1.0
    entropy_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in QUANTIZERS:
            raise ValueError(f"kind must be one of {', '.join(QUANTIZERS)}, got {self.kind!r}")
        for name in ("num_codes", "embedding_dim", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind == "fsq" and math.prod(self.levels) != self.num_codes:
            raise ValueError(
                f"num_codes must be the product of levels ({math.prod(self.levels)}) for fsq, "
                f"got {self.num_codes}"
            )
        if self.kind == "lfq" and self.num_codes & (self.num_codes - 1):
            raise ValueError(f"num_codes must be a power of two for lfq, got {self.num_codes}")
        if self.entropy_weight < 0:
            raise ValueError(f"entropy_weight must be at least 0, got {self.entropy_weight}")
        if min(self.levels, default=0) < 2:
            raise ValueError(f"levels must each be at least 2, got {list(self.levels)}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


class VectorQuantizer(nn.Module):
    """Nearest code; codebook and commitment loss (van den Oord 2017), beta on commitment."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_codes, config.embedding_dim)
        bound = 1 / config.num_codes
        nn.init.uniform_(self.embedding.weight, -bound, bound)

    def forward(self, z: Tensor) -> Quantized:
        indices = self.indices(z)
        return _with_both_losses(z, self.codes(indices), indices, self.config.beta)

    def indices(self, z: Tensor) -> Tensor:
        return nearest_map(z, self.embedding.weight)

    def codes(self, indices: Tensor) -> Tensor:
        return self.embedding(indices).movedim(-1, 1)


def _with_both_losses(z: Tensor, z_q: Tensor, indices: Tensor, beta: float) -> Quantized:
    """Codes that move towards their latents, and latents that commit to their codes."""
    loss = F.mse_loss(z_q, z.detach()) + beta * F.mse_loss(z, z_q.detach())
    return Quantized(straight_through(z, z_q), indices, loss)


class ExponentialMovingAverageQuantizer(nn.Module):
    """The codebook follows the mean of its latents; codes that die are revived from the batch.

    Codebook and statistics stay in float32 where the model is converted to half precision: steps
    of 1 - decay would round to nothing there.

    Source: van den Oord 2017, appendix A.1; Laplace smoothing as in sonnet's VQ-VAE.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    is_started: Tensor
    REDUCTIONS = ("codebook", "counts", "sums")

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        codebook = torch.randn(config.num_codes, config.embedding_dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(config.num_codes))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("is_started", torch.tensor(False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        held = {name: getattr(self, name) for name in self.REDUCTIONS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in held.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before.to(after.device))
        return self

    def forward(self, z: Tensor) -> Quantized:
        vectors = z.detach().movedim(1, -1).flatten(0, -2).to(self.codebook.dtype)
        if self.training and not self.is_started:
            every = torch.arange(self.config.num_codes, device=z.device)
            self._replace(every, vectors, (vectors - vectors.mean(0)).pow(2).sum(1))
            self.is_started.fill_(True)
        indices = self.indices(z)
        z_q = self.codes(indices).to(z.dtype)
        if self.training:
            self.follow(vectors, indices.flatten())
        loss = self.config.beta * F.mse_loss(z, z_q)
        return Quantized(straight_through(z, z_q), indices, loss)

    @torch.no_grad()
    def follow(self, vectors: Tensor, indices: Tensor) -> None:
        """Move the codes towards their ``vectors`` (M, E) and revive the dead ones."""
        counts = torch.bincount(indices, minlength=self.config.num_codes).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # The codebook follows the latents of all devices.
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        errors = (vectors - self.codebook[indices]).pow(2).sum(1)
        total = self.counts.sum()
        smooth = (self.counts + 1e-5) / (total + self.config.num_codes * 1e-5) * total
        self.codebook.copy_(self.sums / smooth[:, None])
        is_dead = self.counts < self.config.dead_code_threshold * total / self.config.num_codes
        self._replace(is_dead.nonzero().flatten(), vectors, errors)

    def _replace(self, codes: Tensor, vectors: Tensor, errors: Tensor) -> None:
        if not len(codes):
            return
        # As k-means++ seeds: a latent that its code misses by far is likely to become a code, and
        # most of an image, its background, is not.
        chosen = torch.multinomial(errors + 1e-12, len(codes), replacement=True)
        self.codebook[codes] = vectors[chosen]
        self.sums[codes] = vectors[chosen]
        self.counts[codes] = self.counts.mean()
        self.sums[codes] *= self.counts[codes, None]

    def indices(self, z: Tensor) -> Tensor:
        return nearest_map(z, self.codebook)

    def codes(self, indices: Tensor) -> Tensor:
        return self.codebook[indices].movedim(-1, 1)


class CosineQuantizer(nn.Module):
    """Nearest direction in few dimensions: latents and codes are l2-normalised.

    Source: ViT-VQGAN (arXiv:2110.04627), section 3.2; LlamaGen (arXiv:2406.06525).
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.to_code = nn.Conv2d(config.embedding_dim, config.code_dim, 1)
        self.from_code = nn.Conv2d(config.code_dim, config.embedding_dim, 1)
        self.codebook = nn.Parameter(F.normalize(torch.randn(config.num_codes, config.code_dim)))

    def forward(self, z: Tensor) -> Quantized:
        direction = F.normalize(self.to_code(z), dim=1)
        indices = nearest_map(direction, F.normalize(self.codebook))
        code = self._directions(indices)
        loss = F.mse_loss(code, direction.detach())
        loss = loss + self.config.beta * F.mse_loss(direction, code.detach())
        return Quantized(self.from_code(straight_through(direction, code)), indices, loss)

    def indices(self, z: Tensor) -> Tensor:
        return nearest_map(F.normalize(self.to_code(z), dim=1), F.normalize(self.codebook))

    def codes(self, indices: Tensor) -> Tensor:
        return self.from_code(self._directions(indices))

    def _directions(self, indices: Tensor) -> Tensor:
        return F.normalize(self.codebook[indices], dim=-1).movedim(-1, 1)


class GumbelQuantizer(nn.Module):
    """A categorical draw in training, its argmax otherwise; KL to the uniform prior.

    Source: taming-transformers, ``GumbelQuantize``; rudalle draws in evaluation too, here a code
    is the argmax unless ``sample`` is called.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.embedding_dim, config.num_codes, 1)
        self.embed = nn.Embedding(config.num_codes, config.embedding_dim)

    def forward(self, z: Tensor) -> Quantized:
        logits = self.proj(z)
        if self.training:
            shares = F.gumbel_softmax(logits, tau=self.config.temperature, dim=1)
            z_q, indices = _ChosenCodes.apply(shares, self.embed.weight)  # type: ignore[no-untyped-call]
        else:
            indices = logits.argmax(1)
            z_q = self.codes(indices)
        log_q = logits.float().log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(self.config.num_codes))).sum(1).mean()
        return Quantized(z_q, indices, self.config.kl_weight * kl)

    def indices(self, z: Tensor) -> Tensor:
        vectors = z.movedim(1, -1)  # (B, H, W, E)
        # In half precision many of thousands of codes would be as likely as the likeliest.
        weight, bias = self.proj.weight.flatten(1).float(), self.proj.bias
        assert bias is not None
        found = largest_logit(vectors.flatten(0, -2).float(), weight, bias.float())
        return found.view(vectors.shape[:-1])

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Codes drawn from the softmax of their logits, ``(B, H, W)``."""
        weights = self.proj(z).float().softmax(1).movedim(1, -1)
        drawn = torch.multinomial(weights.flatten(0, -2), 1, generator=generator)
        return drawn.view(weights.shape[:-1])

    def codes(self, indices: Tensor) -> Tensor:
        return self.embed(indices).movedim(-1, 1)


class _ChosenCodes(torch.autograd.Function):
    """The code of the largest share ``(B, K, H, W)`` and its index, without a one-hot product.

    Straight through: the gradient of the shares is that of the mean of the codes by them.
    """

    @staticmethod
    def forward(ctx: Any, shares: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        indices = shares.argmax(1)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(indices, codebook)
        ctx.dtype = shares.dtype
        return F.embedding(indices, codebook).movedim(-1, 1), indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        indices, codebook = ctx.saved_tensors
        of_codes = gradient.movedim(1, -1)  # (B, H, W, E)
        of_shares = of_codes.to(ctx.dtype) @ codebook.to(ctx.dtype).t()
        of_codebook = torch.zeros_like(codebook)
        of_codebook.index_add_(0, indices.flatten(), of_codes.flatten(0, -2).to(codebook))
        return of_shares.movedim(-1, 1), of_codebook


class FiniteScalarQuantizer(nn.Module):
    """Each of a few channels is bounded and rounded to one of its levels; no codebook, no loss.

    Source: arXiv:2309.15505, section 3 and appendix A.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        basis = torch.cat([torch.ones(1, dtype=torch.long), levels[:-1].cumprod(0)])
        self.register_buffer("basis", basis, persistent=False)
        self.to_code = nn.Conv2d(config.embedding_dim, len(levels), 1)
        self.from_code = nn.Conv2d(len(levels), config.embedding_dim, 1)

    def forward(self, z: Tensor) -> Quantized:
        bounded = self._bound(self.to_code(z))
        digits = straight_through(bounded, bounded.round())
        loss = torch.zeros((), device=z.device)
        return Quantized(self._expand(digits), self._to_indices(bounded.round()), loss)

    def indices(self, z: Tensor) -> Tensor:
        return self._to_indices(self._bound(self.to_code(z)).round())

    def codes(self, indices: Tensor) -> Tensor:
        digits = indices[..., None] // self.basis % self.levels - self.levels // 2
        return self._expand(digits.movedim(-1, 1).to(self.from_code.weight.dtype))

    def _bound(self, z: Tensor) -> Tensor:
        # An even number of levels has no middle, so the range is shifted by half a level.
        half = (self.levels - 1).to(torch.float32) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (z.float() + channels(shift)).tanh() * channels(half) - channels(offset)

    def _expand(self, digits: Tensor) -> Tensor:
        code = digits / channels(self.levels // 2)
        return self.from_code(code.to(self.from_code.weight.dtype))

    def _to_indices(self, digits: Tensor) -> Tensor:
        positive = digits.long() + channels(self.levels // 2)
        return (positive * channels(self.basis)).sum(1)


class LookupFreeQuantizer(nn.Module):
    """The signs of a few channels are the bits of the index; no codebook.

    Each bit is to be sure for a latent and even over all of them.  Both entropies are those of the
    bits by themselves, so that 2^18 codes cost no more than a few.

    Source: Yu 2023 (arXiv:2310.05737), section 3.1, with Open-MAGVIT2's softmax at temperature
    0.01; entropies bit by bit: BSQ (arXiv:2406.07548), section 4.1.
    """

    SHARPNESS = 4 / 0.01
    basis: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        num_bits = config.num_codes.bit_length() - 1
        self.register_buffer("basis", 2 ** torch.arange(num_bits), persistent=False)
        self.to_code = nn.Conv2d(config.embedding_dim, num_bits, 1)
        self.from_code = nn.Conv2d(num_bits, config.embedding_dim, 1)

    def forward(self, z: Tensor) -> Quantized:
        code = self.to_code(z).float()
        bits = self._bits(code)
        loss = self.config.beta * F.mse_loss(code, bits)
        logits = self.SHARPNESS * code
        # No share rounds to 0 or 1.
        least = torch.finfo(logits.dtype).eps
        even = logits.sigmoid().mean((0, 2, 3)).clamp(least, 1 - least).logit()
        unsure = _bit_entropy(logits).sum(1).mean() - _bit_entropy(even).sum()
        loss = loss + self.config.entropy_weight * unsure
        out = self.from_code(straight_through(code, bits).to(self.from_code.weight.dtype))
        return Quantized(out, self._to_indices(bits), loss)

    def indices(self, z: Tensor) -> Tensor:
        return self._to_indices(self._bits(self.to_code(z)))

    def codes(self, indices: Tensor) -> Tensor:
        bits = (indices[..., None] // self.basis % 2 * 2 - 1).movedim(-1, 1)
        return self.from_code(bits.to(self.from_code.weight.dtype))

    @staticmethod
    def _bits(code: Tensor) -> Tensor:
        return torch.where(code > 0, 1.0, -1.0)

    def _to_indices(self, bits: Tensor) -> Tensor:
        return ((bits > 0).long() * channels(self.basis)).sum(1)


def _bit_entropy(logits: Tensor) -> Tensor:
    """Of bits that are 1 with the sigmoid of a logit, in nats; its gradient is finite."""
    return F.softplus(logits) - logits * logits.sigmoid()


class LinearCodebookQuantizer(nn.Module):
    """Nearest code of a codebook that never moves but is turned by a layer: all codes learn.

    Source: SimVQ (arXiv:2411.02038), section 4.
    """

    codebook: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.embedding_dim
        self.register_buffer("codebook", torch.randn(config.num_codes, size) / size**0.5)
        self.turn = nn.Linear(size, size)

    def forward(self, z: Tensor) -> Quantized:
        indices = self.indices(z)
        return _with_both_losses(z, self.codes(indices), indices, self.config.beta)

    def indices(self, z: Tensor) -> Tensor:
        return nearest_map(z, self.turn(self.codebook))

    def codes(self, indices: Tensor) -> Tensor:
        return self.turn(self.codebook[indices]).movedim(-1, 1)


QUANTIZERS = {
    "vq": VectorQuantizer,
    "ema": ExponentialMovingAverageQuantizer,
    "cosine": CosineQuantizer,
    "gumbel": GumbelQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "simvq": LinearCodebookQuantizer,
}
