"""A task kind, a fusion kind, a weighting and a modality that only this file knows take part in everything."""

import copy
import json
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from command_line import mm
from huggingface_hub.dataclasses import strict
from PIL import Image
from recipes import make_rows, read_csv, recipe_values, save_encoders, write_csv
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import PreTrainedConfig, pipeline

from mm_transformers import (
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Task,
    register_modality,
    register_task,
)
from mm_transformers.analysis import ablate, explain, faithfulness
from mm_transformers.analysis.report.answered_rows import answers_to, confusion
from mm_transformers.cli.page_answers import answers_as_html
from mm_transformers.data.folding import fold_numbers
from mm_transformers.model.fusion import FUSION_KINDS, Fusion, register_fusion
from mm_transformers.model.fusion_layers import Gate, masked_mean
from mm_transformers.model.label_cells import label_id, label_scores
from mm_transformers.model.linear_problem import BinaryProblem
from mm_transformers.model.modalities import (
    ARGUMENTS,
    ENCODERS,
    MODALITIES,
    NOUNS,
    OTHER_ENCODERS,
    PARTS,
    VISION,
    EncoderKind,
    Modality,
)
from mm_transformers.model.own_encoders import OwnEncoder
from mm_transformers.model.task_base import TASK_KINDS, PooledHead
from mm_transformers.sharing.export import export_model
from mm_transformers.sharing.exported_model import ExportedModel
from mm_transformers.training.linear_start.linear_models import Regressions
from mm_transformers.training.linear_start.probe_start import probes_of
from mm_transformers.training.metrics import ArrayMetric, base, register_metric
from mm_transformers.training.recipe import read_recipe
from mm_transformers.training.recipe.builders import split_options
from mm_transformers.training.weighting import TaskWeighting, register_weighting
from mm_transformers.training.weighting.base import WEIGHTINGS


# What a user writes: one task kind.


def reached(labels, num_labels):
    """(..., num_labels - 1) float32: whether each rating is above each step, NaN where the label is missing."""
    above = (labels[..., None] > torch.arange(num_labels - 1)).float()
    return above.masked_fill(labels[..., None] == -100, torch.nan)


@dataclass(frozen=True)
class OrdinalProblem(BinaryProblem):
    """A logistic regression for each step between two ratings."""

    def known(self, labels):
        return super().known(reached(labels, self.num_outputs + 1))

    def as_tensors(self, logits, labels):
        return torch.from_numpy(logits).float(), torch.from_numpy(labels).sum(-1).long()


@dataclass
class OrdinalStars(Task):
    """Chooses one of `labels`, which have an order. Logits (batch, num_labels - 1): is the rating above each step?"""

    labels: list[str] = field(default_factory=list)

    kind = "ordinal_stars"
    takes_whole_numbers = True
    default_metrics = ("accuracy", "f1")
    hub_task = "text-classification"

    def build_head(self, config, hidden_size):
        return PooledHead(hidden_size, len(self.labels) - 1, config.classifier_dropout)

    def linear_problem(self):
        return OrdinalProblem(len(self.labels) - 1)

    def encode_label(self, value, text):
        return None if value is None or value == "" else label_id(self.name, self.labels, value)

    def collate_labels(self, values, context=None):
        return torch.tensor([-100 if value is None else value for value in values])

    def label_shape(self, logits):
        return logits.shape[:1]

    def loss(self, logits, labels):
        targets = reached(labels, len(self.labels))
        known = ~targets.isnan()
        losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets.nan_to_num(), reduction="none")
        return (losses * known).mean(-1).sum(), self.num_labelled(labels)

    def probabilities(self, logits):
        above = logits.float().sigmoid().cummin(-1).values
        ends = nn.functional.pad(nn.functional.pad(above, (1, 0), value=1.0), (0, 1), value=0.0)
        return ends[..., :-1] - ends[..., 1:]

    def decode(self, logits, word_index=None):
        scores, ids = self.probabilities(logits).max(-1)
        return [{"label": self.labels[i], "score": p} for i, p in zip(ids.tolist(), scores.tolist(), strict=True)]

    def answer_scores(self, logits, answers, places=None):
        return label_scores(self, self.probabilities(logits).clamp(min=1e-6).log(), answers)

    def predictions_and_references(self, logits, labels):
        labelled = labels != -100
        return self.probabilities(logits).argmax(-1)[labelled], labels[labelled]


