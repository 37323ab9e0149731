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
        old, new = getattr(source.config, name), getattr(target.config, name)
        if old != new:
            raise ValueError(f"model.{name} must be {old}, that of the weights, got {new}")
    notes: list[str] = []
    given = source.state_dict()
    tables = _tables(source, target, notes)
    for name, value in target.state_dict().items():
        if name in tables:
            value.copy_(tables[name])
        elif name in given:
            value.copy_(given[name])
    return notes


def _tables(source: MaskedDecoder, target: MaskedDecoder, notes: list[str]) -> dict[str, Tensor]:
    """Return the tables whose size may differ: position tables and those indexed by token id."""
    old, new = source.state_dict(), target.state_dict()
    tables: dict[str, Tensor] = {}
    for side in ("left", "right"):
        name = f"{side}_position.weight"
        if name in old and name in new:
            # Only a leading BOS uses the last row, so it is copied instead of interpolated.
            rows = _resized(old[name][:-1], len(new[name]) - 1, what=f"{side} text", notes=notes)
            tables[name] = torch.cat([rows, old[name][-1:]])
        elif name in new:
            notes.append(f"{side} text is new: its positions start at random")
    for axis in ("row", "column"):
        name = f"{axis}_position.weight"
        tables[name] = _resized(old[name], len(new[name]), what=f"image {axis}s", notes=notes)
    texts = _sizes(source.vocabulary)[:3], _sizes(target.vocabulary)[:3]
    images = _sizes(source.vocabulary)[3:], _sizes(target.vocabulary)[3:]
    for name, sizes in (("text_embedding.weight", texts), ("image_embedding.weight", images)):
        tables[name] = _rows(old[name], new[name], *sizes)
    both = [_sizes(model.vocabulary) for model in (source, target)]
    for name in ("to_logits.weight", "to_logits.bias"):
        tables[name] = _rows(old[name], new[name], *both)
    for what, was, now in zip(ID_KINDS, *both, strict=True):
        if was != now and what != "left padding":
            words = "new rows start at random" if now > was else "the last rows are cut"
            notes.append(f"{what} {was} -> {now}: {words}")
    return tables


ID_KINDS = ("BPE ids", "text specials", "left padding", "codes", "image specials")


def _sizes(vocabulary: Vocabulary) -> list[int]:
    """Return the number of ids of each kind in the order of the logits, as in ``ID_KINDS``."""
    return [
        vocabulary.bpe_size,
        vocabulary.num_text_specials,
        vocabulary.num_left_paddings,
        vocabulary.codebook_size,
        vocabulary.num_image_specials,
    ]


def _rows(old: Tensor, new: Tensor, was: list[int], now: list[int]) -> Tensor:
    """Return ``new`` with the rows of ``old`` copied in, separately for each kind of id.

    Args:
        old: table or bias of the source, ``(sum(was), ...)``.
        new: table or bias of the target, ``(sum(now), ...)``.
        was: number of ids of each kind in ``old``.
        now: number of ids of each kind in ``new``.
    """
    parts = []
    for before, after in zip(torch.split(old, was), torch.split(new, now), strict=True):
        kept = min(len(before), len(after))
        parts.append(torch.cat([before[:kept].to(after), after[kept:]]))
    return torch.cat(parts)


def _resized(table: Tensor, length: int, *, what: str, notes: list[str]) -> Tensor:
    """Return a position table ``(L, D)`` cut or interpolated to another length."""
    if len(table) == length:
        return table
    is_cut = what.endswith("text") and length < len(table)
    notes.append(
        f"{what} {len(table)} -> {length}: positions {'cut' if is_cut else 'interpolated'}"
    )
    if is_cut:
        return table[:length]
    columns = table.float().t()[None]  # (1, D, L)
    return F.interpolate(columns, length, mode="linear", align_corners=True)[0].t().to(table)
