"""
A small but whole training that may be killed and started again by the same command. Run as a script it forks: each line
that it reads, a folder and a number of steps, starts a training in a process of its own, whose id it prints, and later
how it ended. So the libraries are imported once.
"""

import os
import sys

import torch
from tiny import make_image, make_model, make_processor
from transformers import TrainingArguments

from mm_transformers import Classification, MMTrainer, Regression


# The ends of the names of what a log says of time.
TIMES = ("runtime", "per_second")


def make_rows(n: int = 10) -> list[dict]:
    texts = ["red cat", "green dog in the rain", "a lovely small picnic is over"]
    return [
        {
            "text": texts[i % 3],
            "image": None if i % 4 == 1 else make_image(i % 3),
            "topic": [0, 1, None][i % 3],
            "score": None if i % 5 == 2 else i / 10,
        }
        for i in range(n)
    ]


def make_trainer(output_dir, seed: int = 0, callbacks=None, **kwargs) -> MMTrainer:
    tasks = [Classification("topic", labels=["animals", "food"]), Regression("score")]
    model = make_model(tasks=tasks, modality_dropout=0.3, num_fusion_layers=1, seed=seed)
    defaults = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-2,
        lr_scheduler_type="cosine", warmup_steps=2, logging_steps=3, save_strategy="steps", save_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, log_level="error",
    )  # fmt: skip
    args = TrainingArguments(str(output_dir), **{**defaults, **kwargs})
    return MMTrainer(
        model, args, processing_class=make_processor(), train_dataset=make_rows(), eval_dataset=make_rows(4),
        callbacks=callbacks,
    )  # fmt: skip


def log_of(state) -> list[dict]:
    return [{key: x for key, x in entry.items() if not key.endswith(TIMES)} for entry in state.log_history]


def assert_equal(first, second) -> None:
    """Of weights, states of optimisers, logs: nested and without any tolerance."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    else:
        assert first == second


def main(output_dir: str, steps: str) -> None:
    trainer = make_trainer(output_dir, max_steps=int(steps), save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


if __name__ == "__main__":
    torch.set_num_threads(1)
    import mm_transformers.training.trainer  # noqa: F401  (what is otherwise imported when it is first used)

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            os.dup2(2, 1)  # what it prints is no answer
            try:
                main(*line.split())
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
