"""The page on many rows: what is on it, that it needs nothing else, and that its numbers are those of the rows."""

import re

import numpy as np
import pytest
import torch
from pages import Page
from rows import make_rows
from tiny import (
    make_clip,
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
)

from mm_transformers import MMDataCollator, MMTransformerProcessor, Regression, Retrieval
from mm_transformers.analysis import ablate, explain
from mm_transformers.analysis.report import write_report
from mm_transformers.analysis.report.answered_rows import answers_to, confusion, most_confident_errors, worst


@pytest.fixture(scope="module")
def model():
    return make_model(seed=2)


@pytest.mark.slow
def test_a_page_of_its_own(model, tmp_path):
    rows = [{**row, "text": row["text"] and f"{row['text']} <b> & co"} for row in make_rows(20)]
    for row in rows:
        row["entities"] = None  # the words are others now
    ablation = ablate(model, make_processor(), rows, num_permutations=1, num_additive_rows=0)
    path = tmp_path / "report.html"
    write_report(path, model, make_processor(), rows, num_examples=3, ablation=ablation, batch_size=7, title="A & B")
    page = Page(path.read_text())
    assert not page.open
    assert all(address.startswith(("data:image/", "#")) for address in page.fetched), "no network"
    assert {f"#{name}" for name in page.ids} >= {address for address in page.fetched if address.startswith("#")}
    assert all(image.get("alt") for image in page.images)
    text = " ".join("".join(page.texts).split())
    assert "A & B" in text
    assert "<b>" in text, "texts of rows are shown as they are"
    for task in model.tasks:
        assert f"task-{task}" in page.ids
    assert "width=device-width" in path.read_text()


def test_numbers_of_the_page_are_those_of_the_rows(model):
    rows = make_rows(24)
    collator = MMDataCollator(make_processor(), model.config)
    answers = [one for batch in answers_to(model, collator, rows, 7) for one in batch if one.task == "topic"]
    assert [one.number for one in answers] == list(range(24))
    task, loss = model.tasks["topic"], torch.nn.functional.cross_entropy
    for row, one in zip(rows, answers, strict=True):
        batch = collator([row])
        label = batch.pop("labels")["topic"]
        with torch.no_grad():
            logits = model(**batch).logits["topic"]
        assert one.answer == task.labels[int(logits.argmax())]
        assert one.confidence == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
        if row["topic"] is None:
            assert one.truth is one.is_right is one.loss is None
        else:
            assert one.truth == task.labels[int(label)]
            assert one.is_right == (one.truth == one.answer)
            assert one.loss == pytest.approx(float(loss(logits, label)), abs=1e-5)
        parts = {"text": bool(row["text"]), "vision": row.get("image") is not None}
        assert one.group == " + ".join(name for name, there in parts.items() if there)
    known = [one for one in answers if one.truth is not None]
    counts = np.array(confusion(known, task.labels))
    for i, truth in enumerate(task.labels):
        for j, answer in enumerate(task.labels):
            assert counts[i, j] == sum(one.truth == truth and one.answer == answer for one in known)
    wrong = [one for one in known if not one.is_right]
    assert most_confident_errors(answers, 3) == sorted(wrong, key=lambda one: one.confidence, reverse=True)[:3]
    assert worst(answers, 3) == sorted(wrong, key=lambda one: one.loss, reverse=True)[:3]


def test_other_kinds_and_rows_without_labels(tmp_path):
    model = make_model(tasks=[Regression("rating")])
    path = tmp_path / "report.html"
    write_report(path, model, make_processor(), [{"text": "fine", "rating": 1.5}, {"text": "bad", "rating": None}])
    text = path.read_text()
    assert "1.5" in text
    assert re.search(r"1 labelled rows", text)
    with pytest.raises(ValueError, match="at least one row"):
        write_report(path, model, make_processor(), [])
    with pytest.raises(ValueError, match="row 1"):
        write_report(tmp_path / "other.html", model, make_processor(), [{"text": "a"}, {"text": None}])
    assert not (tmp_path / "other.html").exists()


def test_sounds_are_drawn_as_they_are_relevant(tmp_path):
    """One strip per clip, as many parts as steps, the most relevant one the darkest."""
    model = make_model(audio="wav2vec2", seed=1)
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), make_feature_extractor())
    rows = [
        {"text": "a cat", "image": None, "audio": {"array": make_clip(0.05), "sampling_rate": 16_000}, "topic": "food"}
    ]
    path = tmp_path / "report.html"
    write_report(path, model, processor, rows, tasks=["topic"], num_examples=1)
    page = path.read_text()
    assert not Page(page).open
    strip = re.search(r'<div class="sound" role="img" aria-label="Sound of 0.[01] seconds[^>]*>(.*?)</div>', page)[1]
    colors = re.findall(r"background:(#\w{6})", strip)
    steps = explain(model, processor, rows[0], "topic").sounds[0].steps
    assert len(colors) == len(steps) > 20
    darkness = [-sum(bytes.fromhex(color[1:])) for color in colors]
    assert darkness[int(steps.argmax())] == max(darkness)
    assert darkness[int(steps.argmin())] == min(darkness)


def test_pictures_that_were_dropped_do_not_stop_the_page(model, tmp_path):
    processor = make_processor()
    collator = MMDataCollator(processor, model.config, on_bad_file="drop")
    rows = [
        {"text": "a cat", "image": "missing.png", "topic": "food"},
        {"text": "a dog", "image": make_image(), "topic": None},
    ]
    path = tmp_path / "report.html"
    write_report(path, model.train(), processor, rows, tasks=["topic", "entities"], collator=collator, num_examples=2)
    assert model.training
    page = Page(path.read_text())
    assert "not explained" not in "".join(page.texts)
    shown = [image["alt"] for image in page.images]
    assert shown
    assert not any("row 0" in alt for alt in shown)
    model.eval()


def test_answers_about_words_without_labels_are_shown(model, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, model, make_processor(), [{"text": "a cat sat"}], tasks=["entities"])
    assert re.search(r"Answer: <span[^>]*>(O|NAME), (O|NAME), (O|NAME)<", path.read_text())


def test_a_row_by_itself_has_no_loss_of_retrieval(tmp_path):
    model = make_model(tasks=[Retrieval("pairs", embedding_size=8)])
    collator = MMDataCollator(make_processor(), model.config)
    batches = answers_to(model, collator, [{"text": "a", "image": make_image(i)} for i in range(3)], 2)
    assert [answered.loss for batch in batches for answered in batch] == [None] * 3
