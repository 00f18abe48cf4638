"""Tasks start as the best linear model: the solutions, the start itself, what is kept and told, resuming."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import first_quickly
from datasets import Dataset
from probe_start import CPU, TASKS, logits_of, make_rows, make_trainer, new_model
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, Ridge
from tiny import FUSION_KINDS, make_image, make_model, make_processor
from transformers import TrainerCallback, TrainingArguments

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    Regression,
    register_task,
)
from mm_transformers.model.linear_probe import LinearProbe
from mm_transformers.model.linear_problem import BinaryProblem, MultinomialProblem, RidgeProblem
from mm_transformers.model.tasks import TASK_KINDS
from mm_transformers.training.linear_start import linear_models, logit_factors
from mm_transformers.training.linear_start.linear_models import solve
from mm_transformers.training.linear_start.probe_start import probes_of, start_probes


# Solutions


def random_problem(seed=0, num=80, widths=(5, 7), share=0.3):
    rng = np.random.default_rng(seed)
    blocks, parts, start = [], [], 0
    for width in widths:
        there = rng.random(num) > share
        vectors = rng.normal(size=(num, width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        parts.append(np.column_stack([vectors * there[:, None], there]))
        blocks.append((slice(start, start + width), start + width))
        start += width + 1
    return blocks, np.concatenate(parts, 1), rng


def with_copies_by_hand(features, labels, blocks, weight):
    """The rows, and each row without each of its modalities, if it has another: one at a time."""
    rows, targets, weights = list(features), list(labels), [1.0] * len(features)
    for x, y in zip(features, labels, strict=True):
        for part, indicator in blocks:
            others = [i for _, i in blocks if i != indicator and x[i] > 0]
            if x[indicator] > 0 and others:
                copy_ = x.copy()
                copy_[part], copy_[indicator] = 0, 0
                rows.append(copy_)
                targets.append(y)
                weights.append(weight)
    weights = np.array(weights)
    return np.array(rows), np.array(targets), weights * len(features) / weights.sum()


def joint_by_hand(features, labels, blocks, strength):
    """Logits of scikit-learn's model of all columns, copies included."""
    rows, targets, weights = with_copies_by_hand(features, labels, blocks, linear_models.COPY_WEIGHT)
    return logits_by_hand(
        LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(rows, targets, weights), features
    )


def separate_by_hand(features, labels, blocks, strength, rows=None, factors=(1.0,)):
    """
    For some rows, by default those of the training, the sum of the logits of one balanced model of each modality.

    Args:
        factors: one of all modalities, or one for each.
    """
    rows = features if rows is None else rows
    total = 0
    counts = 1 / np.bincount(labels)[labels]
    counts *= len(labels) / counts.sum()
    for (part, indicator), factor in zip(blocks, np.broadcast_to(factors, len(blocks)), strict=True):
        there = features[:, indicator] > 0
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000)
        model.fit(features[there][:, part], labels[there], counts[there])
        total = total + factor * logits_by_hand(model, rows[:, part]) * (rows[:, [indicator]] > 0)
    return total


def logits_by_hand(model, rows):
    logits = model.decision_function(rows)
    return logits if logits.ndim == 2 else np.column_stack([-logits, logits]) / 2


def expected_of(model, features, labels, blocks):
    if model.way.separate:
        each = [separate_by_hand(features, labels, blocks, c, None, factors) for c, factors in model.scales.items()]
    else:
        each = [factor * joint_by_hand(features, labels, blocks, c) for c, (factor,) in model.scales.items()]
    return np.mean(each, 0)


