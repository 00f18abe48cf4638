"""Training again on all rows after some were held out."""

import copy

import pytest
import torch
from probe_start import CPU, TASKS, make_rows, make_trainer
from probe_start import new_model as model_with
from tiny import make_processor
from transformers import TrainerCallback

from mm_transformers import Classification, MMTrainer, MMTrainingArguments
from mm_transformers.model.class_weights import balanced_weights
from mm_transformers.training.card.facts import measurements_of, training_of
from mm_transformers.training.linear_start import refit as refit_module
from mm_transformers.training.linear_start.probe_start import probes_of, start_probes
from mm_transformers.training.linear_start.start_average import StartAverage


OPTIONS = {"num_train_epochs": 2, "early_stopping_patience": 0, "head_learning_rate": 1e-2, "refit": None}


def new_model(tasks=TASKS[:2]):
    return model_with(tasks=tasks)


class Steps(TrainerCallback):
    """The number of steps of each training."""

    def __init__(self):
        self.counts = []

    def on_train_end(self, args, state, control, **kwargs):
        self.counts.append(state.global_step)


def trained(folder, model, **kwargs):
    trainer = make_trainer(folder, model, **{**OPTIONS, **kwargs})
    trainer.add_callback(steps := Steps())
    trainer.train()
    return trainer, steps.counts


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    torch.manual_seed(0)
    model = new_model()
    start = copy.deepcopy(model)
    trainer, steps = trained(tmp_path_factory.mktemp("refitted"), model)
    return trainer, steps, start


@pytest.mark.slow
def test_the_model_is_that_of_a_training_on_all_rows(refitted, tmp_path):
    trainer, steps, start = refitted
    per_epoch = steps[0] // 2
    epochs = trainer.state.best_global_step // per_epoch
    assert epochs > 0  # otherwise another test asks the same
    expected, _ = trained(tmp_path, copy.deepcopy(start), validation_fraction=0, num_train_epochs=epochs)
    assert len(expected.train_dataset) == len(trainer.train_dataset) + len(trainer.eval_dataset)
    assert same(trainer.fused_model, expected.fused_model)
    assert trainer.fused_model.config.to_dict()["tasks"] == expected.fused_model.config.to_dict()["tasks"]
    assert trainer.linear_models["topic"].num_items == expected.linear_models["topic"].num_items


@pytest.mark.slow
def test_what_is_measured_is_the_first_training(refitted, tmp_path):
    trainer, _, start = refitted
    once, _ = trained(tmp_path, copy.deepcopy(start), refit=False)
    assert trainer.verdicts == once.verdicts
    keys = [entry.keys() for entry in trainer.state.log_history]
    assert keys == [entry.keys() for entry in once.state.log_history]
    assert not same(trainer.fused_model, once.fused_model)


@pytest.mark.slow
def test_if_the_start_is_kept_the_model_is_the_linear_model_of_all_rows(tmp_path):
    torch.manual_seed(0)
    model = new_model()
    start = copy.deepcopy(model)
    # Such steps make the validation loss worse at once.
    trainer, steps = trained(tmp_path / "a", model, learning_rate=1.0, head_learning_rate=None)
    assert trainer.state.best_global_step == 0
    assert steps[1:] == [0]
    all_rows = make_trainer(tmp_path / "b", start, validation_fraction=0)
    start_probes(all_rows)
    assert same(trainer.fused_model, start)


@pytest.mark.slow
def test_balanced_weights_are_those_of_all_rows(tmp_path):
    rows = make_rows(36)
    labels = [row["topic"] for row in rows]
    names = sorted({label for label in labels if label is not None})
    task = Classification("topic", labels=names, class_weights="balanced")
    trainer, _ = trained(tmp_path, new_model(tasks=[task]))
    expected = balanced_weights(names, [labels.count(name) for name in names])
    assert trainer.fused_model.tasks["topic"].class_weights == pytest.approx(expected)
    saved = next(task for task in trainer.model.config.tasks if task["name"] == "topic")
    assert saved["class_weights"] == pytest.approx(expected)


@pytest.mark.slow
def test_it_is_resumed_as_if_nothing_had_happened(refitted, tmp_path):
    trainer, steps, start = refitted

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == steps[0] // 2 + 1:
                raise KeyboardInterrupt

    stopped = make_trainer(tmp_path, copy.deepcopy(start), **OPTIONS)
    stopped.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(tmp_path, copy.deepcopy(start), **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.fused_model, trainer.fused_model)


