"""
Push and pull by the real client, in processes of their own, over HTTP against a small Hub on this machine.

Nothing of the client is replaced; only Xet is off, a protocol of storage servers that `hub_server` does not speak.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import Hub
from huggingface_hub import ModelCard
from packaging import version
from safetensors.torch import load_file
from tiny import make_image, make_model

import mm_transformers
from mm_transformers import MMTransformerForMultiTask, MMTransformerProcessor


TESTS, SOURCE = Path(__file__).parents[1], Path(mm_transformers.__file__).parents[1]

BEGIN = """
import json, os, sys, urllib.request
def mark(name): urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + name).read()
def failure(function, *args, **kwargs):
    try: function(*args, **kwargs)
    except Exception as error: return [type(error).__name__, str(error)]
told = {}
"""
END = "\nopen(sys.argv[1], 'w').write(json.dumps(told))\n"


class Client:
    """Runs scripts in processes of their own, with a home folder of their own."""

    def __init__(self, hub: Hub, home: Path):
        self.hub, self.home = hub, home

    def run(self, script: str, *arguments: str, token=None, home="home", **environment) -> dict:
        """What the script left in `told`."""
        home = self.home / home
        home.mkdir(exist_ok=True)
        told = home / "told.json"
        settings = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(SOURCE), str(TESTS)]),
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            **({"HF_TOKEN": token} if token else {}),
            **environment,
        }
        command = [sys.executable, "-c", BEGIN + script + END, str(told), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=200, cwd=home)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(told.read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"), {"ada-token": "ada", "bob-token": "bob"}).start()
    yield hub
    hub.stop()
    assert not hub.unknown  # otherwise what this Hub lacks would pass for what a repo lacks


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    return Client(hub, tmp_path_factory.mktemp("clients"))


WRITE = """
import torch
from datasets import Dataset, Features, Image, Value
from tiny import SEQ2SEQ, VISION_ENCODERS, make_image, make_model, make_processor, make_tasks, open_gates
from mm_transformers import Classification, Generation, MMTransformerConfig, MMTransformerForMultiTask

model, processor = make_model(), make_processor()
mark("push")
told["first"] = model.push_to_hub("ada/dogs", commit_message="The first").oid
processor.push_to_hub("ada/dogs")
mark("")
with torch.no_grad():
    for parameter in model.parameters(): parameter.mul_(1.1)
mark("second")
told["second"] = model.push_to_hub("ada/dogs", commit_message="The second", tags=["dogs"]).oid
mark("unchanged")
told["unchanged"] = model.push_to_hub("ada/dogs").oid
mark("")
with torch.no_grad():
    for parameter in model.parameters(): parameter.mul_(1.1)
told["pull_request"] = model.push_to_hub("ada/dogs", create_pr=True).pr_url
with torch.no_grad():
    for parameter in model.parameters(): parameter.mul_(1.1)
model.push_to_hub("ada/dogs", revision="experiment")
told["branch"] = processor.push_to_hub("ada/dogs", revision="experiment").oid
model.push_to_hub("ada/shards", max_shard_size="50KB")
model.save_pretrained("secret", push_to_hub=True, repo_id="ada/secret", private=True)
processor.save_pretrained("secret", push_to_hub=True, repo_id="ada/secret")
told["foreign"] = failure(model.push_to_hub, "bob/dogs")

torch.manual_seed(0)
config = MMTransformerConfig(
    text_config=SEQ2SEQ["marian"](), vision_config=VISION_ENCODERS["vit"](), num_fusion_layers=1,
    num_fusion_attention_heads=4, tasks=[*make_tasks(), Generation("german", max_length=8)], initializer_range=0.2,
)
writer = MMTransformerForMultiTask(config)
open_gates(writer)
writer.generation_config.num_beams = 3
writer.push_to_hub("ada/writer")
processor.push_to_hub("ada/writer")
single = make_model(tasks=[Classification("topic", labels=["animals", "food", "travel"])])
single.push_to_hub("ada/single")
processor.push_to_hub("ada/single")

