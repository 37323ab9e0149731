"""Sequence layout and vocabulary: where the three segments lie and which ids each one uses.

A sequence is ``[left text | image, row-major | right text]``, always in this order and with fixed
segment lengths.  ``SequenceLayout`` holds the positions, and ``Vocabulary`` holds the ids.

Source: RuDOLPH, ``rudolph/model/model.py``.
"""

from dataclasses import dataclass

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SEGMENTS = ("left_text", "image", "right_text")

# The order gives each task token its offset from the end of the BPE vocabulary: <LT_UNK> is id
# 16384 in RUDOLPH.  Source: ru-dolph, rudolph/api.py (the first six); fbc2_aij2022 (the rest).
TASK_TOKENS = (
    "<LT_UNK>",
    "<RT_UNK>",
    "<LT_T2I>",
    "<LT_I2T>",
    "<LT_T2T>",
    "<RT_I2T>",
    "<LT_TQA>",
    "<RT_TQA>",
    "<LT_MQA>",
    "<RT_MQA>",
    "<LT_VQA>",
    "<RT_VQA>",
    "<LT_CAP>",
    "<RT_CAP>",
    "<LT_GEN>",
    "<LT_REC>",
    "<RT_REC>",
)


@dataclass(frozen=True)
class SequenceLayout:
    """The lengths of the three segments in tokens; the image is square.

    Positions are counted from 0: left text, then ``image_tokens_per_dim**2`` image tokens in
    row-major order, then right text.  A right text of length 0 gives ruDALL-E's layout.
    """

    left_text_length: int = 64
    image_tokens_per_dim: int = 16
    right_text_length: int = 64

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a length that is out of range."""
        if self.left_text_length < 1:
            raise ValueError(f"left_text_length must be at least 1, got {self.left_text_length}")
        for name in ("image_tokens_per_dim", "right_text_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def num_image_tokens(self) -> int:
        """Return the number of image tokens."""
        return self.image_tokens_per_dim**2

    @property
    def image_start(self) -> int:
        """Return the position of the first image token."""
        return self.left_text_length

    @property
    def right_text_start(self) -> int:
        """Return the position of the first right-text token."""
        return self.left_text_length + self.num_image_tokens

    @property
    def length(self) -> int:
        """Return the length of the whole sequence."""
        return self.right_text_start + self.right_text_length

    @property
    def segment_lengths(self) -> tuple[int, int, int]:
        """Return the lengths of left text, image and right text."""
        return self.left_text_length, self.num_image_tokens, self.right_text_length


@dataclass(frozen=True)
class Vocabulary:
    """The sizes of the text and image vocabularies and the order of their ids.

    Text ids are BPE ids, then special tokens, then one padding id per left-text position.  Image
    ids start again at 0: codebook indices, then image special tokens.  Logits are ordered
    ``[text | image]``.
    """

    bpe_size: int = 16384
    num_text_specials: int = 0
    num_left_paddings: int = 64
    codebook_size: int = 8192
    num_image_specials: int = 0

    @property
    def text_size(self) -> int:
        """Return the number of text ids."""
        return self.bpe_size + self.num_text_specials + self.num_left_paddings

    @property
    def image_size(self) -> int:
        """Return the number of image ids."""
        return self.codebook_size + self.num_image_specials

    @property
    def size(self) -> int:
        """Return the number of logits: text ids plus image ids."""
        return self.text_size + self.image_size

    @property
    def first_left_padding(self) -> int:
        """Return the padding id of the first left-text position."""
        return self.bpe_size + self.num_text_specials

    def task_token(self, name: str) -> int | None:
        """Return the id of a task token, or None if the vocabulary has no text special tokens.

        Raises:
            ValueError: if ``name`` is not in ``TASK_TOKENS``, or ``num_text_specials`` is too
                small to include it.
        """
        if self.num_text_specials == 0:
            return None
        offset = TASK_TOKENS.index(name)
        if offset >= self.num_text_specials:
            raise ValueError(
                f"task token {name} needs num_text_specials of at least {offset + 1}, "
                f"got {self.num_text_specials}"
            )
        return self.bpe_size + offset
