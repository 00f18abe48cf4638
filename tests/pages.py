"""Reads a page of HTML as a browser does."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a reader sees, and what a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.texts, self.ids, self.open, self.images = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.fetched += [attrs[name] for name in ("src", "href") if name in attrs]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "img":
            self.images.append(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "every element is closed in its turn"

    def handle_data(self, data):
        self.texts.append(data)
