"""Addresses in cells: nothing is fetched without permission, and never from a private network by a stranger's word."""

import contextlib
import http.server
import io
import os
import socket
import threading
import time
import zipfile

import datasets
import pytest
from PIL import Image
from tiny import make_config, make_feature_extractor, make_image_processor, make_model, make_processor, make_tokenizer

from mm_transformers import Limits, MMDataCollator, MMTransformerProcessor
from mm_transformers.analysis import explain
from mm_transformers.cli.app import _allowed
from mm_transformers.data.addresses import Addresses
from mm_transformers.model.audio import load_audio
from mm_transformers.model.downloads import fetch, is_public
from mm_transformers.model.images import load_image
from mm_transformers.model.pipeline_mm_transformer import MultimodalPipeline
from mm_transformers.model.video import load_frames
from mm_transformers.training.recipe import Recipe


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Answers /ok, redirects /to?ADDRESS, drips /drip, and never ends /endless; keeps what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        kind, _, rest = self.path[1:].partition("?")
        with contextlib.suppress(OSError):
            if kind == "header":
                for _ in range(1000):
                    self.wfile.write(b"H")
                    time.sleep(0.05)
            self.send_response(302 if kind == "to" else 200)
            if kind == "to":
                self.send_header("Location", rest)
            if kind == "long":
                self.send_header("Content-Length", str(10**12))
            self.end_headers()
            if kind == "ok":
                self.wfile.write(png())
            for _ in range(1000 if kind in ("drip", "endless") else 0):
                self.wfile.write(b"x" * (1 if kind == "drip" else 100_000))
                time.sleep(0.05 if kind == "drip" else 0)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def running():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(running):
    running.asked.clear()
    return running


@pytest.fixture(scope="module")
def parts():
    return make_processor(), make_model().config


def collator(parts, **options):
    return MMDataCollator(*parts, **options)


@pytest.fixture
def limits(monkeypatch):
    def change(**values):
        monkeypatch.setattr("mm_transformers.model.limits._current", Limits(**values))

    return change


