"""Files of strangers that would run code, write elsewhere or send data away: recipes, exports, checkpoints."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from recipes import make_rows, recipe_values, save_encoders, write_csv
from safetensors.torch import load_file, save_file
from tiny import make_model, make_processor
from transformers import BertConfig
from typer.testing import CliRunner

from mm_transformers import MMTransformerConfig, MMTransformerForMultiTask, MMTransformerProcessor
from mm_transformers.cli import app
from mm_transformers.data.loading import load_named
from mm_transformers.model.encoders import read_encoder_config
from mm_transformers.model.hub_kernels import asks_for_kernel, check_config
from mm_transformers.training.recipe import read_recipe


class Touch:
    """A pickle of it makes a file, as any other command."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def recipe(tmp_path, encoders):
    """Writes a recipe with more options."""
    write_csv(tmp_path / "train.csv", make_rows(tmp_path, 4))

    def write(section: str, **options) -> Path:
        values = recipe_values(encoders)
        values[section] = {**values[section], **options}
        (tmp_path / "recipe.yaml").write_text(json.dumps(values))
        return tmp_path / "recipe.yaml"

    return write


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


POWERS = [
    ("model", {"trust_remote_code": True}, "--trust-remote-code"),
    ("model", {"attn_implementation": "stranger/kernel"}, 'model.attn_implementation="stranger/kernel"'),
    ("training", {"push_to_hub": True}, "training.push_to_hub=true"),
    ("training", {"push_to_hub": True, "hub_model_id": "s/m"}, 'push_to_hub=true training.hub_model_id="s/m"'),
    ("training", {"push_to_hub": True, "hub_token": "hf_x"}, "training.hub_token=..."),
    ("training", {"report_to": "wandb"}, 'training.report_to="wandb"'),
    ("training", {"report_to": ["tensorboard", "trackio"], "trackio_space_id": "s/m"}, "training.trackio_space_id"),
    ("training", {"report_to": "all"}, 'training.report_to="all"'),
    ("training", {"deepspeed": {"wandb": {"enabled": True}}}, "training.deepspeed={"),
]


@pytest.mark.parametrize(("section", "options", "wanted"), POWERS)
def test_a_recipe_grants_itself_nothing(recipe, section, options, wanted):
    path = recipe(section, **options)
    with pytest.raises(ValueError, match="a recipe cannot ask for") as caught:
        read_recipe(path)
    assert wanted in str(caught.value)
    assert "hf_x" not in str(caught.value)
    said = [f"{section}.{key}={json.dumps(value)}" for key, value in options.items()]
    granted = read_recipe(path, said)
    assert {key: getattr(granted, section)[key] for key in options} == options


def test_where_a_model_is_sent_is_said_by_the_person_who_sends_it(recipe):
    path = recipe("training", hub_model_id="stranger/model", hub_token="hf_x")
    read_recipe(path)  # nothing is sent
    with pytest.raises(ValueError, match=r"where the model is sent.*the account that sends"):
        read_recipe(path, ["training.push_to_hub=true"])
    said = ["training.push_to_hub=true", "training.hub_model_id=me/model", "training.hub_token=null"]
    assert read_recipe(path, said).training["hub_model_id"] == "me/model"


@pytest.mark.parametrize("options", [{"report_to": "none"}, {"report_to": ["tensorboard"]}, {"push_to_hub": False}])
def test_what_stays_here_needs_no_word(recipe, options):
    assert read_recipe(recipe("training", **options)).training.items() >= options.items()


