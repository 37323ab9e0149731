"""Cleaning of text that enters the package: prompts, captions, questions and answers.

Every external text passes through ``clean_text`` once, so that visually equal texts are equal
strings.
"""

import re
import sys
import unicodedata

# Control characters (except tab and line ends), line and paragraph separators, and noncharacters.
# Pillow's text layout fails on some of them.  XML, and therefore SVG, forbids others.
UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufdd0-\ufdef\ufffe\uffff]"
)
SURROGATE = re.compile(r"[\ud800-\udfff]")


class UnknownTextWarning(UserWarning):
    """A warning about characters that are missing from the tokenizer's vocabulary."""


def clean_text(text: str) -> str:
    r"""Return the text in NFC, with control characters as spaces and lone surrogates as "?".

    Text that is already clean is returned unchanged.

    >>> clean_text("зеленыи\u0306 кот"), clean_text("кот\x85пёс"), clean_text("кот \ud83d")
    ('зеленый кот', 'кот пёс', 'кот ?')
    """
    return unicodedata.normalize("NFC", UNPRINTABLE.sub(" ", SURROGATE.sub("?", text)))


def decode_argument(text: str) -> str:
    """Decode a command-line argument as UTF-8 if the locale could not decode its bytes.

    Python passes such bytes on as lone surrogates (PEP 383).
    """
    if SURROGATE.search(text) is None:
        return text
    try:
        return text.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def require_text(text: str, name: str) -> None:
    """Raise ``ValueError`` if UTF-8 cannot encode a text; ``name`` is its flag or key."""
    match = SURROGATE.search(text)
    if match is not None:
        raise ValueError(
            f"{name}: expected text in UTF-8, got {text[:40]!a} with half of a surrogate pair at "
            f"character {match.start() + 1}. Type it again, or save its file as UTF-8"
        )


def shorten(text: str, length: int) -> str:
    """Return the text, cut to ``length`` characters with an ellipsis if it is longer.

    >>> shorten("красный круг", 8), shorten("круг", 8)
    ('красный…', 'круг')
    """
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
