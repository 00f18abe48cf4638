"""Attacks on the server of a model: what a client may read, reach and use up. Each is refused in one sentence."""

import asyncio
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient
from hostile_media import gif, png, wav
from listeners import listening
from served import ask_by_hand, in_base64, make_served_parts, messages_of
from served import png as small_png

from mm_transformers.model.limits import limits, set_limits
from mm_transformers.sharing.serving import requests
from mm_transformers.sharing.serving.answering import ServedModel
from mm_transformers.sharing.serving.app import create_app


@pytest.fixture(scope="module")
def app():
    return create_app(ServedModel(*make_served_parts()))


@pytest.fixture(scope="module")
def client(app):
    # A stack trace would be raised here, or be in the answer.
    with TestClient(app, raise_server_exceptions=True) as client:
        yield client


@pytest.fixture(autouse=True)
def others_are_answered_afterwards(client, monkeypatch):
    monkeypatch.setattr("mm_transformers.model.limits._current", limits())
    yield
    monkeypatch.undo()
    assert send(client, {"rows": ["a dog"], "tasks": ["topic"]}).status_code == 200


def send(client, body, path="/predict"):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return client.post(path, content=content, headers={"content-type": "application/json"})


def refused(answered, *statuses) -> str:
    """The one sentence of a refusal."""
    assert answered.status_code in (statuses or (400,)), answered.text
    assert set(answered.json()) == {"error"}
    told = answered.json()["error"]
    assert "\n" not in told
    assert "Traceback" not in told
    assert len(told) < 1100
    assert told.endswith((".", "?"))
    return told


@pytest.fixture(scope="module")
def address():
    """A server that counts who asks it."""
    with listening(small_png()) as (address, asked):
        yield f"{address}/a.png", asked


