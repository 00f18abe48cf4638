"""Several columns of pictures or sounds: their items come one after the other, as those of a list in one cell."""

import datasets
import pytest
import torch
from command_line import mm
from PIL import Image
from recipes import read_csv, save_encoders, write_csv
from tiny import make_audio_processor, make_clip, make_image, make_model, make_processor
from transformers import pipeline

from mm_transformers import Classification, DataSource, FeatureCache, MMDataCollator, Predictor, fit
from mm_transformers.data.folding import fold_numbers
from mm_transformers.data.splitting import hold_out_rows
from mm_transformers.training.recipe import read_recipe


FRONT, BACK = make_image(1), make_image(2)
ROWS = [
    {"text": "a red dog", "front": FRONT, "back": BACK},
    {"text": "the cat", "front": None, "back": BACK},
    {"text": "a desk", "front": [FRONT, BACK], "back": FRONT},
    {"text": "the river", "front": None, "back": None},
]
AS_LISTS = [
    {"text": "a red dog", "image": [FRONT, BACK]},
    {"text": "the cat", "image": BACK},
    {"text": "a desk", "image": [FRONT, BACK, FRONT]},
    {"text": "the river", "image": None},
]
TASKS = [Classification("topic", labels=["animals", "food"])]


def make_collator(image_column, **options):
    return MMDataCollator(make_processor(), make_model(tasks=TASKS).config, image_column=image_column, **options)


def assert_same_batch(found, expected):
    assert found.keys() == expected.keys()
    for name in set(found) - {"labels"}:
        assert torch.equal(found[name], expected[name]), name


def test_columns_are_as_a_list_in_one_cell():
    assert_same_batch(make_collator(["front", "back"])(ROWS), make_collator("image")(AS_LISTS))


def test_columns_of_a_data_set_with_other_names(tmp_path):
    paths = []
    for i, image in enumerate((FRONT, BACK)):
        image.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    cells = {"text": ["a", "b"], "first": [paths[0], None], "back": [paths[1], paths[0]]}
    features = datasets.Features(
        {"text": datasets.Value("string"), "first": datasets.Image(), "back": datasets.Image()}
    )
    collator = make_collator(["front", "back"])
    source = DataSource(datasets.Dataset.from_dict(cells, features=features), columns={"front": "first"})
    rows = [{"text": "a", "image": [FRONT, BACK]}, {"text": "b", "image": FRONT}]
    assert_same_batch(collator([source.rows(collator)[i] for i in range(2)]), make_collator("image")(rows))


def test_the_order_of_the_columns_counts():
    one, other = (
        make_collator(columns)(ROWS[:1])["pixel_values"] for columns in (["front", "back"], ["back", "front"])
    )
    assert torch.equal(one, other.flip(0))


def test_several_columns_of_sounds():
    model = make_model(tasks=TASKS, vision=None, audio="wav2vec2")
    processor = make_audio_processor(images=False)
    first, second = ({"array": make_clip(seed=seed), "sampling_rate": 16_000} for seed in (1, 2))
    rows = [{"text": "a", "left": first, "right": second}, {"text": "b", "left": None, "right": first}]
    lists = [{"text": "a", "audio": [first, second]}, {"text": "b", "audio": first}]
    found = MMDataCollator(processor, model.config, audio_column=["left", "right"])(rows)
    assert_same_batch(found, MMDataCollator(processor, model.config)(lists))


def test_errors_name_the_column(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"text": "a", "front": FRONT, "back": str(tmp_path / "bad.png")}]
    with pytest.raises(ValueError, match="row 0 of the batch, column 'back': "):
        make_collator(["front", "back"])(rows)
    collator = make_collator(["front", "back"], on_bad_file="drop")
    assert len(collator(rows)["pixel_values"]) == collator.num_bad_files == 1
    with pytest.raises(ValueError, match="columns? 'front', 'back': .*more than .*row_items"):
        make_collator(["front", "back"])([{"text": "a", "front": [FRONT] * 60, "back": [BACK] * 60}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": ["front", "front"]}, "image_column must name different columns"),
        ({"image_column": []}, "image_column must name different columns"),
        ({"video_column": ["one", "two"]}, "A row has one video, but video_column names 2 columns: one, two"),
    ],
)
def test_what_cannot_be_several_columns(options, message):
    with pytest.raises(ValueError, match=message):
        MMDataCollator(make_processor(), make_model(tasks=TASKS).config, **options)