class TestPermission:
    def test_no_cell_is_fetched_without_permission(self, parts, server, tmp_path):
        """Whatever it is written as: a text, a dict of `datasets`, in an archive, as a frame, in capitals."""
        host = server.address.removeprefix("http://")
        url = f"{server.address}/ok"
        cells = [
            url, {"path": url, "bytes": None}, {"path": url}, [url], f"zip://a.png::{url}", f"HTTP://{host}/ok",
            f"ftp://{host}/ok", f"gzip://x::zip://a.png::{url}", "s3://bucket/a.png", "hf://datasets/a/b/c.png",
            f"simplecache::{url}", f"filecache::{url}", f"gopher://{host}/ok", f"github://a:b@{host}/c",
        ]  # fmt: skip
        for cell in cells:
            with pytest.raises(ValueError, match=r"^row 0 of the batch, column 'image': ") as error:
                collator(parts)([{"text": "a", "image": cell}])
            assert len(str(error.value)) < 700
        with pytest.raises(ValueError, match=r"column 'video': frame 0 of .* is a network address"):
            collator(parts)([{"text": "a", "video": [url, url]}])
        assert server.asked == []

    @pytest.mark.parametrize("allowed", [False, True])
    def test_no_form_of_a_cell_reaches_this_machine(self, server, allowed):
        """What is judged is what the reader reads: also an address as `bytes`, or beside an `array`."""
        processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), make_feature_extractor())
        collator = MMDataCollator(processor, make_config(audio="wav2vec2"), allow_urls=allowed)
        url = f"{server.address}/ok"
        forms = [
            url, {"path": url}, {"bytes": url}, {"bytes": url, "path": "a.png"}, {"path": url, "array": None},
            {"bytes": None, "path": url, "array": None}, {"bytes": url, "array": None}, {"bytes": url, "array": [0.0]},
            {"path": url, "sampling_rate": 8000}, {"bytes": [url]}, {"bytes": [{"bytes": url}]},
            {"bytes": {"path": url}}, {"path": {"bytes": url}}, {"bytes": f"zip://a.png::{url}"},
            {"path": f"zip://a::{url}", "array": None},
        ]  # fmt: skip
        for column in ("image", "video", "audio"):
            for cell in [*forms, *([form] for form in forms), *([[form]] for form in forms)]:
                with pytest.raises(ValueError, match=rf"^row 0 of the batch, column '{column}': "):
                    collator([{"text": "a", column: cell}])
        assert server.asked == []

    def test_the_reader_of_sounds_asks_for_permission(self, parts, server):
        addresses = Addresses()
        for read in (lambda cell: load_audio(cell, 16_000, fetch=addresses.fetch),
                     lambda cell: load_image(cell, fetch=addresses.fetch)):  # fmt: skip
            with pytest.raises(ValueError, match="is a network address, which is opened only if you allow"):
                read({"bytes": f"{server.address}/ok"})
        assert server.asked == []

    def test_the_message_says_how_to_allow_it(self, parts, server):
        with pytest.raises(ValueError, match=r"allow_urls=\['127\.0\.0\.1'\]; on the command line --allow-urls or"):
            collator(parts)([{"text": "a", "image": f"{server.address}/ok"}])

    def test_good_rows_are_answered(self, parts, server):
        some = collator(parts, on_bad_file="drop")
        batch = some([{"text": "a", "image": f"{server.address}/ok"}, {"text": "b", "image": png()}])
        assert batch["image_index"].tolist() == [[-1], [0]]
        assert some.num_bad_files == 1

    def test_a_named_host_may_be_private(self, parts, server):
        for cell in (f"{server.address}/ok", [f"{server.address}/ok"], {"path": f"{server.address}/to?/ok"}):
            batch = collator(parts, allow_urls=["127.0.0.1"])([{"text": "a", "image": cell}])
            assert len(batch["pixel_values"]) == 1
        with pytest.raises(ValueError, match=r"the host '127\.0\.0\.1' is not an allowed host"):
            collator(parts, allow_urls=["example.org"])([{"text": "a", "image": f"{server.address}/ok"}])

    def test_true_is_for_the_public_internet(self, parts, server):
        port = server.server_port
        hosts = [
            "127.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]",
            "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254", "10.0.0.1", "[fe80::1]",
            "[fd00::1]", "100.64.0.1", "224.0.0.1", "0177.0.0.1",
        ]  # fmt: skip
        for host in hosts:
            with pytest.raises(ValueError, match="column 'image'"):
                collator(parts, allow_urls=True)([{"text": "a", "image": f"http://{host}:{port}/ok"}])
        assert server.asked == []

    @pytest.mark.parametrize("asked", ["example.org", [""], [3], ["https://example.org/a"], [None]])
    def test_what_allow_urls_takes(self, asked):
        with pytest.raises(ValueError, match="allow_urls"):
            Addresses(asked)

    def test_members_of_local_archives_are_local_files(self, parts, tmp_path, limits):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", png())
            archive.writestr("bomb.png", bytes(10**6))
        assert "pixel_values" in collator(parts)([{"text": "a", "image": f"zip://a.png::{path}"}])
        limits(file_bytes=10**5)
        with pytest.raises(ValueError, match=r"it has more bytes than the limit file_bytes=100,000"):
            collator(parts)([{"text": "a", "image": f"zip://bomb.png::{path}"}])

    def test_a_chain_that_ends_in_a_store_is_no_local_file(self):
        """The store itself is asked; its file system, or a connection, is what is missing here."""
        with pytest.raises(ValueError, match="cannot be opened") as error:
            Addresses(["s3://"]).at_hand({"path": "zip://a.png::s3://bucket/pictures.zip", "bytes": None})
        assert "No such file" not in str(error.value)
        assert "FileNotFoundError" not in str(error.value)

    def test_a_chain_opens_no_other_file(self, parts, tmp_path, monkeypatch):
        """Only its last part names a file, which is checked: a pipe would never end."""
        path, pipe = tmp_path / "a.zip", tmp_path / "pipe"
        os.mkfifo(pipe)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", png())
        monkeypatch.chdir(tmp_path)
        for first in ("pipe", "/dev/zero", "file:///dev/zero", f"file://{pipe}", "filecache", "http", ""):
            for chain in (f"{first}::zip://a.png::a.zip", f"zip://a.png::{first}::a.zip", f"{first}::a.zip"):
                with pytest.raises(ValueError, match="column 'image'"):
                    collator(parts)([{"text": "a", "image": chain}])
        for last in (pipe, "/dev/zero", f"file://{pipe}"):
            with pytest.raises(ValueError, match="it is a device or a pipe, not a file"):
                collator(parts)([{"text": "a", "image": f"zip://a.png::{last}"}])
        assert "pixel_values" in collator(parts)([{"text": "a", "image": "zip://a.png::a.zip"}])

    def test_the_caller_may_name_any_host(self, server):
        assert load_image(f"{server.address}/ok").size == (8, 8)
        assert make_processor()(text="a", images=f"{server.address}/ok")["pixel_values"].shape[0] == 1
        assert [frame.size for frame in load_frames([f"{server.address}/ok"], 1)] == [(8, 8)]

    def test_rows_of_a_data_set_were_not_typed_by_the_caller(self, server):
        url, model, processor = f"{server.address}/ok", make_model(), make_processor()
        pipe = MultimodalPipeline(model=model, processor=processor)
        for cells in ({"image": [url]}, {"image": [{"path": url, "bytes": None}]}, {"image": [[url, url]]},
                      {"video": [[url, url]]}, {"video": [{"bytes": [url]}]}, {"image": [{"bytes": url}]}):  # fmt: skip
            data = datasets.Dataset.from_dict({"text": ["a"], **cells})
            for ask in (lambda data=data: list(pipe(data)), lambda data=data: explain(model, processor, data, "topic")):
                with pytest.raises(ValueError, match=r"^Row 0: (image|video) .* is an address in a data set, which is"):
                    ask()
        assert server.asked == []
        assert pipe({"text": "a", "image": url})["topic"]["label"]

    def test_a_recipe_cannot_allow_it(self):
        recipe = {"data": {"train": "a.csv", "allow_urls": True}, "model": {"text": "b"}, "tasks": []}
        with pytest.raises(ValueError, match="allow_urls"):
            Recipe.from_dict(recipe)

    def test_options_of_commands(self):
        assert [_allowed(True, None), _allowed(False, ["a"]), _allowed(False, None)] == [True, ["a"], False]
        with pytest.raises(ValueError, match="Give either --allow-urls or --allow-host"):
            _allowed(True, ["a"])


