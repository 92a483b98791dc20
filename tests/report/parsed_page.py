"""A page as a parser of the standard library sees it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID_TAGS = {"meta", "img", "br", "hr", "input", "link"}
HOSTILE = "<script>alert('x')</script> & \"quoted\""


class ParsedPage(HTMLParser):
    """Collects tags, text and addresses, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action", "srcset")]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data
