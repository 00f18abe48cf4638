"""The bodies of requests: JSON, or a form with uploads for one row."""

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any, Optional, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ...model.limits import limits, named


# The field of a form that holds options as JSON; every other field is a key of the row.
OPTIONS = "options"
# Parsing fewer bytes takes less than a millisecond.
_MANY_BYTES = 2**16


# The name of a task; sentences quote it.
Name = Annotated[str, Field(max_length=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GenerateOptions(_Strict):
    """Options of `generate` that clients may choose."""

    num_beams: Optional[int] = Field(None, ge=1)
    max_new_tokens: Optional[int] = Field(None, ge=1)
    do_sample: Optional[bool] = None
    # Smaller ones make scores infinite, and sampling from NaN ends the process on a GPU.
    temperature: Optional[float] = Field(None, ge=0.01, le=100)
    top_k: Optional[int] = Field(None, ge=1)
    top_p: Optional[float] = Field(None, gt=0, le=1)
    repetition_penalty: Optional[float] = Field(None, ge=0.01, le=100)
    length_penalty: Optional[float] = Field(None, ge=-10, le=10)
    no_repeat_ngram_size: Optional[int] = Field(None, ge=0, le=100)

    def given(self) -> dict[str, Any]:
        """
        The options that a client has chosen.

        Raises:
            ValueError: one sentence, if one is above its limit.
        """
        for name, limit in (("num_beams", "served_beams"), ("max_new_tokens", "served_tokens")):
            value = getattr(self, name)
            if value is not None and value > getattr(limits(), limit):
                raise ValueError(f"generate_kwargs.{name} is {value:,}, more than {named(limit)}.")
        return self.model_dump(exclude_none=True)


class PredictRequest(_Strict):
    """Rows and options of the pipeline "multimodal"."""

    rows: list[Any] = Field(min_length=1)
    tasks: Optional[list[Name]] = Field(None, max_length=1000)
    top_k: Optional[int] = None
    threshold: Optional[float] = None
    coverage: Optional[float] = None
    advise: Optional[bool] = None
    generate_kwargs: Optional[GenerateOptions] = None

    def options(self) -> dict[str, Any]:
        """The options that a client has chosen, for the pipeline."""
        given = {name: getattr(self, name) for name in self.model_fields_set - {"rows", "generate_kwargs"}}
        # `None` means all labels in `top_k`, and nothing chosen elsewhere.
        given = {name: value for name, value in given.items() if value is not None or name == "top_k"}
        if self.generate_kwargs is not None and (chosen := self.generate_kwargs.given()):
            given["generate_kwargs"] = chosen
        return given


class EmbedRequest(_Strict):
    """Rows and options of the pipeline "multimodal-feature-extraction"."""

    rows: list[Any] = Field(min_length=1)
    task_name: Optional[Name] = None
    normalize: Optional[bool] = None

    def options(self) -> dict[str, Any]:
        """The options that a client has chosen, for the pipeline."""
        return self.model_dump(exclude={"rows"}, exclude_none=True)


class GenerateRequest(_Strict):
    """One row, and the task whose text is written."""

    row: Any
    task: Optional[Name] = None
    stream: bool = True
    generate_kwargs: Optional[GenerateOptions] = None

    def options(self) -> dict[str, Any]:
        """The options of `generate` that a client has chosen."""
        return {} if self.generate_kwargs is None else self.generate_kwargs.given()


Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """
    The body of a request.

    Args:
        kind: [`PredictRequest`], [`EmbedRequest`] or [`GenerateRequest`].

    Raises:
        ValueError: one sentence, if it is not of this form.
        HTTPException: if it is neither JSON nor a form.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        # Not by `request.body()`, which keeps it as long as the request.
        given = await _parsed(b"".join([chunk async for chunk in request.stream()]), "The body")
        if not isinstance(given, dict):
            raise ValueError(f"The body must be a JSON object with {_required(kind)!r}.")
    elif content_type == "multipart/form-data":
        given = await _read_form(request, kind)
    else:
        raise HTTPException(415, "Send application/json, or multipart/form-data for one row with files.")
    rows = given.get("rows")
    if isinstance(rows, list) and len(rows) > limits().served_rows:
        raise ValueError(f"The request has {len(rows):,} rows, more than {named('served_rows')}.")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Without the values of the client, which may be megabytes.
        place = ".".join(str(part)[:80] for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}".removeprefix(": ").rstrip(".") + ".") from None


def _required(kind: type[BaseModel]) -> str:
    return next(name for name, field in kind.model_fields.items() if field.is_required())


async def _parsed(content: bytes, what: str) -> Any:
    """As [`_parsed_at_once`]; a long text is parsed in a thread, so that other requests are answered meanwhile."""
    if len(content) <= _MANY_BYTES:
        return _parsed_at_once(content, what)
    return await asyncio.to_thread(_parsed_at_once, content, what)


def _parsed_at_once(content: bytes, what: str) -> Any:
    """
    The content of a text in JSON.

    Raises:
        ValueError: one sentence, if it is none, or takes too long to parse.
    """
    if _has_more_values(content, limits().served_values):
        raise ValueError(f"{what} has more values than {named('served_values')}.")
    try:
        # Not left to `json`, which takes halves of characters in bytes.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not encoded as UTF-8.") from None
    try:
        found = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()  # JSON can name halves of characters, which are no text
        return found
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a character (a lone surrogate).") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        # Errors of numbers with thousands of digits name a setting of Python.
        reason = f" ({error.msg}, line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{what} is not valid JSON{reason}.") from None


def _has_more_values(content: bytes, most: int) -> bool:
    """
    Whether a text in JSON has more values than these. `json` would hold the interpreter for seconds.

    A comma or a bracket comes with each value. Those within strings do not count.
    """
    if len(content) <= most or _num_marks(content) <= most:
        return False
    plain = content.replace(rb"\\", b"").replace(rb"\"", b"")
    # Each value has at most two strings, its key and itself, of two quotes.
    return plain.count(b'"') > 4 * most or _num_marks(b"".join(plain.split(b'"')[::2])) > most


def _num_marks(content: bytes) -> int:
    return sum(map(content.count, (b",", b"[", b"{")))


async def _read_form(request: Request, kind: type[BaseModel]) -> dict[str, Any]:
    """The row and the options of a form; its files are read into memory."""
    most = limits().table_columns + limits().row_items
    row: dict[str, list[Any]] = {}
    options: Any = {}
    async with request.form(max_files=limits().row_items, max_fields=most, max_part_size=limits().served_bytes) as form:
        for name, value in form.multi_items():
            if name == OPTIONS and isinstance(value, str):
                options = await _parsed(_as_utf8(value), f"The field {OPTIONS!r}")
            else:
                content = await value.read() if isinstance(value, UploadFile) else _as_utf8(value).decode()
                row.setdefault(name, []).append(content)
    if not isinstance(options, Mapping):
        raise ValueError(f"The field {OPTIONS!r} must be a JSON object.")
    whole = {name: values[0] if len(values) == 1 else values for name, values in row.items()}
    key = _required(kind)
    return {**options, key: [whole] if key == "rows" else whole}


def _as_utf8(text: str) -> bytes:
    """
    The bytes of a text of a form.

    Raises:
        ValueError: if it has a half of a character, which some character sets can name.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError("A field of the form holds half of a character (a lone surrogate).") from None
