"""Masks of the media that each text position may attend to.

A *tag* is a token that represents one media, an image or a video.  The media of a row are numbered
from 1 in the order of its tags; number 0 is an absent media, to which nothing attends.

A rule ``(last, opening, media) -> bool`` takes broadcastable tensors and is true where a position
may attend to the media with number ``media``.  ``last`` is the number of tags up to and including
the position.  ``opening`` is the number of tags before the position's document.

To add a rule, write it and name it in ``MEDIA_RULES``.

Source: Alayrac 2022 (arXiv:2204.14198), section 2.1.3; flamingo-pytorch, ``flamingo_pytorch.py``,
without its attention to later images in ``all_previous``; Idefics, ``processing_idefics.py``, for
documents.

Shapes: B batch, T text positions, M media per row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MediaRule = Callable[[Tensor, Tensor, Tensor], Tensor]


class TagCounts(NamedTuple):
    """Tag counts ``(B, T)`` for each text position.

    Attributes:
        last: Tags up to and including the position.
        opening: Tags before the position's document.
        next_opening: Tags before the document of the next position.
    """

    last: Tensor
    opening: Tensor
    next_opening: Tensor


def immediate(last: Tensor, opening: Tensor, media: Tensor) -> Tensor:
    """Allow the media of the last tag.

    The drawing has one line per media and one column per text position; the tags are in columns 1
    and 4:

    >>> counts = count_tags(torch.tensor([[0, 1, 0, 0, 1, 0]]).bool())
    >>> for media in media_mask("immediate", counts, torch.tensor([[1, 2]]))[0].T.tolist():
    ...     print("".join("#" if attends else "." for attends in media))
    .###..
    ....##
    """
    return (media == last) & (media > opening)


def all_previous(last: Tensor, opening: Tensor, media: Tensor) -> Tensor:
    """Allow the media of every earlier tag of the document.

    The tags are in columns 1 and 4, and a document ends in column 5:

    >>> is_tag, is_end = torch.tensor([[[0, 1, 0, 0, 1, 0, 0]], [[0, 0, 0, 0, 0, 1, 0]]]).bool()
    >>> counts = count_tags(is_tag, is_end)
    >>> for media in media_mask("all_previous", counts, torch.tensor([[1, 2]]))[0].T.tolist():
    ...     print("".join("#" if attends else "." for attends in media))
    .#####.
    ....##.
    """
    return (media <= last) & (media > opening)


def count_tags(
    is_tag: Tensor, is_end: Tensor | None = None, before: TagCounts | None = None
) -> TagCounts:
    """Count the tags of each row from left to right.

    Args:
        is_tag: ``(B, T)`` bool.
        is_end: ``(B, T)`` bool, true at the last token of each document packed into a row.  Later
            positions attend to no media until the next tag.
        before: Counts of the previous positions in step-wise decoding.

    >>> count_tags(torch.tensor([[False, True, False, True]])).last.tolist()
    [[0, 1, 1, 2]]
    """
    last = is_tag.long().cumsum(1)
    if before is not None:
        last = last + before.last[:, -1:]
    first_opening = (
        torch.zeros_like(last[:, :1]) if before is None else before.next_opening[:, -1:]
    )
    next_opening = first_opening.expand_as(last)
    if is_end is not None:
        # Tag counts never decrease, so the latest document end has the largest one.
        next_opening = torch.maximum(next_opening, (last * is_end).cummax(1).values)
    opening = torch.cat([first_opening, next_opening[:, :-1]], dim=1)
    return TagCounts(last, opening, next_opening)


def number_media(is_present: Tensor) -> Tensor:
    """Number the media ``(B, M)`` of each row from 1; absent media get 0.

    >>> number_media(torch.tensor([[True, False, True]])).tolist()
    [[1, 0, 2]]
    """
    return is_present.long().cumsum(1) * is_present


def check_tags(counts: TagCounts, media: Tensor) -> None:
    """Check that no text has more tags than media.

    Args:
        counts: Tag counts of the texts.
        media: Media numbers ``(B, M)``.

    Raises:
        ValueError: If a row has more tags than media; the message names the first such row.
    """
    num_tags, num_media = counts.last[:, -1], media.amax(1)
    for row in (num_tags > num_media).nonzero().flatten().tolist():
        raise ValueError(
            f"row {row}: expected at most {int(num_media[row])} media tags, one per media, "
            f"got {int(num_tags[row])}"
        )


def media_mask(rule: str, counts: TagCounts, media: Tensor) -> Tensor:
    """Return a mask ``(B, T, M)`` bool, true where a text position may attend to a media.

    Args:
        rule: A name in ``MEDIA_RULES``.
        counts: Tag counts of the texts.
        media: Media numbers ``(B, M)``.
    """
    return MEDIA_RULES[rule](
        counts.last[:, :, None], counts.opening[:, :, None], media[:, None, :]
    )


MEDIA_RULES: dict[str, MediaRule] = {"immediate": immediate, "all_previous": all_previous}
