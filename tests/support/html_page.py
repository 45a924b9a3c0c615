"""Report pages, or pieces of them, read back."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}
LINKS = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Page(HTMLParser):
    """Fails on tags that are not closed in order; keeps tags, text, links, ids and the values of attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.attributes, self.text = [], [], [], [], [], ""
        self.feed(str(text))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.append(value)
            if name in LINKS:
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_self_contained(path):
    """Text of a page, and the page, which must need no other file and no network."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links), page.links
    assert not re.search(r"https?://|@import|<script|<link|<iframe|url\((?!#)", text)
    assert len(set(page.ids)) == len(page.ids), "ids repeat"
    assert not re.search(r"#0102\d\d", text), "a placeholder colour is left"
    return page.text, text
