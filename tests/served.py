"""A tiny model with all kinds of tasks and inputs, and clients of its server."""

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import torch
from tiny import (
    AUDIO_ENCODERS,
    SEQ2SEQ,
    VISION_ENCODERS,
    make_clip,
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_tasks,
    make_tokenizer,
    open_gates,
)

from mm_transformers import (
    Generation,
    Matching,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Retrieval,
    table_columns,
)


# The last message of a client.
END = {"type": "http.disconnect"}
TABLE_ROWS = [{"price": 1.5 * i, "brand": ("ACME", "Other")[i % 2]} for i in range(40)]


def make_served_parts() -> tuple[MMTransformerForMultiTask, MMTransformerProcessor]:
    table = table_columns(TABLE_ROWS, ["price", "brand"])
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=SEQ2SEQ["bart"](),
        vision_config=VISION_ENCODERS["vit"](),
        audio_config=AUDIO_ENCODERS["wav2vec2"](),
        table_config=table,
        tasks=[
            *make_tasks(),
            Retrieval("search", embedding_size=8),
            Matching("same"),
            Generation("german", max_length=6),
        ],
        num_fusion_layers=1,
        num_fusion_attention_heads=4,
        initializer_range=0.3,
    )
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    parts = (make_image_processor(), make_tokenizer(), make_feature_extractor())
    return model, MMTransformerProcessor(*parts, table_config=table)


def png(seed: int = 0, size: tuple[int, int] = (20, 30)) -> bytes:
    buffer = io.BytesIO()
    make_image(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def sound(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((make_clip(seed=seed) * 20_000).astype(np.int16).tobytes())
    return buffer.getvalue()


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def as_json_has_it(value: Any) -> Any:
    """The same after a way through JSON, NaN and infinity as `None`."""
    return json.loads(json.dumps(value, default=np.ndarray.tolist), parse_constant=lambda _: None)


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client in the loop of the application, whose server runs in the block."""
    async with app.state.server, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        yield http


def ask_at_once(app: Any, bodies: Sequence[Any], path: str = "/predict") -> list[httpx.Response]:
    """The answers to requests that arrive at the same time."""

    async def ask() -> list[httpx.Response]:
        async with client_of(app) as http:
            return await asyncio.gather(*(http.post(path, json=body) for body in bodies))

    return asyncio.run(ask())


async def ask_by_hand(
    app: Any, receive: Any, path: str = "/predict", sent: list[dict[str, Any]] | None = None, **changed: Any
) -> list[dict[str, Any]]:
    """
    The messages that an application sends to a client.

    Args:
        receive: plays the client.
        sent: gets the messages as they come.
        changed: keys of the scope of ASGI.
    """
    sent = [] if sent is None else sent

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "asgi": {"spec_version": "2.4"},
    }  # fmt: skip
    await app({**scope, **changed}, receive, send)
    return sent


def messages_of(*messages: Any) -> Any:
    """A client that sends parts of a body (bytes; the last is the end) or other messages, and then waits."""
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.sleep(3600)
        message = waiting.pop(0)
        if isinstance(message, bytes):
            return {"type": "http.request", "body": message, "more_body": bool(waiting)}
        return message

    return receive


async def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition, at most for some seconds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def events_of(text: str) -> list[dict[str, Any]]:
    """The server-sent events of an answer."""
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