def softmax(logits):
    return torch.from_numpy(logits).double().softmax(-1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("num", [16, 80])  # fewer rows than columns, and more
@pytest.mark.parametrize("num_labels", [2, 4])
def test_multinomial_solution_is_that_of_scikit_learn(num, num_labels):
    blocks, features, rng = random_problem(num=num)
    labels = np.arange(num) % num_labels
    rng.shuffle(labels)
    model = solve(MultinomialProblem(num_labels), blocks, features, labels)
    assert np.allclose(softmax(model(features)), softmax(expected_of(model, features, labels, blocks)), atol=5e-3)
    assert model.way == linear_models.Way(balanced=True, separate=True)
    assert (model.num_items, tuple(model.scales)) == (num, linear_models.MIXED_STRENGTHS)


def test_scales_are_those_of_the_lowest_loss_on_rows_that_were_held_out():
    blocks, features, rng = random_problem(4, num=250)
    labels = (features[:, 0] + 0.3 * rng.normal(size=250) > 0).astype(int)
    model = solve(MultinomialProblem(2), blocks, features, labels)
    folds = list(linear_models._folds(MultinomialProblem(2), labels, np.arange(250)))
    for strength, (scale,) in model.scales.items():
        losses = dict.fromkeys(logit_factors.SCALES, 0.0)
        for train, held_out in folds:
            truth = labels[held_out]
            counts = 1 / np.bincount(labels)[truth]
            logits = separate_by_hand(features[train], labels[train], blocks, strength, features[held_out])
            for factor in losses:
                losses[factor] -= (counts * np.log(softmax(factor * logits)[np.arange(len(truth)), truth])).sum()
        assert min(losses, key=losses.get) == pytest.approx(scale, rel=0.2)


def rows_with_noise(kind, num=400, seed=0, num_noise=60):
    """The first modality tells the label, the second one is noise. Two halves: to train, and to test."""
    rng = np.random.default_rng(seed)
    x, noise = 0.3 * rng.normal(size=(num, 6)), rng.normal(size=(num, num_noise))
    scores = x @ rng.normal(size=(6, 3)) + 0.1 * rng.normal(size=(num, 3))
    labels = {"choice": scores.argmax(1), "tags": (scores > 0).astype(float), "numbers": scores}[kind]
    features = np.column_stack([x, np.ones(num), noise, np.ones(num)])
    half = num // 2
    return features[:half], labels[:half], features[half:], labels[half:]


@pytest.mark.parametrize("kind", ["choice", "tags", "numbers"])
def test_a_modality_of_noise_does_not_outvote_the_others(kind):
    problem = {"choice": MultinomialProblem, "tags": BinaryProblem, "numbers": RidgeProblem}[kind](3)
    blocks = [(slice(0, 6), 6), (slice(7, 67), 67)]
    features, labels, new, truth = rows_with_noise(kind)
    model, alone = solve(problem, blocks, features, labels), solve(problem, blocks[:1], features[:, :7], labels)
    losses = (
        problem.losses(model(new).astype(float), truth).mean(),
        problem.losses(alone(new[:, :7]).astype(float), truth).mean(),
    )
    assert losses[0] < 1.2 * losses[1] + 0.02
    if kind == "choice":
        assert all(factors[1] < 0.3 * factors[0] for factors in model.scales.values())
        assert np.allclose(softmax(model(features)), softmax(expected_of(model, features, labels, blocks)), atol=5e-3)
    else:
        assert model.way.without == (1,)
        assert not model.weight[:, 7:].any()


@pytest.mark.parametrize("kind", ["choice", "numbers"])
def test_a_modality_that_only_repeats_another_stays_for_rows_without_that(kind):
    problem = {"choice": MultinomialProblem, "numbers": RidgeProblem}[kind](3)
    features, labels, new, truth = rows_with_noise(kind, num_noise=6)
    blocks = [(slice(0, 6), 6), (slice(7, 13), 13)]
    rng = np.random.default_rng(1)
    for rows in (features, new):
        rows[:, 7:13] = rows[:, :6] + 0.1 * rng.normal(size=(len(rows), 6))
    model = solve(problem, blocks, features, labels)
    new[:, :7] = 0
    constant = np.tile(problem.majority(labels), (len(new), 1))
    assert problem.losses(model(new).astype(float), truth).mean() < 0.7 * problem.losses(constant, truth).mean()


def test_one_unbalanced_model_is_taken_where_it_is_clearly_more_accurate():
    """Labels that nothing tells: the most frequent one is right in 9 of 10 rows, balanced classes in half of them."""
    blocks, features, rng = random_problem(5, num=300)
    labels = (rng.random(300) < 0.1).astype(int)
    model = solve(MultinomialProblem(2), blocks, features, labels)
    assert model.way == linear_models.Way()
    assert np.allclose(softmax(model(features)), softmax(expected_of(model, features, labels, blocks)), atol=5e-3)
    assert (model(features).argmax(1) == 0).mean() > 0.95


def test_given_weights_of_labels_are_those_of_the_solution():
    blocks, features, rng = random_problem(6, widths=(5,), share=0.0)
    labels = rng.integers(0, 2, 80)
    problem = MultinomialProblem(2, label_weights=(1.0, 5.0))
    model = solve(problem, blocks, features, labels)
    counts = np.where(labels == 1, 5.0, 1.0)
    logits = 0
    for strength, (scale,) in model.scales.items():
        fit = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000)
        fit.fit(features[:, :5], labels, counts * 80 / counts.sum())
        logits = logits + scale * logits_by_hand(fit, features[:, :5]) / len(model.scales)
    assert np.allclose(softmax(model(features)), softmax(logits), atol=5e-3)


