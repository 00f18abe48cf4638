"""Training by MMTrainer and by the plain Trainer."""

import io
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from rows import make_args, make_dataset, make_rows
from tiny import make_image, make_model, make_processor, make_tasks
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from mm_transformers import (
    Classification,
    DataSource,
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MultiTaskMetrics,
    Regression,
    Retrieval,
)
from mm_transformers.training.learning_rates import GATE_LEARNING_RATE_FACTOR
from mm_transformers.training.setup_checks import check_best_metric


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.fusion_dropout = 0.0
    for layer in model.model.fusion.layers:
        layer.cross_attention.dropout = 0.0
    return model


def same(first: dict, second: dict, **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name, **tolerance)


def test_trains_evaluates_and_logs_each_task(tmp_path):
    data = make_dataset()
    model = make_model(regularization={"kind": "l2", "weight": 1e-3}, gates_open=False)
    trainer = MMTrainer(
        model, make_args(tmp_path), processing_class=make_processor(), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tasks = {task.name: task for task in make_tasks()}
    for entry in logs:
        # A task without labels in this step has no loss.
        losses = {name: entry[f"{name}_loss"] for name in tasks if f"{name}_loss" in entry}
        assert {"topic", "tags", "entities"} <= losses.keys()
        total = sum(tasks[name].loss_weight * loss for name, loss in losses.items()) + entry["regularization_loss"]
        assert entry["loss"] == pytest.approx(total, abs=1e-3)
    metrics = trainer.evaluate()
    for name in ("topic_accuracy", "topic_f1", "tags_f1_micro", "score_mae", "entities_f1", "sentiment_loss"):
        assert np.isfinite(metrics[f"eval_{name}"]), name
    assert all(p.item() != 0 for name, p in model.named_parameters() if name.endswith("gate_alpha"))


def test_eval_loss_is_exact(tmp_path):
    """Against one forward pass over everything, with a last batch that is smaller and labels spread unevenly."""
    data = make_dataset()
    model = make_model(regularization={"kind": "l2", "weight": 1e-2})
    trainer = MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), eval_dataset=data)
    metrics = trainer.evaluate()
    with torch.no_grad():
        outputs = model(**MMDataCollator(make_processor(), model.config)(make_rows()))
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    for name in model.tasks:
        assert metrics[f"eval_{name}_loss"] == pytest.approx(outputs.losses[name].item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("regularization", [None, {"kind": "l2", "weight": 0.05}])
def test_accumulation_equals_one_big_batch(tmp_path, regularization):
    """12 rows at once, 4 at a time, 5 at a time: the same weights after two optimiser steps."""
    data, results = make_dataset(), []
    for batch_size, steps in ((12, 1), (4, 3), (5, 3)):
        model = without_dropout(make_model(regularization=regularization))
        args = make_args(
            tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, max_steps=2,
            optim="sgd", learning_rate=0.1, max_grad_norm=0.0, seed=3,
        )  # fmt: skip
        trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((model.state_dict(), losses))
    for state, losses in results[1:]:
        same(state, results[0][0], rtol=1e-4, atol=1e-5)
        assert losses == pytest.approx(results[0][1], rel=1e-3)


def test_plain_trainer_works(tmp_path):
    data = make_dataset()
    model, processor = make_model(), make_processor()
    trainer = Trainer(
        model,
        make_args(tmp_path, remove_unused_columns=False),
        data_collator=MMDataCollator(processor, model.config),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=MultiTaskMetrics(model.config, processor),
        processing_class=processor,
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_topic_accuracy"] <= 1
    exact = MMTrainer(model, make_args(tmp_path), processing_class=processor, eval_dataset=data).evaluate()
    for name, value in exact.items():
        if name.split("_")[-1] in ("accuracy", "f1", "mae", "micro", "pearson"):
            assert metrics[name] == pytest.approx(value), name


@pytest.mark.slow
def test_it_learns(tmp_path):
    """The picture decides the topic: black is food, white is travel."""
    rows = [
        {"text": "a picnic", "image": np.full((8, 8, 3), 255 * (i % 2), np.uint8), "topic": ["food", "travel"][i % 2]}
        for i in range(16)
    ]
    model = make_model(tasks=[Classification("topic", labels=["food", "travel"])], gates_open=False)
    args = make_args(tmp_path, max_steps=30, per_device_train_batch_size=8, learning_rate=5e-3)
    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_topic_accuracy"] == 1.0
    blind = [{**row, "image": None} for row in rows]
    assert trainer.evaluate(blind)["eval_topic_accuracy"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["vit", "clip-vision", "siglip-vision", "dinov2", "swin"])
def test_resume_restores_every_tensor(tmp_path, vision):
    """Three steps, stopped and resumed, are six steps: weights, optimiser, gates."""
    data = make_dataset()

    def run(path, stop_at=None, resume=None):
        model = without_dropout(make_model("bert", vision, gates_open=False, seed=0 if resume is None else 1))
        args = make_args(path, max_steps=6, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
        trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    same(resumed, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_checkpoint_is_complete(tmp_path):
    data = make_dataset()
    model = make_model()
    args = make_args(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_topic_accuracy",
    )  # fmt: skip
    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=data, eval_dataset=data)
    trainer.train()
    best = MMTransformerForMultiTask.from_pretrained(trainer.state.best_model_checkpoint)
    same(best.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)
    assert (tmp_path / "checkpoint-3" / "processor_config.json").exists()


def test_gates_learn_faster_and_do_not_decay(tmp_path):
    model = make_model(regularization={"kind": "l2", "weight": 0.1})
    args = make_args(tmp_path, weight_decay=0.1, learning_rate=1e-3)
    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=make_dataset())
    groups = trainer.create_optimizer().param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(settings) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        rate, decay = settings[id(p)]
        assert rate == pytest.approx(1e-3 * (GATE_LEARNING_RATE_FACTOR if name.endswith("gate_alpha") else 1)), name
        # Biases, norms, gates and what the regularizer covers are not decayed as well.
        no_decay = (p.ndim == 1 and "null_text" not in name) or name.startswith("heads.")
        assert (decay == 0) == no_decay or "norm" in name.lower() or "gate" in name, name


def test_bad_rows_are_named(tmp_path):
    rows = make_rows()
    rows[7]["image"] = b"not an image"
    args = make_args(tmp_path, num_train_epochs=1, max_steps=-1)
    trainer = MMTrainer(make_model(), args, processing_class=make_processor(), train_dataset=rows)
    with pytest.raises(ValueError, match=r"^row 7, column 'image': .* is not an image that Pillow can read"):
        trainer.train()
    rows[7]["image"], rows[9]["topic"] = None, "animal"
    trainer = MMTrainer(make_model(), args, processing_class=make_processor(), train_dataset=rows)
    with pytest.raises(
        ValueError, match=r"^row 9, column 'topic': task 'topic': label 'animal' is not one of: animals"
    ):
        trainer.train()


def test_bad_image_in_a_datasets_column_is_named(tmp_path):
    rows = [{"text": "a cat", "image": {"bytes": b"nonsense", "path": None}, "topic": "food"}] * 3
    data = Dataset.from_list(
        rows, features=Features({"text": Value("string"), "image": Image(), "topic": Value("string")})
    )
    model = make_model(tasks=[Classification("topic", labels=["food", "travel"])])
    trainer = MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), eval_dataset=data)
    with pytest.raises(ValueError, match="^row 0, column 'image'"):
        trainer.evaluate()
    collator = MMDataCollator(make_processor(), model.config, on_bad_file="drop")
    trainer = MMTrainer(model, make_args(tmp_path), data_collator=collator, eval_dataset=data)
    trainer.evaluate()
    assert collator.num_bad_files == 3


