"""Files of the user: what carries no mark of this package is never deleted, and nothing is written through a link."""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from killable import make_rows, make_trainer
from safetensors.torch import save_file
from tiny import make_model, make_processor

from mm_transformers import MMTransformerForMultiTask, MMTransformerProcessor
from mm_transformers.cli.space import write_space
from mm_transformers.data.feature_cache import _evict
from mm_transformers.data.feature_store import Features, FeatureStore
from mm_transformers.model import safe_writing
from mm_transformers.model.safe_writing import saved_aside, write_atomically
from mm_transformers.training.card.card_file import write_card
from mm_transformers.training.card.facts import CardFacts
from mm_transformers.training.checkpoints import folders as checkpoints
from mm_transformers.training.checkpoints import lock
from mm_transformers.training.checkpoints.folders import (
    DELETING,
    SAVING,
    discard,
    make_own_folder,
    newest_complete_checkpoint,
    publish,
    rotate,
    tidy,
)
from mm_transformers.training.checkpoints.lock import LOCK_NAME, locked


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    return folder


def is_whole(folder: Path) -> bool:
    return (folder / "thesis.txt").read_text() == "years of work"


# Folders


@pytest.mark.slow
def test_folders_of_the_user_survive_a_training(tmp_path):
    """Whatever is called like a folder of a training, or begins like the name of a checkpoint."""
    names = [SAVING, DELETING, "checkpoint-2", "checkpoint-1-backup", "checkpoint-best", "checkpoint-77"]
    theirs = [fill(tmp_path / name) for name in names]
    trainer = make_trainer(
        tmp_path, max_steps=3, save_total_limit=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", learning_rate=0.0,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    for folder in theirs:
        if folder.name == "checkpoint-2":  # in the way of one of the training: it is kept beside
            folder = tmp_path / "checkpoint-2-kept-1"
        assert is_whole(folder), folder
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {*names, "checkpoint-2-kept-1", "checkpoint-1"} - {"checkpoint-2"}


def test_links_in_the_place_of_own_folders(tmp_path):
    outside = fill(tmp_path / "outside")
    out = tmp_path / "out"
    out.mkdir()
    for name in (SAVING, DELETING, "checkpoint-5"):
        (out / name).symlink_to(outside)
    tidy(out)
    staged = make_own_folder(out, SAVING) / "checkpoint-5"
    staged.mkdir()
    (staged / "trainer_state.json").write_text("{}")
    publish(staged, out / "checkpoint-5")
    assert (out / "checkpoint-5/trainer_state.json").is_file()
    discard(out / "checkpoint-5")
    rotate(str(out), 1, set())
    assert [path.name for path in outside.iterdir()] == ["thesis.txt"]


def test_an_own_folder_is_known_whenever_its_removal_is_stopped(tmp_path, monkeypatch):
    folder = make_own_folder(tmp_path, SAVING)
    (folder / "checkpoint-1").mkdir()
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *args, **kwargs: None)
    tidy(tmp_path)
    monkeypatch.undo()
    assert folder.exists()
    tidy(tmp_path)
    assert not folder.exists()


def test_what_killed_processes_have_left_goes(tmp_path):
    dead = f"{safe_writing._HOST}-{2**22 + 9}-{'a' * 16}"
    alive = safe_writing.own_name()
    own = [f".saving-{dead}", f".config.json.{dead}.partial", f"{LOCK_NAME}.{dead}"]
    theirs = [
        f".saving-{alive}", f".x.{alive}.partial", f".saving-{'0' * 8}-5-{'a' * 16}",
        f"saving-{dead}", f"x.{dead}.partial", ".x.partial", f".x.{dead}",
    ]  # fmt: skip
    for name in [*own, *theirs]:
        (tmp_path / name).mkdir() if "saving" in name else (tmp_path / name).touch()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


# Feature caches