rows = [{"text": "a red dog", "image": make_image(0), "topic": "animals"}]
rows.append({"text": "rain", "image": None, "topic": None})
features = Features({"text": Value("string"), "image": Image(), "topic": Value("string")})
Dataset.from_list(rows, features=features).push_to_hub("ada/rows")
"""


@pytest.fixture(scope="module")
def pushed(client):
    return client.run(WRITE, token="ada-token", home="writer")


LOGITS = """
import numpy as np
from tiny import make_image
def answers(model, processor):
    outputs = model(**processor(text=["a red dog", "rain"], images=[make_image(0), None]))
    return {name: np.nan_to_num(x.detach().numpy()).tolist() for name, x in outputs.logits.items()}
"""


def expected(hub, repo, revision="main", processor=None):
    """What this process reads from the files on the Hub's disk, without any client."""
    with tempfile.TemporaryDirectory() as folder:
        # Of a revision that was pushed before the processor was, with the processor of `main`.
        others = {name: file for name, file in hub.files(processor or repo).items() if not name.startswith("model")}
        for name, file in {**others, **hub.files(repo, revision)}.items():
            if "/" not in name:
                Path(folder, name).write_bytes(hub.content(file["sha256"]).read_bytes())
        model = MMTransformerForMultiTask.from_pretrained(folder)
        processor = MMTransformerProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(text=["a red dog", "rain"], images=[make_image(0), None]))
    return {name: x.nan_to_num().tolist() for name, x in outputs.logits.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), msg=name)


@pytest.mark.slow
def test_what_was_pushed(hub, pushed):
    files = hub.files("ada/dogs")
    code = {name for name in files if name.endswith(".py")}
    assert {"modeling_mm_transformer.py", "pipeline_mm_transformer.py", "processing_mm_transformer.py"} < code
    others = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert others < files.keys()
    assert {name.rpartition(".")[2] for name in files} <= {"json", "safetensors", "py", "md", "jinja", "txt"}
    commits = hub.repo("models", "ada/dogs")["commits"]
    assert commits[pushed["first"]]["title"] == "The first"
    assert commits[pushed["second"]]["title"] == "The second"
    # Nothing has changed: no commit.
    assert pushed["unchanged"] == pushed["second"]
    assert pushed["second"] == hub.repo("models", "ada/dogs")["refs"]["main"]
    first, second = (hub.files("ada/dogs", pushed[name]) for name in ("first", "second"))
    changed = {name for name in second if name in first and first[name]["sha256"] != second[name]["sha256"]}
    assert "model.safetensors" in changed
    assert not {name for name in changed if name.endswith(".py")}
    assert pushed["pull_request"] == f"{hub.endpoint}/ada/dogs/discussions/1"
    assert pushed["branch"] == hub.repo("models", "ada/dogs")["refs"]["experiment"]
    assert [name for name in hub.files("ada/shards") if name.endswith(".safetensors")][1:]
    assert hub.repo("models", "ada/secret")["private"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_mm_transformer.py"} < hub.files(
        "ada/secret"
    ).keys()
    _, message = pushed["foreign"]
    assert "403 Forbidden" in message
    assert "bob/dogs" in message


@pytest.mark.slow
def test_the_weights_on_the_hub_are_those_that_were_pushed(hub, pushed):
    first, second = (
        load_file(hub.content(hub.files("ada/dogs", pushed[name])["model.safetensors"]["sha256"]))
        for name in ("first", "second")
    )
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight * 1.1)