def test_weights_that_do_not_balance_the_classes_give_one_model_of_all_modalities():
    """Added logits would count the frequency of the classes once for each modality."""
    rng = np.random.default_rng(8)
    labels = (rng.random(400) < 0.25).astype(int)
    parts = [np.column_stack([rng.normal(size=(400, 4)) + 0.4 * labels[:, None], np.ones(400)]) for _ in range(2)]
    features, blocks = np.concatenate(parts, 1), [(slice(0, 4), 4), (slice(5, 9), 9)]
    for weights in ((1.0, 1.0), (1.0, 2.0)):
        model = solve(MultinomialProblem(2, label_weights=weights), blocks, features, labels)
        assert model.way == linear_models.Way()
        counts = np.asarray(weights)[labels]
        predicted = (counts * softmax(model(features))[:, 1]).sum() / counts.sum()
        assert predicted == pytest.approx((counts * labels).sum() / counts.sum(), abs=0.03)
    balanced = 400 / 2 / np.bincount(labels)
    given = solve(MultinomialProblem(2, label_weights=tuple(balanced)), blocks, features, labels)
    assert given.way == linear_models.Way(balanced=True, separate=True)
    assert given.label_counts == np.bincount(labels).tolist()
    assert (model(features).argmax(1) == 1).sum() < (given(features).argmax(1) == 1).sum()


def test_rows_whose_class_counts_for_nothing_are_left_out():
    blocks, features, _ = random_problem(9, num=60)
    labels = np.arange(60) % 3
    features[labels == 0] = 0  # no modality has rows of the first class
    problem = MultinomialProblem(3, label_weights=(0.0, 1.0, 2.0))
    model = solve(problem, blocks, features, labels)
    assert model.num_items == 40
    assert (model(features)[:, 0] == linear_models.NEVER).all()
    none = MultinomialProblem(3, label_weights=(1.0, 0.0, 0.0))
    assert solve(none, blocks, features, labels) is None


@pytest.mark.parametrize("kind", [MultinomialProblem, BinaryProblem, RidgeProblem])
def test_rows_of_one_group_have_a_solution(kind):
    blocks, features, rng = random_problem(10, num=30)
    labels = rng.integers(0, 2, 30) if kind is MultinomialProblem else rng.integers(0, 2, (30, 2)).astype(float)
    model = solve(kind(2), blocks, features, labels, np.zeros(30, np.int64))
    assert np.isfinite(model(features)).all()
    assert set(model.scales.values()) == {(1.0,)}


def test_one_row_of_each_class_says_nothing_about_scales():
    blocks, features, _ = random_problem(11, num=4, share=0.0)
    model = solve(MultinomialProblem(4), blocks, features, np.arange(4))
    assert set(model.scales.values()) == {(1.0,)}
    assert (model(features).argmax(1) == np.arange(4)).all()


def test_a_label_without_rows_keeps_its_logit_at_every_scale():
    blocks, features, rng = random_problem(12, num=100)
    model = solve(MultinomialProblem(3), blocks, features, rng.integers(0, 2, 100))
    assert model.bias[2] == linear_models.NEVER
    assert not model.weight[2].any()


def test_a_class_whose_rows_all_lack_a_modality_is_not_ruled_out_by_it():
    blocks, features, _ = random_problem(7, num=90, share=0.0)
    labels = np.arange(90) % 3
    features[:, 0] += 3 * (labels == 2)  # the first modality tells the third class
    part, indicator = blocks[1]
    features[labels == 2, part], features[labels == 2, indicator] = 0, 0
    model = solve(MultinomialProblem(3), blocks, features, labels)
    seen = features[labels == 2]
    seen[:, part], seen[:, indicator] = features[labels == 0][:, part], 1
    assert (model(seen).argmax(1) == 2).mean() > 0.9


def strength_of(model):
    (strength,) = model.scales
    return strength


def test_binary_solution_is_one_regression_per_label():
    blocks, features, rng = random_problem(1)
    labels = (rng.random((80, 3)) < [0.5, 0.2, 0.0]).astype(float)  # the last never holds
    model = solve(BinaryProblem(3), blocks, features, labels)
    rows, targets, weights = with_copies_by_hand(features, labels, blocks, linear_models.COPY_WEIGHT)
    probabilities = 1 / (1 + np.exp(-model(features)))
    for i in (0, 1):
        expected = LogisticRegression(C=strength_of(model), tol=1e-8, max_iter=10_000).fit(rows, targets[:, i], weights)
        assert np.allclose(probabilities[:, i], expected.predict_proba(features)[:, 1], atol=2e-3)
    assert (probabilities[:, 2] < 0.05).all()


def test_ridge_solution_has_a_closed_form():
    blocks, features, rng = random_problem(2)
    labels = rng.normal(size=80) * 100 + 500
    model = solve(RidgeProblem(1), blocks, features, labels)
    rows, targets, weights = with_copies_by_hand(features, labels, blocks, linear_models.COPY_WEIGHT)
    centre = (weights[:, None] * rows).sum(0) / weights.sum(), (weights * targets).sum() / weights.sum()
    x, y = rows - centre[0], targets - centre[1]
    weight = np.linalg.solve(
        x.T @ (weights[:, None] * x) + np.eye(x.shape[1]) / strength_of(model), x.T @ (weights * y)
    )
    expected = (features - centre[0]) @ weight + centre[1]
    assert np.allclose(model(features)[:, 0], expected, rtol=1e-4)
    assert Ridge  # the package uses scikit-learn's; the closed form is independent of it


