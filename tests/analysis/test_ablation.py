"""What each modality is good for, against rows that were emptied and exchanged by hand, and sums over all orders."""

import importlib
import itertools
import json
import math
import re
from collections import Counter

import datasets
import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rows import make_dataset, make_rows
from tiny import make_image, make_model, make_processor, open_gates
from transformers import EvalPrediction, TrainingArguments
from writers import make_writer

from mm_transformers import Classification, Generation, Matching, MMDataCollator, MMTrainer, MultiTaskMetrics, Retrieval
from mm_transformers.analysis import ablate
from mm_transformers.analysis.ablation.contributions import (
    additive_projection,
    perceptual_score,
    shapley_values,
    subsets,
)
from mm_transformers.analysis.ablation.encoded_rows import exchanged
from mm_transformers.analysis.ablation.results import Ablation, Contribution, main_metric
from mm_transformers.analysis.ablation.tables import Table, as_markdown
from mm_transformers.analysis.reliability import reliability
from mm_transformers.data.markdown import plain_markdown
from mm_transformers.training.metrics import less_is_better
from mm_transformers.training.metrics.mismatches import draw_mismatches


NUM_ROWS = 24
SEED = 5


@pytest.fixture(scope="module")
def model():
    return make_model(seed=2)


@pytest.fixture(scope="module")
def ablation(model):
    return ablate(model, make_processor(), make_dataset(NUM_ROWS), batch_size=10, num_permutations=3, seed=SEED)


def logits_by_hand(model, rows: list[dict]) -> dict[str, np.ndarray]:
    """Each row alone, by the model itself; of rows that have nothing left, an empty text."""
    processor, found = make_processor(), []
    for row in rows:
        images = None if row["image"] is None else [row["image"]]
        with torch.no_grad():
            found.append(model(**processor(text=[row["text"]], images=images)).logits)
    return {task: torch.cat([one[task] for one in found]).numpy() for task in ("topic", "sentiment", "score")}


def accuracy_by_hand(model, rows: list[dict], task: str) -> float:
    labels = model.tasks[task].labels
    logits = logits_by_hand(model, rows)[task]
    known = [i for i, row in enumerate(rows) if row[task] is not None]
    encoded = [model.tasks[task].encode_label(rows[i][task], "") for i in known]
    assert max(encoded) < len(labels)
    return float(np.mean([logits[i].argmax() == label for i, label in zip(known, encoded, strict=True)]))


@pytest.mark.slow
def test_variants_are_what_they_are_called(model, ablation):
    rows = make_rows(NUM_ROWS)
    named = ["all", "text only", "image only", "nothing", "text shuffled", "image shuffled"]
    assert list(ablation.variants) == named
    for task in ("topic", "sentiment"):
        by_hand = {
            "all": rows,
            "text only": [{**row, "image": None} for row in rows],
            "image only": [{**row, "text": None} for row in rows],
            "nothing": [{**row, "text": None, "image": None} for row in rows],
        }
        for variant, changed in by_hand.items():
            found = ablation.variants[variant][f"{task}_accuracy"]
            assert found == pytest.approx(accuracy_by_hand(model, changed, task)), (variant, task)
    # Words are gone with the text.
    assert "entities_accuracy" in ablation.variants["text only"]
    for variant in ("image only", "nothing", "text shuffled"):
        assert "entities_accuracy" not in ablation.variants[variant]


@pytest.mark.slow
def test_exchanged_rows_by_hand(model):
    """The same order and cycles, drawn again; the rows exchanged before anything is encoded."""
    rows = rows_without_some_parts(NUM_ROWS)
    found = ablate(model, make_processor(), rows, batch_size=10, num_permutations=1, num_additive_rows=0, seed=SEED)
    assert {contribution.num_rows for contribution in found.contributions.values()} == {0}
    rng = np.random.default_rng(SEED)
    order = rng.permutation(NUM_ROWS)
    moved = {}
    window = [rows[i] for i in order]
    for column in ("text", "image"):
        source = exchanged(np.array([row[column] is not None for row in window]), rng)
        moved[column] = [{**row, column: window[i][column]} for row, i in zip(window, source, strict=True)]
    for column, changed in moved.items():
        for task in ("topic", "sentiment"):
            assert found.variants[f"{column} shuffled"][f"{task}_accuracy"] == pytest.approx(
                accuracy_by_hand(model, changed, task)
            ), (column, task)


