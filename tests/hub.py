"""A model hub on loopback: it serves folders as repositories, refuses one as gated, and takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub has, and what it was asked for.

    Attributes:
        repositories: folders by name.
        gated: names that nobody may read.
        uploads: folder for what is uploaded.
        asked: method and path of every request.
        url: where it listens.
    """

    repositories: Mapping[str, Path]
    gated: tuple[str, ...] = ()
    uploads: Path | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def environment(self, cache: Path) -> dict[str, str]:
        """Return the environment of a process that uses this hub, with a cache of its own."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {**os.environ, **own, "HF_TOKEN": "hf_token"}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Let a hub listen inside a `with` statement."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        path = self._path()
        if path == "api/whoami-v2":
            self._reply(200, {"name": "somebody", "type": "user", "orgs": []})
        elif path.startswith("api/models/"):
            self._describe(path)
        else:
            self._serve(path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self._path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.uploads is None:
            self._reply(401, {"error": "Nobody may write here."})
        elif path == "api/repos/create":
            self._reply(200, {"url": f"{self.hub.url}/somebody/new", "id": "somebody/new", "name": "new"})
        elif path == "api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._reply(200, {"files": files})
        elif "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = self.hub.uploads / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            done = {"commitUrl": f"{self.hub.url}/somebody/new/commit/{_COMMIT}", "commitOid": _COMMIT, "success": True}
            self._reply(200, done)
        else:
            self._reply(404, {})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _folder(self, name: str) -> Path | None:
        """Return the folder of a repository, or answer why there is none."""
        if name in self.hub.gated:
            self._reply(403, {}, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
            return None
        if name not in self.hub.repositories:
            self._reply(404, {}, X_Error_Code="RepoNotFound")
            return None
        return self.hub.repositories[name]

    def _describe(self, path: str) -> None:
        name = "/".join(path.split("/")[2:4])
        folder = self._folder(name)
        if folder is None:
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        if "/tree" in path:
            sizes = [file.stat().st_size for file in files]
            listed = [
                {"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in zip(names, sizes, strict=True)
            ]
            self._reply(200, listed)
            return
        siblings = [{"rfilename": file} for file in names]
        about = {"id": name, "modelId": name, "sha": _COMMIT, "private": False, "gated": False, "tags": []}
        self._reply(200, {**about, "siblings": siblings})

    def _serve(self, path: str) -> None:
        parts = path.split("/")
        folder = self._folder("/".join(parts[:2]))
        if folder is None:
            return
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            self._reply(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=_COMMIT)
            return
        data = file.read_bytes()
        tag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        self._reply(200, data, X_Repo_Commit=_COMMIT, ETag=f'"{tag}"', Accept_Ranges="none")

    def _reply(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
