"""The web application of a model: `/predict`, `/embed`, `/generate`, `/health` and `/metrics`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Optional

from ...model.messages import one_line
from ...model.modalities import PARTS


try:
    import python_multipart  # noqa: F401  reads forms
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from . import metrics
except ImportError as error:
    raise ImportError(f"Serving needs the extra `serve` ({error}): pip install mm-transformers[serve]") from error

from ... import __version__
from .answering import EMBED, PREDICT, ServedModel
from .batcher import QueueFullError, WaitedTooLongError
from .clients import ClientLeftError, unless_client_leaves
from .examples import example_row
from .guard import UPLOAD, Guard
from .requests import EmbedRequest, GenerateRequest, PredictRequest, read_body
from .server import Server
from .settings import ServeSettings
from .text_stream import FAILED, TextStreamResponse, too_long


ROUTES = ("/predict", "/embed", "/generate", "/health", "/metrics")
_BUSY = "The server has as many requests as it can hold; try again later."
_LEFT = 499  # nobody reads it; the counts of requests have it


def create_app(
    model: str | os.PathLike[str] | ServedModel, settings: Optional[ServeSettings] = None, name: Optional[str] = None
) -> FastAPI:
    """
    A web application that answers rows as the pipelines do. Needs the extra `serve`.

    `mm-transformers serve my-model` runs it in one or more processes. Rows that arrive within milliseconds share a
    forward pass. Clients are strangers: the app reads no file of this machine and fetches no address.

    Args:
        model (`str`, `Path` or [`ServedModel`]): Folder or Hub id, or a loaded model.
        settings ([`ServeSettings`], *optional*): Batches, queue and timeout.
        name (`str`, *optional*): The name of the model for clients. By default that of the folder.

    Returns:
        `fastapi.FastAPI`: for any ASGI server, or to be mounted in an app of yours.

    Raises:
        ImportError: if the extra `serve` is not installed.
        OSError, ValueError: one sentence, if there is no such model.

    Example:

    ```python
    >>> app = create_app("my-model", ServeSettings(batch_rows=64))
    >>> with TestClient(app) as client:
    ...     client.post("/predict", json={"rows": [{"text": "Lovely weather!"}]}).json()
    {'answers': [{'sentiment': {'label': 'positive', 'score': 0.93}}]}
    ```
    """
    settings = settings or ServeSettings()
    if not isinstance(model, ServedModel):
        name = name or Path(model).name
        model = ServedModel.load(os.fspath(model), settings.device)
    server = Server(model, settings)
    title = name or "model"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server:
            yield

    app = FastAPI(title=title, version=__version__, description=_described(server), lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Guard, metrics=server.metrics, routes=ROUTES)
    _add_errors(app, settings)
    _add_routes(app, server, title)
    return app


def _described(server: Server) -> str:
    tasks = ", ".join(f"`{name}`" for name in server.served.model.tasks)
    keys = ", ".join(f"`{key}`" for key in server.served.processor.row_keys)
    return (
        f"Tasks: {tasks}. A row may have any of {keys}. Pictures, sounds and videos are files in base64; or send a "
        'form with one row, whose files are uploads. Errors are one sentence: `{"error": "..."}`.'
    )


def _add_errors(app: FastAPI, settings: ServeSettings) -> None:
    def error(told: str, status: int, **headers: str) -> JSONResponse:
        return JSONResponse({"error": told}, status, headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, problem: HTTPException) -> Response:
        return error(one_line(problem.detail), problem.status_code, **(problem.headers or {}))

    @app.exception_handler(ValueError)
    async def wrong(request: Request, problem: ValueError) -> Response:
        return error(one_line(problem, 1000), 400)

    @app.exception_handler(QueueFullError)
    async def busy(request: Request, problem: QueueFullError) -> Response:
        return error(_BUSY, 429, **{"Retry-After": "1"})

    @app.exception_handler(WaitedTooLongError)
    async def late(request: Request, problem: WaitedTooLongError) -> Response:
        return error(too_long(settings.timeout), 503, **{"Retry-After": "1"})

    @app.exception_handler(ClientLeftError)
    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, problem: Exception) -> Response:
        return Response(status_code=_LEFT)

    @app.exception_handler(Exception)
    async def failed(request: Request, problem: Exception) -> Response:
        return error(FAILED, 500)


def _add_routes(app: FastAPI, server: Server, title: str) -> None:
    row = example_row(server.served.model.config)
    errors: dict[int | str, dict[str, Any]] = {status: {"description": told} for status, told in _STATUSES.items()}

    async def answered(request: Request, kind: str, body: Any) -> list[Any]:
        work = server.answer(kind, body.rows, body.options(), request.scope[UPLOAD])
        results = await unless_client_leaves(request, work, server.settings.timeout)
        server.metrics.rows.labels(request.scope["route"].path).inc(len(results))
        return results

    @app.post("/predict", openapi_extra=_body(PredictRequest, {"rows": [row]}, row), responses=errors)
    async def predict(request: Request) -> Response:
        """The answers of all tasks to each row, as `pipeline("multimodal")` gives them: `{"answers": [...]}`."""
        server.check_room()
        return JSONResponse({"answers": await answered(request, PREDICT, await read_body(request, PredictRequest))})

    @app.post("/embed", openapi_extra=_body(EmbedRequest, {"rows": [row]}, row), responses=errors)
    async def embed(request: Request) -> Response:
        """The vectors of each row, `null` where it lacks a modality: `{"vectors": [{"fused": [...], ...}]}`."""
        server.check_room()
        return JSONResponse({"vectors": await answered(request, EMBED, await read_body(request, EmbedRequest))})

    @app.post("/generate", openapi_extra=_body(GenerateRequest, {"row": row}, row), responses=errors)
    async def generate(request: Request) -> Response:
        """
        The text of a task that writes. It is streamed as server-sent events: `{"piece": ...}`, at the end
        `{"text": ...}`. Streams are written without beams; `"stream": false` writes as `/predict`.
        """
        server.check_room()
        body = await read_body(request, GenerateRequest)
        task, options = server.served.writing_task(body.task), body.options()
        if body.stream:
            if options.get("num_beams", 1) > 1:
                raise ValueError('Beams cannot be streamed: leave num_beams out, or send "stream": false.')
            stream = await server.open_stream(request, body.row, task, options, request.scope[UPLOAD])
            return TextStreamResponse(stream, request)
        wanted = PredictRequest(rows=[body.row], tasks=[task], generate_kwargs=body.generate_kwargs)
        body.row = None  # its files are freed when they are read
        [answers] = await answered(request, PREDICT, wanted)
        return JSONResponse(answers[task])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether this server answers (else the status is 503), and which tasks."""
        if not await server.is_well():
            raise HTTPException(503, "The model does not answer any more; start the server again.")
        return {"status": "ok", "model": title, "tasks": list(server.served.model.tasks)}

    @app.get("/metrics")
    def measures() -> Response:
        """Counts and times for Prometheus."""
        return Response(server.metrics.text(), media_type=metrics.CONTENT_TYPE)


_STATUSES = {
    400: "A row or an option is wrong; the sentence says which.",
    413: "The request is too large.",
    429: "The queue is full; try again later.",
    503: "The request waited too long; try again later.",
}


def _body(kind: type[BaseModel], example: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The description of a body for the page of the API, with an example that can be sent."""
    # Swagger knows uploads by this format.
    upload = {"type": "string", "format": "binary"}
    fields = {name: upload if name in PARTS else {"type": "string"} for name in (*row, "options")}
    form = {"type": "object", "properties": fields}
    content = {
        "application/json": {"schema": _inlined(kind.model_json_schema()), "example": example},
        "multipart/form-data": {"schema": form},
    }
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its definitions in their places: the page would look for them elsewhere."""
    definitions = schema.pop("$defs", {})

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return replaced(definitions[value["$ref"].rpartition("/")[2]])
            return {name: replaced(item) for name, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list) else value

    result: dict[str, Any] = replaced(schema)
    return result
