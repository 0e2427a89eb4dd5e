"""A page that Graft writes, as its elements and its visible text."""

import re
from html.parser import HTMLParser

VOID = {"meta", "rect", "line"}


class Page(HTMLParser):
    """The elements and the visible text of a page; fails on elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.open
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.words.append(" " if tag in {"p", "td", "th", "dt", "dd", "div", "li", "h2"} else "")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def classed(self, name: str) -> list[str]:
        return [tag for tag, attrs in self.elements if name in (attrs.get("class") or "").split()]
