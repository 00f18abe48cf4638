"""Class weights, label smoothing and `pos_weight` against torch and scikit-learn; "balanced" found in training rows."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from tiny import make_batch, make_model, make_processor
from torch import nn

from mm_transformers import (
    Classification,
    DataMixture,
    DataSource,
    MMDataCollator,
    MMTransformerForMultiTask,
    MultiLabel,
    MultiTaskMetrics,
    Regression,
    TokenClassification,
)
from mm_transformers.model.task_base import task_from_dict
from mm_transformers.training.objective.task_options import prepare_tasks
from mm_transformers.training.recipe.output_folder import check_checkpoint


LABELS = ["red", "green", "blue"]
WEIGHTS = st.lists(st.floats(0, 5), min_size=3, max_size=3)


def random_classes(seed, shape):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(*shape, 3)) * 3).float()
    return logits, torch.from_numpy(np.where(rng.random(shape) < 0.3, -100, rng.integers(0, 3, shape)))


class TestLoss:
    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 2**32 - 1), weights=WEIGHTS, smoothing=st.sampled_from([0, 0.1, 0.7]))
    @pytest.mark.parametrize(("kind", "shape"), [(Classification, (7,)), (TokenClassification, (3, 5))])
    def test_classes(self, kind, shape, seed, weights, smoothing):
        task = kind("x", LABELS, class_weights=dict(zip(LABELS, weights, strict=True)), label_smoothing=smoothing)
        logits, labels = random_classes(seed, shape)
        logits.requires_grad_()
        total, count = task.loss(logits, labels)
        reference = nn.CrossEntropyLoss(torch.tensor(weights), reduction="sum", label_smoothing=smoothing)
        expected = reference(logits.flatten(0, -2), labels.flatten())
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (total, expected)))
        assert count == (labels != -100).sum() == task.num_labelled(labels)

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 2**32 - 1), weights=WEIGHTS)
    def test_label_sets(self, seed, weights):
        rng = np.random.default_rng(seed)
        task = MultiLabel("x", LABELS, pos_weight=dict(zip(LABELS, weights, strict=True)))
        logits, labels = torch.from_numpy(rng.normal(size=(6, 3))).float(), torch.from_numpy(rng.integers(0, 2, (6, 3)))
        total, count = task.loss(logits, labels.float())
        expected = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(logits, labels.float())
        torch.testing.assert_close(total / count, expected)
        labels = torch.cat([labels.float(), torch.full((1, 3), torch.nan)])
        torch.testing.assert_close(task.loss(torch.cat([logits, logits[:1]]), labels), (total, count))

    @pytest.mark.parametrize("task", [
        Classification("x", LABELS, class_weights={"red": 3}, label_smoothing=0.1),
        TokenClassification("x", LABELS, class_weights={"red": 3}, label_smoothing=0.1),
        MultiLabel("x", LABELS, pos_weight={"red": 3}),
    ], ids=lambda task: task.kind)  # fmt: skip
    def test_without_any_label_the_sum_is_exactly_zero(self, task):
        shape = {"classification": (4,), "token_classification": (4, 2), "multi_label": (4, 3)}[task.kind]
        labels = torch.full(shape, torch.nan if task.kind == "multi_label" else -100)
        labels = labels if task.kind == "multi_label" else labels.long()
        logits = torch.randn((*shape, 3) if task.kind != "multi_label" else shape, requires_grad=True)
        for rows in (4, 0):
            total, count = task.loss(logits[:rows], labels[:rows])
            assert (total.item(), count.item()) == (0, 0)
        task.loss(logits, labels)[0].backward()
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    def test_two_batches_are_one(self):
        """Over the micro-batches of a step, whatever their classes are, the loss and its gradient are those of one."""
        tasks = [
            Classification("topic", LABELS, class_weights={"red": 4, "blue": 0.3}, label_smoothing=0.2),
            MultiLabel("tags", LABELS, pos_weight={"green": 6}),
        ]
        model = make_model(tasks=tasks).eval()
        batch = make_batch()
        batch["labels"] = {
            "topic": torch.tensor([0, 0, 0, 2]),
            "tags": torch.tensor([[0.0, 1, 0], [1, 1, 1], [torch.nan] * 3, [0, 0, 0]]),
        }
        whole = model(**batch)
        whole.loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        index = batch["image_index"]
        divisors = {name: task.num_labelled(batch["labels"][name]) for name, task in model.tasks.items()}
        losses = []
        for rows in (slice(0, 3), slice(3, 4)):
            part = {name: x if name == "pixel_values" else x[rows] for name, x in batch.items() if name != "labels"}
            part["image_index"] = index[rows]
            part["labels"] = {name: labels[rows] for name, labels in batch["labels"].items()}
            loss = model(**part, num_items_in_batch=divisors).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(sum(losses), whole.loss.detach())
        for name, gradient in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


class TestBalanced:
    @settings(deadline=None, max_examples=40)
    @given(labels=st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=30))
    def test_classes(self, labels):
        task = Classification("x", LABELS, class_weights="balanced")
        task.prepare_for(labels)
        known = np.array([label for label in labels if label is not None], dtype=int)
        expected = dict.fromkeys(LABELS, 1.0)
        if len(known):
            classes = np.unique(known)
            weights = compute_class_weight("balanced", classes=classes, y=known)
            expected |= {LABELS[i]: weight for i, weight in zip(classes, weights, strict=True)}
        assert task.class_weights == pytest.approx(expected)
        assert not task.unresolved
        if not len(known):
            return
        # Over all training rows, the mean that torch divides by the sum of the weights is ours, divided by their count.
        logits = torch.randn(len(known), 3, generator=torch.Generator().manual_seed(len(known)))
        total, count = task.loss(logits, torch.from_numpy(known))
        torch_mean = nn.CrossEntropyLoss(torch.tensor([expected[label] for label in LABELS], dtype=torch.float32))
        torch.testing.assert_close(total / count, torch_mean(logits, torch.from_numpy(known)))

    def test_words(self):
        task = TokenClassification("x", LABELS, class_weights="balanced")
        task.prepare_for([[0, 0, -100], None, [0, 1], []])
        assert task.class_weights == pytest.approx({"red": 4 / 6, "green": 2, "blue": 1})

    def test_label_sets(self):
        task = MultiLabel("x", LABELS, pos_weight="balanced")
        task.prepare_for([[0], [0, 2], None, [0, 0], [0], []])
        assert task.pos_weight == {"red": 0.25, "green": 1.0, "blue": 4.0}

    @pytest.mark.parametrize("task", [
        Classification("x", LABELS, class_weights="balanced"), MultiLabel("x", LABELS, pos_weight="balanced"),
        TokenClassification("x", LABELS, class_weights="balanced"),
    ], ids=lambda task: task.kind)  # fmt: skip
    def test_before_training(self, task):
        [option] = task.unresolved
        logits = torch.zeros(2, 2, 3) if task.is_token_level else torch.zeros(2, 3)
        labels = task.collate_labels([[0], [1]]) if option == "pos_weight" else torch.zeros(logits.shape[:-1]).long()
        with pytest.raises(ValueError, match=rf"^Task 'x': {option}='balanced' has no numbers yet, since"):
            task.loss(logits, labels)
        assert task.decode(logits)
        again = task_from_dict(json.loads(json.dumps(task.to_dict())))
        assert again == task
        task.prepare_for([])
        assert getattr(task, option) == dict.fromkeys(LABELS, 1.0)
        assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


class TestDefinition:
    @pytest.mark.parametrize(("options", "message"), [
        ({"class_weights": "balance"}, "class_weights must be None, 'balanced' or a dict from label to weight, but is"),
        ({"class_weights": [1, 2, 3]}, "class_weights must be None, 'balanced' or a dict from label to weight, but is"),
        ({"class_weights": {"pink": 1}}, "class_weights names 'pink', which is not one of its labels: red, green,"),
        ({"class_weights": {"red": -1}}, "class_weights of 'red' must be a finite number >= 0, but is -1."),
        ({"class_weights": {"red": float("nan")}}, "class_weights of 'red' must be a finite number >= 0, but is nan."),
        ({"class_weights": {"red": "1"}}, "class_weights of 'red' must be a finite number >= 0, but is '1'."),
        ({"label_smoothing": 1}, "label_smoothing must be at least 0 and below 1, but is 1."),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1, but is -0.1."),
        ({"label_smoothing": "0"}, "label_smoothing must be at least 0 and below 1, but is '0'."),
    ])  # fmt: skip
    def test_errors(self, options, message):
        for kind in (Classification, TokenClassification):
            with pytest.raises(ValueError, match=f"^Task 'x': {re.escape(message)}"):
                kind("x", LABELS, **options)
        if "class_weights" in options:
            with pytest.raises(
                ValueError, match=f"^Task 'x': {re.escape(message).replace('class_weights', 'pos_weight')}"
            ):
                MultiLabel("x", LABELS, pos_weight=options["class_weights"])

    def test_numbers_of_numpy_and_labels_that_are_left_out(self):
        task = Classification("stars", labels=[1, 2, 3], class_weights={1: np.float32(2), "3": 0})
        assert task.class_weights == {"1": 2.0, "2": 1.0, "3": 0.0}
        assert json.loads(json.dumps(task.to_dict()))["class_weights"] == task.class_weights

    def test_checkpoints_without_these_options(self):
        old = {"kind": "classification", "name": "x", "loss_weight": 1.0, "column": "x", "labels": LABELS}
        assert task_from_dict(old) == Classification("x", LABELS)
        assert task_from_dict({**old, "kind": "multi_label", "threshold": 0.5}) == MultiLabel("x", LABELS)
        logits, labels = random_classes(0, (9,))
        expected = nn.functional.cross_entropy(logits, labels, reduction="sum")
        assert task_from_dict(old).loss(logits, labels)[0] == expected


class TestPrepareTasks:
    TASKS = [
        Classification("topic", LABELS, class_weights="balanced"),
        MultiLabel("tags", LABELS, pos_weight="balanced"),
        Classification("other", LABELS, class_weights={"red": 2}),
        Regression("score"),
    ]
    ROWS = [
        {"text": "a", "image": {"bytes": b"no picture", "path": None}, "topic": topic, "tags": tags}
        for topic, tags in [("red", ["red"]), ("red", []), (None, None), ("red", ["red"]), ("blue", ["red", "blue"])]
    ]
    TOPIC = {"red": 4 / 6, "green": 1.0, "blue": 2.0}
    TAGS = {"red": 1 / 3, "green": 1.0, "blue": 3.0}

    @pytest.fixture
    def model(self):
        return make_model(tasks=self.TASKS)

    @pytest.fixture
    def collator(self, model):
        return MMDataCollator(make_processor(), model.config)

    def test_the_config_has_the_numbers(self, model, collator, tmp_path):
        table = datasets.Dataset.from_list(self.ROWS).cast_column("image", datasets.Image())
        metrics = MultiTaskMetrics(model.config, collator.processor)
        assert [task.name for task in prepare_tasks(model, table, collator, collator, metrics, None)] == [
            "topic",
            "tags",
        ]
        assert prepare_tasks(model, table, collator) == []
        model.save_pretrained(tmp_path)
        again = MMTransformerForMultiTask.from_pretrained(tmp_path)
        for tasks in (model.tasks, metrics.tasks, collator.tasks, model.config.get_tasks(), again.tasks):
            assert tasks["topic"].class_weights == pytest.approx(self.TOPIC)
            assert tasks["tags"].pos_weight == pytest.approx(self.TAGS)
            assert tasks["other"].class_weights == {"red": 2.0, "green": 1.0, "blue": 1.0}
        batch = make_batch(image_index=[[0, 1], [-1, -1], [1, 2]])
        batch["labels"] = {"topic": torch.tensor([0, 1, 2])}
        logits = model.eval()(**batch).logits["topic"]
        reference = nn.CrossEntropyLoss(torch.tensor(list(self.TOPIC.values())), reduction="sum")
        expected = reference(logits, batch["labels"]["topic"]) / 3
        for each in (model, again.eval()):
            torch.testing.assert_close(each(**batch).losses["topic"], expected)
        # A recipe says "balanced", its checkpoint has the numbers.
        check_checkpoint(str(tmp_path), self.TASKS)
        with pytest.raises(ValueError, match="has task 'other' with class_weights .*unlike the present data"):
            check_checkpoint(
                str(tmp_path), [*self.TASKS[:2], Classification("other", LABELS, class_weights={"red": 3})]
            )

    def test_several_data_sets(self, model, collator):
        parts = {
            "one": DataSource(self.ROWS[:3], tasks=["topic"]),
            "two": DataSource([{"text": "b", "subject": row["topic"], "tags": row["tags"]} for row in self.ROWS[3:]],
                              columns={"topic": "subject"}),
        }  # fmt: skip
        prepare_tasks(model, DataMixture(parts, sampling={"one": 5, "two": 1}), collator)
        assert model.tasks["topic"].class_weights == pytest.approx(self.TOPIC)
        assert model.tasks["tags"].pos_weight == pytest.approx({"red": 1.0, "green": 1.0, "blue": 1.0})

    def test_errors(self, model, collator):
        stream = datasets.Dataset.from_list([{"text": "a", "topic": "red"}]).to_iterable_dataset()
        for rows in (stream, DataSource(stream), DataMixture({"a": stream}, sampling={"a": 1})):
            with pytest.raises(ValueError, match="^Task 'topic': class_weights depends on all training rows, but"):
                prepare_tasks(model, rows, collator)
        with pytest.raises(ValueError, match="^row 1, column 'topic': task 'topic': label 'pink' is not one of: red"):
            prepare_tasks(model, [{"text": "a"}, {"text": "b", "topic": "pink"}], collator)
