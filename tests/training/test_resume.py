"""Checkpoints that are whole or not there, and resumed training that equals an uninterrupted one, bit for bit."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from killable import TIMES, assert_equal, log_of, make_trainer
from safetensors.torch import load_file
from tiny import make_model, make_processor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mm_transformers import Classification, MMDataCollator, MMTrainer
from mm_transformers.data.sources import ROW_KEY
from mm_transformers.training.checkpoints import folders as checkpoints
from mm_transformers.training.checkpoints.folders import (
    DELETING,
    MANIFEST_NAME,
    SAVING,
    discard,
    make_own_folder,
    newest_complete_checkpoint,
    publish,
    rotate,
    write_manifest,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a training with checkpoints after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, max_steps=2).train()
    return folder


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_labels_in_another_order_are_told(tmp_path):
    """The head would answer with the names of other classes."""

    def make(labels):
        model = make_model(tasks=[Classification("topic", labels=labels)])
        args = TrainingArguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, report_to=[], use_cpu=True)
        rows = [{"text": "a cat", "topic": "animals"}, {"text": "a pie", "topic": "food"}]
        return MMTrainer(model, args, processing_class=make_processor(), train_dataset=rows)

    make(["animals", "food"]).train()
    make(["animals", "food"]).train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match=r"task 'topic' has labels \['animals', 'food'\] there, but labels \['food', 'a"
    ):
        make(["food", "animals"]).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="task 'topic' has labels"):
        make(["animals", "food", "travel"]).train(resume_from_checkpoint=True)
    # A checkpoint of adapters has no config.
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "config.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match="task 'topic' has labels"):
        make(["food", "animals"]).train(resume_from_checkpoint=True)


# Recognition


@pytest.mark.slow
def test_a_checkpoint_that_lacks_anything_is_skipped(run_dir, caplog):
    """Any one file removed, cut, or grown."""
    newest, previous = run_dir / "checkpoint-2", str(run_dir / "checkpoint-1")
    assert newest_complete_checkpoint(run_dir) == str(newest)
    names = [name for name in files_of(newest) if name != MANIFEST_NAME]
    assert len(names) >= 9
    for name in names:
        path, content = newest / name, (newest / name).read_bytes()
        path.unlink()
        assert newest_complete_checkpoint(run_dir) == previous, name
        for other in (content[:-1], content[: len(content) // 2], b"", content + b" "):
            path.write_bytes(other)
            if len(other) != len(content):
                assert newest_complete_checkpoint(run_dir) == previous, name
        path.write_bytes(content)
        assert newest_complete_checkpoint(run_dir) == str(newest)
    manifest = newest / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert newest_complete_checkpoint(run_dir) == previous


def test_manifest_covers_folders_and_files_of_anybody(tmp_path):
    folder = tmp_path / "checkpoint-7"
    for name in ("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "of_mine.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("something")
    write_manifest(folder)
    assert newest_complete_checkpoint(tmp_path) == str(folder)
    assert set(json.loads((folder / MANIFEST_NAME).read_text())["files"]) == set(files_of(folder)) - {MANIFEST_NAME}
    (folder / "pytorch_model_fsdp_0/.metadata").unlink()
    assert newest_complete_checkpoint(tmp_path) is None


def test_checkpoints_of_the_plain_trainer(run_dir):
    """Without a manifest: what the Trainer reads must be there and have its end."""
    newest, previous = run_dir / "checkpoint-2", str(run_dir / "checkpoint-1")
    (newest / MANIFEST_NAME).unlink()
    assert newest_complete_checkpoint(run_dir) == str(newest)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        path, content = newest / name, (newest / name).read_bytes()
        for other in (None, content[:-10], content[: len(content) // 2], b""):
            path.unlink() if other is None else path.write_bytes(other)
            assert newest_complete_checkpoint(run_dir) == previous, name
        path.write_bytes(content)
        assert newest_complete_checkpoint(run_dir) == str(newest)


def test_a_plain_checkpoint_in_shards(run_dir):
    folder = run_dir / "checkpoint-2"
    (folder / MANIFEST_NAME).unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert newest_complete_checkpoint(run_dir) == str(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert newest_complete_checkpoint(run_dir) == str(run_dir / "checkpoint-1")


def test_nothing_there(tmp_path, run_dir):
    assert newest_complete_checkpoint(tmp_path / "nowhere") is None
    trainer = make_trainer(tmp_path / "new", max_steps=1)
    assert trainer.train(resume_from_checkpoint=True).global_step == 1
    for path, message in {
        tmp_path / "nowhere": "There is no checkpoint '.*nowhere' to resume from",
        tmp_path: "not a complete checkpoint: trainer_state.json is missing; ",
    }.items():
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(path))
    (run_dir / "checkpoint-2/scheduler.pt").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-2', which is not a complete checkpoint: scheduler.pt is missing; "
    ):
        trainer.train(resume_from_checkpoint=run_dir / "checkpoint-2")


def test_deleting_is_never_seen_half_done(run_dir, monkeypatch):
    """A process that dies while it deletes leaves nothing that anybody takes for a checkpoint."""
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *args, **kwargs: None)
    discard(run_dir / "checkpoint-2")
    assert get_last_checkpoint(run_dir) == newest_complete_checkpoint(run_dir) == str(run_dir / "checkpoint-1")
    assert (run_dir / DELETING / "checkpoint-2/model.safetensors").exists()
    monkeypatch.undo()
    make_trainer(run_dir, max_steps=1).train(resume_from_checkpoint=True)
    assert not (run_dir / DELETING).exists()


def test_what_was_written_but_not_yet_in_its_place(run_dir):
    make_own_folder(run_dir, SAVING)
    (run_dir / "checkpoint-2").rename(run_dir / SAVING / "checkpoint-2")
    assert get_last_checkpoint(run_dir) == str(run_dir / "checkpoint-1")
    make_trainer(run_dir, max_steps=2).train(resume_from_checkpoint=True)
    assert newest_complete_checkpoint(run_dir) == str(run_dir / "checkpoint-2")
    assert not (run_dir / SAVING).exists()


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_deletes_what_is_of_no_use_first(run_dir, limit):
    """A half of a later step must not count as the newest, nor push a complete checkpoint out."""
    shutil.copytree(run_dir / "checkpoint-2", run_dir / "checkpoint-9")
    (run_dir / "checkpoint-9/model.safetensors").unlink()
    rotate(str(run_dir), limit, {str(run_dir / "checkpoint-2")})
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-1"} - (
        {"checkpoint-1"} if limit == 1 else set()
    )


@pytest.mark.slow
def test_there_is_always_a_complete_checkpoint(tmp_path, monkeypatch):
    """With save_total_limit=1, looked at before and after whatever changes the name of a folder or deletes one."""
    seen, first = [], []
    for owner, name in ((Path, "rename"), (shutil, "rmtree")):
        original = getattr(owner, name)

        def watched(*args, original=original, **kwargs):
            seen.append(newest_complete_checkpoint(tmp_path))
            result = original(*args, **kwargs)
            seen.append(newest_complete_checkpoint(tmp_path))
            return result

        monkeypatch.setattr(owner, name, watched)
    make_trainer(tmp_path, max_steps=4, save_total_limit=1).train()
    first = next(i for i, path in enumerate(seen) if path is not None)
    assert None not in seen[first:]
    assert len(seen[first:]) > 10
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


# Disks that are full


def environment() -> dict:
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_file_that_cannot_be_written(run_dir, file, monkeypatch):
    """The system refuses to let a file grow, as on a full disk, in the midst of the file named."""
    # The smaller files before it must fit.
    size = (run_dir / "checkpoint-2" / file).stat().st_size
    saves = {"model.safetensors": "save_model", "optimizer.pt": "_save_optimizer_and_scheduler"}
    name = saves.get(file, "_save_rng_state")
    step = getattr(Trainer, name)
    trainer = make_trainer(run_dir, max_steps=3)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, old[1]))
        return step(*args, **kwargs)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(Trainer, name, limited)
    try:
        with pytest.raises(
            OSError, match=r"^The checkpoint of step 3 could not be written to .* checkpoint-2 is the n"
        ):
            trainer.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    monkeypatch.undo()
    assert newest_complete_checkpoint(run_dir) == get_last_checkpoint(run_dir) == str(run_dir / "checkpoint-2")
    assert not (run_dir / SAVING).exists()
    # With room again, training goes on.
    assert make_trainer(run_dir, max_steps=3).train(resume_from_checkpoint=True).global_step == 3


# Exactness


SETTINGS = {
    "accumulation": dict(),
        "workers": dict(dataloader_num_workers=1, gradient_accumulation_steps=1),
    "epochs": dict(
        eval_strategy="epoch", logging_strategy="epoch", load_best_model_at_end=False, num_train_epochs=3, max_steps=-1
    ),
    "evaluation": dict(eval_strategy="steps", eval_steps=2, logging_steps=4),
    "bf16": dict(bf16=True),
    "plateau": dict(
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0}, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="loss",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_is_as_if_never_stopped(tmp_path, setting):
    """From checkpoints in the middle of an epoch (of 3 steps, or 5), at its end, at the very end."""
    options = {"max_steps": 7, **SETTINGS[setting]}
    whole = make_trainer(tmp_path / "whole", **options)
    output = whole.train()
    last = whole.state.global_step
    steps = {"accumulation": range(1, last + 1), "epochs": [3, 4, last]}.get(setting, [2, last])
    for step in steps:
        trainer = make_trainer(tmp_path / "again", seed=1, **options, **{"save_steps": 50})
        again = trainer.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert trainer.state.global_step == last
        assert_equal(trainer.model.state_dict(), whole.model.state_dict())
        assert_equal(trainer.optimizer.state_dict(), whole.optimizer.state_dict())
        assert_equal(trainer.lr_scheduler.state_dict(), whole.lr_scheduler.state_dict())
        assert_equal(log_of(trainer.state), log_of(whole.state))
        assert again.training_loss == output.training_loss
        assert trainer.state.total_flos == whole.state.total_flos


@pytest.mark.slow
def test_early_stopping_is_as_if_never_stopped(tmp_path):
    """With a learning rate of 0 nothing gets better, so training stops at step 1 + patience."""
    options = dict(
        learning_rate=0.0, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", max_steps=9,
        load_best_model_at_end=True, save_total_limit=3,
    )  # fmt: skip
    make_trainer(tmp_path, callbacks=[EarlyStoppingCallback(3)], **options).train()
    for step in (3, 4):
        trainer = make_trainer(tmp_path / "again", callbacks=[EarlyStoppingCallback(3)], **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert trainer.state.global_step == 4
    # One that is added later does not hinder saving.
    trainer = make_trainer(tmp_path / "plain", max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer = make_trainer(tmp_path / "plain", callbacks=[EarlyStoppingCallback(3)], **{**options, "max_steps": 2})
    assert trainer.train(resume_from_checkpoint=True).global_step == 2


@pytest.mark.slow
def test_best_checkpoint_is_where_it_is_said_to_be(tmp_path):
    options = dict(
        eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", load_best_model_at_end=True, max_steps=4,
        save_total_limit=1,
    )  # fmt: skip
    trainer = make_trainer(tmp_path, learning_rate=0.0, **options)  # nothing gets better than the first
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert_equal(load_file(best / "model.safetensors"), dict(trainer.model.state_dict()))


@pytest.mark.slow
def test_saving_draws_no_random_numbers(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer._save_checkpoint(trainer.model, trial=None)
    assert_equal(before, (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()))


@pytest.mark.slow
def test_weights_alone(tmp_path):
    """save_only_model: complete, and resumed with a new optimiser."""
    make_trainer(tmp_path, max_steps=2, save_only_model=True).train()
    assert "optimizer.pt" not in files_of(tmp_path / "checkpoint-2")
    trainer = make_trainer(tmp_path, max_steps=3, save_only_model=True)
    assert trainer.train(resume_from_checkpoint=True).global_step == 3


@pytest.mark.slow
def test_what_is_pushed_is_complete_and_stays_where_it_is(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((folder, checkpoints.what_is_missing(folder))),
    )
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (1, 2)]
    assert all((Path(folder) / MANIFEST_NAME).exists() for folder, _ in pushed)


_TWO_PROCESSES = """
import sys
from killable import assert_equal, log_of, make_trainer
folder = sys.argv[1]
options = dict(max_steps=5, save_total_limit=2, gradient_accumulation_steps=1)
whole = make_trainer(folder + "/whole", **options)
assert whole.args.world_size == 2
whole.train()
again = make_trainer(folder + "/again", seed=1, **options)
again.train(resume_from_checkpoint=folder + "/whole/checkpoint-4")
assert_equal(dict(again.model.state_dict()), dict(whole.model.state_dict()))
assert_equal(log_of(again.state), log_of(whole.state))
"""


@pytest.mark.nightly
def test_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)], env={**environment(), "ACCELERATE_USE_CPU": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = files_of(tmp_path / "whole/checkpoint-5")
    assert {"rng_state_0.pth", "rng_state_1.pth", MANIFEST_NAME} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4), (2, 1), (4, 2)])
def test_another_number_of_rows_per_step(batch_size, accumulation, tmp_path, monkeypatch, caplog):
    """With as many rows per step, training goes on with the rows that come next; otherwise it says so."""
    seen: list[int] = []
    collate = MMDataCollator.__call__

    def watched(self, rows):
        seen.extend(row[ROW_KEY] for row in rows)
        return collate(self, rows)

    monkeypatch.setattr(MMDataCollator, "__call__", watched)
    whole = make_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=5)
    whole.train()
    after_step_1, seen[:] = seen[4:], []
    again = make_trainer(
        tmp_path / "again", per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        max_steps=5,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    is_same = batch_size * accumulation == 4
    assert (seen[:14] == after_step_1[:14]) == is_same  # further ones are only read ahead
    told = f"written with 4 rows per optimiser step, but now a step has {batch_size * accumulation}"
    assert (told in caplog.text) == (not is_same)


# Killed for real


class Nursery:
    """Trainings in processes of their own."""

    def __init__(self, log: Path):
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "killable.py")], env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()

    def start(self, folder: Path, steps: int) -> int:
        print(folder, steps, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self) -> int:
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))


def kill_in_a_save(pid: int, folder: Path, name: str, delay: float) -> None:
    """Waits until the folder in which something is being written or deleted appears, and a moment longer."""
    while not (folder / name).exists():
        os.kill(pid, 0)
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)


def step_of(checkpoint: str) -> int:
    return int(checkpoint.rsplit("-", 1)[1])


def train_with_kills(tmp_path: Path, steps: int, kills: list[tuple[str, float]]) -> dict[str, int]:
    """Trains without and with kills, checks that the results are the same, and counts what the kills hit."""
    folder, hits = tmp_path / "killed", {"saving": 0, "deleting": 0, "other": 0}
    with Nursery(tmp_path / "log.txt") as nursery:
        nursery.start(tmp_path / "whole", steps)
        assert nursery.end() == 0, (tmp_path / "log.txt").read_text()
        for where, delay in kills:
            before = newest_complete_checkpoint(folder)
            pid = nursery.start(folder, steps)
            if where == "anywhere":
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
            else:
                kill_in_a_save(pid, folder, where, delay)
            assert nursery.end() == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
            left = [name for name in (SAVING, DELETING) if any((folder / name).glob("*"))]
            hits["saving" if SAVING in left else "deleting" if DELETING in left else "other"] += 1
            # Whatever was hit, the newest complete checkpoint is that of before, or a later one.
            if before is not None:
                assert step_of(newest_complete_checkpoint(folder)) >= step_of(before)
        nursery.start(folder, steps)
        assert nursery.end() == 0, (tmp_path / "log.txt").read_text()
    whole, last = tmp_path / "whole", f"checkpoint-{steps}"
    assert files_of(whole) == files_of(folder)
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_equal(*(torch.load(path / last / name, weights_only=True) for path in (whole, folder)))
    for name in ("model.safetensors", "running_losses.safetensors"):
        assert_equal(*(load_file(path / last / name) for path in (whole, folder)))
    states = [json.loads((path / last / "trainer_state.json").read_text()) for path in (whole, folder)]
    logs = [[{k: x for k, x in e.items() if not k.endswith(TIMES)} for e in s["log_history"]] for s in states]
    assert_equal(*logs)
    assert len([entry for entry in logs[0] if "topic_loss" in entry]) == steps // 3
    return hits


@pytest.mark.slow
def test_killed_three_times(tmp_path):
    rng = random.Random(0)
    kills = [(SAVING, rng.uniform(0, 0.02)), ("anywhere", rng.uniform(0, 0.4)), (DELETING, 0.0)]
    train_with_kills(tmp_path, 9, kills)


@pytest.mark.nightly
def test_killed_twenty_times(tmp_path):
    rng = random.Random(1)
    kills = [(SAVING, rng.uniform(0, 0.1)) for _ in range(10)] + [(DELETING, rng.uniform(0, 0.003)) for _ in range(4)]
    kills += [("anywhere", rng.uniform(0, 1)) for _ in range(6)]
    rng.shuffle(kills)
    hits = train_with_kills(tmp_path, 120, kills)
    print(f"The kills hit: {hits}.")
    assert hits["saving"] >= 5


def test_a_checkpoint_replaces_an_older_one_and_nothing_else(tmp_path):
    def write(name, content):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        (folder / "weights").write_text(content)
        write_manifest(folder)
        return folder

    final = write("checkpoint-1", "old")
    publish(write("staged", "new"), final)
    assert (final / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    # What is no checkpoint of a training is kept.
    notes = tmp_path / "checkpoint-2"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    publish(write("staged", "new"), notes)
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "new"
    assert (tmp_path / "checkpoint-2-kept-1" / "notes.txt").read_text() == "mine"