READ = (
    LOGITS
    + """
import mm_transformers
from transformers import AutoModel, AutoProcessor, pipeline
from datasets import load_dataset
for name in ("pull", "pull-again"):
    mark(name)
    model = AutoModel.from_pretrained("ada/dogs")
    processor = AutoProcessor.from_pretrained("ada/dogs")
mark("")
told["main"] = answers(model, processor)
told["class"] = type(model).__module__
told["revisions"] = {
    revision: answers(AutoModel.from_pretrained("ada/dogs", revision=revision), processor)
    for revision in (sys.argv[2], "refs/pr/1", "experiment")
}
told["shards"] = answers(AutoModel.from_pretrained("ada/shards"), processor)
pipe = pipeline("multimodal", model="ada/writer")
told["pipe"] = pipe({"text": "a red dog", "image": make_image(0)})
told["beams"] = pipe.model.generation_config.num_beams
told["text-classification"] = pipeline("text-classification", model="ada/single")("a red dog")
rows = load_dataset("ada/rows", split="train")
told["rows"] = [rows["text"][:], rows["topic"][:], [x if x is None else x.size for x in rows["image"]]]
told["rows piped"] = list(pipe(rows, tasks=["topic"], batch_size=2))
told["failures"] = {
    "private": failure(AutoModel.from_pretrained, "ada/secret"),
    "missing": failure(AutoModel.from_pretrained, "ada/cats"),
    "revision": failure(AutoModel.from_pretrained, "ada/dogs", revision="nowhere"),
    "wrong token": failure(AutoModel.from_pretrained, "ada/secret", token="nobody's"),
    "other user": failure(AutoModel.from_pretrained, "ada/secret", token="bob-token"),
    "processor": failure(AutoProcessor.from_pretrained, "ada/shards"),
}
own = {"token": "ada-token"}
model = AutoModel.from_pretrained("ada/secret", **own)
told["secret"] = answers(model, AutoProcessor.from_pretrained("ada/secret", **own))
told["modules"] = [name for name in sys.modules if name.startswith("transformers_modules.")]
"""
)


@pytest.fixture(scope="module")
def pulled(client, pushed):
    """By a fresh process, with an empty cache and no token."""
    return client.run(READ, pushed["first"], home="reader")


@pytest.mark.slow
@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="older ones ask more often what is there"
)
def test_how_many_requests_it_takes(hub, pulled):
    """What one push and one pull of model and processor ask for; written down, so that more would be seen."""
    counts = {name: hub.counted(name) for name in ("push", "second", "unchanged", "pull", "pull-again")}
    total = {name: sum(methods.values()) for name, methods in counts.items()}
    assert total["push"] <= 16, counts
    assert total["second"] <= 9, counts
    assert total["unchanged"] <= 8, counts
    assert "PUT" not in counts["unchanged"]  # no weights are sent again
    assert total["pull"] <= 26, counts
    assert total["pull-again"] <= 7, counts


@pytest.mark.slow
def test_pull_in_a_fresh_process(hub, pushed, pulled):
    assert_same(pulled["main"], expected(hub, "ada/dogs"))
    for revision, answers in pulled["revisions"].items():
        assert_same(answers, expected(hub, "ada/dogs", revision))
    main, *others = [pulled["main"], *pulled["revisions"].values()]
    assert all(other["score"] != main["score"] for other in others)
    assert_same(pulled["shards"], expected(hub, "ada/shards", processor="ada/dogs"))
    assert_same(pulled["secret"], expected(hub, "ada/secret"))
    assert pulled["class"] == "mm_transformers.model.modeling_mm_transformer"
    assert not pulled["modules"]  # with the package, no code of a repo is loaded
    assert pulled["beams"] == 3
    assert pulled["pipe"].keys() == {"topic", "sentiment", "tags", "score", "entities", "german"}
    assert pulled["text-classification"][0]["label"] in ("animals", "food", "travel")


@pytest.mark.slow
def test_a_data_set(pulled):
    assert pulled["rows"] == [["a red dog", "rain"], ["animals", None], [[20, 30], None]]
    assert pulled["rows piped"][0]["topic"] == pytest.approx(pulled["pipe"]["topic"])
    assert len(pulled["rows piped"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("private", "ada/secret is not a local folder and is not a valid model identifier"),
        ("missing", "ada/cats is not a local folder and is not a valid model identifier"),
        ("other user", "ada/secret is not a local folder and is not a valid model identifier"),
        ("revision", "nowhere is not a valid git identifier"),
        ("wrong token", "ada/secret"),
        ("processor", "ada/shards holds no processor; save it next to the model"),
    ],
)
def test_what_cannot_be_pulled(pulled, case, words):
    name, message = pulled["failures"][case]
    assert name == "OSError", message
    assert words in message


