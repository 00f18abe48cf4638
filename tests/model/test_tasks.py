"""Task kinds against plain Python loops: losses, labels from cells of tables, words of texts, answers, JSON."""

import itertools
import json
import math
import re
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    TEXT_ENCODERS,
    make_batch,
    make_config,
    make_image,
    make_model,
    make_processor,
    make_tasks,
    make_tokenizer,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import pipeline

from mm_transformers import (
    Classification,
    Generation,
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MultiLabel,
    Regression,
    TableConfig,
    Task,
    TokenClassification,
    register_task,
)
from mm_transformers.model.calibration import check_calibration
from mm_transformers.model.label_cells import is_missing, is_null
from mm_transformers.model.table_kinds import read_number
from mm_transformers.model.task_base import TASK_KINDS, LabelContext, PooledHead, TaskHeads, task_from_dict
from mm_transformers.model.task_token_classification import index_words, split_words
from mm_transformers.training.predictor import Predictor, answer_columns


TOPIC = Classification("topic", labels=["animals", "food", "travel"])
STARS = Classification("stars", labels=["1", "2", "3", "4", "5"])
TAGS = MultiLabel("tags", labels=["red", "green", "blue"])
SCORE = Regression("score")
ENTITIES = TokenClassification("entities", labels=["O", "NAME", "PLACE"])
TASKS = [TOPIC, TAGS, SCORE, ENTITIES]
by_kind = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)

NO_LABEL = "a label must be a name or an id (None if it is missing), but is "
NO_LIST = "expected a list of labels ([] if none applies, None if it is not known), but got "
NO_NUMBER = "expected a finite number (of float32; None if it is missing), but got "

MISSING = [None, float("nan"), np.float32("nan"), np.float64("nan"), pd.NA, pd.NaT, -100, -100.0, np.int64(-100)]
MISSING += [torch.tensor(-100), torch.tensor(float("nan"))]


def random_tensors(task, rows, seed, share_missing):
    """Logits and labels of the shapes that DESIGN.md fixes."""
    rng = np.random.default_rng(seed)
    shape = (rows, 4) if task is ENTITIES else (rows,)
    missing = rng.random(shape) < share_missing
    if task is SCORE:
        logits, labels = rng.normal(size=rows) * 3, np.where(missing, np.nan, rng.normal(size=rows) * 3)
    elif task is TAGS:
        logits, labels = rng.normal(size=(rows, 3)) * 3, rng.integers(0, 2, (rows, 3)).astype(float)
        labels[missing] = np.nan
    else:
        logits, labels = rng.normal(size=(*shape, 3)) * 3, np.where(missing, -100, rng.integers(0, 3, shape))
    labels = torch.from_numpy(labels)
    return torch.from_numpy(logits).float(), labels.float() if labels.is_floating_point() else labels


def brute_force(task, logits, labels):
    """One (loss, gradient) per labelled row or word; gradients have the shape of its logits."""
    losses, gradients = [], []
    if task is ENTITIES:
        logits, labels = logits.flatten(0, 1), labels.flatten()
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        if task is SCORE:
            known, loss, gradient = not math.isnan(y), (z - y) ** 2, 2 * (z - y)
        elif task is TAGS:
            known = not math.isnan(y[0])
            loss = sum(math.log1p(math.exp(-a if b == 1 else a)) for a, b in zip(z, y, strict=True)) / 3
            gradient = [(1 / (1 + math.exp(-a)) - b) / 3 for a, b in zip(z, y, strict=True)]
        else:
            known, total = y != -100, sum(math.exp(a) for a in z)
            loss = math.log(total) - z[y] if known else None
            gradient = [math.exp(a) / total - (i == y) for i, a in enumerate(z)]
        if known:
            losses.append(loss)
        gradients.append(gradient if known else np.zeros_like(z).tolist())
    return losses, gradients


class TestLosses:
    @by_kind
    @settings(max_examples=40, deadline=None)
    @given(rows=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), share_missing=st.sampled_from([0, 0.3, 0.7, 1]))
    def test_sum_count_and_gradient(self, task, rows, seed, share_missing):
        logits, labels = random_tensors(task, rows, seed, share_missing)
        losses, gradients = brute_force(task, logits, labels)
        logits.requires_grad_()

        total, count = task.loss(logits, labels)
        total.backward()

        assert total.shape == count.shape == ()
        assert total.dtype == count.dtype == torch.float32
        assert count.item() == task.num_labelled(labels).item() == len(losses)
        assert total.item() == pytest.approx(sum(losses), rel=1e-4, abs=1e-5)
        expected = torch.tensor(gradients).reshape(logits.shape)
        torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-5)

    @by_kind
    def test_without_any_label_the_sum_is_exactly_zero(self, task):
        logits, labels = random_tensors(task, 5, seed=0, share_missing=1)
        logits.requires_grad_()
        total, count = task.loss(logits, labels)
        (total / count.clamp(min=1)).backward()
        assert total.item() == 0.0
        assert count.item() == 0.0
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    @by_kind
    def test_of_no_rows_is_zero(self, task):
        logits, labels = random_tensors(task, 3, seed=0, share_missing=0)
        total, count = task.loss(logits[:0], labels[:0])
        assert (total.item(), count.item()) == (0.0, 0.0)

    @by_kind
    def test_half_precision_is_summed_in_single(self, task):
        logits, labels = random_tensors(task, 6, seed=1, share_missing=0.3)
        logits = logits.bfloat16()
        total, _ = task.loss(logits, labels)
        expected, _ = task.loss(logits.float(), labels)
        assert total.dtype == torch.float32
        assert torch.equal(total, expected)

    def test_missing_labels_are_not_numbers_that_happen_to_fit(self):
        """A huge logit at a missing label does not leak, not even as 0 * infinity."""
        logits = torch.tensor([1e30, 2.0], requires_grad=True)
        total, _ = SCORE.loss(logits, torch.tensor([float("nan"), 1.0]))
        total.backward()
        assert total.item() == 1.0
        assert logits.grad.tolist() == [0.0, 2.0]

    def test_multi_label_counts_what_is_known_of_a_row(self):
        nan = float("nan")
        total, count = TAGS.loss(torch.zeros(2, 3), torch.tensor([[1.0, nan, 0.0], [nan, nan, nan]]))
        assert total.item() == pytest.approx(math.log(2))
        assert count.item() == 1


