"""
`mm-transformers serve` beside a stock FastAPI handler that calls the pipeline row by row, under many clients.

    python benchmarks/serve.py --seconds 300 --inputs texts

Each request carries one row, and its answer is compared with the one that the pipeline gave to this row before: an
answer of another row would be counted as wrong. `--inputs overload` gives the server a short queue, and `--inputs kill`
kills one of its workers halfway.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from harness import make_model, parser, prepare, report
from rows import jpeg, make_picture, make_processor, make_rows
from transformers import pipeline

from mm_transformers import MMTransformerForMultiTask, MMTransformerProcessor


INPUTS = ("texts", "pictures", "shared_pictures", "overload", "kill")
FOLDER = "MM_TRANSFORMERS_BENCHMARK_MODEL"
IMAGE_SIZE = 224
TOLERANCE = 1e-4
# Pictures of `shared_pictures`.
SHARED = 8


def stock_app() -> Any:
    """What the documentation of FastAPI and transformers suggests: a handler that calls the pipeline for one row."""
    from fastapi import FastAPI
    from pydantic import BaseModel

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = MMTransformerForMultiTask.from_pretrained(os.environ[FOLDER]).eval()
    processor = MMTransformerProcessor.from_pretrained(os.environ[FOLDER])
    pipe = pipeline("multimodal", model=model, processor=processor)
    app = FastAPI()

    class Row(BaseModel):
        text: str
        image: str | None = None

    class Rows(BaseModel):
        rows: list[Row]

    @app.post("/predict")
    def predict(body: Rows) -> dict[str, Any]:
        answers = []
        for row in body.rows:
            image = None if row.image is None else base64.b64decode(row.image)
            answers.append(pipe({"text": row.text, "image": image}, top_k=None))
        return {"answers": answers}

    @app.get("/health")
    def health() -> str:
        return "ok"

    return app


def save_model(args: argparse.Namespace, folder: Path) -> None:
    """Random weights, whose answers differ from row to row."""
    model = make_model(args, IMAGE_SIZE, num_tasks=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_alpha"):
                parameter.fill_(0.7)
            elif name.startswith("heads") and name.endswith("out_proj.weight"):
                parameter.mul_(30)
    model.save_pretrained(folder)
    make_processor(IMAGE_SIZE).save_pretrained(folder)


def rows_of(inputs: str, count: int) -> list[dict[str, Any]]:
    texts = make_rows(count, pictures=False)["text"]
    if "pictures" not in inputs:
        return [{"text": text} for text in texts]
    number = SHARED if inputs == "shared_pictures" else count
    pictures = [jpeg(make_picture(i)) for i in range(number)]
    return [{"text": text, "image": pictures[i % number]} for i, text in enumerate(texts)]


def numbers_of(answer: dict[str, Any]) -> list[float]:
    """The probabilities of an answer, in the order of the labels."""
    return [part["score"] for name in sorted(answer) for part in sorted(answer[name], key=lambda part: part["label"])]


def expected_answers(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    pipe = pipeline("multimodal", model=str(folder))
    expected = np.array([numbers_of(pipe(row, top_k=None)) for row in rows])
    distances = np.abs(expected[:, None] - expected[None]).max(-1) + np.eye(len(rows))
    assert distances.min() > 2 * TOLERANCE, "two rows have the same answer, so that a mix-up would not be seen"
    return expected


@contextmanager
def running(command: list[str], environment: dict[str, str], port: int) -> Iterator[psutil.Process]:
    """A server, from the time when it answers; it is stopped gracefully."""
    log = Path(tempfile.mkdtemp(), "server.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The server did not start:\n{log.read_text()}")
            time.sleep(0.3)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answers(port: int) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


def used(process: psutil.Process) -> tuple[float, float]:
    """MB and CPU seconds of a process and its workers."""
    memory, seconds = 0.0, 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            memory += one.memory_info().rss / 2**20
            seconds += one.cpu_times().user + one.cpu_times().system
        except psutil.NoSuchProcess:
            continue
    return memory, seconds


@dataclass
class Load:
    """What the clients have seen."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    wrong: int = 0
    memory: list[float] = field(default_factory=list)
    last_answer: float = 0.0
    lasted: float = 0.0
    cpu_seconds: float = 0.0

    def percentile(self, share: int) -> float:
        return statistics.quantiles(self.seconds, n=100)[share - 1]

    @property
    def rate(self) -> float:
        return len(self.seconds) / self.lasted