def test_missing_columns_are_named(tmp_path):
    args, processor, data = make_args(tmp_path), make_processor(), make_dataset()
    with pytest.raises(ValueError, match=r"train data set has no column 'text' \(its columns are 'sentence'"):
        MMTrainer(make_model(), args, processing_class=processor, train_dataset=data.rename_column("text", "sentence"))
    nothing = data.select_columns(["text", "image"])
    with pytest.raises(ValueError, match="eval data set has no column for any of the tasks"):
        MMTrainer(make_model(), args, processing_class=processor, eval_dataset={"test": nothing})


@pytest.mark.slow
def test_adapters_are_trained_saved_and_loaded(tmp_path):
    """LoRA in the encoders; fusion and heads, which are new, are trained and saved whole."""
    peft = pytest.importorskip("peft")
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["fusion", "vision_projection", "heads"])
    model = peft.get_peft_model(base, lora)
    trainer = MMTrainer(
        model, make_args(tmp_path), processing_class=make_processor(), train_dataset=make_dataset(),
        eval_dataset=make_dataset(6),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert all(any(part in name for name in changed) for part in ("lora_B", "fusion", "vision_projection", "heads"))
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "adapters")
    size = sum(file.stat().st_size for file in (tmp_path / "adapters").glob("*.safetensors"))
    assert size < (tmp_path / "base/model.safetensors").stat().st_size

    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapters")
    again = MMTrainer(loaded, make_args(tmp_path), processing_class=make_processor(), eval_dataset=make_dataset(6))
    assert again.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_logged_losses_are_means_over_the_steps_that_have_labels(tmp_path, streaming):
    """Also while evaluation comes in between, and where a stream ends."""
    torch.manual_seed(0)
    model = without_dropout(make_model(tasks=[Classification("topic", labels=["a", "b"]), Regression("score")]))
    rows = [{"text": "red cat", "topic": i % 2, "score": 1.0 if i < 4 else None} for i in range(16)]
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streaming else data
    args = make_args(
        tmp_path, learning_rate=0.0, max_steps=4, logging_steps=4, eval_strategy="steps", eval_steps=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=data, eval_dataset=data)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "topic_loss" in entry)
    batch = MMDataCollator(make_processor(), model.config)(rows[:4])
    with torch.no_grad():
        losses = model.eval()(**batch).losses
    assert logs["topic_loss"] == pytest.approx(losses["topic"].item(), rel=1e-4)
    assert logs["score_loss"] == pytest.approx(losses["score"].item(), rel=1e-4)  # in one step of four


