"""Bodies of requests that arrive slowly, never, or in part, and files that take long: what they hold, and how long."""

import asyncio
import json
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from hostile_media import png as hostile_png
from served import END, ask_by_hand, client_of, in_base64, make_served_parts, messages_of, png
from starlette.exceptions import HTTPException

from mm_transformers.model.images import declared_pixels
from mm_transformers.model.limits import limits, set_limits
from mm_transformers.sharing.serving import bounded_body, row_reading
from mm_transformers.sharing.serving.answering import ServedModel
from mm_transformers.sharing.serving.app import create_app
from mm_transformers.sharing.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def served():
    return ServedModel(*make_served_parts())


@pytest.fixture(autouse=True)
def limits_of_a_test(monkeypatch):
    monkeypatch.setattr("mm_transformers.model.limits._current", limits())


BODY = {"rows": ["a dog"], "tasks": ["topic"]}
MORE = {"type": "http.request", "body": b"{" + b" " * 599, "more_body": True}


def status_of(sent):
    assert sent[0]["type"] == "http.response.start"
    return sent[0]["status"]


def error_of(sent):
    return json.loads(sent[1]["body"])["error"]


def test_bodies_that_have_not_arrived_hold_no_room(served):
    set_limits(all_uploads_bytes=920)
    app = create_app(served)
    kinds = (b"content-length", b"900"), (b"transfer-encoding", b"chunked")
    json_type = (b"content-type", b"application/json")

    async def attack():
        async with client_of(app) as http:
            idle = [asyncio.create_task(ask_by_hand(app, messages_of(), headers=[json_type, kind])) for kind in kinds]
            await asyncio.sleep(0)
            answered = await http.post("/predict", json=BODY)
            for task in idle:
                task.cancel()
            return answered

    assert asyncio.run(attack()).status_code == 200


def test_bodies_that_arrive_at_the_same_time_count_together(served):
    set_limits(all_uploads_bytes=1000)
    app = create_app(served)

    async def attack():
        async with client_of(app) as http:
            first = asyncio.create_task(ask_by_hand(app, messages_of(MORE)))
            await asyncio.sleep(0.05)
            refused = await ask_by_hand(app, messages_of(MORE))
            first.cancel()
            await asyncio.wait([first])
            return refused, await http.post("/predict", content=b" " * 600 + json.dumps(BODY).encode(), headers={
                "content-type": "application/json"})  # fmt: skip

    refused, answered = asyncio.run(attack())
    assert (status_of(refused), answered.status_code) == (429, 200)
    assert "no space for more requests" in error_of(refused)


def test_a_body_gives_its_room_back_when_its_rows_are_read(served):
    """It waits for the model for longer than it takes to read it."""
    set_limits(all_uploads_bytes=1000)
    app = create_app(served)
    text = {"rows": ["a" * 600], "tasks": ["topic"]}

    async def clients():
        async with client_of(app) as http:
            app.state.server.batcher.max_wait = 0.3
            first = asyncio.create_task(http.post("/predict", json=text))
            await asyncio.sleep(0.1)
            second = await http.post("/predict", json=text)
            return (await first).status_code, second.status_code

    assert asyncio.run(clients()) == (200, 200)


@pytest.mark.parametrize("part", [b"", b" "])
def test_a_body_that_goes_on_too_slowly_ends(served, monkeypatch, part):
    monkeypatch.setattr(bounded_body, "SECONDS", 0.1)

    async def dripping():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": part, "more_body": True}

    headers = [(b"content-type", b"application/json"), (b"content-length", b"30000000")]
    sent = asyncio.run(asyncio.wait_for(ask_by_hand(create_app(served), dripping, headers=headers), 20))
    assert status_of(sent) == 408
    assert error_of(sent) == "The request took too long to arrive."