def test_foreign_files_in_a_feature_cache_stay(tmp_path):
    folder = tmp_path / f"vision-{'a' * 32}"
    folder.mkdir()
    theirs = ["mine.safetensors", "mine.tmp", "notes.use", f"{'b' * 32}.safetensors"]
    for name in theirs[:3]:
        (folder / name).write_bytes(b"mine")
    save_file({"weight": torch.ones(2)}, folder / theirs[3])
    store = FeatureStore(folder, {})
    store.write([Features(bytes(16), torch.ones(3, 8), bytes(16))])
    assert len(store) == 1
    del store
    _evict(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(theirs)
    for name in theirs:
        (folder / name).unlink()
    FeatureStore(folder, {})
    _evict(folder)
    assert not list(tmp_path.iterdir())


def test_shards_of_another_width(tmp_path, caplog):
    folder = tmp_path / "store"
    FeatureStore(folder, {}).write([Features(bytes(16), torch.ones(3, 8), bytes(16))])
    store = FeatureStore(folder, {}, width=9)
    assert len(store) == 0
    store.write([Features(bytes(16), torch.ones(3, 9), bytes(16))])
    assert store[bytes(16)].tokens.shape == (3, 9)


# Links


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def outside(tmp_path):
    folder = fill(tmp_path / "outside")
    for name in ("config.json", "README.md", "anything"):
        (folder / name).write_text("{}")
    return folder


def plant_links(folder: Path, names: list[str], outside: Path) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for i, name in enumerate(names):
        (folder / name).unlink(missing_ok=True)
        # To a file that is there, and to one that would be new.
        (folder / name).symlink_to(outside / "anything" if i % 2 else outside / f"new-{i}")


def test_saving_replaces_links(tmp_path, outside):
    model, processor = make_model(), make_processor()
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    names = [path.name for path in (tmp_path / "first").iterdir()]
    assert len(names) > 10
    plant_links(tmp_path / "second", names, outside)
    before = snapshot(outside)
    model.save_pretrained(tmp_path / "second")
    written = processor.save_pretrained(tmp_path / "second")
    assert snapshot(outside) == before
    assert all(Path(path).is_file() and Path(path).parent == tmp_path / "second" for path in written)
    assert not any(path.is_symlink() for path in (tmp_path / "second").iterdir())
    assert snapshot(tmp_path / "second").keys() == {str(tmp_path / "second" / name) for name in names}
    plant_links(tmp_path / "third", ["config.json"], outside)
    model.config.save_pretrained(tmp_path / "third")
    assert snapshot(outside) == before


@pytest.mark.slow
def test_a_saved_model_has_no_weights_of_the_one_before(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path)
    model = make_model(seed=2)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert torch.equal(
        MMTransformerForMultiTask.from_pretrained(tmp_path).heads.topic.dense.weight, model.heads.topic.dense.weight
    )
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
    (tmp_path / "model.safetensors").chmod(0o600)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_training_replaces_links(tmp_path, outside):
    out = tmp_path / "out"
    trainer = make_trainer(tmp_path / "plain", max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", {"loss": 1.0})
    trainer.save_state()
    names = [path.name for path in (tmp_path / "plain").iterdir() if path.is_file()]
    assert {"trainer_state.json", "all_results.json", "training_args.bin", "config.json"} <= set(names)
    plant_links(out, [*names, LOCK_NAME + "x"], outside)
    before = snapshot(outside)
    trainer = make_trainer(out, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", {"loss": 1.0})
    trainer.save_state()
    trainer.create_model_card()
    assert snapshot(outside) == before
    assert json.loads((out / "all_results.json").read_text()) == {"loss": 1.0}


def test_card_picture_and_space_replace_links(tmp_path, outside):
    folder = tmp_path / "model"
    plant_links(folder, ["README.md", "comparison.json", "x"], outside)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(outside / "README.md")
    before = snapshot(outside)
    write_card(folder, CardFacts(name="model", config=make_model().config))
    with write_atomically(folder / "x") as file:
        file.write(b"new")
    plant_links(tmp_path / "space", ["app.py"], outside)
    write_space(tmp_path / "space", "me/my-model")
    assert snapshot(outside) == before
    assert not (folder / "README.md").is_symlink()


def test_links_show_no_other_file(tmp_path, outside):
    """Neither in a card nor on the Hub; a snapshot in the cache of the Hub is made of links."""
    folder = tmp_path / "cache" / "snapshots" / "main"
    blobs = tmp_path / "cache" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("---\nlicense: mit\n---\n\nWritten by hand.\n")
    (outside / "secret").write_text("the secret")
    config = make_model().config
    (folder / "README.md").symlink_to(outside / "secret")
    write_card(folder, CardFacts(name="model", config=config))
    assert "the secret" not in (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(blobs / "abc")
    write_card(folder, CardFacts(name="model", config=config))
    assert "Written by hand." in (folder / "README.md").read_text()
    assert (blobs / "abc").read_text().endswith("Written by hand.\n")
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    (tmp_path / "out" / "notes.txt").symlink_to(outside / "secret")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*secret, so a push would upload"):
        trainer.push_to_hub()


def test_what_was_there_stays_if_saving_fails(tmp_path):
    make_processor().save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError, match="half-way"), saved_aside(tmp_path) as staged:  # noqa: PT012
        (staged / "tokenizer.json").write_text("half")
        raise RuntimeError("half-way")
    assert snapshot(tmp_path) == before
    assert MMTransformerProcessor.from_pretrained(tmp_path)


# Two trainings


def hold(folder: str, ready, seconds: float) -> None:
    with locked(folder):
        ready.set()
        time.sleep(seconds)


@pytest.mark.slow
def test_the_second_training_is_refused_and_a_killed_one_is_followed(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=hold, args=(str(tmp_path), ready, 60))
    first.start()
    assert ready.wait(60)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by another training: process {first.pid} on '.*', started 20") as e:
        make_trainer(tmp_path, max_steps=1).train()
    assert "\n" not in str(e.value)
    assert snapshot(tmp_path).items() >= before.items()
    make_trainer(tmp_path, max_steps=1).evaluate()  # this alone needs no lock
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert (tmp_path / LOCK_NAME).exists()
    assert make_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True).global_step == 1
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": "elsewhere"}, "on 'elsewhere', .*; if that process has ended, remove .*_training_lock.json."),
        ({"started": 5.0}, None),
        ({"pid": 2**22 + 7}, None),
        ({"pid": "x"}, "is not a lock file of this package"),
        ({"host": 3}, "is not a lock file of this package"),
        ({"started": 1e300, "host": "elsewhere"}, "on 'elsewhere'"),
    ],
    ids=str,
)  # fmt: skip
def test_locks_that_others_have_left(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr("mm_transformers.training.checkpoints.lock._PATIENCE", 0.1)
    other = psutil.Process(os.getppid())
    holder = {"host": platform.node(), "pid": other.pid, "started": other.create_time(), **change}
    (tmp_path / LOCK_NAME).write_text(json.dumps(holder))
    if message is None:
        with locked(tmp_path), locked(tmp_path):
            assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
        assert json.loads((tmp_path / LOCK_NAME).read_text()) == holder


def test_a_clock_that_is_set_frees_no_lock(tmp_path, monkeypatch):
    other = psutil.Process(os.getppid())
    since_boot = lock._since_boot(other.pid)
    if since_boot is None:
        pytest.skip("this system does not count from its boot")
    holder = {"host": platform.node(), "pid": other.pid, "started": other.create_time() + 3600}
    (tmp_path / LOCK_NAME).write_text(json.dumps({**holder, "since_boot": since_boot}))
    with pytest.raises(ValueError, match="is in use by another training"), locked(tmp_path):
        pass
    boot, ticks = since_boot.split()
    for ended in (f"{boot[::-1]} {ticks}", f"{boot} {int(ticks) + 1}"):
        (tmp_path / LOCK_NAME).write_text(json.dumps({**holder, "since_boot": ended}))
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK_NAME).read_text())["since_boot"] == lock._since_boot(os.getpid())
        assert not (tmp_path / LOCK_NAME).exists()


