"""A checkpoint that is damaged, incomplete or hostile is refused in one sentence, and none of its code is run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_processor
from transformers import AutoConfig, AutoModel

from mm_transformers import MMTransformerConfig, MMTransformerForMultiTask


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def message(folder, error, load=MMTransformerForMultiTask.from_pretrained) -> str:
    with pytest.raises(error) as info:
        load(folder)
    text = str(info.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(tmp_path):
    make_model().save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    return tmp_path / "shards"


@pytest.mark.parametrize("load", [MMTransformerForMultiTask.from_pretrained, AutoModel.from_pretrained])
def test_weights_of_another_shape(folder, load):
    weights = load_file(folder / "model.safetensors")
    name = "heads.topic.out_proj.weight"
    weights[name] = torch.zeros(5, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = message(folder, ValueError, load)
    assert repr(name) in text
    assert "(5, 32)" in text
    assert "(3, 32)" in text
    assert "more)" not in text
    model = load(folder, ignore_mismatched_sizes=True)  # as the message says
    assert model.get_parameter(name).shape == (3, 32)


def test_config_of_another_model(folder):
    vision = {**json.loads((folder / "config.json").read_text())["vision_config"], "intermediate_size": 48}
    edit_config(folder, vision_config=vision)
    text = message(folder, ValueError)
    assert "vision_model" in text
    assert "more)" in text


@pytest.mark.parametrize("keep", [0, 0.00005, 0.0001, 0.5, 0.9999])
def test_truncated_file(folder, keep):
    cut(folder / "model.safetensors", keep)
    assert "model.safetensors" in message(folder, OSError)


def test_file_that_is_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "model.safetensors" in message(folder, OSError)


def test_missing_shard(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    text = message(sharded, OSError)
    assert shards[1].name in text
    assert f"{len(shards)} weight files" in text
    shards[2].unlink()
    assert "1 more" in message(sharded, OSError)


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    cut(shard)
    assert shard.name in message(sharded, OSError)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', "{}"])
def test_damaged_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in message(sharded, OSError)


def test_missing_files(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in message(folder, OSError)
    (folder / "config.json").unlink()
    assert "holds no model: it has no config.json" in message(folder, ValueError)
    nowhere = str(tmp_path / "nowhere")
    assert f"no folder {nowhere!r}" in message(nowhere, OSError)


def test_broken_config(folder):
    cut(folder / "config.json")
    assert "config.json" in message(folder, OSError)


def test_unknown_kinds(folder):
    config = json.loads((folder / "config.json").read_text())
    config["tasks"][1]["kind"] = "wonder"
    edit_config(folder, tasks=config["tasks"])
    assert "'wonder'" in message(folder, ValueError)
    assert config["tasks"][1]["name"] in message(folder, ValueError)
    edit_config(folder, tasks=[], fusion_type="wonder")
    assert "'wonder'" in message(folder, ValueError)


OUTSIDE = [
    "../evil.Evil", "/tmp/evil.Evil", "sub/evil.Evil", "..evil.Evil", "a.b.Evil", "evil", "someone/else--evil.Evil",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("reference", OUTSIDE)
def test_code_outside_of_the_folder_is_neither_run_nor_passed_over(folder, reference):
    evil = "import pathlib\npathlib.Path(__file__).with_name('it-ran').touch()\nclass Evil: pass\n"
    for place in (folder.parent, folder):
        (place / "evil.py").write_text(evil)
    for auto_map in ({"AutoModel": reference}, {"AutoConfig": reference}, {"AutoTokenizer": [None, reference]}):
        edit_config(folder, auto_map=auto_map)
        for load in (
            MMTransformerConfig.from_pretrained,
            MMTransformerForMultiTask.from_pretrained,
            lambda path: AutoConfig.from_pretrained(path, trust_remote_code=True),
            lambda path: AutoModel.from_pretrained(path, trust_remote_code=True),
        ):
            assert reference in message(folder, ValueError, load)
    assert not list(folder.parent.rglob("it-ran"))


@pytest.mark.slow
def test_code_beside_the_config_is_not_run_where_the_package_is_installed(folder):
    """Even if the files that a checkpoint should carry have been replaced."""
    for path in folder.glob("*.py"):
        path.write_text("import pathlib\npathlib.Path(__file__).with_name('it-ran').touch()\n")
    loading = (
        "import sys, mm_transformers; from transformers import AutoModel, AutoConfig;"
        "assert type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)).__module__.startswith('mm_tr');"
        "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    environment = {**os.environ, "HF_HOME": str(folder.parent / "home")}
    subprocess.run([sys.executable, "-c", loading, str(folder)], check=True, env=environment, capture_output=True)
    assert not list(folder.parent.rglob("it-ran"))


def test_config_of_the_hub_saved_alone_names_no_code(folder):
    """A config that came from the Hub has its repository in front of the names of code; a copy has no such code."""
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {name: f"someone/model--{code}" for name, code in values["auto_map"].items()}
    config = MMTransformerConfig.from_dict(values, name_or_path="someone/model")
    config.save_pretrained(folder.parent / "alone")
    assert "auto_map" not in json.loads((folder.parent / "alone" / "config.json").read_text())
    assert MMTransformerConfig.from_pretrained(folder.parent / "alone").tasks == config.tasks


def test_nothing_saved_is_a_pickle_or_names_a_path(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "saved")
    # As after training from encoders in local folders.
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "again")
    make_processor().save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content
        assert os.path.expanduser("~").encode() + b"/" not in content
        assert not content.startswith((b"\x80", b"PK"))  # pickles, and the zip files that torch.save writes