def test_strength_is_low_where_numbers_are_noise_and_high_where_they_are_not():
    blocks, features, rng = random_problem(3, num=200, share=0.0)
    models = [solve(RidgeProblem(1), blocks, features, y) for y in (rng.normal(size=200), features[:, 0])]
    assert strength_of(models[0]) < 1 < strength_of(models[1])


def test_folds_share_no_group():
    groups = np.repeat(np.arange(20), 3)
    labels = np.arange(60) % 2
    for problem, y in ((MultinomialProblem(2), labels), (RidgeProblem(1), labels * 1.0)):
        for train, held_out in linear_models._folds(problem, y, groups):
            assert not set(groups[train]) & set(groups[held_out])


@pytest.mark.parametrize("labels", [np.array([1]), np.array([2, 2, 2])])
def test_nothing_to_learn_has_no_solution(labels):
    blocks, features, _ = random_problem(num=len(labels))
    assert solve(MultinomialProblem(3), blocks, features, labels) is None


def test_a_label_that_training_never_shows_is_never_the_answer():
    blocks, features, _ = random_problem()
    model = solve(MultinomialProblem(3), blocks, features, np.arange(80) % 2)
    assert (model(features).argmax(1) < 2).all()


# The start


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("started"), validation_fraction=0)
    before = copy.deepcopy(trainer.fused_model.state_dict())
    return trainer, before, start_probes(trainer)


def features_by_hand(model, row, per_token=False):
    """Unit means of what the encoders give of one row, one encoder at a time, and 1 or 0."""
    processor, parts = make_processor(), []
    batch = processor(text=[row["text"] or ""], return_tensors="pt")
    with torch.no_grad():
        states = model.model.text_model(batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]))[0][0]
        text = states if per_token else states.mean(0, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        text = torch.cat([text, torch.ones(len(text), 1)], 1)
        parts.append(text if row["text"] else torch.zeros_like(text))
        images = row["image"] if isinstance(row["image"], list) else [row["image"]] if row["image"] else []
        if images:
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            mean = model.model.vision_model(pixels)[0].mean((0, 1))
            vision = torch.cat([mean / mean.norm(), torch.ones(1)])[None]
        else:
            vision = torch.zeros(1, 25)
    return torch.cat([parts[0], vision.expand(len(text), -1)], 1).numpy()


@pytest.mark.slow
def test_the_started_model_answers_as_its_linear_models(started):
    trainer, _, start = started
    assert list(start.models) == [task.name for task in TASKS]
    rows = make_rows(14, seed=5)
    logits = logits_of(trainer.fused_model, rows)
    for i, row in enumerate(rows):
        for name, model in start.models.items():
            expected = model(features_by_hand(trainer.fused_model, row, name == "entities"))
            found = logits[name][i]
            if name == "entities":
                if row["text"] is None:
                    continue
                found = found[: len(expected)]
            assert np.allclose(found.reshape(expected.shape), expected, atol=1e-5), (name, i)


def test_only_the_probes_change(started):
    trainer, before, _ = started
    after = trainer.fused_model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    weights = {f"heads.{task.name}.probe.linear.weight" for task in TASKS}
    assert weights <= changed <= weights | {f"heads.{task.name}.probe.linear.bias" for task in TASKS}


def test_linear_models_are_those_of_the_training_rows(started):
    trainer, _, start = started
    rows = [row for row in trainer.train_dataset if row["topic"] is not None]
    features = np.concatenate([features_by_hand(trainer.fused_model, row) for row in rows])
    labels = np.array([TASKS[0].labels.index(row["topic"]) for row in rows])
    blocks = probes_of(trainer.fused_model)["topic"][0].blocks
    model = start.models["topic"]
    found, expected = softmax(model(features)), softmax(expected_of(model, features, labels, blocks))
    assert np.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("fusion_type", first_quickly(FUSION_KINDS, 2))
def test_gates_get_gradients_at_step_0_and_the_probe_answers_alone(fusion_type):
    model = new_model(fusion_type=fusion_type, tasks=TASKS[:2])
    probe = probes_of(model)["topic"][0]
    torch.nn.init.normal_(probe.linear.weight)
    batch = MMDataCollator(make_processor(), model.config)(make_rows(8))
    output = model.train()(**batch)  # dropout in the head has nothing to drop
    outputs = model.model(**{name: value for name, value in batch.items() if name != "labels"})
    assert torch.allclose(model.heads.topic.head(_change(outputs)), torch.zeros(8, 3), atol=1e-6)
    output.loss.backward()
    gates = {name: p.grad.abs().max() for name, p in model.named_parameters() if name.endswith("gate_alpha")}
    # Gates behind other closed gates wait for these.
    assert max(gates.values()) > 0
    if fusion_type in ("cross_attention", "merged", "late"):
        assert all(value > 0 for value in gates.values())


def _change(outputs):
    text = outputs.encoded["text"]
    outputs.last_hidden_state = outputs.last_hidden_state - text.hidden_states
    weights = text.mask[..., None].float()
    outputs.pooler_output = outputs.pooler_output - (text.hidden_states * weights).sum(1) / weights.sum(1)
    return outputs


@pytest.mark.slow
def test_a_model_of_text_alone_starts_as_a_linear_model_too(tmp_path):
    model = new_model(vision=None)
    rows = [{k: v for k, v in row.items() if k != "image"} for row in make_rows() if row["text"]]
    trainer = make_trainer(tmp_path, model, rows)
    start = start_probes(trainer)
    logits = logits_of(model, rows[:6])["topic"]
    for i, row in enumerate(rows[:6]):
        expected = start.models["topic"](features_by_hand(model, {**row, "image": None})[:, :33])
        assert np.allclose(logits[i], expected[0], atol=1e-5)
    batch = MMDataCollator(make_processor(), model.config)(rows[:6])
    model.train()(**batch).loss.backward()
    assert model.heads.topic.head.out_proj.weight.grad.abs().max() > 0


def test_probes_that_are_not_new_stay_as_they_are(tmp_path, started):
    trainer, _, _ = started
    trainer.fused_model.save_pretrained(tmp_path / "saved")
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "saved")
    before = {name: p.clone() for name, p in loaded.named_parameters()}
    assert start_probes(make_trainer(tmp_path / "again", loaded, make_rows(20, seed=9))).models == {}
    assert all(torch.equal(before[name], p) for name, p in loaded.named_parameters())


