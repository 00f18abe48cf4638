"""The README: short, with an example of twelve lines, and right on PyPI."""

import re

from documents import ROOT, blocks_of
from scripts import import_script


README = (ROOT / "README.md").read_text()
links = import_script(ROOT / "docs" / "links.py")


def test_it_is_short():
    assert len(README.splitlines()) <= 200
    [example] = blocks_of(ROOT / "README.md", "python")
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 12


def test_its_links_lead_somewhere():
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path.split("#")[0]).exists(), path


def test_it_counts_the_encoders_as_the_page_does():
    [(supported, _)] = re.findall(r"(\d+) of (\d+) types are supported", (ROOT / "docs/encoders.md").read_text())
    assert f"[{supported} supported types](docs/encoders.md)" in README


def test_on_pypi_links_are_absolute():
    text = links.with_absolute_links(README, "https://example.org/me/mm/")
    assert not re.findall(r"\]\((?!https://)", text)
    assert "](https://example.org/me/mm/blob/main/docs/race.md)" in text
    assert "](https://example.org/me/mm/raw/main/docs/race.png)" in text
    assert "](https://example.org/me/mm/blob/main/docs/race.md#the-first-example)" in text


def test_without_an_address_links_are_left_out_and_texts_stay():
    text = links.with_absolute_links(README, None)
    assert not re.findall(r"\]\((?!https://)", text)
    assert "![" not in text
    assert "The race has every figure" in text
    assert links.with_absolute_links("a [b](c.md) [d](https://e.org) [f](#g) ![h](i.png)", "") == (
        "a b [d](https://e.org) [f](#g) "
    )


def test_code_is_left_alone():
    code = "```python\nx = a[0](b)\n```\n\n`a[0](b)`\n"
    assert links.with_absolute_links(code, "https://example.org") == code