class TestFilesOfTheServer:
    @pytest.mark.parametrize("key", ["image", "audio", "video"])
    @pytest.mark.parametrize(
        "form", ["{}", "file://{}", ["{}"], {"path": "{}"}, {"bytes": None, "path": "{}"}], ids=str
    )
    def test_no_path_is_read(self, client, tmp_path, key, form):
        (tmp_path / "a.png").write_bytes(small_png())
        cell = json.loads(json.dumps(form).replace("{}", str(tmp_path / "a.png")))
        told = refused(send(client, {"rows": [{"text": "a", key: cell}]}))
        assert told.startswith(f"Row 0: {key} must be a file in base64, or an upload in a form; this server reads no")

    def test_neither_is_a_path_of_letters_that_are_base64(self, client, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = "pictures/" + "a" * 59
        (tmp_path / "pictures").mkdir()
        (tmp_path / name).write_bytes(small_png())
        assert "is not an image" in refused(send(client, {"rows": [{"image": name}]}))

    def test_no_address_is_fetched(self, client, address):
        url, asked = address
        for cell in (url, [url], {"url": url}, {"path": url}):
            assert "reads no paths and no addresses" in refused(send(client, {"rows": [{"image": cell}]}))
        assert asked == []

    def test_a_form_cannot_name_a_file_either(self, client, tmp_path):
        (tmp_path / "a.png").write_bytes(small_png())
        answered = client.post("/predict", data={"image": str(tmp_path / "a.png")}, files={"x": b""})
        assert "reads no paths" in refused(answered) or "has the key 'x'" in answered.json()["error"]

    def test_the_page_serves_no_files(self, client):
        for path in ("/../pyproject.toml", "/static/a", "/%2e%2e/etc/passwd", "/docs/../../etc/passwd"):
            assert client.get(path).status_code == 404


MEDIA = {
    "no picture": ("image", b"no picture" * 9, "is not an image"),
    "cut picture": ("image", png(900, 900)[:200], "cannot be read"),
    "bomb": ("image", png(60_000, 60_000, real=False), "more than"),
    "thin": ("image", png(3000, 1), "image_aspect_ratio"),
    "cut animation": ("image", gif(500)[:50], "cannot be read"),
    "no sound": ("audio", b"no sound!" * 9, "cannot be read"),
    "slow sound": ("audio", wav(1, samples=bytes(2000)), "Hz"),
    "too many channels": ("audio", wav(16_000, 65_535, samples=bytes(131_070)), "cannot be read"),
    "no video": ("video", b"no video!" * 9, "cannot be read"),
}


@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("way", ["base64", "form"])
def test_hostile_files(client, name, way):
    key, content, said = MEDIA[name]
    if way == "base64":
        answered = send(client, {"rows": [{"text": "a", key: in_base64(content)}]})
    else:
        answered = client.post("/predict", data={"text": "a"}, files={key: ("/etc/passwd", content)})
    told = refused(answered)
    assert told.startswith("Row 0: ")
    assert said in told


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "[]", "null", '"rows"', b"\xff\xfe", '{"rows": "a"}', '{"rows": []}', '{"rows": [[]]}',
        '{"rows": [1]}',
        '{"rows": [{}]}', '{"rows": [{"text": 5}]}', '{"rows": [{"text": ["a"]}]}', '{"rows": [{"text": {"a": 1}}]}',
        '{"rows": [{"no": 1}]}', '{"rows": ["a"], "no": 1}', '{"rows": ["a"], "tasks": ["no"]}',
        '{"rows": ["a"], "tasks": 7}', '{"rows": ["a"], "top_k": -1}', '{"rows": ["a"], "top_k": 1e99}',
        '{"rows": ["a"], "threshold": NaN}', '{"rows": ["a"], "coverage": NaN}', '{"rows": ["a"], "coverage": 2}',
        '{"rows": ["\\ud800"]}', '{"\\ud800": 1}', '{"rows": [{"\\ud800": 1}]}',
        '{"rows": [' + "[" * 100_000 + "]" * 100_000 + "]}",
        '{"rows": [{"price": ' + "9" * 10_000 + "}]}", '{"rows": [{"price": {"a": 1}}]}', '{"rows": [{"price": "x"}]}',
        '{"rows": [{"brand": [1]}]}', '{"rows": [{"price": [1]}]}',
        '{"rows": [{"image": 5}]}', '{"rows": [{"image": [[[1, 2], [3]]]}]}', '{"rows": [{"audio": [0.5, 0.5]}]}',
        '{"rows": [{"audio": {"array": [0.5], "sampling_rate": 1}}]}',
        '{"rows": [{"image": "data:image/png;base64,é"}]}',
        '{"rows": [{"messages": [{"role": "user", "content": "a"}]}]}',
        '{"rows": ["a"], "generate_kwargs": {"max_new_tokens": 1e9}}',
        '{"rows": ["a"], "generate_kwargs": {"num_beams": 100}}',
        '{"rows": ["a"], "generate_kwargs": {"max_time": 1e9}}',
        '{"rows": ["a"], "generate_kwargs": {"custom_generate": "me/evil", "trust_remote_code": true}}',
        '{"rows": ["a"], "generate_kwargs": {"temperature": -1, "do_sample": true}}',
        '{"rows": ["a"], "generate_kwargs": {"temperature": 1e-40, "do_sample": true}}',
        '{"rows": ["a"], "generate_kwargs": {"repetition_penalty": 1e-30, "do_sample": true}}',
        '{"rows": ["a"], "generate_kwargs": {"length_penalty": -90, "num_beams": 2}}',
        '{"rows": ["a"], "generate_kwargs": {"max_new_tokens": 41}}',
    ],
    ids=lambda body: str(body)[:60],
)  # fmt: skip
def test_hostile_json(client, body):
    refused(send(client, body))


@pytest.mark.parametrize("path", ["/predict", "/embed", "/generate"])
def test_halves_of_characters(client, path):
    """Tokenizers take no lone surrogates."""
    key = "row" if path == "/generate" else "rows"
    row = b'"a \xed\xa0\x80"' if path == "/generate" else b'["a \xed\xa0\x80"]'
    told = refused(send(client, b'{"' + key.encode() + b'": ' + row + b"}", path))
    assert told == "The body is not encoded as UTF-8."
    form = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n\\ud800\r\n--x--\r\n'
    header = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    assert "half of a character" in refused(client.post(path, content=form, headers=header))


