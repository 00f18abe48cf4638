"""Recipes: what may stand in them, what is said of what may not, paths, overrides, and what they make."""

import dataclasses
import json

import pytest
import yaml
from recipes import make_rows, recipe_values, save_encoders, write_csv
from transformers import TrainingArguments

from mm_transformers import MMTransformerConfig
from mm_transformers.training.recipe import Recipe, read_recipe
from mm_transformers.training.recipe.builders import build_trainer, load_data, training_arguments
from mm_transformers.training.recipe.output_folder import check_output
from mm_transformers.training.recipe.yaml_format import dump_yaml, parse_yaml


VALUES = {
    "data": {"train": "train.csv", "validation": "sub/test.csv"},
    "columns": {"text": "caption"},
    "model": {"text": "bert-base", "vision": "vit-base", "fusion_type": "late"},
    "tasks": [{"name": "topic", "kind": "classification"}, {"name": "stars", "kind": "regression"}],
    "training": {"output_dir": "out", "learning_rate": 1e-4},
}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5E3", 5e3), ("1.", 1.0), (".5", 0.5), ("-2", -2), ("010", 10), ("true", True), ("null", None),
        ("~", None), ("", None), ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("2020-01-01", "2020-01-01"),
        ("1e-4x", "1e-4x"), ("'1e-4'", "1e-4"), ("[a, 1]", ["a", 1]), ("{a: {b: no}}", {"a": {"b": "no"}}),
        ('{"a": [1.5, null]}', {"a": [1.5, None]}), ("{1: a, no: b}", {"1": "a", "no": "b"}),
    ],
)  # fmt: skip
def test_plain_words_mean_what_json_says(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)
    # What is written is read as it was.
    again = parse_yaml(dump_yaml({"key": parsed}))
    assert again == {"key": value}
    assert type(again["key"]) is type(value)


@pytest.mark.parametrize(
    "text", ["1e-4", "no", "null", "3", "1_000", "a: b", "- x", "", "true", "1.5", "x # y", "~", "0x1f", "é\n"]
)
def test_texts_stay_texts(text):
    assert parse_yaml(dump_yaml({"key": text})) == {"key": text}


def test_a_key_that_is_there_twice_is_told(tmp_path):
    (tmp_path / "r.yaml").write_text("data:\n  train: a\n  train: b\n")
    with pytest.raises(ValueError, match=r"r.yaml cannot be read as YAML: line 3, column 3: 'train' occurs twice"):
        read_recipe(tmp_path / "r.yaml")