class TestLabels:
    @pytest.mark.parametrize("value", MISSING, ids=lambda v: f"{type(v).__name__}:{v}")
    def test_missing(self, value):
        assert is_missing(value)
        for task in TASKS:
            if is_null(value) or not isinstance(task, Regression):
                assert task.encode_label(value, "two words") is None

    def test_minus_100_is_a_number_where_numbers_are_asked_for(self):
        assert Regression("balance").encode_label(-100, "") == -100.0

    @pytest.mark.parametrize("value", [
        "food", 1, 1.0, np.str_("food"), np.int8(1), np.int64(1), np.uint8(1), np.float32(1), np.float64(1),
        np.array(1), torch.tensor(1), torch.tensor(1.0),
    ], ids=lambda v: f"{type(v).__name__}:{v}")  # fmt: skip
    def test_classification_takes_names_and_ids(self, value):
        encoded = TOPIC.encode_label(value, "")
        assert encoded == 1
        assert type(encoded) is int

    @pytest.mark.parametrize("value", ["4", 4, 4.0, np.int32(4), np.float64(4)])
    def test_numbers_as_names_are_names(self, value):
        assert STARS.encode_label(value, "") == 3

    @given(names=st.lists(st.integers(-99, 99), min_size=2, max_size=9, unique=True), data=st.data())
    def test_integers_as_names(self, names, data):
        task = Classification("rating", labels=names)
        value = data.draw(st.sampled_from(names))
        for cell in (value, float(value), str(value), np.int64(value)):
            assert task.encode_label(cell, "") == names.index(value)

    def test_fractions_as_names(self):
        """Not the ids 0 and 1: halves of stars."""
        task = Classification("stars", labels=[0.5, 1.0, 1.5])
        assert task.labels == ["0.5", "1.0", "1.5"]
        assert [task.encode_label(value, "") for value in (0.5, 1, 1.0, 1.5)] == [0, 1, 1, 2]
        with pytest.raises(ValueError, match="label 0 is not one of: 0.5, 1.0, 1.5;"):
            task.encode_label(0, "")

    @given(name=st.text(min_size=1, max_size=5))
    def test_any_string_is_a_name(self, name):
        task = Classification("odd", labels=[name + "a", name, name + "b"])
        assert task.encode_label(name, "") == 1

    @pytest.mark.parametrize(("task", "value", "message"), [
        (TOPIC, "sports", "label 'sports' is not one of: animals, food, travel"),
        (TOPIC, "Food", "label 'Food' is not one of: animals, food, travel"),
        (TOPIC, "", "label '' is not one of: animals, food, travel"),
        (TOPIC, 3, "label 3 is not one of: animals, food, travel (or an id from 0 to 2)"),
        (TOPIC, -1, "label -1 is not one of: animals, food, travel (or an id from 0 to 2); a missing label is None, "),
        (TOPIC, 0.5, "label 0.5 is not one of"),
        (TOPIC, float("inf"), "label inf is not one of"),
        (TOPIC, 10**400, "label 1000"),
        (TOPIC, True, NO_LABEL + "True of type bool"),
        (TOPIC, np.bool_(False), NO_LABEL + "False of type bool"),
        (TOPIC, ["food"], NO_LABEL + "['food'] of type list"),
        (TOPIC, b"food", NO_LABEL + "b'food' of type bytes"),
        (STARS, 0, "label 0 is not one of: 1, 2, 3, 4, 5; a missing label is None, NaN or -100"),
        (STARS, "6", "label '6' is not one of: 1, 2, 3, 4, 5"),
        (TAGS, "red", NO_LIST + "'red' of type str"),
        (TAGS, 1, NO_LIST + "1 of type int"),
        (TAGS, {"red": 1}, NO_LIST + "{'red': 1} of type dict"),
        (TAGS, ["red", "pink"], "label 'pink' is not one of: red, green, blue"),
        (TAGS, [0, 3], "label 3 is not one of"),
        (TAGS, [None], NO_LABEL + "None of type NoneType"),
        (TAGS, [0, 1, 1], "expected a list of the labels that hold, not a 0 or 1 for each label, but got [0, 1, 1]"),
        (TAGS, np.array([1.0, 0.0, 1.0]), "expected a list of the labels that hold, not a 0 or 1 for each label"),
        (SCORE, "3.5", NO_NUMBER + "'3.5' of type str"),
        (SCORE, True, NO_NUMBER + "True of type bool"),
        (SCORE, float("-inf"), NO_NUMBER + "-inf of type float"),
        (SCORE, 1e300, NO_NUMBER + "1e+300 of type float"),
        (SCORE, 10**400, NO_NUMBER + "1000"),
        (SCORE, [1.0], NO_NUMBER + "[1.0] of type list"),
        (ENTITIES, "O O", "expected a list with one label per word, but got 'O O' of type str"),
        (ENTITIES, ["O"], "got 1 labels for a text of 2 words"),
        (ENTITIES, ["O", "VERB"], "label 'VERB' is not one of: O, NAME, PLACE"),
        (ENTITIES, [0, 3], "label 3 is not one of"),
    ])  # fmt: skip
    def test_what_is_no_label_is_told(self, task, value, message):
        with pytest.raises(ValueError, match=f"^task '{task.name}': {re.escape(message)}") as error:
            task.encode_label(value, "two words")
        assert "\n" not in str(error.value)

    def test_many_labels_are_not_all_shown(self):
        task = Classification("topic", labels=range_of_names(1000))
        with pytest.raises(ValueError, match=r"is not one of: n0, .*, n19, \.\.\.$") as error:
            task.encode_label("x", "")
        assert len(str(error.value)) < 200

    @settings(max_examples=30)
    @given(cells=st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=8))
    def test_classification_is_stacked(self, cells):
        labels = TOPIC.collate_labels([TOPIC.encode_label(cell, "") for cell in cells])
        assert labels.dtype == torch.int64
        assert labels.tolist() == [-100 if cell is None else cell for cell in cells]

    @settings(max_examples=30)
    @given(cells=st.lists(st.none() | st.sets(st.integers(0, 2)), min_size=1, max_size=8), names=st.booleans())
    def test_multi_label_none_holds_is_not_unknown(self, cells, names):
        values = [sorted(TAGS.labels[i] for i in c) if names and c is not None else c for c in cells]
        labels = TAGS.collate_labels([TAGS.encode_label(value, "") for value in values])
        assert labels.dtype == torch.float32
        assert labels.shape == (len(cells), 3)
        for row, cell in zip(labels, cells, strict=True):
            assert row.isnan().all() if cell is None else row.tolist() == [float(i in cell) for i in range(3)]

    @pytest.mark.parametrize("value", [
        ["red", "blue"], [0, 2], (0, "blue"), {"blue", "red"}, np.array([0, 2]), np.array(["red", "blue"]),
        torch.tensor([0, 2]), [np.int64(0), np.float64(2)], [torch.tensor(2), torch.tensor(0)], ["red", "blue", "red"],
    ])  # fmt: skip
    def test_multi_label_takes_any_list(self, value):
        assert TAGS.collate_labels([TAGS.encode_label(value, "")]).tolist() == [[1, 0, 1]]

    @pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2.0)])
    def test_regression_takes_any_number(self, value):
        encoded = SCORE.encode_label(value, "")
        assert type(encoded) is float
        labels = SCORE.collate_labels([encoded, None])
        assert labels.dtype == torch.float32
        assert labels[0] == 2
        assert labels[1].isnan()

    def test_words_may_lack_labels(self):
        encoded = ENTITIES.encode_label(["O", None, 2, float("nan"), "NAME"], "a b c d e")
        assert encoded == [0, -100, 2, -100, 1]
        assert ENTITIES.encode_label(np.array([1, 0]), "a b") == [1, 0]
        assert ENTITIES.encode_label([], " ") == []

    def test_labels_go_to_the_first_tokens(self):
        word_index = torch.tensor([[-1, 0, -1, 1, 2, -1], [-1, 0, -1, -1, -1, -1], [-1, 0, 1, -1, -1, -1]])
        labels = ENTITIES.collate_labels(
            [[2, -100, 1], None, [0, 1, 1]], LabelContext(word_index)
        )  # the third text is cut short
        n = -100
        assert labels.tolist() == [[n, 2, n, n, 1, n], [n] * 6, [n, 0, 1, n, n, n]]
        assert labels.dtype == torch.int64
        with pytest.raises(ValueError, match="Task 'entities' labels words, so `collate_labels` needs `word_index`"):
            ENTITIES.collate_labels([[2]])


