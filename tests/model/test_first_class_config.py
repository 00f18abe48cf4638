"""What transformers' shared tests ask of a config: it survives every round trip, and bad values are told at once."""

import copy
import json
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from cases import first_quickly
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from tiny import AUDIO_ENCODERS, FUSION_KINDS, SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_config, make_tokenizer
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedConfig, ViTConfig, ViTModel

from mm_transformers import (
    Classification,
    Generation,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerModel,
    MMTransformerProcessor,
)


# One of each kind of encoder, and of each kind of fusion. They are built when a test asks for them.
CONFIGS = {
    "options": partial(
        make_config, tasks=[], freeze=["vision"], modality_dropout={"vision": 0.1, "text": 0.2},
        frame_embedding="learned", regularization={"kind": "l2", "weight": 0.1},
        task_weighting={"kind": "famo", "learning_rate": 0.1},
    ),
    "defaults": MMTransformerConfig,
    **{
        f"{name}, writing": lambda kind=kind: MMTransformerConfig(
            text_config=kind(), tasks=[Generation("german", max_length=6)]
        )
        for name, kind in SEQ2SEQ.items()
    },
    **{name: partial(make_config, text=name) for name in TEXT_ENCODERS},
    **{name: partial(make_config, vision=name) for name in VISION_ENCODERS},
    **{name: partial(make_config, vision=None, audio=name) for name in AUDIO_ENCODERS},
    **{name: partial(make_config, fusion_type=name) for name in FUSION_KINDS},
}  # fmt: skip
every_config = pytest.mark.parametrize("name", first_quickly(CONFIGS, 4))


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


@every_config
def test_every_round_trip_gives_an_equal_config(name, tmp_path):
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    again = {
        "dict": MMTransformerConfig.from_dict(config.to_dict()),
        "JSON": MMTransformerConfig.from_dict(json.loads(config.to_json_string())),
        "differences": MMTransformerConfig.from_dict(config.to_diff_dict()),
        "folder": MMTransformerConfig.from_pretrained(tmp_path),
        "AutoConfig": AutoConfig.from_pretrained(tmp_path),
        "file": MMTransformerConfig.from_json_file(tmp_path / "config.json"),
        "copy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
    }
    for how, other in again.items():
        assert type(other) is MMTransformerConfig, how
        told = ("transformers_version", "_name_or_path")  # where it was read from, and by whom it was written
        assert without(other.to_dict(), *told) == without(config.to_dict(), *told), how
        for name in MMTransformerConfig.sub_configs:
            assert type(getattr(other, name)) is type(getattr(config, name)), how
    assert again["folder"].to_json_string() == again["AutoConfig"].to_json_string()


@every_config
def test_a_config_is_not_changed_by_what_is_made_of_it(name):
    config = CONFIGS[name]()
    MMTransformerModel._from_config(config) if config.text_config.hidden_size < 100 else None
    before = config.to_json_string()
    copied = MMTransformerConfig.from_dict(config.to_dict())
    copied.text_config.vocab_size = 7
    copied.tasks.append({})
    assert config.to_json_string() == before


def test_names_of_transformers_are_known():
    config = make_config(fusion_hidden_size=64, num_fusion_layers=5, num_fusion_attention_heads=8)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 5, 8)
    config.hidden_size = 32
    assert config.fusion_hidden_size == 32
    assert MMTransformerConfig(hidden_size=96, num_attention_heads=3).fusion_hidden_size == 96
    assert make_config().vocab_size == 99


@given(st.sampled_from(sorted(set(MMTransformerConfig.__annotations__) - {"tasks", "freeze"})), st.data())
def test_a_misspelt_field_is_told(name, data):
    """Two letters changed places, or one is missing: the usual slips."""
    place = data.draw(st.integers(0, len(name) - 2))
    swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    dropped = name[:place] + name[place + 1 :]
    for slip in {swapped, dropped} - set(MMTransformerConfig.__annotations__):
        with pytest.raises(ValueError, match=f"no field '{slip}'; did you mean '{name}'"):
            MMTransformerConfig(**{slip: None})


def test_a_misspelt_option_of_from_encoders_is_told():
    with pytest.raises(ValueError, match="has no argument 'fusion_typ'; did you mean 'fusion_type'"):
        MMTransformerForMultiTask.from_encoders(text="none", fusion_typ="late")


@pytest.mark.parametrize("name", ["num_experts", "router_kind", "id_of_the_run", "image_token_id", "torchscript"])
def test_fields_of_later_releases_are_kept(name, tmp_path):
    make_config(**{name: 3}).save_pretrained(tmp_path)
    assert getattr(MMTransformerConfig.from_pretrained(tmp_path), name) == 3


