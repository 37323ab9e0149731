"""Decoder-only language model with settings for PaLM, LLaMA, Vicuna and Mistral.

``tokens -> embed -> blocks -> norm -> logits``

- A *parallel* block (PaLM) applies attention and MLP to the same normalised input and adds both
  outputs; a *sequential* block (LLaMA) has a norm for each.
- Fewer key-value heads than query heads give grouped-query attention; a single one gives
  multi-query attention.

Module names are Hugging Face's LLaMA names without the leading ``model.``.

Source: PaLM (arXiv:2204.02311), section 2; LLaMA (arXiv:2302.13971), section 2.2; RoFormer
(arXiv:2104.09864), section 3.4.2, in the form that rotates halves; Ainslie 2023
(arXiv:2305.13245) for grouped queries; Shazeer 2020 (arXiv:2002.05202) for SwiGLU.

Shapes: B batch, T new positions, S all positions so far, D hidden size, N query heads, G
key-value heads, H head size, L layers, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rudolph.files.constraints import Count, check
from rudolph.models.layers.multi_head import multi_head_attention, split_heads
from rudolph.models.lm.decode import at_last_token, decode_tokens

INIT_STD = 0.02


@dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes of a language model, and the choices in which PaLM and LLaMA differ.

    PaLM has ``block="parallel"``, ``norm="layer"``, ``num_key_value_heads=1`` and
    ``tied_embeddings=True``.

    Attributes:
        vocab_size: Number of token ids, V.
        hidden_size: Width, D.
        num_layers: Blocks, L.
        num_heads: Query heads, N.
        num_key_value_heads: Key-value heads, G, a divisor of ``num_heads``.
        head_size: Channels per head, H.
        mlp_size: Width of SwiGLU's inner layer.
        block: ``sequential`` or ``parallel``.
        norm: RMSNorm (``rms``) or a LayerNorm without bias (``layer``).
        norm_eps: Epsilon of the norms.
        rope_theta: Base of the rotary frequencies.
        tied_embeddings: Use the token embeddings as the output projection.
    """

    vocab_size: Count = 32_000
    hidden_size: Count = 4096
    num_layers: Count = 32
    num_heads: Count = 32
    num_key_value_heads: Count = 32
    head_size: Count = 128
    mlp_size: Count = 11_008
    block: Literal["sequential", "parallel"] = "sequential"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size must be even for rotations, got {self.head_size}")


class LanguageModelCache:
    """Preallocated key/value cache for inference.

    Args:
        memory: ``(L, 2, B, G, S, H)`` with room for S positions.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.start = self.length = 0
        # (B, length) bool, false at padding; None while no step had padding.
        self.is_token: Tensor | None = None

    def extend(self, num_positions: int, attention_mask: Tensor | None) -> Tensor | None:
        """Add new positions; return ``(B, length)`` bool, true at tokens, or None without padding.

        Raises:
            ValueError: If the cache is full.
        """
        capacity = self.memory.shape[4]
        self.start, self.length = self.length, self.length + num_positions
        if self.length > capacity:
            raise ValueError(f"the cache holds {capacity} positions, got {self.length}")
        if attention_mask is not None or self.is_token is not None:
            full = self.memory.new_ones(self.memory.shape[2], self.length, dtype=torch.bool)
            if self.is_token is not None:
                full[:, : self.start] = self.is_token
            if attention_mask is not None:
                full[:, self.start :] = attention_mask
            self.is_token = full
        return self.is_token

    def repeat(self, number: int) -> "LanguageModelCache":
        """Return a cache with every row repeated ``number`` times; copies are adjacent."""
        copy = LanguageModelCache(self.memory.repeat_interleave(number, dim=2))
        copy.start, copy.length = self.start, self.length
        if self.is_token is not None:
            copy.is_token = self.is_token.repeat_interleave(number, dim=0)
        return copy

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values ``(B, G, T, H)``; return all stored so far, ``(B, G, S, H)``."""
        self.memory[layer, 0, :, :, self.start : self.length] = key
        self.memory[layer, 1, :, :, self.start : self.length] = value
        keys, values = self.memory[layer, :, :, :, : self.length]
        return keys, values


