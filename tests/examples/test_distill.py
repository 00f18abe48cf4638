"""examples/distill.py with a tiny teacher."""

import argparse
import json

import datasets
import pytest
import torch
from scripts import EXAMPLES, import_script, run
from tiny import make_image, make_model, make_processor

from mm_transformers import (
    Classification,
    Matching,
    MMDataCollator,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
    Retrieval,
)


@pytest.mark.slow
def test_a_student_has_fewer_layers_and_learns_from_the_teacher(tmp_path):
    tasks = [Classification("topic", labels=["a", "b", "c"]), Regression("price")]
    teacher = make_model("bert", "vit", tasks=tasks)
    teacher.save_pretrained(tmp_path / "teacher")
    processor = make_processor()
    processor.input_columns = {"text": ["title"], "image": ["image"]}
    processor.save_pretrained(tmp_path / "teacher")
    words = ["red dog", "green cat", "blue crane", "small bat", "big desk", "lovely sun"]
    rows = [
        {"title": words[i], "image": make_image(i) if i else None, "topic": "abc"[i % 3], "price": float(i)}
        for i in range(6)
    ]
    features = datasets.Features(
        {"title": datasets.Value("string"), "image": datasets.Image(), "topic": datasets.Value("string"),
         "price": datasets.Value("float64")}
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    given = ["--teacher", tmp_path / "teacher", "--data", tmp_path / "data", "--text_layers", 1, "--epochs", 40]
    given += ["--batch_size", 5]  # the last batch has one row: no variance of its own
    run(EXAMPLES / "distill.py", *given, "--learning_rate", 0.003, "--weight", 10, cwd=tmp_path)
    scores = json.loads((tmp_path / "distilled/results.json").read_text())["scores"]
    assert list(scores) == ["teacher", "labels alone", "distilled"]
    assert scores["distilled"]["million parameters"] < scores["teacher"]["million parameters"]
    students = {
        "teacher": teacher,
        "distilled": MMTransformerForMultiTask.from_pretrained(tmp_path / "distilled").eval(),
    }
    assert students["distilled"].config.text_config.num_hidden_layers == 1
    assert teacher.config.text_config.num_hidden_layers > 1
    inputs = MMTransformerProcessor.from_pretrained(tmp_path / "distilled")(
        text=[row["title"] for row in rows], images=[row["image"] for row in rows]
    )
    logits = {name: model(**inputs).logits["topic"].detach() for name, model in students.items()}
    # The last layer of the student is the last one of the teacher.
    assert (logits["distilled"] - logits["teacher"]).pow(2).mean() < 0.5 * logits["teacher"].var()


@pytest.mark.parametrize("other", [Matching("fits"), Retrieval("find", embedding_size=8), Regression("price")])
def test_heads_of_every_shape_are_distilled(other):
    """With labels, a head that matches also gives logits of mismatched pairs, which the teacher has not given."""
    distill = import_script(EXAMPLES / "distill.py")
    teacher, processor = make_model(tasks=[Classification("topic", labels=["a", "b", "c"]), other]), make_processor()
    rows = [{"text": "red dog", "image": make_image(i), "topic": "abc"[i % 3], "price": 1.0} for i in range(8)]
    batches, collator = [rows[:5], rows[5:]], MMDataCollator(processor, teacher.config)
    taught = distill.teach(teacher, collator, batches, list(teacher.tasks))
    student = distill.smaller(teacher, {"text": 1})
    before = {name: value.clone() for name, value in student.heads.named_parameters()}
    args = argparse.Namespace(seed=0, learning_rate=1e-3, epochs=1, weight=1.0)
    distill.train(student, collator, batches, taught, args)
    assert all(not torch.equal(value, before[name]) for name, value in student.heads.named_parameters())


@pytest.mark.parametrize(
    ("layers", "has_small_pictures", "trained"),
    [({"text": 1}, False, {"text"}), ({"text": None}, True, {"vision"}), ({"text": None}, False, set())],
)
def test_encoders_that_change_are_trained(layers, has_small_pictures, trained):
    distill = import_script(EXAMPLES / "distill.py")
    teacher = make_model(tasks=[Classification("topic", labels=["a", "b"])], freeze=["text", "vision"])
    student = distill.smaller(teacher, layers, has_small_pictures)
    for name in ("text", "vision"):
        asked = {parameter.requires_grad for parameter in student.model.encoder(name).parameters()}
        assert asked == {name in trained}


@pytest.mark.slow
def test_layers_that_an_encoder_does_not_have_are_refused(tmp_path):
    make_model("bert", "vit", tasks=[Classification("topic", labels=["a", "b"])]).save_pretrained(tmp_path / "teacher")
    make_processor().save_pretrained(tmp_path / "teacher")
    rows = datasets.Dataset.from_list([{"text": "a", "topic": "a"}, {"text": "b", "topic": "b"}])
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    given = ["--teacher", tmp_path / "teacher", "--data", tmp_path / "data", "--text_layers", 9]
    failed = run(EXAMPLES / "distill.py", *given, cwd=tmp_path, ok=False)
    assert "--text_layers must be from 1 to the layers of the encoder" in failed.stderr