@pytest.mark.slow
def test_the_random_numbers_of_training_are_not_touched(tmp_path):
    trainer = make_trainer(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    start_probes(trainer)
    assert torch.equal(torch.rand(4), expected)


def test_a_config_without_the_field_has_todays_architecture_and_answers():
    old, new = make_model(seed=1), make_model(seed=1, linear_probe=False)
    assert not any("probe" in name for name in old.state_dict())
    batch = MMDataCollator(make_processor(), old.config)([{"text": "a red dog", "image": make_image(1)}])
    a, b = old(**batch).logits, new(**batch).logits
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_task_kind_of_ones_own_without_a_linear_problem_starts_as_before():
    class Own(Classification):
        kind = "own_without_linear_problem"

        def linear_problem(self):
            return None

    from mm_transformers.model.task_base import TASK_KINDS, register_task

    register_task(Own)
    try:
        model = new_model(tasks=[Own("topic", labels=["a", "b"]), TASKS[1]])
        assert list(probes_of(model)) == ["mood"]
    finally:
        del TASK_KINDS["own_without_linear_problem"]


def test_probe_features_ignore_what_is_absent():
    model = new_model(tasks=TASKS[:1])
    torch.nn.init.normal_(probes_of(model)["topic"][0].linear.weight)
    rows = [{"text": "a red dog", "image": None}, {"text": "the big cat is in the river", "image": make_image(2)}]
    alone, together = logits_of(model, rows[:1])["topic"], logits_of(model, rows)["topic"]
    assert torch.allclose(alone[0], together[0], atol=1e-6)


# Training


@pytest.mark.slow
def test_the_start_is_kept_where_training_makes_it_worse(tmp_path, caplog):
    trainer = make_trainer(tmp_path, learning_rate=3.0, max_grad_norm=1e9, num_train_epochs=2)
    trainer.train()
    assert trainer.state.best_global_step == 0
    logits = logits_of(trainer.fused_model, make_rows(6, seed=8))
    for name, model in trainer._start.models.items():
        if name != "entities":
            for i, row in enumerate(make_rows(6, seed=8)):
                expected = model(features_by_hand(trainer.fused_model, row))
                assert np.allclose(logits[name][i].reshape(expected.shape), expected, atol=1e-4)
    assert all(verdict.kept_start for verdict in trainer.verdicts)
    assert "the start is kept" in str(trainer.verdicts[0])


@pytest.mark.slow
def test_weights_that_are_better_on_validation_rows_are_kept(tmp_path):
    options = {"num_train_epochs": 3, "early_stopping_patience": 0, "head_learning_rate": 1e-2, "start_share": 0}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert min(losses) == 0
    best = min(losses, key=losses.get)
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-4)


