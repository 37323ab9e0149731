"""HTML of the results site: Markdown, tables and the frame of a page.

Text from results is escaped everywhere.  HTML in Markdown is shown as text, except ``<br>``, which
generated tables contain.
"""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

ASSETS = files("rudolph.reports") / "site_files"
MARKER = re.compile(r"<!-- (?:generated|end): \w+ -->\n?")
COMMIT = re.compile(r"[0-9a-f]{10}|[0-9a-f]{40}")


class SiteRenderer(RendererHTML):
    """Renderer whose images open on a click, whose tables scroll and whose commits are links.

    The environment of a rendering has ``commit_html``, a function of the commit's digits.
    """

    def text(self, tokens: Sequence[Token], idx: int, *_: Any) -> str:
        """Return escaped text with line breaks."""
        return html.escape(tokens[idx].content).replace("&lt;br&gt;", "<br>")

    def code_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """Return inline code, or the link of a commit."""
        if COMMIT.fullmatch(tokens[idx].content):
            return str(env["commit_html"](tokens[idx].content))
        return super().code_inline(tokens, idx, options, env)

    def image(self, tokens: Sequence[Token], idx: int, *_: Any) -> str:
        """Return an image within a link to its file."""
        return zoomable(str(tokens[idx].attrs["src"]), tokens[idx].content)

    def table_open(self, *_: Any) -> str:
        """Return the start of a table that scrolls."""
        return '<div class="table"><table>\n'

    def table_close(self, *_: Any) -> str:
        """Return the end of a table that scrolls."""
        return "</table></div>\n"


MARKDOWN = MarkdownIt("js-default", renderer_cls=SiteRenderer)


def render_markdown(
    text: str,
    *,
    link_of: Callable[[str], str | None],
    image_of: Callable[[str], str],
    commit_html: Callable[[str], str],
) -> str:
    """Return the HTML of a page in Markdown.

    Args:
        text: the page; markers of generated parts are left out.
        link_of: returns the address of a link on the site; None turns the link into plain text.
        image_of: returns the address of an image on the site.
        commit_html: returns the HTML of a commit in ``code``.
    """
    environment = {"commit_html": commit_html}
    tokens = MARKDOWN.parse(MARKER.sub("", text), environment)
    for token in tokens:
        open_tags: list[str] = []
        for inner in token.children or ():
            if inner.type == "image":
                inner.attrs["src"] = image_of(str(inner.attrs["src"]))
            elif inner.type == "link_open":
                address = link_of(str(inner.attrs["href"]))
                inner.tag = "span" if address is None else "a"
                inner.attrs = {} if address is None else {"href": address}
                open_tags.append(inner.tag)
            elif inner.type == "link_close":
                inner.tag = open_tags.pop()
    return str(MARKDOWN.renderer.render(tokens, MARKDOWN.options, environment))


def zoomable(source: str, label: str) -> str:
    """Return an image that opens on a click; ``source`` is a percent-encoded path."""
    path, text = html.escape(source), html.escape(label)
    return f'<a class="zoom" href="{path}"><img src="{path}" alt="{text}"></a>'


def link_html(address: str, label: str) -> str:
    """Return a link; ``address`` is percent-encoded."""
    return f'<a href="{html.escape(address)}">{html.escape(label)}</a>'


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the names in ``head`` are text, the cells of ``rows`` are HTML."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    body = "\n".join(lines)
    return (
        f'<div class="table"><table>\n<thead><tr>{names}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
    )


def page_html(title: str, content: str, *, root: str, has_navigation: bool) -> str:
    """Return a whole page.

    Args:
        title: title of the page, as text.
        content: the HTML of the page.
        root: relative path of the site's top folder, empty or with a slash at its end.
        has_navigation: whether the page is one of several, with links and search.
    """
    header = _template("header.html").substitute(root=root) if has_navigation else ""
    return _template("page.html").substitute(
        title=html.escape(title), root=root, header=header, content=content
    )


def text_of(content: str) -> str:
    """Return the text of HTML, with single spaces.

    >>> text_of("<p>1 &lt; 2<br>and</p>")
    '1 < 2 and'
    """
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", content)).split())


def _template(name: str) -> Template:
    return Template((ASSETS / name).read_text("utf-8"))
