"""Text as it enters the package: prompts, captions, questions, answers.

Every text from outside goes through ``clean_text`` once, so that texts that look alike are alike.
"""

import re
import sys
import unicodedata

# Control characters but tab and line ends, line and paragraph separators, and noncharacters.  The
# text layout of Pillow fails on some of them and XML forbids others, so no SVG can hold them.
UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufdd0-\ufdef\ufffe\uffff]"
)
SURROGATE = re.compile(r"[\ud800-\udfff]")


class UnknownTextWarning(UserWarning):
    """A text holds characters that the tokenizer which reads it has never seen."""


def clean_text(text: str) -> str:
    r"""Return a text in NFC with spaces for control characters and "?" for lone surrogates.

    A text that has none of these and is in NFC already is returned unchanged.

    >>> clean_text("зеленыи\u0306 кот"), clean_text("кот\x85пёс"), clean_text("кот \ud83d")
    ('зеленый кот', 'кот пёс', 'кот ?')
    """
    return unicodedata.normalize("NFC", UNPRINTABLE.sub(" ", SURROGATE.sub("?", text)))


def decode_argument(text: str) -> str:
    """Return an argument of the command line as UTF-8 where the locale could not read its bytes.

    Python passes such bytes on as lone surrogates (PEP 383).
    """
    if SURROGATE.search(text) is None:
        return text
    try:
        return text.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def require_text(text: str, name: str) -> None:
    """Raise ``ValueError`` for a text that UTF-8 cannot hold; ``name`` is its flag or key."""
    found = SURROGATE.search(text)
    if found is not None:
        raise ValueError(
            f"{name}: expected text in UTF-8, got {text[:40]!a} with half of a surrogate pair at "
            f"character {found.start() + 1}. Type it again, or save its file as UTF-8"
        )


def shorten(text: str, length: int) -> str:
    """Return the text, or its beginning with an ellipsis where it is longer than ``length``.

    >>> shortened("красный круг", 8), shortened("круг", 8)
    ('красный…', 'круг')
    """
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
