"""What each modality is good for, against rows that were emptied and exchanged by hand, and sums over all orders."""

import itertools
import json
import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_trainer import make_dataset, make_rows
from tiny import make_model, make_processor

from mm_transformers import Classification, Matching, MMDataCollator, Retrieval
from mm_transformers.analysis import ablate
from mm_transformers.analysis.ablation.calibration import calibration
from mm_transformers.analysis.ablation.contributions import (
    additive_projection,
    perceptual_score,
    shapley_values,
    subsets,
)
from mm_transformers.analysis.ablation.results import Ablation, Contribution, main_metric
from mm_transformers.analysis.ablation.views import exchanged


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
    return {task: torch.cat([one[task] for one in found]).numpy() for task in ("topic", "sentiment")}


def accuracy_by_hand(model, rows: list[dict], task: str) -> float:
    labels = model.tasks[task].labels
    logits = logits_by_hand(model, rows)[task]
    known = [i for i, row in enumerate(rows) if row[task] is not None]
    encoded = [model.tasks[task].encode_label(rows[i][task], "") for i in known]
    assert max(encoded) < len(labels)
    return float(np.mean([logits[i].argmax() == label for i, label in zip(known, encoded, strict=True)]))


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


def test_exchanged_rows_by_hand(model):
    """The same order and cycles, drawn again; the rows exchanged before anything is encoded."""
    rows = make_rows(NUM_ROWS)
    found = ablate(model, make_processor(), rows, batch_size=10, num_permutations=1, num_additive_rows=0, seed=SEED)
    rng = np.random.default_rng(SEED)
    order = rng.permutation(NUM_ROWS)
    moved = {"text": [], "image": []}
    for numbers in np.array_split(order, -(-NUM_ROWS // 10)):
        window = [rows[i] for i in numbers]
        for column in ("text", "image"):
            present = np.array([bool(row[column]) if column == "text" else row[column] is not None for row in window])
            source = exchanged(present, rng)
            moved[column] += [{**row, column: window[i][column]} for row, i in zip(window, source, strict=True)]
    for column, changed in moved.items():
        for task in ("topic", "sentiment"):
            assert found.variants[f"{column} shuffled"][f"{task}_accuracy"] == pytest.approx(
                accuracy_by_hand(model, changed, task)
            ), (column, task)


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
    found = shapley_values(names, worths.__getitem__)
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
    np.testing.assert_allclose(additive_projection(torch.tensor(logits)).numpy(), expected, atol=1e-12)
    additive = rng.normal(size=(5, 1, 3)) + rng.normal(size=(1, 5, 3))
    own = additive[np.arange(5), np.arange(5)]
    np.testing.assert_allclose(additive_projection(torch.tensor(additive)).numpy(), own, atol=1e-12)


def test_the_projection_of_the_model_pairs_each_text_with_each_picture(model):
    rows = make_rows(6)
    found = ablate(model, make_processor(), rows, batch_size=6, num_permutations=1, seed=0)
    order = np.random.default_rng(0).permutation(6)
    rows = [rows[i] for i in order]
    crossed = [{**one, "image": other["image"]} for one in rows for other in rows]
    for task in ("topic", "sentiment"):
        logits = torch.tensor(logits_by_hand(model, crossed)[task]).unflatten(0, (6, 6))
        chosen = additive_projection(logits).argmax(-1).tolist()
        known = [i for i, row in enumerate(rows) if row[task] is not None]
        encoded = [model.tasks[task].encode_label(rows[i][task], "") for i in known]
        expected = np.mean([chosen[i] == label for i, label in zip(known, encoded, strict=True)])
        assert found.contributions[task].additive == pytest.approx(float(expected))
        assert found.contributions[task].score == pytest.approx(found.variants["all"][f"{task}_accuracy"])


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_calibration_error_against_a_loop(answers):
    confidences, right = np.array([c for c, _ in answers]), np.array([r for _, r in answers])
    found = calibration(confidences, right, num_bins=15)
    error = 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidences) if min(int(c * 15), 14) == number]
        if inside:
            error += len(inside) / len(answers) * abs(right[inside].mean() - confidences[inside].mean())
            assert found.accuracies[number] == pytest.approx(right[inside].mean())
        assert found.counts[number] == len(inside)
    assert found.ece == pytest.approx(error)