@pytest.mark.slow
def test_verdicts_are_the_metrics_of_simple_models_on_validation_rows(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    verdict = {v.task: v for v in trainer.verdicts}["topic"]
    train = [row["topic"] for row in trainer.train_dataset if row["topic"]]
    held_out = [row for row in trainer.eval_dataset if row["topic"]]
    most = max(sorted(set(train)), key=train.count)
    assert verdict.num_rows == len(held_out)
    assert verdict.majority == pytest.approx(np.mean([row["topic"] == most for row in held_out]))
    model = trainer._start.models["topic"]
    answers = [model(features_by_hand(_initial(trainer), row)).argmax() for row in held_out]
    right = np.mean([TASKS[0].labels[a] == row["topic"] for a, row in zip(answers, held_out, strict=True)])
    assert verdict.linear == pytest.approx(right)
    metrics = trainer.evaluate()
    assert verdict.model == pytest.approx(metrics["eval_topic_accuracy"])


def _initial(trainer):
    """The encoders as they were: those of a new model of the same seed."""
    return new_model()


def test_held_out_rows_are_used_to_choose_and_never_trained_on(tmp_path):
    rows = make_rows(40)
    trainer = make_trainer(tmp_path, rows=rows, validation_fraction=0.25)
    assert len(trainer.train_dataset) + len(trainer.eval_dataset) == 40
    assert trainer.args.eval_strategy == "epoch"
    assert trainer.args.load_best_model_at_end
    train, held_out = ([row["score"] for row in part] for part in (trainer.train_dataset, trainer.eval_dataset))
    assert sorted(map(str, train + held_out)) == sorted(str(row["score"]) for row in rows)


@pytest.mark.slow
def test_probe_start_can_be_switched_off(tmp_path):
    trainer = make_trainer(tmp_path, probe_start=False, num_train_epochs=1)
    trainer.train()
    assert trainer._start.models == {}
    assert trainer.verdicts == []


@pytest.mark.slow
def test_plain_training_arguments_are_taken_as_they_are(tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, **CPU)
    before = args.to_dict()
    trainer = MMTrainer(new_model(), args, processing_class=make_processor(), train_dataset=make_rows())
    kept = ("learning_rate", "eval_strategy", "save_strategy", "num_train_epochs", "load_best_model_at_end")
    assert {name: trainer.args.to_dict()[name] for name in kept} == {name: before[name] for name in kept}
    assert trainer.eval_dataset is None
    trainer.train()
    assert trainer._start.models


def test_values_that_a_user_gives_are_not_changed(tmp_path):
    given = {
        "learning_rate": 3e-4, "num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no", "weight_decay": 0.1,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, **given)
    assert trainer.eval_dataset is None
    assert {name: getattr(trainer.args, name) for name in given} == given
    trainer.create_optimizer()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert sorted(rates) == pytest.approx([3e-4, 3e-3])  # gates learn ten times as fast


def test_default_rates_differ_by_part(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    model = trainer.fused_model
    assert {rates[id(p)] for p in model.model.text_model.parameters()} == {5e-5}
    assert {rates[id(p)] for p in model.heads.parameters()} == {1e-3}
    assert {rates[id(p)] for p in model.model.vision_projection.parameters()} == {1e-4}


@pytest.mark.slow
def test_resumed_training_keeps_the_start_and_ends_alike(tmp_path):
    def trainer(folder):
        return make_trainer(folder, num_train_epochs=3, save_total_limit=10, early_stopping_patience=0)

    whole = trainer(tmp_path / "whole")
    whole.train()
    other = trainer(tmp_path / "other")
    other.add_callback(_StopAfter(4))
    other.train()
    resumed = trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert resumed.verdicts == whole.verdicts
    a, b = whole.fused_model.state_dict(), resumed.fused_model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    state = json.loads((tmp_path / "whole" / "checkpoint-0" / "trainer_state.json").read_text())
    assert state["global_step"] == 0


class _StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.slow
def test_training_goes_on_with_the_balance_of_the_start(tmp_path):
    rows = [row for row in make_rows(60) if row["mood"]]
    rows = [row for i, row in enumerate(rows) if row["mood"] == "good" or i % 3 == 0]  # uneven
    tasks = [Classification("mood", labels=["bad", "good"])]
    trainer = make_trainer(tmp_path / "a", new_model(tasks=tasks), rows, save_total_limit=10)
    trainer.train()
    assert trainer.linear_models["mood"].way.balanced
    moods = [row["mood"] for row in trainer.train_dataset]
    expected = {label: len(moods) / 2 / moods.count(label) for label in ("bad", "good")}
    for task in (
        trainer.fused_model.tasks["mood"],
        trainer.data_collator.tasks["mood"],
        trainer.compute_metrics.tasks["mood"],
    ):
        assert task.class_weights == pytest.approx(expected)
    assert MMTransformerForMultiTask.from_pretrained(tmp_path / "a" / "checkpoint-0").tasks["mood"].class_weights
    resumed = make_trainer(tmp_path / "a", new_model(tasks=[Classification("mood", labels=["bad", "good"])]), rows)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.fused_model.tasks["mood"].class_weights == pytest.approx(expected)


def test_balanced_weights_that_nobody_asked_for_are_bounded():
    task = Classification("mood", labels=["bad", "good", "unseen"])
    task.balance([1, 999, 0])
    assert task.class_weights["bad"] == 10
    assert task.class_weights["good"] == pytest.approx(1000 / 2 / 999)


@pytest.mark.slow
def test_a_start_is_kept_when_a_smaller_batch_is_tried(tmp_path):
    class Trainer(MMTrainer):
        fails = 1

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1 and self.fails:
                self.fails = 0
                raise RuntimeError("CUDA out of memory. Simulated.")
            return loss

    args = MMTrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
        save_total_limit=10,
        **CPU,
    )
    trainer = Trainer(new_model(tasks=TASKS[1:2]), args, processing_class=make_processor(), train_dataset=make_rows())
    trainer.train()
    assert not trainer.fails
    assert list(trainer.linear_models) == ["mood"]
    assert [verdict.task for verdict in trainer.verdicts] == ["mood"]
    start = load_file(tmp_path / "checkpoint-0" / "model.safetensors")
    expected = torch.from_numpy(trainer.linear_models["mood"].weight)
    assert torch.equal(start["heads.mood.probe.linear.weight"], expected)


@pytest.mark.slow
def test_a_checkpoint_without_optimiser_has_the_balance_and_the_start(tmp_path):
    rows = [row for i, row in enumerate(make_rows(60)) if row["mood"] == "good" or i % 4 == 0]
    options = {"num_train_epochs": 1, "save_only_model": True, "save_total_limit": 10, "load_best_model_at_end": False}
    trainer = make_trainer(tmp_path, new_model(tasks=TASKS[1:2]), rows, **options)
    trainer.train()
    expected = trainer.fused_model.tasks["mood"].class_weights
    assert expected is not None
    names = {path.name for path in (tmp_path / f"checkpoint-{trainer.state.global_step}").iterdir()}
    assert {"linear_start.json", "start_weights.safetensors"} <= names
    resumed = make_trainer(tmp_path, new_model(tasks=TASKS[1:2]), rows, **{**options, "num_train_epochs": 2})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.fused_model.tasks["mood"].class_weights == expected


@pytest.mark.slow
def test_weights_of_classes_that_a_user_gives_stay(tmp_path):
    tasks = [Classification("mood", labels=["bad", "good"], class_weights={})]
    trainer = make_trainer(tmp_path, new_model(tasks=tasks))
    trainer.train()
    assert trainer.fused_model.tasks["mood"].class_weights == {"bad": 1.0, "good": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["l2", "l1", "l2_sp"])
def test_the_regulariser_pulls_probes_to_their_start(tmp_path, kind):
    model = new_model(tasks=TASKS[:1], regularization={"kind": kind, "weight": 0.5})
    trainer = make_trainer(tmp_path, model, num_train_epochs=1)
    start_probes(trainer)
    from mm_transformers.model.regularization import take_starting_point

    model.starting_point = take_starting_point(model, model.config.regularization)
    probe, head = model.heads.topic.probe.linear.weight, model.heads.topic.head
    at_start = model.regularization_loss()
    size = {"l2": torch.square, "l1": torch.abs, "l2_sp": lambda x: torch.zeros_like(x)}[kind]
    others = sum(size(p.detach()).sum() for p in head.parameters() if p.ndim > 1)
    assert at_start.item() == pytest.approx(0.5 * float(others), rel=1e-5)
    with torch.no_grad():
        probe += 0.1
    moved = {"l2": 0.01, "l1": 0.1, "l2_sp": 0.01}[kind] * probe.numel()
    assert (model.regularization_loss() - at_start).item() == pytest.approx(0.5 * moved, rel=1e-4)


@pytest.mark.slow
def test_a_mixture_starts_from_the_rows_of_all_its_data_sets(tmp_path):
    from mm_transformers import DataMixture, DataSource

    rows = make_rows(30)
    mixture = DataMixture({"a": DataSource(rows[:15], tasks=["topic"]), "b": DataSource(rows[15:], tasks=["mood"])})
    args = MMTrainingArguments(str(tmp_path), num_train_epochs=1, **CPU)
    trainer = MMTrainer(new_model(tasks=TASKS[:2]), args, processing_class=make_processor(), train_dataset=mixture)
    start = start_probes(trainer)
    assert start.models["topic"].num_items == sum(row["topic"] is not None for row in rows[:15])
    assert start.models["mood"].num_items == sum(row["mood"] is not None for row in rows[15:])


@pytest.mark.slow
def test_streams_and_other_collators_are_told_and_train_as_before(tmp_path, caplog):
    rows = [{k: v for k, v in row.items() if k != "image"} for row in make_rows(12) if row["text"]]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    model = new_model(vision=None, tasks=TASKS[:1])
    args = MMTrainingArguments(str(tmp_path / "a"), max_steps=1, **CPU)
    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=stream)
    trainer.train()
    assert trainer._start.models == {}
    inner = MMDataCollator(make_processor(), model.config)
    model = new_model(vision=None, tasks=TASKS[:1])
    args = MMTrainingArguments(str(tmp_path / "b"), max_steps=1, validation_fraction=0, **CPU)
    trainer = MMTrainer(
        model, args, data_collator=lambda batch: inner(batch), processing_class=make_processor(), train_dataset=rows
    )  # fmt: skip
    trainer.train()
    assert trainer._start.models == {}