def race(folder: str, start, results, seconds: float = 0) -> None:
    start.wait()
    time.sleep(seconds)
    enter(folder, results)


def enter(folder: str, results) -> None:
    try:
        with locked(folder):
            time.sleep(0.5)
        results.put("held")
    except ValueError:
        results.put("refused")


def test_of_many_that_take_over_a_stale_lock_one_holds_it(tmp_path):
    (tmp_path / LOCK_NAME).write_text(json.dumps({"host": platform.node(), "pid": os.getppid(), "started": 5.0}))
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=race, args=(str(tmp_path), start, results)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == ["held"] + ["refused"] * 7
    assert not list(tmp_path.iterdir())


def take_over_slowly(folder: str, started, results) -> None:
    """Waits before it moves the stale lock aside, and before it looks at what it has moved."""
    rename = Path.rename

    def slow(path, target):
        started.set()  # the others begin
        time.sleep(0.5)
        moved = rename(path, target)
        time.sleep(0.5)
        return moved

    Path.rename = slow
    enter(folder, results)


def test_a_slow_process_does_not_take_the_lock_of_a_faster_one(tmp_path):
    """The second would hold the lock, the first move it aside, and the third find none."""
    (tmp_path / LOCK_NAME).write_text(json.dumps({"host": platform.node(), "pid": os.getppid(), "started": 5.0}))
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    arguments = (str(tmp_path), start, results)
    slow = context.Process(target=take_over_slowly, args=arguments)
    others = [context.Process(target=race, args=(*arguments, seconds)) for seconds in (0.2, 0.7)]
    for process in (slow, *others):
        process.start()
    found = [results.get(timeout=60) for _ in range(3)]
    for process in (slow, *others):
        process.join()
    assert found.count("held") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_several_trainings_of_one_process_one_after_another(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.train()
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(tmp_path, max_steps=1, callbacks=[Stops()]).train()
    assert not (tmp_path / LOCK_NAME).exists()  # released by the error, too
    assert make_trainer(tmp_path, max_steps=2).train().global_step == 2


class Stops:
    """A callback that fails."""

    def __getattr__(self, name):
        if name == "on_step_begin":
            raise RuntimeError("stop")
        return lambda *args, **kwargs: None


def test_metrics_that_are_no_json(tmp_path):
    for content in ("{", "[1]", "\x00"):
        (tmp_path / "all_results.json").write_text(content)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.save_metrics("eval", {"loss": 2.0})
        assert json.loads((tmp_path / "all_results.json").read_text()) == {"loss": 2.0}
        assert (tmp_path / "all_results.json.damaged").read_text() == content
    assert make_rows(1)
    shutil.rmtree(tmp_path)