@pytest.mark.slow
@pytest.mark.parametrize("form", ["streaming", "torch", "numpy"])
def test_broken_images_of_any_form_of_data_set(tmp_path, form):
    rows = [{"text": "red cat", "image": make_image(0), "topic": "food"} for _ in range(4)]
    data = Dataset.from_list(rows).cast_column("image", Image()).cast_column("image", Image(decode=False))
    broken = data.map(
        lambda row, i: {"image": {"bytes": b"broken", "path": None}} if i == 2 else row, with_indices=True
    )
    broken = broken.cast_column("image", Image())
    broken = broken.to_iterable_dataset() if form == "streaming" else broken.with_format(form)
    model, processor = make_model(), make_processor()
    with pytest.raises(ValueError, match=r"^row 2( of the batch)?, column 'image': .* is not an image that Pillow can"):
        MMTrainer(model, make_args(tmp_path), processing_class=processor, train_dataset=broken).train()
    collator = MMDataCollator(processor, model.config, on_bad_file="drop")
    trainer = MMTrainer(model, make_args(tmp_path, max_steps=1), data_collator=collator, train_dataset=broken)
    trainer.train()
    assert collator.num_bad_files == 1
    trainer.save_model(tmp_path / "saved")  # with the processor of the collator
    assert (tmp_path / "saved/processor_config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": lambda *_: 0}, "takes no compute_loss_func"),
        (
            {"train_dataset": DatasetDict(train=make_dataset(), test=make_dataset())},
            "must be one split, not all of 'train', 'test'",
        ),
        ({"processing_class": make_processor().tokenizer}, "processing_class must be an MMTransformerProcessor, but"),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MMTrainer(make_model(), make_args(tmp_path), **{"processing_class": make_processor(), **options})


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    processor, data = make_processor(), make_dataset()
    with pytest.raises(ValueError, match="computes metrics over all rows at once"):
        MMTrainer(make_model(), make_args(tmp_path, batch_eval_metrics=True), processing_class=processor)
    with pytest.raises(
        ValueError, match="trains a model with tasks, MMTransformerForMultiTask, not MMTransformerModel"
    ):
        MMTrainer(make_model().model, make_args(tmp_path), processing_class=processor)
    args = make_args(tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match=r"Grouping by length needs a column 'length' .* data.map\(lambda row: "):
        MMTrainer(make_model(), args, processing_class=processor, train_dataset=data)


def test_a_missing_image_column_is_told(tmp_path, caplog):
    transformers_logging.get_logger().addHandler(caplog.handler)
    data = make_dataset().rename_column("image", "photo")
    try:
        MMTrainer(make_model(), make_args(tmp_path), processing_class=make_processor(), train_dataset=data)
    finally:
        transformers_logging.get_logger().removeHandler(caplog.handler)
    assert "The train data set has no column 'image' or 'video' (its columns are 'text', 'photo'," in caplog.text


def test_gates_go_by_the_rate_of_the_optimiser(tmp_path):
    sgd = (torch.optim.SGD, {"lr": 0.5})
    trainer = MMTrainer(
        make_model(), make_args(tmp_path), processing_class=make_processor(), optimizer_cls_and_kwargs=sgd
    )
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.5, 0.5, 5.0]


