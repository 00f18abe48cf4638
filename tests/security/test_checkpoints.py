"""Checkpoints of strangers and damaged ones: refused in one sentence, before memory is taken, and nothing runs."""

import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from killable import make_trainer
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model, make_processor
from transformers import AutoModel, BertConfig, BertModel, pipeline

from mm_transformers import (
    Classification,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerModel,
    MMTransformerProcessor,
)
from mm_transformers.training.checkpoints.folders import MANIFEST_NAME, newest_complete_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_model(linear_probe=True).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(dict(weights)), folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, part=None, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(values)
    path.write_text(json.dumps(config))


def refused(load, folder, *texts):
    with pytest.raises((ValueError, OSError)) as info:
        load(folder)
    message = str(info.value)
    assert "\n" not in message
    assert len(message) < 1500
    for text in texts:
        assert text in message, message
    return message


WAYS = {
    "class": MMTransformerForMultiTask.from_pretrained,
    "auto": AutoModel.from_pretrained,
    "pipeline": lambda folder: pipeline("multimodal", model=str(folder)),
}


# Weights


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_missing(folder, way):
    change_weights(folder, lambda weights: {k: x for k, x in weights.items() if not k.startswith("heads.topic.")})
    with pytest.raises(ValueError, match=r"lacks the weight 'heads.topic.*\(and 5 more\).*tasks=\[...\]"):
        WAYS[way](folder)


@pytest.mark.parametrize("prefix", ["heads.", "model.text_model.encoder.layer.1.", "model.null_text", "model.fusion."])
def test_any_weights_that_are_missing(folder, prefix):
    change_weights(folder, lambda weights: {k: x for k, x in weights.items() if not k.startswith(prefix)})
    refused(MMTransformerForMultiTask.from_pretrained, folder, f"lacks the weight '{prefix}")
    if prefix != "heads.":
        refused(MMTransformerModel.from_pretrained, folder, "lacks the weight")
    assert MMTransformerForMultiTask.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_weights_that_are_too_many(folder):
    change_weights(folder, lambda weights: {**weights, "heads.evil.weight": torch.ones(2)})
    refused(MMTransformerForMultiTask.from_pretrained, folder, "has the weight 'heads.evil.weight'")
    change_config(folder, "text_config", num_hidden_layers=0)
    refused(MMTransformerForMultiTask.from_pretrained, folder, "has the weight", "more)")


def test_integers_in_the_place_of_floats(folder):
    change_weights(folder, lambda weights: {k: x.to(torch.int8) for k, x in weights.items()})
    refused(MMTransformerForMultiTask.from_pretrained, folder, "holds integers (I8)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_told_at_first_use(folder, value):
    def spoil(weights):
        weights["model.text_model.encoder.layer.0.output.dense.weight"][3, 4] = value
        return weights

    change_weights(folder, spoil)
    model = MMTransformerForMultiTask.from_pretrained(folder)
    with pytest.raises(
        ValueError, match="'model.text_model.encoder.layer.0.output.dense.weight' .* is NaN or infinite"
    ):
        model(**make_batch())
    model(**make_batch())  # told once; a hot path must not wait for it


def test_what_is_allowed(saved, tmp_path):
    model = MMTransformerForMultiTask.from_pretrained(saved)
    base = MMTransformerModel.from_pretrained(saved)
    base.save_pretrained(tmp_path / "base")
    with_heads = MMTransformerForMultiTask.from_pretrained(tmp_path / "base")
    assert torch.equal(with_heads.model.null_text.weight, model.model.null_text.weight)
    new = Classification("mood", labels=["bad", "good"])
    for tasks in ([*model.tasks.values(), new], [new], list(model.tasks.values())[:2]):
        loaded = MMTransformerForMultiTask.from_pretrained(saved, tasks=tasks)
        assert list(loaded.tasks) == [task.name for task in tasks]
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("heads.")}
    assert MMTransformerForMultiTask.from_pretrained(None, config=model.config, state_dict=state)
    config = {k: x for k, x in json.loads((saved / "config.json").read_text()).items() if k != "item_order"}
    old = Path(shutil.copytree(saved, tmp_path / "old"))
    (old / "config.json").write_text(json.dumps(config))
    assert MMTransformerForMultiTask.from_pretrained(old)


def test_other_weights_are_missing_beside_new_tasks(folder):
    change_weights(folder, lambda weights: {k: x for k, x in weights.items() if not k.startswith("heads.sentiment.")})
    tasks = [*make_model().tasks.values(), Classification("mood", labels=["bad", "good"])]
    refused(lambda path: MMTransformerForMultiTask.from_pretrained(path, tasks=tasks), folder, "'heads.sentiment.")