@pytest.mark.parametrize(
    ("stall", "bytes_per_second", "is_taken"),
    [(31, 2**20, True), (0, 40 * 2**10, True), (61, 2**20, False), (0, 10 * 2**10, False)],
    ids=["stalled", "steady", "stalled too long", "too slow"],
)
def test_slow_but_honest_bodies_are_taken(monkeypatch, stall, bytes_per_second, is_taken):
    """4 MiB in parts of 64 KiB, by a clock that goes on with them."""
    clock, left = SimpleNamespace(now=0.0), 64
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(bounded_body, "time", clock)

    async def receive():
        nonlocal left
        await asyncio.sleep(0)
        left -= 1
        clock.now += 2**16 / bytes_per_second
        return {"type": "http.request", "body": b" " * 2**16, "more_body": left > 0}

    async def whole():
        following = bounded_body.bounded(receive, 2**23)
        clock.now += stall
        while (await following())["more_body"]:
            pass

    with nullcontext() if is_taken else pytest.raises(HTTPException, match="took too long to arrive"):
        asyncio.run(whole())


@pytest.mark.parametrize("kind", [b"application/json", b"multipart/form-data; boundary=x"])
def test_a_client_that_leaves_while_it_sends_is_no_error(served, caplog, kind):
    app = create_app(served)
    part = {
        "type": "http.request",
        "body": b'--x\r\nContent-Disposition: form-data; name="text"\r\n',
        "more_body": True,
    }
    sent = asyncio.run(ask_by_hand(app, messages_of(part, END), headers=[(b"content-type", kind)]))
    assert status_of(sent) == 499
    assert 'route="/predict",status="499"' in app.state.server.metrics.text().decode()
    assert not caplog.records


@pytest.fixture
def slow_files(monkeypatch):
    """Reading a picture takes a while; the threads that have read one."""
    threads, read = [], row_reading.RowReader._read_file

    def slowly(*given):
        time.sleep(0.1)
        threads.append(threading.current_thread())
        return read(*given)

    monkeypatch.setattr(row_reading.RowReader, "_read_file", slowly)
    return threads


def picture(seed):
    return in_base64(png(seed))


def test_files_are_never_read_in_the_loop(served, slow_files):
    """A small file may be a large picture."""
    app = create_app(served)
    slow_files.clear()
    small = json.dumps({**BODY, "rows": [{"image": picture(1)}]}).encode()
    lies = [(b"content-type", b"application/json"), (b"content-length", b"10"), (b"transfer-encoding", b"chunked")]

    async def clients():
        async with client_of(app) as http:
            slow_files.clear()
            answered = await http.post("/predict", content=small, headers={"content-type": "application/json"})
            sent = await ask_by_hand(app, messages_of(small), headers=lies)
            return answered.status_code, status_of(sent)

    assert asyncio.run(clients()) == (200, 200)
    assert len(slow_files) == 2
    assert threading.main_thread() not in slow_files


def test_a_request_that_nobody_waits_for_is_not_read_on(served, slow_files):
    app = create_app(served, ServeSettings(timeout=0.35))
    bodies = [{**BODY, "rows": [{"image": picture(20 * i + j)} for j in range(20)]} for i in range(8)]

    async def clients():
        async with client_of(app) as http:
            slow_files.clear()
            answers = await asyncio.gather(*(http.post("/predict", json=body) for body in bodies))
            readers = app.state.server._readers
            # Only two hold a thread; the rows of the others are forgotten at once.
            waiting = readers._threads._work_queue.qsize()
            await asyncio.sleep(0.3)
            return {answered.status_code for answered in answers}, waiting, readers._free.locked()

    statuses, waiting, is_busy = asyncio.run(clients())
    assert (statuses, waiting, is_busy) == ({503}, 0, False)
    assert len(slow_files) <= 10, "not 160"


def test_the_pixels_of_all_pictures_of_a_request_are_bounded(served):
    set_limits(served_pixels=2000)
    with TestClient(create_app(served)) as client:
        rows = [{"text": "a", "image": picture(1)}] * 9
        assert client.post("/predict", json={**BODY, "rows": rows}).status_code == 200, "of 600 pixels, read once"
        rows = [{"text": "a", "image": picture(seed)} for seed in range(2, 6)]
        told = client.post("/predict", json={**BODY, "rows": rows}).json()["error"]
    assert told.startswith("Row 3: the pictures of the request have in all more pixels than the limit served_pixels=2")
    assert told.endswith(": send fewer rows at a time.")


def test_full_rows_of_pictures_as_large_as_screens_are_taken():
    assert limits().served_rows * 1920 * 1080 <= limits().served_pixels


def test_large_pictures_are_declared_by_small_files():
    assert declared_pixels(hostile_png(7000, 7000, real=False)) == 49_000_000
    assert declared_pixels(b"no picture") == 0
