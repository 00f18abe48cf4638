"""Metrics against scikit-learn on the labelled rows alone, closed forms and plain Python loops."""

import math
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from tiny import make_tokenizer
from transformers import EvalPrediction

from mm_transformers import ArrayMetric, register_metric
from mm_transformers.model.task_base import Task, task_from_dict
from mm_transformers.model.tasks import Classification, Generation, MultiLabel, Regression, TokenClassification
from mm_transformers.training.linear_start.verdict import shown_score, verdict_of
from mm_transformers.training.metrics import METRICS, MultiTaskMetrics, base, headline, is_known_error, less_is_better


TOPIC = Classification("topic", labels=["animals", "food", "travel"])
GENRES = MultiLabel("genres", labels=["drama", "comedy"])
POLARITY = Regression("polarity")
ENTITIES = TokenClassification("entities", labels=["none", "person", "place"])
TASKS = (TOPIC, GENRES, POLARITY, ENTITIES)


@register_metric
class BalancedAccuracy(ArrayMetric):
    key, value_type, ndims = "mean_recall", "int64", (1,)

    def score(self, references, predictions):
        return sklearn_metrics.balanced_accuracy_score(references, predictions)


@register_metric
class LargestMistake(ArrayMetric):
    key, value_type, ndims, less_is_better = "largest_mistake", "float64", (1,), True

    def score(self, references, predictions):
        return np.abs(references - predictions).max()


def config_of(*tasks):
    return SimpleNamespace(get_tasks=lambda: {task.name: task for task in tasks})


def compute(task, logits, labels, metrics=None):
    multi_task_metrics = MultiTaskMetrics(config_of(task), metrics=metrics and {task.name: metrics})
    return multi_task_metrics(EvalPrediction({task.name: np.asarray(logits)}, {task.name: np.asarray(labels)}))


def random_arrays(task, num_rows, seed, share_missing=0.4):
    """Logits and labels of which about `share_missing` are missing."""
    rng = np.random.default_rng(seed)
    missing = rng.random(num_rows) < share_missing
    if task is TOPIC:
        return rng.normal(size=(num_rows, 3)).astype("f4"), np.where(missing, -100, rng.integers(0, 3, num_rows))
    if task is GENRES:
        labels = rng.integers(0, 2, (num_rows, 2)).astype("f4")
        labels[missing] = np.nan
        return rng.normal(size=(num_rows, 2)).astype("f4"), labels
    if task is POLARITY:
        return rng.normal(size=num_rows).astype("f4"), np.where(missing, np.nan, rng.normal(size=num_rows)).astype("f4")
    labels = np.where(rng.random((num_rows, 5)) < share_missing, -100, rng.integers(0, 3, (num_rows, 5)))
    return rng.normal(size=(num_rows, 5, 3)).astype("f4"), labels


def cross_entropy(logits, label):
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


def brute_force_losses(task, logits, labels):
    """One loss per labelled row or token, in double precision."""
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if task is TOPIC and label != -100:
            losses.append(cross_entropy(row, label))
        elif task is GENRES and not any(math.isnan(y) for y in label):
            losses.append(sum(math.log1p(math.exp(z if y == 0 else -z)) for z, y in zip(row, label, strict=True)) / 2)
        elif task is POLARITY and not math.isnan(label):
            losses.append((row - label) ** 2)
        elif task is ENTITIES:
            losses.extend(cross_entropy(z, y) for z, y in zip(row, label, strict=True) if y != -100)
    return losses