def rows_without_some_parts(count: int) -> list[dict]:
    """Every fifth has no text; of the others, some have no picture."""
    rows = [{**row, "text": None if i % 5 == 0 else row["text"]} for i, row in enumerate(make_rows(count))]
    for i, row in enumerate(rows):
        if row["text"] is None:
            row.update(image=row["image"] or rows[2]["image"], entities=None)
        row["topic"] = ["animals", "food", "travel"][i % 3]
    return rows


@pytest.mark.slow
def test_rows_without_a_text_are_given_none(model):
    """Whatever is exchanged, a row has what it had: seen in what the fusion is given."""
    rows = rows_without_some_parts(NUM_ROWS)
    counts, batches = [], []

    def count(module, args):
        text_states, text_mask, streams = args[:3]
        standing_in = (text_mask.sum(1) == 1) & (text_states[:, 0] == model.model.null_text.weight).all(-1)
        batches.append((int(standing_in.sum()), sum(int(stream.present.sum()) for stream in streams)))

    hook = model.model.fusion.register_forward_pre_hook(count)
    try:
        ablate(model, make_processor(), rows, num_permutations=3, num_additive_rows=0)
    finally:
        hook.remove()
    without_text = sum(row["text"] is None for row in rows)
    with_image = sum(row["image"] is not None for row in rows)
    assert 0 < without_text < NUM_ROWS
    assert 0 < with_image < NUM_ROWS
    counts = Counter(batches)
    # All, and three exchanges of each modality; then the variants that lack something.
    assert counts[without_text, with_image] == 1 + 3 + 3
    assert counts[without_text, 0] == counts[NUM_ROWS, with_image] == counts[NUM_ROWS, 0] == 1


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_exchanging_is_one_cycle(present, seed):
    present = np.array(present)
    rows = exchanged(present, np.random.default_rng(seed))
    assert (rows[~present] == np.flatnonzero(~present)).all()
    assert sorted(rows) == list(range(len(present)))
    if present.sum() > 1:
        place, walked = int(np.flatnonzero(present)[0]), []
        while place not in walked:
            walked.append(place)
            place = int(rows[place])
        assert len(walked) == present.sum(), "one cycle through all, so none keeps its own"


def test_shapley_values_are_means_over_all_orders_and_sum_to_the_gain(ablation):
    rng = np.random.default_rng(0)
    names = ["text", "vision", "audio"]
    worths = {kept: float(rng.random()) for kept in subsets(names)}
    asked = []
    found = shapley_values(names, lambda kept: asked.append(kept) or worths[kept])
    assert sorted(map(sorted, asked)) == sorted(map(sorted, worths)), "each set is measured once"
    for name in names:
        gains = []
        for order in itertools.permutations(names):
            before = frozenset(order[: order.index(name)])
            gains.append(worths[before | {name}] - worths[before])
        assert found[name] == pytest.approx(np.mean(gains))
    assert sum(found.values()) == pytest.approx(worths[frozenset(names)] - worths[frozenset()])
    for task, contribution in ablation.contributions.items():
        gain = ablation.variants["all"][contribution.metric] - ablation.variants["nothing"][contribution.metric]
        assert sum(contribution.shapley.values()) == pytest.approx(gain), task


