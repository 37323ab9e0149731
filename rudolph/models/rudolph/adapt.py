"""A trained decoder's weights in another layout or vocabulary.

Old rows of a table stay as they are and new ones as the new model made them.  A text that becomes
shorter loses its last positions; what becomes longer, and an image of another size, has its
positions interpolated.
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
    """Give ``target`` the weights of ``source``; what had to be changed, a line each.

    Raises:
        ValueError: naming the first setting that must be the same and is not.
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
    """The tables that may differ in size: of positions, and of the ids of both vocabularies."""
    old, new = source.state_dict(), target.state_dict()
    tables: dict[str, Tensor] = {}
    for side in ("left", "right"):
        name = f"{side}_position.weight"
        if name in old and name in new:
            # The last row is a relic that no position reads.
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
    """Ids of each kind, in the order of the logits."""
    return [
        vocabulary.bpe_size,
        vocabulary.num_text_specials,
        vocabulary.num_left_paddings,
        vocabulary.codebook_size,
        vocabulary.num_image_specials,
    ]


def _rows(old: Tensor, new: Tensor, was: list[int], now: list[int]) -> Tensor:
    """``new`` with the rows of ``old``, kind of id by kind of id."""
    parts = []
    for before, after in zip(torch.split(old, was), torch.split(new, now), strict=True):
        kept = min(len(before), len(after))
        parts.append(torch.cat([before[:kept].to(after), after[kept:]]))
    return torch.cat(parts)


def _resized(table: Tensor, length: int, *, what: str, notes: list[str]) -> Tensor:
    """A table of positions ``(L, D)`` at another length."""
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
