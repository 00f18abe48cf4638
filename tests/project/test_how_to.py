"""
The code blocks of pages in docs/how-to run, in order, in a folder with the files that the pages name; `test_docs.py`
runs the others. The list of the pages has all of them.
"""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from command_line import mm
from documents import RUN_ELSEWHERE
from recipes import save_encoders
from tiny import make_image, make_model, make_processor, make_tasks


FOLDER = Path(__file__).parents[2] / "docs/how-to"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "README.md")
TEXTS = ["a red dog", "the big cat is in the river", "a lovely picnic", "a ruined desk"]


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def write_rows(path: Path, number: int) -> None:
    rows = [
        {
            "id": i,
            "text": TEXTS[i % 4],
            "image": f"pictures/{i % 5}.png" if i % 3 else None,
            "topic": ["animals", "food", "travel"][i % 3],
            "tags": ["red|green", "blue", "red"][i % 3],
            "score": i / 10,
        }
        for i in range(number)
    ]
    pd.DataFrame(rows).to_csv(path, index=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What a reader has: a model, tables and pictures."""
    make_model(tasks=make_tasks()).save_pretrained(tmp_path / "my-model")
    make_processor().save_pretrained(tmp_path / "my-model")
    (tmp_path / "pictures/more").mkdir(parents=True)
    for i in range(5):
        make_image(i).save(tmp_path / f"pictures/{i}.png")
    make_image(7).save(tmp_path / "pictures/more/dog.jpg")
    save_encoders(tmp_path / "encoders")
    write_rows(tmp_path / "rows.csv", 8)
    write_rows(tmp_path / "train.csv", 30)
    products = pd.read_csv(tmp_path / "train.csv").rename(columns={"text": "title", "image": "front"})
    products["back"] = [f"backs/{i}.png" for i in range(len(products))]
    (tmp_path / "backs").mkdir()
    for i, path in enumerate(products["back"]):
        make_image(100 + i).save(tmp_path / path)
    products.to_csv(tmp_path / "products.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_has_each_page_with_its_question():
    listed = re.findall(r"^\| (How .*\?) \| \[.*\]\((.*)\) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted((page, question) for question, page in listed) == [
        (page.name, page.read_text().splitlines()[0].removeprefix("# ")) for page in PAGES
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem in RUN_ELSEWHERE], ids=lambda page: page.stem)
def test_the_page_runs(page, folder):
    names: dict = {"__name__": "page"}
    found = blocks(page)
    assert {language for language, _ in found} <= {"python", "bash", "yaml", "text"}
    assert any(language in ("python", "bash") for language, _ in found)
    for language, code in found:
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
        elif language == "yaml":
            (folder / "recipe.yaml").write_text(code)
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                command, *arguments = shlex.split(line, comments=True) or [""]
                if command == "mm-transformers":
                    mm(*arguments)
                else:
                    assert command in ("", "pip", "accelerate", "python"), line


def test_links_exist():
    for page in [*PAGES, FOLDER / "README.md"]:
        for path in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
            assert (page.parent / path.split("#")[0]).exists(), (page.name, path)
