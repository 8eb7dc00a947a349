"""A stand-in for the hub: what its client asks over HTTP to make a repository, upload a folder and read it again, in a thread.

It keeps what arrives in memory, and refuses cards whose front matter the hub would refuse.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

LARGE = (".safetensors", ".bin", ".png")  # what the hub keeps apart
ADDRESS = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass
class Hub:
    """Repositories by name, each file by its path; large ones by their digest until a commit names them; all that was asked."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, list[str]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def revision(self, name: str) -> str:
        """The commit that a repository is at."""
        return hashlib.sha1(json.dumps([name, *self.commits[name]]).encode()).hexdigest()


def refused(content: str) -> list[str]:
    """What the hub finds wrong with a card."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.S)
    if found is None:
        return ["there is no front matter"]
    head = yaml.safe_load(found[1])
    wrong = [] if isinstance(head, dict) else ["it is no mapping"]
    for key in () if wrong else ("base_model", "datasets"):
        values = head.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            wrong += [] if isinstance(value, str) and ADDRESS.fullmatch(value) else [f"{key}: {value!r} is no address"]
    for key in () if wrong else ("license", "pipeline_tag", "library_name"):
        wrong += [] if re.fullmatch(r"[a-z0-9.-]+", head.get(key) or "none") else [f"{key}: {head[key]!r}"]
    return wrong


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _say(self, body: Any = b"", status: int = 200, **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            hub.asked.append(f"{self.command} {urlsplit(self.path).path}")
            hub.tokens.add(self.headers.get("Authorization", ""))
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def do_PUT(self) -> None:
            data = self._body()
            hub.large[hashlib.sha256(data).hexdigest()] = data
            self._say()

        def do_POST(self) -> None:
            data, path = self._body(), urlsplit(self.path).path
            if path == "/api/repos/create":
                said = json.loads(data)
                name = f"{said.get('organization') or 'me'}/{said['name']}"
                hub.repositories.setdefault(name, {})
                hub.commits.setdefault(name, ["made"])
                self._say({"url": f"{hub.url}/{name}", "name": name})
            elif path == "/api/validate-yaml":
                wrong = refused(json.loads(data)["content"])
                self._say({"errors": [{"message": w} for w in wrong], "warnings": []}, 400 if wrong else 200)
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                modes = [
                    {
                        "path": f["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    }
                    for f in json.loads(data)["files"]
                ]
                self._say({"files": modes})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}}
                    for o in json.loads(data)["objects"]
                ]
                self._say({"transfer": "basic", "objects": objects})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                self._commit(found[1], data)
            else:
                self._say({"error": path}, 404)

        def _commit(self, name: str, data: bytes) -> None:
            files = hub.repositories[name]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits[name].append(value["summary"])
                elif line["key"] == "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                    assert len(files[value["path"]]) == value["size"]
            oid = hub.revision(name)
            self._say({"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

        def do_GET(self) -> None:
            self._body()
            path = unquote(urlsplit(self.path).path)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
                files = hub.repositories.get(found[1])
                if files is None:
                    self._say({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
                    return
                named = [{"rfilename": name} for name in sorted(files)]
                self._say({"id": found[1], "modelId": found[1], "sha": hub.revision(found[1]), "siblings": named})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?", path):
                files = hub.repositories[found[1]]
                listed = [{"type": "file", "path": n, "size": len(d), "oid": _digest(d)} for n, d in files.items()]
                self._say(listed)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                data = hub.repositories.get(found[1], {}).get(found[2])
                head = {"X_Repo_Commit": hub.revision(found[1])} if found[1] in hub.repositories else {}
                if data is None:
                    self._say({"error": "no entry"}, 404, X_Error_Code="EntryNotFound", **head)
                else:
                    self._say(data, ETag=f'"{_digest(data)}"', **head)
            else:
                self._say({"error": path}, 404)

        do_HEAD = do_GET

    return Handler


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def standing_in() -> Iterator[Hub]:
    """The stand-in, while inside."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def talk_to(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Lets the client of this process, which has read its environment by now, talk to the stand-in."""
    import transformers.utils.hub
    from huggingface_hub import constants

    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        patch.setattr(constants, name, value)
    patch.setenv("HF_HUB_OFFLINE", "0")
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(transformers.utils.hub, "_hf_api", None)