# Keys and types


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainin.seed=1"], "recipe.yaml: trainin is unknown; did you mean training?"),
        (["training.learning_rat=1"], "training.learning_rat is unknown; did you mean training.learning_rate?"),
        (["model.fusion_typ=late"], "model.fusion_typ is unknown; did you mean model.fusion_type?"),
        (["model.text_config={}"], "model.text_config is unknown"),
        (["data.valdation=x.csv"], "data.valdation is unknown; did you mean data.validation?"),
        (["columns.zzz=x"], "columns.zzz is unknown; known are audio, image, table, text, video."),
        (["tasks.1.loss_wieght=2"], "tasks.1.loss_wieght is unknown; did you mean tasks.1.loss_weight?"),
        (["tasks.0.kind=clasification"], "tasks.0.kind is 'clasification', which is unknown; did you mean"),
        (["tasks.2.loss_weight=2"], "tasks.2.loss_weight: there is no tasks.2; the places of this list are 0 to 1"),
        (["tasks.0.loss_weight=much"], "tasks.0.loss_weight must be a number, but is 'much'"),
        (["tasks=[topic]"], "tasks.0 must be a task with a name and a kind, but is 'topic'"),
        (["tasks=[]"], "The recipe needs tasks"),
        (["training.learning_rate=fast"], "training.learning_rate must be a number or null, but is 'fast'"),
        (["training.bf16=yes"], "training.bf16 must be true or false, but is 'yes'"),
        (["model.num_fusion_layers=1.5"], "model.num_fusion_layers must be a whole number, but is 1.5"),
        (["data.max_length=long"], "data.max_length must be a whole number or null, but is 'long'"),
        (["training=[1]"], "training must be a section with keys, but is [1]"),
        (["data.train.x=1"], "so it has no keys"),
        (["training.output_dir=null"], "The recipe needs training.output_dir"),
        (["model.text="], "model.text must be a text, but is None"),
        (["data.dataset_name=x"], "either data.train, a file, or data.dataset_name"),
        (["data.train=null", "data.dataset_name=x"], "data.validation goes with data.train"),
        (["data.validation_fraction=1.5"], "data.validation_fraction must lie between 0 and 1, but is 1.5"),
        (["data.max_eval_samples=-1"], "data.max_eval_samples must be at least 1, but is -1"),
        (["data.max_length=0"], "data.max_length must be at least 1, but is 0"),
        (["training.seed"], "'training.seed' must read section.key=value"),
        (["training.seed=[1"], "The value of training.seed cannot be read as YAML"),
    ],
)
def test_one_sentence_names_the_key(recipe_file, overrides, message):
    with pytest.raises(ValueError, match=r".") as error:
        read_recipe(recipe_file, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files_are_told(tmp_path):
    with pytest.raises(ValueError, match="There is no recipe .*none.yaml"):
        read_recipe(tmp_path / "none.yaml")
    for text, message in {"- a": "holds list", "a: [": "line 1", "{a: b": "cannot be read as YAML"}.items():
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(tmp_path / "r.yaml")


def test_every_training_argument_may_stand_in_a_recipe():
    plain = (str, int, float, bool, type(None))
    values = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init and type(f.default) in plain}
    assert len(values) > 90
    recipe = Recipe.from_dict({**VALUES, "training": {**values, "output_dir": "out"}})
    assert {"predict_with_generate": True}.items() <= vars(training_arguments(recipe)).items()
    assert training_arguments(recipe).learning_rate == TrainingArguments("out").learning_rate


def test_fields_of_the_config_are_known_by_themselves(monkeypatch):
    monkeypatch.setitem(MMTransformerConfig.__annotations__, "new_field", float | None)
    values = {**VALUES, "model": {**VALUES["model"], "new_field": 3}}
    assert Recipe.from_dict(values).model["new_field"] == 3.0
    values["model"]["new_field"] = "x"
    with pytest.raises(ValueError, match=r"model.new_field must be a number or null, but is 'x'"):
        Recipe.from_dict(values)


# Paths and overrides


def test_paths_start_at_the_recipe_and_at_the_command_line(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "vit-base").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = read_recipe(recipe_file, ["data.validation=v.csv", "model.audio=./wav"])
    assert recipe.data.train == str(tmp_path / "train.csv")
    assert recipe.data.validation == str(elsewhere / "v.csv")
    assert recipe.training["output_dir"] == str(tmp_path / "out")
    # What is there is a folder; what is not, a name of the Hub, unless it says that it is a path.
    encoders = {"text": "bert-base", "vision": str(tmp_path / "vit-base"), "audio": str(elsewhere / "wav")}
    assert encoders.items() <= recipe.model.items()


def test_overrides_are_values(recipe_file):
    recipe = read_recipe(
        recipe_file,
        [
            "training.learning_rate=1e-5", "training.num_train_epochs=3", "tasks.0.loss_weight=2",
            "tasks.1={name: mood, kind: classification, labels: [yes, no]}", "model.modality_dropout={vision: 0.2}",
            "model.regularization={kind: l2, weight: 1e-3}", "columns.image=photo", "training.eval_strategy=no",
        ],
    )  # fmt: skip
    assert (recipe.training["learning_rate"], recipe.training["num_train_epochs"]) == (1e-5, 3)
    assert recipe.tasks[0]["loss_weight"] == 2
    assert recipe.tasks[1]["labels"] == ["yes", "no"]
    assert recipe.model["modality_dropout"] == {"vision": 0.2}
    assert recipe.model["regularization"] == {"kind": "l2", "weight": 0.001}
    assert (recipe.columns.image, recipe.columns.text) == ("photo", "caption")
    assert recipe.training["eval_strategy"] == "no"


def test_json_is_yaml(tmp_path, recipe_file):
    (tmp_path / "recipe.json").write_text(json.dumps(VALUES, indent=1))
    assert read_recipe(tmp_path / "recipe.json") == read_recipe(recipe_file)