@pytest.mark.slow
def test_steps_are_as_many_as_the_best_weights_had(tmp_path):
    options = {"max_steps": 4, "eval_steps": 2, "num_train_epochs": 1}
    trainer, steps = trained(tmp_path, new_model(TASKS[:1]), **options)
    assert steps == [4, trainer.state.best_global_step]


@pytest.mark.slow
def test_tasks_that_were_loaded_keep_their_probe(tmp_path):
    first, _ = trained(tmp_path / "first", new_model(tasks=TASKS[1:2]))
    model = new_model(tasks=[*first.fused_model.tasks.values(), TASKS[0]])
    probe = probes_of(model)["mood"][0].linear
    with torch.no_grad():
        probe.weight.fill_(0.5)
    trained(tmp_path / "second", model, num_train_epochs=1, learning_rate=0.0, head_learning_rate=None)
    assert torch.equal(probe.weight, torch.full_like(probe.weight, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nothing", "refit=False", "eval_dataset", "many rows", "subclass", "own optimizer"])
def test_it_is_left_out(case, tmp_path, monkeypatch):
    model = new_model(tasks=TASKS[:1])
    options = {**CPU, **OPTIONS, "max_steps": 1, "refit": False if case == "refit=False" else None}
    args = MMTrainingArguments(str(tmp_path), **options)
    kwargs = {"processing_class": make_processor(), "train_dataset": make_rows()}
    if case == "eval_dataset":
        kwargs["eval_dataset"] = make_rows(8, seed=1)
    if case == "many rows":
        monkeypatch.setattr(refit_module, "MAX_ROWS", 35)
    if case == "own optimizer":
        kwargs["optimizers"] = (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    kind = type("Other", (MMTrainer,), {}) if case == "subclass" else MMTrainer
    trainer = kind(model, args, callbacks=[steps := Steps()], **kwargs)
    trainer.train()
    assert len(steps.counts) == (2 if case == "nothing" else 1)


def test_what_cannot_be_trained_twice_is_refused_at_once(tmp_path):
    class Other(MMTrainer):
        def __init__(self, alpha, *args, **kwargs):
            super().__init__(*args, **kwargs)

    args = MMTrainingArguments(str(tmp_path), refit=True, **CPU)
    kwargs = {"args": args, "processing_class": make_processor(), "train_dataset": make_rows()}
    with pytest.raises(ValueError, match="Other has its own __init__"):
        Other(1.0, new_model(), **kwargs)
    model = new_model()
    with pytest.raises(ValueError, match="the optimizer was given"):
        MMTrainer(model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), **kwargs)


@pytest.mark.slow
def test_rows_that_were_trained_on_say_nothing_more(refitted, caplog, tmp_path):
    trainer, _, _ = refitted
    assert measurements_of(trainer) == []
    with caplog.at_level("WARNING", logger="mm_transformers"):
        trainer.evaluate()
    assert "The model was finally trained on these rows" in caplog.text
    assert measurements_of(trainer) == []
    caplog.clear()
    found = trainer.evaluate(make_rows(8, seed=1))
    assert "trained on these rows" not in caplog.text
    assert measurements_of(trainer)[0].metrics["topic_accuracy"] == found["eval_topic_accuracy"]
    assert training_of(trainer).rows["second training"].startswith("on all 36 training rows, ")


def test_running_statistics_begin_anew(tmp_path):
    model = model_with(tasks=TASKS[:1], vision="resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = StartAverage(model, 0.3)
    average.save(str(tmp_path))
    assert any("running_var" in name for name in before)
    for way in ("memory", "file"):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1)
        if way == "file":
            average = StartAverage(model, 0.3)
            assert average.load(str(tmp_path))
        average.begin_anew()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), way


@pytest.mark.slow
def test_a_second_training_that_is_cut_short_is_told(tmp_path, caplog):
    class Budget(TrainerCallback):
        left = 5

        def on_step_end(self, args, state, control, **kwargs):
            self.left -= 1
            control.should_training_stop |= self.left <= 0

    trainer = make_trainer(tmp_path, new_model(TASKS[:1]), **OPTIONS)
    trainer.add_callback(Budget())
    with caplog.at_level("WARNING", logger="mm_transformers"):
        trainer.train()
    assert "A callback stopped this second training after 1 of 6 steps" in caplog.text
