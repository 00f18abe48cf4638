"""
Makes the relative links of a page absolute, from the environment variable `REPOSITORY_URL`.

`setup.py` uses it for the README that PyPI shows, `docs/hooks.py` for links of the site to files outside of `docs/`.
Without an address, such links are left out and their texts stay; so are such pictures.
"""

import re
from collections.abc import Callable


BRANCH = "main"
# A block or a span of code, or a link. Texts of links may hold code.
_PART = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]+`(?!\]))|(?P<picture>!?)\[(?P<text>[^\]\n]*)\]\((?P<target>[^)\s]+)\)", re.M | re.S
)


def with_absolute_links(
    text: str, url: str | None, resolve: Callable[[str], str | None] = lambda target: target
) -> str:
    """
    Args:
        text: a page in Markdown.
        url: address of the repository, such as https://github.com/me/mm-transformers; without one, links are left out.
        resolve: a target -> its path from the root of the repository, or `None` to leave the link as it is.
    """
    url = (url or "").rstrip("/")

    def absolute(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        target, is_picture = match["target"], bool(match["picture"])
        if re.match(r"[a-z]+:|#", target) or (path := resolve(target)) is None:
            return match[0]
        if not url:
            return "" if is_picture else match["text"]
        return f"{match['picture']}[{match['text']}]({url}/{'raw' if is_picture else 'blob'}/{BRANCH}/{path})"

    return _PART.sub(absolute, text)
