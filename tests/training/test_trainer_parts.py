"""The parts of the trainer, each alone."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerState

from mm_transformers import Classification, Regression
from mm_transformers.training.checkpoints.callback_states import restore_callbacks
from mm_transformers.training.checkpoints.folders import SAVING, newest_complete_checkpoint, why_not_written
from mm_transformers.training.checkpoints.staging import staged_checkpoint
from mm_transformers.training.divergence import check_finite
from mm_transformers.training.objective.step_losses import StepLosses, divisors_of
from mm_transformers.training.rows.kept_loaders import KeptLoaders
from mm_transformers.training.rows.loader_inputs import LoaderInputs
from mm_transformers.training.rows.row_order import order_of_rows, tell_changes
from mm_transformers.training.rows.stream_shares import ShareOfStream, WithoutRepeats, unlabel_repeated_rows


# One process, whose mean is its own value.
ALONE = SimpleNamespace(reduce=lambda values, reduction: values)
TASKS = {"topic": Classification("topic", labels=["a", "b"]), "score": Regression("score")}


def batch(topic: list[int], score: list[float]) -> dict:
    return {"labels": {"topic": torch.tensor(topic), "score": torch.tensor(score)}}


def test_losses_are_means_over_the_steps_that_had_any():
    nan, losses = torch.nan, StepLosses()
    steps = [[batch([0, -100], [nan, nan]), batch([1, 1], [nan, nan])], [batch([0, 1], [1.0, nan])]]
    for step in steps:
        divisors = divisors_of(TASKS, step, ALONE, torch.device("cpu"))
        losses.count_labels(divisors, TASKS)
        for _ in step:
            losses.add({"topic": torch.tensor(0.5), "score": torch.tensor(4.0 * (len(step) == 1))}, divisors)
    assert {name: count.item() for name, count in losses.num_labels.items()} == {"topic": 5, "score": 1}
    resumed = StepLosses()
    resumed.load(losses.state())
    for those in (losses, resumed):
        assert those.take_logs(ALONE) == {"topic_loss": 0.75, "score_loss": 4.0}
        assert those.take_logs(ALONE) == {}
        assert those.num_labels["topic"] == 5


@pytest.mark.parametrize(("rank", "kept"), [(0, 4), (1, 1), (2, 0)])
def test_repeated_rows_lose_their_labels(rank, kept):
    """Of 17 rows in batches of 4 in three processes, five are left for the last batches."""
    last = batch([0, 1, 0, 1], [0.0, 1.0, 2.0, 3.0])
    unlabel_repeated_rows(last, num_rows=17, batch_size=4, rank=rank, num_processes=3)
    assert (last["labels"]["topic"] != -100).tolist() == [i < kept for i in range(4)]
    assert (~last["labels"]["score"].isnan()).tolist() == [i < kept for i in range(4)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("rows", [Stream(), [0, 1, 2]])
def test_streams_are_shared_out_among_processes(rows, num_processes):
    inputs = LoaderInputs(rows, list)
    inputs.share(2, num_processes, split_batches=False, is_training=True)
    is_shared = num_processes > 1 and rows != [0, 1, 2]
    assert isinstance(inputs.rows, ShareOfStream) == isinstance(inputs.collator, WithoutRepeats) == is_shared


def test_a_loader_that_would_read_something_else_is_dropped():
    kept, rows, others = KeptLoaders({}), [1], [1]
    kept.keep_if_same("eval", rows)
    kept.loaders["eval"] = "a loader"
    kept.keep_if_same("eval", rows)
    assert "eval" in kept.loaders
    kept.keep_if_same("eval", others)
    assert "eval" not in kept.loaders


def test_another_order_of_rows_is_told(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("mm_transformers"), "propagate", True)
    args = SimpleNamespace(
        gradient_accumulation_steps=2, world_size=2, seed=1, data_seed=None, train_sampling_strategy="random"
    )
    now = order_of_rows([{}], args, 4)
    assert now == {"rows_per_step": 16, "seed": 1}
    tell_changes({name: str(number) for name, number in now.items()}, now)
    tell_changes({}, now)  # of an earlier version
    assert not caplog.records
    tell_changes({"rows_per_step": "8", "seed": "2"}, now)
    assert [" 8 rows per optimiser step" in r.message or "seed=2" in r.message for r in caplog.records] == [True, True]


def test_the_patience_of_early_stopping_is_restored():
    before, after = EarlyStoppingCallback(3), EarlyStoppingCallback(3)
    before.early_stopping_patience_counter = 3
    state = TrainerState(stateful_callbacks={"EarlyStoppingCallback": before.state()})
    assert restore_callbacks([after], state, is_restored=False)
    assert after.early_stopping_patience_counter == 3
    # One that the checkpoint does not know is saved from now on.
    state = TrainerState(stateful_callbacks={})
    assert not restore_callbacks([EarlyStoppingCallback(3)], state, is_restored=False)
    assert "EarlyStoppingCallback" in state.stateful_callbacks


def test_a_checkpoint_is_complete_or_not_there(tmp_path):
    def write(step: int, error: Exception | None = None) -> None:
        with staged_checkpoint(str(tmp_path), step, writes=True, wait=lambda: None) as folder:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"weights")
            assert folder.parent.name == SAVING
            if error is not None:
                raise error

    write(1)
    with pytest.raises(OSError, match="The checkpoint of step 2 could not be written .* checkpoint-1 is the newest"):
        write(2, OSError(errno.ENOSPC, "full"))
    with pytest.raises(KeyError):
        write(3, KeyError("a mistake"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert Path(newest_complete_checkpoint(tmp_path)).name == "checkpoint-1"


def test_the_reason_of_a_failed_write_is_found(tmp_path):
    full = os.strerror(errno.ENOSPC)
    of_rust = RuntimeError(f"I/O error: {full} (os error {errno.ENOSPC})")
    assert why_not_written(of_rust, tmp_path) == full
    caused = KeyError("a")
    caused.__cause__ = OSError(errno.EROFS, "read-only")
    assert why_not_written(caused, tmp_path) == os.strerror(errno.EROFS)
    assert why_not_written(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path) == (
        "torch could not write a file"
    )
    for error in (OSError(errno.ENOENT, "gone"), RuntimeError("os error 2"), ValueError("a mistake")):
        assert why_not_written(error, tmp_path) is None


def test_a_number_that_is_not_finite_is_told(tmp_path):
    check_finite({"topic": torch.ones(2)}, "loss", 3, lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"at step 3 the loss of score is NaN or infinite \(there is no checkpoint"):
        check_finite({"topic": 1.0, "score": torch.tensor([1.0, torch.inf])}, "loss", 3, lambda: str(tmp_path))
