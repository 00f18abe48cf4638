"""The web application of a model: its answers are those of the pipelines, whoever else asks at the same time."""

import asyncio
import json
import re
import sys
import threading
import time

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from served import (
    END,
    as_json_has_it,
    ask_at_once,
    ask_by_hand,
    client_of,
    events_of,
    in_base64,
    make_served_parts,
    messages_of,
    png,
    sound,
    until,
)
from tiny import SEQ2SEQ, make_tokenizer

from mm_transformers import Generation, MMTransformerConfig, MMTransformerForMultiTask, MMTransformerProcessor
from mm_transformers.analysis import calibrate
from mm_transformers.model.pipeline_mm_transformer import MultimodalEmbeddingPipeline, MultimodalPipeline
from mm_transformers.sharing.serving import health
from mm_transformers.sharing.serving.answering import PREDICT, Question, ServedModel
from mm_transformers.sharing.serving.app import create_app
from mm_transformers.sharing.serving.settings import ServeSettings, WorkerPlan


@pytest.fixture(scope="module")
def parts():
    model, processor = make_served_parts()
    topics, colors = ["animals", "food", "travel"], ["red", "blue", "big", "small"]
    rows = [{"text": f"a {colors[i % 4]} dog", "topic": topics[i % 3]} for i in range(24)]
    calibrate(model, processor, rows, min_rows=10, hide=False)
    return model, processor


@pytest.fixture(scope="module")
def served(parts):
    return ServedModel(*parts)


@pytest.fixture(scope="module")
def client(served):
    with TestClient(create_app(served, name="tiny"), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def pipe(parts):
    return MultimodalPipeline(model=parts[0], processor=parts[1])


# Rows for the pipeline, with files as bytes.
ROWS = [
    {"text": "a red dog", "image": png(0), "audio": sound(0), "price": 3.5, "brand": "ACME"},
    {"text": "the small cat is on the desk"},
    {"image": png(1)},
    {"text": "lovely rain", "image": [png(0), png(2, (40, 25))], "brand": "unknown"},
    {"audio": [sound(1), sound(2)], "price": None},
    "just a text",
]


def sent(row):
    """The row as a client sends it."""
    if isinstance(row, dict):
        return {name: sent(cell) for name, cell in row.items()}
    if isinstance(row, list):
        return [sent(cell) for cell in row]
    return in_base64(row) if isinstance(row, bytes) else row


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert found == expected


def post(client, path, body):
    return client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tasks": ["topic", "entities"], "top_k": 2},
        {"top_k": None, "tasks": ["sentiment"]},
        {"tasks": ["tags"], "threshold": 0.1},
        {"tasks": ["topic"], "coverage": 0.8, "advise": True},
        {"tasks": ["german"], "generate_kwargs": {"num_beams": 2, "max_new_tokens": 4}},
    ],
    ids=str,
)
def test_answers_are_those_of_the_pipeline_for_every_kind_of_task(client, pipe, options):
    answered = post(client, "/predict", {"rows": [sent(row) for row in ROWS], **options})
    assert answered.status_code == 200, answered.text
    expected = [pipe(row, **options) for row in ROWS]
    assert_close(answered.json()["answers"], as_json_has_it(expected))


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"task_name": "search"}], ids=str)
def test_vectors_are_those_of_the_pipeline(client, parts, options):
    pipe = MultimodalEmbeddingPipeline(model=parts[0], processor=parts[1])
    answered = post(client, "/embed", {"rows": [sent(row) for row in ROWS], **options})
    assert answered.status_code == 200, answered.text
    assert_close(answered.json()["vectors"], as_json_has_it([pipe(row, **options) for row in ROWS]))


