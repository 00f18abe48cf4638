"""Attacks on the demo page of a started server, over HTTP: what a client may read, reach and use up."""

import asyncio
import importlib.util
import io
import json
import os
import threading
import time
import uuid
import wave
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from cases import first_quickly
from listeners import listening
from PIL import Image
from tiny import make_feature_extractor, make_image, make_image_processor, make_model, make_tokenizer

from mm_transformers import MMTransformerProcessor
from mm_transformers.cli import request_filter
from mm_transformers.cli.page import load_page
from mm_transformers.cli.request_filter import RequestFilter
from mm_transformers.cli.uploads import REFUSAL, upload_folder
from mm_transformers.model.limits import limits, set_limits
from mm_transformers.sharing.serving import bounded_body


# Importing gradio takes seconds, so that it is left to the tests that start a page.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs mm-transformers[demo]")
META = {"_type": "gradio.FileData"}
API = "gradio_api"
TASKS = ["topic"]


class Client:
    """What anyone can send."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=address, timeout=100)

    def upload(self, content: bytes, name: str = "a.png") -> httpx.Response:
        return self.http.post(f"{API}/upload", files={"files": (name, content)})

    def uploaded(self, content: bytes, name: str = "a.png") -> dict:
        return {"path": self.upload(content, name).json()[0], "meta": META}

    def call(self, text, picture, sound=None, tasks=TASKS) -> str:
        """By the API: what the page would show, or the error."""
        begun = self.http.post(f"{API}/call/answer", json={"data": [text, picture, sound, tasks]})
        if begun.status_code != 200:
            return begun.text
        told = self.http.get(f"{API}/call/answer/{begun.json()['event_id']}").text
        event, data = told.strip().split("\n\n")[-1].split("\n", 1)
        return json.dumps(json.loads(data.removeprefix("data: "))) if "error" in event else json.loads(data[6:])[0]

    def join(self, text, picture, sound=None, tasks=TASKS) -> str:
        """By the queue, as a browser does."""
        session = uuid.uuid4().hex
        data = {"data": [text, picture, sound, tasks], "fn_index": 0, "session_hash": session}
        begun = self.http.post(f"{API}/queue/join", json=data)
        assert begun.status_code == 200, begun.text
        with self.http.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[6:]) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    return message["output"]["data"][0] if message["success"] else json.dumps(message["output"])
        raise AssertionError("the queue said nothing")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(audio="wav2vec2").save_pretrained(folder)
    parts = (make_image_processor(), make_tokenizer(), make_feature_extractor())
    MMTransformerProcessor(*parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(model):
    picture = model / "example.png"
    make_image(2).save(picture)
    page = load_page(str(model), [["a cat", str(picture), None]])
    _, address, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1")
    yield Client(address)
    page.close()


@pytest.fixture
def listener():
    """A server on this machine that nobody may ask anything, and what it was asked."""
    with listening(png(make_image(4))) as found:
        yield found


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def wav(seconds: float = 0.2) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((np.sin(np.arange(int(16_000 * seconds)) / 9) * 9000).astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("way", ["call", "join"])
def test_uploads_are_answered(client, way):
    shown = getattr(client, way)("a cat", client.uploaded(png(make_image(1))), client.uploaded(wav(), "a.wav"))
    for part in ("without the text", "without the picture", "without the sound", 'class="heat"', 'class="sound"'):
        assert part in shown


def test_examples_are_answered(client):
    """Their pictures are files of the page. After one is loaded, gradio makes the components of the session anew."""
    session = uuid.uuid4().hex
    config = client.http.get("config").json()
    number = next(d["id"] for d in config["dependencies"] if d["api_name"] == "load_example")
    body = {"data": [0], "fn_index": number, "session_hash": session}
    loaded = client.http.post(f"{API}/run/load_example", json=body).json()["data"]
    assert "value" in loaded[1] or "path" in loaded[1]
    picture = loaded[1].get("value", loaded[1])
    assert 'class="heat"' in client.call("a cat", picture)
    secret = {"path": __file__, "meta": META}
    body = {"data": ["x", secret, None, TASKS], "fn_index": 0, "session_hash": session}
    client.http.post(f"{API}/queue/join", json=body)
    with client.http.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as lines:
        told = "".join(line for line in lines.iter_lines() if "process_completed" in line)
    assert REFUSAL in told


def attacks(secret: Path, address: str) -> list:
    """What a client may claim to have uploaded."""
    folder = upload_folder()
    folder.mkdir(exist_ok=True)
    link = folder / f"link-{uuid.uuid4().hex}{secret.suffix}"
    link.symlink_to(secret)
    paths = [
        str(secret), str(secret) + ".missing", os.path.relpath(secret), f"{folder}/../{secret.name}",
        f"{folder}/{os.path.relpath(secret, folder)}", str(link), str(folder), "", ".", "a\0b", "x" * 9000,
        f"{address}/a.png", f"{address.upper()}/a.png", "ftp://127.0.0.1/a.png", f"file://{secret}",
        "data:image/png;base64,AAAA", f" {secret}", f"~/{secret.name}",
    ]  # fmt: skip
    found = [{"path": path, **more} for path in paths for more in ({}, {"meta": META}, {"is_stream": True})]
    found += [{"path": path, "meta": META, "is_stream": True} for path in paths]
    found += [{"path": str(secret), "url": f"{address}/b.png", "meta": META}, {"url": f"{address}/c.png"}]
    found += [{"path": None, "url": f"{address}/d.png", "meta": META}, {"path": [str(secret)], "meta": META}]
    found += [{"path": str(secret), "meta": {"_type": "other"}}, {"bytes": "AAAA"}, {}, {"array": [0.0] * 999}]
    found += [[{"path": str(secret), "meta": META}], {"image": {"path": str(secret), "meta": META}}]
    found += [{"__type__": "update", "value": str(secret)}]
    return found


@pytest.mark.parametrize("part", first_quickly(["picture", "sound"]))
def test_no_file_of_the_server_and_no_address(client, listener, tmp_path, part):
    address, asked = listener
    secret = tmp_path / ("secret.png" if part == "picture" else "secret.wav")
    secret.write_bytes(png(make_image(1)) if part == "picture" else wav())
    for claimed in attacks(secret, address):
        given = {part: claimed, "text": "a cat", **({"picture": None} if part == "sound" else {})}
        told = client.call(**given)
        assert REFUSAL in told, (claimed, told[:500])
        assert secret.name not in told
    for claimed in attacks(secret, address)[::5]:
        assert REFUSAL in client.join(**{"text": "a cat", "picture": None, part: claimed})
    assert not asked


def test_strings_are_no_files(client, listener, tmp_path):
    address, asked = listener
    make_image(1).save(tmp_path / "secret.png")
    for claimed in (str(tmp_path / "secret.png"), f"{address}/a.png", ["x"], 5, True):
        told = client.call("a cat", claimed)
        assert REFUSAL in told or '"error"' in told
        assert "heat" not in told
    for text in ({"path": str(tmp_path / "secret.png"), "meta": META}, [1], 5):
        assert "heat" not in client.call(text, None)
    assert "heat" not in client.call("a", None, None, {"path": __file__, "meta": META})
    assert not asked


def test_routes_that_the_page_does_not_need(client, listener, tmp_path):
    address, asked = listener
    secret, missing = tmp_path / "secret.png", tmp_path / "missing.png"
    make_image(1).save(secret)
    there, gone = (client.http.get(f"{API}/file={path}") for path in (secret, missing))
    assert there.status_code == gone.status_code == 403
    assert there.text.replace(secret.name, missing.name) == gone.text
    for route in (
        f"file={address}/a.png", "file=HTTP://127.0.0.1/a", f"file/{address}/a.png", f"proxy={address}/a.png",
        "process_recording", "run-history/buckets", "component_server", "stream/x", "vibe-edit", "mcp/sse",
    ):  # fmt: skip
        for found in (client.http.get(f"{API}/{route}"), client.http.post(f"{API}/{route}")):
            assert found.status_code in (403, 404, 405), route
    assert not asked
    # Only through the queue, which counts who waits.
    assert client.http.post(f"{API}/run/answer", json={"data": ["a", None, None, TASKS]}).status_code == 404


def test_uploads_are_bounded_and_forgotten(client, monkeypatch):
    folder, before = upload_folder(), limits()
    monkeypatch.setattr("mm_transformers.model.limits._current", before)
    names = lambda: {path for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    there = names()
    large = client.upload(bytes(before.upload_bytes + 2**17))
    assert large.status_code == 413
    assert f"{before.upload_bytes + 2**16:,} bytes" in large.text

    def parts():  # without a Content-Length
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(before.upload_bytes // 2**20 + 2):
            yield bytes(2**20)
        yield b"\r\n--b--\r\n"

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.http.post(f"{API}/upload", content=parts(), headers=form).status_code == 413
    left = names() - there
    for path in left:  # of an upload that broke off
        os.utime(path, (0, 0))
    set_limits(all_uploads_bytes=before.upload_bytes + 2**20 + sum(path.lstat().st_size for path in there))
    assert client.upload(png(make_image(1))).status_code == 200
    assert not left & names()
    assert client.upload(bytes(2**20 + 1)).status_code == 200
    assert client.upload(b"more").status_code == 507


def test_uploads_at_the_same_time_count_together(tmp_path, monkeypatch):
    """None of them is in the folder yet when the next one comes."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("mm_transformers.model.limits._current", limits())
    set_limits(upload_bytes=1000, all_uploads_bytes=2500)
    statuses = []

    async def received(scope, receive, send):
        await going_on.wait()
        statuses.append(200)

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def upload(size):
        length = [] if size is None else [(b"content-length", str(size).encode())]
        await filtered({"type": "http", "path": f"/{API}/upload", "headers": length}, None, send)

    async def attack():
        nonlocal going_on
        going_on = asyncio.Event()
        first = [asyncio.create_task(upload(size)) for size in (900, None)]
        await asyncio.sleep(0)
        await upload(900)
        assert statuses == [507]
        going_on.set()
        await asyncio.gather(*first)
        await upload(900)  # they have ended, and left nothing
        assert statuses == [507, 200, 200, 200]
        assert filtered.running == 0

    filtered, going_on = RequestFilter(received), None
    asyncio.run(asyncio.wait_for(attack(), 20))