class TestLosses:
    @pytest.mark.slow
    @settings(max_examples=50, deadline=None)
    @given(task=st.sampled_from(TASKS), num_rows=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
    def test_is_the_mean_over_what_is_labelled(self, task, num_rows, seed):
        logits, labels = random_arrays(task, num_rows, seed)
        losses = brute_force_losses(task, logits, labels)

        results = compute(task, logits, labels)

        if losses:
            assert results[f"{task.name}_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        else:
            assert results == {}

    def test_half_precision_logits_do_not_overflow(self):
        # 300 squared errors of 250 ** 2 are far beyond float16.
        results = compute(POLARITY, np.full(300, 250, dtype=np.float16), np.zeros(300, dtype="f4"))
        assert results["polarity_loss"] == pytest.approx(250**2)


class TestDefaultMetrics:
    @pytest.mark.slow
    @pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
    @settings(max_examples=25, deadline=None)
    @given(num_rows=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
    def test_do_not_depend_on_the_order_of_rows_nor_on_unlabelled_ones(self, task, num_rows, seed):
        logits, labels = random_arrays(task, num_rows, seed)
        results = compute(task, logits, labels)
        order = np.random.default_rng(seed).permutation(num_rows)
        unlabelled = np.full_like(labels[:1], -100 if labels.dtype.kind == "i" else np.nan)

        permuted = compute(task, logits[order], labels[order])
        extended = compute(task, np.concatenate([logits, logits[:1] + 1]), np.concatenate([labels, unlabelled]))

        assert permuted == pytest.approx(results, rel=1e-5, abs=1e-6)
        assert extended == pytest.approx(results, rel=1e-5, abs=1e-6)
        assert all(math.isfinite(value) for value in results.values())

    def test_classification(self):
        logits, labels = random_arrays(TOPIC, 200, seed=0)
        results = compute(TOPIC, logits, labels)

        truth, answers = labels[labels != -100], logits[labels != -100].argmax(-1)
        assert 80 < len(truth) < 160
        assert set(results) == {"topic_loss", "topic_accuracy", "topic_f1", "topic_f1_micro"}
        assert results["topic_accuracy"] == pytest.approx((truth == answers).mean())
        assert results["topic_f1"] == pytest.approx(sklearn_metrics.f1_score(truth, answers, average="macro"))
        assert results["topic_f1_micro"] == pytest.approx(results["topic_accuracy"])

    def test_multi_label(self):
        logits, labels = random_arrays(GENRES, 200, seed=0)
        results = compute(GENRES, logits, labels)

        known = ~np.isnan(labels[:, 0])
        truth, answers = labels[known].astype(int), (logits[known] >= 0).astype(int)
        per_label = [sklearn_metrics.f1_score(truth[:, i], answers[:, i]) for i in range(2)]
        assert set(results) == {"genres_loss", "genres_f1", "genres_f1_micro", "genres_subset_accuracy"}
        assert results["genres_f1"] == pytest.approx(np.mean(per_label))
        assert results["genres_f1_micro"] == pytest.approx(sklearn_metrics.f1_score(truth.ravel(), answers.ravel()))
        assert results["genres_subset_accuracy"] == pytest.approx((truth == answers).all(1).mean())

    def test_multi_label_with_a_single_label(self):
        task = MultiLabel("funny", labels=["funny"])
        results = compute(task, [[1.0], [-1.0], [1.0], [2.0]], np.array([[1], [1], [0], [1]], dtype="f4"))
        assert results["funny_f1"] == pytest.approx(2 / 3)
        assert results["funny_f1_micro"] == pytest.approx(2 / 3)
        assert results["funny_subset_accuracy"] == pytest.approx(1 / 2)

    def test_regression(self):
        logits, labels = random_arrays(POLARITY, 200, seed=0)
        results = compute(POLARITY, logits, labels)

        known = ~np.isnan(labels)
        truth, answers = labels[known].astype("f8"), logits[known].astype("f8")
        assert set(results) == {"polarity_loss", "polarity_mae", "polarity_mse", "polarity_pearson"}
        assert results["polarity_mae"] == pytest.approx(np.abs(truth - answers).mean())
        assert results["polarity_mse"] == pytest.approx(results["polarity_loss"], rel=1e-5)
        assert results["polarity_pearson"] == pytest.approx(np.corrcoef(truth, answers)[0, 1])

    def test_tokens_of_padded_rows(self):
        """Rows of different lengths, padded as Trainer pads them: logits and labels with -100."""
        logits = np.full((2, 4, 3), -100.0, dtype="f4")
        labels = np.full((2, 4), -100)
        logits[0, :2], labels[0, :2] = [[9, 0, 0], [0, 9, 0]], [0, 1]
        logits[1, :4], labels[1, :4] = [[9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]], [0, 2, 2, -100]

        results = compute(ENTITIES, logits, labels)

        assert results["entities_accuracy"] == pytest.approx(4 / 5)
        assert results["entities_f1_micro"] == pytest.approx(4 / 5)
        # none: 2 of 2. person: one right, one false positive. place: one right, one missed.
        assert results["entities_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


class TestWhereAMetricIsNotDefined:
    def test_a_label_that_does_not_occur_is_left_out_of_macro_f1(self):
        one_label = compute(TOPIC, [[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]], [0, 0])
        assert one_label["topic_f1"] == 1.0
        one_column = compute(GENRES, [[5.0, -5.0], [5.0, -5.0]], np.array([[1, 0], [1, 0]], dtype="f4"))
        assert one_column["genres_f1"] == 1.0

    def test_a_label_that_is_missed_or_invented_counts_as_zero(self):
        missed = compute(TOPIC, [[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]], [0, 1])
        assert missed["topic_f1"] == pytest.approx((2 / 3 + 0) / 2)
        invented = compute(GENRES, [[5.0, 5.0], [5.0, -5.0]], np.array([[1, 0], [1, 0]], dtype="f4"))
        assert invented["genres_f1"] == pytest.approx((1 + 0) / 2)

    def test_f1_without_any_positive_is_zero(self):
        for task in (GENRES, MultiLabel("genres", labels=["drama"])):
            num_labels = len(task.labels)
            results = compute(task, [[-5.0] * num_labels] * 2, np.zeros((2, num_labels), dtype="f4"))
            assert (results["genres_f1"], results["genres_f1_micro"]) == (0.0, 0.0)
            assert results["genres_subset_accuracy"] == 1.0

    @pytest.mark.parametrize(
        ("predictions", "references"),
        [([0.1] * 7, range(7)), (range(7), [0.1] * 7), ([0.1] * 7, [0.1] * 7), ([3.0], [4.0])],
        ids=["constant predictions", "constant references", "both constant", "one row"],
    )
    def test_correlation_with_a_constant_is_zero(self, predictions, references):
        result = METRICS["pearson"](keep_in_memory=True).compute(predictions=predictions, references=references)
        assert result == {"pearson": 0.0}

    def test_predictions_that_are_not_finite_leave_the_loss(self):
        with np.errstate(invalid="ignore"):
            results = compute(POLARITY, np.array([np.nan, 1.0], dtype="f4"), np.array([0.0, 1.0], dtype="f4"))
        assert list(results) == ["polarity_loss"]
        assert math.isnan(results["polarity_loss"])


class TestTwoDimensionalRegression:
    def test_scores_are_means_over_the_values(self):
        rng = np.random.default_rng(0)
        references, predictions = rng.normal(size=(2, 50, 3))
        predictions[:, 2] = 1.5
        result = {}
        for name in ("mae", "mse", "pearson"):
            metric = METRICS[name](keep_in_memory=True)
            result |= metric.compute(predictions=predictions, references=references)

        correlations = [np.corrcoef(predictions[:, i], references[:, i])[0, 1] for i in range(2)]
        assert result["mae"] == pytest.approx(np.abs(predictions - references).mean())
        assert result["mse"] == pytest.approx(np.square(predictions - references).mean())
        assert result["pearson"] == pytest.approx((sum(correlations) + 0.0) / 3)


class TestMultiTaskMetrics:
    def test_every_task_as_if_it_were_alone(self):
        arrays = {task.name: random_arrays(task, 20, seed=3) for task in TASKS}
        metrics = MultiTaskMetrics(config_of(*TASKS))
        prediction = EvalPrediction({k: v[0] for k, v in arrays.items()}, {k: v[1] for k, v in arrays.items()})

        results = metrics(prediction)

        alone = {}
        for task in TASKS:
            alone |= compute(task, *arrays[task.name])
        assert results == alone
        assert all(type(value) is float for value in results.values())
        assert metrics(prediction) == results  # nothing is left over from the call before

    def test_a_task_without_any_label_contributes_nothing(self):
        arrays = {task.name: random_arrays(task, 6, seed=3, share_missing=1.0) for task in TASKS}
        arrays["topic"] = random_arrays(TOPIC, 6, seed=3, share_missing=0.0)
        prediction = EvalPrediction({k: v[0] for k, v in arrays.items()}, {k: v[1] for k, v in arrays.items()})
        results = MultiTaskMetrics(config_of(*TASKS))(prediction)
        assert {key.split("_")[0] for key in results} == {"topic"}

    def test_rows_of_which_a_part_is_labelled_count_for_the_loss_only(self):
        results = compute(GENRES, [[0.0, 3.0]], np.array([[1, np.nan]], dtype="f4"))
        assert results == {"genres_loss": pytest.approx(math.log(2))}

    def test_metrics_can_be_chosen_by_task(self):
        logits, labels = random_arrays(TOPIC, 20, seed=1)
        assert set(compute(TOPIC, logits, labels, ["accuracy"])) == {"topic_loss", "topic_accuracy"}
        only_loss = MultiTaskMetrics(config_of(TOPIC), metrics={"topic": []})
        assert set(only_loss(EvalPrediction({"topic": logits}, {"topic": labels}))) == {"topic_loss"}

    def test_metrics_of_the_user(self, tmp_path):
        class Confusion(evaluate.Metric):
            def _info(self):
                return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

            def _compute(self, predictions, references):
                matrix = sklearn_metrics.confusion_matrix(references, predictions)
                return {"right": int(np.trace(matrix)), "per_class": matrix.tolist()}

        features = METRICS["accuracy"](keep_in_memory=True).features
        logits, labels = random_arrays(TOPIC, 20, seed=1)
        results = compute(TOPIC, logits, labels, ["accuracy", Confusion(cache_dir=str(tmp_path))])

        num_right = (logits.argmax(-1) == labels).sum()
        assert results["topic_right"] == float(num_right)
        assert set(results) == {"topic_loss", "topic_accuracy", "topic_right"}

    def test_write_nothing_to_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
        metrics = MultiTaskMetrics(config_of(*TASKS))
        monkeypatch.setattr("builtins.open", lambda *args, **kwargs: pytest.fail(f"opens {args[0]}"))
        arrays = {task.name: random_arrays(task, 20, seed=3) for task in TASKS}
        metrics(EvalPrediction({k: v[0] for k, v in arrays.items()}, {k: v[1] for k, v in arrays.items()}))
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_default_metrics_of_every_task_kind_are_known(self):
        kinds = [cls for cls in Task.__subclasses__() if cls.__module__.startswith("mm_transformers.")]
        assert len(kinds) >= 4
        for cls in kinds:
            assert set(cls.default_metrics) <= set(METRICS), cls.kind

    def test_a_task_names_its_metrics(self):
        task = Classification("topic", ["a", "b", "c"], metrics=["f1_micro", "mean_recall"])
        logits, labels = random_arrays(TOPIC, 40, seed=2)
        known = labels != -100
        expected = sklearn_metrics.balanced_accuracy_score(labels[known], logits.argmax(-1)[known])

        results = compute(task, logits, labels)
        assert set(results) == {"topic_loss", "topic_f1_micro", "topic_mean_recall"}
        assert results["topic_mean_recall"] == pytest.approx(expected)
        first = headline(task, torch.tensor(logits[known]), torch.tensor(labels[known]))
        assert first == pytest.approx(np.mean(labels[known] == logits.argmax(-1)[known]))
        # The checkpoint holds the names; older releases can read a task that has none.
        assert task_from_dict(task.to_dict()) == task
        assert "metrics" not in TOPIC.to_dict()

    def test_a_registered_metric_says_which_direction_is_better(self):
        assert less_is_better("topic_largest_mistake")
        assert is_known_error("eval_topic_largest_mistake")
        assert not less_is_better("topic_mean_recall")

    def test_the_longest_name_of_a_metric_counts(self, monkeypatch):
        class Opposite(METRICS["mse"]):
            key, less_is_better = "neg_mse", False

        monkeypatch.setitem(base._METRICS, "neg_mse", Opposite)
        assert not is_known_error("eval_price_neg_mse")
        assert not less_is_better("price_neg_mse")
        assert is_known_error("eval_price_mse")
        assert not is_known_error("eval_xmse")  # another name that ends alike
        assert not is_known_error("eval_closs")
        assert is_known_error("loss")
        assert less_is_better("caption_wer")

    @pytest.mark.parametrize(
        ("metric", "value", "shown"),
        [("bleu", 32.5, "32.5"), ("chrf", 60.0, "60.0"), ("accuracy", 0.875, "87.5"), ("mae", 12.25, "12.25"),
         ("pearson", -0.5, "-0.5"), ("largest_mistake", 3.0, "3"), ("from_text_recall_at_1", 0.5, "50.0"),
         ("loss", 0.25, "0.25"), ("accuracy", None, "not measured")],
    )  # fmt: skip
    def test_scores_as_people_read_them(self, metric, value, shown):
        assert shown_score(metric, value) == shown

    def test_the_headline_of_a_metric_with_several_results(self, monkeypatch):
        class Pair(METRICS["f1"]):
            key = "pair"

            @classmethod
            def names(cls):
                return ["right", "wrong"]

            def _compute(self, *, predictions=None, references=None, **kwargs):
                share = float(np.mean(np.asarray(predictions) == np.asarray(references)))
                return {"wrong": 1 - share, "right": share}

        monkeypatch.setitem(base._METRICS, "pair", Pair)
        task = Classification("topic", ["a", "b"], metrics=["pair"])
        logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        labels = torch.tensor([0, 1, 0, 0])
        assert headline(task, logits, labels) == 0.75
        verdict = verdict_of(task, labels, logits, None, logits[[0, 0, 0, 0]])
        assert (verdict.metric, verdict.linear, verdict.majority) == ("right", 0.75, 0.75)

    def test_metrics_cannot_be_registered_by_accident(self):
        with pytest.raises(TypeError):
            METRICS["mine"] = METRICS["f1"]


class TestErrors:
    def test_metrics_of_a_task_that_are_no_list_of_names(self):
        for metrics in ("f1", ["f1", METRICS["f1"]], {"f1": 1}, 3):
            with pytest.raises(ValueError, match=r"Task 'topic': metrics must be a list of names, but is .*"):
                Classification("topic", ["a", "b"], metrics=metrics)

    def test_unknown_metric_of_a_task(self):
        task = Classification("topic", ["a", "b"], metrics=["acuracy"])
        with pytest.raises(ValueError, match=r"Task 'topic': unknown metric 'acuracy'; .*@register_metric"):
            MultiTaskMetrics(config_of(task))

    def test_unknown_metric(self):
        with pytest.raises(ValueError, match=r"Task 'topic': unknown metric 'auc'; known are accuracy, .*pearson"):
            MultiTaskMetrics(config_of(TOPIC), metrics={"topic": ["auc"]})

    def test_unknown_task(self):
        with pytest.raises(ValueError, match=r"task 'mood', but the tasks of the model are topic, genres\."):
            MultiTaskMetrics(config_of(TOPIC, GENRES), metrics={"mood": ["f1"]})

    def test_one_name_instead_of_a_list(self):
        with pytest.raises(ValueError, match="Task 'topic': metrics must be a list"):
            MultiTaskMetrics(config_of(TOPIC), metrics={"topic": "f1"})

    @pytest.mark.parametrize(
        ("task", "metric", "fitting"),
        [
            (POLARITY, "accuracy", "mae, mse, pearson"),
            (GENRES, "accuracy", "subset_accuracy, f1, f1_micro"),
            (TOPIC, "subset_accuracy", "accuracy, f1, f1_micro"),
        ],
        ids=lambda value: value if isinstance(value, str) else value.kind,
    )
    def test_metric_that_cannot_compare_the_answers(self, task, metric, fitting):
        logits, labels = random_arrays(task, 4, seed=0, share_missing=0.0)
        with pytest.raises(ValueError, match=f"'{metric}' cannot compare the answers of task '{task.name}'.*{fitting}"):
            compute(task, logits, labels, [metric])

    def test_two_metrics_of_one_name(self):
        logits, labels = random_arrays(TOPIC, 4, seed=0, share_missing=0.0)
        with pytest.raises(ValueError, match="'topic_f1'"):
            compute(TOPIC, logits, labels, ["f1", METRICS["f1"](keep_in_memory=True)])

    def test_metric_made_for_several_processes(self, tmp_path):
        metric = METRICS["f1"](num_process=2, process_id=1, cache_dir=str(tmp_path))
        with pytest.raises(ValueError, match="num_process=2"):
            MultiTaskMetrics(config_of(TOPIC), metrics={"topic": [metric]})

    @pytest.mark.parametrize("predictions", [{"other": np.zeros((2, 3))}, np.zeros((2, 3))], ids=["dict", "array"])
    def test_predictions_without_the_task(self, predictions):
        with pytest.raises(ValueError, match=r"EvalPrediction\.predictions must be a dict .* task 'topic'"):
            MultiTaskMetrics(config_of(TOPIC))(EvalPrediction(predictions, {"topic": np.zeros(2, dtype=int)}))


def test_written_answers_are_read_without_their_padding():
    """Ids of -100, in answers and in labels, are padding for the tokenizer."""
    tokenizer = make_tokenizer()
    task = Generation("caption", max_length=8, metrics=["exact_match"])
    ids = tokenizer(["a red cat", "the sun"], padding=True, return_tensors="np")["input_ids"]
    ids = np.where(ids == tokenizer.pad_token_id, -100, ids)
    compute_metrics = MultiTaskMetrics(config_of(task), SimpleNamespace(tokenizer=tokenizer))
    answers = {"losses": np.ones(2, dtype="f4"), "generated_ids": ids}
    results = compute_metrics(EvalPrediction({"caption": answers}, {"caption": ids}))
    assert results["caption_exact_match"] == 1.0