@pytest.mark.slow
def test_code_of_an_encoder(recipe, tmp_path, encoders):
    """Only `--trust-remote-code` runs it, and nobody is asked in between."""
    code = tmp_path / "text"
    code.mkdir()
    for file in (encoders / "text").iterdir():
        (code / file.name).write_bytes(file.read_bytes())
    config = json.loads((code / "config.json").read_text())
    config |= {"model_type": "unknown", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (code / "config.json").write_text(json.dumps(config))
    lines = [
        f"open({str(tmp_path / 'ran')!r}, 'w')",
        "from transformers import BertConfig",
        "class Config(BertConfig): pass",
    ]
    (code / "evil.py").write_text("\n".join(lines))
    path = recipe("model", text=str(code))
    assert "trust" in refused("train", path)
    assert "--trust-remote-code" in refused("train", recipe("model", text=str(code), trust_remote_code=True))
    assert not (tmp_path / "ran").exists()
    CliRunner().invoke(app, ["train", str(path), "--trust-remote-code"])
    assert (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """As `export_model` leaves it, but for the program."""
    folder = copied(saved, tmp_path_factory.mktemp("exported") / "out")
    graph = {"inputs": {"input_ids": [None, None]}, "types": {"input_ids": "int64"}, "outputs": ["topic"]}
    spec = {"format": "torch", "int8": False, "graphs": {"model": graph}}
    (folder / "export.json").write_text(json.dumps(spec))
    return folder


def test_programs_of_torch_need_trust(exported, tmp_path):
    """torch reads some of their parts by pickle. That they are loaded with trust is a test of exports."""
    from mm_transformers.sharing.exported_model import ExportedModel

    folder = copied(exported, tmp_path / "bad")
    (folder / "model.pt2").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"can run any code.*ONNX.*trust_pickle=True"):
        ExportedModel(folder)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError, match=r"model.pt2 cannot be loaded"):
        ExportedModel(folder, trust_pickle=True)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "pickle"}, {"format": ["onnx"]}, {"graphs": []}, {"graphs": {}}, {"graphs": {"../model": {}}},
        {"graphs": {"model": {}}}, {"graphs": {"model": {"inputs": {"x": [1]}, "types": {"x": "load"}, "outputs": []}}},
        {"graphs": {"model": {"inputs": {"x": [1, 10**12]}, "types": {"x": "int64"}, "outputs": []}}},
        {"graphs": {"model": {"inputs": {"x": [1, -1]}, "types": {"x": "int64"}, "outputs": []}}},
        {"graphs": {"model": {"inputs": {"x": None}, "types": {"x": "int64"}, "outputs": [1]}}}, None, [], "x", 5,
    ],
)  # fmt: skip
def test_descriptions_of_exports(exported, tmp_path, change):
    from mm_transformers.sharing.exported_model import ExportedModel

    folder = copied(exported, tmp_path / "bad")
    spec = json.loads((folder / "export.json").read_text())
    spec = {**spec, "format": "onnx", **change} if isinstance(change, dict) else change
    (folder / "export.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="is not a description of exported graphs"):
        ExportedModel(folder, trust_pickle=True)


def test_weights_of_a_graph_outside_its_folder(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from mm_transformers.sharing.exported_model import ExportedModel

    folder = copied(exported, tmp_path / "bad")
    spec = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**spec, "format": "onnx"}))
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", str(tmp_path / "secret"), "link"):
        weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
        node = onnx.helper.make_node("Identity", ["w"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("y", 1, [4])], [weight])
        made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
        (folder / "model.onnx").write_bytes(made.SerializeToString())
        with pytest.raises(OSError, match=r"model.onnx cannot be loaded"):
            ExportedModel(folder)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", [(), ("text_config",), ("vision_config",)])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_checkpoint_asks_for_no_code_of_the_hub(saved, tmp_path, place, key):
    folder = copied(saved, tmp_path / "bad")
    values = json.loads((folder / "config.json").read_text())
    inner = values
    for name in place:
        inner = inner[name]
    inner[key] = "stranger/kernel"
    (folder / "config.json").write_text(json.dumps(values))
    for load in (MMTransformerConfig.from_pretrained, MMTransformerForMultiTask.from_pretrained):
        with pytest.raises(ValueError, match="a checkpoint may not load"):
            load(folder)


@pytest.mark.parametrize(
    "name", ["stranger/kernel", "me/kernel@v1:attend", "x:y", "paged|me/kernel", {"": "me/kernel"}]
)
def test_names_that_are_code_of_the_hub(name):
    assert asks_for_kernel(name)


class SimpleConfig(BertConfig):
    """A config that holds others."""

    sub_configs = {"backbone_config": BertConfig, "vision_config": BertConfig}

    def __init__(self, **parts):
        self.__dict__.update(parts)


def test_configs_in_configs_ask_for_no_kernel():
    inner = BertConfig()
    middle = SimpleConfig(backbone_config=inner)
    outer = SimpleConfig(vision_config=middle)
    check_config(outer, "encoder")
    inner._attn_implementation_internal = "stranger/kernel"
    with pytest.raises(ValueError, match="asks for _attn_implementation='stranger/kernel', which is code of the Hub"):
        check_config(outer, "encoder")
    assert asks_for_kernel("sonicmoe")
    assert asks_for_kernel("deepgemm")


