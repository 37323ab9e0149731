"""The masked decoder: one transformer over left text, image tokens and right text.

``tokens -> embed -> layers (each with its mask) -> norms -> logits of text and image``

Tokens are one int tensor in RUDOLPH's convention: 0 pads both texts, image ids start at 0, and
the segment of a token is told by its position alone.

Source: RuDOLPH, ``rudolph/model/model.py`` and ``transformer.py``; CogView (arXiv:2105.13290) for
sandwich norms and PB-relax; Henry 2020 (arXiv:2010.04245) and Chameleon (arXiv:2405.09818) for
norms of queries and keys.

Shapes: B batch, T tokens, D hidden size, N heads, H head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rudolph.models.layers.attention import (
    MAXIMA,
    FullView,
    KeyValue,
    KVView,
    attention,
    block_mask,
)
from rudolph.models.layers.dropout import apply_dropout
from rudolph.models.layers.kv_cache import CacheSpan, KeyValueCache, Selections
from rudolph.models.rudolph.compiled import compile_function
from rudolph.sequence.layout import BOS, PAD, SequenceLayout, Vocabulary
from rudolph.sequence.masks import layer_masks, mask_table, parse_mask, right_without_left

Head = Callable[[Tensor], Tensor]

HALF_MAX = 65504.0
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What embeddings of image tokens are before any training.
IMAGE_EMBEDDING_INITS = ("random", "codebook")
# The share of variance that tells codes apart which are near.
OWN_SHARE = 0.25


@dataclass(frozen=True)
class DecoderConfig:
    """The transformer; lengths are the layout's and sizes of tables the vocabulary's.

    ``layer_masks`` is tiled over the depth and the last layer takes ``last_layer_mask`` (null: no
    mask of its own).  ``embedding_gradient`` scales the gradient that reaches the embeddings.

    ``leading_bos`` is ruDALL-E v2's: one more ``BOS`` before the sequence, whose last token leaves
    at the end, while masks stay where they were (rudalle, ``dalle/model.py``, ``hf_version``).

    ``image_embedding_init`` says what the embeddings of image tokens are at first: ``random``, or
    ``codebook``, where codes that are near in the VQ-GAN are near here too
    (``init_from_codebook``). With ``init_by_name`` each part is drawn by its name, so that
    decoders which differ in one part begin alike in all others (``init_by_name``).

    ``qk_norm`` normalises queries and keys of each head.  ``attention_precision`` names the type
    in which attention is computed, whatever the machine's own (null), so that types can be
    compared anywhere; PB-relax subtracts the maximum of a ``row`` or of the whole ``matrix`` of
    scores, as the reference does.  Without ``positional_padding`` one id pads the left text
    everywhere.
    """

    num_layers: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    layer_masks: tuple[str, ...] = ("row", "column", "row", "conv(7)")
    last_layer_mask: str | None = "conv(9)"
    right_attends_left: bool = True
    sandwich_norm: bool = True
    qk_norm: bool = False
    pb_relax: bool = True
    pb_relax_maximum: str = "row"
    attention_precision: str | None = None
    double_final_norm: bool = True
    leading_bos: bool = False
    gelu: str = "tanh"
    embedding_gradient: float = 0.1
    attention_dropout: float = 0.1
    output_dropout: float = 0.1
    token_init_std: float = 1.0
    position_init_std: float = 0.02
    image_embedding_init: str = "random"
    init_by_name: bool = False
    positional_padding: bool = True

    def __post_init__(self) -> None:
        if self.image_embedding_init not in IMAGE_EMBEDDING_INITS:
            raise ValueError(
                f"image_embedding_init must be one of {', '.join(IMAGE_EMBEDDING_INITS)}, "
                f"got {self.image_embedding_init!r}"
            )
        if self.pb_relax_maximum not in MAXIMA:
            raise ValueError(
                f"pb_relax_maximum must be one of {', '.join(MAXIMA)}, "
                f"got {self.pb_relax_maximum!r}"
            )
        for name in ("num_layers", "hidden_size", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads ({self.num_heads}), "
                f"got {self.hidden_size}"
            )
        if not self.layer_masks:
            raise ValueError("layer_masks must name at least one mask")
        self._check_masks("layer_masks", self.layer_masks)
        if self.last_layer_mask is not None:
            self._check_masks("last_layer_mask", (self.last_layer_mask,))
        if self.attention_precision not in (None, *PRECISIONS):
            raise ValueError(
                f"attention_precision must be one of {', '.join(PRECISIONS)} or null, "
                f"got {self.attention_precision!r}"
            )
        if self.gelu not in ("tanh", "none"):
            raise ValueError(f"gelu must be tanh or none (the exact one), got {self.gelu!r}")
        for name in ("embedding_gradient", "attention_dropout", "output_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("token_init_std", "position_init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @staticmethod
    def _check_masks(field: str, masks: tuple[str, ...]) -> None:
        for mask in masks:
            try:
                parse_mask(mask)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from error

    @property
    def masks(self) -> tuple[str, ...]:
        """The mask of each layer, first to last."""
        return layer_masks(self.layer_masks, self.last_layer_mask, self.num_layers)


class SegmentHead(nn.Linear):
    """Logits of all text ids and then all image ids; a token needs one part alone."""

    def __init__(self, hidden_size: int, vocabulary: Vocabulary) -> None:
        super().__init__(hidden_size, vocabulary.size)
        self.sizes = [vocabulary.text_size, vocabulary.image_size]

    def heads(self) -> list[Head]:
        """What gives the logits of the text ids, and what gives those of the image ids."""
        weight, device = self.weight, self.weight.device.type
        if torch.is_autocast_enabled(device):
            # Once, and not for each product and again for each in the backward pass.
            weight = weight.to(torch.get_autocast_dtype(device))
        weights, biases = torch.split(weight, self.sizes), torch.split(self.bias, self.sizes)
        pairs = zip(weights, biases, strict=True)
        return [partial(F.linear, weight=weight, bias=bias) for weight, bias in pairs]


class Layer(nn.Module):
    """One transformer layer: norm, attention, (norm,) add; norm, MLP, (norm,) add."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.attention_norm = nn.LayerNorm(size)
        self.to_qkv = nn.Linear(size, 3 * size)
        self.to_out = nn.Linear(size, size)
        head = size // config.num_heads
        self.query_norm = nn.LayerNorm(head) if config.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head) if config.qk_norm else nn.Identity()
        self.attention_out_norm = nn.LayerNorm(size) if config.sandwich_norm else nn.Identity()
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp_in = nn.Linear(size, 4 * size)
        self.activation = nn.GELU(approximate=config.gelu)
        self.mlp_out = nn.Linear(4 * size, size)
        self.mlp_out_norm = nn.LayerNorm(size) if config.sandwich_norm else nn.Identity()

    def forward(self, x: Tensor, look: KVView) -> Tensor:
        """``(B, T, D)``; ``look`` says what each position sees."""
        x = x + self.attention_out_norm(self.attend(self.attention_norm(x), look))
        hidden = self.activation(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out_norm(self.dropped(self.mlp_out(hidden)))

    def attend(self, x: Tensor, look: KVView) -> Tensor:
        query, seen = look.split(self.project_qkv(x))
        out = self.to_out(look.merge(self.attend_in_precision(query, seen)))
        # The reference clamps to the range of float16 in every precision.
        return self.dropped(out.clamp(-HALF_MAX, HALF_MAX))

    def project_qkv(self, x: Tensor) -> Tensor:
        """``(B, T, 3, N, H)`` of what a norm gave, ``(B, T, D)``."""
        batch, length, _ = x.shape
        qkv: Tensor = self.to_qkv(x).view(batch, length, 3, self.config.num_heads, -1)
        if not self.config.qk_norm:
            return qkv
        query, key, value = qkv.unbind(2)
        norms = self.query_norm(query), self.key_norm(key)
        return torch.stack([*(norm.to(qkv.dtype) for norm in norms), value], dim=2)

    def attend_in_precision(self, query: Tensor, seen: Sequence[KeyValue]) -> Tensor:
        """Attention in the machine's precision, or in the one that the configuration names."""
        share = self.config.attention_dropout if self.training else 0.0
        relaxed = self.config.pb_relax_maximum if self.config.pb_relax else None
        if self.config.attention_precision is None:
            return attention(query, seen, pb_relax=relaxed, dropout=share)
        dtype = PRECISIONS[self.config.attention_precision]
        seen = [part._replace(key=part.key.to(dtype), value=part.value.to(dtype)) for part in seen]
        with torch.autocast(query.device.type, enabled=False):
            out = attention(query.to(dtype), seen, pb_relax=relaxed, dropout=share)
        return out.to(query.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        return apply_dropout(x, self.config.output_dropout) if self.training else x


def run_layer(layer: nn.Module, x: Tensor, look: KVView) -> Tensor:
    """A layer as a function, so that all of them share a compilation."""
    out: Tensor = layer(x, look)
    return out


class MaskedDecoder(nn.Module):
    """Text-image-text transformer: ``model(tokens) -> logits``.

    Args:
        config: the transformer.
        layout: lengths of the three segments.
        vocabulary: sizes of the text and image tables.
    """

    def __init__(
        self, config: DecoderConfig, layout: SequenceLayout, vocabulary: Vocabulary
    ) -> None:
        super().__init__()
        if vocabulary.num_left_paddings != layout.left_text_length:
            raise ValueError(
                f"num_left_paddings must equal left_text_length ({layout.left_text_length}), "
                f"got {vocabulary.num_left_paddings}"
            )
        self.config, self.layout, self.vocabulary = config, layout, vocabulary
        # Whether training computes each layer anew in its backward pass instead of keeping it.
        self.has_checkpointing = False
        # Whether whole sequences attend by FlexAttention, on CUDA: empty blocks cost nothing.
        self.has_block_masks = False
        # Whether torch compiles the layers: in training, and for single steps of a decoding.
        self.has_compiled_layers = False
        size = config.hidden_size
        self.text_embedding = nn.Embedding(vocabulary.text_size, size)
        self.image_embedding = nn.Embedding(vocabulary.image_size, size)
        # One row more than positions: kept from ruDALL-E v2, so that released tables fit.
        self.left_position = nn.Embedding(layout.left_text_length + 1, size)
        if layout.right_text_length:
            self.right_position = nn.Embedding(layout.right_text_length + 1, size)
        self.row_position = nn.Embedding(layout.image_tokens_per_dim, size)
        self.column_position = nn.Embedding(layout.image_tokens_per_dim, size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(size)
        self.logits_norm = nn.LayerNorm(size) if config.double_final_norm else nn.Identity()
        self.to_logits = SegmentHead(size, vocabulary)
        self.register_masks()
        self.init_embeddings()

    mask_tables: Tensor

    def register_masks(self) -> None:
        """One ``(T, T)`` table for each different rule, shared by its layers."""
        names = list(dict.fromkeys(self.config.masks))
        rules = [parse_mask(name) for name in names]
        if not self.config.right_attends_left:
            rules = [right_without_left(rule) for rule in rules]
        tables = [mask_table(rule, self.layout) for rule in rules]
        self.use_masks(tables, [names.index(name) for name in self.config.masks])

    def use_masks(self, tables: Sequence[Tensor], mask_of_layer: Sequence[int]) -> None:
        """Let layer i see what ``tables[mask_of_layer[i]]`` says, ``(T, T)`` bool each."""
        self.mask_of_layer = list(mask_of_layer)
        self.known_reads: dict[CacheSpan, list[Selections]] = {}
        self.known_blocks: dict[tuple[int, torch.device], list[Any]] = {}
        self.register_buffer("mask_tables", torch.stack(list(tables)), persistent=False)

    @property
    def layer_tables(self) -> list[Tensor]:
        """The mask of each layer, ``(T, T)`` bool."""
        return [self.mask_tables[index] for index in self.mask_of_layer]

    def init_embeddings(self) -> None:
        for name, table in self.named_children():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=self._init_std(name))

    def _init_std(self, table: str) -> float:
        is_token = table.endswith("_embedding")
        return self.config.token_init_std if is_token else self.config.position_init_std

    def init_by_name(self, seed_of: Callable[[str], int]) -> None:
        """Draw every part anew, from the seed of its name."""
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                torch.manual_seed(seed_of(name))
                if isinstance(part, nn.Linear):
                    part.reset_parameters()
                else:
                    nn.init.normal_(part.weight, std=self._init_std(name))

    @torch.no_grad()
    def init_from_codebook(self, codes: Tensor) -> None:
        """Let the image embeddings be the codes ``(K, E)``, turned into the hidden size at random.

        Every dimension of the codes is brought to one variance first; of the embeddings' variance
        a quarter stays each code's own.
        """
        weight = self.image_embedding.weight
        spread = (codes - codes.mean(0)) / codes.std(0).clamp(min=1e-6)
        turn = torch.randn(codes.shape[1], weight.shape[1]) / codes.shape[1] ** 0.5
        shared = self.config.token_init_std * spread @ turn
        weight[: len(codes)] *= OWN_SHARE**0.5
        weight[: len(codes)] += (1 - OWN_SHARE) ** 0.5 * shared

    def new_cache(self, batch_size: int, *, num_positions: int | None = None) -> KeyValueCache:
        """An empty cache, with room for whole sequences unless told otherwise."""
        config, length = self.config, num_positions or self.layout.length
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        own = self.final_norm.weight.new_empty(
            config.num_layers, 2, batch_size, heads, 1, length, size
        )
        return KeyValueCache(self.mask_tables.cpu(), self.known_reads, own)

    @property
    def num_leading(self) -> int:
        """Positions before the sequence's own first token."""
        return int(self.config.leading_bos)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` of a sequence or a prefix of one, ``(B, T)``.

        With ``leading_bos`` they begin with its own, and T is at most the layout's length.
        """
        hidden = self.hidden(tokens)
        return self.to_logits(hidden)

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """What the head reads, ``(B, T, D)``; with a cache, tokens are only the new positions."""
        return self.logits_norm(self.final_norm(self.run_layers(tokens, cache)))

    def run_layers(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Output of the last layer before the final norms, ``(B, T, D)``."""
        start = 0 if cache is None else cache.length
        if start == 0:
            tokens = self._after_leading(tokens)
        end = start + tokens.shape[1]
        x = self.embed(tokens, start)
        is_compiled = self.has_compiled_layers and self.training
        looks: Sequence[KVView]
        if cache is None:
            tables = self.full_masks(end)
            looks = [FullView(tables[number], len(x)) for number in self.mask_of_layer]
        elif self.has_compiled_layers and cache.shared is not None and end - start == 1:
            is_compiled = True
            looks = cache.static_views(self.mask_of_layer)
        else:
            looks = cache.looks(end, self.mask_of_layer)
        run: Callable[[nn.Module, Tensor, Any], Tensor] = run_layer
        if is_compiled:
            run = compile_function(run_layer)
        for layer, look in zip(self.layers, looks, strict=True):
            if self.has_checkpointing and self.training:
                x = checkpoint(run, layer, x, look, use_reentrant=False)
            else:
                x = run(layer, x, look)
        if cache is not None:
            cache.length = end
        return x

    def full_masks(self, length: int) -> Sequence[Any]:
        """The different masks of a sequence's first positions, as ``KeyValue`` takes them."""
        tables = self.mask_tables[:, :length, :length].unbind()
        if not self.has_block_masks:
            return tables
        place = (length, self.mask_tables.device)
        if place not in self.known_blocks:
            self.known_blocks[place] = [block_mask(table) for table in tables]
        return self.known_blocks[place]

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the text vocabulary alone, ``(..., Vt)``."""
        return self.to_logits.heads()[0](hidden)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the image vocabulary alone, ``(..., Vi)``."""
        return self.to_logits.heads()[1](hidden)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Token plus position embeddings of the positions from ``start`` on, ``(B, T, D)``."""
        end = start + tokens.shape[1]
        if end > self.layout.length:
            raise ValueError(f"a sequence has {self.layout.length} tokens, got {end}")
        parts = [
            embed(
                tokens[:, max(low, start) - start : min(high, end) - start], max(low, start) - low
            )
            for low, high, embed in self._segments()
            if max(low, start) < min(high, end)
        ]
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        share = self.config.embedding_gradient
        return x if share == 1 else share * x + (1 - share) * x.detach()

    def _after_leading(self, tokens: Tensor) -> Tensor:
        if not self.config.leading_bos:
            return tokens
        if tokens.shape[1] > self.layout.length:
            raise ValueError(f"a sequence has {self.layout.length} tokens, got {tokens.shape[1]}")
        return F.pad(tokens, (1, 0), value=BOS)[:, : self.layout.length]

    def replace_left_padding(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Left text with each padding replaced by the padding id of its position, if any."""
        if not self.config.positional_padding:
            return tokens
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        return torch.where(tokens == PAD, self.vocabulary.first_left_padding + positions, tokens)

    def _segments(self) -> tuple[tuple[int, int, Callable[[Tensor, int], Tensor]], ...]:
        """First position, end and embedding of each segment."""
        image, right = (
            start + self.num_leading
            for start in (self.layout.image_start, self.layout.right_text_start)
        )
        return (
            (0, image, self._embed_left),
            (image, right, self._embed_image),
            (right, self.layout.length, self._embed_right),
        )

    def _embed_left(self, tokens: Tensor, first: int) -> Tensor:
        table = self.left_position.weight[first : first + tokens.shape[1]]
        padded = self.replace_left_padding(tokens, first - self.num_leading)
        return self.text_embedding(padded) + table

    def _embed_image(self, tokens: Tensor, first: int) -> Tensor:
        side = self.layout.image_tokens_per_dim
        index = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        position = self.row_position(index // side) + self.column_position(index % side)
        return self.image_embedding(tokens) + position

    def _embed_right(self, tokens: Tensor, first: int) -> Tensor:
        table = self.right_position.weight[first : first + tokens.shape[1]]
        return self.text_embedding(tokens) + table