@pytest.mark.slow
def test_without_the_package(hub, pushed, client):
    """From the repo's own files, in a process in which `mm_transformers` cannot be imported."""
    script = """
sys.modules["mm_transformers"] = None
import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor, pipeline
pixels = Image.open("dog.png")
def answers(model, processor):
    outputs = model(**processor(text=["a red dog", "rain"], images=[pixels, None]))
    return {name: np.nan_to_num(x.detach().numpy()).tolist() for name, x in outputs.logits.items()}
told["refused"] = failure(AutoModel.from_pretrained, "ada/dogs", trust_remote_code=False)
told["modules before"] = [name for name in sys.modules if name.startswith("transformers_modules.")]
told["config"] = type(AutoConfig.from_pretrained("ada/dogs", trust_remote_code=True)).__name__
mark("stranger")
model = AutoModel.from_pretrained("ada/dogs", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("ada/dogs", trust_remote_code=True)
mark("")
told["class"] = type(model).__module__
told["dogs"] = answers(model, processor)
pipe = pipeline("multimodal", model="ada/writer", trust_remote_code=True)
told["pipe"] = pipe([{"text": "a red dog", "image": "dog.png"}, "rain"], batch_size=2)
single = AutoModelForSequenceClassification.from_pretrained("ada/single", trust_remote_code=True)
told["single"] = single(**processor(text=["a red dog"])).logits.tolist()
model.save_pretrained("again"); processor.save_pretrained("again")
model.push_to_hub("bob/copy"); processor.push_to_hub("bob/copy")
first, second = (AutoModel.from_pretrained(x, trust_remote_code=True).state_dict() for x in ("again", "bob/copy"))
told["same"] = all(first[name].equal(second[name]) for name in first | second)
copy = pipeline("multimodal", model="bob/copy", trust_remote_code=True)
told["copy"] = copy({"text": "a red dog", "image": "dog.png"})
"""
    home = client.home / "stranger"
    home.mkdir()
    make_image(0).save(home / "dog.png")
    told = client.run(script, token="bob-token", home="stranger")
    # Two for each file of code, and those of a pull with the package.
    code = sum(name.endswith(".py") for name in hub.files("ada/dogs"))
    counts = hub.counted("stranger")
    assert sum(counts.values()) <= 2 * code + 26, counts
    assert told["refused"][0] == "ValueError"
    assert "trust_remote_code=True" in told["refused"][1]
    assert not told["modules before"]
    assert told["config"] == "MMTransformerConfig"
    assert told["class"].startswith("transformers_modules.")
    assert_same(told["dogs"], expected(hub, "ada/dogs"))
    assert set(told["pipe"][0]) == {"topic", "sentiment", "tags", "score", "entities", "german"}
    assert told["pipe"][0]["entities"][2]["word"] == "dog"
    assert len(told["single"][0]) == 3
    # What was saved and pushed from there is whole: with the package, and again without.
    assert_same(expected(hub, "bob/copy"), expected(hub, "ada/dogs"))
    assert told["same"]
    wanted = expected(hub, "ada/dogs")["score"][0]
    assert told["copy"]["score"]["value"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_offline_from_the_cache(hub, pulled, client):
    before = len(hub.requests)
    told = client.run(
        LOGITS
        + """
import mm_transformers
from transformers import AutoModel, AutoProcessor, pipeline
told["main"] = answers(AutoModel.from_pretrained("ada/dogs"), AutoProcessor.from_pretrained("ada/dogs"))
told["pipe"] = pipeline("multimodal", model="ada/writer")({"text": "a red dog", "image": make_image(0)})
told["cats"] = failure(AutoModel.from_pretrained, "ada/cats")
""",
        home="reader",
        HF_HUB_OFFLINE="1",
    )
    assert len(hub.requests) == before
    assert_same(told["main"], pulled["main"])
    assert told["pipe"] == pulled["pipe"]
    name, message = told["cats"]
    assert name == "OSError"
    assert "couldn't find them in the cached files" in message


PUSH = """
from tiny import make_model, make_processor
told["error"] = failure(make_model(seed=int(sys.argv[2])).push_to_hub, "ada/dogs")
if told["error"] is None: make_processor().push_to_hub("ada/dogs")
"""


@pytest.mark.nightly
def test_the_server_dies_in_the_middle_of_an_upload(tmp_path):
    """What is on the Hub stays what it was, and the next push completes."""
    hub = Hub(tmp_path / "hub", {"ada-token": "ada"}).start()
    client = Client(hub, tmp_path)
    try:
        assert client.run(PUSH, "0", token="ada-token")["error"] is None
        before, files = expected(hub, "ada/dogs"), hub.files("ada/dogs")
        stored = sorted(path.name for path in (hub.root / "files").iterdir())
        for part in ("/lfs/upload", "/commit/"):
            hub.dies_at = part
            name, message = client.run(PUSH, "1", token="ada-token")["error"]
            assert hub.server is None, "It did not die."
            assert name in ("ConnectError", "ReadError", "RemoteProtocolError", "RuntimeError"), message
            assert hub.files("ada/dogs") == files
            if part == "/lfs/upload":
                assert sorted(path.name for path in (hub.root / "files").iterdir()) == stored
            assert_same(expected(hub, "ada/dogs"), before)
            hub.start()
        assert client.run(PUSH, "1", token="ada-token")["error"] is None
        after = load_file(hub.content(hub.files("ada/dogs")["model.safetensors"]["sha256"]))
        pushed = make_model(seed=1).state_dict()
        assert after.keys() == pushed.keys()
        assert all(torch.equal(after[name], weight) for name, weight in pushed.items())
    finally:
        hub.stop()


TRAIN = """
from tiny import make_image, make_model, make_processor
from transformers import TrainingArguments
from mm_transformers import Classification, MMTrainer
rows = [{"text": text, "image": make_image(i), "topic": topic}
        for i, (text, topic) in enumerate([("a red dog", "animals"), ("rain", "travel")] * 4)]
model = make_model(tasks=[Classification("topic", labels=["animals", "food", "travel"])])
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    args = TrainingArguments(
        f"out-{strategy}", push_to_hub=True, hub_model_id=f"ada/{strategy.replace('_', '-')}", hub_strategy=strategy,
        hub_private_repo=strategy == "end", hub_always_push=True,
        max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
    )
    trainer = MMTrainer(model, args, train_dataset=rows, processing_class=make_processor())
    trainer.train()
    if strategy == "end": trainer.push_to_hub(commit_message="The end")
    else: trainer._finish_current_push()
"""


@pytest.mark.slow
def test_the_trainer_pushes(hub, client):
    client.run(TRAIN, token="ada-token", home="trainer")
    whole = {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "modeling_mm_transformer.py",
        "README.md",
    }
    for repo in ("end", "every-save", "checkpoint", "all-checkpoints"):
        files = hub.files(f"ada/{repo}")
        assert whole <= files.keys(), repo
        config = json.loads(hub.content(files["config.json"]["sha256"]).read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_mm_transformer.MMTransformerForMultiTask"
        assert set(expected(hub, f"ada/{repo}")) == {"topic"}
        card = ModelCard(hub.content(files["README.md"]["sha256"]).read_text())
        assert f'model="ada/{repo}"' in card.text
        assert "| steps | 4 |" in card.text or repo != "end"
    assert hub.repo("models", "ada/end")["private"]
    assert "The end" in [commit["title"] for commit in hub.repo("models", "ada/end")["commits"].values()]
    assert not any(name.startswith("checkpoint-") for name in hub.files("ada/end"))
    assert any(name.startswith("last-checkpoint/") for name in hub.files("ada/checkpoint"))
    assert {name.partition("/")[0] for name in hub.files("ada/all-checkpoints") if "/" in name} >= {"checkpoint-2"}