class TestDownloads:
    def test_redirects_are_checked(self, server, tmp_path):
        secret = tmp_path / "secret"
        secret.write_bytes(png())
        for target in (f"file://{secret}", "ftp://127.0.0.1/a", "data:image/png;base64,AAAA", "gopher://127.0.0.1/"):
            with pytest.raises(OSError):  # noqa: PT011
                fetch(f"{server.address}/to?{target}")
        with pytest.raises(OSError, match="the host 'localhost' is not an allowed host"):
            fetch(f"{server.address}/to?http://localhost:{server.server_port}/ok", hosts=["127.0.0.1"])
        assert server.asked == [path for path in server.asked if path.startswith("/to")]

    def test_a_name_that_changes_its_address_gains_nothing(self, server, monkeypatch):
        """What was looked up and checked is what is connected to: the name is looked up once."""
        answers = iter(["8.8.8.8", "127.0.0.1"])
        asked, connected = [], []

        def lookup(host, port, *args, **kwargs):
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

        def connect(self, where):
            connected.append(where[0])
            raise OSError("not in a test")

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        monkeypatch.setattr(socket.socket, "connect", connect)
        with pytest.raises(OSError, match="not in a test"):
            fetch("http://rebinding.example/ok", public_only=True)
        assert (asked, connected) == (["rebinding.example"], ["8.8.8.8"])

    def test_one_private_address_among_several_is_enough_to_refuse(self, monkeypatch):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("8.8.8.8", "10.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        with pytest.raises(OSError, match=r"has the address 10\.0\.0\.1, which is not on the public Internet"):
            fetch("http://mixed.example/ok", public_only=True)

    @pytest.mark.parametrize("kind", ["drip", "header"])
    def test_the_time_is_bounded_in_all(self, server, limits, kind):
        limits(download_seconds=0.5)
        start = time.monotonic()
        with pytest.raises(OSError, match=r"the answer took longer than the limit download_seconds=0\.5"):
            fetch(f"{server.address}/{kind}")
        assert time.monotonic() - start < 20

    @pytest.mark.parametrize("kind", ["endless", "long"])
    def test_the_size_is_bounded(self, server, limits, kind):
        limits(download_bytes=10**6)
        with pytest.raises(OSError, match="it is larger than the limit download_bytes=1,000,000"):
            fetch(f"{server.address}/{kind}")

    @pytest.mark.parametrize(
        "url",
        ["http://", "http://user:word@127.0.0.1/", "ftp://a/b", "http://a b/", "http://[bad", "http://a/\r\nX: y"],
    )
    def test_what_is_no_address(self, url):
        with pytest.raises(OSError):  # noqa: PT011
            fetch(url)

    def test_no_threads_or_sockets_are_left(self, server):
        before = threading.active_count()
        for _ in range(3):
            fetch(f"{server.address}/ok", hosts=["127.0.0.1"])
        time.sleep(0.2)
        assert threading.active_count() <= before + 1  # that of the server may still be closing

    def test_looking_up_a_host_counts(self, server, limits, monkeypatch):
        """The system itself may ask name servers for a minute."""
        over = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: over.wait(20) and [])
        limits(download_seconds=0.5)
        start = time.monotonic()
        with pytest.raises(OSError, match="the answer took longer than the limit download_seconds=0.5"):
            fetch(f"{server.address}/ok")
        assert time.monotonic() - start < 5
        over.set()

    def test_public_addresses(self):
        public = ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"]
        private = ["127.0.0.1", "::1", "::", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "fe80::1%eth0", "2002:a00:1::"]
        assert [is_public(ip) for ip in public + private] == [True] * len(public) + [False] * len(private)
