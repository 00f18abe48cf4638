"""A training that has diverged stops with a sentence; nothing of it is scored, and the last good checkpoint stays."""

import math

import pytest
import torch
from probe_start import CPU, TASKS, make_rows, new_model
from tiny import make_processor
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from mm_transformers import MMTrainer, MMTransformerForMultiTask, MultiTaskMetrics


class Spoil(TrainerCallback):
    """Makes a weight NaN after some step, as an overflow would."""

    def __init__(self, step, name="topic"):
        self.step, self.name = step, name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if f"heads.{self.name}" in n).fill_(math.nan)


def make_trainer(folder, step, **kwargs):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8, **kwargs}
    args = TrainingArguments(str(folder), **CPU, **options)
    rows = make_rows(24)
    return MMTrainer(
        new_model(tasks=TASKS[:2]), args, processing_class=make_processor(), train_dataset=rows,
        eval_dataset=rows[:8], callbacks=[Spoil(step)],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (3, {}, r"the loss of topic is NaN or infinite \(.*checkpoint-2 is the newest checkpoint before it\)"),
        (2, {}, r"the weight of heads\.topic.* is NaN or infinite \(there is no checkpoint before it\)"),
        (6, {"save_steps": 4}, r"the weight of heads\.topic.* \(.*checkpoint-4 is the newest"),
        (
            3, {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 2},
            r"the value of eval_(topic_)?loss is NaN or infinite \(.*checkpoint-2 is",
        ),
    ],
)  # fmt: skip
def test_it_stops_and_keeps_the_last_good_checkpoint(tmp_path, step, options, message):
    trainer = make_trainer(tmp_path, step, **options)
    with pytest.raises(ValueError, match=f"Training has diverged: at step . {message}"):
        trainer.train()
    for folder in tmp_path.glob("checkpoint-*"):
        model = MMTransformerForMultiTask.from_pretrained(folder)
        assert all(p.isfinite().all() for p in model.parameters())


def test_nan_is_never_scored():
    model = new_model(tasks=TASKS[:2])
    metrics = MultiTaskMetrics(model.config)
    labels = {"topic": torch.tensor([0, 1, 2]).numpy(), "mood": torch.tensor([0, 1, 1]).numpy()}
    logits = {"topic": torch.full((3, 3), math.nan).numpy(), "mood": torch.tensor([[1.0, 0], [0, 1], [0, 1]]).numpy()}
    found = metrics(EvalPrediction(predictions=logits, label_ids=labels))
    assert math.isnan(found["topic_loss"])
    assert "topic_accuracy" not in found
    assert found["mood_accuracy"] == 1.0