def test_the_additive_projection_is_the_nearest_sum():
    """Least squares over all sums of a function of the row and one of the column."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 5, 3))
    design = np.concatenate([np.kron(np.eye(5), np.ones((5, 1))), np.kron(np.ones((5, 1)), np.eye(5))], axis=1)
    nearest = design @ np.linalg.lstsq(design, logits.reshape(25, 3), rcond=None)[0]
    expected = nearest.reshape(5, 5, 3)[np.arange(5), np.arange(5)]
    means = torch.tensor(logits.mean(1)), torch.tensor(logits.mean(0))
    np.testing.assert_allclose(additive_projection(*means).numpy(), expected, atol=1e-12)
    additive = rng.normal(size=(5, 1, 3)) + rng.normal(size=(1, 5, 3))
    own = additive[np.arange(5), np.arange(5)]
    means = torch.tensor(additive.mean(1)), torch.tensor(additive.mean(0))
    np.testing.assert_allclose(additive_projection(*means).numpy(), own, atol=1e-12)


@pytest.fixture(scope="module")
def interacting():
    """A model whose modalities interact so much that it shows."""
    model, generator = make_model(seed=2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def score_metrics(model) -> MultiTaskMetrics:
    """Of numbers, so that the least difference shows."""
    return MultiTaskMetrics(model.config, make_processor(), {"score": ["mse"]})


@pytest.mark.slow
@pytest.mark.parametrize("num_sampled", [12, 7])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_projection_pairs_each_text_with_each_picture_of_all_rows(interacting, batch_size, num_sampled):
    """Against the least squares over all sums, of logits of rows that were put together by hand."""
    model = interacting
    rows = [{**row, "score": i / 7} for i, row in enumerate(rows_without_some_parts(12))]
    options = dict(batch_size=batch_size, num_permutations=1, num_additive_rows=num_sampled, seed=3)
    metrics = score_metrics(model)
    found = ablate(model, make_processor(), rows, ["score"], compute_metrics=metrics, **options).contributions["score"]
    sampled = [rows[i] for i in np.random.default_rng(3).permutation(12)[:num_sampled]]
    crossed = [{**one, "image": other["image"]} for one in sampled for other in sampled]
    logits = logits_by_hand(model, crossed)["score"].flatten().astype(float)
    one, other = np.divmod(np.arange(num_sampled**2), num_sampled)
    design = np.concatenate([np.eye(num_sampled)[one], np.eye(num_sampled)[other]], axis=1)
    nearest = (design @ np.linalg.lstsq(design, logits, rcond=None)[0]).reshape(num_sampled, num_sampled).diagonal()
    own, truth = logits.reshape(num_sampled, num_sampled).diagonal(), np.array([row["score"] for row in sampled])
    assert found.additive == pytest.approx(float(((nearest - truth) ** 2).mean()), rel=1e-4)
    assert found.score == pytest.approx(float(((own - truth) ** 2).mean()), rel=1e-4)
    assert found.interaction == pytest.approx(found.additive - found.score)
    assert abs(found.interaction) > 0.01 * found.score, "the test needs a model whose modalities interact"
    assert found.num_rows == num_sampled


@pytest.mark.slow
def test_no_result_depends_on_the_batch_size(interacting):
    rows, found = rows_without_some_parts(12), []
    for batch_size in (1, 7, 64):
        options = dict(batch_size=batch_size, num_permutations=2, num_additive_rows=6, seed=1)
        metrics = score_metrics(interacting)
        names = ["topic", "score"]
        found.append(ablate(interacting, make_processor(), rows, names, compute_metrics=metrics, **options))
    for other in found[1:]:
        for variant, metrics in found[0].variants.items():
            assert other.variants[variant] == pytest.approx(metrics, rel=1e-4, abs=1e-6), variant
        for task, contribution in found[0].contributions.items():
            assert other.contributions[task].additive == pytest.approx(contribution.additive, rel=1e-4, abs=1e-6)
        assert other.calibration["topic"].ece == pytest.approx(found[0].calibration["topic"].ece, abs=1e-6)


@pytest.mark.slow
def test_the_size_of_the_sample_is_told(model):
    options = dict(num_permutations=1, num_additive_rows=8)
    found = ablate(model, make_processor(), make_rows(NUM_ROWS), **options)
    assert found.contributions["topic"].num_rows == 8
    assert found.to_dict()["contributions"]["topic"]["num_rows"] == 8
    assert f"measured on 8 of {NUM_ROWS} rows, drawn at random." in found.to_markdown()
    found = ablate(model, make_processor(), make_rows(6), num_permutations=1)
    assert "measured on all 6 rows." in found.to_markdown()
    assert "measured on" not in ablate(model, make_processor(), make_rows(6), num_additive_rows=0).to_markdown()


@pytest.mark.slow
def test_windows_are_exchanged_one_by_one_and_sampled_together(interacting, monkeypatch):
    """With windows of 5 rows instead of 256."""
    model = interacting
    module = importlib.import_module("mm_transformers.analysis.ablation.ablate")
    rows = rows_without_some_parts(12)
    options = dict(num_permutations=1, num_additive_rows=9, seed=3, compute_metrics=score_metrics(model))
    whole = ablate(model, make_processor(), rows, **options)
    monkeypatch.setattr(module, "_WINDOW", 5)
    parts = ablate(model, make_processor(), rows, **options)
    for variant in ("all", "text only", "image only", "nothing"):
        assert parts.variants[variant] == pytest.approx(whole.variants[variant], rel=1e-4, abs=1e-6)
    for task, contribution in whole.contributions.items():
        assert parts.contributions[task].additive == pytest.approx(contribution.additive, rel=1e-4, abs=1e-6)
    rng = np.random.default_rng(3)
    moved = []
    for numbers in np.array_split(rng.permutation(12), 3):
        window = [rows[i] for i in numbers]
        exchanged(np.array([row["text"] is not None for row in window]), rng)
        source = exchanged(np.array([row["image"] is not None for row in window]), rng)
        moved += [{**row, "image": window[i]["image"]} for row, i in zip(window, source, strict=True)]
    found = parts.variants["image shuffled"]["topic_loss"]
    logits = torch.tensor(logits_by_hand(model, moved)["topic"])
    labels = torch.tensor([model.tasks["topic"].encode_label(row["topic"], "") for row in moved])
    assert found == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)


# Which way is better


class WordErrorRate(evaluate.Metric):
    """As people load it: an object that does not say whether less is better."""

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        wrong = sum(p.split() != r.split() for p, r in zip(predictions, references, strict=True))
        return {"mistakes": wrong / len(references), "hits": 1 - wrong / len(references)}


def test_gains_are_gains_also_where_less_is_better(model):
    rows = [{**row, "score": i / 7} for i, row in enumerate(make_rows(12))]
    metrics = {"score": ["mse"], "topic": []}
    options = dict(num_permutations=2, compute_metrics=MultiTaskMetrics(model.config, make_processor(), metrics))
    found = ablate(model, make_processor(), rows, **options)
    for task, metric in (("score", "score_mse"), ("topic", "topic_loss")):
        contribution = found.contributions[task]
        assert (contribution.metric, contribution.less_is_better) == (metric, True)
        worths = {name: found.variants[name][metric] for name in ("all", "text only", "image only", "nothing")}
        image = ((worths["text only"] - worths["all"]) + (worths["nothing"] - worths["image only"])) / 2
        assert contribution.shapley["vision"] == pytest.approx(image)
        assert sum(contribution.shapley.values()) == pytest.approx(worths["nothing"] - worths["all"])
        assert contribution.interaction == pytest.approx(contribution.additive - contribution.score)
        assert f"{metric.removeprefix(task + '_')} (less is better)" in found.to_markdown()
    assert found.contributions["tags"].less_is_better is False


def test_a_metric_that_does_not_say_is_asked_by_example():
    tasks = [Generation("german", max_length=8)]
    metrics = MultiTaskMetrics(
        make_writer("marian", tasks=tasks).config, make_processor(), {"german": [WordErrorRate()]}
    )
    ids = torch.tensor([[30, 31], [32, 33], [34, 35]])
    answers = {"german": {"generated_ids": ids.flip(0), "losses": torch.ones(3)}}
    found = metrics(EvalPrediction(predictions=answers, label_ids={"german": ids}))
    assert found["german_mistakes"] == pytest.approx(2 / 3)
    assert metrics.less_is_better("german_mistakes") is True
    assert metrics.less_is_better("german_hits") is False
    assert metrics.less_is_better("german_loss") is True
    declared = WordErrorRate()
    declared.less_is_better = False
    metrics.metrics["german"] = [declared]
    metrics(EvalPrediction(predictions=answers, label_ids={"german": ids}))
    assert metrics.less_is_better("german_mistakes") is False


@pytest.mark.parametrize(
    ("name", "less"),
    [("loss", True), ("price_mae", True), ("price_mse", True), ("german_wer", True), ("topic_accuracy", False),
     ("german_bleu", False), ("answer_f1", False), ("closs", False), ("total_error", True)],
)  # fmt: skip
def test_names_of_metrics_where_there_is_nobody_to_ask(name, less):
    assert less_is_better(name) is less


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_calibration_error_against_a_loop(answers):
    confidences, right = np.array([c for c, _ in answers]), np.array([r for _, r in answers])
    found = reliability(confidences, right, num_bins=15)
    error = 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidences) if min(int(c * 15), 14) == number]
        if inside:
            error += len(inside) / len(answers) * abs(right[inside].mean() - confidences[inside].mean())
            assert found.accuracies[number] == pytest.approx(right[inside].mean())
        assert found.counts[number] == len(inside)
    assert found.ece == pytest.approx(error)


@pytest.mark.slow
def test_slices_are_scores_of_those_rows(model):
    rows = [{**row, "source": "web" if i % 3 else "paper"} for i, row in enumerate(make_rows(NUM_ROWS))]
    found = ablate(model, make_processor(), rows, slices=["source"], num_permutations=1, num_additive_rows=0)
    assert set(found.slices["source"]) == {"web", "paper"}
    for value, variants in found.slices["source"].items():
        own = [row for row in rows if row["source"] == value]
        assert variants["all"]["topic_accuracy"] == pytest.approx(accuracy_by_hand(model, own, "topic"))
        emptied = [{**row, "image": None} for row in own]
        assert variants["text only"]["topic_accuracy"] == pytest.approx(accuracy_by_hand(model, emptied, "topic"))
    assert "| web " in found.to_markdown()
    with pytest.raises(ValueError, match="slices names the column 'origin', but the columns are"):
        ablate(model, make_processor(), rows, slices=["origin"])


def test_tables_values_and_figure(model, ablation, tmp_path):
    rows = make_dataset(NUM_ROWS)
    known = [label for label in rows["topic"] if label is not None]
    assert ablation.majority["topic"] == Counter(known).most_common(1)[0][1] / len(known)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in ablation.to_markdown().splitlines()]
    assert cells[0] == ["task", "metric", "all", "text only", "image only", "nothing"]
    topic = next(line for line in cells if line[0] == "topic")
    assert topic[2] == f"{ablation.variants['all']['topic_accuracy']:.3f}"
    assert ["task", "modality", "Shapley value", "lost with the input of another row"] in cells
    values = json.loads(json.dumps(ablation.to_dict()))
    assert all(math.isfinite(value) for value in values["variants"]["all"].values())
    assert values["num_rows"] == NUM_ROWS
    ablation.plot().savefig(tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 600


@pytest.mark.slow
def test_encoders_run_once_per_row(model):
    counts = {"text": 0, "vision": 0}

    def count(name):
        return lambda module, args, kwargs, output: counts.__setitem__(
            name, counts[name] + len(output.last_hidden_state)
        )

    hooks = [model.model.encoder(n).register_forward_hook(count(n), with_kwargs=True) for n in counts]
    try:
        ablate(model, make_processor(), make_dataset(NUM_ROWS), num_permutations=4)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts["text"] == NUM_ROWS
    assert counts["vision"] <= sum(row["image"] is not None for row in make_rows(NUM_ROWS))


def test_pairs_are_judged_with_mismatched_ones():
    """As in evaluation; a head that always says yes is right of one pair in three, whatever it is given."""
    rows = [{"text": f"a red {'cat ' * (i % 5)}", "image": make_image(i // 2), "topic": "food"} for i in range(14)]
    processor = make_processor()
    tasks = [Matching("match"), Classification("topic", labels=["animals", "food", "travel"])]
    model = make_model(tasks=tasks, seed=2)
    args = TrainingArguments("unused", report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4)
    with torch.no_grad():
        model.heads.match.out_proj.weight.mul_(50)
    found = ablate(model, processor, rows, batch_size=4, num_permutations=2, num_additive_rows=6).variants
    trainer = MMTrainer(model, args, processing_class=processor, eval_dataset=rows)
    measured = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if "_match_" in name}
    assert {name: found["all"][name] for name in measured} == pytest.approx(measured, rel=1e-5)
    # Without the picture, pairs with another picture are pairs as they are.
    without = trainer.evaluate([{**row, "image": None} for row in rows])
    assert "eval_match_accuracy" not in without
    drawn = draw_mismatches(torch.as_tensor(trainer.predict(rows).label_ids["match"]))
    with torch.no_grad():
        logits = torch.cat([model(**processor(text=[row["text"]])).logits["match"][0] for row in rows])
    yes = torch.stack([logits, logits, logits[drawn[:, 1]]], 1) > 0
    right = (yes == torch.tensor([True, False, False])).float().mean()
    assert 0 < right < 1
    assert found["text only"]["match_accuracy"] == pytest.approx(float(right))
    with torch.no_grad():
        model.heads.match.out_proj.bias.fill_(1e4)
    found = ablate(model, processor, rows, num_permutations=1, num_additive_rows=0, slices=["topic"])
    for variant in ("all", "text only", "image only", "nothing"):
        assert found.variants[variant]["match_accuracy"] == pytest.approx(1 / 3)
    # Exchanged pairs are mismatches themselves.
    assert "match_accuracy" not in found.variants["image shuffled"]
    assert "topic_accuracy" in found.variants["image shuffled"]
    assert found.contributions["match"].perceptual == {}
    assert found.slices["topic"]["food"]["all"]["match_accuracy"] == pytest.approx(1 / 3)
    assert "0.333" in found.to_markdown()
    found.plot()


def test_what_cannot_be_ablated_is_told(model):
    with pytest.raises(ValueError, match="There are no rows"):
        ablate(model, make_processor(), [])
    with pytest.raises(ValueError, match="only text"):
        ablate(make_model(vision=None), make_processor(), make_rows(4))


@pytest.mark.slow
def test_a_collator_with_other_columns(model):
    rows = [{"message": row["text"], **{k: v for k, v in row.items() if k != "text"}} for row in make_rows(8)]
    collator = MMDataCollator(make_processor(), model.config, text_column="message")
    found = ablate(model, make_processor(), rows, collator=collator, num_permutations=1, num_additive_rows=0)
    same = ablate(model, make_processor(), make_rows(8), num_permutations=1, num_additive_rows=0)
    assert found.variants == same.variants


def test_cells_of_any_type_are_counted_as_the_labels_they_are(model):
    rows = [{"text": f"row {i}", "topic": cell} for i, cell in enumerate(["food", 1, "food", None, "animals", -100])]
    found = ablate(model, make_processor(), rows, num_permutations=1, num_additive_rows=0)
    assert found.majority["topic"] == 3 / 4
    numbers = datasets.Dataset.from_list([{"text": f"row {i}", "topic": i % 4 // 2} for i in range(7)])
    found = ablate(model, make_processor(), numbers.with_format("torch"), num_permutations=1, num_additive_rows=0)
    assert found.majority["topic"] == 4 / 7


@pytest.mark.slow
def test_slices_of_cells_that_are_missing_or_formatted(model):
    rows = [{**row, "year": year} for row, year in zip(make_rows(4), [None, 1, "1", math.nan], strict=True)]
    del rows[3]["year"]
    rows.append({**make_rows(1)[0], "year": torch.tensor(1)})
    found = ablate(model, make_processor(), rows, slices=["year"], num_permutations=1, num_additive_rows=0)
    assert set(found.slices["year"]) == {"(none)", "1"}


def test_a_task_may_be_called_as_another_with_more_behind_it():
    tasks = {name: Classification(name, labels=["a", "b"]) for name in ("topic", "topic_fine")}
    measured = {"topic_fine_loss": 1.0, "topic_fine_accuracy": 0.5}
    assert main_metric("topic", measured, tasks) is None
    assert main_metric("topic_fine", measured, tasks) == "topic_fine_accuracy"
    assert main_metric("topic", {**measured, "topic_loss": 2.0}, tasks) == "topic_loss"


def test_what_is_lost_is_what_becomes_worse():
    assert perceptual_score(0.8, 0.6) == pytest.approx(0.25)
    assert perceptual_score(0.5, 1.0, less_is_better=True) == pytest.approx(1.0)
    assert perceptual_score(-0.1, 0.0) == pytest.approx(-1.0)
    assert perceptual_score(0.0, 0.5) == 0.0


def test_interaction_is_told_of_tasks_only_for_which_it_was_worked_out():
    tasks = [Classification("topic", labels=["animals", "food", "travel"]), Retrieval("pairs"), Matching("fits")]
    model = make_model(tasks=tasks, seed=2)
    found = ablate(model, make_processor(), make_rows(12), num_permutations=1)
    assert found.contributions["topic"].additive is not None
    assert {"pairs", "fits"} <= set(found.contributions)
    assert found.contributions["pairs"].additive is None
    assert found.contributions["fits"].additive is None


def test_json_has_no_nan_and_a_diverged_model_is_scored_all_the_same(ablation):
    json.dumps(ablation.to_dict(), allow_nan=False)
    assert any(count == 0 for count in ablation.calibration["topic"].counts), "the test needs an empty bin"
    model = make_model()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.fill_(math.nan)
    found = ablate(model, make_processor(), make_rows(6), num_permutations=1, num_additive_rows=0)
    assert "topic" not in found.calibration
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.slow
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=30), min_size=2, max_size=9),
    st.integers(20, 120),
)
@settings(max_examples=50, deadline=None)
def test_tables_fit_and_nothing_is_lost(names, width):
    """Every name, in its table, with the key of its row; no line is wider than asked for, if one column fits."""
    header = ["task", *names]
    made = as_markdown(Table(header, [["topic", *(str(i) for i in range(len(names)))]], num_keys=1), width)
    tables = [table.splitlines() for table in made.split("\n\n")]
    found = []
    for lines in tables:
        head, row = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (lines[0], lines[2]))
        assert (head[0], row[0]) == ("task", "topic")
        found += zip(head[1:], row[1:], strict=True)
        assert len(head) == 2 or max(map(len, lines)) <= width
        assert len({len(line) for line in lines}) == 1
    assert found == [(plain_markdown(name), str(i)) for i, name in enumerate(names)]


def test_scores_up_to_100_are_drawn_beside_those_up_to_1():
    variants = {
        "all": {"german_bleu": 40.0, "rating_pearson": -0.3},
        "nothing": {"german_bleu": 1.0, "rating_pearson": 0.0},
    }
    shapley = {"text": 20.0, "vision": 19.0}
    found = Ablation(
        variants,
        contributions={
            "german": Contribution("german_bleu", shapley, {}),
            "rating": Contribution("rating_pearson", {"text": -0.2, "vision": -0.1}, {}),
        },
    )
    scores, contributions = found.plot().axes[:2]
    heights = sorted(round(bar.get_height(), 6) for bar in scores.patches)
    assert heights == [-0.3, 0.0, 0.01, 0.4]
    assert scores.get_ylim()[0] <= -0.3
    assert max(bar.get_width() for bar in contributions.patches) == pytest.approx(0.2)
    # The bars of a task stand beside each other around its place, and so do its Shapley values.
    centres = [bar.get_x() + bar.get_width() / 2 for bar in scores.patches]
    assert centres == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    assert {round(bar.get_width(), 6) for bar in scores.patches} == {0.368}
    centres = [bar.get_y() + bar.get_height() / 2 for bar in contributions.patches]
    assert centres == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    assert {round(bar.get_height(), 6) for bar in contributions.patches} == {0.37}
    assert [bar.get_width() for bar in contributions.patches] == pytest.approx([0.2, -0.2, 0.19, -0.1])


@pytest.mark.slow
def test_models_with_adapters(model):
    peft = pytest.importorskip("peft")
    rows = make_rows(8)
    expected = ablate(model, make_processor(), rows, num_permutations=1, num_additive_rows=0)
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=model.new_modules)
    wrapped = peft.get_peft_model(make_model(seed=2), lora)
    found = ablate(wrapped, make_processor(), rows, num_permutations=1, num_additive_rows=0)
    assert found.variants["text only"] == pytest.approx(expected.variants["text only"], rel=1e-4)


def test_the_order_of_pictures_counts(tmp_path):
    """All rows with all they have score as in an evaluation, also where places of pictures change their tokens."""
    tasks = [Classification("topic", labels=["animals", "food", "travel"])]
    model = make_model(tasks=tasks, item_order=True, initializer_range=0.5)
    for name, parameter in model.named_parameters():
        if "vision_order" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    open_gates(model)
    rows = [
        {"text": f"a {word}", "image": [make_image(i), make_image(i + 1), make_image(2)][: i % 4], "topic": i % 3}
        for i, word in enumerate(["cat", "dog", "sun", "rain", "bat", "mat", "sea"])
    ]
    collator = MMDataCollator(make_processor(), model.config)
    with torch.no_grad():
        expected = model(**collator(rows)).loss.item()
        swapped = model(**collator([{**row, "image": row["image"][::-1]} for row in rows])).loss.item()
    assert abs(expected - swapped) > 1e-3
    for batch_size in (2, 7):
        found = ablate(model, make_processor(), rows, batch_size=batch_size, num_permutations=1)
        assert found.variants["all"]["topic_loss"] == pytest.approx(expected, rel=1e-4)
