"""One sentence in place of a traceback, and of bounded size: forward, recipes, arguments and the command line."""

import json
import re
import resource

import pytest
import torch
from killable import make_trainer
from tiny import make_batch, make_model
from typer.testing import CliRunner

from mm_transformers import MMTrainingArguments
from mm_transformers.analysis.task_comparison import run_comparison
from mm_transformers.cli import app
from mm_transformers.model.messages import one_line, shortened
from mm_transformers.training.recipe import read_recipe
from mm_transformers.training.recipe.builders import training_arguments
from mm_transformers.training.recipe.output_folder import read_state


# Forward


@pytest.fixture(scope="module")
def model():
    return make_model(audio="wav2vec2")


def batch(**changes):
    inputs = make_batch()
    inputs["input_values"], inputs["audio_index"] = torch.zeros(4, 400), torch.arange(4)[:, None]
    labels = changes.pop("labels", {})
    if isinstance(labels, dict):
        inputs["labels"] = {**inputs["labels"], **labels}
    else:
        inputs["labels"] = labels
    inputs.update(changes)
    return {name: value for name, value in inputs.items() if value is not None}


IDS, MASK, PIXELS, INDEX = (
    make_batch()[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_index")
)
ZEROS = torch.zeros(4, dtype=torch.int64)
WRONG = {
    "floats as ids": (dict(input_ids=IDS.float()), "input_ids must hold integers"),
    "bytes as ids": (dict(input_ids=IDS.to(torch.int8)), "input_ids must hold integers"),
    "one text": (dict(input_ids=IDS[0]), r"input_ids must have the shape \(batch, text_len\)"),
    "four axes": (dict(input_ids=IDS[None]), r"input_ids must have the shape \(batch, text_len\)"),
    "a list": (dict(input_ids=IDS.tolist()), "input_ids must be a tensor"),
    "high ids": (dict(input_ids=IDS + 200), "input_ids must be numbers from 0 to 98"),
    "negative ids": (dict(input_ids=IDS - 50), "input_ids must be numbers from 0 to 98"),
    "long texts": (dict(input_ids=IDS.repeat(1, 9), attention_mask=MASK.repeat(1, 9)), "takes at most 40"),
    "no tokens": (dict(input_ids=IDS[:, :0], attention_mask=MASK[:, :0]), "The batch is empty"),
    "short mask": (dict(attention_mask=MASK[:, :4]), "attention_mask has the shape"),
    "fewer masks": (dict(attention_mask=MASK[:2]), "attention_mask has the shape"),
    "mask of attention": (dict(attention_mask=MASK[:, None, None]), "attention_mask must have the shape"),
    "token types": (dict(token_type_ids=torch.full_like(IDS, 9)), "token_type_ids must be numbers from 0 to 1"),
    "one image": (dict(pixel_values=PIXELS[0]), "pixel_values must have the shape"),
    "channels": (dict(pixel_values=PIXELS[:, :1]), "channel"),
    "size": (dict(pixel_values=PIXELS[..., :20]), "image size"),
    "complex": (dict(pixel_values=PIXELS.to(torch.complex64)), "pixel_values must hold real numbers"),
    "high index": (dict(image_index=INDEX + 5), "image_index must hold numbers from -1"),
    "float index": (dict(image_index=INDEX.float()), "image_index must hold integers"),
    "bool index": (dict(image_index=INDEX.bool()), "image_index must be a tensor of integers"),
    "list index": (dict(image_index=INDEX.tolist()), "image_index must be a tensor of integers"),
    "frame floats": (dict(frame_index=INDEX.float()), "frame_index must hold integers"),
    "sound": (dict(input_values=torch.zeros(4, 1, 400)), "audio encoder takes no input_values of shape"),
    "sound mask": (dict(audio_attention_mask=torch.ones(4, 7)), "audio_attention_mask has the shape"),
    "narrow embeddings": (dict(input_ids=None, inputs_embeds=torch.zeros(4, 9, 7)), "must have the width"),
    "narrow features": (dict(text_features=torch.zeros(4, 9, 7)), "text_features must have the width 32"),
    "high label": (dict(labels={"topic": ZEROS + 7}), r"labels\['topic'\] must be integers from 0 to 2"),
    "negative label": (dict(labels={"topic": ZEROS - 1}), r"labels\['topic'\] must be integers from 0 to 2"),
    "float label": (dict(labels={"topic": ZEROS.float()}), r"labels\['topic'\] must be integers from 0 to 2"),
    "short label": (dict(labels={"topic": ZEROS.int()}), r"labels\['topic'\] must be integers from 0 to 2"),
    "label of words": (dict(labels={"entities": IDS}), r"labels\['entities'\] must be integers from 0 to 1"),
    "list of labels": (dict(labels={"topic": [0, 1]}), r"labels\['topic'\] must be a tensor"),
    "labels of nobody": (dict(labels=ZEROS), "labels must be a dict from task name to tensor"),
    "divisor": (dict(num_items_in_batch=3), "num_items_in_batch must be a dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_of_forward(model, name):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as info:
        model(**batch(**changes))
    assert "\n" not in str(info.value)


def test_an_empty_batch(model):
    with pytest.raises(ValueError, match=r"The batch is empty: input_ids has the shape \(0, 9\), so it has no rows"):
        model(input_ids=IDS[:0], attention_mask=MASK[:0])


@pytest.mark.nightly
def test_checks_are_no_part_of_what_is_compiled(model):
    inputs = batch(labels=None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(**inputs).logits["topic"]
    assert torch.allclose(compiled(**inputs).logits["topic"], expected, atol=1e-5)


# Recipes

NINES = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
DAMAGED = {
    "tag": ("columns: {text: !!bool maybe}", "line 1, column 17: 'maybe' cannot be read as bool"),
    "python": ("columns: !!python/object/apply:os.system ['exit']", "could not determine a constructor for the tag"),
    "number": ("columns: {text: !!int abc}", "'abc' cannot be read as int"),
    "date": ("columns: !!timestamp 2020-99-99", "cannot be read as timestamp"),
    "brackets": ("data: " + "[" * 3000, "nested more than 50 levels deep"),
    "closed": ("data: " + "[" * 3000 + "]" * 3000, "nested more than 50 levels deep"),
    "braces": ("data: " + "{a: " * 3000 + "1" + "}" * 3000, "nested more than 50 levels deep"),
    "bomb": (NINES, "its aliases expand to more than 100,000 values"),
    "bomb of tasks": (NINES + "tasks: *a9", "its aliases expand to more than 100,000 values"),
    "itself": ("data: &x [*x]", "an alias refers to its own parent"),
    "digits": ("data: {max_train_samples: " + "9" * 5000 + "}", "cannot be read as int"),
    "size": ("a: " + "x" * 3_000_000, "recipe_bytes=1,048,576"),
    "null byte": ("data: \x00", "special characters are not allowed"),
    "a long key": (f"? {'x' * 100_000}\n: 3", "is unknown"),
    "a long value": ("data: " + "x" * 100_000, "data must be a section with keys"),
    "feature cache": ("model: {feature_cache: x}", "model.feature_cache is unknown; did you mean data.feature_cache?"),
    "output": ("data: {output_dir: x}", "data.output_dir is unknown; did you mean training.output_dir?"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_recipes_that_are_damaged_or_hostile(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / "recipe.yaml").write_text(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=re.escape(message)) as info:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_values_in_messages_are_short():
    nested = ["x" * 1000]
    for _ in range(20):
        nested = [nested] * 20
    assert len(shortened(nested)) < 20_000
    assert len(one_line(ValueError("x" * 10_000))) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", 0), ("gradient_accumulation_steps", -1), ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -4), ("num_train_epochs", float("nan")), ("learning_rate", float("inf")),
        ("learning_rate", -1.0), ("weight_decay", -0.1), ("max_grad_norm", -1.0), ("warmup_steps", -3),
        ("dataloader_num_workers", -1), ("seed", -1), ("seed", 2**40), ("adam_beta1", 7.0), ("logging_steps", -1),
        ("generation_num_beams", 0), ("generation_max_length", 0), ("save_steps", -5),
    ],
    ids=str,
)  # fmt: skip
def test_training_options_out_of_range(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        MMTrainingArguments(str(tmp_path), **{name: value})


def test_recipes_with_options_that_do_not_fit(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {train: rows.csv}\nmodel: {text: a/b}\ntasks: [{name: topic, kind: classification}]\n"
        "training: {output_dir: out}\n"
    )
    for override in ("gradient_accumulation_steps=0", "lr_scheduler_type=evil", "optim=evil", "eval_strategy=evil"):
        with pytest.raises(ValueError, match="The training options are not valid") as info:
            training_arguments(read_recipe(path, [f"training.{override}"]))
        assert "\n" not in str(info.value)


# The command line and files beside a model


@pytest.mark.parametrize("port", ["99999", "0", "-1", "x"])
def test_ports(port):
    result = CliRunner().invoke(app, ["demo", "--ui", "--port", port])
    assert result.exit_code == 2
    assert "Invalid value for '--port'" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "card"])
def test_models_that_are_not_there(tmp_path, command):
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    rows, output = str(tmp_path / "rows.csv"), ["--output", str(tmp_path / "out.csv")]
    arguments = {"evaluate": [rows], "predict": [rows, *output], "export": output, "card": []}
    result = CliRunner().invoke(app, [command, "no/such/folder", *arguments[command]])
    assert result.exit_code == 2, result.exception
    assert "no/such/folder" in result.output.replace("\n", "")
    assert "Repo id" not in result.output


@pytest.mark.parametrize("content", ["", "{", "[]", '{"runs": 3}', '"x"'])
def test_results_that_are_damaged(tmp_path, content):
    for name in ("comparison.json", "trainer_state.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="comparison.json is damaged"):
        run_comparison(lambda tasks, seed: {}, ["a", "b"], [0], tmp_path / "comparison.json", {})
    with pytest.raises(ValueError, match="trainer_state.json is damaged"):
        read_state(tmp_path / "trainer_state.json")


class DyingRows(torch.utils.data.Dataset):
    """Its reader is killed at the third row, as for lack of memory."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        import os
        import signal

        if i == 2 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"text": "red cat", "image": None, "topic": 0, "score": 0.5}


def test_a_killed_reader(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, dataloader_num_workers=1)
    trainer.train_dataset = DyingRows()
    with pytest.raises(RuntimeError, match="A process that reads rows was killed, perhaps for lack of memory: "):
        trainer.train()
    assert json.dumps({})
