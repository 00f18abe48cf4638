"""The demo page: what it answers, and a person's way through it in a browser."""

import io
import re
import shutil

import pytest
import torch
from pages import Page
from PIL import Image
from tiny import (
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tasks,
    make_tokenizer,
)
from transformers import pipeline

from mm_transformers import MMTransformerConfig, MMTransformerForMultiTask, MMTransformerProcessor, table_columns
from mm_transformers.cli.page import answers_as_html, load_page, make_page
from mm_transformers.cli.page_examples import demo_examples, table_examples
from mm_transformers.cli.space import write_space
from mm_transformers.cli.uploads import Upload


KINDS = ("text", "image")
ROW = {"text": "a cat sat on the mat", "image": make_image(1)}


def words_of(page: str) -> str:
    return " ".join(" ".join(Page(re.sub(r"<style>.*?</style>", "", page, flags=re.S)).texts).split())


def test_answers_with_and_without_the_picture():
    model, processor = make_model(), make_processor()
    text = words_of(answers_as_html(model, processor, ROW, ["topic", "entities"], KINDS))
    for variant in ("without the picture", "without the text"):
        assert variant in text
    assert text.index("topic") < text.index("entities")
    alone = words_of(answers_as_html(model, processor, {"text": "a cat"}, ["topic"], KINDS))
    assert "without" not in alone
    assert all(label in alone for label in model.tasks["topic"].labels)


@pytest.mark.parametrize(
    ("row", "tasks", "said"),
    [
        ({}, ["topic"], "There is no input yet: give a text or a picture."),
        ({"text": "   "}, ["topic"], "There is no input yet"),
        (ROW, [], "Tick at least one task."),
        ({"image": Upload("a.png", b"no picture")}, ["topic"], "a.png: the image (10 bytes) is not an image"),
        ({"text": "x", "image": "missing.png"}, ["topic"], "Upload the file to this page"),
        ({"text": "x", "image": {"path": __file__}}, ["topic"], "Upload the file to this page"),
    ],
)
def test_what_cannot_be_answered_is_told(row, tasks, said):
    page = answers_as_html(make_model(), make_processor(), row, tasks, KINDS)
    assert said in words_of(page)
    assert 'role="alert"' in page


def test_texts_do_not_become_elements():
    page = answers_as_html(make_model(), make_processor(), {"text": "<script>alert(1)</script>"}, ["topic"], KINDS)
    assert "<script>" not in page


