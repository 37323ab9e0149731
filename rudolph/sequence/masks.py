"""Causal attention masks over text and image tokens, written as rules on positions.

A mask is a rule ``(layout, query, key) -> bool`` on broadcastable position tensors.  It is true
where the query may attend to the key.  Every rule is causal, and restricts only the attention of
image tokens to image tokens; everything that involves text is plainly causal.  One rule yields the
dense table for the attention kernel, the row for a decoding step, the text drawing and the
density.

To add a mask, write its rule and list it in ``PLAIN_MASKS`` or, if it takes a kernel size, in
``KERNEL_MASKS``.  Experiment files write a mask as ``row`` or ``conv(7)``.

In the drawings each line is a query and each column is a key; ``#`` marks an attended key.

Shapes: T is the length of the sequence.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rudolph.sequence.layout import SequenceLayout

Rule = Callable[[SequenceLayout, Tensor, Tensor], Tensor]


def causal(layout: SequenceLayout, query: Tensor, key: Tensor) -> Tensor:
    """Attend to the query's own position and to every earlier position.

    >>> print(draw_mask(causal, SequenceLayout(1, 2, 0)))
    #....
    ##...
    ###..
    ####.
    #####
    """
    return key <= query


def row(layout: SequenceLayout, query: Tensor, key: Tensor) -> Tensor:
    """Attend to the query itself and to the ``image_tokens_per_dim`` image tokens before it.

    The window starts at the token right above the query.

    >>> print(draw_mask(row, SequenceLayout(1, 2, 0)))
    #....
    ##...
    ###..
    ####.
    #.###

    Source: ru-dolph, ``rudolph/model/image_attention.py``.  The window slides with the query, and
    is not one row of the image.
    """
    distance = query - key
    return _within_image(layout, query, key, distance <= layout.image_tokens_per_dim)


def row_block(layout: SequenceLayout, query: Tensor, key: Tensor) -> Tensor:
    """Attend to the query itself and to the earlier image tokens of its row.

    >>> print(draw_mask(row_block, SequenceLayout(1, 2, 0)))
    #....
    ##...
    ###..
    #..#.
    #..##

    Source: DALLE-pytorch, ``SparseAxialCausalAttention`` with axis 0.
    """
    (query_row, _), (key_row, _) = _cell(layout, query), _cell(layout, key)
    return _within_image(layout, query, key, query_row == key_row)


def column(layout: SequenceLayout, query: Tensor, key: Tensor) -> Tensor:
    """Attend to the query itself and to the earlier image tokens of its column.

    >>> print(draw_mask(column, SequenceLayout(1, 2, 0)))
    #....
    ##...
    #.#..
    ##.#.
    #.#.#
    """
    (_, query_column), (_, key_column) = _cell(layout, query), _cell(layout, key)
    return _within_image(layout, query, key, query_column == key_column)


def conv(kernel: int) -> Rule:
    """Return the rule that attends to a ``kernel`` x ``kernel`` window centred on the query.

    The window is clipped at the image borders.

    >>> print(draw_mask(conv(3), SequenceLayout(1, 3, 0)))
    #.........
    ##........
    ###.......
    #.##......
    ###.#.....
    ######....
    #.##.##...
    #...##.#..
    #...#####.
    #....##.##

    Args:
        kernel: side of the window in tokens, odd.

    Raises:
        ValueError: if ``kernel`` is even or smaller than 1.

    Source: ru-dolph, ``get_conv_mask``.
    """
    radius = _radius(kernel)

    def rule(layout: SequenceLayout, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = _offsets(layout, query, key)
        is_near = (rows.abs() <= radius) & (columns.abs() <= radius)
        return _within_image(layout, query, key, is_near)

    return rule


def conv_torus(kernel: int) -> Rule:
    """Return the rule of ``conv`` with a window that wraps around the image borders.

    Args:
        kernel: side of the window in tokens, odd.

    Raises:
        ValueError: if ``kernel`` is even or smaller than 1.

    Source: rudalle, ``dalle/image_attention.py`` with ``hf_version='v2'``.
    """
    radius = _radius(kernel)

    def rule(layout: SequenceLayout, query: Tensor, key: Tensor) -> Tensor:
        side = max(layout.image_tokens_per_dim, 1)
        rows, columns = (offset % side for offset in _offsets(layout, query, key))
        is_near = torch.minimum(rows, side - rows) <= radius
        is_near = is_near & (torch.minimum(columns, side - columns) <= radius)
        return _within_image(layout, query, key, is_near)

    return rule


def right_without_left(rule: Rule) -> Rule:
    """Return a rule without attention from right text to left text.

    Source: ru-dolph before 0.0.1rc5 (the first 350M checkpoint).
    """

    def hidden(layout: SequenceLayout, query: Tensor, key: Tensor) -> Tensor:
        is_hidden = (query >= layout.right_text_start) & (key < layout.image_start)
        return rule(layout, query, key) & ~is_hidden

    return hidden


def parse_mask(text: str) -> Rule:
    """Return the rule that an experiment file names, as in ``row`` or ``conv(7)``.

    Raises:
        ValueError: if the name is unknown, or the kernel size is missing, even or not allowed.
    """
    match = re.fullmatch(r"(\w+)(?:\((\d+)\))?", text.strip())
    name, kernel = match.groups() if match else (text, None)
    if name not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(mask_names())}, got {text!r}")
    if name in KERNEL_MASKS:
        if kernel is None:
            raise ValueError(f"mask {name}: expected a kernel size, as in {name}(7), got {text!r}")
        return KERNEL_MASKS[name](int(kernel))
    if kernel is not None:
        raise ValueError(f"mask {name}: expected no kernel size, got {text!r}")
    return PLAIN_MASKS[name]


def mask_names() -> list[str]:
    """Return the spelling of each mask in an experiment file, such as ``row`` or ``conv(K)``."""
    return [f"{name}(K)" if name in KERNEL_MASKS else name for name in MASKS]


def layer_masks(pattern: Sequence[str], last: str | None, num_layers: int) -> tuple[str, ...]:
    """Return the mask name of each layer: ``pattern`` tiled over the depth, then ``last``.

    If the last layer is a column layer, it keeps its column mask.  ru-dolph has the same order:
    its decoders of 4k + 2 layers end with a column mask (``rudolph/model/transformer.py``).

    >>> layer_masks(["row", "column", "row", "conv(7)"], "conv(9)", 6)
    ('row', 'column', 'row', 'conv(7)', 'row', 'column')

    Args:
        pattern: mask names, repeated over the layers.
        last: mask name of the last layer; None keeps the mask of the pattern.
        num_layers: depth of the decoder.
    """
    names = [pattern[layer % len(pattern)] for layer in range(num_layers)]
    if last is not None and names[-1] != "column":
        names[-1] = last
    return tuple(names)


def mask_table(rule: Rule, layout: SequenceLayout) -> Tensor:
    """Return the dense mask ``(T, T)``, bool; row t holds the keys that position t attends to."""
    positions = torch.arange(layout.length)
    return rule(layout, positions[:, None], positions[None, :])


def mask_row(rule: Rule, layout: SequenceLayout, position: int) -> Tensor:
    """Return the mask row of one query over the keys up to its position.

    The row is ``(position + 1,)`` bool.
    """
    return rule(layout, torch.tensor(position), torch.arange(position + 1))


def density(rule: Rule, layout: SequenceLayout) -> float:
    """Return the fraction of all ``T * T`` query-key pairs that the mask allows, in [0, 1]."""
    return mask_table(rule, layout).float().mean().item()


def draw_mask(rule: Rule, layout: SequenceLayout) -> str:
    """Return the mask as text with one line per query; ``#`` marks an attended key."""
    table = mask_table(rule, layout)
    return "\n".join(
        "".join("#" if is_attended else "." for is_attended in line) for line in table.tolist()
    )


def _radius(kernel: int) -> int:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel of a conv mask must be odd and at least 1, got {kernel}")
    return kernel // 2


def _cell(layout: SequenceLayout, position: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and column of an image position; meaningless for text positions."""
    index = position - layout.image_start
    side = max(layout.image_tokens_per_dim, 1)
    return index // side, index % side


def _offsets(layout: SequenceLayout, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    (query_row, query_column), (key_row, key_column) = _cell(layout, query), _cell(layout, key)
    return query_row - key_row, query_column - key_column


def _is_image(layout: SequenceLayout, position: Tensor) -> Tensor:
    return (position >= layout.image_start) & (position < layout.right_text_start)


def _within_image(layout: SequenceLayout, query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
    """Return the causal mask, restricted to ``allowed`` where query and key are image tokens."""
    both_image = _is_image(layout, query) & _is_image(layout, key)
    return (key <= query) & (allowed | ~both_image)


PLAIN_MASKS: dict[str, Rule] = {
    "causal": causal,
    "row": row,
    "row_block": row_block,
    "column": column,
}
KERNEL_MASKS: dict[str, Callable[[int], Rule]] = {"conv": conv, "conv_torus": conv_torus}
MASKS = (*PLAIN_MASKS, *KERNEL_MASKS)