def range_of_names(n):
    return [f"n{i}" for i in range(n)]


class TestDefinition:
    @pytest.mark.parametrize("name", ["", "1st", "my task", "my-task", "a.b", "größe", "_x", None, 3, "a\n"])
    def test_invalid_names(self, name):
        with pytest.raises(ValueError, match="is not valid: it must start with a letter and hold only letters"):
            Regression(name)

    @pytest.mark.parametrize(
        "name", ["loss", "regularization", "runtime", "names", "children", "forward", "type", "training"]
    )
    def test_reserved_names(self, name):
        with pytest.raises(
            ValueError, match=f"Task name '{name}' is reserved; choose another and say `column='{name}'`"
        ):
            Regression(name)

    @given(name=st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,12}", fullmatch=True))
    def test_a_name_that_is_allowed_can_be_a_module(self, name):
        try:
            task = Regression(name)
        except ValueError:
            return
        heads = TaskHeads({task.name: nn.Linear(1, 1)})
        assert list(heads.state_dict()) == [f"{name}.weight", f"{name}.bias"]

    @pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1", None])
    def test_invalid_loss_weight(self, weight):
        with pytest.raises(ValueError, match=rf"Task 'x': loss_weight must be a number >= 0, but is {weight!r}\."):
            Regression("x", loss_weight=weight)

    def test_loss_weight_may_be_zero_and_of_numpy(self):
        assert Regression("x", loss_weight=0).loss_weight == 0
        assert json.loads(json.dumps(Regression("x", loss_weight=np.float32(0.5)).to_dict()))["loss_weight"] == 0.5

    @pytest.mark.parametrize("cls", [Classification, MultiLabel, TokenClassification])
    @pytest.mark.parametrize(("labels", "message"), [
        ("ab", "Task 'x': labels must be a list of names, but is 'ab'."),
        (None, "labels must be a list of names, but is None"),
        ([], "Task 'x' needs its label names"),
        (["a", "b", "a"], "Task 'x': label 'a' occurs twice in labels."),
        (["-100", "0"], "Task 'x': no label can be called -100, which marks a missing label."),
        ([1, "1"], "label '1' occurs twice"),
    ])  # fmt: skip
    def test_invalid_labels(self, cls, labels, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            cls("x", labels=labels)

    @pytest.mark.parametrize("cls", [Classification, TokenClassification])
    def test_a_choice_needs_two_labels(self, cls):
        with pytest.raises(ValueError, match="Task 'x': it needs at least two labels"):
            cls("x", labels=["only"])
        assert MultiLabel("x", labels=["only"]).labels == ["only"]

    @pytest.mark.parametrize("threshold", [0, 1, -1, float("nan"), "0.5", None])
    def test_invalid_threshold(self, threshold):
        with pytest.raises(ValueError, match="Task 'x': threshold must lie between 0 and 1, but is"):
            MultiLabel("x", labels=["a"], threshold=threshold)

    def test_column_defaults_to_the_name(self):
        assert Regression("x").column == "x"
        assert Regression("x", column="my score").column == "my score"

    @pytest.mark.parametrize(("values", "message"), [
        ({"kind": "sorting", "name": "x"}, "Unknown task kind 'sorting' of task 'x'; known kinds are classification, "),
        ({"name": "x"}, "Unknown task kind None of task 'x'"),
        ({"kind": ["regression"], "name": "x"}, r"Unknown task kind \['regression'\] of task 'x'"),
        ({"kind": "regression", "name": "x", "size": 2}, "Task 'x' of kind 'regression' has no option 'size'; its "),
        ({"kind": "regression"}, "Task None of kind 'regression' needs the option 'name'"),
        ("regression", "A task is a Task object or a dict with a 'kind' and a 'name', but got 'regression'"),
    ])  # fmt: skip
    def test_what_describes_no_task(self, values, message):
        with pytest.raises(ValueError, match=message):
            task_from_dict(values)

    @settings(max_examples=60)
    @given(data=st.data())
    def test_json_round_trip(self, data):
        cls = data.draw(st.sampled_from([Classification, MultiLabel, Regression, TokenClassification]))
        name = "task_" + data.draw(st.text("abcXYZ019_", max_size=8))
        options = {
            "loss_weight": data.draw(st.floats(0, 1e6) | st.integers(0, 10)),
            "column": data.draw(st.none() | st.text(max_size=5)),
        }
        if cls is not Regression:
            options["labels"] = data.draw(st.lists(st.text(max_size=5), min_size=2, max_size=5, unique=True))
        if cls is MultiLabel:
            options["threshold"] = data.draw(st.floats(0.01, 0.99))
        task = cls(name, **options)
        again = task_from_dict(json.loads(json.dumps(task.to_dict())))
        assert type(again) is cls
        assert again == task
        assert again.to_dict() == task.to_dict()

    def test_what_json_holds_is_a_copy(self):
        task = Classification("x", labels=["a", "b"])
        task.to_dict()["labels"].append("c")
        assert task.labels == ["a", "b"]


@pytest.fixture
def own_kind():
    """What a user writes to add a kind; taken from the registry again afterwards."""

    @register_task
    class Count(Task):
        """How many, by Poisson regression: labels (batch,) float32, NaN where missing."""

        largest: int = 10

        kind = "count"

        def build_head(self, config, hidden_size):
            return PooledHead(hidden_size, 1, config.classifier_dropout)

        def encode_label(self, value, text):
            return None if is_missing(value) else float(min(value, self.largest))

        def collate_labels(self, values, context=None):
            return torch.tensor([float("nan") if value is None else value for value in values])

        def loss(self, logits, labels):
            known = ~labels.isnan()
            losses = nn.functional.poisson_nll_loss(logits[:, 0].float(), labels.nan_to_num(), reduction="none")
            return (losses * known).sum(), self.num_labelled(labels)

        def decode(self, logits, word_index=None):
            return [{"count": value} for value in logits[:, 0].exp().tolist()]

    yield Count
    del TASK_KINDS["count"]


class TestOwnKind:
    def test_is_a_dataclass_with_the_options_of_all(self, own_kind):
        task = own_kind("birds", largest=5, loss_weight=2)
        assert [f.name for f in fields(task)] == ["name", "loss_weight", "column", "metrics", "largest"]
        assert task.to_dict() == {
            "kind": "count", "name": "birds", "loss_weight": 2.0, "column": "birds", "largest": 5,
        }  # fmt: skip
        with pytest.raises(ValueError, match="of kind 'count' has no option 'labels'; its options are column, largest"):
            task_from_dict({"kind": "count", "name": "birds", "labels": []})

    def test_goes_through_config_json(self, own_kind, tmp_path):
        config = make_config(tasks=[own_kind("birds", largest=5), *make_tasks()])
        config.save_pretrained(tmp_path)
        loaded = MMTransformerConfig.from_pretrained(tmp_path)
        assert loaded.get_tasks() == config.get_tasks()
        assert loaded.get_tasks()["birds"] == own_kind("birds", largest=5)

    def test_works_in_a_model(self, own_kind, tmp_path):
        model = make_model(tasks=[own_kind("birds"), TOPIC])
        batch = make_batch()
        count = torch.tensor([2.0, float("nan"), 0.0, 5.0])
        batch["labels"] = {"birds": count, "topic": batch["labels"]["topic"]}
        outputs = model(**batch)
        logits = outputs.logits["birds"][:, 0].double()
        expected = sum(math.exp(z) - y * z for z, y in zip(logits.tolist(), count.tolist(), strict=True) if y == y) / 3
        assert outputs.losses["birds"].item() == pytest.approx(expected, rel=1e-5)
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.heads.birds.parameters())
        answers = model.decode(outputs)
        assert [row["birds"]["count"] for row in answers] == pytest.approx(logits.exp().tolist(), rel=1e-5)

        model.save_pretrained(tmp_path)
        loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).logits["birds"], outputs.logits["birds"])

    def test_that_is_not_imported_is_unknown(self, own_kind):
        del TASK_KINDS["count"]
        try:
            with pytest.raises(ValueError, match=r"Unknown task kind 'count' of task 'x'.*Import the module"):
                task_from_dict({"kind": "count", "name": "x"})
        finally:
            TASK_KINDS["count"] = own_kind

    def test_kind_already_taken(self):
        class Other(Task):
            kind = "regression"

        with pytest.raises(ValueError, match="Task kind 'regression' is already taken by Regression; choose another"):
            register_task(Other)
        assert TASK_KINDS["regression"] is Regression

    @pytest.mark.parametrize("kind", ["", None, 3])
    def test_kind_needs_a_name(self, kind):
        with pytest.raises(ValueError, match="NoKind needs a class attribute `kind`"):
            register_task(type("NoKind", (Task,), {"kind": kind}))

    def test_inherited_kind_is_taken(self):
        with pytest.raises(ValueError, match="'classification' is already taken by Classification"):
            register_task(type("Mine", (Classification,), {}))

    def test_registered_twice_is_the_newer(self, own_kind):
        """A cell of a notebook that is run again."""
        again = type("Count", (Task,), {"kind": "count", "__qualname__": own_kind.__qualname__})
        again = register_task(again)
        assert TASK_KINDS["count"] is again