def test_a_pickle_as_weights(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it-ran",))

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pickle that holds more than tensors") as info:
        MMTransformerForMultiTask.from_pretrained(folder, use_safetensors=False)
    assert "weights_only" not in str(info.value)
    assert info.value.__cause__ is None
    refused(MMTransformerForMultiTask.from_pretrained, folder)
    assert not (tmp_path / "it-ran").exists()


# Memory and time


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("text_config", {"vocab_size": 20_000_000}), ("text_config", {"intermediate_size": 50_000_000}),
        ("vision_config", {"intermediate_size": 50_000_000}), ("vision_config", {"image_size": 10**9}),
        ("text_config", {"num_hidden_layers": 10**9}), ("vision_config", {"num_hidden_layers": 10**9}),
        ("text_config", {"encoder_traits": {"width": 10**9}}), ("text_config", {"hidden_size": 10**18}),
        (None, {"num_fusion_layers": 10**9}), (None, {"num_frames": 10**9, "frame_embedding": "learned"}),
        (None, {"fusion_hidden_size": 4 * 10**8}), ("text_config", {"max_position_embeddings": 10**9}),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_cannot_take_memory(folder, part, values):
    change_config(folder, part, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(MMTransformerForMultiTask.from_pretrained, folder)
    if part is not None:
        tasks = [Classification("mood", labels=["bad", "good"])]
        refused(lambda path: MMTransformerForMultiTask.from_pretrained(path, tasks=tasks), folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB


# Configs


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '"text"', "null", "[" * 5000, "\x00", '{"model_type": 3}'])
def test_a_config_that_is_none(folder, content):
    (folder / "config.json").write_text(content)
    for load in (MMTransformerForMultiTask.from_pretrained, MMTransformerConfig.from_pretrained):
        refused(load, folder)
    (folder / "config.json").unlink()
    refused(MMTransformerForMultiTask.from_pretrained, folder, "config.json")


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/nowhere/at/all", "a b", "me/my model", "-x", "x..y"])
def test_folders_that_are_not_there(name):
    loads = (
        MMTransformerForMultiTask.from_pretrained,
        MMTransformerConfig.from_pretrained,
        MMTransformerProcessor.from_pretrained,
        lambda path: MMTransformerForMultiTask.from_encoders(path, tasks=[Classification("a", labels=["b", "c"])]),
        MMTransformerProcessor.from_encoders,
    )
    for load in loads:
        message = refused(load, name, f"There is no folder {name!r}")
        assert "Repo id" not in message


def test_folders_without_an_encoder(tmp_path):
    BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=30)).save_pretrained(
        tmp_path
    )
    (tmp_path / "config.json").unlink()
    refused(lambda path: MMTransformerForMultiTask.from_encoders(str(path)), tmp_path, "holds no encoder")
    refused(lambda path: MMTransformerProcessor.from_encoders(str(path)), tmp_path, "holds no encoder")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')
    refused(lambda path: MMTransformerForMultiTask.from_encoders(str(path)), tmp_path, "cannot be read")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"version": "1.0"}', "cut"])
def test_files_of_the_processor(folder, name, content):
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_text(path.read_text()[:-100] if content == "cut" else content)
    message = ""
    try:
        MMTransformerProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        message = str(error)
    assert len(message) < 1500
    assert "\n" not in message


# Resuming


@pytest.mark.slow
def test_garbage_of_the_same_size_falls_back_to_the_older_checkpoint(tmp_path):
    make_trainer(tmp_path, max_steps=3).train()
    for name in ("model.safetensors", "optimizer.pt"):
        path = tmp_path / "checkpoint-3" / name
        content = path.read_bytes()
        path.write_bytes(content[:-64] + bytes(64))
        assert newest_complete_checkpoint(tmp_path, verify=True) == str(tmp_path / "checkpoint-2")
        with pytest.raises(ValueError, match=f"the content of {name} has changed since it was written"):
            make_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        path.write_bytes(content)
    assert newest_complete_checkpoint(tmp_path, verify=True) == str(tmp_path / "checkpoint-3")
    manifest = tmp_path / "checkpoint-3" / MANIFEST_NAME
    found = json.loads(manifest.read_text())
    for files in ({"../../x": 3}, {"/etc/passwd": 3}, {"a": "x"}, [3], 3):
        manifest.write_text(json.dumps({**found, "files": files}))
        assert newest_complete_checkpoint(tmp_path, verify=True) == str(tmp_path / "checkpoint-2")
    manifest.write_text(json.dumps({"files": found["files"]}))  # of an older release
    assert newest_complete_checkpoint(tmp_path, verify=True) == str(tmp_path / "checkpoint-3")


@pytest.mark.slow
def test_pickles_and_other_weights_in_a_checkpoint(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    (folder / MANIFEST_NAME).unlink()
    trainer = make_trainer(tmp_path / "again", max_steps=2)
    optimizer = (folder / "optimizer.pt").read_bytes()
    torch.save({"state": Path("x")}, folder / "optimizer.pt")
    with pytest.raises(ValueError, match="is a pickle that holds more than tensors") as info:
        trainer.train(resume_from_checkpoint=str(folder))
    assert info.value.__cause__ is None
    assert info.value.__suppress_context__
    assert "weights_only" not in str(info.value)
    (folder / "optimizer.pt").write_bytes(optimizer)
    change_weights(folder, lambda weights: {k: x for k, x in weights.items() if not k.startswith("heads.topic.")})
    with pytest.raises(ValueError, match="The checkpoint lacks the weight 'heads.topic"):
        make_trainer(tmp_path / "again", max_steps=2).train(resume_from_checkpoint=str(folder))
    assert pickle  # what is refused


def test_training_of_spoilt_weights(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with torch.no_grad():
        trainer.model.model.null_text.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"The weight 'model.null_text.weight' of the model is NaN or infinite"):
        trainer.train()