def test_model_init(tmp_path):
    trainer = MMTrainer(
        model_init=lambda: make_model(), args=make_args(tmp_path), processing_class=make_processor(),
        train_dataset=make_dataset(), eval_dataset=make_dataset(4),
    )  # fmt: skip
    trainer.train()
    assert "eval_topic_f1" in trainer.evaluate()


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="takes no label_smoothing_factor: smoothing is an option of the task"):
        MMTrainer(make_model(), make_args(tmp_path, label_smoothing_factor=0.1), processing_class=make_processor())


def test_rows_without_labels_have_no_loss(tmp_path):
    trainer = MMTrainer(make_model(), make_args(tmp_path), processing_class=make_processor())
    output = trainer.predict(make_dataset(5).select_columns(["text", "image"]))
    assert len(output.predictions["topic"]) == 5
    assert not any(name.endswith("loss") for name in output.metrics)


def test_needs_a_processor(tmp_path):
    with pytest.raises(ValueError, match="MMTrainer needs a model and its processor"):
        MMTrainer(make_model(), make_args(tmp_path), train_dataset=make_dataset())


def test_data_parallel_is_refused(tmp_path):
    args = make_args(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        MMTrainer(make_model(), args, processing_class=make_processor(), train_dataset=make_dataset())


def test_iterable_data_set_and_list_of_images(tmp_path):
    def rows():
        for i, row in enumerate(make_rows()):
            yield {**row, "image": [make_image(0), make_image(1)][: i % 3]}

    trainer = MMTrainer(
        make_model(),
        make_args(tmp_path),
        processing_class=make_processor(),
        train_dataset=IterableDataset.from_generator(rows),
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_shared_images_of_a_datasets_column_are_encoded_once(tmp_path):
    """Cells are read undecoded, so equal files are seen to be equal."""
    rows = [{**row, "image": make_image(0)} for row in make_rows()]
    features = make_dataset().features
    trainer = MMTrainer(
        make_model(),
        make_args(tmp_path),
        processing_class=make_processor(),
        eval_dataset=Dataset.from_list(rows, features=features),
    )
    sizes = [batch["pixel_values"].shape[0] for batch in trainer.get_eval_dataloader()]
    assert sizes == [1, 1, 1]


def test_workers_and_group_by_length(tmp_path):
    data = make_dataset().map(lambda row: {"length": len(row["text"])})
    args = make_args(tmp_path, dataloader_num_workers=2, train_sampling_strategy="group_by_length", max_steps=2)
    trainer = MMTrainer(make_model(), args, processing_class=make_processor(), train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_task_without_labels_in_evaluation(tmp_path):
    rows = [{"text": "cat", "a": "x", "b": None}, {"text": "dog", "a": "y", "b": None}]
    model = make_model(vision=None, tasks=[Classification("a", labels=["x", "y"]), Regression("b")])
    metrics = MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), eval_dataset=rows).evaluate()
    assert not any(name.startswith("eval_b") for name in metrics)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_a_loss"])


def test_predict_gives_the_logits_by_task(tmp_path):
    data = make_dataset()
    model = make_model()
    output = MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), eval_dataset=data).predict(data)
    assert {name: value.shape[0] for name, value in output.predictions.items()} == dict.fromkeys(model.tasks, 12)
    with torch.no_grad():
        logits = model(**MMDataCollator(make_processor(), model.config)(make_rows())).logits
    np.testing.assert_allclose(output.predictions["topic"], logits["topic"].numpy(), rtol=1e-4, atol=1e-5)
    assert "test_topic_accuracy" in output.metrics


def test_rows_without_any_label_are_told_before_training(tmp_path):
    features = Features({"text": Value("string"), "topic": Value("string"), "score": Value("float32")})
    rows = [{"text": "red cat", "topic": None, "score": None}] * 8
    model = make_model(tasks=[Classification("topic", labels=["a", "b"]), Regression("score")])
    data = Dataset.from_list(rows, features=features)
    with pytest.raises(
        ValueError, match="No row of the train data set has a label of any task: the columns 'topic', 'score' are empty"
    ):
        MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), train_dataset=data)
    MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), eval_dataset=data)  # for predict
    rows[3] = {"text": "red cat", "topic": "a", "score": None}
    data = Dataset.from_list(rows, features=features)
    MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), train_dataset=data)


