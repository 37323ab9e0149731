"""Vector quantizers with one call signature: from continuous latents to codebook indices.

``quantizer(z) -> Quantized(z_q, indices, loss)``, ``quantizer.indices(z) -> indices`` and
``quantizer.codes(indices) -> z_q``.  The gradient reaches ``z`` through the straight-through
estimator.  Codebook usage is computed from the indices (``codes.codebook_usage``).

To add a quantizer, write an ``nn.Module`` that takes a ``QuantizerConfig`` and list it in
``QUANTIZERS``.

Shapes: B batch, E embedding dim, H and W the grid of latents, K number of codes, M vectors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rudolph.files.constraints import Bounds, Count, NonNegative, Positive, check
from rudolph.models.vqgan.codes import (
    Quantized,
    channels,
    largest_logit,
    nearest_map,
    straight_through,
)


@dataclass(frozen=True)
class QuantizerConfig:
    """The codebook settings of all quantizers.

    A setting whose description starts with a kind, such as ``ema``, is read only by that kind.

    Attributes:
        kind: a key of ``QUANTIZERS``.
        num_codes: number of codes K.
        embedding_dim: channels E of ``z`` and ``z_q``.
        beta: weight of the commitment loss.
        decay: ``ema``: decay of the running statistics.
        dead_code_threshold: ``ema``: a code whose running count falls below this fraction of the
            mean count is replaced by a latent of the batch.
        code_dim: ``cosine``: dimension in which codes are compared.
        levels: ``fsq``: levels of each channel; their product must be ``num_codes``.
        kl_weight: ``gumbel``: weight of the KL divergence from the uniform prior.
        temperature: ``gumbel``: temperature of the Gumbel softmax.
        entropy_weight: ``lfq``: weight of the entropy loss; ``num_codes`` must be a power of two.
    """

    kind: Literal["vq", "ema", "cosine", "gumbel", "fsq", "lfq", "simvq"] = "gumbel"
    num_codes: Count = 8192
    embedding_dim: Count = 256
    beta: float = 0.25
    decay: Annotated[float, Bounds(gt=0, lt=1)] = 0.99
    dead_code_threshold: float = 0.1
    code_dim: Count = 8
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)
    kl_weight: float = 1e-8
    temperature: Positive = 1.0
    entropy_weight: NonNegative = 0.1

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        if self.kind == "fsq" and math.prod(self.levels) != self.num_codes:
            raise ValueError(
                f"num_codes must be the product of levels ({math.prod(self.levels)}) for fsq, "
                f"got {self.num_codes}"
            )
        if self.kind == "lfq" and self.num_codes & (self.num_codes - 1):
            raise ValueError(f"num_codes must be a power of two for lfq, got {self.num_codes}")
        if min(self.levels, default=0) < 2:
            raise ValueError(f"levels must each be at least 2, got {list(self.levels)}")


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a learned codebook (van den Oord 2017).

    The loss is the codebook loss plus ``beta`` times the commitment loss.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_codes, config.embedding_dim)
        bound = 1 / config.num_codes
        nn.init.uniform_(self.embedding.weight, -bound, bound)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents ``(B, E, H, W)``."""
        indices = self.indices(z)
        return _with_both_losses(z, self.codes(indices), indices, self.config.beta)

    def indices(self, z: Tensor) -> Tensor:
        """Return the index ``(B, H, W)`` int64 of each latent's nearest code."""
        return nearest_map(z, self.embedding.weight)

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, E, H, W)`` of indices ``(B, H, W)``."""
        return self.embedding(indices).movedim(-1, 1)


def _with_both_losses(z: Tensor, z_q: Tensor, indices: Tensor, beta: float) -> Quantized:
    """Quantize with the codebook loss plus ``beta`` times the commitment loss."""
    loss = F.mse_loss(z_q, z.detach()) + beta * F.mse_loss(z, z_q.detach())
    return Quantized(straight_through(z, z_q), indices, loss)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gather_over_devices(rows: Tensor) -> Tensor:
    """Concatenate the rows of all devices, in the order of their ranks."""
    if not _is_distributed():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class ExponentialMovingAverageQuantizer(nn.Module):
    """Nearest-code quantizer whose codes are moving averages of the latents assigned to them.

    Training calls ``start`` once and ``update_codebook`` after every step.  Dead codes are revived
    from latents of the step.  The codebook and its statistics stay in float32 even in a
    half-precision model; otherwise, steps of 1 - decay would round to 0.

    Source: van den Oord 2017, appendix A.1; Laplace smoothing as in sonnet's VQ-VAE.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    is_started: Tensor
    FLOAT32_BUFFERS = ("codebook", "counts", "sums")

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        codebook = torch.randn(config.num_codes, config.embedding_dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(config.num_codes))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("is_started", torch.tensor(False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        buffers = {name: getattr(self, name) for name in self.FLOAT32_BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in buffers.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before.to(after.device))
        return self

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents ``(B, E, H, W)``."""
        indices = self.indices(z)
        z_q = self.codes(indices).to(z.dtype)
        loss = self.config.beta * F.mse_loss(z, z_q)
        return Quantized(straight_through(z, z_q), indices, loss)

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """Initialise the codebook from latents ``(B, E, H, W)`` of each device."""
        vectors = _gather_over_devices(self._vectors(latents))
        all_codes = torch.arange(self.config.num_codes, device=latents.device)
        self._replace(all_codes, vectors, (vectors - vectors.mean(0)).pow(2).sum(1))
        self.is_started.fill_(True)

    @torch.no_grad()
    def update_codebook(self, latents: Tensor, indices: Tensor) -> None:
        """Update the running statistics and codes from one step, and revive dead codes.

        All devices must have the same number of latents and the same state of torch's generator.

        Args:
            latents: ``(B, E, H, W)``, the latents of this device.
            indices: their codes ``(B, H, W)``.
        """
        vectors, codes = self._vectors(latents), indices.flatten()
        counts = torch.bincount(codes, minlength=self.config.num_codes).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        if _is_distributed():
            # Sum over devices, so that every replica keeps the same codebook.
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        errors = (vectors - self.codebook[codes]).pow(2).sum(1)
        total = self.counts.sum()
        smooth = (self.counts + 1e-5) / (total + self.config.num_codes * 1e-5) * total
        self.codebook.copy_(self.sums / smooth[:, None])
        is_dead = self.counts < self.config.dead_code_threshold * total / self.config.num_codes
        if is_dead.any():
            candidates = _gather_over_devices(vectors), _gather_over_devices(errors)
            self._replace(is_dead.nonzero().flatten(), *candidates)

    def _vectors(self, latents: Tensor) -> Tensor:
        return latents.movedim(1, -1).flatten(0, -2).to(self.codebook.dtype)

    def _replace(self, codes: Tensor, vectors: Tensor, errors: Tensor) -> None:
        # As in k-means++, sample latents in proportion to their squared error; uniform sampling
        # would pick mostly background.
        chosen = torch.multinomial(errors + 1e-12, len(codes), replacement=True)
        self.codebook[codes] = vectors[chosen]
        self.sums[codes] = vectors[chosen]
        self.counts[codes] = self.counts.mean()
        self.sums[codes] *= self.counts[codes, None]

    def indices(self, z: Tensor) -> Tensor:
        """Return the index ``(B, H, W)`` int64 of each latent's nearest code."""
        return nearest_map(z, self.codebook)

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, E, H, W)`` of indices ``(B, H, W)``."""
        return self.codebook[indices].movedim(-1, 1)


class CosineQuantizer(nn.Module):
    """Nearest code by cosine similarity in few dimensions; latents and codes are l2-normalised.

    Source: ViT-VQGAN (arXiv:2110.04627), section 3.2; LlamaGen (arXiv:2406.06525).
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.to_code = nn.Conv2d(config.embedding_dim, config.code_dim, 1)
        self.from_code = nn.Conv2d(config.code_dim, config.embedding_dim, 1)
        self.codebook = nn.Parameter(F.normalize(torch.randn(config.num_codes, config.code_dim)))

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents ``(B, E, H, W)``."""
        direction = F.normalize(self.to_code(z), dim=1)
        indices = nearest_map(direction, F.normalize(self.codebook))
        code = self._directions(indices)
        loss = F.mse_loss(code, direction.detach())
        loss = loss + self.config.beta * F.mse_loss(direction, code.detach())
        return Quantized(self.from_code(straight_through(direction, code)), indices, loss)

    def indices(self, z: Tensor) -> Tensor:
        """Return the index ``(B, H, W)`` int64 of each latent's most similar code."""
        return nearest_map(F.normalize(self.to_code(z), dim=1), F.normalize(self.codebook))

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, E, H, W)`` of indices ``(B, H, W)``."""
        return self.from_code(self._directions(indices))

    def _directions(self, indices: Tensor) -> Tensor:
        return F.normalize(self.codebook[indices], dim=-1).movedim(-1, 1)


class GumbelQuantizer(nn.Module):
    """Gumbel-softmax quantizer that samples codes in training and takes the argmax otherwise.

    The loss is ``kl_weight`` times the KL divergence from the uniform prior.

    Source: taming-transformers, ``GumbelQuantize``.  rudalle also samples in evaluation; in this
    class, only the method ``sample`` does.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.embedding_dim, config.num_codes, 1)
        self.embed = nn.Embedding(config.num_codes, config.embedding_dim)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents ``(B, E, H, W)``."""
        logits = self.proj(z)
        if self.training:
            probabilities = F.gumbel_softmax(logits, tau=self.config.temperature, dim=1)
            z_q, indices = _ChosenCodes.apply(probabilities, self.embed.weight)  # type: ignore[no-untyped-call]
        else:
            indices = logits.argmax(1)
            z_q = self.codes(indices)
        log_q = logits.float().log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(self.config.num_codes))).sum(1).mean()
        return Quantized(z_q, indices, self.config.kl_weight * kl)

    def indices(self, z: Tensor) -> Tensor:
        """Return the index ``(B, H, W)`` int64 of each latent's most likely code."""
        vectors = z.movedim(1, -1)  # (B, H, W, E)
        # In half precision, many of the thousands of logits would tie with the largest.
        weight, bias = self.proj.weight.flatten(1).float(), self.proj.bias
        assert bias is not None
        indices = largest_logit(vectors.flatten(0, -2).float(), weight, bias.float())
        return indices.view(vectors.shape[:-1])

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Sample codes ``(B, H, W)`` int64 from the softmax of their logits."""
        probabilities = self.proj(z).float().softmax(1).movedim(1, -1)
        sampled = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return sampled.view(probabilities.shape[:-1])

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, E, H, W)`` of indices ``(B, H, W)``."""
        return self.embed(indices).movedim(-1, 1)


