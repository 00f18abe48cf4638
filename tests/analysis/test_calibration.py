"""Calibration: what is fitted, what it changes, what it must not change."""

import importlib
import json
import logging
import math

import numpy as np
import pytest
import torch
from rows import make_rows
from tiny import make_image, make_model, make_processor
from transformers import pipeline

from mm_transformers import (
    Classification,
    MMTransformerForMultiTask,
    MMTransformerModel,
    MultiLabel,
    Predictor,
    Regression,
    TokenClassification,
)
from mm_transformers.analysis import calibrate
from mm_transformers.analysis.calibration import odd_rows, temperatures
from mm_transformers.analysis.calibration.cells import TaskRows, advice_tables
from mm_transformers.analysis.calibration.hidden_parts import GroupRows, rows_by_group
from mm_transformers.analysis.calibration.labelled_rows import LabelledRows, distinct_rows
from mm_transformers.analysis.calibration.measures import accuracy_at, class_wise_error, risk_coverage
from mm_transformers.analysis.calibration.odd_rows import fit_oddness
from mm_transformers.analysis.calibration.results import measures_of
from mm_transformers.analysis.calibration.temperatures import cross_tempered, fit_temperatures, tempered
from mm_transformers.analysis.reliability import chance_error, reliability
from mm_transformers.data.collator import MMDataCollator
from mm_transformers.model.calibration import Calibration
from mm_transformers.model.conformal import stored
from mm_transformers.model.oddness import distance, fitted, odd_sentence
from mm_transformers.model.predictions import Predictions


TOPIC = Classification("topic", labels=["animals", "food", "travel"])


def labelled_rows(n=120):
    rows = make_rows(n)
    for i, row in enumerate(rows):
        row["topic"] = ["animals", "food", "travel"][i % 3]
        row["score"] = float(i % 7)
        row["image"] = None if i % 4 == 1 else make_image(i)
    return rows