# Saving and comparing


def test_saved_and_read_it_is_the_same_but_for_secrets(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file, ["training.hub_token=secret", "model.token=secret", "data.max_length=9"])
    folder = tmp_path / "out"
    recipe.save(folder)
    assert "secret" not in (folder / "recipe.yaml").read_text()
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    del recipe.training["hub_token"], recipe.model["token"]
    assert read_recipe(folder / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("overrides", "differences"),
    [
        ([], []),
        (["training.learning_rate=1", "training.seed=3", "model.cache_dir=/x", "data.test=t.csv"], []),
        # What is said is the default.
        (["model.num_fusion_layers=3", "tasks.0.loss_weight=1", "tasks.0.column=topic", "data.on_bad_file=raise"], []),
        (["model.fusion_type=merged"], ["model.fusion_type is 'merged' there and 'late' here"]),
        (["tasks.0.loss_weight=2"], ["loss_weight of task 'topic' is 2.0 there and 1.0 here"]),
        (["columns.text=text"], ["columns.text is 'text' there and 'caption' here"]),
        (["data.max_train_samples=5"], ["data.max_train_samples is 5 there and None here"]),
    ],
)
def test_what_would_give_other_weights_differs(recipe_file, overrides, differences):
    assert read_recipe(recipe_file).differences(read_recipe(recipe_file, overrides)) == differences


def test_a_model_without_a_recipe_is_left_alone(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    check_output(recipe)  # there is nothing yet
    (tmp_path / "out/checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out holds a model that was not trained by a recipe; nothing was changed"):
        check_output(recipe)


# What it makes


def test_the_trainer_is_what_the_recipe_says(tmp_path):
    encoders = save_encoders(tmp_path / "encoders")
    write_csv(tmp_path / "train.csv", make_rows(tmp_path))
    values = recipe_values(encoders)
    values["data"] |= {"validation_fraction": 0.25, "max_train_samples": 5, "max_length": 7}
    del values["data"]["validation"]
    values["model"] |= {"fusion_type": "bottleneck", "regularization": {"kind": "l2", "weight": 0.1}, "num_frames": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = read_recipe(tmp_path / "recipe.yaml", ["training.generation_num_beams=3"])
    trainer = build_trainer(recipe)
    config = trainer.model.config
    assert (config.fusion_type, config.num_fusion_layers, config.num_frames) == ("bottleneck", 1, 4)
    assert trainer.processing_class.num_frames == 4
    assert config.regularization == {"kind": "l2", "weight": 0.1}
    tasks = config.get_tasks()
    assert (tasks["topic"].labels, tasks["tags"].labels) == (["animals", "food"], ["red", "small"])
    assert tasks["stars"].loss_weight == 0.5
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (5, 4)
    assert trainer.data_collator.max_length == 7
    assert (trainer.args.learning_rate, trainer.args.generation_num_beams) == (1e-3, 3)
    # With the same seed the same weights, with another one others.
    twin, other = (
        build_trainer(recipe),
        build_trainer(dataclasses.replace(recipe, training={**recipe.training, "seed": 1})),
    )
    weights = [t.model.heads.topic.head.dense.weight for t in (trainer, twin, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_a_number_far_away_is_told_with_its_row_in_the_table(tmp_path, caplog):
    """Rows without content are left out, but counted."""
    rows = [{"text": f"a {i}", "price": i % 7} for i in range(12)]
    rows[2]["text"] = rows[4]["text"] = ""
    rows[9]["price"] = 4e9
    recipe = Recipe.from_dict({
        "data": {"train": str(write_csv(tmp_path / "train.csv", rows))},
        "model": {"text": "some/encoder"},
        "tasks": [{"name": "price", "kind": "regression"}],
        "training": {"output_dir": str(tmp_path / "out")},
    })  # fmt: skip
    load_data(recipe, training_arguments(recipe))
    assert "column 'price' has 4e+09 in row 9 of the training table, more than 100 robust" in caplog.text


def test_yaml_may_be_nested_fifty_levels_deep():
    assert parse_yaml("[" * 50 + "]" * 50)
    with pytest.raises((ValueError, yaml.YAMLError), match="nested more than 50 levels deep"):
        parse_yaml("[" * 51 + "]" * 51)
