"""The scripts in `examples/` that translate, listen, or leave pictures out."""

import io
import json
import shutil

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from scripts import EXAMPLES, import_script, run
from tiny import AUDIO_ENCODERS, SEQ2SEQ, make_clip, make_feature_extractor, make_tokenizer
from transformers import AutoModel, AutoModelForSeq2SeqLM

from mm_transformers import MMTransformerForMultiTask, MMTransformerProcessor


FINETUNE, TRANSLATE, SPEECH = EXAMPLES / "finetune.py", EXAMPLES / "emoji/translate.py", EXAMPLES / "speech/train.py"
COLUMNS = ("group", "polarity_class", "emoji", "family", "name", "german", "french", "spanish", "chinese")


@pytest.fixture
def emoji_data(tmp_path):
    """Four emoji with three keywords each, two of them shared, in the form that build_dataset.py writes."""
    folder = tmp_path / "emoji_data"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = []
        for i, color in enumerate(("red", "green", "blue", "white")):
            file = io.BytesIO()
            Image.new("RGB", (40, 40), color).save(file, format="PNG")
            for keyword in ("color", "thing", color):
                row = dict.fromkeys(COLUMNS, "x") | {"text": keyword, "image": {"bytes": file.getvalue(), "path": None}}
                names = {language: f"{language} {color}" for language in ("german", "french", "chinese")}
                rows.append(row | names | {"emoji": str(i), "ambiguous": True})
        features = {"text": datasets.Value("string"), "image": datasets.Image(), "ambiguous": datasets.Value("bool")}
        features |= {column: datasets.Value("string") for column in COLUMNS}
        datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.nightly
def test_translate_reports_every_view(emoji_data, tmp_path):
    out = tmp_path / "results"
    options = ["--steps", 2, "--seeds", 2, "--workers", 0, "--modalities", "fused", "text"]
    done = run(TRANSLATE, "--data_dir", emoji_data, "--output_dir", out, *options, cwd=tmp_path)
    report = json.loads((out / "results.json").read_text())
    # One keyword of each of four emoji; among the held-out rows of the other split, two pairs share a keyword twice.
    assert report["rows"]["new_keyword"][0] == 4
    assert report["rows"]["new_emoji"] == [12, 8]
    assert list(report["results"]) == [
        "keyword and picture", "fused, no picture", "fused, pictures shuffled", "keyword alone",
    ]  # fmt: skip
    for name in ("fused, no picture", "keyword alone"):
        for seed in report["results"][name]["new_emoji"]:
            assert seed["german"]["contrastive"] == 0.5
    assert "German, emoji never seen: 12 rows, 8 pairs" in done.stdout
    assert (out / "results.png").stat().st_size > 10_000
    model = MMTransformerForMultiTask.from_pretrained(out / "model")
    processor = MMTransformerProcessor.from_pretrained(out / "model")
    ids = model.generate("chinese", **processor(text=["color"], images=[Image.new("RGB", (9, 9))]), num_beams=2)
    assert ids.shape[0] == 1


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng (apt install espeak-ng)")
@pytest.mark.nightly
def test_speech_reports_every_view(tmp_path):
    done = run(SPEECH, "--output_dir", tmp_path / "out", "--steps", 2, "--seeds", 2, cwd=tmp_path)
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert report["accuracy"]["always the commonest class"] == [
        {"sentiment": 0.5, "speaker": pytest.approx(2 / 3), "word, written": pytest.approx(1 / 12),
         "word, only heard": pytest.approx(1 / 12)}
    ]  # fmt: skip
    assert "sound alone" in done.stdout
    MMTransformerForMultiTask.from_pretrained(tmp_path / "out/model")


@pytest.mark.slow
def test_speech_needs_espeak(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(SPEECH, "--output_dir", tmp_path / "out", cwd=tmp_path, ok=False)
    assert "espeak-ng is not installed: apt install espeak-ng" in done.stderr


@pytest.mark.nightly
def test_missing_pictures_reports_every_share(tmp_path):
    done = run(EXAMPLES / "missing_pictures.py", "--steps", 2, "--seeds", 1, cwd=tmp_path)
    report = json.loads((tmp_path / "missing_pictures/results.json").read_text())
    for scores in report["scores"].values():
        assert list(scores) == ["sentiment", "topic", "intent", "german", "french"]
        assert all(list(row) == ["0%", "30%", "70%", "100%"] for row in scores.values())
    assert "best, 70%" in done.stdout


@pytest.mark.slow
def test_the_asked_share_of_pictures_is_missing():
    module = import_script(EXAMPLES / "missing_pictures.py")
    picture = Image.new("RGB", (4, 4))
    rows = datasets.Dataset.from_dict(
        {"text": [str(i) for i in range(50)], "image": [picture] * 50},
        features=datasets.Features(text=datasets.Value("string"), image=datasets.Image()),
    )
    for share in (0.0, 0.3, 0.7, 1.0):
        left = module.without_pictures(rows, share, seed=1)
        assert sum(image is None for image in left["image"]) == round(50 * share)
        assert list(left["text"]) == list(rows["text"])


@pytest.mark.slow
def test_finetune_writes_and_listens(tmp_path):
    """An encoder-decoder and an audio encoder, from files, with tasks of which two need no column."""
    torch.manual_seed(0)
    for name, model, tool in (
        ("text", AutoModelForSeq2SeqLM.from_config(SEQ2SEQ["bart"]()), make_tokenizer()),
        ("audio", AutoModel.from_config(AUDIO_ENCODERS["wav2vec2"]()), make_feature_extractor()),
    ):
        model.save_pretrained(tmp_path / name)
        tool.save_pretrained(tmp_path / name)
    rows = []
    for i in range(8):
        soundfile.write(tmp_path / f"{i}.wav", make_clip(0.05, seed=i), 16_000)
        text = "" if i == 3 else f"the {['cat', 'dog'][i % 2]} is {'very ' * i}red"
        rows.append(
            {"text": text, "audio": f"{i}.wav" if i != 5 else None, "answer": ["cat", "dog"][i % 2] if i else None}
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        {"kind": "generation", "name": "answer", "max_length": 5},
        {"kind": "retrieval", "name": "find", "modality": "audio", "embedding_size": 8},
        {"kind": "matching", "name": "match", "modality": "audio"},
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    data = tmp_path / "rows.jsonl"
    run(
        FINETUNE, "--text", tmp_path / "text", "--audio", tmp_path / "audio", "--tasks", tmp_path / "tasks.json",
        "--train_file", data, "--validation_file", data, "--test_file", data, "--output_dir", tmp_path / "out",
        "--max_steps", 2, "--use_cpu", "--report_to", "none", "--do_train", "--do_eval", "--do_predict",
        "--num_fusion_layers", 1, cwd=tmp_path,
    )  # fmt: skip
    metrics = json.loads((tmp_path / "out/all_results.json").read_text())
    assert {"eval_answer_bleu", "eval_find_mean_recall", "eval_match_accuracy", "predict_answer_exact_match"} <= set(
        metrics
    )
    answers = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert all(isinstance(answer["answer"]["text"], str) for answer in answers)
    assert -1 <= answers[0]["find"]["similarity"] <= 1
    # As the loaded model writes.
    model = MMTransformerForMultiTask.from_pretrained(tmp_path / "out")
    processor = MMTransformerProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text=[rows[1]["text"]], audio=[str(tmp_path / "1.wav")])
    [text] = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    assert text.strip() == answers[1]["answer"]["text"]
    assert np.isfinite(metrics["eval_loss"])