@pytest.mark.parametrize("cells", [{}, {"topics": "a"}, {"topic": None, "score": float("nan")}, {"topic": -100}])
@pytest.mark.parametrize("kind", ["list", "map-style", "source"])
def test_rows_of_any_kind_without_labels_are_told(kind, cells, tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    rows = [{"text": "red cat", **cells}] * 4
    make = {"list": list, "map-style": Rows, "source": DataSource}[kind]
    model = make_model(tasks=[Classification("topic", labels=["a", "b"]), Regression("score")])
    args = make_args(tmp_path)
    with pytest.raises(ValueError, match=r"No row of the train data set has a label of any task|has no column"):
        MMTrainer(model, args, processing_class=make_processor(), train_dataset=make(rows))
    rows[3] = {**rows[3], "topic": "b"}
    MMTrainer(model, args, processing_class=make_processor(), train_dataset=make(rows))


@pytest.mark.slow
def test_losses_of_tasks_are_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make_model(regularization={"kind": "l2", "weight": 1e-3}, task_weighting="uncertainty")
    args = make_args(tmp_path, report_to=["tensorboard"])
    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=make_dataset())
    trainer.train()
    [events] = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent)).Reload()
    for name in ("topic_loss", "regularization_loss", "topic_weight"):
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert [event.value for event in found.Scalars(f"train/{name}")] == pytest.approx(logged, rel=1e-5)


def test_evaluation_and_predict_leave_out_no_row(tmp_path):
    args = make_args(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4, per_device_train_batch_size=4)
    trainer = MMTrainer(make_model(), args, processing_class=make_processor(), train_dataset=make_dataset(9))
    rows = make_dataset(9)
    found = trainer.predict(rows)
    assert {len(logits) for logits in found.predictions.values()} == {9}
    args.dataloader_drop_last = False
    assert trainer.predict(rows).metrics["test_loss"] == found.metrics["test_loss"]
    args.dataloader_drop_last = True
    assert len(trainer.get_train_dataloader()) == 2


