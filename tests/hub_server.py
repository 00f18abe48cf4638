"""
A small Hub: the part of the Hub's HTTP interface that `huggingface_hub` uses to push and to pull, with repos on disk.

Files are kept by their SHA-256, commits as JSON; a commit is visible from the moment at which a ref points to it, which
is the last thing to be written.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".onnx", ".png", ".jpg")
API = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?$")
RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
LFS_BATCH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch$")


class HubError(Exception):
    """What the Hub answers when it does not do what was asked."""

    def __init__(self, status: int, message: str, code: Optional[str] = None, **content: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.content = status, message, code, content


class Hub:
    """
    Args:
        root: The folder of repos and files; a new `Hub` over the same folder goes on where another one stopped.
        users: Access token -> name of the user.
    """

    def __init__(self, root: Path, users: dict[str, str]):
        self.root, self.users = Path(root), users
        self.requests: list[tuple[str, str]] = []  # method and path, in order of arrival
        self.unknown: list[tuple[str, str]] = []  # those that this Hub does not know
        self.dies_at: Optional[str] = None  # part of a path: half of such a request is read, and the server is gone
        self.lock = threading.RLock()
        self.server: Optional[ThreadingHTTPServer] = None
        self.port = 0
        for name in ("files", "repos"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Hub":
        """Listens, on the same port as before if it was started before."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def counted(self, mark: str) -> dict[str, int]:
        """How many requests of each method came after `/mark/<mark>` was asked for, until the next mark."""
        counts: dict[str, int] = {}
        after = False
        for method, path in self.requests:
            if path.startswith("/mark/"):
                after = path == f"/mark/{mark}"
            elif after:
                counts[method] = counts.get(method, 0) + 1
        return counts

    # Repos

    def _repo_file(self, kind: str, repo: str) -> Path:
        return self.root / "repos" / kind / f"{repo.replace('/', '--')}.json"

    def repo(self, kind: str, repo: str) -> dict[str, Any]:
        try:
            return json.loads(self._repo_file(kind, repo).read_text())
        except FileNotFoundError:
            raise HubError(404, "Repository not found", "RepoNotFound") from None

    def write_repo(self, kind: str, repo: str, state: dict[str, Any]) -> None:
        self._write(self._repo_file(kind, repo), json.dumps(state).encode())

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, dict[str, Any]]:
        """Path -> `{sha256, oid, size, lfs}`."""
        state = self.repo(kind, repo)
        return state["commits"][self.commit_of(state, revision)]["files"]

    def commit_of(self, state: dict[str, Any], revision: str) -> str:
        if revision in state["refs"]:
            return state["refs"][revision]
        found = [
            oid for oid in state["commits"] if oid == revision or (len(revision) >= 7 and oid.startswith(revision))
        ]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def content(self, sha256: str) -> Path:
        return self.root / "files" / sha256

    def store(self, content: bytes, sha256: Optional[str] = None) -> str:
        found = hashlib.sha256(content).hexdigest()
        if sha256 not in (None, found):
            raise HubError(400, f"The content is not that of {sha256}")
        self._write(self.content(found), content)
        return found

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{threading.get_ident()}")
        aside.write_bytes(content)
        os.replace(aside, path)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path) if "%2F" not in url.path else url.path
        hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        if hub.dies_at is not None and hub.dies_at in path:
            self.rfile.read(length // 2)
            hub.dies_at, self.close_connection = None, True
            self.connection.close()
            hub.stop()
            return
        body = self.rfile.read(length)
        try:
            if path.startswith("/mark/"):
                return self._send(200, {})
            self.user = self._user()
            for pattern, answer in ((API, self._api), (RESOLVE, self._resolve), (LFS_BATCH, self._lfs_batch)):
                if found := pattern.fullmatch(url.path):
                    return answer(parse_qs(url.query), body, *found.groups())
            if path.startswith("/lfs/"):
                return self._lfs(path.rpartition("/")[2], body)
            known = {"whoami-v2": self._whoami, "repos/create": self._create, "validate-yaml": self._validate_yaml}
            name = path.removeprefix("/api/")
            if name not in known:
                hub.unknown.append((self.command, self.path))
                raise HubError(404, f"This Hub has no {path}")
            self._send(200, known[name](body))
        except HubError as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self._send(error.status, {"error": error.message, **error.content}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _send(self, status: int, content: Any, headers: Optional[dict[str, str]] = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

    # Who asks, and for what

    def _user(self) -> Optional[str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _must_write(self, repo: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if repo.partition("/")[0] != self.user:
            raise HubError(403, f"You don't have the rights to write to {repo}")

    def _readable(self, kind: str, repo: str) -> dict[str, Any]:
        try:
            state = self.hub.repo(kind, repo)
        except HubError:
            if self.user is None:  # as the Hub does: who has not logged in is not told whether it exists
                raise HubError(401, "Invalid username or password.", "RepoNotFound") from None
            raise
        if state["private"] and repo.partition("/")[0] != self.user:
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return state

    def _whoami(self, body: bytes) -> dict[str, Any]:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "id": "1", "name": self.user, "fullname": self.user, "orgs": [], "auth": token}

    def _validate_yaml(self, body: bytes) -> dict[str, Any]:
        found = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(body)["content"], re.DOTALL)
        if found is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            metadata = yaml.safe_load(found[1])
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}], warnings=[]) from None
        for index in metadata.get("model-index") or []:
            if not isinstance(index.get("results"), list) or not index.get("name"):
                message = '"model-index[0]" needs a name and results'
                raise HubError(400, "Invalid metadata", errors=[{"message": message}], warnings=[])
        return {"errors": [], "warnings": []}

    def _create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        kind, repo = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or self.user}/{asked['name']}"
        self._must_write(repo)
        url = "/".join([self.hub.endpoint, *([kind] if kind != "models" else []), repo])
        with self.hub.lock:
            if self.hub._repo_file(kind, repo).exists():
                raise HubError(409, "You already created this repo", url=url)
            first = hashlib.sha1(f"{kind}/{repo}/{time.time_ns()}".encode()).hexdigest()
            commit = {"files": {}, "parent": None, "title": "initial commit"}
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.write_repo(
                kind, repo, {"private": bool(private), "refs": {"main": first}, "commits": {first: commit}}
            )
        return {"url": url, "name": repo, "id": repo}

    # Reading

    def _api(self, query, body, kind, repo, what=None, revision=None, path=None) -> None:
        hub, revision = self.hub, unquote(revision or "main")
        state = self._readable(kind, repo)
        asked = (self.command, what)
        if asked in (("GET", None), ("GET", "revision")):
            oid = hub.commit_of(state, revision)
            siblings = [{"rfilename": name} for name in state["commits"][oid]["files"]]
            info = {"id": repo, "sha": oid, "private": state["private"], "gated": False, "tags": []}
            return self._send(200, {**info, "siblings": siblings})
        if asked == ("GET", "refs"):
            refs = [
                {"name": name.rpartition("/")[2], "ref": name, "targetCommit": oid}
                for name, oid in state["refs"].items()
            ]
            pulls = [ref for ref in refs if ref["ref"].startswith("refs/pr/")]
            branches = [{**ref, "ref": f"refs/heads/{ref['name']}"} for ref in refs if ref not in pulls]
            return self._send(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})
        if asked == ("GET", "tree"):
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            files = state["commits"][hub.commit_of(state, revision)]["files"]
            entries = self._tree(files, unquote(path or ""), recursive)
            if path and not entries:
                raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
            return self._send(200, entries)
        if asked == ("POST", "paths-info"):
            files = state["commits"][hub.commit_of(state, revision)]["files"]
            paths = parse_qs(body.decode()).get("paths", [])
            entries = [entry for entry in self._tree(files, "", True) if entry["path"] in paths]
            return self._send(200, entries)
        self._must_write(repo)
        if asked == ("POST", "preupload"):
            return self._send(200, self._preupload(state, revision, json.loads(body)))
        if asked == ("POST", "branch"):
            with hub.lock:
                if revision in state["refs"]:
                    raise HubError(409, f"Reference already exists: {revision}")
                start = (json.loads(body) if body else {}).get("startingPoint") or "main"
                state["refs"][revision] = hub.commit_of(state, start)
                hub.write_repo(kind, repo, state)
            return self._send(200, {})
        if asked == ("POST", "commit"):
            return self._send(200, self._commit(kind, repo, revision, body, "create_pr" in query))
        hub.unknown.append((self.command, self.path))
        raise HubError(404, f"This Hub has no {self.path}")

    @staticmethod
    def _tree(files: dict[str, Any], folder: str, recursive: bool) -> list[dict[str, Any]]:
        start = f"{folder}/" if folder else ""
        entries, folders = [], set()
        for name, file in files.items():
            if not name.startswith(start):
                continue
            parts = name[len(start) :].split("/")
            folders |= {
                start + "/".join(parts[: i + 1]) for i in range(len(parts) - 1 if recursive else len(parts) > 1)
            }
            if recursive or len(parts) == 1:
                entry = {"type": "file", "path": name, "size": file["size"], "oid": file["oid"]}
                if file["lfs"]:
                    entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
                entries.append(entry)
        return entries + [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]

    def _resolve(self, query, body, kind, repo, revision, path) -> None:
        state = self._readable(kind or "models", repo)
        oid = self.hub.commit_of(state, unquote(revision))
        headers = {"X-Repo-Commit": oid}
        file = state["commits"][oid]["files"].get(unquote(path))
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, {"error": "Entry not found"}, headers)
        content, status = self.hub.content(file["sha256"]).read_bytes(), 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        headers |= {"ETag": f'"{file["sha256"] if file["lfs"] else file["oid"]}"', "Accept-Ranges": "bytes"}
        self._send(status, content, {**headers, "Content-Type": "application/octet-stream"})

    # Writing

    def _preupload(self, state, revision, asked) -> dict[str, Any]:
        files = state["commits"][self.hub.commit_of(state, revision)]["files"]
        answer = []
        for file in asked["files"]:
            old = files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            oid = None if old is None else old["sha256"] if old["lfs"] else old["oid"]
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def _lfs_batch(self, query, body, kind, repo) -> None:
        self._readable(kind or "models", repo)
        self._must_write(repo)
        objects = []
        for item in json.loads(body)["objects"]:
            if not self.hub.content(item["oid"]).exists():
                base = f"{self.hub.endpoint}/lfs"
                actions = {"upload": {"href": f"{base}/upload/{item['oid']}"}, "verify": {"href": f"{base}/verify/x"}}
                item = {**item, "actions": actions}
            objects.append(item)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _lfs(self, name: str, body: bytes) -> None:
        if self.command == "PUT":  # without credentials, as storage is: the address is the permission
            self.hub.store(body, name)
        else:
            asked = json.loads(body)
            file = self.hub.content(asked["oid"])
            if not file.exists() or file.stat().st_size != asked["size"]:
                raise HubError(404, f"{asked['oid']} has not been uploaded")
        self._send(200, {})

    def _commit(self, kind, repo, revision, body, create_pr) -> dict[str, Any]:
        hub = self.hub
        header, *operations = [json.loads(line) for line in body.splitlines()]
        with hub.lock:
            state = hub.repo(kind, repo)
            parent = hub.commit_of(state, revision)
            if header["value"].get("parentCommit") not in (None, parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(state["commits"][parent]["files"])
            for operation in operations:
                key, value = operation["key"], operation["value"]
                if key == "deletedFolder":
                    files = {
                        name: f for name, f in files.items() if not name.startswith(value["path"].rstrip("/") + "/")
                    }
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key == "file":
                    content = base64.b64decode(value["content"])
                    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                    files[value["path"]] = {
                        "sha256": hub.store(content), "oid": oid, "size": len(content), "lfs": False
                    }  # fmt: skip
                elif key == "lfsFile":
                    file = hub.content(value["oid"])
                    if not file.exists():
                        raise HubError(400, f"{value['path']} has not been uploaded")
                    oid = hashlib.sha1(value["oid"].encode()).hexdigest()
                    files[value["path"]] = {
                        "sha256": value["oid"], "oid": oid, "size": file.stat().st_size, "lfs": True
                    }  # fmt: skip
            title = header["value"]["summary"]
            oid = hashlib.sha1(f"{parent}{json.dumps(files)}{title}{time.time_ns()}".encode()).hexdigest()
            state["commits"][oid] = {"files": files, "parent": parent, "title": title}
            pulls = sum(name.startswith("refs/pr/") for name in state["refs"])
            state["refs"][f"refs/pr/{pulls + 1}" if create_pr else revision] = oid
            hub.write_repo(kind, repo, state)
        url = f"{hub.endpoint}/{repo}"
        pull_request = f"{url}/discussions/{pulls + 1}" if create_pr else None
        return {"success": True, "commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pull_request}