def test_a_form_is_one_row_with_uploads(client, pipe):
    fields = {"text": "lovely rain", "price": "3.5", "options": json.dumps({"tasks": ["topic", "score"]})}
    files = [("image", ("a.png", png(0))), ("image", ("b.png", png(2))), ("audio", ("c.wav", sound(0)))]
    row = {"text": "lovely rain", "price": 3.5, "image": [png(0), png(2)], "audio": sound(0)}
    answered = client.post("/predict", data=fields, files=files)
    assert answered.status_code == 200, answered.text
    assert_close(answered.json()["answers"], [as_json_has_it(pipe(row, tasks=["topic", "score"]))])


def test_the_example_of_the_page_can_be_sent(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/predict", "/embed", "/generate"):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        answered = post(client, path, example)
        assert answered.status_code == 200, answered.text
    assert set(example["row"]) == {"text", "image", "audio", "price", "brand"}
    assert "swagger" in client.get("/docs").text


def test_a_streamed_text_is_that_of_the_pipeline(client, pipe):
    expected = pipe(ROWS[0], tasks=["german"], generate_kwargs={"num_beams": 1})["german"]["text"]
    streamed = post(client, "/generate", {"row": sent(ROWS[0])})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *pieces, whole = events_of(streamed.text)
    assert whole == {"text": expected}
    assert "".join(event["piece"] for event in pieces).strip() == expected
    assert len(pieces) > 1
    at_once = post(client, "/generate", {"row": sent(ROWS[0]), "stream": False, "task": "german"})
    assert at_once.json() == {"text": pipe(ROWS[0], tasks=["german"])["german"]["text"]}


def test_the_rows_of_a_client_that_leaves_are_not_answered(served):
    app = create_app(served, ServeSettings(batch_seconds=1))
    seen = app.state.server.metrics.batch_rows
    body = json.dumps({"rows": ["a", "b"], "tasks": ["topic"]}).encode()

    async def leave():
        app.state.server._example = {}
        async with app.state.server:
            begun = time.monotonic()
            [start, _] = await ask_by_hand(app, messages_of(body, END))
            return start["status"], time.monotonic() - begun

    status, seconds = asyncio.run(leave())
    assert status == 499
    assert seconds < 0.8, "it was not waited for"
    assert seen._sum.get() == 0, "nor answered"


def test_many_clients_share_forward_passes_and_get_their_own_answers(served, pipe):
    things = [(color, thing) for color in ("red", "green", "blue", "big") for thing in ("dog", "cat", "bat", "desk")]
    texts = [f"{color} {thing} {'a ' * (i % 5)}" for i, (color, thing) in enumerate(things)]
    expected = [as_json_has_it(pipe(text, tasks=["topic", "score"])) for text in texts]
    app = create_app(served, ServeSettings(batch_seconds=0.05))

    bodies = [{"rows": [{"text": text}], "tasks": ["topic", "score"]} for text in texts]
    for answered, wanted in zip(ask_at_once(app, bodies), expected, strict=True):
        assert_close(answered.json()["answers"], [wanted])
    counts = app.state.server.metrics.text().decode()
    assert f'mm_transformers_rows_total{{route="/predict"}} {len(texts)}.0' in counts
    [passes] = re.findall(r"^mm_transformers_batch_rows_count (.*)$", counts, re.MULTILINE)
    assert float(passes) < len(texts) / 3


def test_a_shared_picture_is_read_and_encoded_once(served):
    seen = []
    encoder = served.model.model.vision_model
    hook = encoder.register_forward_pre_hook(
        lambda module, given, named: seen.append(len(named.get("pixel_values", next(iter(given), ())))),
        with_kwargs=True,
    )
    app = create_app(served, ServeSettings(batch_seconds=0.2))
    rows = [{"text": f"dog {i}", "image": in_base64(png(3))} for i in range(6)]
    answers = ask_at_once(app, [{"rows": [row], "tasks": ["topic"]} for row in rows])
    hook.remove()
    assert {answer.status_code for answer in answers} == {200}
    assert seen == [1, 1], "the example of the start, and the shared picture"


def test_a_full_queue_is_told(served):
    answers = ask_at_once(create_app(served, ServeSettings(waiting_rows=2, batch_rows=1)), [{"rows": ["a dog"]}] * 12)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json() == {"error": "The server has as many requests as it can hold; try again later."}


def test_more_rows_than_may_wait_are_refused_for_good(served):
    [answered] = ask_at_once(create_app(served, ServeSettings(waiting_rows=2)), [{"rows": ["a", "b", "c"]}])
    assert answered.status_code == 400
    assert answered.json() == {
        "error": "The request has 3 rows, more than the 2 that may wait here: send fewer rows at a time."
    }


def test_the_writing_tasks_of_a_batch_share_one_deadline():
    tasks = [Generation(name, max_length=32, decoder_start_ids=[n]) for n, name in ((2, "german"), (3, "french"))]
    config = MMTransformerConfig(text_config=SEQ2SEQ["bart"](), tasks=tasks, num_fusion_attention_heads=4)
    served = ServedModel(MMTransformerForMultiTask(config), MMTransformerProcessor(tokenizer=make_tokenizer()))
    served.model.model.text_model.get_decoder().register_forward_pre_hook(lambda *_: time.sleep(0.05))
    question = Question.of(PREDICT, {"generate_kwargs": {"min_new_tokens": 30, "max_new_tokens": 30}})
    begun = time.monotonic()
    assert set(served.answer(question, ["a dog"], 0.5)[0]) == {"german", "french"}
    assert time.monotonic() - begun < 0.95, "and not 0.5 seconds each"


def test_a_request_that_takes_too_long_is_told(served, monkeypatch):
    with TestClient(create_app(served, ServeSettings(timeout=0.2))) as client:
        monkeypatch.setattr(served, "answer", lambda *_: time.sleep(0.5))
        answered = post(client, "/predict", {"rows": ["a"]})
    assert answered.status_code == 503
    assert answered.json()["error"].startswith("The request took longer than the 0.2 seconds")


def test_a_bug_is_told_in_a_sentence(served, monkeypatch):
    def fail(*_):
        raise KeyError("secret")

    with TestClient(create_app(served), raise_server_exceptions=False) as client:
        monkeypatch.setattr(served, "answer", fail)
        answered = post(client, "/predict", {"rows": ["a"]})
    assert (answered.status_code, answered.json()) == (
        500, {"error": "The server failed at this request; its log says why."},
    )  # fmt: skip


def test_a_mounted_application_counts_its_own_routes(served):
    app, outer = create_app(served), FastAPI()
    outer.mount("/models/tiny", app)
    outer.state.server = app.state.server
    [answered] = ask_at_once(outer, [{"rows": ["a dog"], "tasks": ["topic"]}], "/models/tiny/predict")
    assert answered.status_code == 200
    counts = app.state.server.metrics.text().decode()
    assert 'mm_transformers_requests_total{route="/predict",status="200"} 1.0' in counts
    assert 'mm_transformers_rows_total{route="/predict"} 1.0' in counts


def test_health_says_when_nobody_answers_any_more(served, monkeypatch):
    broken = []

    def answer(question, rows, max_seconds):
        if broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return whole(question, rows, max_seconds)

    whole = served.answer
    monkeypatch.setattr(served, "answer", answer)
    app = create_app(served)
    assert TestClient(app).get("/health").status_code == 503, "it has not been started"
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 200
        broken.append(True)
        assert post(client, "/predict", {"rows": ["a"]}).status_code == 500
        answered = client.get("/health")
        assert (answered.status_code, answered.json()) == (
            503, {"error": "The model does not answer any more; start the server again."},
        )  # fmt: skip
        broken.clear()  # it was one row
        assert client.get("/health").status_code == 200
        client.portal.call(app.state.server.batcher._work.cancel)
        assert client.get("/health").status_code == 503


def test_probes_of_the_health_do_not_wait_behind_a_backlog(served, monkeypatch):
    """After a failure, one example is tried, however many probes ask for it."""
    whole, seen, gate = served.answer, [], threading.Event()

    def answer(question, rows, max_seconds):
        seen.append(len(rows))
        if rows[0]["text"] == "bad":
            raise RuntimeError("CUDA error: out of memory")
        if rows[0]["text"] == "slow":
            assert gate.wait(20)
        return whole(question, rows, max_seconds)

    monkeypatch.setattr(served, "answer", answer)
    monkeypatch.setattr(health, "_SECONDS", 0.05)
    app = create_app(served, ServeSettings(batch_rows=1, batch_seconds=0))

    async def probe(http):
        begun = time.monotonic()
        return (await http.get("/health")).status_code, time.monotonic() - begun

    async def clients():
        async with client_of(app) as http:
            with pytest.raises(RuntimeError):
                await app.state.server.answer(PREDICT, ["bad"], {})
            slow = asyncio.create_task(http.post("/predict", json={"rows": ["slow"]}))
            await until(lambda: len(seen) == 3)
            try:
                probes = [await probe(http), *await asyncio.gather(*(probe(http) for _ in range(8)))]
                waiting = app.state.server.batcher.num_waiting
            finally:
                gate.set()
            return probes, waiting, (await slow).status_code, await probe(http)

    probes, waiting, status, last = asyncio.run(clients())
    assert {status for status, _ in probes} == {200}
    assert max(seconds for _, seconds in probes) < 3
    assert (waiting, status, last[0]) == (1, 200, 200)
    assert seen == [1, 1, 1, 1], "the example of the start, both rows, and the example of all probes"


def test_a_failed_batch_whose_rows_succeed_alone_is_no_failure(served, monkeypatch):
    whole, seen = served.answer, []

    def answer(question, rows, max_seconds):
        seen.append(len(rows))
        if len(rows) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return whole(question, rows, max_seconds)

    monkeypatch.setattr(served, "answer", answer)
    with TestClient(create_app(served)) as client:
        assert post(client, "/predict", {"rows": ["a", "b"], "tasks": ["topic"]}).status_code == 200
        assert client.get("/health").status_code == 200
    assert seen == [1, 2, 1, 1], "the example is not tried again"


def test_an_application_may_be_started_again(served):
    app = create_app(served)
    for _ in range(2):
        with TestClient(app) as client:
            rows = [{"text": "a", "image": in_base64(png(0, (100, 100)))}]
            assert post(client, "/predict", {"rows": rows, "tasks": ["topic"]}).status_code == 200
            assert post(client, "/generate", {"row": "a dog"}).status_code == 200


def test_health_and_metrics(client):
    assert client.get("/health").json() == {
        "status": "ok", "model": "tiny",
        "tasks": ["topic", "sentiment", "tags", "score", "entities", "search", "same", "german"],
    }  # fmt: skip
    client.get("/no/such/page")
    text = client.get("/metrics").text
    assert 'mm_transformers_requests_total{route="/health",status="200"}' in text
    assert 'mm_transformers_requests_total{route="other",status="404"}' in text
    assert "mm_transformers_waiting_rows 0.0" in text


def test_settings_reach_the_workers(monkeypatch):
    monkeypatch.setenv("MM_TRANSFORMERS_SERVE", "")
    plan = WorkerPlan("my-model", ServeSettings(batch_rows=3), {"row_items": 2}, ("my_kinds",))
    plan.write()
    assert WorkerPlan.read() == plan
    with pytest.raises(ValueError, match="batch_rows must be at least 1, but is 0"):
        ServeSettings(batch_rows=0)


def test_without_the_extra_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    monkeypatch.delitem(sys.modules, "mm_transformers.sharing.serving.app")
    with pytest.raises(ImportError, match=r"needs the extra `serve` .*: pip install mm-transformers\[serve\]"):
        __import__("mm_transformers.sharing.serving.app")
