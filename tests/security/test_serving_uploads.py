"""Bodies of requests that arrive slowly, never, or only in part: what they may hold, and for how long."""

import asyncio
import json

import pytest
from served import ask_by_hand, client_of, make_served_parts, messages_of

from mm_transformers.model.limits import limits, set_limits
from mm_transformers.sharing.serving import bounded_body
from mm_transformers.sharing.serving.answering import ServedModel
from mm_transformers.sharing.serving.app import create_app


@pytest.fixture(scope="module")
def served():
    return ServedModel(*make_served_parts())


@pytest.fixture(autouse=True)
def limits_of_a_test(monkeypatch):
    monkeypatch.setattr("mm_transformers.model.limits._current", limits())


BODY = {"rows": ["a dog"], "tasks": ["topic"]}
END = {"type": "http.disconnect"}
MORE = {"type": "http.request", "body": b"{" + b" " * 599, "more_body": True}


def status_of(sent):
    assert sent[0]["type"] == "http.response.start"
    return sent[0]["status"]


def error_of(sent):
    return json.loads(sent[1]["body"])["error"]


def test_bodies_that_have_not_arrived_hold_no_room(served):
    set_limits(all_uploads_bytes=1000)
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