# One metric.


class StarsOff(ArrayMetric):
    """The mean distance between the chosen and the right label."""

    key, value_type, ndims, less_is_better = "stars_off", "int64", (1,), True

    def score(self, references, predictions):
        return np.abs(references - predictions).mean()


# One fusion kind.


class AddedMeans(Fusion):
    """Adds the mean of each stream to the text, behind a gate that starts at 0."""

    kind = "added_means"

    def __init__(self, config, stream_names, text_hidden_size):
        super().__init__(config, stream_names, text_hidden_size)
        self.gate = Gate()

    def fuse(self, text_states, text_mask, streams, record):
        for stream in streams:
            text_states = text_states + self.gate(masked_mean(stream.hidden_states, stream.mask))[:, None]
        return text_states


# One weighting.


class InverseLoss(TaskWeighting):
    """Weights each task by 1 / its last loss."""

    kind = "inverse_loss"

    def __init__(self, tasks, *, smallest: float = 0.1):
        super().__init__(tasks)
        self.smallest, self.last = smallest, torch.ones(len(tasks.names))

    def weights(self, step):
        return 1 / self.last.clamp(min=self.smallest)

    def update(self, step):
        self.last = torch.where(step.labelled, step.losses, self.last)

    def state_dict(self):
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = state["last"]


# One modality: some readings of a sensor, "0.5;1.5;-1", with an encoder of its own.


@strict
class SensorConfig(PreTrainedConfig):
    model_type = "sensor"

    num_readings: int = 3
    hidden_size: int = 8


class SensorEncoder(OwnEncoder):
    """One token per reading: a vector times the reading, plus another vector for its place."""

    config_class = SensorConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Linear(1, config.hidden_size)
        self.place = nn.Embedding(config.num_readings, config.hidden_size)

    @classmethod
    def prepare(cls, config, items):
        return {"sensor_values": torch.from_numpy(np.stack(items)).float()}

    @classmethod
    def blank_input(cls, config):
        return {"sensor_values": torch.zeros(1, config.num_readings)}

    def forward(self, sensor_values):
        return self.scale(sensor_values.to(self.dtype)[..., None]) + self.place.weight, None


def as_readings(cell):
    return [] if cell is None or (isinstance(cell, str) and not cell.strip()) else [cell]


def sensor_reader(context):
    num_readings = context.processor.sensor_config.num_readings

    def read(cell):
        if isinstance(cell, str):
            cell = np.array([float(part) for part in cell.split(";")])
        if len(cell) != num_readings:
            raise ValueError(f"there are {len(cell)} readings, but {num_readings} are needed")
        return cell

    return read


def as_key(item):
    return item if isinstance(item, str) else np.asarray(item).tobytes()


