"""
What `make docs` does beside MkDocs: it adds the pages of some folders to the navigation, and mends links to files
outside of docs/. These lead to the repository if REPOSITORY_URL is set, and are left out otherwise. It also writes the
pages as plain texts for assistants (`llms.txt`).
"""

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger


sys.path.insert(0, str(Path(__file__).parent))
from links import with_absolute_links


sys.path.pop(0)


DOCS = Path(__file__).parent
LOG = get_plugin_logger("links")
# Section of the navigation -> folder whose pages belong there.
FOLDERS = {"Decisions": "decisions", "Reference": "reference", "Benchmarks": "benchmarks"}
# Section -> folder whose README.md has its pages in groups.
GROUPED = {"How to": "how-to"}


def on_config(config: Any) -> Any:
    for section in config.nav:
        [(title, pages)] = section.items()
        if folder := FOLDERS.get(title):
            found = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / folder).rglob("*.md"))
            pages[1:1] = [page for page in found if page not in pages]
        if folder := GROUPED.get(title):
            pages[1:1] = groups_of(DOCS / folder / "README.md")
    return config


def groups_of(readme: Path) -> list[dict[str, list[str]]]:
    """Heading -> pages, for each heading of a list of pages."""
    found = []
    for part in re.split(r"^## ", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        pages = re.findall(r"\| \[[^]]*\]\(([\w-]+\.md)\) \|$", part, re.MULTILINE)
        found.append({part.partition("\n")[0]: [f"{readme.parent.name}/{page}" for page in pages]})
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("reference/"):
        markdown = re.sub(r"<!-- in short -->.*?<!-- end -->\n", "", markdown, flags=re.DOTALL)
    folder = posixpath.dirname(page.file.src_uri)

    def outside(target: str) -> str | None:
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        is_page = path.startswith("docs/") and not path.endswith(".py") and not path.startswith("docs/results/")
        if is_page:
            return None
        if not (DOCS.parent / path.partition("#")[0]).exists():
            LOG.warning(f"{page.file.src_uri} links to {target}, which does not exist.")
        return path

    return with_absolute_links(markdown, os.environ.get("REPOSITORY_URL"), outside)


# The title, the section, the address and the Markdown of each page.
_TEXTS: list[tuple[str, str, str, str]] = []


def on_page_content(html: str, page: Any, **_: Any) -> None:
    section = page.ancestors[-1].title if page.ancestors else "Home"
    _TEXTS.append((page.title, section, page.url, page.markdown))


def on_post_build(config: Any, **_: Any) -> None:
    """Writes `llms.txt`, the list of pages (https://llmstxt.org), and `llms-full.txt`, their texts."""
    base = (config.site_url or "").rstrip("/")
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    order = [next(iter(section)) for section in config.nav]
    for section in order:
        pages = [f"- [{title}]({base}/{url})" for title, of, url, _ in _TEXTS if of == section]
        lines += ["", f"## {section}", "", *pages] if pages else []
    texts = [f"<!-- {url} -->\n\n{markdown.strip()}\n" for _, _, url, markdown in _TEXTS]
    site = Path(config.site_dir)
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (site / "llms-full.txt").write_text("\n\n".join(texts), encoding="utf-8")