@pytest.mark.slow
def test_validation_rows_without_labels_choose_nothing_and_lose_nothing(tmp_path):
    rows = make_rows(16)
    unlabelled = [{"text": row["text"], "image": row["image"], "topic": None} for row in rows[:5]]
    args = MMTrainingArguments(str(tmp_path), num_train_epochs=1, **CPU)
    trainer = MMTrainer(
        new_model(tasks=TASKS[:1]), args, processing_class=make_processor(), train_dataset=rows, eval_dataset=unlabelled
    )
    trainer.train()
    assert trainer.state.epoch == 1
    assert trainer.verdicts == []


def test_a_kind_with_a_head_of_its_own_gets_no_probe_that_it_inherits():
    from mm_transformers.model.linear_probe import with_probe
    from mm_transformers.model.task_base import PooledHead

    class Own(Classification):
        def build_head(self, config, hidden_size):
            return PooledHead(hidden_size, 1, 0.0)

    config = new_model(tasks=TASKS[:1]).config
    task = Own("stars", labels=["a", "b"])
    assert isinstance(with_probe(task.build_head(config, 32), task, config), PooledHead)


def test_a_task_called_probe_is_regularised_like_any_other():
    task = Classification("probe", labels=["a", "b"])
    model = make_model(tasks=[task], regularization={"kind": "l2", "weight": 1.0})
    expected = sum(p.detach().square().sum() for p in model.heads.parameters() if p.ndim > 1)
    assert model.regularization_loss().item() == pytest.approx(expected.item(), rel=1e-5)


