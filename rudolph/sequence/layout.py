"""What a sequence is: where its three segments lie and what an id means.

A sequence is ``[left text | image, row-major | right text]``, always in this order and with fixed
lengths.  ``SequenceLayout`` says where; ``Vocabulary`` says which ids a segment may hold.

Source: RuDOLPH, ``rudolph/model/model.py``.
"""

from dataclasses import dataclass

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SEGMENTS = ("left_text", "image", "right_text")

# Offsets of the task tokens from the end of the BPE vocabulary: <LT_UNK> is id 16384 in RUDOLPH.
# Source: ru-dolph rudolph/api.py (the first six) and fbc2_aij2022 (the rest).
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
    """Lengths of the three segments, in tokens; the image is a square."""

    left_text_length: int = 64
    image_tokens_per_dim: int = 16
    right_text_length: int = 64

    def __post_init__(self) -> None:
        if self.left_text_length < 1:
            raise ValueError(f"left_text_length must be at least 1, got {self.left_text_length}")
        for name in ("image_tokens_per_dim", "right_text_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def num_image_tokens(self) -> int:
        return self.image_tokens_per_dim**2

    @property
    def image_start(self) -> int:
        return self.left_text_length

    @property
    def right_text_start(self) -> int:
        return self.left_text_length + self.num_image_tokens

    @property
    def length(self) -> int:
        return self.right_text_start + self.right_text_length

    @property
    def segment_lengths(self) -> tuple[int, int, int]:
        return self.left_text_length, self.num_image_tokens, self.right_text_length


@dataclass(frozen=True)
class Vocabulary:
    """What an id means.

    Text ids: BPE, then special tokens, then one padding id for each position of the left text.
    Image ids: the codebook, then image specials.  Logits are ``[text | image]`` in this order.
    """

    bpe_size: int = 16384
    num_text_specials: int = 0
    num_left_paddings: int = 64
    codebook_size: int = 8192
    num_image_specials: int = 0

    @property
    def text_size(self) -> int:
        return self.bpe_size + self.num_text_specials + self.num_left_paddings

    @property
    def image_size(self) -> int:
        return self.codebook_size + self.num_image_specials

    @property
    def size(self) -> int:
        return self.text_size + self.image_size

    @property
    def first_left_padding(self) -> int:
        """The id that stands for padding at the first position of the left text."""
        return self.bpe_size + self.num_text_specials

    def task_token(self, name: str) -> int | None:
        """The id of a task token, or None where the vocabulary has no special tokens."""
        if self.num_text_specials == 0:
            return None
        offset = TASK_TOKENS.index(name)
        if offset >= self.num_text_specials:
            raise ValueError(
                f"task token {name} needs num_text_specials of at least {offset + 1}, "
                f"got {self.num_text_specials}"
            )
        return self.bpe_size + offset