def test_whole_characters_are_taken(client):
    for content in (
        '{"rows": ["\\uD83D\\uDE00 a"], "tasks": ["topic"]}',
        '\ufeff{"rows": ["😀 a"], "tasks": ["topic"]}',
    ):
        assert send(client, content).status_code == 200


@pytest.mark.parametrize("letters", ["topic", "no"])
def test_huge_names(client, letters):
    """To find a similar name, each of their letters is indexed."""
    name = letters * 2**20
    for path, body in (
        ("/predict", {"rows": [{name: 1}]}), ("/predict", {"rows": ["a"], "tasks": [name]}),
        ("/predict", {"rows": ["a"], "tasks": ["topic"] * 2000}), ("/predict", {"rows": ["a"], name: 1}),
        ("/embed", {"rows": ["a"], "task_name": name}), ("/generate", {"row": "a", "task": name}),
    ):  # fmt: skip
        begun = time.process_time()
        assert len(refused(send(client, body, path))) < 600
        assert time.process_time() - begun < 1


def test_a_key_without_a_name(client):
    assert refused(send(client, '{"rows": ["a"], "": 1}')) == "Extra inputs are not permitted."


@pytest.mark.parametrize(
    "row", [{"price": 1e308}, {"price": -1e308}, {"price": 10**300}, {"price": True}, {"brand": "x" * 999}], ids=str
)
def test_odd_cells_are_answered(client, row):
    answered = send(client, {"rows": [row], "tasks": ["topic", "score"]})
    assert answered.status_code in (200, 400), answered.text
    json.loads(answered.text, parse_constant=pytest.fail)


@pytest.mark.parametrize("price", ["Infinity", "-Infinity", "1e999", "9" * 400])
def test_numbers_that_no_float_can_hold(client, price):
    answered = send(client, f'{{"rows": [{{"price": {price}, "text": "a"}}], "tasks": ["score"]}}')
    assert answered.status_code in (200, 400), answered.text
    json.loads(answered.text, parse_constant=pytest.fail)


def test_more_tokens_than_the_decoder_has_positions_for(client):
    """A token beyond the last position ends the process on a GPU."""
    told = refused(send(client, {"row": "a", "generate_kwargs": {"max_new_tokens": 41}}, "/generate"))
    assert told == (
        "generate_kwargs.max_new_tokens is 41, too many for task 'german': the decoder has 40 positions."
    )  # fmt: skip
    assert send(client, {"row": "a", "generate_kwargs": {"max_new_tokens": 40}}, "/generate").status_code == 200
    assert send(client, {"rows": ["a"], "tasks": ["topic"], "generate_kwargs": {"max_new_tokens": 41}}).is_success


@pytest.mark.parametrize("path", ["/predict", "/generate"])
def test_sampling_cannot_fail(client, app, path):
    """NaN among the probabilities ends the process on a GPU; half precision may give it for an odd row."""
    bias = app.state.server.served.model.model.text_model.final_logits_bias
    before = bias.clone()
    body = {"rows": ["a"], "tasks": ["german"]} if path == "/predict" else {"row": "a"}
    try:
        bias.fill_(torch.nan)[:, ::2] = torch.inf
        answered = send(client, {**body, "generate_kwargs": {"do_sample": True, "temperature": 0.01}}, path)
    finally:
        bias.copy_(before)
    assert answered.status_code == 200
    assert "error" not in answered.text