def test_two_trainers_share_their_arguments(tmp_path):
    args = MMTrainingArguments(str(tmp_path), num_train_epochs=1, **CPU)
    for _ in range(2):
        model = new_model(tasks=TASKS[:1])
        trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=make_rows(20))
        assert trainer.eval_dataset is not None
        assert trainer.args.load_best_model_at_end
    MMTrainer(model, args, processing_class=make_processor()).predict(make_rows(4))


def test_probes_hold_zeros_until_they_are_started():
    probe = LinearProbe({"text": 3, "vision": 4}, 2)
    probe.init_own_parameters(0.02)
    assert probe.linear.weight.shape == (2, 9)
    assert not probe.linear.weight.any()
    assert probe.blocks == [(slice(0, 3), 3), (slice(4, 8), 8)]


@pytest.mark.slow
def test_datasets_of_the_hub_start_as_lists_do(tmp_path):
    rows = [{"text": r["text"], "topic": r["topic"]} for r in make_rows(20) if r["text"]]
    model = new_model(vision=None, tasks=TASKS[:1])
    a = start_probes(make_trainer(tmp_path / "a", model, rows, validation_fraction=0)).models["topic"]
    model = new_model(vision=None, tasks=TASKS[:1])
    b = start_probes(make_trainer(tmp_path / "b", model, Dataset.from_list(rows), validation_fraction=0))
    assert np.allclose(a.weight, b.models["topic"].weight, atol=1e-6)


def test_a_kind_without_a_linear_start_is_told(caplog):
    """Half a linear start is none; a start that may not fit is named."""
    kinds = dict(TASK_KINDS)
    try:

        @register_task
        class HalfOwn(Regression):
            kind = "half_own"

            def linear_problem(self):
                return super().linear_problem()

        @register_task
        class OwnAnswers(Regression):
            kind = "own_answers"

            def decode(self, logits, word_index=None):
                return super().decode(logits.sigmoid())

        with caplog.at_level("WARNING"):
            half = new_model(tasks=[HalfOwn("a_share"), Regression("plain")])
            other = new_model(tasks=[OwnAnswers("b_share")])
        assert set(probes_of(half)) == {"plain"}
        assert set(probes_of(other)) == {"b_share"}
        assert "Task 'a_share' has no linear start: HalfOwn defines linear_problem, but Regression" in caplog.text
        assert "Task 'b_share': OwnAnswers decodes logits in its own way" in caplog.text
    finally:
        TASK_KINDS.clear()
        TASK_KINDS.update(kinds)
