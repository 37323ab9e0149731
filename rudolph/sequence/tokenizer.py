"""Text to BPE ids and back, with YouTokenToMe behind a small class.

YouTokenToMe encodes and decodes.  Its BPE-dropout uses an unseeded process-wide random stream and
its training is not repeatable, so ``rudolph.sequence.bpe`` does both instead.  If YouTokenToMe is
not installed, that module also encodes and decodes, with the same ids but more slowly.

Text is cleaned (``rudolph.sequence.texts.clean_text``), then lower-cased and stripped as in
RuDOLPH (``rudolph/api.py``).  ``BOS`` and ``EOS`` frame a segment.  Text that is too long is
truncated, but always keeps its ``EOS``.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from rudolph.files.atomic import write_atomic, write_text
from rudolph.files.constraints import Bounds, check
from rudolph.sequence.bpe import WORD, read_model, train_bpe
from rudolph.sequence.layout import BOS, EOS, PAD, TASK_TOKENS
from rudolph.sequence.texts import clean_text, shorten

# Maximum number of words listed in a note on unknown characters.
MAX_LISTED_WORDS = 5


@dataclass(frozen=True)
class TokenizerConfig:
    """The settings of a BPE tokenizer, by default trained on the captions of the training split.

    Attributes:
        vocab_size: maximum number of BPE ids, including the four special ids.
        bpe_dropout: probability of skipping a merge during training, in [0, 1) (Provilkov 2020).
        path: a ``bpe.model`` to use instead of training a tokenizer, or a run or release that
            contains such a file.
        num_specials: number of task-token ids after the BPE ids; 0 disables task tokens.
    """

    vocab_size: Annotated[int, Bounds(ge=5)] = 16384
    bpe_dropout: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    path: str | None = None
    num_specials: int = len(TASK_TOKENS)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a setting that is out of range."""
        check(self)
        if self.num_specials < len(TASK_TOKENS) and self.num_specials != 0:
            raise ValueError(
                f"num_specials must be 0 or at least {len(TASK_TOKENS)}, the task tokens, "
                f"got {self.num_specials}"
            )


class Segment(NamedTuple):
    """An encoded text that fills its segment.

    Attributes:
        ids: ``(length,)`` int64.
        num_cut: number of BPE ids that were cut because they did not fit.
    """

    ids: Tensor
    num_cut: int


def open_youtokentome(path: Path) -> Any:
    """Return YouTokenToMe's model for a file, or None if the package is not installed."""
    try:
        import youtokentome
    except ModuleNotFoundError:
        return None
    return youtokentome.BPE(str(path), n_threads=1)


def normalize_unicode(text: str) -> str:
    """Return the cleaned text in lower case, without leading and trailing whitespace."""
    return clean_text(text).lower().strip()


class Tokenizer:
    """A tokenizer backed by one BPE model file.

    It pickles as its path, so data-loader workers can hold it under any start method.

    Args:
        path: a ``bpe.model`` in YouTokenToMe's format, trained here or released.

    Raises:
        ValueError: if the file is missing or not such a model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such tokenizer file")
        self.model = read_model(self.path)
        self.fast = open_youtokentome(self.path)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, path: Path) -> "Tokenizer":
        """Train on some texts, write the model to ``path`` and return the tokenizer.

        A small corpus may yield fewer ids than ``vocab_size``.

        Raises:
            ValueError: if the texts contain no word, or more distinct characters than
                ``vocab_size`` allows.
        """
        model = train_bpe((normalize_unicode(text) for text in texts), vocab_size)
        write_text(path, model.text())
        return cls(path)

    @property
    def vocab_size(self) -> int:
        """Return the number of BPE ids, including the four special ids."""
        return self.model.vocab_size

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the model file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the model file to ``path`` atomically."""
        write_atomic(path, lambda new: new.write_bytes(self.path.read_bytes()))

    def encode(
        self, text: str, *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> list[int]:
        """Return the BPE ids of the normalised text, without ``BOS`` and ``EOS``.

        Args:
            text: any text; it is normalised first.
            dropout: probability of skipping a candidate merge at each step.
            generator: source of the dropout samples.

        Raises:
            ValueError: if ``dropout`` is not 0 and ``generator`` is None.
        """
        text = normalize_unicode(text)
        if dropout == 0:
            return self.model.encode(text) if self.fast is None else self.fast.encode([text])[0]
        if generator is None:
            raise ValueError("generator: expected one for BPE-dropout, got none")
        return self.model.encode(text, dropout, generator)

    def unknown_words(self, text: str) -> dict[str, str]:
        """Map each word that has characters outside the vocabulary to these characters."""
        known = self.model.characters
        unknown = {
            word: "".join(
                dict.fromkeys(character for character in word if ord(character) not in known)
            )
            for word in dict.fromkeys(WORD.findall(normalize_unicode(text)))
        }
        return {word: characters for word, characters in unknown.items() if characters}

    def unknown_note(self, text: str, name: str) -> str:
        """Return a one-line warning about unknown characters, or "" if there are none.

        All unknown characters share one id, so a model cannot distinguish them.

        Args:
            text: text to check.
            name: flag or key of the text, which starts the line.
        """
        unknown = self.unknown_words(text)
        if not unknown:
            return ""
        more = ", ..." if len(unknown) > MAX_LISTED_WORDS else ""
        words = (
            ", ".join(repr(shorten(word, 24)) for word in list(unknown)[:MAX_LISTED_WORDS]) + more
        )
        characters = repr(shorten("".join(dict.fromkeys("".join(unknown.values()))), 12))
        return (
            f"{name}: unknown characters {characters} in {words}. "
            "They share one id and may have no effect"
        )

    def encode_segment(
        self,
        text: str,
        length: int,
        *,
        task_token: int | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        truncate_left: bool = False,
    ) -> Segment:
        """Return ``BOS [task token] ids EOS``, padded with ``PAD`` to ``length``.

        Args:
            text: text to encode.
            length: number of tokens of the segment.
            task_token: id inserted after ``BOS``, if any.
            dropout: BPE-dropout probability.
            generator: source of the dropout samples; required if ``dropout`` is not 0.
            truncate_left: cut a long text at its beginning instead of its end.  Questions need
                this, because they follow the passage that they refer to.

        Raises:
            ValueError: if ``length`` is too small for the special tokens.
        """
        ids = self.encode(text, dropout=dropout, generator=generator)
        prefix = [BOS] if task_token is None else [BOS, task_token]
        max_ids = length - len(prefix) - 1
        if max_ids < 0:
            raise ValueError(f"length: expected at least {len(prefix) + 1} tokens, got {length}")
        kept = ids[max(len(ids) - max_ids, 0) :] if truncate_left else ids[:max_ids]
        segment = [*prefix, *kept, EOS]
        return Segment(
            torch.tensor(segment + [PAD] * (length - len(segment))), max(len(ids) - max_ids, 0)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text up to the first ``EOS``, without padding and special tokens."""
        text_ids: list[int] = []
        for token in ids:
            if token == EOS:
                break
            if token not in (PAD, BOS) and token < self.vocab_size:
                text_ids.append(token)
        if not text_ids:
            return ""
        return (
            self.model.decode(text_ids) if self.fast is None else self.fast.decode([text_ids])[0]
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the path as the pickled state."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reload the model file from the pickled path."""
        self.__init__(state["path"])  # type: ignore[misc]