class TestSizes:
    def test_bodies(self, client):
        set_limits(served_bytes=2000)
        told = refused(send(client, {"rows": ["a" * 3000]}), 413)
        assert told == "The request is larger than the 2,000 bytes that are allowed."
        # In chunks, without a declared length.
        chunks = (b"x" * 500 for _ in range(9))
        refused(client.post("/predict", content=chunks, headers={"content-type": "application/json"}), 413)
        assert client.post("/predict", files={"image": b"x" * 3000}).status_code == 413

    def test_a_length_that_is_no_number(self, app):
        sent = asyncio.run(ask_by_hand(app, messages_of(), headers=[(b"content-length", b"9" * 5000)]))
        assert sent[0]["status"] == 413

    def test_all_bodies_together(self, client):
        set_limits(all_uploads_bytes=100)
        answered = send(client, {"rows": ["a" * 200]})
        set_limits(all_uploads_bytes=2**30)
        assert "no space for more requests" in refused(answered, 429)

    def test_rows(self, client):
        set_limits(served_rows=3)
        assert refused(send(client, {"rows": ["a"] * 4})).startswith("The request has 4 rows, more than the limit")

    def test_values_are_counted_before_they_are_parsed(self, client, monkeypatch):
        set_limits(served_values=1000)
        parsed = []
        monkeypatch.setattr(requests, "json", SimpleNamespace(loads=parsed.append))
        for values in ("[],", "{},", "1,", '"",', '"[",', '{"a":'):
            told = refused(send(client, '{"rows": [' + values * 1001))
            assert told.startswith("The body has more values than the limit served_values=1,000")
        told = refused(client.post("/predict", files={"text": (None, "a"), "options": (None, "[" * 1001)}))
        assert told.startswith("The field 'options' has more values than")
        assert not parsed

    def test_commas_and_brackets_of_texts_are_no_values(self, client):
        set_limits(served_values=1000)
        for text in ("a, [b] {c}" * 400, '\\" , ' * 400, "\\," * 1001, '",' * 1001):
            answered = send(client, {"rows": [{"text": text}], "tasks": ["topic"]})
            assert answered.status_code == 200, answered.text

    def test_the_largest_honest_request_has_fewer_values(self):
        row = {f"column {i}": "a, b" for i in range(limits().table_columns)}
        row |= {name: ["UklGRg=="] * limits().row_items for name in ("image", "audio")}
        body = json.dumps({"rows": [row] * limits().served_rows}).encode()
        assert not requests._has_more_values(body, limits().served_values)

    def test_texts(self, client):
        set_limits(served_characters=100)
        assert "the text has 101 characters" in refused(send(client, {"rows": ["a", "a" * 101]}))
        assert "'brand' has 101 characters" in refused(send(client, {"rows": [{"brand": "a" * 101}]}))

    def test_pictures_of_a_row_and_their_memory(self, client):
        cell = in_base64(small_png())
        set_limits(row_items=3)
        assert "there are 4 pictures" in refused(send(client, {"rows": [{"image": [cell] * 4}]}))
        set_limits(served_memory=20_000)
        assert "more memory than the limit served_memory" in refused(send(client, {"rows": [{"image": [cell] * 3}]}))

    def test_parts_of_a_form(self, client):
        set_limits(row_items=3)
        refused(client.post("/predict", files=[("image", small_png())] * 5))


def test_other_content_types(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/pickle", ""):
        answered = client.post("/predict", content=b"rows", headers={"content-type": kind})
        assert "Send application/json" in refused(answered, 415)
    answered = client.post("/predict", content=b"x", headers={"content-type": "multipart/form-data; boundary=a"})
    refused(answered)


def test_streams_are_checked_before_they_begin(client):
    for body in ({"row": {"image": "/etc/passwd"}}, {"row": "a", "task": "topic"}, {"row": {}}, {"rows": ["a"]},
                 {"row": "a", "generate_kwargs": {"num_beams": 2}}):  # fmt: skip
        refused(send(client, body, "/generate"))


def test_a_bad_row_among_good_ones_of_other_clients(client, app):
    """The others get their answers; see also tests/sharing/test_batcher.py."""
    told = refused(send(client, {"rows": ["a", {"image": in_base64(b"x" * 100)}, "b"]}))
    assert re.match(r"Row 1: ", told)


def test_no_client_changes_the_model(client, app):
    before = {name: value.clone() for name, value in app.state.server.served.model.state_dict().items()}
    send(client, {"rows": ["a"], "generate_kwargs": {"do_sample": True, "temperature": 2.0, "max_new_tokens": 3}})
    after = app.state.server.served.model
    assert all(torch.equal(before[name], value) for name, value in after.state_dict().items())
    assert not after.training
    first, second = (send(client, {"rows": ["a dog"]}).text for _ in range(2))
    assert first == second