@pytest.mark.slow
def test_persistent_workers_evaluate_the_rows_that_are_asked(tmp_path):
    rows = make_dataset(8)
    others = {"first": rows.select(range(3)), "second": rows.select(range(3, 8)), "bare": rows.remove_columns("image")}
    losses = {}
    for num_workers in (0, 1):
        args = make_args(
            tmp_path,
            dataloader_num_workers=num_workers,
            dataloader_persistent_workers=num_workers > 0,
        )
        torch.manual_seed(0)
        trainer = MMTrainer(
            make_model(), args, processing_class=make_processor(), train_dataset=rows, eval_dataset=others["first"]
        )
        found = [trainer.evaluate()["eval_loss"]]
        found += [trainer.evaluate(others[name])["eval_loss"] for name in ("second", "bare", "first", "second")]
        losses[num_workers] = [*found, trainer.evaluate()["eval_loss"]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(set(losses[0])) == 3


def test_the_worst_is_never_the_best(tmp_path):
    model, processor = make_model(), make_processor()
    args = make_args(tmp_path, metric_for_best_model="score_mae")
    for metrics in (None, MultiTaskMetrics(model.config, processor)):
        with pytest.raises(
            ValueError, match="'score_mae', and lower values are better: set greater_is_better to False"
        ):
            MMTrainer(model, args, processing_class=processor, eval_dataset=make_dataset(), compute_metrics=metrics)


@pytest.mark.slow
def test_persistent_workers_see_what_has_changed_in_place(tmp_path):
    rows = [{"text": f"a red {'cat ' * i}", "image": make_image(i), "score": float(i)} for i in range(4)]
    processor = make_processor()
    found = {}
    for num_workers in (0, 1):
        args = make_args(
            tmp_path / str(num_workers),
            dataloader_num_workers=num_workers,
            dataloader_persistent_workers=num_workers > 0,
        )
        model = make_model(tasks=[Regression("score")], freeze=["vision"])
        with torch.no_grad():
            model.heads.score.out_proj.weight.mul_(50)
        changing = list(rows)
        trainer = MMTrainer(
            model, args, processing_class=processor, eval_dataset=changing, feature_cache=tmp_path / f"c{num_workers}"
        )
        values = [trainer.evaluate()]
        with torch.no_grad():
            for parameter in model.model.encoder("vision").parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        values.append(trainer.evaluate())
        changing[0] = {**rows[0], "score": 100.0}
        values.append(trainer.evaluate())
        trainer.data_collator = MMDataCollator(make_processor(), model.config, max_length=3)
        values.append(trainer.evaluate())
        found[num_workers] = [metrics["eval_score_mse"] for metrics in values]
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert len(set(found[0])) == 4


@pytest.mark.slow
def test_persistent_workers_are_kept_during_a_training(tmp_path):
    """As long as nothing else is to be read."""
    loaders = []

    class Watching(MMTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            loaders.append(super().get_eval_dataloader(eval_dataset))
            return loaders[-1]

        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                self.data_collator = MMDataCollator(make_processor(), self.model.config)
            return super().training_step(*args, **kwargs)

    rows = make_dataset(4)
    args = make_args(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )  # fmt: skip
    trainer = Watching(make_model(), args, processing_class=make_processor(), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    first, second, third, fourth, _ = loaders
    assert first is second
    assert third is fourth
    assert len({id(loader) for loader in loaders}) == 3


def test_no_rows_to_evaluate_are_told(tmp_path):
    trainer = MMTrainer(make_model(), make_args(tmp_path), processing_class=make_processor())
    with pytest.raises(ValueError, match="The data set to evaluate or predict has no rows"):
        trainer.evaluate(make_dataset(3).select([]))


def test_the_best_metric_must_be_measured(tmp_path):
    model = make_model()
    name = next(task.name for task in model.tasks.values() if task.kind == "classification")
    args = make_args(tmp_path, metric_for_best_model=f"{name}_accuracy")
    rows = make_dataset()
    with pytest.raises(ValueError, match=f"so task '{name}' is not measured there"):
        MMTrainer(
            model, args, processing_class=make_processor(), train_dataset=rows, eval_dataset=rows.remove_columns(name)
        )


def test_the_best_metric_may_be_a_recall():
    tasks, rows = [Retrieval("find"), Classification("tone", labels=["a", "b"])], [{"text": "a", "image": "b.png"}]
    for name in ("eval_find_mean_recall", "find_from_text_recall_at_5", "find_loss", "tone_f1"):
        check_best_metric(TrainingArguments("out", metric_for_best_model=name), tasks, rows)
    with pytest.raises(ValueError, match="did you mean 'eval_find_from_text_recall_at_5'"):
        check_best_metric(TrainingArguments("out", metric_for_best_model="find_from_text_recall_at_6"), tasks, rows)


@pytest.mark.parametrize("form", ["table", "list"])
def test_rows_that_are_left_are_numbered_as_in_the_whole(tmp_path, form):
    """Some rows are held out, and the others are shuffled, but messages name the row of the user."""
    rows = make_rows(24)
    for i, row in enumerate(rows):
        row["image"] = {"bytes": None, "path": "nowhere.png"} if i == 17 else png(make_image(1))
    data = rows if form == "list" else Dataset.from_list(rows).cast_column("image", Image())
    args = MMTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, num_train_epochs=1)
    model = make_model(linear_probe=True, gates_open=False)
    with pytest.raises(ValueError, match=r"row 17, column 'image': image 'nowhere.png' does not exist"):
        MMTrainer(model, args, processing_class=make_processor(), train_dataset=data).train()


def png(image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_only_evaluation_before_training_is_refused_in_several_processes(tmp_path, monkeypatch):
    data = make_dataset(4)

    def make_trainer(name):
        made = MMTrainer(
            make_model(), make_args(tmp_path / name, max_steps=1), processing_class=make_processor(),
            train_dataset=data, eval_dataset=data,
        )  # fmt: skip
        made.is_fsdp_enabled = True  # whose models accelerate prepares again
        return made

    trained, evaluated = make_trainer("trained"), make_trainer("evaluated")
    trained.is_fsdp_enabled = False
    trained.train()
    trained.is_fsdp_enabled = True
    for trainer in (trained, evaluated):
        trainer.evaluate()
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    trained._begin_training()
    with pytest.raises(ValueError, match="has evaluated before training"):
        evaluated._begin_training()


def test_adapters_are_loaded_into_the_model_that_is_given_or_that_of_the_trainer(tmp_path, monkeypatch):
    module, loaded = sys.modules["mm_transformers.training.trainer"], []
    monkeypatch.setattr(module, "has_own_adapters", lambda model: True)
    monkeypatch.setattr(module, "load_adapters", lambda model, folder: loaded.append((model, folder)))
    trainer = MMTrainer(
        make_model(), make_args(tmp_path), processing_class=make_processor(), train_dataset=make_dataset(4)
    )
    other = make_model()
    trainer._load_from_checkpoint("a")
    trainer._load_from_checkpoint("b", other)
    assert loaded == [(trainer.model, "a"), (other, "b")]