async def drive(
    port: int, args: argparse.Namespace, seconds: float, bodies: list[bytes], expected: np.ndarray,
    process: psutil.Process, kills: bool = False,
) -> Load:  # fmt: skip
    """Clients that each send a request as soon as they have the answer to the last one."""
    load, numbers = Load(), itertools.cycle(random.Random(0).sample(range(len(bodies)), len(bodies)))
    begun, cpu_before = time.perf_counter(), used(process)[1]
    end = begun + seconds
    headers = {"content-type": "application/json"}

    async def client(http: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            number, start = next(numbers), time.perf_counter()
            try:
                async with http.post(f"http://127.0.0.1:{port}/predict", data=bodies[number], headers=headers) as told:
                    load.statuses[told.status] += 1
                    content = await told.read()
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
                load.statuses["no answer"] += 1
                await asyncio.sleep(0.05)
                continue
            if told.status != 200:
                await asyncio.sleep(0.05)
                continue
            load.last_answer = time.perf_counter()
            load.seconds.append(load.last_answer - start)
            [answer] = json.loads(content)["answers"]
            load.wrong += bool(np.abs(np.array(numbers_of(answer)) - expected[number]).max() > TOLERANCE)

    async def watch() -> None:
        while True:
            load.memory.append(used(process)[0])
            await asyncio.sleep(1)

    async def kill() -> None:
        await asyncio.sleep(seconds / 2)
        workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
        workers[0].kill()

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as http:
        others = [asyncio.create_task(watch()), *([asyncio.create_task(kill())] if kills else [])]
        await asyncio.gather(*(client(http) for _ in range(args.clients)))
        for task in others:
            task.cancel()
    load.lasted, load.cpu_seconds = time.perf_counter() - begun, used(process)[1] - cpu_before
    return load


def measured(
    way: str, args: argparse.Namespace, inputs: str, folder: Path, bodies: list[bytes], expected: np.ndarray
) -> Load:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, args.threads // args.workers)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if way == "served":
        queue = 8 if inputs == "overload" else 512
        command = [
            sys.executable, "-m", "mm_transformers.cli", "serve", str(folder), "--port", str(port), "--workers",
            str(args.workers), "--queue", str(queue), "--batch-size", str(args.batch_size), "--threads", str(threads),
        ]  # fmt: skip
    else:
        here = Path(__file__)
        environment |= {FOLDER: str(folder), "PYTHONPATH": os.pathsep.join([str(here.parent), *filter(None, sys.path)])}
        command = [
            sys.executable, "-m", "uvicorn", f"{here.stem}:stock_app", "--factory", "--port", str(port), "--workers",
            str(args.workers), "--no-access-log",
        ]  # fmt: skip
    with running(command, environment, port) as process:
        asyncio.run(drive(port, args, min(args.seconds, 5), bodies, expected, process))  # warms up
        seconds = args.seconds if way == "served" else args.stock_seconds or args.seconds
        load = asyncio.run(drive(port, args, seconds, bodies, expected, process, inputs == "kill"))
    told = f"{way}: {len(load.seconds):,} answers, {load.wrong} wrong, statuses {dict(load.statuses)}"
    print(told, file=sys.stderr, flush=True)
    if load.wrong:
        raise SystemExit(f"{load.wrong} answers were wrong.")
    return load


def main() -> None:
    made = parser(__doc__, size="small")
    made.add_argument("--inputs", choices=INPUTS, nargs="+", default=["texts", "pictures"])
    made.add_argument("--seconds", type=float, default=60, help="of the load on the server")
    made.add_argument("--stock_seconds", type=float, help="of the load on the stock handler; default: the same")
    made.add_argument("--clients", type=int, default=200)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--rows", type=int, default=256, help="distinct rows")
    made.add_argument("--batch_size", type=int, default=32)
    args = made.parse_args()
    prepare(args)
    with tempfile.TemporaryDirectory() as name:
        save_model(args, Path(name))
        for inputs in args.inputs:
            rows = rows_of(inputs, args.rows)
            expected = expected_answers(Path(name), rows)
            bodies = [json.dumps({"rows": [_sent(row)], "top_k": None}).encode() for row in rows]
            stock_bodies = [json.dumps({"rows": [_sent(row)]}).encode() for row in rows]
            served = measured("served", args, inputs, Path(name), bodies, expected)
            alone = inputs in ("overload", "kill")
            shapes = {"inputs": inputs.replace("_", " "), "clients": args.clients, "workers": args.workers}
            if alone:
                counts = {str(status): [float(number)] for status, number in sorted(served.statuses.items(), key=str)}
                report("serving, answers by status", counts, "200", args, unit="answers", **shapes)
            else:
                stock = measured("stock", args, inputs, Path(name), stock_bodies, expected)
                rates = {"FastAPI, row by row": [stock.rate], "mm-transformers serve": [served.rate]}
                report("serving, rows per second", rates, "FastAPI, row by row", args, unit="rows/s", **shapes)
                work = {
                    "FastAPI, row by row": [stock.cpu_seconds / len(stock.seconds)],
                    "mm-transformers serve": [served.cpu_seconds / len(served.seconds)],
                }
                report("serving, CPU seconds of a row", work, "FastAPI, row by row", args, **shapes)
                for share in (50, 95, 99):
                    times = {
                        "FastAPI, row by row": [stock.percentile(share)],
                        "mm-transformers serve": [served.percentile(share)],
                    }
                    report(f"serving, p{share} of a request", times, "FastAPI, row by row", args, **shapes)
            tenth = max(1, len(served.memory) // 10)
            memory = {
                "first tenth": [statistics.median(served.memory[:tenth])],
                "last tenth": [statistics.median(served.memory[-tenth:])],
                "peak": [max(served.memory)],
            }
            report("serving, memory of all processes", memory, "first tenth", args, unit="MB", **shapes)


def _sent(row: dict[str, Any]) -> dict[str, str]:
    return {name: base64.b64encode(cell).decode() if isinstance(cell, bytes) else cell for name, cell in row.items()}


if __name__ == "__main__":
    main()
