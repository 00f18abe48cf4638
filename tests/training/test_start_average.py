"""The mean of the weights at the start and after training: what is evaluated, saved, kept, and resumed."""

import pytest
import torch
from probe_start import CPU, TASKS, logits_of, make_rows, make_trainer, new_model
from safetensors.torch import load_file
from tiny import make_processor
from transformers import TrainerCallback, TrainingArguments

from mm_transformers import MMTrainer, MMTrainingArguments
from mm_transformers.training.linear_start.start_average import FILE_NAME, StartAverage, is_as_good


class Weights(TrainerCallback):
    """Copies of the weights when training begins, after each epoch, and what evaluations see of one of them."""

    def __init__(self):
        self.by_step = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.by_step[0] = copy_of(model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = copy_of(model)


def copy_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def mean_of(start, end, share):
    return {name: share * start[name] + (1 - share) * end[name] for name in start}


def trained(folder, **kwargs):
    kwargs.setdefault("early_stopping_patience", 0)
    trainer = make_trainer(folder, **{"num_train_epochs": 3, "head_learning_rate": 1e-2, **kwargs})
    trainer.add_callback(weights := Weights())
    trainer.train()
    return trainer, weights.by_step


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_model_is_the_mean_of_the_start_and_the_best_trained_weights(tmp_path, share):
    trainer, by_step = trained(tmp_path, start_share=share)
    best = trainer.state.best_global_step
    expected = mean_of(by_step[0], by_step[best], share)
    for name, value in trainer.fused_model.state_dict().items():
        assert torch.allclose(value.float(), expected[name].float(), atol=1e-6), name


@pytest.mark.slow
def test_without_validation_rows_it_is_the_mean_with_the_last_weights(tmp_path):
    trainer, by_step = trained(tmp_path, validation_fraction=0)
    expected = mean_of(by_step[0], by_step[max(by_step)], 0.3)
    found = trainer.fused_model.state_dict()
    assert all(torch.allclose(found[name].float(), expected[name].float(), atol=1e-6) for name in found)
    assert not torch.equal(found["heads.mood.probe.linear.weight"], by_step[0]["heads.mood.probe.linear.weight"])


@pytest.mark.slow
def test_evaluations_during_training_are_those_of_the_mean(tmp_path):
    trainer, by_step = trained(tmp_path, save_total_limit=10)
    for entry in [entry for entry in trainer.state.log_history if "eval_loss" in entry]:
        trainer.fused_model.load_state_dict(mean_of(by_step[0], by_step[entry["step"]], 0.3))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(entry["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_checkpoints_hold_the_weights_of_training_and_of_the_start(tmp_path):
    _, by_step = trained(tmp_path, save_total_limit=10)
    for step in set(by_step) - {0}:
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        start = load_file(tmp_path / f"checkpoint-{step}" / FILE_NAME)
        assert all(torch.equal(saved[name], by_step[step][name]) for name in saved)
        assert all(torch.equal(start[name], by_step[0][name]) for name in start)


def test_the_weights_are_bit_for_bit_as_before_after_an_evaluation():
    model = new_model()
    average = StartAverage(model, 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    before = copy_of(model)
    with average.applied():
        expected = 0.3 * average.start["heads.mood.head.dense.weight"] + 0.7 * before["heads.mood.head.dense.weight"]
        assert torch.allclose(model.heads.mood.head.dense.weight, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Sees(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer is not None:
            self.loss = self.trainer.evaluate(metric_key_prefix="mine")["mine_loss"]

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.at_end = copy_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("loads_best", [None, False])
def test_callbacks_see_the_mean_at_the_end_of_training(tmp_path, loads_best):
    trainer = make_trainer(tmp_path, new_model(tasks=TASKS[1:2]), num_train_epochs=1, load_best_model_at_end=loads_best)
    trainer.add_callback(sees := Sees())
    sees.trainer = None if loads_best is None else trainer
    trainer.train()
    assert all(torch.equal(value, sees.at_end[name]) for name, value in trainer.fused_model.state_dict().items())
    if sees.trainer is not None:  # what users evaluate in between is the mean, too
        assert trainer.evaluate()["eval_loss"] == pytest.approx(sees.loss, rel=1e-6)


@pytest.mark.slow
def test_parameters_may_be_unfrozen_during_training(tmp_path):
    class Unfreezes(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            for parameter in model.model.text_model.parameters():
                parameter.requires_grad_(True)

    model = new_model(freeze=["text"])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(tmp_path, model, num_train_epochs=2)
    trainer.add_callback(Unfreezes())
    trainer.train()
    # The optimiser, which was made before, does not know them; the mean leaves them alone.
    assert frozen
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_model_may_change_after_the_start(dtype):
    model = new_model()
    average = StartAverage(model, 0.3)
    model.to(dtype)
    with average.applied():
        assert model.heads.mood.head.dense.weight.dtype == dtype


def test_negative_losses_that_fall_are_better():
    assert is_as_good(-1.04, -1.0)
    assert is_as_good(-0.97, -1.0)
    assert not is_as_good(-0.9, -1.0)


def test_frozen_parameters_are_not_copied():
    model = new_model(freeze=["vision"])
    average = StartAverage(model, 0.5)
    assert not any(name.startswith("model.vision_model") for name in average.start)
    assert any(name.startswith("model.text_model") for name in average.start)


@pytest.mark.slow
def test_plain_training_arguments_and_models_without_a_start_keep_the_trained_weights(tmp_path):
    def last_weights(args, model):
        trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=make_rows())
        trainer.add_callback(weights := Weights())
        trainer.train()
        return trainer.fused_model.state_dict(), weights.by_step[max(weights.by_step)]

    plain = TrainingArguments(str(tmp_path / "plain"), num_train_epochs=1, save_strategy="no", **CPU)
    without = MMTrainingArguments(
        str(tmp_path / "without"), num_train_epochs=1, validation_fraction=0, probe_start=False, **CPU
    )
    for args in (plain, without):
        found, expected = last_weights(args, new_model())
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_a_training_that_had_ended_gives_the_same_model_when_it_is_resumed(tmp_path):
    whole, _ = trained(tmp_path)
    again = make_trainer(tmp_path, num_train_epochs=3, head_learning_rate=1e-2, early_stopping_patience=0)
    again.train(resume_from_checkpoint=True)
    rows = make_rows(6, seed=4)
    a, b = logits_of(whole.fused_model, rows), logits_of(again.fused_model, rows)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_the_share_is_checked(tmp_path, share):
    with pytest.raises(ValueError, match="start_share must be at least 0 and less than 1"):
        MMTrainingArguments(str(tmp_path), start_share=share)


def losses_then_best(tmp_path, losses, eval_dataset=None, **kwargs):
    """Trains with these validation losses in place of the true ones; the step that is kept, and the last step."""
    given = iter(losses)

    class Trainer(MMTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = next(given)
            return output

    args = MMTrainingArguments(str(tmp_path), num_train_epochs=len(losses) - 1, **CPU, **kwargs)
    rows = [row for row in make_rows(12) if row["mood"]]
    trainer = Trainer(
        new_model(tasks=TASKS[1:2]),
        args,
        processing_class=make_processor(),
        train_dataset=rows,
        eval_dataset=eval_dataset,
    )
    trainer.train()
    num_steps = -(-len(trainer.train_dataset) // args.per_device_train_batch_size)
    return trainer.state.best_global_step // num_steps, trainer.state.global_step // num_steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "best", "last"),
    [
        ([1.0, 1.04, 1.03], 2, 2),  # nearly equal: the latest
        ([1.0, 0.8, 0.85], 1, 2),  # the last is clearly worse than the lowest
        ([1.0, 1.2, 1.3], 0, 2),  # all trained weights are clearly worse than the start
        ([1.0, 1.2, 1.3, 1.1, 1.4, 0.5], 0, 3),  # patience ends
        ([1.0, 1.04, 1.2, 1.04, 1.04, 1.04], 5, 5),  # and begins anew with a loss that is as good
    ],
)
def test_of_nearly_equal_losses_the_latest_weights_are_kept(tmp_path, losses, best, last):
    assert losses_then_best(tmp_path, losses) == (best, last)


@pytest.mark.slow
def test_a_user_who_asks_for_the_best_weights_gets_the_lowest_loss(tmp_path):
    given = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    rows = make_rows(12)
    assert losses_then_best(tmp_path, [1.0, 0.99, 1.0], eval_dataset=rows, **given) == (1, 2)
