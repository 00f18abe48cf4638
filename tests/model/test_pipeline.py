"""`pipeline("multimodal")` against the processor, the model and plain arithmetic, for rows of every kind."""

import copy
import http.server
import io
import json
import threading

import pytest
import torch
from datasets import Dataset
from tiny import (
    SEQ2SEQ,
    VISION_ENCODERS,
    make_clip,
    make_feature_extractor,
    make_image,
    make_model,
    make_processor,
    make_tasks,
    make_tokenizer,
    open_gates,
)
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from mm_transformers import (
    Classification,
    Generation,
    Matching,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Retrieval,
)
from mm_transformers.model.modeling_mm_transformer import MMTransformerForSequenceClassification
from mm_transformers.model.pipeline_mm_transformer import MultimodalPipeline


TEXTS = ["a red dog", "the small cat is on the desk", "", "lovely rain", "the crane over a river"]


def make_rows(folder) -> list[dict]:
    """Text and picture, only one of them, two pictures; the picture as object, path, bytes and in a list."""
    buffer = io.BytesIO()
    make_image(1).save(buffer, "PNG")
    make_image(2).save(folder / "crane.png")
    return [
        {"text": TEXTS[0], "image": make_image(0)},
        {"text": TEXTS[1]},
        {"text": None, "image": buffer.getvalue()},
        {"text": TEXTS[3], "image": None},
        {"text": TEXTS[4], "image": [str(folder / "crane.png"), make_image(0)]},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tasks = [*make_tasks(), Retrieval("search", embedding_size=8), Matching("same")]
    make_model(tasks=tasks, initializer_range=0.3).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("multimodal", model=str(folder))


@pytest.fixture
def rows(tmp_path):
    return make_rows(tmp_path)


def reference(pipe, row) -> dict:
    """What the model says of one row, by softmax and sigmoid, word by word."""
    model, processor = pipe.model, pipe.processor
    image = row.get("image")
    images = None if image is None else [image]
    text = row.get("text") or ""
    with torch.no_grad():
        logits = model(**processor(text=[text], images=images)).logits
    answers = {}
    for name, labels in (("topic", ["animals", "food", "travel"]), ("sentiment", ["negative", "positive"])):
        p = torch.softmax(logits[name][0], -1)
        answers[name] = {"label": labels[int(p.argmax())], "score": float(p.max())}
    p = dict(zip(["red", "green", "blue"], torch.sigmoid(logits["tags"][0]).tolist(), strict=True))
    answers["tags"] = {"labels": [name for name in p if p[name] >= 0.5], "scores": p}
    answers["score"] = {"value": float(logits["score"][0])}
    words, start = [], 0
    offsets = processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    p = torch.softmax(logits["entities"][0], -1)
    for word in text.split():
        start = text.index(word, start)
        [token] = [i for i, (a, b) in enumerate(offsets) if a == start and b > a]
        label = ["O", "NAME"][int(p[token].argmax())]
        words.append({"word": word, "label": label, "score": float(p[token].max()), "start": start})
        words[-1]["end"] = start = start + len(word)
    answers["entities"] = words
    text_vector, item_vector = torch.nn.functional.normalize(logits["search"][0], dim=-1)
    answers["search"] = {"similarity": float(text_vector @ item_vector)}
    score = float(torch.sigmoid(logits["same"][0, 0]))
    answers["same"] = {"match": score > 0.5, "score": score}
    return answers


def same(answer, expected) -> bool:
    """Equal but for the rounding of floats, NaN included."""
    if isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(same(answer[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(answer) == len(expected) and all(map(same, answer, expected))
    if isinstance(expected, float):
        return type(answer) is float and answer == pytest.approx(expected, abs=1e-5, nan_ok=True)
    return type(answer) is type(expected) and answer == expected


def assert_same(answers, expected):
    assert len(answers) == len(expected)
    for answer, row in zip(answers, expected, strict=True):
        assert same(answer, row), (answer, row)


def test_it_loads_processor_and_model_from_a_folder(pipe):
    assert type(pipe) is MultimodalPipeline
    assert type(pipe.model) is MMTransformerForMultiTask
    assert type(pipe.processor) is MMTransformerProcessor
    assert not pipe.model.training


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("given", ["list", "tuple", "generator", "dataset", "streaming"])
def test_answers_are_those_of_each_row_alone(pipe, rows, given, batch_size):
    expected = [reference(pipe, row) for row in rows]
    if given in ("dataset", "streaming"):
        rows = Dataset.from_list([{"text": row.get("text"), "image": images_of(row)} for row in rows])
        rows = rows.to_iterable_dataset() if given == "streaming" else rows
    inputs = {"tuple": tuple, "generator": iter}.get(given, lambda x: x)(rows)
    answers = pipe(inputs, batch_size=batch_size)
    assert isinstance(answers, list) == (given in ("list", "tuple"))
    answers = list(answers)
    assert_same(answers, expected)
    assert_same(json.loads(json.dumps(answers)), expected)


def images_of(row):
    """As `datasets` keeps them: bytes in a list."""
    images = row.get("image")
    if images is None:
        return None
    kept = []
    for image in images if isinstance(images, list) else [images]:
        if isinstance(image, str):
            with open(image, "rb") as file:
                kept.append(file.read())
        elif isinstance(image, bytes):
            kept.append(image)
        else:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            kept.append(buffer.getvalue())
    return kept


def test_one_row(pipe, rows):
    assert_same([pipe(rows[0])], [reference(pipe, rows[0])])
    assert_same([pipe("a red dog")], [reference(pipe, {"text": "a red dog"})])
    assert pipe([]) == []
    assert_same(pipe([rows[0]]), [reference(pipe, rows[0])])


def test_workers(pipe, rows):
    expected = [reference(pipe, row) for row in rows]
    assert_same(list(pipe(rows, batch_size=2, num_workers=2)), expected)
    assert_same(list(pipe(iter(rows), batch_size=2, num_workers=2)), expected)


def test_a_stream_is_read_as_it_is_asked_for(pipe):
    """An endless generator: no more than a batch is taken beyond what is answered."""
    taken = []

    def endless():
        while True:
            taken.append({"text": "a dog"})
            yield taken[-1]

    answers = iter(pipe(endless(), tasks="topic", batch_size=2))
    assert [next(answers)["topic"].keys() for _ in range(3)]
    assert len(taken) <= 6


def test_image_from_an_address(pipe, rows):
    content = rows[2]["image"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/crane.png" else 404)
            self.end_headers()
            self.wfile.write(content if self.path == "/crane.png" else b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            answer = pipe({"text": "a dog", "image": f"{address}/crane.png"})
            assert_same([answer], [reference(pipe, {"text": "a dog", "image": content})])
            with pytest.raises(ValueError, match=r"^Row 0: .*/dog\.png.* cannot be read \(.*404"):
                pipe({"text": "a dog", "image": f"{address}/dog.png"})
        finally:
            server.shutdown()


def test_a_shared_image_is_encoded_once_per_batch(pipe):
    seen = []
    image = make_image(5)
    hook = pipe.model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape[0]), with_kwargs=True
    )
    try:
        pipe([{"text": text, "image": image} for text in TEXTS], batch_size=5)
    finally:
        hook.remove()
    assert seen == [1]


def test_options(pipe, rows):
    [answer] = pipe(rows[:1], tasks=["topic", "tags"], top_k=2, threshold=0.0)
    assert list(answer) == ["topic", "tags"]
    assert answer["tags"]["labels"] == ["red", "green", "blue"]
    whole = reference(pipe, rows[0])
    assert len(answer["topic"]) == 2
    assert same(answer["topic"][0], whole["topic"])
    assert answer["topic"][0]["score"] > answer["topic"][1]["score"]
    assert len(pipe(rows[0], top_k=9)["topic"]) == 3
    assert pipe(rows[0], top_k=None) == pipe(rows[0], top_k=9)
    assert sum(x["score"] for x in pipe(rows[0], top_k=9)["topic"]) == pytest.approx(1)
    assert pipe(rows[0], threshold=1.0)["tags"]["labels"] == []
    assert list(pipe(rows[0], tasks="score")) == ["score"]
    # Of the call only, not of the pipeline.
    assert list(pipe(rows[0])) == list(pipe.model.tasks)


def test_options_of_the_pipeline(folder, rows):
    pipe = pipeline("multimodal", model=str(folder), tasks=["sentiment"], top_k=1)
    assert list(pipe(rows[0])) == ["sentiment"]
    assert len(pipe(rows[0])["sentiment"]) == 1
    assert list(pipe(rows[0], tasks=["topic"])) == ["topic"]


def test_columns_of_labels_are_not_looked_at(pipe):
    row = {"text": "a dog"}
    assert_same([pipe({**row, "topic": "food", "tags": ["red"], "score": 3.0})], [reference(pipe, row)])


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_of_a_table_are_not_looked_at(pipe, streaming):
    rows = Dataset.from_list([{"id": 7, "text": "a dog"}])
    rows = rows.to_iterable_dataset() if streaming else rows
    assert_same(list(pipe(rows)), [reference(pipe, {"text": "a dog"})])


def test_saved_and_shown(pipe, rows, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("multimodal", model=str(tmp_path))
    assert_same(again(rows), pipe(rows))
    assert "MMTransformerForMultiTask" in repr(again)


def test_a_model_and_a_processor_at_hand(pipe, rows):
    other = pipeline("multimodal", model=pipe.model, processor=pipe.processor)
    assert_same(other(rows), [reference(pipe, row) for row in rows])


def test_a_model_with_adapters(pipe, rows):
    peft = pytest.importorskip("peft")
    before = pipe(rows)
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=pipe.model.new_modules)
    wrapped = peft.get_peft_model(copy.deepcopy(pipe.model), lora)  # adapters start as nothing
    assert_same(MultimodalPipeline(wrapped, processor=pipe.processor)(rows), before)


def test_words_with_punctuation_and_words_that_are_cut_off(pipe):
    text = "red  dog, the cat."
    [answer] = pipe([text], tasks="entities")
    assert all(text[word["start"] : word["end"]] == word["word"] for word in answer["entities"])
    assert [word["word"] for word in answer["entities"]] == ["red", "dog,", "the", "cat."]
    long = "dog " * 60
    assert len(pipe([long], tasks="entities")[0]["entities"]) == 38  # of 40 tokens, two are special


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    torch.manual_seed(0)
    tasks = [
        Classification("topic", labels=["animals", "food", "travel"]),
        Generation("german", max_length=8, decoder_start_ids=[2, 40]),
        Generation("french", max_length=8, decoder_start_ids=[2, 41]),
    ]
    config = MMTransformerConfig(
        text_config=SEQ2SEQ["bart"](), vision_config=VISION_ENCODERS["vit"](), tasks=tasks, num_fusion_layers=1,
        num_fusion_attention_heads=4, initializer_range=0.2,
    )  # fmt: skip
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return pipeline("multimodal", model=str(folder))


def test_what_is_written(writer, rows):
    options = {"num_beams": 2, "max_new_tokens": 5}
    answers = writer(rows, batch_size=3, generate_kwargs=options)
    for row, answer in zip(rows, answers, strict=True):
        image = row.get("image")
        inputs = writer.processor(text=[row.get("text") or ""], images=None if image is None else [image])
        for task in ("german", "french"):
            ids = writer.model.generate(task, **inputs, **options)[0, 2:]
            expected = writer.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert answer[task] == {"text": expected}
    assert any(answer["german"]["text"] for answer in answers)


def test_no_decoder_runs_for_tasks_that_nobody_asked_for(writer, rows):
    runs = []
    hook = writer.model.get_decoder().register_forward_hook(lambda *args: runs.append(1))
    try:
        writer(rows, tasks=["topic"])
        assert not runs
        writer(rows[0], tasks=["french"], generate_kwargs={"max_new_tokens": 2})
        assert runs
    finally:
        hook.remove()


def test_sound(tmp_path):
    tasks = [Classification("topic", labels=["animals", "food"])]
    make_model(vision=None, audio="wav2vec2", tasks=tasks).save_pretrained(tmp_path)
    processor = MMTransformerProcessor(tokenizer=make_tokenizer(), feature_extractor=make_feature_extractor())
    processor.save_pretrained(tmp_path)
    pipe = pipeline("multimodal", model=str(tmp_path))
    clip = {"array": make_clip(), "sampling_rate": 16_000}
    answers = pipe([{"text": "a dog", "audio": clip}, {"audio": clip}, {"text": "a dog"}], batch_size=3)
    for text, audio, answer in zip(["a dog", "", "a dog"], [clip, clip, None], answers, strict=True):
        with torch.no_grad():
            logits = pipe.model(**processor(text=[text], audio=[audio])).logits["topic"][0]
        assert answer["topic"]["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    with pytest.raises(ValueError, match="Row 1: This processor has no image processor, but got images"):
        pipe(["a dog", {"text": "a dog", "image": make_image()}], batch_size=2)


def test_half_precision(folder, pipe, rows):
    half = pipeline("multimodal", model=str(folder), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    for answer, row in zip(half(rows, batch_size=2), pipe(rows), strict=True):
        assert answer["score"]["value"] == pytest.approx(row["score"]["value"], abs=0.1)
        json.dumps(answer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "imge": "x.png"}, r"Row 2 has the key 'imge'; did you mean 'image'\?"),
        ({"text": "a", "weather": 3}, "Row 2 has the key 'weather'; a row has any of 'text', 'image'"),
        ({"text": 3}, "Row 2: the text must be a string, but is a int"),
        ({"text": " "}, "Row 2 has neither a text nor an image, a video or a sound"),
        ({"image": None}, "Row 2 has neither"),
        ({"image": []}, "Row 2 has neither"),
        (7, "Row 2 must be a dict with any of 'text', 'image', 'video' and 'audio', or a string, but is a int"),
        ({"text": "a", "image": "/nowhere/dog.png"}, r"Row 2: .*/nowhere/dog.png.* (no such|does not exist|No such)"),
        ({"text": "a", "image": b"GIF89a"}, "Row 2: .*cannot be read|Row 2: .*is not an image"),
        ({"text": "a", "audio": "dog.wav"}, "Row 2: This processor has no feature extractor, but got sound"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"batch_size": 4}], ids=str)
def test_a_bad_row_is_named(pipe, row, message, options):
    rows = ["a dog", "a cat", row, "rain"]
    with pytest.raises(ValueError, match=message) as error:
        list(pipe(iter(rows), **options))
    assert "\n" not in str(error.value)


def test_a_bad_row_is_named_from_a_worker(pipe):
    """And not the traceback of the worker."""
    with pytest.raises(ValueError, match="^Row 1 has neither a text nor an image, a video or a sound.$"):
        list(pipe(["a dog", ""], num_workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["tpoic"]}, r"The model has no task 'tpoic'; did you mean 'topic'\?"),
        ({"tasks": "weather"}, "The model has no task 'weather'; its tasks are 'topic', 'sentiment'"),
        ({"tasks": "topics" * 99}, r"The model has no task .topicstopic\w*\.\.\.\w*.; its tasks are .topic."),
        ({"top_k": 0}, "top_k must be an integer >= 1, but is 0"),
        ({"top_k": True}, "top_k must be an integer >= 1, but is True"),
        ({"threshold": 1.5}, "threshold must lie between 0 and 1, but is 1.5"),
        ({"treshold": 0.5}, r"The multimodal pipeline has no option 'treshold'; did you mean 'threshold'\?"),
        ({"foo": 1}, "The multimodal pipeline has no option 'foo'; its options are tasks, top_k"),
    ],
)
def test_a_bad_option_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe("a dog", **options)


def test_models_without_tasks_and_without_a_processor(tmp_path, pipe):
    pipe.model.model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs a model with tasks, MMTransformerForMultiTask, but got a MMTransf"):
        pipeline("multimodal", model=str(tmp_path))
    with pytest.raises(ValueError, match="The multimodal pipeline needs the processor of the model"):
        MultimodalPipeline(model=pipe.model)


class TestSequenceClassification:
    @pytest.fixture
    def single(self, tmp_path):
        model = make_model(tasks=[Classification("topic", labels=["animals", "food", "travel"])])
        model.save_pretrained(tmp_path)
        make_processor().save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    def test_it_answers_as_the_model_with_tasks_does(self, single):
        model = AutoModelForSequenceClassification.from_pretrained(single)
        assert type(model) is MMTransformerForSequenceClassification
        whole = AutoModel.from_pretrained(single)
        inputs = make_processor()(text=["a dog", "rain"], images=[make_image(), None])
        labels = torch.tensor([2, -100])
        outputs = model(**inputs, labels=labels)
        assert torch.equal(outputs.logits, whole(**inputs).logits["topic"])
        expected = torch.nn.functional.cross_entropy(outputs.logits[:1], labels[:1])
        assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-6)
        assert model(**inputs, return_dict=False)[0].shape == (2, 3)

    def test_it_goes_back_to_a_model_with_tasks(self, single, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(single)
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        whole = MMTransformerForMultiTask.from_pretrained(tmp_path / "again")
        assert list(whole.tasks) == ["topic"]
        assert type(AutoModel.from_pretrained(tmp_path / "again")) is MMTransformerForMultiTask

    def test_text_classification_pipeline(self, single):
        [answer] = pipeline("text-classification", model=str(single))("a red dog")
        whole = pipeline("multimodal", model=str(single))("a red dog")["topic"]
        assert answer["label"] == whole["label"]
        assert answer["score"] == pytest.approx(whole["score"], abs=1e-6)

    def test_other_tasks_are_refused(self, folder):
        with pytest.raises(ValueError, match=r"loads models with one Classification task, but this model has"):
            AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_model_in_training_answers_as_in_evaluation_and_stays_in_training():
    tasks = [
        Classification("topic", labels=["animals", "food", "travel"]),
        Generation("german", max_length=5, decoder_start_ids=[2]),
    ]
    model = make_model(text="t5", tasks=tasks, modality_dropout={"vision": 0.5}).eval()
    pipe = pipeline("multimodal", model=model, processor=make_processor())
    rows = [{"text": "a red dog", "image": make_image(0)}, {"text": "lovely rain"}]
    expected = pipe(rows)
    model.train()
    model.model.fusion.eval()  # a part that somebody keeps still
    modes = [module.training for module in model.modules()]
    assert all(pipe(rows) == expected for _ in range(3))
    assert [module.training for module in model.modules()] == modes