def sampled(n, temperature, num_labels=3, seed=0):
    """Logits that are `temperature` times too large for their labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_labels, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits * temperature, labels


@pytest.fixture(scope="module")
def calibrated():
    tasks = [TOPIC, MultiLabel("tags", labels=["red", "green", "blue"]), Regression("score")]
    model, processor = make_model(tasks=tasks), make_processor()
    # Untrained heads give nearly equal logits, for which temperatures mean nothing.
    with torch.no_grad():
        for head in (model.heads.topic, model.heads.tags, model.heads.score):
            head.out_proj.weight.mul_(60)
    before = pipeline("multimodal", model=model, processor=processor)
    questions = [{"text": "red cat"}, {"image": make_image(1)}, {"text": "blue crane", "image": make_image(2)}]
    answers = before(questions)
    result = calibrate(model, processor, labelled_rows(), min_rows=30)
    return model, processor, questions, answers, result


def test_the_temperature_is_found_again():
    [found] = fit_temperatures(TOPIC, *sampled(4000, 2.5))
    assert found == pytest.approx(2.5, rel=0.08)


def test_labels_get_their_own_temperatures_only_where_it_pays():
    logits, labels = sampled(3000, 2.0)
    assert len(fit_temperatures(TOPIC, logits, labels)) == 1
    # Answers with the first label are too sure, the others are right.
    logits, labels = sampled(3000, 1.0)
    logits = torch.where((logits.argmax(1) == 0)[:, None], 4 * logits, logits)
    found = fit_temperatures(TOPIC, logits, labels)
    assert found[0] == pytest.approx(4, rel=0.2)
    assert found[1:] == pytest.approx([1, 1], rel=0.15)


def test_temperatures_of_tags_are_those_of_each_label():
    task = MultiLabel("tags", labels=["red", "blue"])
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3000, 2, generator=generator)
    labels = (torch.rand(3000, 2, generator=generator) < logits.sigmoid()).float()
    found = fit_temperatures(task, logits * torch.tensor([1.0, 3.0]), labels)
    assert found == pytest.approx([1, 3], rel=0.15)


def test_a_temperature_per_label_keeps_the_answer():
    logits = torch.randn(50, 3)
    tempered = TOPIC.temper(logits, torch.tensor([[0.3, 2.0, 9.0]]).expand(50, -1))
    assert torch.equal(tempered.argmax(1), logits.argmax(1))


def test_each_row_is_measured_without_its_own_label():
    logits, labels = sampled(100, 3.0)
    changed = labels.clone()
    changed[7] = (labels[7] + 1) % 3
    first, second = (
        cross_tempered(TOPIC, rows, rows)
        for rows in (
            LabelledRows(logits, given, torch.arange(100), torch.ones(100).bool()) for given in (labels, changed)
        )
    )
    assert torch.equal(first[7], second[7])
    assert not torch.equal(first, second)


def group_of(n, natural, seed=0, first=0):
    logits, labels = sampled(n, 1.5, seed=seed)
    flags = torch.arange(n) < natural
    return GroupRows(first + torch.arange(n), flags, {"topic": logits}, {"topic": labels}, {})


def test_small_groups_are_calibrated_together():
    groups = {
        "text + vision": group_of(200, 200),
        "text": group_of(30, 30, 1, first=200),
        "vision": group_of(20, 20, 2, first=230),
    }
    cells = TaskRows(TOPIC, groups, 50).cells()
    assert set(cells) == {"text + vision", "other"}
    assert cells["other"]["rows"] == 50
    assert cells["other"]["groups"] == ["text", "vision"]
    thresholds = cells["other"]["thresholds"]
    assert thresholds[-1] is None  # 99.5% of 51 rows
    assert thresholds[179] is not None  # 90%


def test_hidden_copies_of_a_row_count_once():
    """4 rows in three groups are 4 rows: too few for 90%. The whole rows stand for them."""
    groups = {"text": group_of(4, 0), "vision": group_of(4, 0, 1), "text + vision": group_of(4, 4, 2)}
    other = TaskRows(TOPIC, groups, 50).cells()["other"]
    assert other["rows"] == 4
    assert other["thresholds"][179] is None
    assert other["groups"] == ["text + vision"]
    whole = groups["text + vision"]
    expected, _ = TOPIC.conformal_thresholds(whole.logits["topic"], whole.labels["topic"])
    assert other["thresholds"] == stored(expected)
    # 20 rows in three groups are fewer than 50, too.
    groups = {"text": group_of(20, 0), "vision": group_of(20, 0, 1), "text + vision": group_of(20, 20, 2)}
    assert "temperatures" not in TaskRows(TOPIC, groups, 50).cells()["other"]


def test_a_group_never_seen_gets_no_promise():
    found = {}
    for n in (49, 50):
        cells = json.loads(json.dumps(TaskRows(TOPIC, {"text": group_of(n, n)}, 50).cells()))
        calibration = Calibration({"tasks": {"topic": {"cells": cells}}})
        found[n] = calibration.thresholds("topic", ["text", "vision"], 0.9)
        cells["other"].pop("groups")  # as checkpoints of before
        old = calibration.thresholds("topic", ["vision"], 0.9)
        assert old == ([found[n][0]] if n == 49 else [math.inf])
    assert all(math.isfinite(known) and never == math.inf for known, never in found.values())
    cell = Calibration({"tasks": {"topic": {"cells": TaskRows(TOPIC, {"text": group_of(50, 50)}, 50).cells()}}})
    assert cell.cell("topic", "vision")["temperatures"] == cell.cell("topic", "text")["temperatures"]


def test_all_rows_are_the_rows_as_they_are():
    groups = {"text + vision": group_of(500, 500), "text": group_of(510, 10, 1)}
    of_task = TaskRows(TOPIC, groups, 50)
    found = measures_of(TOPIC, of_task.groups, of_task.cells())
    assert {group: one.rows for group, one in found.items()} == {"text + vision": 500, "text": 510, "all": 510}


def test_groups_that_share_temperatures_are_measured_with_them():
    groups = {"text + vision": group_of(400, 400), "text": group_of(8, 8, 1, first=400)}
    of_task = TaskRows(TOPIC, groups, 50)
    found = measures_of(TOPIC, of_task.groups, of_task.cells())["text"]
    everything, _ = distinct_rows(of_task.groups.values())
    after = cross_tempered(TOPIC, everything, everything)[400:]
    confidences, right = TOPIC.confidences(after, everything.labels[400:])
    assert found.after.ece == pytest.approx(reliability(confidences.double().numpy(), right.numpy()).ece)
    assert found.temperatures == pytest.approx([1.5], rel=0.15)  # and not those of 8 rows


def test_few_right_answers_do_not_run_off():
    labels = torch.arange(50) % 3
    logits = 1.5 * torch.nn.functional.one_hot(labels, 3).float()  # confidence 0.69, and all are right
    found = min(fit_temperatures(TOPIC, logits, labels))
    assert float((logits / found).softmax(-1).max()) < 0.998  # 50 of 50 does not show more
    task = Classification("many", labels=["a", "b", "c"])
    of_labels = temperatures._fit(task, 40 * logits, (labels + 1) % 3, 3, temperatures._PENALTY)
    assert max(of_labels) <= 20.001


def test_the_prior_hardly_changes_what_many_rows_say(monkeypatch):
    rows = [sampled(150, 2.5, seed=seed) for seed in range(5)]
    found = [fit_temperatures(TOPIC, *row) for row in rows]
    monkeypatch.setattr(temperatures, "_SHARED_PENALTY", 0.0)
    for one, row in zip(found, rows, strict=True):
        assert one == pytest.approx(fit_temperatures(TOPIC, *row), rel=0.03)


def test_answers_of_tags_are_those_of_the_tuned_thresholds():
    """Temperatures change probabilities, so thresholds that were tuned before choose by the logits of the model."""
    task = MultiLabel("tags", labels=["red", "blue"], threshold=0.2)
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(400, 2, generator=generator) - 1.5
    labels = (torch.rand(400, 2, generator=generator) < true.sigmoid()).float()
    logits = 4 * true

    def rows(natural):
        flags = torch.full((400,), natural)
        return GroupRows(torch.arange(400), flags, {"tags": logits}, {"tags": labels}, {})

    groups = {"text + vision": rows(True), "text": rows(False)}
    cells = TaskRows(task, groups, 50).cells()
    table = advice_tables(task, groups, cells)["text"]["vision"]
    right = float((((logits.sigmoid() >= 0.2) == (labels == 1)).all(-1)).float().mean())
    for column in ("now", "then"):
        assert np.average(table[column], weights=table["rows"]) == pytest.approx(right, abs=1e-3)
    calm = tempered(task, logits, cells["text"]["temperatures"])
    expected = torch.where(logits.sigmoid() >= 0.2, calm.sigmoid(), 1 - calm.sigmoid()).prod(-1)
    assert torch.allclose(task.answer_confidences(logits, calm), expected)
    judged = [task.judge_calibrated(*row) for row in zip(logits, calm, labels, strict=True)]
    assert [one.confidence for one in judged] == pytest.approx(expected.tolist())
    assert np.mean([one.is_right for one in judged]) == pytest.approx(right)


def test_hidden_parts_fill_small_groups_only():
    groups = {"text": group_of(100, 10), "vision": group_of(100, 60, 1)}
    of_task = TaskRows(TOPIC, groups, 50)
    assert {group: len(rows.labels) for group, rows in of_task.groups.items()} == {"text": 100, "vision": 60}


def test_hidden_parts_give_the_answers_of_rows_without_them():
    model, processor = make_model(), make_processor()
    rows = labelled_rows(7)
    groups = rows_by_group(model, MMDataCollator(processor, model.config), rows, batch_size=3)
    assert set(groups) == {"text", "vision", "text + vision"}
    whole = [i for i, row in enumerate(rows) if row["image"] is not None]
    assert groups["vision"].numbers.tolist() == whole
    assert not groups["vision"].natural.any()
    assert groups["text"].numbers.tolist() == list(range(7))
    for group, kept in (("text", ["text"]), ("vision", ["image"]), ("text + vision", ["text", "image"])):
        inputs = [{part: rows[i][part] for part in kept} for i in groups[group].numbers.tolist()]
        texts = [row.get("text") for row in inputs]
        images = [row.get("image") for row in inputs] if "image" in kept else None
        expected = Predictions.of(model, dict(processor(text=texts, images=images)))
        torch.testing.assert_close(groups[group].logits["topic"], expected.logits["topic"], atol=1e-5, rtol=1e-4)
        assert expected.groups == [group] * len(inputs)


def test_answers_stay_and_scores_change(calibrated):
    model, processor, questions, before, _ = calibrated
    after = pipeline("multimodal", model=model, processor=processor)(questions)
    cells = model.config.calibration["tasks"]["topic"]["cells"]
    assert any(cell["temperatures"] != [1.0] for cell in cells.values())
    for old, new, group in zip(before, after, ["text", "vision", "text + vision"], strict=True):
        assert new["topic"]["label"] == old["topic"]["label"]
        assert new["tags"]["labels"] == old["tags"]["labels"]
        assert new["score"] == old["score"]
        if cells[group]["temperatures"] != [1.0]:
            assert new["topic"]["score"] != old["topic"]["score"]


def test_a_saved_model_answers_the_same(calibrated, tmp_path):
    model, processor, questions, _, _ = calibrated
    pipe = pipeline("multimodal", model=model, processor=processor)
    pipe.save_pretrained(tmp_path)
    loaded = pipeline("multimodal", model=MMTransformerForMultiTask.from_pretrained(tmp_path), processor=processor)
    assert loaded(questions, coverage=0.9, advise=True) == pipe(questions, coverage=0.9, advise=True)
    for name, value in model.oddness.state_dict().items():
        assert torch.equal(loaded.model.oddness.state_dict()[name], value)


def test_sets_intervals_and_advice(calibrated):
    model, processor, questions, _, _ = calibrated
    pipe = pipeline("multimodal", model=model, processor=processor)
    for answer in pipe(questions, coverage=0.8):
        found = answer["topic"]["set"]
        assert found[0] == answer["topic"]["label"]
        assert answer["topic"]["abstain"] == (len(found) != 1 or answer["topic"]["odd"])
        low, high = answer["score"]["interval"]
        assert low < answer["score"]["value"] < high
    [advice] = pipe({"text": "red cat"}, advise=True)["topic"]["advice"]
    assert advice["add"] == "vision"
    assert advice["text"].startswith("With an image, ")
    assert pipe(questions[2], advise=True)["topic"]["advice"] == []


def test_the_advice_is_what_was_measured(calibrated):
    """The mean over the bins is the accuracy of all rows with a picture, without and with it."""
    model, processor, *_ = calibrated
    rows = [row for row in labelled_rows() if row["image"] is not None]
    table = model.config.calibration["tasks"]["topic"]["advice"]["text"]["vision"]
    for column, kept in (("now", ["text"]), ("then", ["text", "image"])):
        inputs = [{part: row[part] if part in kept else None for part in ("text", "image")} for row in rows]
        answers = Predictor(model, processor, tasks=["topic"])(inputs)
        right = np.mean([a["topic"]["label"] == row["topic"] for a, row in zip(answers, rows, strict=True)])
        assert np.average(table[column], weights=table["rows"]) == pytest.approx(right, abs=1e-3)


def test_predictor_and_pipeline_agree(calibrated):
    model, processor, questions, _, _ = calibrated
    pipe = pipeline("multimodal", model=model, processor=processor)
    expected = [answer["topic"] for answer in pipe(questions, coverage=0.9)]
    found = [
        answer["topic"]
        for answer in Predictor(model, processor, coverage=0.9)([{"text": "", **row} for row in questions])
    ]
    for one, other in zip(expected, found, strict=True):
        assert one["set"] == other["set"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_an_uncalibrated_model_cannot_promise():
    model, processor = make_model(), make_processor()
    pipe = pipeline("multimodal", model=model, processor=processor)
    with pytest.raises(ValueError, match="run `calibrate"):
        pipe({"text": "red cat"}, coverage=0.9)
    with pytest.raises(ValueError, match="coverage must be above 0"):
        pipe({"text": "red cat"}, coverage=1.5)


def test_rows_without_labels_are_refused():
    with pytest.raises(ValueError, match="No task can be calibrated"):
        calibrate(make_model(), make_processor(), [{"text": "red cat"}] * 3)


@pytest.mark.parametrize("way", ["tasks", "config"])
def test_new_heads_lose_their_calibration(calibrated, way, tmp_path):
    model, *_ = calibrated
    model.save_pretrained(tmp_path)
    tasks = [Classification("topic", labels=["x", "y", "z"]), model.tasks["tags"], model.tasks["score"]]
    values = {**model.config.to_dict(), "tasks": [task.to_dict() for task in tasks]}
    given = {"tasks": tasks} if way == "tasks" else {"config": type(model.config).from_dict(values)}
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path, **given)
    assert set(loaded.config.calibration["tasks"]) == {"tags", "score"}


def test_too_few_labelled_words_are_counted():
    model, processor = make_model(tasks=[TokenClassification("words", labels=["A", "B"])]), make_processor()
    rows = [{"text": "red cat", "words": ["A", "B"]}] * 30
    with pytest.raises(ValueError, match=r"'words' has 30 labelled rows, but a temperature needs 50 \(`min_rows`\)"):
        calibrate(model, processor, rows)


def test_rows_without_a_length_are_refused():
    with pytest.raises(ValueError, match="rows must be a data set, .* but is of type generator"):
        calibrate(make_model(), make_processor(), (row for row in labelled_rows(3)))
    with pytest.raises(ValueError, match="training_rows must be .* of type generator"):
        calibrate(make_model(), make_processor(), labelled_rows(60), training_rows=(row for row in ()))


def test_training_rows_that_are_the_calibration_rows_are_told():
    model, processor = make_model(tasks=[Regression("score")]), make_processor()
    told = []
    for training in (labelled_rows(50), labelled_rows(50)[::-1][:48]):
        result = calibrate(model, processor, labelled_rows(50), training_rows=training, hide=False)
        told.append("The training rows are the calibration rows" in str(result))
    assert told == [True, False]


def test_tasks_without_labels_lose_their_calibration(calibrated, tmp_path):
    model, processor, *_ = calibrated
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    rows = [{name: cell for name, cell in row.items() if name not in ("topic", "image")} for row in labelled_rows(60)]
    result = calibrate(loaded, processor, rows, min_rows=30)
    assert "topic" not in loaded.config.calibration["tasks"]
    assert any("'topic' has no rows here to calibrate it on, so its earlier calibration is removed" in note
               for note in result.notes)  # fmt: skip


def test_training_and_adapters_are_told(calibrated, tmp_path, caplog):
    """The calibration is that of other weights. Removing it removes the warnings of odd rows, too."""
    peft = pytest.importorskip("peft")
    logging.Logger.warning_once.cache_clear()  # other tests may have had these warnings
    model, processor, questions, before, _ = calibrated
    model.save_pretrained(tmp_path)
    base = MMTransformerForMultiTask.from_pretrained(tmp_path)
    batch = MMDataCollator(processor, base.config)(labelled_rows(2))
    base.eval()(**batch)
    assert "Training changes" not in caplog.text
    base.train()(**batch)
    assert "Training changes the probabilities" in caplog.text
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "value"]))
    pipe = pipeline("multimodal", model=adapted, processor=processor)
    pipe(questions[0])
    assert "calibrated without its adapter 'default'" in caplog.text
    calibrate(adapted, processor, labelled_rows(60), hide=False)
    assert base.config.calibration["adapters"] == ["default"]
    base.config.calibration = None
    for answer, old in zip(pipe(questions), before, strict=True):
        assert answer["topic"] == {"label": old["topic"]["label"], "score": pytest.approx(old["topic"]["score"])}
    plain = MMTransformerForMultiTask.from_pretrained(tmp_path)
    plain.config.calibration = None
    plain.save_pretrained(tmp_path / "removed")
    again = MMTransformerForMultiTask.from_pretrained(tmp_path / "removed")
    assert pipeline("multimodal", model=again, processor=processor)(questions) == before
    MMTransformerModel.from_pretrained(tmp_path)  # without heads


@pytest.mark.parametrize("change", [
    lambda c: c["tasks"]["topic"]["cells"]["other"].update(groups=[1]),
    lambda c: c["tasks"].update(other={"cells": {}}),
    lambda c: c["tasks"]["topic"]["cells"]["text"].update(temperatures=[0.0]),
    lambda c: c["tasks"]["topic"]["cells"]["text"].update(temperatures=[1.0, 2.0]),
    lambda c: c["tasks"]["topic"]["cells"]["text"].update(temperatures=[float("nan")]),
    lambda c: c["tasks"]["topic"]["cells"]["text"].update(thresholds=[1.0]),
    lambda c: c["tasks"]["topic"]["advice"]["text"]["vision"].update(rows=[]),
    lambda c: c["oddness"]["parts"]["text"].update(width=10**12),
    lambda c: c["oddness"].update(thresholds={"text": -1}),
])  # fmt: skip
def test_a_damaged_calibration_is_refused(calibrated, change):
    values = calibrated[0].config.to_dict()
    values["calibration"] = json.loads(json.dumps(values["calibration"]))
    change(values["calibration"])
    with pytest.raises(ValueError, match="calibration"):
        type(calibrated[0].config).from_dict(values)


def test_the_result_can_be_shown(calibrated):
    result = calibrated[4]
    assert "topic" in str(result)
    json.dumps(result.to_dict(), allow_nan=False)
    assert len(result.plot().axes) > 2


def test_odd_rows_are_told():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 40, generator=generator)

    def rows(n, shift):
        vectors = torch.randn(n, 6, generator=generator) @ basis + 0.1 * torch.randn(n, 40, generator=generator)
        return GroupRows(torch.arange(n), torch.ones(n).bool(), {}, {}, {"vision": vectors + shift})

    oddness = fit_oddness({"vision": rows(400, 0)})
    warned = {shift: np.mean([odd.is_odd for odd in oddness(rows(300, shift).vectors, ["vision"] * 300)])
              for shift in (0, 1)}  # fmt: skip
    assert warned[0] < 0.05
    assert warned[1] > 0.95


@pytest.mark.parametrize("way", ["loaded", "cast"])
def test_a_calibrated_model_answers_in_bfloat16(calibrated, way, tmp_path):
    model, processor, questions, _, _ = calibrated
    model.save_pretrained(tmp_path)
    low = MMTransformerForMultiTask.from_pretrained(tmp_path, dtype=torch.bfloat16 if way == "loaded" else None)
    low = low if way == "loaded" else low.to(torch.bfloat16)
    assert low.dtype == torch.bfloat16
    for name, value in model.oddness.state_dict().items():
        assert torch.equal(low.oddness.state_dict()[name], value)  # and float32
    answers = pipeline("multimodal", model=low, processor=processor)(questions, coverage=0.9, advise=True)
    assert [len(answer["topic"]["set"]) > 0 for answer in answers] == [True] * 3

    # A checkpoint in bfloat16 can be calibrated, too.
    if way == "cast":
        calibrate(low, processor, labelled_rows(80), min_rows=30, hide=False)
    assert {value.dtype for value in low.oddness.state_dict().values()} == {torch.float32}
    pipeline("multimodal", model=low, processor=processor)(questions[0], coverage=0.9)


def test_vectors_with_nan_are_odd(calibrated):
    model = calibrated[0]
    vectors = {name: torch.full((2, part["width"]), math.nan) for name, part in model.oddness.parts.items()}
    vectors["fused"] = torch.zeros(2, model.oddness.parts["fused"]["width"])
    vectors["text"][1] = model.oddness.text_mean
    first, second = model.oddness(vectors, ["text", "text"])  # a text alone: no vision
    assert (first.score, first.part) == (math.inf, "text")
    assert second.score < math.inf
    assert odd_sentence("This row", first).startswith("This row: the vectors of its text are not finite")


def test_calibration_rows_with_nan_do_not_count_as_known():
    rows = GroupRows(torch.arange(200), torch.ones(200).bool(), {}, {}, {"text": torch.randn(200, 8)})
    rows.vectors["text"][::10] = math.nan
    oddness = fit_oddness({"text": rows})
    assert all(math.isfinite(value) for value in oddness.thresholds.values())
    assert sum(row.is_odd for row in oddness(rows.vectors, ["text"] * 200)) >= 20


def test_odd_rows_abstain(calibrated, caplog):
    model, processor, questions, _, _ = calibrated
    pipe = pipeline("multimodal", model=model, processor=processor)
    plain = pipe(questions, coverage=0.2)
    assert not any(answer["topic"]["odd"] for answer in plain)
    thresholds = model.oddness.thresholds
    kept = dict(thresholds)
    try:
        thresholds.update(dict.fromkeys(thresholds, 1e-9))  # every row is farther away than this
        odd = pipe(questions, coverage=0.2)
    finally:
        thresholds.update(kept)
    for answer, before in zip(odd, plain, strict=True):
        for name in ("topic", "score"):
            assert answer[name]["odd"] is True
            assert answer[name]["abstain"] is True
            assert {k: v for k, v in answer[name].items() if k not in ("odd", "abstain")} == {
                k: v for k, v in before[name].items() if k not in ("odd", "abstain")
            }
    assert "odd" not in pipe(questions)[0]["topic"]


def test_few_answers_have_an_error_by_chance():
    """The exact mean for one bin: of n answers with confidence p, E|right - n p| / n."""
    n, p = 9, 0.7
    exact = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) * abs(k / n - p) for k in range(n + 1))
    assert chance_error(np.full(n, p), num_draws=20_000) == pytest.approx(exact, rel=0.02)
    assert chance_error(np.full(40_000, p)) < 0.003
    assert chance_error(np.ones(5)) == 0


def test_the_distance_is_that_of_the_covariance():
    vectors = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 6))
    found = distance(vectors, *fitted(vectors, 5))
    inverse = np.linalg.inv(np.cov(vectors.double().numpy().T))
    centred = (vectors - vectors.mean(0)).double().numpy()
    expected = np.sqrt(np.einsum("ij,jk,ik->i", centred, inverse, centred))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


def test_the_curve_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    confidences, right = rng.permutation(50) / 50, rng.random(50) < 0.7
    curve = risk_coverage(confidences, right)
    for place, number in enumerate(range(1, 51)):
        surest = np.argsort(-confidences)[:number]
        assert curve.accuracies[place] == pytest.approx(right[surest].mean())
    assert accuracy_at(curve, 1.0) == pytest.approx(right.mean())


def test_rows_of_equal_confidence_are_answered_together():
    curve = risk_coverage(np.array([0.5, 0.5, 0.5, 0.5]), np.array([True, True, False, False]))
    assert curve.accuracies == pytest.approx([0.5] * 4)


def test_perfect_probabilities_have_no_class_wise_error():
    p = torch.tensor([[0.8, 0.2]] * 10)
    assert class_wise_error(p, torch.tensor([0] * 8 + [1] * 2)) == pytest.approx(0, abs=1e-6)
    assert class_wise_error(p, torch.tensor([0] * 5 + [1] * 5)) == pytest.approx(0.3, abs=1e-6)


def test_texts_of_other_lengths_are_calibrated_together():
    """Groups differ in their longest text. Padding changes nothing, and no row is left out."""
    task = TokenClassification("words", labels=["a", "b", "c"])
    logits, labels = (x.view(24, 3, *x.shape[1:]) for x in sampled(72, 2.0))
    labels[:8, 2:] = -100

    def groups(length_of_first):
        parts = {"text": (slice(0, 8), length_of_first), "text + vision": (slice(8, 24), 3)}
        return {
            name: GroupRows(torch.arange(24)[rows], torch.ones(24, dtype=torch.bool)[rows],
                            {"words": logits[rows, :length]}, {"words": labels[rows, :length]}, {})
            for name, (rows, length) in parts.items()
        }  # fmt: skip

    short, long = (TaskRows(task, groups(length), min_rows=20) for length in (2, 3))
    assert short.cells()["other"] == long.cells()["other"]
    assert short.cells()["other"]["rows"] == 24
    found, expected = (measures_of(task, rows.groups, rows.cells()) for rows in (short, long))
    assert found["all"].before.counts == expected["all"].before.counts
    assert found["all"].before.ece == expected["all"].before.ece
    assert sum(found["all"].before.counts) == 72 - 8
    assert found["all"].rows == 24


def test_training_rows_are_drawn_at_random(monkeypatch):
    module = importlib.import_module("mm_transformers.analysis.calibration.calibrate")
    monkeypatch.setattr(module, "_MOST_TRAINING_ROWS", 100)
    model, processor = make_model(tasks=[Regression("score")]), make_processor()
    rows = sorted(make_rows(200), key=lambda row: row["text"])
    for i, row in enumerate(rows):
        row["image"] = make_image(i) if i >= 100 else None  # the first 100 rows have none
    calibrate(model, processor, labelled_rows(60), training_rows=rows, hide=False)
    assert "vision" in model.config.calibration["oddness"]["parts"]


def test_the_halves_of_the_rows_are_drawn_at_random():
    """Rows that alternate between two classes: the statistics must know both."""
    vectors = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    vectors[::2, 0] += 50
    rows = GroupRows(torch.arange(400), torch.ones(400).bool(), {}, {}, {"text": vectors})
    first, second = (odd_rows._half(rows, which).numbers for which in (0, 1))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(400))
    assert len(first) == 200
    assert abs(int((first % 2).sum()) - 100) < 30
    oddness = fit_oddness({"text": rows})
    assert np.mean([odd.is_odd for odd in oddness({"text": vectors}, ["text"] * 400)]) < 0.05
