"""`mm-transformers serve`: the real server, with several processes."""

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from command_line import mm
from served import as_json_has_it, in_base64, make_served_parts, png

from mm_transformers.model.pipeline_mm_transformer import MultimodalPipeline


def test_a_missing_model_is_told_in_a_sentence(tmp_path):
    told = mm("serve", tmp_path / "no-model", ok=False)
    assert "There is no folder" in " ".join(told.split())
    (tmp_path / "empty").mkdir()
    assert "Error: " in mm("serve", tmp_path / "empty", ok=False)


def test_a_missing_extra_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    told = " ".join(mm("serve", tmp_path, ok=False).split())
    assert "Serving needs `prometheus_client`: pip install mm-transformers[serve]" in told


@pytest.mark.parametrize("timeout", ["0", "inf", "nan"])
def test_settings_are_checked(tmp_path, timeout):
    assert "timeout must be finite and above 0" in mm("serve", tmp_path, "--timeout", timeout, ok=False)
    assert "batch_seconds must be finite" in mm("serve", tmp_path, "--wait", "inf", ok=False)


class Running:
    """The command in a process of its own."""

    def __init__(self, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "mm_transformers.cli", "serve", str(folder), "--port", str(port), *options]
        self.log = folder.parent / "server.log"
        with self.log.open("w") as file:
            self.process = psutil.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def workers(self) -> set[int]:
        found = set()
        for child in self.process.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # also of zombies
                found |= {child.pid} if "spawn_main" in " ".join(child.cmdline()) else set()
        return found

    def until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def is_up(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def end(self) -> None:
        self.http.close()
        for one in [*self.process.children(), self.process] if self.process.is_running() else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    def started(self) -> int:
        return self.log.read_text().count("Application startup complete")


@pytest.fixture
def parts(tmp_path):
    model, processor = make_served_parts()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model", MultimodalPipeline(model=model, processor=processor)


@pytest.mark.slow
def test_two_workers_answer_survive_a_kill_and_stop_gracefully(parts):
    folder, pipe = parts
    rows = [{"text": f"a {color} dog", "image": png(i)} for i, color in enumerate(["red", "green", "blue", "big"])]
    expected = [as_json_has_it(pipe(row, tasks=["topic", "score"])) for row in rows]
    running = Running(folder, "--workers", "2", "--threads", "1")
    try:
        running.until(lambda: running.started() == 2 and running.is_up())

        def ask(number):
            row = {**rows[number], "image": in_base64(rows[number]["image"])}
            return running.http.post("/predict", json={"rows": [row], "tasks": ["topic", "score"]})

        def check_all():
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, [i % 4 for i in range(32)]))
            for i, answer in enumerate(answers):
                [found], wanted = answer.json()["answers"], expected[i % 4]
                assert found["topic"]["label"] == wanted["topic"]["label"]
                assert found["score"]["value"] == pytest.approx(wanted["score"]["value"], abs=1e-5)

        check_all()
        metrics = running.http.get("/metrics").text
        assert 'mm_transformers_requests_total{route="/predict",status="200"} 32.0' in metrics, "of both workers"

        before = running.workers()
        assert len(before) == 2
        running.http.close()  # its connection may be that of the killed worker
        running.http = httpx.Client(base_url=running.http.base_url, timeout=60)
        os.kill(min(before), signal.SIGKILL)
        running.until(lambda: len(running.workers() - before) == 1 and running.started() == 3)
        check_all()
        metrics = running.http.get("/metrics").text
        assert 'mm_transformers_requests_total{route="/predict",status="200"} 64.0' in metrics, "of the dead one, too"

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, i) for i in range(4)]
            time.sleep(0.05)
            running.process.send_signal(signal.SIGTERM)
            # What was being answered is answered; what came later finds nobody.
            statuses = [done.result().status_code for done in asked if done.exception() is None]
        assert set(statuses) <= {200}
        assert running.process.wait(60) == 0, running.log.read_text()
        assert "Traceback" not in running.log.read_text()
    finally:
        running.end()


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_server(parts):
    folder, _ = parts
    (folder / "model.safetensors").write_bytes(b"no weights")
    running = Running(folder, "--workers", "2")
    try:
        running.process.wait(120)
    finally:
        running.end()
    log = running.log.read_text()
    assert "Error: " in log
    assert "Traceback" not in log
