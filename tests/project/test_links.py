"""Links of the pages of the repository lead somewhere, as GitHub shows them; `make docs` checks those of the site."""

import re

import pytest
from documents import PAGES, ROOT, name_of


OTHERS = [ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md"))]
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page):
    for link in LINK.findall(without_code(page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        # The anchors of the reference are names, which only the site has.
        if anchor and not anchor.startswith("mm_transformers."):
            assert anchor in anchors_of(target.read_text()), link


def test_an_anchor_is_that_of_github():
    assert anchors_of("# The first, best `example` (2026-11-24)\n\n```bash\n# no heading\n```\n") == {
        "the-first-best-example-2026-11-24"
    }