def test_slices_are_scores_of_those_rows(model):
    rows = [{**row, "source": "web" if i % 3 else "paper"} for i, row in enumerate(make_rows(NUM_ROWS))]
    found = ablate(model, make_processor(), rows, slices=["source"], num_permutations=1, num_additive_rows=0)
    assert set(found.slices["source"]) == {"web", "paper"}
    for value, variants in found.slices["source"].items():
        own = [row for row in rows if row["source"] == value]
        assert variants["all"]["topic_accuracy"] == pytest.approx(accuracy_by_hand(model, own, "topic"))
        emptied = [{**row, "image": None} for row in own]
        assert variants["text only"]["topic_accuracy"] == pytest.approx(accuracy_by_hand(model, emptied, "topic"))
    assert "| web |" in found.to_markdown()
    with pytest.raises(ValueError, match="slices names the column 'origin', but the columns are"):
        ablate(model, make_processor(), rows, slices=["origin"])


def test_tables_values_and_figure(model, ablation, tmp_path):
    rows = make_dataset(NUM_ROWS)
    known = [label for label in rows["topic"] if label is not None]
    assert ablation.majority["topic"] == Counter(known).most_common(1)[0][1] / len(known)
    lines = ablation.to_markdown().splitlines()
    assert lines[0] == f"| task | metric | {' | '.join(ablation.variants)} | majority class |"
    topic = next(line for line in lines if line.startswith("| topic |"))
    assert f"| {ablation.variants['all']['topic_accuracy']:.3f} |" in topic
    values = json.loads(json.dumps(ablation.to_dict()))
    assert all(math.isfinite(value) for value in values["variants"]["all"].values())
    assert values["num_rows"] == NUM_ROWS
    ablation.plot().savefig(tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 600


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


def test_what_cannot_be_ablated_is_told(model):
    with pytest.raises(ValueError, match="There are no rows"):
        ablate(model, make_processor(), [])
    with pytest.raises(ValueError, match="text alone"):
        ablate(make_model(vision=None), make_processor(), make_rows(4))


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


def test_slices_of_cells_that_are_missing_or_formatted(model):
    rows = [{**row, "year": year} for row, year in zip(make_rows(4), [None, 1, "1", math.nan], strict=True)]
    del rows[3]["year"]
    rows.append({**make_rows(1)[0], "year": torch.tensor(1)})
    found = ablate(model, make_processor(), rows, slices=["year"], num_permutations=1, num_additive_rows=0)
    assert set(found.slices["year"]) == {"(none)", "1"}


def test_a_task_may_be_called_as_another_with_more_behind_it():
    tasks = ["topic", "topic_fine"]
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


def test_no_batch_has_a_single_row(model, monkeypatch):
    sizes = []
    collator = MMDataCollator(make_processor(), model.config)

    def collate(rows):
        sizes.append(len(rows))
        return collator(rows)

    ablate(model, make_processor(), make_rows(9), collator=collate, batch_size=4, num_permutations=1)
    assert sorted(sizes) == [3, 3, 3]


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


def test_models_with_adapters(model):
    peft = pytest.importorskip("peft")
    rows = make_rows(8)
    expected = ablate(model, make_processor(), rows, num_permutations=1, num_additive_rows=0)
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=model.new_modules)
    wrapped = peft.get_peft_model(make_model(seed=2), lora)
    found = ablate(wrapped, make_processor(), rows, num_permutations=1, num_additive_rows=0)
    assert found.variants["text only"] == pytest.approx(expected.variants["text only"], rel=1e-4)