class _ChosenCodes(torch.autograd.Function):
    """The most probable code and its index, without a product with one-hot vectors.

    The estimator is straight-through: the gradient of the probabilities ``(B, K, H, W)`` is that
    of the probability-weighted mean of the codes.
    """

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes ``(B, E, H, W)`` and indices ``(B, H, W)``."""
        indices = probabilities.argmax(1)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(indices, codebook)
        ctx.dtype = probabilities.dtype
        return F.embedding(indices, codebook).movedim(-1, 1), indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the probabilities and of the codebook."""
        indices, codebook = ctx.saved_tensors
        code_gradient = gradient.movedim(1, -1)  # (B, H, W, E)
        probability_gradient = code_gradient.to(ctx.dtype) @ codebook.to(ctx.dtype).t()
        codebook_gradient = torch.zeros_like(codebook)
        codebook_gradient.index_add_(
            0, indices.flatten(), code_gradient.flatten(0, -2).to(codebook)
        )
        return probability_gradient.movedim(-1, 1), codebook_gradient


class FiniteScalarQuantizer(nn.Module):
    """Finite scalar quantizer that rounds each of a few bounded channels to one of its levels.

    It has no codebook and no loss.

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
        """Quantize latents ``(B, E, H, W)``."""
        bounded = self._bound(self.to_code(z))
        digits = straight_through(bounded, bounded.round())
        loss = torch.zeros((), device=z.device)
        return Quantized(self._expand(digits), self._to_indices(bounded.round()), loss)

    def indices(self, z: Tensor) -> Tensor:
        """Return the mixed-radix index ``(B, H, W)`` int64 of the rounded channels."""
        return self._to_indices(self._bound(self.to_code(z)).round())

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, E, H, W)`` of indices ``(B, H, W)``."""
        digits = indices[..., None] // self.basis % self.levels - self.levels // 2
        return self._expand(digits.movedim(-1, 1).to(self.from_code.weight.dtype))

    def _bound(self, z: Tensor) -> Tensor:
        # An even number of levels has no middle level, so shift its range by half a level.
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
    """Lookup-free quantizer: the signs of a few channels are the bits of the index.

    It has no codebook.  The entropy loss makes each bit certain for each latent and balanced over
    all latents of a batch.  Both entropies are computed per bit, so their cost grows with the
    number of bits, not with the number of codes.

    Source: Yu 2023 (arXiv:2310.05737), section 3.1, with Open-MAGVIT2's softmax temperature of
    0.01; entropies per bit: BSQ (arXiv:2406.07548), section 4.1.
    """

    INVERSE_TEMPERATURE = 4 / 0.01
    basis: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        num_bits = config.num_codes.bit_length() - 1
        self.register_buffer("basis", 2 ** torch.arange(num_bits), persistent=False)
        self.to_code = nn.Conv2d(config.embedding_dim, num_bits, 1)
        self.from_code = nn.Conv2d(num_bits, config.embedding_dim, 1)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents ``(B, E, H, W)``."""
        code = self.to_code(z).float()
        bits = self._bits(code)
        loss = self.config.beta * F.mse_loss(code, bits)
        logits = self.INVERSE_TEMPERATURE * code
        # Keep probabilities away from 0 and 1, where the logit is infinite.
        eps = torch.finfo(logits.dtype).eps
        mean_logits = logits.sigmoid().mean((0, 2, 3)).clamp(eps, 1 - eps).logit()
        entropy_loss = _bit_entropy(logits).sum(1).mean() - _bit_entropy(mean_logits).sum()
        loss = loss + self.config.entropy_weight * entropy_loss
        out = self.from_code(straight_through(code, bits).to(self.from_code.weight.dtype))
        return Quantized(out, self._to_indices(bits), loss)

    def indices(self, z: Tensor) -> Tensor:
        """Return the index ``(B, H, W)`` int64 whose bits are the signs of the channels."""
        return self._to_indices(self._bits(self.to_code(z)))

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, E, H, W)`` of indices ``(B, H, W)``."""
        bits = (indices[..., None] // self.basis % 2 * 2 - 1).movedim(-1, 1)
        return self.from_code(bits.to(self.from_code.weight.dtype))

    @staticmethod
    def _bits(code: Tensor) -> Tensor:
        return torch.where(code > 0, 1.0, -1.0)

    def _to_indices(self, bits: Tensor) -> Tensor:
        return ((bits > 0).long() * channels(self.basis)).sum(1)


def _bit_entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of bits given by their logits; its gradient is always finite."""
    return F.softplus(logits) - logits * logits.sigmoid()


class LinearCodebookQuantizer(nn.Module):
    """Nearest code in a frozen codebook that a linear layer transforms, so that all codes learn.

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
        """Quantize latents ``(B, E, H, W)``."""
        indices = self.indices(z)
        return _with_both_losses(z, self.codes(indices), indices, self.config.beta)

    def indices(self, z: Tensor) -> Tensor:
        """Return the index ``(B, H, W)`` int64 of each latent's nearest code."""
        return nearest_map(z, self.turn(self.codebook))

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes ``(B, E, H, W)`` of indices ``(B, H, W)``."""
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
