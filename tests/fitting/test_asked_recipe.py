"""A timed call in a folder that holds a training: what is kept, what is trained on, and what needs another folder."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from recipes import save_encoders, write_csv
from transformers import TrainerCallback

from mm_transformers import fit
from mm_transformers.fitting.asked_recipe import ASKED_NAME, keep_asked, recipe_of_folder
from mm_transformers.training.recipe import read_recipe


# The training would stop early after more.
EPOCHS = 3.0
OPTIONS = {"num_train_epochs": EPOCHS, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
OPTIONS |= {"save_only_model": False}
SHORTENED = "An earlier call has shortened this training; its rows and epochs are kept."


class Interrupted(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls `fit`; with a second for each row, 2 epochs fit into 3 minutes, and all into 10."""
    monkeypatch.setattr("mm_transformers.fitting.timed_run.seconds_per_row", lambda trainer, training=True: 1.0)
    x = np.random.default_rng(0).normal(size=(60, 2))
    table = pd.DataFrame(x, columns=["a", "b"]).assign(y=x @ [1.0, -2.0])

    def call(*callbacks, table=table, training=OPTIONS, **options):
        said = []
        result = fit(
            table, ["y"], tmp_path / "model", say=said.append, callbacks=callbacks, report=False, print_logs=False,
            training=training, **options,
        )  # fmt: skip
        return result.plan.recipe, said

    return call


def epochs_done(tmp_path) -> float:
    return json.loads((tmp_path / "model" / "trainer_state.json").read_text())["epoch"]


@pytest.mark.slow
def test_more_time_trains_more_epochs(call, tmp_path):
    recipe, _ = call(minutes=3)
    assert recipe.training["num_train_epochs"] == epochs_done(tmp_path) == 2
    for minutes in (3, 2):
        recipe, said = call(minutes=minutes)
        assert SHORTENED in said
        assert recipe.training["num_train_epochs"] == epochs_done(tmp_path) == 2
    recipe, said = call(minutes=10)
    assert SHORTENED not in said
    assert any(line.startswith("Resuming from ") for line in said)
    assert recipe.training["num_train_epochs"] == epochs_done(tmp_path) == EPOCHS
    assert not (tmp_path / "model" / ASKED_NAME).exists()


@pytest.mark.slow
def test_an_interrupted_training_of_all_epochs_is_not_shortened_later(call, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        call(Interrupted(), minutes=10)
    recipe, said = call(minutes=3)
    assert any(line.startswith("Resuming from ") for line in said)
    assert recipe.training["num_train_epochs"] == epochs_done(tmp_path) == EPOCHS
    assert SHORTENED not in said


@pytest.mark.slow
def test_without_a_limit_nothing_is_shortened_any_more(call, tmp_path):
    call(minutes=3)
    assert (tmp_path / "model" / ASKED_NAME).exists()
    recipe, _ = call()
    assert recipe.training["num_train_epochs"] == epochs_done(tmp_path) == EPOCHS
    assert not (tmp_path / "model" / ASKED_NAME).exists()
    recipe, said = call(minutes=3)
    assert SHORTENED not in said
    assert recipe.training["num_train_epochs"] == EPOCHS


@pytest.fixture
def folder(tmp_path):
    """An output folder that looks as if it held a model."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def recipes_of(folder, **training):
    path = folder / "given.yaml"
    path.write_text(json.dumps({
        "data": {"train": str(folder / "rows.csv"), "max_eval_samples": 90},
        "model": {"text": "some/encoder"},
        "tasks": [{"name": "topic", "kind": "classification"}],
        "training": {"output_dir": str(folder), "num_train_epochs": 5.0, **training},
    }))  # fmt: skip
    return read_recipe(path, ["training.hub_token=secret", "model.token=secret"])


def changed(recipe, data=None, model=None, **training):
    return replace(
        recipe, data=replace(recipe.data, **(data or {})), model={**recipe.model, **(model or {})},
        training={**recipe.training, **training},
    )  # fmt: skip


LIMITED = [
    {"num_train_epochs": 2.0},
    {"data": {"max_train_samples": 50, "max_eval_samples": 9, "feature_cache": "/features"},
     "model": {"freeze": ["text"]}, "num_train_epochs": 30.0},
]  # fmt: skip


@pytest.mark.parametrize("limited", LIMITED)
def test_a_shortened_recipe_counts_for_the_same_time_or_less(limited, folder):
    asked = recipes_of(folder)
    used = changed(asked, **limited)
    keep_asked(asked, used, 5)
    assert recipe_of_folder(asked, 5) is None  # nothing has been trained by a recipe
    used.save(folder)
    assert recipe_of_folder(asked, 5) == recipe_of_folder(asked, 0.5) == used  # with secrets
    if "model" in limited:
        with pytest.raises(
            ValueError, match="a limit of 5 minutes has changed: fewer rows, or frozen encoders; for a limit of 120 min"
        ):
            recipe_of_folder(asked, 120)
    else:
        assert recipe_of_folder(asked, 120) is None
    assert recipe_of_folder(changed(asked, learning_rate=1e-3), 5) is None  # another recipe is asked for


@pytest.mark.parametrize(
    "other", [{"learning_rate": 1e-3}, {"data": {"group_column": "a"}}, {"model": {"fusion_type": "late"}}]
)
def test_other_options_are_not_taken_from_the_folder(other, folder):
    """They may be those of another call, which has trained on."""
    asked = recipes_of(folder)
    used = changed(asked, **LIMITED[0])
    keep_asked(asked, used, 5)
    changed(used, **other).save(folder)
    assert recipe_of_folder(asked, 5) is None


@pytest.mark.slow
def test_trained_encoders_are_not_frozen_later(call, tmp_path, monkeypatch):
    """Another learning rate is another call in the same folder, whose time is too short for the encoders."""
    save_encoders(tmp_path)
    words = ["red cat", "green dog in the rain", "blue crane", "a lovely small picnic", "ruined desk"]
    rows = [{"title": f"{words[i % 5]} {words[i % 4]}", "y": i / 4} for i in range(40)]
    table = write_csv(tmp_path / "rows.csv", rows)
    options = {"table": table, "text": str(tmp_path / "text"), "columns": {"title": "text"}}
    with pytest.raises(KeyboardInterrupt):
        call(Interrupted(), **options)
    before = (tmp_path / "model" / "recipe.yaml").read_text()
    monkeypatch.setattr("mm_transformers.fitting.timed_run.seconds_per_row", lambda trainer, training=True: 1e4)
    with pytest.raises(ValueError, match=r"a model of another recipe: .*model\.freeze is .* there and \['text'\] here"):
        call(minutes=3, training={**OPTIONS, "learning_rate": 1e-3}, **options)
    assert (tmp_path / "model" / "recipe.yaml").read_text() == before
    assert not (tmp_path / "model" / ASKED_NAME).exists()
