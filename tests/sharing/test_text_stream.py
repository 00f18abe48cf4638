"""Streamed texts: how many there may be, and when their writing ends."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient
from served import END, ask_at_once, ask_by_hand, events_of, in_base64, make_served_parts, messages_of, png, until
from starlette.requests import Request

from mm_transformers.sharing.serving.answering import ServedModel
from mm_transformers.sharing.serving.app import create_app
from mm_transformers.sharing.serving.batcher import QueueFullError
from mm_transformers.sharing.serving.settings import ServeSettings
from mm_transformers.sharing.serving.text_stream import FAILED, TextStream


@pytest.fixture(scope="module")
def served():
    return ServedModel(*make_served_parts())


LONG = {"row": "a dog", "generate_kwargs": {"max_new_tokens": 30, "no_repeat_ngram_size": 1}}


def test_a_client_that_leaves_stops_the_writing(served):
    app, sent = create_app(served, ServeSettings(streams=1)), []
    server, body = app.state.server, messages_of(json.dumps(LONG).encode())

    async def receive():
        if not sent:
            return await body()
        await until(lambda: any(message.get("body") for message in sent))
        return END

    async def leave():
        async with server:
            await ask_by_hand(app, receive, "/generate", sent)
            await until(lambda: server._num_streams == 0)

    asyncio.run(leave())
    assert any(b'"piece"' in message.get("body", b"") for message in sent)
    assert not any(b'"text"' in message.get("body", b"") for message in sent)


@pytest.fixture
def slow_writing(served, monkeypatch):
    """Each token takes its time; the ends of the texts."""
    ended, write = [], served.write

    def slowly(row, task, options, emit, is_over):
        def emit_late(piece):
            time.sleep(0.02)
            emit(piece)

        try:
            return write(row, task, options, emit_late, is_over)
        finally:
            ended.append(time.monotonic())

    monkeypatch.setattr(served, "write", slowly)
    return ended


def test_streams_are_limited_while_their_rows_are_read(served, slow_writing):
    app = create_app(served, ServeSettings(streams=2))
    row = {"text": "a dog", "image": in_base64(png(0, (1500, 1500)))}
    answers = ask_at_once(app, [{**LONG, "row": row}] * 6, "/generate")
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    assert len(slow_writing) == 2


def test_a_client_that_leaves_before_the_first_event_stops_the_writing(served, slow_writing):
    app = create_app(served, ServeSettings(streams=1))
    server, body = app.state.server, messages_of(json.dumps(LONG).encode())

    async def receive():
        if server._num_streams == 0:
            return await body()
        await until(lambda: server._writers._threads)
        return END

    async def leave():
        async with server:
            # As of uvicorn: the client is listened to, and what it does not wait for is cancelled.
            await ask_by_hand(app, receive, "/generate", asgi={"spec_version": "2.3"})
            left = time.monotonic()
            with pytest.raises(QueueFullError):
                await server.open_stream(None, "a", "german", {})
            await until(lambda: server._num_streams == 0)
            return left

    left = asyncio.run(leave())
    assert slow_writing[0] - left < 0.2, "one token, not 30"


def test_a_stream_ends_in_time(served, slow_writing):
    app = create_app(served, ServeSettings(timeout=0.3, streams=1))
    [answered] = ask_at_once(app, [LONG], "/generate")
    assert events_of(answered.text)[-1]["error"].startswith("The request took longer than the 0.3 seconds")
    assert len(slow_writing) == 1


def test_a_whole_text_reaches_a_client_that_reads_slowly():
    def write(emit, is_over):
        emit("a ")
        emit("dog")
        return "a dog"

    async def read_slowly(threads):
        found = []
        async for event in TextStream(write, threads, 0.1).events(Request({"type": "http"}, messages_of())):
            found.append(event.decode())
            await asyncio.sleep(0.1)
        return found

    with ThreadPoolExecutor(1) as threads:
        found = events_of("".join(asyncio.run(read_slowly(threads))))
    assert found == [{"piece": "a "}, {"piece": "dog"}, {"text": "a dog"}]


@pytest.mark.parametrize("is_wrong_row", [False, True])
def test_the_failure_of_a_stream_reaches_the_health(served, monkeypatch, is_wrong_row):
    def fail(*_):
        raise ValueError("a wrong row.") if is_wrong_row else RuntimeError("CUDA error: device-side assert triggered")

    with TestClient(create_app(served), raise_server_exceptions=False) as client:
        monkeypatch.setattr(served, "write", fail)
        monkeypatch.setattr(served, "answer", fail)  # as after an error of CUDA
        [told] = events_of(client.post("/generate", json=LONG).text)
        health = client.get("/health").status_code
    assert (told["error"], health) == (("a wrong row.", 200) if is_wrong_row else (FAILED, 503))


def test_a_thread_that_cannot_be_prepared_ends_its_stream_at_once(served):
    def prepare(threads):
        raise RuntimeError("no such device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda threads: None)
        with TestClient(create_app(served, ServeSettings(threads=1))) as client:
            patch.setattr(torch, "set_num_threads", prepare)
            begun = time.monotonic()
            assert events_of(client.post("/generate", json=LONG).text) == [{"error": FAILED}]
            assert time.monotonic() - begun < 10, "and not after the whole timeout"
            patch.setattr(torch, "set_num_threads", lambda threads: None)
            assert "text" in events_of(client.post("/generate", json=LONG).text)[-1]
