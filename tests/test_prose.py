"""Docstrings, comments, experiment files and pages use one plain term per concept."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("rudolph", "tests") for path in (ROOT / folder).rglob("*.py"))
PAGES = [
    ROOT / "README.md",
    *sorted(
        path
        for folder in ("rudolph", "tests", "experiments", "results")
        for path in (ROOT / folder).rglob("*.md")
    ),
]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))

# Preferred terms and patterns of the words that they replace.
PREFERRED = {
    "image": r"pictures?",
    "again": r"anew",
    "fraction or probability of": r"shares? of",
    "next to, or besides": r"beside",
    "report, show or distinguish": r"tells?|telling|told",
    "score": r"judg(e[sd]?|ing)",
    "request or evaluate": r"ask(s|ed)? (for|of|whether)|(been|is|are|was|were) asked",
    "sample or generate": r"(every|each|next|random) draws?|(tokens?|samples?) (is|are) drawn",
    "error": r"mistakes?",
    "one that, or a plain subject": r"whoever",
    "per": r"(nats|bits|ms|MiB|seconds|tokens|images|tiles|pixels) an? (token|row|image|side|run)",
}
BANNED = {
    term: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for term, words in PREFERRED.items()
}
# "Ask-and-tell" is the name of an interface.
QUOTED = re.compile(r"``.*?``|`[^`]*`|\]\([^)]*\)|ask-and-tell", re.DOTALL)
GENERATED = re.compile(r"<!-- generated: (\S+) -->.*?<!-- end: \1 -->", re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
DOCTEST = re.compile(r"^ *>>>.*?(?=\n *\n|\Z)", re.DOTALL | re.MULTILINE)
NO_SUBJECT = re.compile(r"(What|Of|Who|Whoever|Whose|Whether|Where)\b(?![^.]*\?)")
MAX_WORDS = 25


def blanked(pattern: re.Pattern[str], text: str) -> str:
    """Return a text with every match blanked; its lines keep their numbers."""
    return pattern.sub(lambda match: "X" + "\n" * match[0].count("\n"), text)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each docstring, without doctests."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node, clean=False)
        ):
            yield node.body[0].lineno, blanked(DOCTEST, text)


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the handwritten texts of a file, each with the number of its first line."""
    if path.suffix == ".py":
        yield from docstrings(path)
        yield from comments(path)
        return
    text = path.read_text(encoding="utf-8")
    yield 1, blanked(FENCED, blanked(GENERATED, text)) if path.suffix == ".md" else text


def sentences(docstring: str) -> Iterator[str]:
    """Yield the sentences of a docstring, without its lists of arguments and drawings."""
    for paragraph in re.split(r"\n\s*\n", blanked(QUOTED, docstring)):
        lines = paragraph.strip("\n").splitlines()
        is_section = re.fullmatch(r"\s*[A-Z]\w+:", lines[0]) if lines else None
        is_list = any(re.search(r"\S {3,}\S|^\s*([-=|] ?|\w+: )", line) for line in lines)
        if not is_section and not is_list:
            yield from re.split(r"(?<=[.!?;:])\s+", " ".join(paragraph.split()))


def position_of(path: Path, line: int) -> str:
    """Return path and line number in the form that editors open."""
    return f"{path.relative_to(ROOT)}:{line}"


def test_a_concept_has_one_term() -> None:
    wrong = [
        f"{position_of(path, line + text[: match.start()].count(chr(10)))}: "
        f"{match[0]!r}: write {term}"
        for path in (*CODE, *PAGES, *EXPERIMENTS)
        if path != Path(__file__)
        for line, quoted in prose(path)
        for text in [blanked(QUOTED, quoted)]
        for term, banned in BANNED.items()
        for match in banned.finditer(text)
    ]
    assert wrong == []


def test_a_docstring_is_read_once() -> None:
    """A sentence has a subject and at most 25 words."""
    wrong = [
        f"{position_of(path, line)}: {len(sentence.split())} words: {sentence}"
        for path in CODE
        for line, text in docstrings(path)
        for sentence in sentences(text)
        if len(sentence.split()) > MAX_WORDS or NO_SUBJECT.match(sentence)
    ]
    assert wrong == []


def test_a_comment_starts_with_its_subject() -> None:
    wrong = [
        f"{position_of(path, line)}: {text}"
        for path in CODE
        for line, text in comments(path)
        if NO_SUBJECT.match(text)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("The picture is cut.", "image"),
        ("Loss in nats a token.", "per"),
        ("The server is asked for it.", "request or evaluate"),
        ("Tokens are drawn one by one.", "sample or generate"),
        ("The files tell whether.", "report, show or distinguish"),
    ],
)
def test_a_synonym_is_found(text: str, term: str) -> None:
    assert [name for name, pattern in BANNED.items() if pattern.search(text)] == [term]


@pytest.mark.parametrize(
    "text", ["Draw a figure besides.", "It asks one question.", "Shared runs.", "Picturesque."]
)
def test_a_legitimate_use_is_no_synonym(text: str) -> None:
    assert not any(pattern.search(text) for pattern in BANNED.values())
