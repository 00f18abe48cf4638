"""Checkpoints: safetensors and JSON, complete, sharded, through the auto classes, and with nothing else downloaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_batch, make_model, make_processor
from transformers import AutoConfig, AutoModel, AutoProcessor, BertConfig, BertModel

import mm_transformers
from mm_transformers import (
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerModel,
    MMTransformerProcessor,
)


def same_weights(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_rule_8_a_checkpoint_is_safetensors_json_and_code(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {path.rpartition(".")[2] for path in files} <= {"safetensors", "json", "jinja", "txt", "py"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mm_transformer"
    assert [task["name"] for task in config["tasks"]] == ["topic", "sentiment", "tags", "score", "entities"]
    assert config["tasks"][0] == {
        "kind": "classification", "name": "topic", "loss_weight": 1.0, "column": "topic",
        "labels": ["animals", "food", "travel"], "class_weights": None, "label_smoothing": 0.0,
    }  # fmt: skip
    assert config["id2label"] == {"0": "animals", "1": "food", "2": "travel"}
    assert config["text_config"]["model_type"] == "bert"
    assert config["vision_config"]["model_type"] == "vit"
    # Every weight, under the name that the model itself uses: no legacy layout.
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_sharded_checkpoint(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same_weights(MMTransformerForMultiTask.from_pretrained(tmp_path), model)


def test_auto_classes(tmp_path):
    model, processor = make_model(), make_processor()
    model.save_pretrained(tmp_path / "tasks")
    processor.save_pretrained(tmp_path / "tasks")
    model.model.save_pretrained(tmp_path / "base")
    assert type(AutoConfig.from_pretrained(tmp_path / "tasks")) is MMTransformerConfig
    loaded = AutoModel.from_pretrained(tmp_path / "tasks")
    assert type(loaded) is MMTransformerForMultiTask
    assert same_weights(loaded, model)
    assert type(AutoModel.from_pretrained(tmp_path / "base")) is MMTransformerModel
    assert type(AutoProcessor.from_pretrained(tmp_path / "tasks")) is MMTransformerProcessor


def test_base_model_and_tasks_exchange_weights(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "tasks")
    base = MMTransformerModel.from_pretrained(tmp_path / "tasks")
    assert same_weights(base, model.model)
    base.save_pretrained(tmp_path / "base")
    again = MMTransformerForMultiTask.from_pretrained(tmp_path / "base")
    assert same_weights(again.model, base)


@pytest.mark.slow
def test_rule_7_loading_builds_from_the_config_alone(tmp_path):
    """In a fresh process whose network and cache are gone: the same answers."""
    model = make_model("roberta", "swin")
    model.save_pretrained(tmp_path)
    batch = make_batch(labels=False)
    batch["input_ids"][batch["attention_mask"] == 0] = 1
    torch.save((batch, model(**batch).logits), tmp_path / "expected.pt")
    script = (
        "import socket, sys, torch\n"
        "def no(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = no\n"
        "import mm_transformers\n"
        "batch, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "model = mm_transformers.MMTransformerForMultiTask.from_pretrained(sys.argv[1])\n"
        "logits = model(**batch).logits\n"
        "assert logits.keys() == expected.keys()\n"
        "for name in logits: torch.testing.assert_close(logits[name], expected[name])\n"
        "print('equal')\n"
    )
    source = str(Path(mm_transformers.__file__).parents[1])
    env = {"HF_HOME": str(tmp_path / "empty"), "PYTHONPATH": source, "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=env)
    assert result.stdout.strip() == "equal", result.stderr


@pytest.mark.slow
def test_loading_needs_neither_datasets_nor_evaluate():
    script = (
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'sklearn', 'matplotlib', 'PIL'): sys.modules[name] = None\n"
        "import mm_transformers\n"
        "print(mm_transformers.MMTransformerForMultiTask.__name__)\n"
    )
    source = str(Path(mm_transformers.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": source, "PATH": "/usr/bin:/bin"},
    )
    assert result.stdout.strip() == "MMTransformerForMultiTask", result.stderr


def test_model_folder_is_flat():
    """What `custom_object_save` copies: one dot between its modules, and nothing else but torch and transformers."""
    allowed = {"torch", "transformers", "huggingface_hub", "tokenizers"} | set(sys.stdlib_module_names)
    lazily = {"PIL", "numpy", "soundfile", "soxr", "av", "safetensors"}
    for path in (Path(mm_transformers.__file__).parent / "model").iterdir():
        if path.suffix != ".py":
            assert path.name == "__pycache__"
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and (len(words) == 2 or words[2:3] in (["import"], ["as"])):
                module = words[1]
                if module.startswith("."):
                    assert not module.startswith(".."), (path.name, line)
                    assert "." not in module[1:], (path.name, line)
                    assert module != ".", (path.name, line)
                else:
                    indented = line[0] == " "
                    assert module.split(".")[0] in allowed | (lazily if indented else set()), (path.name, line)
        if path.name.startswith(("modeling_mm", "configuration")):
            assert "from __future__ import annotations" not in path.read_text()


def test_checkpoint_of_another_type_says_so(tmp_path):
    BertModel(
        BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'bert', not 'mm_transformer'.*from_encoders"):
        MMTransformerForMultiTask.from_pretrained(tmp_path)


def test_from_encoders_from_local_folders(tmp_path):
    from tiny import TEXT_ENCODERS, VISION_ENCODERS, make_image_processor, make_tasks, make_tokenizer

    torch.manual_seed(0)
    AutoModel.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path / "text")
    make_tokenizer(max_length=512).save_pretrained(tmp_path / "text")
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(tmp_path / "vision")
    make_image_processor().save_pretrained(tmp_path / "vision")
    encoders = dict(text=str(tmp_path / "text"), vision=str(tmp_path / "vision"))
    processor = MMTransformerProcessor.from_encoders(**encoders)
    model = MMTransformerForMultiTask.from_encoders(
        **encoders, tasks=make_tasks(), fusion_type="merged", num_fusion_layers=1
    )
    assert processor.tokenizer.model_max_length == 40
    assert model.config.fusion_type == "merged"
    assert not model.training
    inputs = processor(text=["a lovely picnic", "a ruined picnic"], images=[None, torch.rand(3, 9, 9)])
    answers = model.decode(model(**inputs))
    assert answers[0]["topic"]["label"] in ("animals", "food", "travel")
    half = MMTransformerForMultiTask.from_encoders(**encoders, tasks=make_tasks(), dtype=torch.bfloat16)
    assert {p.dtype for name, p in half.named_parameters() if "gate_alpha" not in name} == {torch.bfloat16}
    assert half.model.fusion.layers[0].mlp_gate.gate_alpha.dtype == torch.float32
    eager = MMTransformerForMultiTask.from_encoders(**encoders, tasks=make_tasks(), attn_implementation="eager")
    assert eager.config._attn_implementation == eager.config.text_config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="Unknown fusion_type"):
        MMTransformerForMultiTask.from_encoders(text=encoders["text"], vision="no/such-model", fusion_type="nonsense")


@pytest.mark.parametrize("half", ["model", "processor"])
def test_saving_one_half_renews_the_code_of_both(tmp_path, half):
    """Otherwise a folder of an older version would have files of two versions, which do not fit each other."""
    parts = {"model": make_model(), "processor": make_processor()}
    for part in parts.values():
        part.save_pretrained(tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    assert {"modeling_mm_transformer.py", "processing_mm_transformer.py", "task_base.py"} <= set(files)
    for name in files:
        (tmp_path / name).write_text("raise ImportError('of an older version')\n")
    parts[half].save_pretrained(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.py")} == files
