"""Transfer of a trained decoder's weights to another layout or vocabulary.

Existing embedding rows are copied, and additional rows keep the target's initialisation.  A
shorter text drops its last position embeddings.  A longer text or an image of another size gets
linearly interpolated position embeddings.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rudolph.models.rudolph.decoder import MaskedDecoder
from rudolph.sequence.layout import Vocabulary

SAME_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "sandwich_norm",
    "qk_norm",
    "positional_padding",
    "double_final_norm",
    "leading_bos",
)


@torch.no_grad()
def adapt(source: MaskedDecoder, target: MaskedDecoder) -> list[str]:
    """Copy the weights of ``source`` into ``target``, resizing embedding tables where needed.

    Args:
        source: trained decoder.
        target: decoder to overwrite in place; it may differ in layout and vocabulary sizes.

    Returns:
        One line per change of size.

    Raises:
        ValueError: naming the first setting of ``SAME_FIELDS`` that differs.
    """
    for name in SAME_FIELDS:
        source_value, target_value = getattr(source.config, name), getattr(target.config, name)
        if source_value != target_value:
            raise ValueError(
                f"model.{name} must be {source_value}, as in the weights, got {target_value}"
            )
    notes: list[str] = []
    weights = source.state_dict()
    tables = _tables(source, target, notes)
    for name, value in target.state_dict().items():
        if name in tables:
            value.copy_(tables[name])
        elif name in weights:
            value.copy_(weights[name])
    return notes


def _tables(source: MaskedDecoder, target: MaskedDecoder, notes: list[str]) -> dict[str, Tensor]:
    """Return the tables whose size may differ: position tables and those indexed by token id."""
    old, new = source.state_dict(), target.state_dict()
    tables: dict[str, Tensor] = {}
    for side in ("left", "right"):
        name = f"{side}_position.weight"
        if name in old and name in new:
            # The table has one row more than the text.  The extra row is copied, not interpolated.
            # With a leading BOS it is the first row; otherwise it is the last row, and unused.
            start = source.num_leading if side == "left" else 0
            before, rows, after = old[name].tensor_split((start, len(old[name]) - 1 + start))
            rows = _resize_positions(rows, len(new[name]) - 1, segment=f"{side} text", notes=notes)
            tables[name] = torch.cat([before, rows, after])
        elif name in new:
            notes.append(f"{side} text is new: its positions start at random")
    for axis in ("row", "column"):
        name = f"{axis}_position.weight"
        tables[name] = _resize_positions(
            old[name], len(new[name]), segment=f"image {axis}s", notes=notes
        )
    texts = _vocabulary_sizes(source.vocabulary)[:3], _vocabulary_sizes(target.vocabulary)[:3]
    images = _vocabulary_sizes(source.vocabulary)[3:], _vocabulary_sizes(target.vocabulary)[3:]
    for name, sizes in (("text_embedding.weight", texts), ("image_embedding.weight", images)):
        tables[name] = _copy_rows(old[name], new[name], *sizes)
    sizes_of_both = [_vocabulary_sizes(model.vocabulary) for model in (source, target)]
    for name in ("to_logits.weight", "to_logits.bias"):
        tables[name] = _copy_rows(old[name], new[name], *sizes_of_both)
    for id_kind, old_size, new_size in zip(ID_KINDS, *sizes_of_both, strict=True):
        if old_size != new_size and id_kind != "left padding":
            effect = "new rows start at random" if new_size > old_size else "the last rows are cut"
            notes.append(f"{id_kind} {old_size} -> {new_size}: {effect}")
    return tables


ID_KINDS = ("BPE ids", "text specials", "left padding", "codes", "image specials")


def _vocabulary_sizes(vocabulary: Vocabulary) -> list[int]:
    """Return the number of ids of each kind in the order of the logits, as in ``ID_KINDS``."""
    return [
        vocabulary.bpe_size,
        vocabulary.num_text_specials,
        vocabulary.num_left_paddings,
        vocabulary.codebook_size,
        vocabulary.num_image_specials,
    ]


def _copy_rows(old: Tensor, new: Tensor, old_sizes: list[int], new_sizes: list[int]) -> Tensor:
    """Return ``new`` with the rows of ``old`` copied in, separately for each kind of id.

    Args:
        old: table or bias of the source, ``(sum(old_sizes), ...)``.
        new: table or bias of the target, ``(sum(new_sizes), ...)``.
        old_sizes: number of ids of each kind in ``old``.
        new_sizes: number of ids of each kind in ``new``.
    """
    parts = []
    for old_rows, new_rows in zip(
        torch.split(old, old_sizes), torch.split(new, new_sizes), strict=True
    ):
        num_kept = min(len(old_rows), len(new_rows))
        parts.append(torch.cat([old_rows[:num_kept].to(new_rows), new_rows[num_kept:]]))
    return torch.cat(parts)


def _resize_positions(table: Tensor, length: int, *, segment: str, notes: list[str]) -> Tensor:
    """Return a position table ``(L, D)`` cut or interpolated to another length."""
    if len(table) == length:
        return table
    is_cut = segment.endswith("text") and length < len(table)
    notes.append(
        f"{segment} {len(table)} -> {length}: positions {'cut' if is_cut else 'interpolated'}"
    )
    if is_cut:
        return table[:length]
    columns = table.float().t()[None]  # (1, D, L)
    return F.interpolate(columns, length, mode="linear", align_corners=True)[0].t().to(table)