SENSOR_ENCODER = EncoderKind(
    "sensor", inputs=("sensor_values",), index="sensor_index", noun="sensor", plural="sensors", hub_tag="time-series",
    own=SensorEncoder,
)  # fmt: skip
SENSOR = Modality(
    "sensor", argument="sensor", encoder=SENSOR_ENCODER, noun="sensor", nouns="readings of sensors", items=as_readings,
    key=as_key, reader=sensor_reader, axes=(1,), most_axes=1, has_one=True, has_files=False,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_task(OrdinalStars)
    register_metric(StarsOff)
    register_fusion(AddedMeans)
    register_weighting(InverseLoss)
    register_modality(SENSOR)
    yield
    for names in (ENCODERS, OTHER_ENCODERS, MODALITIES, PARTS, ARGUMENTS, NOUNS):
        del names["sensor"]
    MMTransformerConfig.sub_configs.pop("sensor_config", None)
    del base._METRICS["stars_off"], TASK_KINDS["ordinal_stars"], FUSION_KINDS["added_means"], WEIGHTINGS["inverse_loss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows as CSV, a recipe that names only the kind, and in `out` the model that it trains."""
    folder = tmp_path_factory.mktemp("stars")
    rows = make_rows(folder, 24)
    for i, row in enumerate(rows):
        row["stars"] = None if i == 2 else 1 + i % 3
        row["readings"] = None if i == 5 else f"{i % 3};{i % 2}.5;-1"
    write_csv(folder / "train.csv", rows)
    values = recipe_values(save_encoders(folder / "encoders"), max_steps=4)
    values["tasks"] = [
        {"name": "stars", "kind": "ordinal_stars", "metrics": ["accuracy", "stars_off"]},
        {"name": "topic", "kind": "classification"},
    ]
    values["training"] |= {"metric_for_best_model": "stars_stars_off", "greater_is_better": False}
    values["model"] |= {
        "fusion_type": "added_means",
        "task_weighting": {"kind": "inverse_loss", "smallest": 0.5},
        "sensor": {"num_readings": 3},
    }
    values["columns"] = {"sensor": "readings"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    mm("train", folder / "recipe.yaml", f"data.test={folder / 'train.csv'}")
    yield folder
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture(scope="module")
def model(folder):
    return MMTransformerForMultiTask.from_pretrained(folder / "out").eval()


@pytest.fixture(scope="module")
def processor(folder):
    return MMTransformerProcessor.from_pretrained(folder / "out")


@pytest.fixture(scope="module")
def rows(folder):
    found = read_csv(folder / "train.csv")
    return [{**row, "image": str(folder / row["image"]) if row["image"] else None} for row in found]


@pytest.mark.slow
def test_labels_come_from_the_column_and_the_start_from_the_linear_model(folder, model):
    assert model.tasks["stars"].labels == ["1", "2", "3"]
    [probe] = probes_of(model)["stars"]
    assert probe.linear.weight.abs().sum() > 0
    results = json.loads((folder / "out" / "all_results.json").read_text())
    assert 0 <= results["test_stars_accuracy"] <= 1


def test_linear_start_is_a_logistic_regression_for_each_step():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 4)), torch.tensor(rng.integers(0, 3, 60))
    targets, known = OrdinalProblem(2).known(labels)
    assert known.all()
    weight, bias = OrdinalProblem(2).solver(features, targets.numpy(), np.ones(60), Regressions(1e-6))(1.0)
    for step in range(2):
        expected = LogisticRegression(tol=1e-6, max_iter=1000).fit(features, labels.numpy() > step)
        assert np.allclose(weight[step], expected.coef_[0], atol=1e-4)
        assert bias[step] == pytest.approx(expected.intercept_[0], abs=1e-4)


def test_fusion_and_weighting_are_those_of_the_recipe(folder, model):
    assert type(model.model.fusion) is AddedMeans
    assert model.config.task_weighting == {"kind": "inverse_loss", "smallest": 0.5}
    [saved] = sorted((folder / "out").glob("checkpoint-*"))[-1].glob("task_weighting*.safetensors")
    last = load_file(saved)["last"]
    assert last.shape == (2,)
    assert (last != 1).all(), "both tasks had a loss"


def test_columns_of_ones_own_modality(folder, monkeypatch):
    recipe = read_recipe(folder / "recipe.yaml")
    rows = [{"text": f"row {i}", "readings": f"{i // 2};0.5"} for i in range(40)]
    numbers = fold_numbers(rows, 4, **split_options(recipe))
    assert numbers[::2].tolist() == numbers[1::2].tolist()
    assert set(numbers) == {0, 1, 2, 3}
    assert recipe.columns.files == ["image", "video", "audio"]
    monkeypatch.setitem(PARTS, "sensor", replace(SENSOR, has_files=True))
    assert recipe.columns.files == ["image", "video", "audio", "readings"]
    assert recipe.columns.by_key(["vision", "sensor"]) == {"sensor": ["readings"]}


def test_modality_is_that_of_the_recipe(model, processor, rows):
    assert model.config.modalities == ["vision", "sensor"]
    assert isinstance(model.model.sensor_model, SensorEncoder)
    assert processor.sensor_config.num_readings == 3
    [probe] = probes_of(model)["stars"]
    assert probe.widths["sensor"] == 8
    assert probe.linear.weight[:, probe.blocks[-1][0]].abs().sum() > 0, "the linear start uses the readings"


def test_readings_have_an_effect_and_absent_ones_have_none(model, processor):
    pipe = pipeline("multimodal", model=model, processor=processor)
    with_readings, without, other = pipe(
        [{"text": "dog", "sensor": "2;0.5;-1"}, {"text": "dog"}, {"text": "dog", "sensor": [0.0, 9.0, 9.0]}],
        tasks=["stars"],
        batch_size=3,
    )
    assert with_readings != without
    assert other != without
    assert pipe({"text": "dog"}, tasks=["stars"]) == without
    with pytest.raises(ValueError, match="^Row 0: there are 2 readings, but 3 are needed$"):
        pipe({"text": "dog", "sensor": "1;2"})
    with pytest.raises(ValueError, match="did you mean 'sensor'"):
        pipe({"text": "dog", "sensors": "1;2;3"})


def test_collator_names_the_row_of_wrong_readings(model, processor):
    collator = MMDataCollator(processor, model.config, sensor_column="readings")
    batch = collator([{"text": "a", "readings": "1;2;3"}, {"text": "b", "readings": None}])
    assert batch["sensor_values"].tolist() == [[1.0, 2.0, 3.0]]
    assert batch["sensor_index"].tolist() == [[0], [-1]]
    with pytest.raises(ValueError, match="^row 1 of the batch, column 'readings': there are 1 readings, but 3"):
        collator([{"text": "a"}, {"text": "b", "readings": "1"}])
    with pytest.raises(TypeError, match="takes no argument 'senser_column'"):
        MMDataCollator(processor, model.config, senser_column="readings")


def test_every_parameter_of_the_encoder_takes_part_in_every_step(model, processor):
    copied = copy.deepcopy(model).train()
    copied(**processor(text=["a"]), labels={"stars": torch.tensor([1])}).loss.backward()
    assert all(parameter.grad is not None for parameter in copied.model.sensor_model.parameters())


def test_a_modality_needs_an_encoder_and_names_of_its_own():
    with pytest.raises(ValueError, match="^The encoder of the modality 'sensor' needs its class"):
        register_modality(replace(SENSOR, encoder=VISION))
    with pytest.raises(ValueError, match="^The encoder 'vision' already exists"):
        register_modality(replace(SENSOR, name="x", argument="x", encoder=replace(SENSOR_ENCODER, name="vision")))
    with pytest.raises(ValueError, match="^The modality 'images' already exists"):
        register_modality(replace(SENSOR, argument="images"))


def test_predict_and_evaluate(folder):
    mm("predict", folder / "out", folder / "train.csv", "--output", folder / "answers.csv")
    answers = read_csv(folder / "answers.csv")
    assert len(answers) == 24
    assert {row["stars"] for row in answers} <= {"1", "2", "3"}
    assert all(0 <= float(row["stars_score"]) <= 1 for row in answers)
    mm("evaluate", folder / "out", folder / "train.csv", "--output", folder / "metrics.json")
    truths = [row["stars"] for row in read_csv(folder / "train.csv")]
    right = sum(row["stars"] == truth for row, truth in zip(answers, truths, strict=True))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_stars_accuracy"] == pytest.approx(right / 23)
    off = [abs(int(row["stars"]) - int(truth)) for row, truth in zip(answers, truths, strict=True) if truth]
    assert metrics["eval_stars_stars_off"] == pytest.approx(sum(off) / 23)
    assert "eval_stars_f1" not in metrics


def test_report_has_verdict_confusion_and_confidence(model, processor, rows, folder):
    collator = MMDataCollator(processor, model.config, sensor_column="readings")
    found = [one for batch in answers_to(model, collator, rows, 8) for one in batch if one.task == "stars"]
    for row, one in zip(rows, found, strict=True):
        batch = collator([{**row, "stars": None}])
        batch.pop("labels")
        with torch.no_grad():
            probabilities = model.tasks["stars"].probabilities(model(**batch).logits["stars"])[0]
        assert one.answer == str(1 + int(probabilities.argmax()))
        assert one.confidence == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert one.truth == (row["stars"] or None)
        assert one.is_right == (None if one.truth is None else one.truth == one.answer)
    assert sum(map(sum, confusion(found, ["1", "2", "3"]))) == 23
    mm("explain", folder / "out", folder / "train.csv", "--output", folder / "report.html", "--examples", 2)
    assert "truth \\ answer" in (folder / "report.html").read_text()


def test_ablation_has_majority_and_calibration(model, processor, rows):
    collator = MMDataCollator(processor, model.config, sensor_column="readings")
    ablation = ablate(model, processor, rows, collator=collator, num_permutations=1, num_additive_rows=4)
    assert set(ablation.contributions["stars"].shapley) == {"text", "vision", "sensor"}
    assert ablation.majority["stars"] == pytest.approx(8 / 23)
    assert ablation.contributions["stars"].metric == "stars_accuracy"
    found = [
        one for batch in answers_to(model, collator, rows, 8) for one in batch if one.task == "stars" and one.truth
    ]
    calibration = ablation.calibration["stars"]
    assert sum(calibration.counts) == 23
    mean = sum(c * n for c, n in zip(calibration.confidences, calibration.counts, strict=True) if n) / 23
    assert mean == pytest.approx(np.mean([one.confidence for one in found]), abs=1e-4)


def test_explanation_and_faithfulness(model, processor, rows):
    row = {"text": rows[1]["text"], "image": rows[1]["image"], "sensor": rows[1]["readings"]}
    explanation = explain(model, processor, row, "stars")
    assert explanation.answer in ("1", "2", "3")
    assert set(explanation.shares) == {"text", "vision", "sensor"}
    given = [{"text": row["text"], "image": row["image"]} for row in rows[1:4]]
    found = faithfulness(model, processor, given, "stars", shares=(0.0, 0.5))
    assert found.positive.shape == (3, 2)


def test_page_shows_the_probabilities_of_the_labels(model, processor):
    page = answers_as_html(model, processor, {"text": "the red dog"}, ["stars"], ("text", "image"))
    inputs = processor(text=["the red dog"])
    with torch.no_grad():
        values = model.tasks["stars"].probabilities(model(**inputs).logits["stars"])[0].tolist()
    for value in values:
        assert f"{100 * value:.0f}%" in page or f"{100 * value:.1f}" in page


def test_card_names_the_task_of_the_hub(folder):
    card = (folder / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "ordinal stars" in card
    assert "readings of sensors" in card


@pytest.mark.slow
def test_export_answers_alike(folder, model, processor):
    export_model(model, processor, folder / "graph", kind="onnx")
    image = Image.new("RGB", (20, 30), "red")
    inputs = processor(text=["the green dog is small"], images=[image], sensor=["1;2;3"])
    with torch.no_grad():
        expected = model(**inputs).logits["stars"]
    assert torch.allclose(ExportedModel(folder / "graph")(**inputs).logits["stars"], expected, atol=1e-4)