def test_a_space_loads_the_page(tmp_path):
    written = write_space(tmp_path / "space", "me/my-model")
    assert sorted(path.name for path in written) == ["README.md", "app.py", "requirements.txt"]
    compile((tmp_path / "space" / "app.py").read_text(), "app.py", "exec")
    assert "load_page('me/my-model')" in (tmp_path / "space" / "app.py").read_text()
    assert "sdk: gradio" in (tmp_path / "space" / "README.md").read_text()
    (tmp_path / "space" / "README.md").write_text("mine")
    (tmp_path / "space" / "app.py").unlink()
    assert [path.name for path in write_space(tmp_path / "space", "me/my-model")] == ["app.py"]
    assert (tmp_path / "space" / "README.md").read_text() == "mine"
    for name in ("my-model", str(tmp_path), "a/b/c"):
        with pytest.raises(ValueError, match="Hub"):
            write_space(tmp_path, name)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of a saved model, served."""
    pytest.importorskip("gradio")
    from mm_transformers.cli.page import launch_options

    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    page = load_page(str(folder), examples=[["a cat sat on the mat", None]])
    _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", **launch_options())
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as run:
        # A microphone that beeps, and may be used without asking.
        microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        opened = run.chromium.launch(executable_path=chromium, args=["--no-sandbox", *microphone])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_from_typing_to_heat_map(address, browser, width, tmp_path):
    """By keyboard and file chooser, on a wide screen and on a phone; nothing goes to the console or elsewhere."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems, elsewhere = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: elsewhere.append(request.url) if not local(request.url, address) else None)
    page.goto(address)
    text = page.get_by_label("Text")
    text.wait_for()
    assert text.evaluate("box => box === document.activeElement"), "one can type at once"
    page.keyboard.type("a cat sat on the mat")
    make_image(3, size=(60, 40)).save(tmp_path / "picture.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "picture.png")
    page.get_by_label("Text").press("Control+a")
    page.keyboard.press("End")
    answer = page.get_by_role("button", name="Answer", exact=True)
    answer.focus()
    page.keyboard.press("Enter")
    card = page.locator("section[data-task=topic]")
    card.wait_for()
    card.locator("img.heat").wait_for()
    shown = card.locator("img.heat").evaluate("picture => [picture.naturalWidth, picture.naturalHeight]")
    assert shown == [320, 213], "the heat map has the shape of the picture"
    assert "without the picture" in card.inner_text()
    assert "cat" in card.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing hangs over the edge"
    assert_readable(page)
    page.screenshot(path=tmp_path / f"page_{width}.png", full_page=True)
    with Image.open(tmp_path / f"page_{width}.png") as picture:
        assert picture.width >= width

    page.get_by_label("topic", exact=True).uncheck()
    answer.click()
    page.locator("section[data-task=topic]").wait_for(state="detached")
    page.locator("section[data-task=sentiment]").wait_for()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    answer.click()
    message = page.locator("[role=alert]")
    message.wait_for()
    assert "not an image" in message.inner_text()
    assert not elsewhere
    assert not problems
    page.close()


@pytest.mark.slow
def test_from_the_microphone_to_what_was_heard(browser, tmp_path):
    pytest.importorskip("gradio")
    from mm_transformers.cli.page import launch_options

    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), make_feature_extractor())
    served = make_page(make_model(audio="wav2vec2"), processor, "sound")
    _, address, _ = served.launch(prevent_thread_lock=True, server_name="127.0.0.1", **launch_options())
    page = browser.new_page(viewport={"width": 390, "height": 900})
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.get_by_label("Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1200)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.get_by_label("Play", exact=False).first.wait_for()
    answer = page.get_by_role("button", name="Answer", exact=True)
    answer.click()
    card = page.locator("section[data-task=topic]")
    card.wait_for()
    heard = card.get_by_role("img", name="The sound, ")
    colors = heard.locator("i").evaluate_all("parts => parts.map(part => part.style.background)")
    assert len(colors) > 20
    # How strong they are depends on the share of the sound, to which this untrained model hardly listens.
    assert all(color.startswith("rgb(") for color in colors)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing hangs over the edge"
    assert not problems

    (tmp_path / "broken.wav").write_bytes(b"no sound")
    page.get_by_label("Clear").last.click()
    page.get_by_label("Upload file").last.click()
    with page.expect_response(lambda response: "/upload" in response.url):
        page.locator("input[type=file]").last.set_input_files(tmp_path / "broken.wav")
    answer.click()
    message = page.locator("[role=alert]")
    message.wait_for()
    assert "broken.wav" in message.inner_text()
    page.close()
    served.close()


@pytest.mark.slow
def test_examples_turn_the_sentiment_by_the_picture(tmp_path):
    examples = demo_examples(tmp_path)
    assert len(examples) == 6
    assert all(Image.open(picture).size == (256, 256) for _, picture in examples)
    texts = [text for text, _ in examples]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert len({picture for _, picture in examples}) == 6


def local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def assert_readable(page) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, level AA) wherever a word or a sentence of an answer stands."""
    pairs = page.evaluate(
        """() => [...document.querySelectorAll('.mm h2, .mm p, .mm .text span, .mm .bar span')].map(element => {
            const background = node => {
                while (node) {
                    const color = getComputedStyle(node).backgroundColor;
                    if (color && color !== 'transparent' && !color.endsWith(', 0)')) return color;
                    node = node.parentElement;
                }
                return 'rgb(255, 255, 255)';
            };
            return [getComputedStyle(element).color, background(element)];
        })"""
    )
    assert len(pairs) > 10
    for pair in pairs:
        light, dark = sorted((luminance(color) for color in pair), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_pages_of_models_with_sound_have_a_place_for_it():
    pytest.importorskip("gradio")
    page = make_page(make_model(audio="wav2vec2"), make_processor(), "sound")
    labels = [getattr(block, "label", None) for block in page.blocks.values()]
    assert {"Text", "Picture", "Sound", "Tasks"} <= set(labels)
    text_only = make_page(make_model(vision=None), make_processor(), "text")
    assert "Picture" not in [getattr(block, "label", None) for block in text_only.blocks.values()]


# Columns

TABLE = table_columns(
    [{"price": 1.0, "brand": "acme", "sold": "2024-01-10"}, {"price": 3.0, "brand": "<b>", "sold": "2024-03-02"}],
    {"price": "number", "brand": "category", "sold": "date"},
)


def make_table_page(text=True):
    """A model of columns, with a text or not, its processor, and the function and the components of its page."""
    pytest.importorskip("gradio")
    tiny = make_model(vision=None, tasks=[task for task in make_tasks() if text or task.name == "topic"]).config
    config = MMTransformerConfig(**{**tiny.to_diff_dict(), "table_config": TABLE, "reads_text": text})
    torch.manual_seed(0)
    model = MMTransformerForMultiTask(config).eval()
    processor = MMTransformerProcessor(tokenizer=make_tokenizer(), table_config=TABLE, reads_text=text)
    page = make_page(model, processor, "columns")
    blocks = {getattr(block, "label", None): block for block in page.blocks.values()}
    [answer] = [fn.fn for fn in page.fns.values() if fn.api_name == "answer"]
    return model, processor, answer, blocks


def test_each_column_has_a_field():
    *_, blocks = make_table_page()
    assert {name: type(blocks[name]).__name__ for name in ("Text", "price", "brand", "sold")} == {
        "Text": "Textbox", "price": "Number", "brand": "Dropdown", "sold": "Textbox",
    }  # fmt: skip
    assert [value for _, value in blocks["brand"].choices] == ["", "<b>", "acme"]
    assert blocks["price"].value is None
    *_, blocks = make_table_page(text=False)
    assert "Text" not in blocks
    assert "price" in blocks


def test_the_page_answers_as_the_pipeline():
    model, processor, answer, _ = make_table_page()
    pipe = pipeline("multimodal", model=model, processor=processor)
    for price, brand in ((2.5, "acme"), (None, ""), ("", "acme"), (7, None)):
        page = words_of(answer("a cat", price, brand, None, ["topic"]))
        row = {"text": "a cat", "price": price, "brand": brand}
        found = pipe({name: cell for name, cell in row.items() if cell not in (None, "")}, tasks=["topic"])
        assert f"topic {found['topic']['label']}" in page
        assert ("without the numbers and categories" in page) == any((price, brand))
    assert "There is no input yet: give a text or numbers and categories." in words_of(
        answer("", None, "", "", ["topic"])
    )
    assert "without" not in words_of(answer("", 3, "", "", ["topic"]))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["many", None, None], "'many' is no number"),
        ([float("inf"), None, None], "is not finite"),
        ([10**400, None, None], "is not finite"),
        ([{"path": "/etc/passwd"}, None, None], "Column 'price': give a number or a text"),
        ([[1], None, None], "Column 'price': give a number or a text"),
        ([True, None, None], "Column 'price': give a number or a text"),
        ([1, "x" * 1001, None], "Column 'brand': the value has 1,001 characters, and may have 1,000."),
        ([1, ["acme"], None], "Column 'brand': give a number or a text"),
        ([1, "acme", "yesterday"], "'yesterday'"),
    ],
)
def test_other_values_of_columns_are_refused(cells, said):
    page = make_table_page()[2]("a cat", *cells, ["topic"])
    assert said in words_of(page)
    assert 'role="alert"' in page
    assert "<b>" not in page


# Examples from a table


def saved_model(folder, **options) -> str:
    for part in (make_model(**options), make_processor()):
        part.save_pretrained(folder)
    return str(folder)


def test_complete_rows_of_a_table_become_examples(tmp_path):
    model = saved_model(tmp_path / "model")
    make_image(3).save(tmp_path / "three.png")
    rows = [("without a picture", ""), ("a cat", "three.png"), ("", "three.png"), *[("more", "three.png")] * 9]
    table = tmp_path / "rows.csv"
    table.write_text("text,image,topic\n" + "".join(f"{text},{image},animals\n" for text, image in rows))
    (tmp_path / "shown").mkdir()
    examples = table_examples(table, model, tmp_path / "shown")
    assert [text for text, _ in examples] == ["a cat", *["more"] * 5]
    assert all(Image.open(picture).tobytes() == make_image(3).tobytes() for _, picture in examples)
    assert all(picture.startswith(str(tmp_path / "shown")) for _, picture in examples)
    assert load_page(model, examples).blocks


def test_incomplete_rows_are_examples_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    model, table, picture = saved_model(tmp_path / "model"), tmp_path / "rows.parquet", io.BytesIO()
    make_image(1).save(picture, "png")
    cells = {"text": ["a cat", None, None], "image": [None, None, {"bytes": picture.getvalue(), "path": None}]}
    parquet.write_table(pyarrow.table(cells), table)
    [first, second] = table_examples(table, model, tmp_path)
    assert first == ["a cat", None]
    assert second[0] is None
    assert Image.open(second[1]).size == make_image(1).size


def test_columns_of_a_table_are_in_the_examples(tmp_path):
    model, processor, *_ = make_table_page()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "a cat", "price": 2.5, "brand": "acme", "sold": "2024-01-10"}\n{"text": "b", "price": null}\n'
    )
    examples = table_examples(tmp_path / "rows.jsonl", str(tmp_path / "model"), tmp_path)
    assert examples == [["a cat", 2.5, "acme", "2024-01-10"]]


def test_a_table_without_content_gives_no_examples(tmp_path):
    (tmp_path / "rows.csv").write_text("other\n1\n")
    with pytest.raises(ValueError, match=r"rows\.csv has no content in 'text', 'image', so there are no examples\."):
        table_examples(tmp_path / "rows.csv", saved_model(tmp_path / "model"), tmp_path)