@pytest.mark.parametrize("installed", [[], ["kernels"], ["kernels", "flash_attn_2"], ["flash_attn_2"]])
def test_flash_attention_of_the_hub(monkeypatch, saved, tmp_path, recipe, encoders, installed):
    """Where only the package `kernels` is installed, transformers fetches FlashAttention."""
    for package in ("kernels", "flash_attn_2"):
        monkeypatch.setattr(f"transformers.utils.is_{package}_available", lambda there=package in installed: there)
    fetches = installed == ["kernels"]
    assert asks_for_kernel("flash_attention_2") == asks_for_kernel("paged|flash_attention_2") == fetches
    assert not any(map(asks_for_kernel, (None, "eager", "sdpa", "flex_attention", {"text_config": "sdpa"})))
    path = recipe("model", attn_implementation="flash_attention_2")
    folder = copied(saved, tmp_path / "bad")
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["attn_implementation"] = "flash_attention_2"
    (folder / "config.json").write_text(json.dumps(values))
    encoder = copied(encoders / "text", tmp_path / "encoder")
    values = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**values, "attn_implementation": "flash_attention_2"}))
    loads = {
        "a recipe cannot ask for": lambda: read_recipe(path),
        "a checkpoint may not load": lambda: MMTransformerConfig.from_pretrained(folder),
        "config of .* a checkpoint may not load": lambda: read_encoder_config(str(encoder), "text"),
    }
    for message, load in loads.items():
        if fetches:
            with pytest.raises(ValueError, match=message):
                load()
        else:
            load()


def test_a_checkpoint_runs_nothing(saved, tmp_path):
    """Neither its own code, nor a pickle that lies where weights are expected."""
    folder, ran = copied(saved, tmp_path / "bad"), tmp_path / "ran"
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text())
            kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
            values["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
            (folder / name).write_text(json.dumps(values))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Touch(ran)))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "stranger/base"}))
    # Adapters of a folder are read beside its weights, if peft is there; these are none.
    (folder / "adapter_config.json").unlink()
    MMTransformerForMultiTask.from_pretrained(folder)
    MMTransformerProcessor.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        MMTransformerForMultiTask.from_pretrained(folder)
    assert not ran.exists()


@pytest.mark.slow
def test_pickles_of_a_checkpoint_are_not_run(tmp_path, recipe):
    """Resuming reads optimiser, scheduler and random states."""
    path = recipe("training", max_steps=2, save_steps=1, save_strategy="steps", eval_strategy="no", output_dir="out")
    said = ["training.save_total_limit=5", "training.load_best_model_at_end=false"]
    result = CliRunner().invoke(app, ["train", str(path), *said])
    assert result.exit_code == 0, result.output
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "checkpoint_manifest.json").unlink(missing_ok=True)
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save({"x": Touch(tmp_path / "ran")}, checkpoint / name)
        more = [f"training.resume_from_checkpoint={checkpoint}", f"training.output_dir={tmp_path / 'new'}"]
        result = CliRunner().invoke(app, ["train", str(path), *said, *more])
        assert result.exit_code != 0
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_an_encoder_are_not_run(recipe, encoders, tmp_path):
    folder = copied(encoders / "text", tmp_path / "text")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "x": Touch(tmp_path / "ran")}, folder / "pytorch_model.bin")
    told = refused("train", recipe("model", text=str(folder)))
    assert "pytorch_model.bin" in told
    assert "weights_only" not in told
    assert not (tmp_path / "ran").exists()
    save_file(weights, folder / "model.safetensors")


def test_nobody_is_asked_whether_code_may_run(saved, tmp_path, monkeypatch):
    """transformers asks at the keyboard; what stands there may be a pipe."""
    folder = copied(saved, tmp_path / "asks")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps(values))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    with pytest.raises((OSError, ValueError), match="trust_remote_code"):
        MMTransformerProcessor.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_data_set_in_a_folder_fetches_nothing(tmp_path):
    config = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: http://127.0.0.1:1/x.csv\n"
    for name, text in (("README.md", f"---\n{config}---\n"), (".huggingface.yaml", config)):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match="refers to files elsewhere, which are not fetched"):
            load_named(str(folder))
    folder = tmp_path / "honest"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense_link: https://example.org\n---\nSee https://example.org.\n")
    (folder / "train.csv").write_text("text\na\nb\n")
    assert load_named(str(folder), cache_dir=str(tmp_path / "cache"))["train"]["text"][:] == ["a", "b"]


@pytest.mark.parametrize("option", [{"size": {"height": 8000, "width": 8000}}, {"size": {"shortest_edge": 9000}}])
def test_a_processor_cannot_take_memory(saved, tmp_path, option):
    folder = copied(saved, tmp_path / "large")
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"] |= option
    path.write_text(json.dumps(values))
    with pytest.raises((OSError, ValueError), match="larger than the limit kept_image_pixels"):
        MMTransformerProcessor.from_pretrained(folder)
