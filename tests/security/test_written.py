"""Hostile names, labels and texts in what is written: tables, cards, pages, figures, the terminal."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_image, make_model, make_processor
from typer.testing import CliRunner

from mm_transformers import Classification, Generation, MultiLabel, Regression, TokenClassification
from mm_transformers.cli import app
from mm_transformers.data.cells import label_of
from mm_transformers.data.formulas import with_formula, without_formula
from mm_transformers.data.markdown import plain_markdown
from mm_transformers.data.tables import table_writer
from mm_transformers.training.card.card_file import write_card
from mm_transformers.training.card.facts import CardFacts, Measurement


FORMULAS = [
    '=HYPERLINK("http://x","y")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''@x",
    "＝1+1",
]
NAMES = [
    "</script><script>alert(1)</script>", "a|b", "`code`", "```\n## Heading", "x](javascript:alert(1))", "{{7*7}}",
    "[red]a[/x]", "a$b$\\frac", "--> <img src=x onerror=alert(1)>", "---\nlicense: mit\n---", "https://evil.example",
    "\x1b[31m", '"quoted"', "a\u2028b", "![x](http://evil.example/x.png)", "<!-- x -->", "&lt;b&gt;",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_csv_is_a_formula(text):
    written = io.BytesIO()
    writer = table_writer(written, ".csv", {})
    writer.write([{text: text, "label": text, "number": -2.5, "list": [text]}])
    header, cells = csv.reader(io.StringIO(written.getvalue().decode(), newline=""))
    for cell in (*header[:2], *cells[:2]):
        assert cell[0] not in "=+-@\t\r＝"
    assert cells[2] == "-2.5"
    assert json.loads(cells[3]) == [text]
    assert with_formula(cells[0]) == text


@given(st.text(st.sampled_from("'=+-@\t\rab1")))
def test_what_was_escaped_is_read_again(text):
    assert without_formula(text) == text or with_formula(without_formula(text)) == text


@pytest.mark.parametrize("text", ["-1", "+1.5e-3", "-.5", "-1,000.5", "-inf", "-", "+", "=", "a=b", "'a", "", "-5%"])
def test_numbers_and_signs_alone_stay(text):
    assert without_formula(text) == text


def test_answers_are_readable_as_labels():
    labels = [*FORMULAS, "a"]
    for text in FORMULAS:
        assert label_of(Classification("t", labels=labels), without_formula(text)) == labels.index(text)
        assert label_of(MultiLabel("t", labels=labels), without_formula(text)) == [labels.index(text)]
    known = Classification("t", labels=["'=1", "=1"])
    assert label_of(known, "'=1") == 0, "a label that looks escaped is found first"
    assert label_of(Generation("t"), "'-ing' is an ending") == label_of(Generation("t"), "'-ing' is an ending")
    assert label_of(Regression("t"), "-2.5") == -2.5
    with pytest.raises(ValueError, match="'=other"):
        label_of(known, "'=other")


@pytest.mark.slow
def test_predict_escapes_unless_told_otherwise(tmp_path):
    make_model(tasks=[Classification("topic", labels=["=a()", "=b()"])]).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "n"], ["=cat()", "-1"]])
    for options, start in (([], "'="), (["--no-escape-formulas"], "=")):
        output = tmp_path / f"out{len(options)}.csv"
        command = ["predict", tmp_path / "model", tmp_path / "rows.csv", "--output", output, *options]
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.output
        with output.open(newline="") as file:
            header, cells = csv.reader(file)
        found = dict(zip(header, cells, strict=True))
        assert found["text"] == f"{start}cat()"
        assert found["n"] == "-1"
        assert found["topic"] in (f"{start}a()", f"{start}b()")


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


@pytest.fixture(scope="module")
def model():
    """Names of tasks are words; labels are anything."""
    tasks = [Classification("topic", labels=[*NAMES, "ok"]), MultiLabel("tags", labels=NAMES)]
    model = make_model(tasks=[*tasks, TokenClassification("words", labels=NAMES)])
    model.config.text_config._name_or_path = "x](javascript:alert(1))"
    model.config.vision_config._name_or_path = "<img src=x>/y"
    return model


def test_a_card_of_hostile_names(model, tmp_path):
    measured = {f"topic_{name}": 0.5 for name in NAMES}
    facts = CardFacts(
        NAMES[0], model.config, [Measurement("<b>|x", measured, "a|b\n---")], said={"license": "mit\n---\nx"}
    )
    for _ in range(2):  # and when it is renewed
        write_card(tmp_path, facts)
        text = (tmp_path / "README.md").read_text()
        front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
        assert yaml.safe_load(front)["license"] == "mit\n---\nx"
        assert set(yaml.safe_load(front)) <= {
            "license", "library_name", "pipeline_tag", "tags", "model-index", "base_model", "base_model_relation",
        }  # fmt: skip
        body, memory = body.split("\n\n<!-- mm_transformers remembers")
        assert memory.count(">") == 1
        assert memory.endswith("-->\n")
        assert body.count("```") == body.count("\n```") == 2
        prose = re.sub(
            r"\n```python\n.*?\n```\n|`import mm_transformers`|`trust_remote_code=True`", "", body, flags=re.DOTALL
        )
        prose = re.sub(r"\\([\\`*<>\[\]|~&$.:])", "·", prose)  # what is escaped
        assert not re.search(r"[`<>\[\]&$\x1b\u2028]|javascript:alert\(1\)\)\]|https?://", prose)
        headings = [line for line in prose.splitlines() if line.startswith("#")]
        assert headings[1:] == ["## Use", "## Tasks", "## Encoders", "## Results", "## Limits"]
        rows = [line for line in prose.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in rows} == {4, 5}
        assert "49" not in prose
        ModelCard.load(tmp_path / "README.md")
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert "trust_remote_code=True)" in code


def test_markdown_of_ordinary_names_is_as_it_was():
    for name in (
        "positive",
        "C++",
        "under_score",
        "50%",
        "näh",
        "a-b (c)",
        "me/my-model",
        "1,234.5",
        "R2 ± 0.1",
        "x=1; y",
    ):
        assert plain_markdown(name) == name


@pytest.mark.slow
def test_pages_and_figures_of_hostile_names(model, tmp_path):
    from mm_transformers.analysis import ablate, explain
    from mm_transformers.analysis.report import write_report
    from mm_transformers.cli.page_answers import answers_as_html

    processor, row = make_processor(), {"text": " ".join(NAMES), "image": make_image(1)}
    tasks = ["topic", "words"]
    page = answers_as_html(model, processor, row, tasks, ("text", "image"))
    write_report(tmp_path / "report.html", model, processor, [{**row, "topic": NAMES[0]}] * 2, tasks, title=NAMES[0])
    for text in (page, (tmp_path / "report.html").read_text()):
        assert not {"script", "b"} & set(Tags(text).found)
        assert "onerror=alert(1)>" not in text
        assert ">49<" not in text
    for name in (NAMES[7], NAMES[0]):
        explain(model, processor, row, "topic", answer=name).plot().savefig(tmp_path / "why.png")
    rows = [{**row, "topic": name, "a$\\frac|b": name} for name in NAMES[:4] for _ in range(2)]
    found = ablate(model, processor, rows, slices=["a$\\frac|b"])
    found.plot().savefig(tmp_path / "ablation.png")
    assert "<script>" not in re.sub(r"\\<", "", found.to_markdown())


def test_a_space_is_not_written_through_a_link(tmp_path):
    from mm_transformers.cli.space import write_space

    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "app.py").symlink_to(tmp_path / "elsewhere.py")
    written = write_space(tmp_path / "space", "me/null")
    assert "app.py" not in [path.name for path in written]
    assert not (tmp_path / "elsewhere.py").exists()
    front = (tmp_path / "space" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["title"] == "null"


def test_the_terminal_shows_hostile_names():
    from mm_transformers.cli.metrics_table import print_metrics

    print_metrics({"[/x]": {"eval_topic_[/y]": 1.0}}, {"[/x]": "eval"}, ["topic"])
