"""Exported graphs answer as the model does, whatever the number of rows, words and images."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from command_line import mm
from tiny import (
    FUSION_KINDS,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_clip,
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
    open_gates,
)
from transformers import TorchAoConfig
from typer.testing import CliRunner
from writers import DECODERS, make_small_writer

from mm_transformers import (
    Classification,
    Generation,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
    Retrieval,
    table_columns,
)
from mm_transformers.cli import app, export


pytest.importorskip("transformers.exporters.quantizers", reason="needs a newer transformers")
if importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("needs mm-transformers[onnx]", allow_module_level=True)

from mm_transformers.sharing.export import export_model, sample_inputs
from mm_transformers.sharing.exported_model import ExportedModel


def batches(processor):
    """None of them as those that were traced: one row, no image, many, shared ones, longer texts."""
    shared = make_image(7)
    yield processor(text=["a red dog"], images=[None])
    yield processor(text=["a cat", "over the rain in a very small river", "sun"], images=[None, None, None])
    yield processor(text=["a"] * 5, images=[[make_image(i) for i in range(4)], None, [shared], [shared], []])
    yield processor(text=["big cat in the rain"], images=[[make_image(1), make_image(2), make_image(3)]])
    yield processor(text=["a dog", None], images=[make_image(4), make_image(5)])


def check(model, exported, processor):
    for inputs in batches(processor):
        with torch.no_grad():
            expected = model(**inputs).logits
        found = exported(**inputs).logits
        for name, task in model.tasks.items():
            if not task.needs_decoder:
                assert found[name].shape == expected[name].shape
                assert (found[name] - expected[name]).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.nightly), "torch"])
def test_every_kind_of_head(kind, tmp_path):
    model, processor = make_model(item_order=True), make_processor()
    torch.nn.init.normal_(model.model.vision_order.weight)
    export_model(model, processor, tmp_path / "out", kind)
    exported = ExportedModel(tmp_path / "out", trust_pickle=True)
    check(model, exported, MMTransformerProcessor.from_pretrained(tmp_path / "out"))
    inputs = processor(text=["a red dog", "rain"], images=[make_image(0), None])
    with torch.no_grad():
        answers = model.decode(model(**inputs), inputs.get("word_index"))
    for answer, other in zip(exported.decode(exported(**inputs), inputs.get("word_index")), answers, strict=True):
        assert answer["topic"]["label"] == other["topic"]["label"]
        assert answer["topic"]["score"] == pytest.approx(other["topic"]["score"], abs=1e-5)
    assert not list(tmp_path.glob(".out*")), "nothing half-written is left"
    without_index = {name: value for name, value in inputs.items() if name != "image_index"}
    without_index |= {"pixel_values": torch.cat([inputs["pixel_values"]] * 2)}
    torch.testing.assert_close(
        exported(**without_index).logits["topic"], model(**without_index).logits["topic"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("fusion", FUSION_KINDS)
@pytest.mark.parametrize(("text", "vision"), [("bert", "convnextv2"), ("distilbert", "clip-vision"), ("t5", "swin")])
def test_every_fusion(fusion, text, vision, kind, tmp_path):
    model, processor = make_model(text, vision, fusion_type=fusion), make_processor()
    export_model(model, processor, tmp_path / "out", kind)
    check(model, ExportedModel(tmp_path / "out", trust_pickle=True), processor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writer", "kind"),
    [
        ("bart", "onnx"),
        *(
            pytest.param(w, k, marks=pytest.mark.nightly)
            for w in ("t5", "marian", "m2m100", "mt5")
            for k in ("onnx", "torch")
        ),
    ],
)
def test_writing(writer, kind, tmp_path):
    model, processor = make_small_writer(writer), make_processor()
    export_model(model, processor, tmp_path / "out", kind)
    exported = ExportedModel(tmp_path / "out", trust_pickle=True)
    decoder, calls = exported.model.text_model, {"run": 0, "step": 0}

    def counted(name):
        graph = getattr(decoder, name)

        def run(feed):
            calls[name] += 1
            return graph(feed)

        return run

    decoder.run, decoder.step = counted("run"), counted("step")
    for inputs in batches(processor):
        for options in ({}, {"num_beams": 3}, {"max_new_tokens": 3}):
            calls.update(run=0, step=0)
            written = exported.generate("german", **inputs, **options)
            assert torch.equal(written, model.generate(**inputs, **options))
            assert calls["run"] == 1  # the cache holds the tokens before
            assert calls["step"] >= written.shape[1] - 2


@pytest.mark.nightly
@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_a_decoder_behind_an_encoder_without_one(decoder, tmp_path):
    """Saved, loaded and exported, it writes the same."""
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), vision_config=VISION_ENCODERS["vit"](), num_fusion_layers=1,
        decoder_config=DECODERS[decoder](), tasks=[Generation("german", max_length=6)], initializer_range=0.2,
    )  # fmt: skip
    model, processor = MMTransformerForMultiTask(config).eval(), make_processor()
    open_gates(model)
    model.save_pretrained(tmp_path / "model")
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "model").eval()
    export_model(loaded, processor, tmp_path / "out")
    exported = ExportedModel(tmp_path / "out", trust_pickle=True)
    for inputs in batches(processor):
        for options in ({}, {"num_beams": 3}):
            expected = model.generate(**inputs, **options)
            assert torch.equal(loaded.generate(**inputs, **options), expected)
            assert torch.equal(exported.generate("german", **inputs, **options), expected)


@pytest.mark.nightly
@pytest.mark.parametrize("audio", ["wav2vec2", "whisper", "ast"])
def test_sound(audio, tmp_path):
    model = make_model(vision=None, audio=audio, tasks=[Classification("topic", labels=["a", "b"])])
    processor = MMTransformerProcessor(tokenizer=make_tokenizer(), feature_extractor=make_feature_extractor(audio))
    export_model(model, processor, tmp_path / "out", "torch")
    exported = ExportedModel(tmp_path / "out", trust_pickle=True)
    for clips in ([make_clip(0.3), None, make_clip(0.1)], [None] * 3, [make_clip(0.2)] * 3):
        inputs = processor(
            text=["a dog", "", "rain"] if clips[1] is not None else ["a", "b", "c"], audio=clips, sampling_rate=16_000
        )
        with torch.no_grad():
            expected = model(**inputs).logits["topic"]
        assert (exported(**inputs).logits["topic"] - expected).abs().max() < 1e-4


@pytest.mark.nightly
def test_integers_are_smaller_and_near(tmp_path):
    model, processor = make_model(), make_processor()
    export_model(model, processor, tmp_path / "int8", int8=True)
    matrices = sum(value.nbytes for value in model.parameters() if value.ndim == 2)
    with (tmp_path / "int8" / "model.onnx.data").open("rb") as file:
        assert len(file.read()) < sum(value.nbytes for value in model.parameters()) - matrices // 2
    inputs = next(batches(processor))
    found = ExportedModel(tmp_path / "int8")(**inputs).logits["entities"]
    with torch.no_grad():
        expected = model(**inputs).logits["entities"]
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max() + 0.02


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantizers_of_transformers(kind, tmp_path):
    """Heads and gates included; generation too."""
    quantization = pytest.importorskip("torchao.quantization")
    model = make_small_writer("bart")
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(getattr(quantization, kind)())
    smaller = MMTransformerForMultiTask.from_pretrained(tmp_path, quantization_config=config)
    layer = smaller.model.fusion.layers[0].cross_attention.q_proj
    assert "Int8" in type(layer.weight).__name__ or "AffineQuantized" in type(layer.weight).__name__
    labels = {"german": torch.tensor([[5, 6, 2]])}
    for inputs in batches(make_processor()):
        if inputs["input_ids"].shape[0] == 1:
            with torch.no_grad():
                expected, found = (m(**inputs, labels=labels).logits["german"] for m in (model, smaller))
            assert 0 < (found - expected).abs().mean() < 0.1 * expected.abs().mean()
            assert smaller.generate("german", **inputs).shape[0] == 1


class Graphs:
    """The model itself in place of its graphs, with a fault."""

    def __init__(self, model, fault):
        self.model, self.fault = model, fault

    def __call__(self, **inputs):
        if self.fault == "swapped pictures" and "image_index" in inputs:
            index = inputs["image_index"]
            inputs["image_index"] = torch.where(index < 0, index, index.max() - index)
        found = self.model(**inputs)
        if self.fault in ("nan", "rounded"):
            change = float("nan") if self.fault == "nan" else 2e-6
            found.logits = {
                name: value + change * self.model.tasks[name].logit_unit for name, value in found.logits.items()
            }
        return found


@pytest.mark.parametrize(
    ("fault", "is_right"), [("none", True), ("rounded", True), ("nan", False), ("swapped pictures", False)]
)
def test_faults_of_graphs_are_noticed(fault, is_right, monkeypatch, tmp_path):
    tasks = [Regression("price", scale=20_000.0), Classification("topic", labels=["a", "b"]), Retrieval("find")]
    model, processor = make_model(tasks=tasks).eval(), make_processor()
    open_gates(model)
    monkeypatch.setattr(export, "ExportedModel", lambda *_, **__: Graphs(model, fault))
    found = export.compare(model, processor, tmp_path)
    assert (max(found.values()) <= export.TOLERANCE) is is_right
    if fault == "nan":
        assert found["price"] == math.inf


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_refused_export_does_not_stay(dtype, monkeypatch, tmp_path):
    model = make_model(tasks=[Classification("topic", labels=["a", "b"])])
    model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    written = tmp_path / "out"

    def write(model, processor, folder, *_, **__):
        folder.mkdir()
        (folder / "export.json").write_text("{}")

    monkeypatch.setattr(export, "export_model", write)  # the graphs take seconds
    monkeypatch.setattr(export, "ExportedModel", lambda *_, **__: Graphs(model.eval(), "nan"))
    with pytest.raises(ValueError, match="in task 'topic', .* It was removed"):
        export.run_export(str(tmp_path / "model"), written, "onnx", dtype)
    assert not written.exists()


def test_the_sample_tells_pictures_and_sounds_apart():
    model = make_model(audio="hubert", tasks=[Classification("topic", labels=["a", "b"])])
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), make_feature_extractor("hubert"))
    first, second = (sample_inputs(model, processor, 4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for index, values in (("image_index", "pixel_values"), ("audio_index", "input_values")):
        assert first[index][-1].tolist() == [-1] * 4
        assert [sum(place >= 0 for place in row) for row in first[index].tolist()] == [4, 1, 1, 0]
        assert len(first[values].flatten(1).unique(dim=0)) == 6


@pytest.mark.slow
def test_the_command(tmp_path):
    # Prices: float32 has 7 digits, so their logits differ by more than 1e-4.
    tasks = [Classification("topic", labels=["a", "b"]), Regression("price", scale=2e6)]
    make_model(tasks=tasks).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    shown = mm("export", tmp_path / "model", "--output", tmp_path / "out", "--format", "torch")
    assert "largest difference" in shown
    assert json.loads((tmp_path / "out" / "export.json").read_text())["format"] == "torch"
    assert ExportedModel(tmp_path / "out", trust_pickle=True).tasks["topic"].labels == ["a", "b"]
    for options, words in (
        (["--output", tmp_path / "out"], "not empty"),
        (["--output", tmp_path / "b", "--format", "onxx"], "onxx"),
        (["--output", tmp_path / "b", "--dtype", "int4"], "int4"),
        (["--output", tmp_path / "b", "--dtype", "int8", "--format", "torch"], "int8 needs"),
    ):
        result = CliRunner().invoke(app, ["export", str(tmp_path / "model"), *map(str, options)])
        assert result.exit_code == 2
        assert words in result.output
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_what_an_exported_model_cannot_take(tmp_path):
    with pytest.raises(OSError, match="no exported model"):
        ExportedModel(tmp_path)
    model, processor = make_model(tasks=[Classification("topic", labels=["a", "b"])]), make_processor()
    export_model(model, processor, tmp_path / "out", "torch")
    exported = ExportedModel(tmp_path / "out", trust_pickle=True)
    inputs = dict(processor(text=["a dog"], images=[make_image(0)]))
    with pytest.raises(ValueError, match="no videos"):
        exported(**inputs, frame_index=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="got input_values"):
        exported(**inputs, input_values=torch.from_numpy(np.zeros((1, 800), np.float32)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cells", "num_rows"),
    [
        ({"price": 2.0, "brand": "a"}, 1),
        ({"price": 2.0}, 1),
        ({"brand": "a"}, 1),
        ({"price": 2.0, "size": 7, "brand": "a"}, 40),
    ],
)
def test_columns_of_numbers_and_categories(tmp_path, cells, num_rows):
    """Many rows give the prices bins, and the sizes none."""
    rows = [{"price": 3.0 + i, "size": 7 + i % 2, "brand": "b"} for i in range(num_rows)]
    table = table_columns([cells, *rows], list(cells))
    assert sum(table.num_bins) == (4 if num_rows > 1 else 0)
    processor = MMTransformerProcessor(None, make_tokenizer(), table_config=table)
    tasks = [Classification("topic", labels=["a", "b"])]
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), table_config=table, tasks=tasks, num_fusion_layers=1, linear_probe=True
    )
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    export_model(model, processor, tmp_path / "graph")
    exported = ExportedModel(tmp_path / "graph")
    for rows in ([cells], [None, cells, dict.fromkeys(cells), cells], [None]):
        inputs = processor(text=["a cat"] * len(rows), table=rows)
        with torch.no_grad():
            expected = model(**inputs).logits["topic"]
        torch.testing.assert_close(exported(**inputs).logits["topic"], expected, rtol=1e-4, atol=1e-5)