def test_uploads_in_chunks_count_with_the_limit_whatever_they_declare():
    headers = [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "path": f"/{API}/upload", "headers": headers}
    assert request_filter._upload_bytes(scope) == limits().upload_bytes
    assert request_filter._upload_bytes({**scope, "headers": headers[:1]}) == 1


def test_a_body_that_does_not_arrive_ends_the_request(monkeypatch):
    """It would keep its share of the room for uploads for ever."""
    from starlette.exceptions import HTTPException

    monkeypatch.setattr(bounded_body, "SECONDS", 0.2)
    statuses = []

    async def application(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
        except HTTPException as error:
            statuses.append(error.status_code)

    async def dripping():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    filtered = RequestFilter(application)
    scope = {"type": "http", "path": f"/{API}/upload", "headers": [(b"content-length", b"100")]}
    asyncio.run(asyncio.wait_for(filtered(scope, dripping, None), 20))
    assert (statuses, filtered.running) == ([408], 0)


def test_requests_are_bounded(client, monkeypatch):
    monkeypatch.setattr("mm_transformers.model.limits._current", limits())
    start = time.monotonic()
    shown = client.call("word " * 200_000, None)
    assert "Only the first 2,000 words of the text were read" in shown
    assert 'data-task="topic"' in shown
    assert "Only the first" in client.call("字" * 200_000, None), "also where words have no spaces between them"
    assert "Only the first" not in client.call("a cat", None)
    assert time.monotonic() - start < 60
    body = json.dumps({"data": ["x" * limits().request_bytes, None, None, TASKS]})
    assert client.http.post(f"{API}/call/answer", content=body).status_code == 413
    set_limits(request_seconds=1e-6)
    assert "longer than the limit of 1e-06 seconds" in client.call("a cat", client.uploaded(png(make_image(1))))


def test_a_slow_request_does_not_stop_the_others(client, monkeypatch):
    """Those that wait are counted; whoever comes too late is told so at once."""
    may_end = threading.Event()
    monkeypatch.setattr("mm_transformers.cli.page_answers._read", lambda *_: may_end.wait(60) and 1 / 0)
    data = {"data": ["a", client.uploaded(png(make_image(1))), None, TASKS]}
    answers = [client.http.post(f"{API}/call/answer", json=data) for _ in range(limits().waiting_requests + 8)]
    codes = [answer.status_code for answer in answers]
    assert codes[: limits().waiting_requests] == [200] * limits().waiting_requests
    assert codes[-1] == 503
    assert client.http.get("config").status_code == 200
    may_end.set()
    for answer in answers:
        if answer.status_code == 200:
            client.http.get(f"{API}/call/answer/{answer.json()['event_id']}")


@pytest.mark.slow
def test_bombs(client):
    """Small files of large pictures and long sounds: one sentence, or an answer, in bounded time and memory."""
    import resource

    flac = io.BytesIO()
    pytest.importorskip("soundfile").write(flac, np.zeros(3600 * 8000, np.int8).astype("<i2"), 8000, format="FLAC")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for picture, sound, told in (
        (png(Image.new("1", (9000, 9900))), None, "image_pixels"),
        (png(Image.new("1", (7000, 7000))), None, 'class="heat"'),
        (png(Image.new("1", (3000, 1))), None, "image_aspect_ratio"),
        (None, flac.getvalue(), "audio_seconds"),
    ):
        start = time.monotonic()
        picture = None if picture is None else client.uploaded(picture)
        sound = None if sound is None else client.uploaded(sound, "a.flac")
        assert told in client.call("a cat", picture, sound)
        assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # kB


def test_a_model_stops_between_two_layers():
    """Only in the thread whose time is over."""
    from mm_transformers.cli.time_limit import TimeLimitError, time_limit

    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.1)
            return x

    layers, done = torch.nn.Sequential(*(Slow() for _ in range(60))), []
    other = threading.Thread(target=lambda: done.append(layers[:5](torch.zeros(1))))

    def limited():
        with time_limit(0.25):
            other.start()
            layers(torch.zeros(1))

    start = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"longer than the limit of 0.25 seconds"):
        limited()
    assert time.monotonic() - start < 4
    other.join()
    assert done
    layers[:5](torch.zeros(1))


def test_hostile_names_and_texts(client):
    name = "<img src=x onerror=alert(1)>.png"
    assert "<img src=x" not in client.call("{{7*7}}<script>alert(1)</script>", client.uploaded(b"none", name))
    shown = client.call("{{7*7}}<script>alert(1)</script>", None)
    assert "<script>" not in shown
    assert "49" not in shown
