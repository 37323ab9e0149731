"""Text to BPE ids and back: YouTokenToMe behind a small class.

YouTokenToMe encodes and decodes.  Its BPE-dropout draws from one unseeded stream of the process
and its training is not repeatable, so both are done by ``rudolph.sequence.bpe``.  Where
YouTokenToMe is not installed, that module encodes and decodes too: the same ids, more slowly.

Text is cleaned (``texts.clean_text``), then lower-cased and stripped as RuDOLPH does
(``rudolph/api.py``).  ``BOS`` and ``EOS`` frame a
segment; a text that is too long loses its end, never its ``EOS``.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudolph.files.atomic import write_atomic, write_text
from rudolph.sequence.bpe import WORD, read_model, train_bpe
from rudolph.sequence.layout import BOS, EOS, PAD, TASK_TOKENS
from rudolph.sequence.texts import clean_text, shorten

# Words of a text, and characters of them, that a note on unknown ones names.
NUM_NAMED = 5


@dataclass(frozen=True)
class TokenizerConfig:
    """A BPE vocabulary trained on the captions of the training split.

    ``bpe_dropout`` is the share of merges that training skips at random (Provilkov 2020).
    ``path`` names a ``bpe.model``, or a run or release that has one, to use instead of training
    one.  ``num_specials`` are the ids after BPE that name tasks; 0 leaves task tokens out.
    """

    vocab_size: int = 16384
    bpe_dropout: float = 0.0
    path: str | None = None
    num_specials: int = len(TASK_TOKENS)

    def __post_init__(self) -> None:
        if self.vocab_size < 5:
            raise ValueError(f"vocab_size must be at least 5, got {self.vocab_size}")
        if self.num_specials < len(TASK_TOKENS) and self.num_specials != 0:
            raise ValueError(
                f"num_specials must be 0 or at least {len(TASK_TOKENS)}, the task tokens, "
                f"got {self.num_specials}"
            )
        if not 0 <= self.bpe_dropout < 1:
            raise ValueError(f"bpe_dropout must be in [0, 1), got {self.bpe_dropout}")


class Segment(NamedTuple):
    """A text that fills its segment: ``ids`` (length,) int64, and how many BPE ids were cut."""

    ids: Tensor
    num_cut: int


def open_youtokentome(path: Path) -> Any:
    """Return YouTokenToMe's model of a file, or None where the package is not installed."""
    try:
        import youtokentome
    except ModuleNotFoundError:
        return None
    return youtokentome.BPE(str(path), n_threads=1)


def normalize_unicode(text: str) -> str:
    """Return a cleaned text in lower case without space around it."""
    return clean_text(text).lower().strip()


class Tokenizer:
    """A BPE model file in use.  Pickles by its path, so workers of any kind can hold it.

    Args:
        path: a ``bpe.model`` of YouTokenToMe: one trained here, or a released one.

    Raises:
        ValueError: when the file is missing or is no such model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such tokenizer file")
        self.model = read_model(self.path)
        self.fast = open_youtokentome(self.path)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, path: Path) -> "Tokenizer":
        """Train on texts and write the model to ``path``; a small corpus may give fewer ids.

        Raises:
            ValueError: when the texts hold no word, or more characters than ``vocab_size``.
        """
        model = train_bpe((normalize_unicode(text) for text in texts), vocab_size)
        write_text(path, model.text())
        return cls(path)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def digest(self) -> str:
        """SHA-256 of the model file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the model file to ``path``, whole or not at all."""
        write_atomic(path, lambda new: new.write_bytes(self.path.read_bytes()))

    def encode(
        self, text: str, *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> list[int]:
        """BPE ids of the normalised text, without ``BOS`` and ``EOS``.

        Args:
            dropout: the probability that a merge is skipped each time it could be made.
            generator: draws the skips; required when dropout is not 0.
        """
        text = normalize_unicode(text)
        if dropout == 0:
            return self.model.encode(text) if self.fast is None else self.fast.encode([text])[0]
        if generator is None:
            raise ValueError("BPE-dropout draws at random and needs a generator")
        return self.model.encode(text, dropout, generator)

    def unknown_words(self, text: str) -> dict[str, str]:
        """Return the words that hold characters the tokenizer has never seen, and these."""
        known = self.model.characters
        found = {
            word: "".join(dict.fromkeys(each for each in word if ord(each) not in known))
            for word in dict.fromkeys(WORD.findall(normalize_unicode(text)))
        }
        return {word: characters for word, characters in found.items() if characters}

    def unknown_note(self, text: str, name: str) -> str:
        """Return one line on what of a text is unknown, or nothing; ``name`` is its flag or key.

        Unknown characters all have the same id, so a model cannot tell them apart.
        """
        found = self.unknown_words(text)
        if not found:
            return ""
        more = ", ..." if len(found) > NUM_NAMED else ""
        words = ", ".join(repr(shorten(word, 24)) for word in list(found)[:NUM_NAMED]) + more
        characters = repr(shorten("".join(dict.fromkeys("".join(found.values()))), 12))
        return (
            f"{name}: the tokenizer has never seen the characters {characters} of {words}; "
            "they are read as unknown and may have no effect"
        )

    def encode_segment(
        self,
        text: str,
        length: int,
        *,
        task_token: int | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        keeps_end: bool = False,
    ) -> Segment:
        """``BOS [task token] ids EOS`` padded to ``length``; of a long text the end is cut.

        With ``keeps_end`` it is the beginning: a question stands at the end of what it is about.
        """
        ids = self.encode(text, dropout=dropout, generator=generator)
        start = [BOS] if task_token is None else [BOS, task_token]
        room = length - len(start) - 1
        if room < 0:
            raise ValueError(
                f"a text segment needs at least {len(start) + 1} tokens, got {length}"
            )
        kept = ids[max(len(ids) - room, 0) :] if keeps_end else ids[:room]
        filled = [*start, *kept, EOS]
        return Segment(
            torch.tensor(filled + [PAD] * (length - len(filled))), max(len(ids) - room, 0)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first ``EOS``, without padding, task tokens and other specials."""
        kept: list[int] = []
        for token in ids:
            if token == EOS:
                break
            if token not in (PAD, BOS) and token < self.vocab_size:
                kept.append(token)
        if not kept:
            return ""
        return self.model.decode(kept) if self.fast is None else self.fast.decode([kept])[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