def brute_force_index(text, offsets):
    """For each word in turn: the first token behind that of the previous word that shares a character with it."""
    words, word, inside = [], [], False
    for position, character in enumerate(text):
        if character.isspace():
            inside = False
        else:
            if not inside:
                word = []
                words.append(word)
            word.append(position)
            inside = True
    index, next_token = [-1] * len(offsets), 0
    for number, positions in enumerate(words):
        for token in range(next_token, len(offsets)):
            if set(range(*offsets[token])) & set(positions):
                index[token], next_token = number, token + 1
                break
    return index


def byte_level_tokenizer(trim_offsets):
    """Each byte a token, but for the merges: " a", " c", "ca", so that tokens begin with the space of their word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ġ", "c"), ("c", "a"), ("Ġ", "Ġ"), ("Ã", "©")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    return backend


WORD_PIECE = make_tokenizer()
BYTE_LEVEL = byte_level_tokenizer(trim_offsets=False)
TEXTS = st.text(st.sampled_from("ab ca  .,'-!é日😀\u200b\u00a0\t\nßİ") | st.characters(codec="utf-8"), max_size=30)


class TestWords:
    @given(text=TEXTS)
    def test_words_are_what_split_gives(self, text):
        assert [text[start:end] for start, end in split_words(text)] == text.split()

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def test_word_pieces(self, text):
        offsets = WORD_PIECE(text, return_offsets_mapping=True)["offset_mapping"]
        assert index_words(text, offsets) == brute_force_index(text, offsets)

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def test_byte_level_tokens(self, text):
        offsets = BYTE_LEVEL.encode(text).offsets
        index = index_words(text, offsets)
        assert index == brute_force_index(text, offsets)
        # Nothing is normalised away, so every word is found, once and in order.
        assert [i for i in index if i >= 0] == list(range(len(text.split())))

    @settings(max_examples=150)
    @given(text=TEXTS, data=st.data())
    def test_any_tokens_in_order(self, text, data):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        offsets = [(0, 0), *itertools.pairwise(cuts), (0, 0)]
        offsets = [offset for offset in offsets if data.draw(st.integers(0, 4)) > 0]
        assert index_words(text, offsets) == brute_force_index(text, offsets)

    @settings(max_examples=50, deadline=None)
    @given(words=st.lists(st.text("abcdefg", min_size=1, max_size=6), max_size=12), length=st.integers(3, 30))
    def test_cut_and_padded_texts(self, words, length):
        text = " ".join(words)
        encoding = WORD_PIECE(
            text, return_offsets_mapping=True, truncation=True, max_length=length, padding="max_length"
        )
        index = index_words(text, encoding["offset_mapping"])
        assert len(index) == length
        assert index == brute_force_index(text, encoding["offset_mapping"])
        found = [i for i in index if i >= 0]
        assert found == list(range(len(found)))
        if sum(encoding["attention_mask"]) < length:
            assert len(found) == len(words)

    def test_by_hand(self):
        encoding = WORD_PIECE("Green dogs, in the rain!", return_offsets_mapping=True)
        tokens = WORD_PIECE.convert_ids_to_tokens(encoding["input_ids"])
        expected = ["[CLS]", "green", "dog", "##s", "[UNK]", "in", "the", "rain", "[UNK]", "[SEP]"]
        assert tokens == expected
        index = index_words("Green dogs, in the rain!", encoding["offset_mapping"])
        assert index == [-1, 0, 1, -1, -1, 2, 3, 4, -1, -1]

    @pytest.mark.parametrize("trim_offsets", [True, False])
    def test_leading_space_belongs_to_the_word(self, trim_offsets):
        encoding = byte_level_tokenizer(trim_offsets).encode("ca a  ca")
        assert encoding.tokens == ["ca", "Ġa", "Ġ", "Ġc", "a"]
        assert index_words("ca a  ca", encoding.offsets) == [0, 1, -1, 2, -1]

    def test_empty_text(self):
        assert index_words("", [(0, 0), (0, 0)]) == [-1, -1]
        assert index_words("  \n", [(0, 1), (1, 3)]) == [-1, -1]
        assert index_words("a", []) == []


class TestAnswers:
    def test_classification(self):
        logits = torch.tensor([[0.0, math.log(3), 0.0], [math.log(8), 0.0, 0.0]])
        assert TOPIC.decode(logits) == [
            {"label": "food", "score": pytest.approx(0.6)},
            {"label": "animals", "score": pytest.approx(0.8)},
        ]

    def test_multi_label(self):
        logits = torch.tensor([[math.log(3), -math.log(3), 0.0], [-1.0, -1.0, -1.0]])
        first, second = TAGS.decode(logits)
        assert first["labels"] == ["red", "blue"]
        assert first["scores"] == {"red": pytest.approx(0.75), "green": pytest.approx(0.25), "blue": 0.5}
        assert second["labels"] == []
        strict = MultiLabel("tags", labels=TAGS.labels, threshold=0.7)
        assert [row["labels"] for row in strict.decode(logits)] == [["red"], []]

    def test_regression(self):
        assert SCORE.decode(torch.tensor([0.5, -2.0])) == [{"value": 0.5}, {"value": -2.0}]

    def test_words(self):
        logits = torch.tensor([[[0.0, 9, 0], [9, 0, 0], [0, 0, 9]], [[9.0, 0, 0], [0, 9, 0], [0, 0, 9]]])
        word_index = torch.tensor([[-1, 0, 1], [-1, 0, -1]])
        answers = ENTITIES.decode(logits, word_index)
        assert [[word["label"] for word in row] for row in answers] == [["O", "PLACE"], ["NAME"]]
        assert [[token["label"] for token in row] for row in ENTITIES.decode(logits)] == [
            ["NAME", "O", "PLACE"],
            ["O", "NAME", "PLACE"],
        ]
        score = math.exp(9) / (math.exp(9) + 2)
        assert answers[0][0]["score"] == pytest.approx(score)

    @by_kind
    def test_are_json(self, task):
        logits, _ = random_tensors(task, 4, seed=0, share_missing=0)
        for dtype in (torch.float32, torch.bfloat16):
            answers = task.decode(logits.to(dtype))
            assert len(answers) == 4
            assert json.loads(json.dumps(answers)) == answers

    @by_kind
    @settings(max_examples=25, deadline=None)
    @given(rows=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
    def test_metrics_compare_what_is_labelled(self, task, rows, seed):
        logits, labels = random_tensors(task, rows, seed, share_missing=0.5)
        pairs = []
        flat = (logits.flatten(0, 1), labels.flatten()) if task is ENTITIES else (logits, labels)
        for z, y in zip(flat[0].tolist(), flat[1].tolist(), strict=True):
            if task is SCORE and not math.isnan(y):
                pairs.append((z, y))
            elif task is TAGS and not math.isnan(y[0]):
                pairs.append(([int(a >= 0) for a in z], [int(b) for b in y]))
            elif task not in (SCORE, TAGS) and y != -100:
                pairs.append((z.index(max(z)), y))
        predictions, references = task.predictions_and_references(logits, labels)
        assert list(zip(predictions.tolist(), references.tolist(), strict=True)) == pairs
        assert predictions.dtype == references.dtype == (torch.float32 if task is SCORE else torch.int64)


class TestWordsWithoutTokens:
    """A word of characters that the tokenizer drops, and words beyond `max_length`."""

    def test_answers_stay_in_line_with_the_words(self):
        text = "red \u200b cat"  # of three words, the second is a zero-width space
        processor = make_processor()
        word_index = processor(text=[text, "cat"], return_word_index=True)["word_index"]
        logits = torch.full((2, word_index.shape[1], 3), -9.0)
        for word, label in ((0, 1), (2, 2)):
            logits[0, word_index[0] == word, label] = 9.0
        logits[1, word_index[1] == 0, 1] = 9.0
        first, second = ENTITIES.decode(logits, word_index)
        assert [answer["label"] for answer in first] == ["NAME", None, "PLACE"]
        assert [answer["label"] for answer in second] == ["NAME"]
        # What is answered can be a label again: the gap is a missing label.
        labels = ENTITIES.encode_label([answer["label"] for answer in first], text)
        assert labels == [1, -100, 2]

    def test_answers_in_files_are_labels_again(self):
        """Also where words were cut off."""
        text, model = "cat " * 60, make_model(tasks=[ENTITIES])
        rows = [{"text": text}, {"text": "red \u200b cat"}, {"text": None, "image": make_image(0)}]
        collator = MMDataCollator(make_processor(), model.config)
        [answered] = Predictor(model.eval(), collator).stream(rows)
        for (row, answers), num_words in zip(answered, (60, 3, 0), strict=True):
            labels = answer_columns(answers)["entities"]
            assert len(labels) == num_words
            ids = ENTITIES.encode_label(labels, row["text"] or "")
            assert [None if i == -100 else ENTITIES.labels[i] for i in ids] == labels

    def test_a_kind_decides_what_its_answers_for_words_are(self, monkeypatch):
        class Tags(TokenClassification):
            kind: ClassVar[str] = "tags"
            answer_keys: ClassVar[tuple[str, ...]] = ("tag",)

            def decode(self, logits, word_index=None):
                return [[{"tag": word["label"]} for word in row] for row in super().decode(logits, word_index)]

            def complete_answer(self, answer, text):
                return answer

        class Counts(Tags):
            kind: ClassVar[str] = "counts"
            answer_keys: ClassVar[tuple[str, ...]] = ()

            def decode(self, logits, word_index=None):
                return [[word["tag"] for word in row] for row in super().decode(logits, word_index)]

            def answer_with_words(self, answer, text):
                return len(answer)

        monkeypatch.setitem(TASK_KINDS, "tags", Tags)
        monkeypatch.setitem(TASK_KINDS, "counts", Counts)
        tags, counts = Tags("tags", labels=["O", "NAME"]), Counts("counts", labels=["O", "NAME"])
        model = make_model(tasks=[tags, counts])
        pipe = pipeline("multimodal", model=model, processor=make_processor())
        answer = pipe({"text": "red  cat"})
        assert [sorted(word) for word in answer["tags"]] == [["end", "start", "tag", "word"]] * 2
        assert [(word["word"], word["start"], word["end"]) for word in answer["tags"]] == [("red", 0, 3), ("cat", 5, 8)]
        assert answer["counts"] == 2
        # The columns of a file are the same for rows without words.
        for kind, columns in (
            (ENTITIES, ["x", "x_score"]),
            (model.tasks["tags"], ["x"]),
            (model.tasks["counts"], ["x"]),
        ):
            some, none = (answer_columns({"x": answer}, answer_keys={"x": kind.answer_keys}) for answer in (
                kind.decode(torch.zeros(1, 2, len(kind.labels)))[0], []
            ))  # fmt: skip
            assert list(some) == list(none) == columns

    @pytest.mark.parametrize(("text", "is_told"), [("red cat", False), ("red \u200b cat", True), ("cat " * 60, True)])
    def test_labels_that_count_nowhere_are_told(self, text, is_told, caplog):
        caplog.set_level("WARNING")
        task = TokenClassification(f"entities_{is_told}_{len(text)}", labels=["O", "NAME"])  # each is told once
        collator = MMDataCollator(make_processor(), make_config(tasks=[task]))
        labels = collator([{"text": text, task.name: ["NAME"] * len(text.split())}])["labels"][task.name]
        assert ("some words with labels have no token" in caplog.text) == is_told
        assert int((labels != -100).sum()) == {"red cat": 2, "red \u200b cat": 2}.get(text, 38)


# Scores of answers


def test_the_score_of_an_answer_is_its_logit():
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    for task in (TOPIC, TAGS):
        scores, answers = task.answer_scores(logits, [task.labels[2], None, task.labels[0]])
        best = int(logits[1].argmax())
        assert answers == [task.labels[2], task.labels[best], task.labels[0]]
        assert torch.equal(scores, torch.stack([logits[0, 2], logits[1, best], logits[2, 0]]))
    scores, answers = SCORE.answer_scores(logits[:, 0], [None] * 3)
    assert torch.equal(scores, logits[:, 0])
    assert answers == logits[:, 0].tolist()
    with pytest.raises(ValueError, match="answers with a number, so there is no other answer"):
        SCORE.answer_scores(logits[:, 0], [None, 1.0, None])


def test_the_score_of_labels_of_words_is_the_sum_over_the_words():
    logits = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, True, False]])
    scores, answers = ENTITIES.answer_scores(logits, [["PLACE", "O"], None, "NAME"], places)
    best = logits[1].argmax(-1).tolist()
    assert answers == [["PLACE", "O"], [ENTITIES.labels[i] for i in best], "NAME"]
    expected = [logits[0, 1, 2] + logits[0, 2, 0], logits[1].max(-1).values.sum(), logits[2, 2, 1]]
    torch.testing.assert_close(scores, torch.stack(expected))
    with pytest.raises(ValueError, match="the answer has 2 labels for 1 words"):
        ENTITIES.answer_scores(logits, [None, None, ["O", "O"]], places)
    of_all, _ = ENTITIES.answer_scores(logits, ["O", "O", "O"])
    torch.testing.assert_close(of_all, logits[..., 0].sum(-1))


def test_the_score_of_a_written_answer_is_the_sum_over_its_tokens():
    """Answers of different lengths; the logits may go on beyond the longest."""
    task = Generation("german", max_length=8)
    logits = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0))
    ids = [[4, 8, 2], [3], [0, 7, 1]]
    scores, answers = task.answer_scores(logits, ids)
    assert answers == ids
    expected = [sum(logits[row, place, token] for place, token in enumerate(ids[row])) for row in range(3)]
    torch.testing.assert_close(scores, torch.stack(expected))
    places = torch.tensor([[False, True, False], [True, False, False], [True, True, False]])
    scores, _ = task.answer_scores(logits, ids, places)
    torch.testing.assert_close(
        scores, torch.stack([logits[0, 1, 8], logits[1, 0, 3], logits[2, 0, 0] + logits[2, 1, 7]])
    )


class TestScaleOfRegression:
    def test_against_numbers_that_were_divided_beforehand(self):
        torch.manual_seed(0)
        logits, labels = torch.randn(7) * 100, torch.randn(7) * 100
        labels[2] = float("nan")
        scaled, plain = Regression("price", scale=50.0), Regression("price")
        total, count = scaled.loss(logits, labels)
        expected, _ = plain.loss(logits / 50, labels / 50)
        assert count == 6
        assert total == pytest.approx(float(expected), rel=1e-5)
        # Answers, metrics and explanations are in the unit of the labels.
        assert [answer["value"] for answer in scaled.decode(logits)] == logits.tolist()
        for one, other in zip(
            scaled.predictions_and_references(logits, labels), plain.predictions_and_references(logits, labels),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(one, other)

    def test_the_head_is_scaled(self):
        torch.manual_seed(0)
        config = MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), tasks=[Regression("price", scale=50.0)])
        model = MMTransformerForMultiTask(config).eval()
        plain = MMTransformerForMultiTask(
            MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), tasks=[Regression("price")])
        ).eval()
        plain.load_state_dict(model.state_dict())
        inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        with torch.no_grad():
            assert float(model(**inputs).logits["price"]) == pytest.approx(
                50 * float(plain(**inputs).logits["price"]), rel=1e-5
            )
        assert MMTransformerConfig(**json.loads(json.dumps(config.to_dict()))).get_tasks()["price"].scale == 50.0

    @pytest.mark.parametrize("scale", [0, -1.0, float("nan"), "wide", True])
    def test_wrong_scales(self, scale):
        with pytest.raises(ValueError, match="Task 'price': scale must be a number above 0, but is"):
            Regression("price", scale=scale)

    def test_what_suits_a_column(self):
        assert Regression.options_for([100.0, 300.0, 500]) == {"scale": 163.0}
        assert Regression.options_for([3.0, 3.0]) == Regression.options_for([]) == {}
        assert Classification.options_for(["a", "b"]) == {}

    @pytest.mark.parametrize("text", ["n/a", " NA ", "null", "-", "?", "", "NaN"])
    def test_texts_that_stand_for_a_missing_number(self, text):
        value = Regression.read_text(text, "|")
        assert value is None or value != value
        assert Regression("price").encode_label(value, "") is None


# Numbers


def test_decimals_are_numbers():
    task = Regression("price")
    assert task.encode_label(Decimal("1.5"), "") == 1.5
    assert task.encode_label(Decimal("NaN"), "") is task.encode_label(Decimal("sNaN"), "") is None
    cells = [Decimal("1.50"), Decimal("4.25"), Decimal("9.75")]
    assert Regression.options_for(cells) == Regression.options_for([1.5, 4.25, 9.75])
    assert Classification("stars", labels=["1", "2"]).encode_label(Decimal("2"), "") == 1
    assert Classification.infer_options({}, [Decimal(2), Decimal(1), None], "stars") == {"labels": ["1", "2"]}
    assert read_number(Decimal("1.5")) == 1.5
    assert read_number(Decimal("sNaN")) is None


@pytest.mark.parametrize(
    "value",
    [10**400, -(10**400), float("inf"), float("nan"), "1", None, True, Fraction(10**400)],
    ids=["huge", "below", "inf", "nan", "text", "none", "truth value", "fraction"],
)
def test_numbers_of_a_config_are_finite(value):
    with pytest.raises(ValueError, match="scale must be a number above 0"):
        Regression("price", scale=value)
    with pytest.raises(ValueError, match="loss_weight must be a number >= 0"):
        Regression("price", loss_weight=value)
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match="must have a finite mean and a std above 0"):
            TableConfig(columns=[{"name": "x", "kind": "number", "mean": 1.0, "std": 1.0, name: value}])
    with pytest.raises(ValueError, match=re.escape("is not as `calibrate` writes it")):
        check_calibration(
            {"tasks": {"price": {"cells": {"all": {"rows": 9, "temperatures": [value]}}}}},
            {"price": Regression("price")},
        )


def test_a_registered_kind_is_replaced_by_its_own_module_only(monkeypatch):
    def define(module):
        class Regression(Task):
            kind = "regression"

        Regression.__module__, Regression.__qualname__ = module, "Regression"
        return Regression

    monkeypatch.setitem(TASK_KINDS, "regression", Regression)
    with pytest.raises(ValueError, match="Task kind 'regression' is already taken by Regression"):
        register_task(define("__main__"))
    assert TASK_KINDS["regression"] is Regression
    again = register_task(define("transformers_modules.me.task_regression"))  # the code of a checkpoint
    assert TASK_KINDS["regression"] is again