def test_rows_that_share_a_picture_in_any_column_stay_together():
    pictures = [f"{i}.png" for i in range(20)]
    rows = [
        {"text": f"row {i} {side}", "front": pictures[i], "back": None, "topic": "food"}
        if side
        else {"text": f"row {i} {side}", "front": None, "back": pictures[i], "topic": "food"}
        for i in range(20)
        for side in (0, 1)
    ]
    columns = ["front", "back"]
    train, held_out = hold_out_rows(rows, 0.3, image_column=columns, tasks=TASKS)
    one, other = ({row["front"] or row["back"] for row in part} for part in (train, held_out))
    assert one
    assert other
    assert not one & other
    numbers = fold_numbers(rows, 4, image_column=columns, audio_column=["left", "right"], tasks=TASKS).tolist()
    assert numbers[::2] == numbers[1::2]  # of the same picture
    assert set(numbers) == {0, 1, 2, 3}


def test_a_feature_cache_finds_the_items(tmp_path):
    model = make_model(tasks=TASKS, freeze=["vision"])
    collator = MMDataCollator(make_processor(), model.config, image_column=["front", "back"])
    for i, image in enumerate((FRONT, BACK)):
        image.save(tmp_path / f"{i}.png")
    paths = {id(FRONT): str(tmp_path / "0.png"), id(BACK): str(tmp_path / "1.png")}
    rows = [{**row, "front": paths.get(id(row["front"])), "back": paths.get(id(row["back"]))} for row in ROWS]
    cached = FeatureCache(tmp_path / "features").prepare(model, collator, rows)
    with torch.no_grad():
        expected, found = (model(**{k: v for k, v in c(rows).items() if k != "labels"}) for c in (collator, cached))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_the_pipeline_takes_the_names_of_the_columns(tmp_path):
    model, processor = make_model(tasks=TASKS), make_processor()
    processor.input_columns = {"image": ["front", "back"]}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("multimodal", model=str(tmp_path))
    for row, expected in zip(ROWS, AS_LISTS, strict=True):
        assert pipe(row)["topic"] == pytest.approx(pipe(expected)["topic"])
    only_pictures = {"front": None, "back": BACK}
    assert pipe(only_pictures)["topic"] == pytest.approx(pipe({"image": BACK})["topic"])
    with pytest.raises(ValueError, match="has no content in .*'front' and 'back'"):
        pipe({"front": None, "back": None})


@pytest.mark.slow
def test_fit_takes_all_columns_of_pictures(tmp_path):
    save_encoders(tmp_path)
    (tmp_path / "photos").mkdir()
    rows = []
    for i in range(40):
        for side, shift in (("front", 0), ("back", 60)):
            Image.new("RGB", (20, 20), (90 + 2 * i, shift, 6 * i)).save(tmp_path / f"photos/{side}{i}.png")
        rows.append({
            "front": f"photos/front{i}.png", "back": f"photos/back{i}.png" if i % 4 else None,
            "topic": ["animals", "food"][i % 2],
        })  # fmt: skip
    write_csv(tmp_path / "rows.csv", rows)
    said = []
    quick = {"num_train_epochs": 1.0, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    fit(tmp_path / "rows.csv", ["topic"], tmp_path / "model", vision=str(tmp_path / "vision"), training=quick,
        say=said.append)  # fmt: skip
    assert [line.split(":")[0] for line in said[:2]] == ["image      front", "image      back"]
    assert read_recipe(tmp_path / "model/recipe.yaml").columns.image == ["front", "back"]
    whole = [{name: cell and str(tmp_path / cell) for name, cell in row.items() if name != "topic"} for row in rows[:5]]
    expected = pipeline("multimodal", model=str(tmp_path / "model"))(whole)
    mm("predict", tmp_path / "model", tmp_path / "rows.csv", "--output", tmp_path / "a.csv", "--batch_size", 7)
    answers = read_csv(tmp_path / "a.csv")
    for row, right in zip(answers, expected, strict=False):
        assert float(row["topic_score"]) == pytest.approx(right["topic"]["score"], abs=1e-5)
    # One column alone gives other answers.
    only = Predictor.from_pretrained(tmp_path / "model", text_column=None, image_column="back")(whole[1:4])
    assert only[0]["topic"]["score"] != pytest.approx(expected[1]["topic"]["score"], abs=1e-6)
    mm("predict", tmp_path / "model", tmp_path / "rows.csv", "--output", tmp_path / "b.csv",
       "--image_column", "front", "--image_column", "back")  # fmt: skip
    assert [row["topic"] for row in read_csv(tmp_path / "b.csv")] == [row["topic"] for row in answers]
