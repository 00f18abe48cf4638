"""Thresholds of labels against loops over all thresholds, and scikit-learn."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import make_args, make_dataset
from sklearn.metrics import f1_score, precision_recall_curve
from tiny import make_model, make_processor, make_tasks

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MultiLabel,
    MultiTaskMetrics,
    Predictor,
    tune_thresholds,
)
from mm_transformers.model.task_base import task_from_dict
from mm_transformers.model.thresholds import best_threshold


LABELS = ["red", "green", "blue"]
# Few different values, so that some are equal; 0 and 1 are what a sigmoid rounds to.
PROBABILITIES = st.lists(
    st.tuples(st.sampled_from([0.0, 1e-6, 0.2, 0.2 + 1e-7, 0.4, 0.5, 0.7, 0.9, 1.0]), st.booleans()), min_size=1,
    max_size=30,
)  # fmt: skip


def f1_of(probabilities, holds, threshold):
    return f1_score(holds, probabilities.double().numpy() >= threshold, zero_division=0)


class TestOneLabel:
    @given(rows=PROBABILITIES)
    def test_no_threshold_is_better(self, rows):
        probabilities = torch.tensor([p for p, _ in rows], dtype=torch.float32)
        holds = np.array([h for _, h in rows])
        found = best_threshold(probabilities, torch.from_numpy(holds), otherwise=0.3)
        if holds.all() or not holds.any():
            assert found == 0.3
            return
        values = [0.0, *sorted(set(probabilities.double().tolist())), 1.0]
        tried = {(a + b) / 2 for a, b in pairwise(values) if 0 < (a + b) / 2 < 1}
        assert 0 < found < 1
        assert f1_of(probabilities, holds, found) == max(f1_of(probabilities, holds, t) for t in tried)

    def test_as_scikit_learn_has_it(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            holds = rng.random(50) < 0.3
            probabilities = torch.from_numpy(np.clip(0.3 * holds + rng.random(50) * 0.7, 0.01, 0.99)).float()
            precision, recall, _ = precision_recall_curve(holds, probabilities)
            expected = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
            found = best_threshold(probabilities, torch.from_numpy(holds), 0.5)
            assert f1_of(probabilities, holds, found) == pytest.approx(expected)

    def test_of_equally_good_ones_the_nearest_to_a_half(self):
        assert best_threshold(torch.tensor([0.9, 0.1]), torch.tensor([True, False]), 0.3) == pytest.approx(0.5)


class TestTask:
    def test_each_label_has_its_own(self):
        task = MultiLabel("tags", LABELS, threshold={"red": 0.9, "blue": 0.1})
        assert task.threshold == {"red": 0.9, "green": 0.5, "blue": 0.1}
        logits = torch.tensor([[0.8, 0.6, 0.2], [0.95, 0.4, 0.05]]).logit()
        assert [row["labels"] for row in task.decode(logits)] == [["green", "blue"], ["red"]]
        assert task.decode(logits, threshold=0.0)[1]["labels"] == LABELS
        predictions, _ = task.predictions_and_references(logits, torch.zeros(2, 3))
        assert predictions.tolist() == [[0, 1, 1], [1, 0, 0]]
        assert task.judge(logits[0], torch.tensor([0.0, 1, 1])).is_right
        assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task

    @pytest.mark.parametrize(
        ("threshold", "message"),
        [
            ({"pink": 0.5}, "threshold names 'pink', which is not one of its labels"),
            ({"red": 1.0}, "threshold of 'red' must lie between 0 and 1, but is 1.0"),
            ({"red": "0.5"}, "threshold of 'red' must lie between 0 and 1"),
            (True, "threshold must lie between 0 and 1, but is True"),
        ],
    )
    def test_what_is_no_threshold(self, threshold, message):
        with pytest.raises(ValueError, match=message):
            MultiLabel("tags", LABELS, threshold=threshold)

    def test_other_kinds_have_none(self):
        tasks = [task for task in make_tasks() if task.name != "tags"]
        before = copy.deepcopy(tasks)
        assert not any(task.can_tune or task.tune(torch.zeros(1, 1), torch.zeros(1, 1)) for task in tasks)
        assert tasks == before


def probabilities_of(model, rows):
    answers = Predictor(model, make_processor(), ["tags"])(rows)
    return torch.tensor([[answer["tags"]["scores"][label] for label in LABELS] for answer in answers])


def labelled(rows):
    return [i for i, row in enumerate(rows) if row["tags"] is not None]


def test_the_thresholds_of_a_model_by_hand(tmp_path):
    model, rows = make_model(tasks=make_tasks()), make_dataset(30)
    metrics = MultiTaskMetrics(model.config, make_processor())
    found = tune_thresholds(model, make_processor(), rows, batch_size=7, holders=[metrics])["tags"]
    kept = labelled(rows)
    probabilities = probabilities_of(model, rows)[kept]
    for i, label in enumerate(LABELS):
        holds = np.array([label in rows[row]["tags"] for row in kept])
        if not holds.any():
            assert found[label] == 0.5  # as before
            continue
        tried = np.linspace(0.01, 0.99, 99)
        best = max(f1_of(probabilities[:, i], holds, t) for t in [*tried, *probabilities[:, i].tolist()])
        assert f1_of(probabilities[:, i], holds, found[label]) == pytest.approx(best)
    assert {0.5} < set(found.values())
    assert model.tasks["tags"].threshold == metrics.tasks["tags"].threshold == found
    model.save_pretrained(tmp_path)
    assert MMTransformerForMultiTask.from_pretrained(tmp_path).tasks["tags"].threshold == found


@pytest.mark.parametrize(
    ("tasks", "rows", "message"),
    [
        (
            [Classification("topic", labels=["a", "b"])],
            [{"text": "a", "topic": "a"}],
            "No task of the model has thresh",
        ),
        ([MultiLabel("tags", LABELS)], [{"text": "a", "tags": None}], "No row has a label of task 'tags'"),
        ([MultiLabel("tags", LABELS)], [], "No row has a label of task 'tags'"),
    ],
)
def test_what_cannot_be_tuned(tasks, rows, message):
    with pytest.raises(ValueError, match=message):
        tune_thresholds(make_model(tasks=tasks), make_processor(), rows)


class TestTrainer:
    def arguments(self, path, **options):
        quick = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        return MMTrainingArguments(str(path), **{**quick, "tune_thresholds": True, **options})

    @pytest.mark.parametrize("as_dict", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_validation_rows_choose_the_thresholds(self, tmp_path, as_dict):
        train, validation = make_dataset(12), make_dataset(30)
        model = make_model(tasks=make_tasks())
        given = (
            {"one": validation.select(range(13)), "two": validation.select(range(13, 30))} if as_dict else validation
        )
        trainer = MMTrainer(
            model, self.arguments(tmp_path), processing_class=make_processor(), train_dataset=train, eval_dataset=given
        )
        trainer.train()
        found = model.tasks["tags"].threshold
        again = copy.deepcopy(model)
        assert tune_thresholds(again, make_processor(), validation)["tags"] == pytest.approx(found, abs=1e-5)
        # Metrics know them.
        kept = labelled(validation)
        chosen = (probabilities_of(model, validation)[kept].double() >= torch.tensor(list(found.values()))).int()
        truth = np.array([[label in validation[row]["tags"] for label in LABELS] for row in kept])
        expected = f1_score(truth, chosen.numpy(), average="micro")
        assert trainer.evaluate(validation)["eval_tags_f1_micro"] == pytest.approx(expected)
        trainer.save_model()
        assert MMTransformerForMultiTask.from_pretrained(tmp_path).tasks["tags"].threshold == found

    @pytest.mark.slow
    def test_the_second_training_keeps_those_of_the_held_out_rows(self, tmp_path):
        model = make_model(tasks=make_tasks(), linear_probe=True)
        args = self.arguments(tmp_path, refit=True, validation_fraction=0.4, save_strategy="auto")
        trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=make_dataset(30))
        trainer.train()
        assert trainer.refitted
        assert isinstance(model.tasks["tags"].threshold, dict)
        assert model.config.get_tasks()["tags"].threshold == model.tasks["tags"].threshold

    def test_without_the_option_nothing_changes(self, tmp_path):
        model = make_model(tasks=make_tasks())
        args = self.arguments(tmp_path, tune_thresholds=False)
        MMTrainer(
            model, args, processing_class=make_processor(), train_dataset=make_dataset(), eval_dataset=make_dataset()
        ).train()
        assert model.tasks["tags"].threshold == 0.5

    @pytest.mark.parametrize(
        ("tasks", "validation", "message"),
        [
            (make_tasks()[:2], make_dataset(), "needs a task with thresholds, such as MultiLabel"),
            (make_tasks(), None, "needs validation rows that can be read by number"),
            (make_tasks(), make_dataset().to_iterable_dataset(), "needs validation rows that can be read by number"),
        ],
    )
    def test_what_does_not_fit_is_told_before_the_training(self, tmp_path, tasks, validation, message):
        args = self.arguments(tmp_path, validation_fraction=0.0)
        with pytest.raises(ValueError, match=message):
            MMTrainer(
                make_model(tasks=tasks), args, processing_class=make_processor(), train_dataset=make_dataset(),
                eval_dataset=validation,
            )  # fmt: skip

    def test_plain_arguments_have_no_such_option(self, tmp_path):
        model = make_model(tasks=make_tasks())
        MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), train_dataset=make_dataset()).train()
        assert model.tasks["tags"].threshold == 0.5
