"""The masked decoder: one causal transformer over left text, image tokens and right text.

``tokens -> embed -> layers (each with its mask) -> norms -> logits of text and image``

Tokens are one integer tensor in RUDOLPH's convention: 0 pads both texts and image ids start at 0.
The position of a token alone determines its segment.

Training, prompt processing and incremental decoding share ``MaskedDecoder.run_layers``.  They
differ only in the ``KVView`` that each layer receives, which decides what its positions attend to.

Source: RuDOLPH, ``rudolph/model/model.py`` and ``transformer.py``; CogView (arXiv:2105.13290) for
sandwich norms and PB-relax; Henry 2020 (arXiv:2010.04245) and Chameleon (arXiv:2405.09818) for
query and key norms.

Shapes: B batch, T tokens, D hidden size, N heads, H head size, V vocabulary size, Vt text ids, Vi
image ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rudolph.files.constraints import Count, Fraction, Positive, check
from rudolph.models.layers.attention import (
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
# Fraction of the variance that stays random per code, so that similar codes remain distinct.
RANDOM_VARIANCE_FRACTION = 0.25


@dataclass(frozen=True)
class DecoderConfig:
    """The transformer's settings; lengths belong to the layout and table sizes to the vocabulary.

    Attributes:
        num_layers: number of transformer layers.
        hidden_size: width D, a multiple of ``num_heads``.
        num_heads: attention heads per layer.
        layer_masks: mask names, tiled over the depth (see ``masks.parse_mask``).
        last_layer_mask: mask of the last layer; None keeps the tiled one.
        right_attends_left: whether right text may attend to left text.
        sandwich_norm: normalise the output of attention and MLP before each residual addition.
        qk_norm: apply layer norm to the queries and keys of each head.
        pb_relax: keep float16 attention scores from overflowing (``attention.apply_pb_relax``).
        pb_relax_maximum: maximum that PB-relax subtracts, per ``row`` or over the whole ``matrix``
            of scores as in the reference.
        attention_precision: dtype of attention, a key of ``PRECISIONS``, so that dtypes can be
            compared on any machine; None keeps the current dtype.
        double_final_norm: apply a second layer norm before the logits.
        leading_bos: prepend one more ``BOS`` and drop the last token, without shifting the masks.
            ruDALL-E v2 does this (rudalle, ``dalle/model.py``, ``hf_version``).
        gelu: ``tanh`` for the approximation, ``none`` for the exact function.
        embedding_gradient: factor on the gradient that reaches the embeddings, in [0, 1].
        attention_dropout: dropout probability of attention weights.
        output_dropout: dropout probability of attention and MLP outputs.
        token_init_std: standard deviation of the initial token embeddings.
        position_init_std: standard deviation of the initial position embeddings.
        image_embedding_init: ``random``, or ``codebook`` to give similar VQ-GAN codes similar
            embeddings (``MaskedDecoder.init_from_codebook``).
        init_by_name: seed each module from its name, so that decoders which differ in one part
            start equal in all others (``MaskedDecoder.init_by_name``).
        positional_padding: use a separate padding id per left-text position; otherwise id 0 pads
            every position.
    """

    num_layers: Count = 24
    hidden_size: Count = 1024
    num_heads: Count = 16
    layer_masks: tuple[str, ...] = ("row", "column", "row", "conv(7)")
    last_layer_mask: str | None = "conv(9)"
    right_attends_left: bool = True
    sandwich_norm: bool = True
    qk_norm: bool = False
    pb_relax: bool = True
    pb_relax_maximum: Literal["row", "matrix"] = "row"
    attention_precision: Literal["float32", "bfloat16", "float16"] | None = None
    double_final_norm: bool = True
    leading_bos: bool = False
    gelu: Literal["tanh", "none"] = "tanh"
    embedding_gradient: Fraction = 0.1
    attention_dropout: Fraction = 0.1
    output_dropout: Fraction = 0.1
    token_init_std: Positive = 1.0
    position_init_std: Positive = 0.02
    image_embedding_init: Literal["random", "codebook"] = "random"
    init_by_name: bool = False
    positional_padding: bool = True

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
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

    @staticmethod
    def _check_masks(field: str, masks: tuple[str, ...]) -> None:
        for mask in masks:
            try:
                parse_mask(mask)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from error

    @property
    def masks(self) -> tuple[str, ...]:
        """Return the mask name of each layer, first to last."""
        return layer_masks(self.layer_masks, self.last_layer_mask, self.num_layers)


class SegmentHead(nn.Linear):
    """The output layer: logits of all text ids, followed by logits of all image ids.

    A position needs only the logits of its own segment, so ``heads`` splits the layer in two.
    """

    def __init__(self, hidden_size: int, vocabulary: Vocabulary) -> None:
        super().__init__(hidden_size, vocabulary.size)
        self.sizes = [vocabulary.text_size, vocabulary.image_size]

    def heads(self) -> list[Head]:
        """Return the text head and the image head, each mapping ``(..., D)`` to its own logits."""
        weight, device = self.weight, self.weight.device.type
        if torch.is_autocast_enabled(device):
            # Cast once here; autocast would cast for every product and again in the backward pass.
            weight = weight.to(torch.get_autocast_dtype(device))
        weights, biases = torch.split(weight, self.sizes), torch.split(self.bias, self.sizes)
        pairs = zip(weights, biases, strict=True)
        return [partial(F.linear, weight=weight, bias=bias) for weight, bias in pairs]


class Layer(nn.Module):
    """One transformer layer: norm, attention, (norm,) add; norm, MLP, (norm,) add.

    The norms in parentheses exist only with ``sandwich_norm``.
    """

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

    def forward(self, x: Tensor, view: KVView) -> Tensor:
        """Return the layer's output ``(B, T, D)``.

        Args:
            x: hidden states ``(B, T, D)``.
            view: the view that decides which keys each position attends to.
        """
        x = x + self.attention_out_norm(self.attend(self.attention_norm(x), view))
        hidden = self.activation(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out_norm(self.apply_output_dropout(self.mlp_out(hidden)))

    def attend(self, x: Tensor, view: KVView) -> Tensor:
        """Return the attention output ``(B, T, D)`` for normalised hidden states ``(B, T, D)``."""
        query, key_values = view.split(self.project_qkv(x))
        out = self.to_out(view.merge(self.attend_in_precision(query, key_values)))
        # The reference clamps to the float16 range in every dtype.
        return self.apply_output_dropout(out.clamp(-HALF_MAX, HALF_MAX))

    def project_qkv(self, x: Tensor) -> Tensor:
        """Compute queries, keys and values ``(B, T, 3, N, H)`` of normalised ``(B, T, D)``."""
        batch, length, _ = x.shape
        qkv: Tensor = self.to_qkv(x).view(batch, length, 3, self.config.num_heads, -1)
        if not self.config.qk_norm:
            return qkv
        query, key, value = qkv.unbind(2)  # each (B, T, N, H)
        norms = self.query_norm(query), self.key_norm(key)
        return torch.stack([*(norm.to(qkv.dtype) for norm in norms), value], dim=2)

    def attend_in_precision(self, query: Tensor, key_values: Sequence[KeyValue]) -> Tensor:
        """Compute attention in ``attention_precision``, or in the current dtype if it is None."""
        dropout = self.config.attention_dropout if self.training else 0.0
        pb_relax = self.config.pb_relax_maximum if self.config.pb_relax else None
        if self.config.attention_precision is None:
            return attention(query, key_values, pb_relax=pb_relax, dropout=dropout)
        dtype = PRECISIONS[self.config.attention_precision]
        key_values = [
            part._replace(key=part.key.to(dtype), value=part.value.to(dtype))
            for part in key_values
        ]
        with torch.autocast(query.device.type, enabled=False):
            out = attention(query.to(dtype), key_values, pb_relax=pb_relax, dropout=dropout)
        return out.to(query.dtype)

    def apply_output_dropout(self, x: Tensor) -> Tensor:
        """Apply output dropout in training mode."""
        return apply_dropout(x, self.config.output_dropout) if self.training else x


def run_layer(layer: nn.Module, x: Tensor, view: KVView) -> Tensor:
    """Call a layer as a plain function, so that all layers share one compiled function."""
    out: Tensor = layer(x, view)
    return out


class MaskedDecoder(nn.Module):
    """A text-image-text transformer: ``model(tokens) -> logits``.

    Args:
        config: transformer settings.
        layout: lengths of the three segments.
        vocabulary: sizes of the text and image tables.

    Raises:
        ValueError: if ``vocabulary.num_left_paddings`` differs from ``layout.left_text_length``.
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
        # Recompute each layer's activations in the backward pass of training.
        self.has_checkpointing = False
        # On CUDA, use FlexAttention for whole sequences: it skips empty mask blocks.
        self.has_block_masks = False
        # Compile the layers in training and in single-token decoding steps.
        self.has_compiled_layers = False
        # The weights are sharded over devices, see ``training.sharding``.
        self.is_sharded = False
        size = config.hidden_size
        self.text_embedding = nn.Embedding(vocabulary.text_size, size)
        self.image_embedding = nn.Embedding(vocabulary.image_size, size)
        # ruDALL-E v2 needs one more row for its leading BOS; all released tables have it.
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
        """Build one ``(T, T)`` table per distinct mask of the config, shared by its layers."""
        names = list(dict.fromkeys(self.config.masks))
        rules = [parse_mask(name) for name in names]
        if not self.config.right_attends_left:
            rules = [right_without_left(rule) for rule in rules]
        tables = [mask_table(rule, self.layout) for rule in rules]
        self.use_masks(tables, [names.index(name) for name in self.config.masks])

    def use_masks(self, tables: Sequence[Tensor], mask_of_layer: Sequence[int]) -> None:
        """Set the mask tables; layer i uses ``tables[mask_of_layer[i]]``.

        Args:
            tables: distinct masks, ``(T, T)`` bool each.
            mask_of_layer: index of each layer's mask in ``tables``.
        """
        self.mask_of_layer = list(mask_of_layer)
        # Results derived from the tables are memoised here, so new tables clear them.
        self.known_reads: dict[CacheSpan, list[Selections]] = {}
        self.known_blocks: dict[tuple[int, torch.device], list[Any]] = {}
        self.register_buffer("mask_tables", torch.stack(list(tables)), persistent=False)

    @property
    def layer_tables(self) -> list[Tensor]:
        """Return the mask of each layer, ``(T, T)`` bool."""
        return [self.mask_tables[index] for index in self.mask_of_layer]

    def init_embeddings(self) -> None:
        """Initialise all embedding tables from normal distributions."""
        for name, table in self.named_children():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=self._init_std(name))

    def _init_std(self, table: str) -> float:
        is_token = table.endswith("_embedding")
        return self.config.token_init_std if is_token else self.config.position_init_std

    def init_by_name(self, seed_of: Callable[[str], int]) -> None:
        """Reinitialise every linear and embedding layer with a seed derived from its name.

        Args:
            seed_of: maps a module's name to the seed for torch's global generator.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                torch.manual_seed(seed_of(name))
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
                else:
                    nn.init.normal_(module.weight, std=self._init_std(name))

    @torch.no_grad()
    def init_from_codebook(self, codes: Tensor) -> None:
        """Mix a random projection of VQ-GAN codes into the image embeddings.

        Each code dimension is first scaled to unit variance.  A fraction
        ``RANDOM_VARIANCE_FRACTION`` of the embedding variance stays independent per code.

        Args:
            codes: code vectors ``(K, E)`` of the quantizer.
        """
        weight = self.image_embedding.weight
        normalised = (codes - codes.mean(0)) / codes.std(0).clamp(min=1e-6)
        projection = torch.randn(codes.shape[1], weight.shape[1]) / codes.shape[1] ** 0.5  # (E, D)
        projected = self.config.token_init_std * normalised @ projection
        weight[: len(codes)] *= RANDOM_VARIANCE_FRACTION**0.5
        weight[: len(codes)] += (1 - RANDOM_VARIANCE_FRACTION) ** 0.5 * projected

    def new_cache(self, batch_size: int, *, num_positions: int | None = None) -> KeyValueCache:
        """Return an empty key/value cache.

        Args:
            batch_size: number of prompts P, with one sample each.
            num_positions: capacity in positions; None reserves a whole sequence.
        """
        config, length = self.config, num_positions or self.layout.length
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        own = self.final_norm.weight.new_empty(
            config.num_layers, 2, batch_size, heads, 1, length, size
        )
        return KeyValueCache(self.mask_tables.cpu(), self.known_reads, own)

    @property
    def num_leading(self) -> int:
        """Return the number of positions before the sequence's own first token."""
        return int(self.config.leading_bos)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(B, T, V)`` for tokens ``(B, T)``, a sequence or a prefix of one.

        With ``leading_bos`` the first logits belong to the extra ``BOS``, and T is at most the
        layout's length.

        Raises:
            ValueError: if the tokens are longer than the layout.
        """
        hidden = self.hidden(tokens)
        return self.to_logits(hidden)

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the normalised states ``(B, T, D)`` that the head reads.

        With ``leading_bos``, a call at position 0 returns the state of the extra ``BOS`` first.

        Args:
            tokens: ``(B, T)``; with a cache, only the new positions.
            cache: keys and values of the earlier positions, extended in place.
        """
        return self.logits_norm(self.final_norm(self.run_layers(tokens, cache)))

    def run_layers(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the last layer's output ``(B, T, D)``, before the final norms.

        The arguments are those of ``hidden``.
        """
        start = 0 if cache is None else cache.length
        if start == 0:
            tokens = self._prepend_bos(tokens)
        end = start + tokens.shape[1]
        x = self.embed(tokens, start)
        is_compiled = self.has_compiled_layers and self.training
        views: Sequence[KVView]
        if cache is None:
            tables = self.full_masks(end)
            views = [FullView(tables[mask], len(x)) for mask in self.mask_of_layer]
        elif self.has_compiled_layers and cache.shared is not None and end - start == 1:
            is_compiled = True
            views = cache.static_views(self.mask_of_layer)
        else:
            views = cache.views(end, self.mask_of_layer)
        run: Callable[[nn.Module, Tensor, Any], Tensor] = run_layer
        if is_compiled:
            run = compile_function(run_layer)
        for layer, view in zip(self.layers, views, strict=True):
            if self.has_checkpointing and self.training:
                x = checkpoint(run, layer, x, view, use_reentrant=False)
            else:
                x = run(layer, x, view)
        if cache is not None:
            cache.length = end
        return x

    def full_masks(self, length: int) -> Sequence[Any]:
        """Return the distinct masks of the first ``length`` positions, for ``KeyValue.mask``."""
        tables = self.mask_tables[:, :length, :length].unbind()
        if not self.has_block_masks:
            return tables
        key = (length, self.mask_tables.device)
        if key not in self.known_blocks:
            self.known_blocks[key] = [block_mask(table) for table in tables]
        return self.known_blocks[key]

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(..., Vt)`` over the text vocabulary only."""
        return self.to_logits.heads()[0](hidden)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(..., Vi)`` over the image vocabulary only."""
        return self.to_logits.heads()[1](hidden)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return token plus position embeddings ``(B, T, D)``, for positions ``start`` onwards.

        Raises:
            ValueError: if the tokens reach beyond the layout.
        """
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
        gradient_scale = self.config.embedding_gradient
        # Equal to x in value; only the gradient is scaled.
        return x if gradient_scale == 1 else gradient_scale * x + (1 - gradient_scale) * x.detach()

    def _prepend_bos(self, tokens: Tensor) -> Tensor:
        if not self.config.leading_bos:
            return tokens
        if tokens.shape[1] > self.layout.length:
            raise ValueError(f"a sequence has {self.layout.length} tokens, got {tokens.shape[1]}")
        return F.pad(tokens, (1, 0), value=BOS)[:, : self.layout.length]

    def replace_left_padding(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Replace each padding token of the left text with the padding id of its position.

        Without ``positional_padding`` the tokens are returned unchanged.

        Args:
            tokens: ``(B, T)``, a slice of the left text.
            first: left-text position of the first token.
        """
        if not self.config.positional_padding:
            return tokens
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        return torch.where(tokens == PAD, self.vocabulary.first_left_padding + positions, tokens)

    def _segments(self) -> tuple[tuple[int, int, Callable[[Tensor, int], Tensor]], ...]:
        """Return the first position, the end and the embedding function of each segment."""
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