class SequenceContext(NamedTuple):
    """Inputs that all blocks of one forward pass share.

    Attributes:
        cos: Cosines of the rotations, ``(1 or B, 1, T, H / 2)``.
        sin: Sines, of the same shape.
        mask: ``(T, S)`` or ``(B, T, S)`` bool; None if every new position attends to all
            positions.
        cache: The key/value cache, or None.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    cache: LanguageModelCache | None


def causal_mask(
    start: int,
    end: int,
    is_token: Tensor | None,
    device: torch.device | None = None,
    *,
    spans: Tensor | None = None,
) -> Tensor:
    """Return the causal mask ``(T, S)`` or ``(B, T, S)`` of positions ``start`` to ``end``.

    Padding attends to itself, since a softmax over no key is undefined.

    Args:
        start: First query position.
        end: Number of key positions, S.
        is_token: ``(B, S)`` bool, false at padding; None for no padding.
        device: Device of the mask.
        spans: ``(B, S)``.  Positions with equal numbers above 0 attend to each other in both
            directions, such as the positions of one image.  None for no such positions.

    >>> mask = causal_mask(0, 4, torch.tensor([[False, True, True, True]]))
    >>> for row in mask[0].tolist():
    ...     print("".join("#" if attends else "." for attends in row))
    #...
    .#..
    .##.
    .###
    >>> mask = causal_mask(0, 4, None, spans=torch.tensor([[0, 1, 1, 0]]))
    >>> for row in mask[0].tolist():
    ...     print("".join("#" if attends else "." for attends in row))
    #...
    ###.
    ###.
    ####
    """
    key = torch.arange(end, device=device)
    query = key[start:, None]
    attends = key <= query
    if spans is not None:
        own = spans[:, start:, None]
        attends = attends | (own == spans[:, None]) & (own > 0)
    if is_token is None:
        return attends
    return attends & is_token[:, None] | (key == query)


def rotations(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(..., T, H / 2)`` of positions ``(..., T)``, in float32."""
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * (1.0 / theta ** (channels / head_size))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels i and i + H / 2 of ``(B, N, T, H)`` by the angle of each position."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Self-attention of block ``layer``, with rotary positions and grouped queries."""

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_key_value_heads = config.num_heads, config.num_key_value_heads
        key_size = config.num_key_value_heads * config.head_size
        query_size = config.num_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``."""
        query = split_heads(self.q_proj(x), self.num_heads)  # (B, N, T, H)
        key = split_heads(self.k_proj(x), self.num_key_value_heads)  # (B, G, T, H)
        value = split_heads(self.v_proj(x), self.num_key_value_heads)
        query, key = (rotate(part, context.cos, context.sin) for part in (query, key))
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
        return self.o_proj(multi_head_attention(query, key, value, context.mask))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases."""

    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner_size, bias=False)
        self.up_proj = nn.Linear(size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., D)`` to ``(..., D)``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LanguageModelBlock(nn.Module):
    """Attention and MLP, one after the other or in parallel from one norm."""

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()
        self.is_parallel = config.block == "parallel"
        self.input_layernorm = new_norm(config)
        self.self_attn = CausalSelfAttention(config, layer)
        if not self.is_parallel:
            self.post_attention_layernorm = new_norm(config)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``."""
        y = self.input_layernorm(x)
        if self.is_parallel:
            return x + self.self_attn(y, context) + self.mlp(y)
        x = x + self.self_attn(y, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """``model(tokens) -> logits``; embeddings ``(B, T, D)`` are accepted instead of tokens."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LanguageModelBlock(config, layer) for layer in range(config.num_layers)
        )
        self.norm = new_norm(config)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)

    def forward(
        self,
        inputs: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: LanguageModelCache | None = None,
    ) -> Tensor:
        """Return logits ``(B, T, V)``.

        Args:
            inputs: Tokens ``(B, T)`` or embeddings ``(B, T, D)``; with a cache, only the new
                positions.
            attention_mask: ``(B, T)``, nonzero at tokens and 0 at padding on either side.
                Position numbers skip padding.
            cache: Result of ``new_cache``, extended by the new positions.
        """
        return self.logits(self.hidden(inputs, attention_mask=attention_mask, cache=cache))

    def hidden(
        self,
        inputs: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: LanguageModelCache | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """Return the last block's output ``(B, T, D)``, before the final norm.

        ``spans`` ``(B, T)`` marks the positions that attend in both directions; see
        ``causal_mask``.  With a cache, only the first call may pass ``spans``.
        """
        x = inputs if inputs.is_floating_point() else self.embed_tokens(inputs)
        context = self.context(x, attention_mask, cache, spans)
        for layer in self.layers:
            x = layer(x, context)
        return x

    def context(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cache: LanguageModelCache | None,
        spans: Tensor | None = None,
    ) -> SequenceContext:
        """Return rotations and mask of new positions ``(B, T, D)``, and extend the cache.

        Raises:
            ValueError: If ``attention_mask`` has another shape, or the cache is full.
        """
        batch, length, _ = x.shape
        if attention_mask is not None and attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask must be {(batch, length)}, got {tuple(attention_mask.shape)}"
            )
        is_token = None if attention_mask is None else attention_mask.bool()
        if cache is not None:
            is_token = cache.extend(length, is_token)
        end = length if cache is None else cache.length
        start = end - length
        if is_token is None:
            positions = torch.arange(start, end, device=x.device)[None]
        else:
            positions = (is_token.cumsum(1) - 1).clamp(min=0)[:, start:]
        cos, sin = rotations(positions, self.config.head_size, self.config.rope_theta)
        attends_to_all = length == 1 and is_token is None
        mask = None
        if not attends_to_all:
            mask = causal_mask(start, end, is_token, x.device, spans=spans)
        return SequenceContext(cos[:, None], sin[:, None], mask, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(..., V)`` of the last block's output ``(..., D)``."""
        tied = self.config.tied_embeddings
        head = self.embed_tokens.weight if tied else self.lm_head.weight
        return F.linear(self.norm(hidden), head)

    def new_cache(self, batch_size: int, *, num_positions: int) -> LanguageModelCache:
        """Return an empty cache with room for ``num_positions``."""
        config = self.config
        heads, size = config.num_key_value_heads, config.head_size
        shape = (config.num_layers, 2, batch_size, heads, num_positions, size)
        return LanguageModelCache(self.embed_tokens.weight.new_empty(shape))

    @torch.no_grad()
    def generate_greedily(
        self,
        inputs: Tensor,
        *,
        num_tokens: int,
        attention_mask: Tensor | None = None,
        end_id: int | None = None,
    ) -> Tensor:
        """Continue prompts greedily; return new tokens ``(B, S)``, see ``decode_tokens``."""
        cache = self.new_cache(len(inputs), num_positions=inputs.shape[1] + num_tokens)
        hidden = self.hidden(inputs, attention_mask=attention_mask, cache=cache)
        return decode_tokens(
            self.logits(at_last_token(hidden, attention_mask)),
            lambda token: self(token, cache=cache)[:, -1],
            num_tokens=num_tokens,
            end_id=end_id,
        )


def new_norm(config: LanguageModelConfig) -> nn.Module:
    """Return a new norm of the configured kind over D channels."""
    return NORMS[config.norm](config.hidden_size, config.norm_eps)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": lambda size, eps: nn.RMSNorm(size, eps=eps),
    "layer": lambda size, eps: nn.LayerNorm(size, eps=eps, bias=False),
}