def test_fields_of_transformers_are_never_taken_for_slips():
    fields = {name: value for name, value in PreTrainedConfig().to_dict().items() if name != "model_type"}
    assert make_config(**{**fields, "id2label": None, "label2id": None}).num_fusion_layers == 2


@pytest.mark.parametrize(
    "values",
    [
        {"num_fusion_layers": "3"}, {"fusion_dropout": None}, {"fusion_type": 3}, {"tasks": "topic"},
        {"fusion_kwargs": []}, {"freeze": "vision"}, {"text_config": "bert"}, {"num_frames": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types_are_told_by_name(values):
    with pytest.raises(StrictDataclassError, match=next(iter(values))):
        MMTransformerConfig(**values)


def test_values_that_were_set_later_are_checked_when_saved(tmp_path):
    config = make_config()
    config.fusion_dropout = 2.0
    with pytest.raises(StrictDataclassError, match="fusion_dropout must be"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["unknown-to-all", "", None])
def test_unknown_encoders_are_told(model_type):
    with pytest.raises(ValueError, match="text_config"):
        MMTransformerConfig(text_config={"model_type": model_type})


def test_folders_of_this_machine_are_not_saved(tmp_path):
    BertModel(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path / "text")
    ViTModel(VISION_ENCODERS["vit"]()).save_pretrained(tmp_path / "vision")
    model = MMTransformerForMultiTask.from_encoders(
        str(tmp_path / "text"), str(tmp_path / "vision"), tasks=[Classification("topic", labels=["a", "b"])]
    )
    model.config.text_config._name_or_path = "google-bert/bert-base-uncased"
    model.save_pretrained(tmp_path / "saved")
    MMTransformerForMultiTask.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    for folder in ("saved", "again"):
        text = (tmp_path / folder / "config.json").read_text()
        assert str(tmp_path) not in text
        assert json.loads(text)["text_config"]["_name_or_path"] == "google-bert/bert-base-uncased"


EVIL = "import pathlib\npathlib.Path({!r}).touch()\nclass Evil: pass\n"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("known", [True, False])
def test_code_that_an_encoders_config_names_is_not_run(part, known, tmp_path):
    folder, ran = tmp_path / "saved", tmp_path / "ran"
    MMTransformerForMultiTask(make_config()).save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(str(ran)))
    values = json.loads((folder / "config.json").read_text())
    values[part]["auto_map"] = {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoModelForSeq2SeqLM": "evil.Evil",
    }
    if not known:
        values[part]["model_type"] = "unknown-to-all"
    (folder / "config.json").write_text(json.dumps(values))
    loading = (
        "import sys, mm_transformers\nfrom transformers import AutoModel\n"
        "try: AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", loading, str(folder)], env=environment, capture_output=True, text=True, check=True
    )
    assert (not done.stdout) if known else (part in done.stdout)
    assert not ran.exists()


def test_encoders_of_ones_own_are_registered(tmp_path):
    class OwnConfig(BertConfig):
        model_type = "own-encoder"

    class OwnModel(BertModel):
        config_class = OwnConfig

    config = OwnConfig(**TEXT_ENCODERS["bert"]().to_diff_dict() | {"model_type": "own-encoder"})
    with pytest.raises(ValueError, match=r"AutoModel\.register"):
        MMTransformerModel(MMTransformerConfig(text_config=config))
    AutoConfig.register("own-encoder", OwnConfig)
    AutoModel.register(OwnConfig, OwnModel)
    model = MMTransformerModel(MMTransformerConfig(text_config=config, vision_config=VISION_ENCODERS["vit"]()))
    assert type(model.text_model) is OwnModel
    model.save_pretrained(tmp_path)
    loaded = MMTransformerModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_defaults_are_bert_and_vit():
    config = MMTransformerConfig(vision_config={"model_type": "vit"})
    assert type(config.text_config) is BertConfig
    assert type(config.vision_config) is ViTConfig
    assert config.fusion_hidden_size == 768
    assert config.num_fusion_attention_heads == 12


def test_processor_and_config_agree_on_what_they_are(tmp_path):
    MMTransformerProcessor(tokenizer=make_tokenizer()).save_pretrained(tmp_path)
    config = make_config(vision=None)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).modalities == []


def test_messages_about_huge_values_are_cut():
    with pytest.raises(ValueError, match=r"^Unknown task kind 'kkk") as error:
        MMTransformerConfig.from_dict({**make_config().to_dict(), "tasks": [{"kind": "k" * 4000, "name": "a"}]})
    assert 900 < len(str(error.value)) < 1010
