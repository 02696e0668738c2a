"""A stand-in for the Hugging Face Hub over HTTP: the routes by which huggingface_hub makes and fills a repository.

It keeps files by commit, checks tokens, refuses a card without front matter, and takes large files by LFS as the hub
does for clients without Xet. Written from huggingface_hub's own requests; the hub itself was not asked.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"
LARGE = 10_000
"""Bytes from which on a file goes by LFS."""


@dataclass
class Repository:
    """One repository: its commits' files, the branch ``main`` and its tags."""

    visibility: str
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs"}])
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.commit(len(self.commits) - 1)

    @staticmethod
    def commit(number: int) -> str:
        return hashlib.sha1(str(number).encode(), usedforsecurity=False).hexdigest()

    def files(self, commit: str) -> dict[str, bytes]:
        return next(files for number, files in enumerate(self.commits) if self.commit(number) == commit)


class HubStandIn:
    """The server; ``repositories`` by name."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None
        """Beginning of requests that are answered with 500."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        if self.broken and f"{method} {path}".startswith(self.broken):
            return 500, {"error": "broken"}
        for pattern, route in self._routes.items():
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return route(body, *match.groups())
        return 404, {"error": f"the stand-in has no {method} {path}"}

    @property
    def _routes(self) -> dict[str, Callable[..., tuple[int, Any]]]:
        name = r"([\w.-]+/[\w.-]+)"
        return {
            r"POST /api/validate-yaml": self._validate,
            r"POST /api/repos/create": self._create,
            rf"GET /api/models/{name}": lambda _, repo: self._info(repo),
            rf"GET /api/models/{name}/revision/main": lambda _, repo: self._info(repo),
            rf"GET /api/models/{name}/refs": lambda _, repo: self._refs(repo),
            rf"GET /api/models/{name}/tree/main": lambda _, repo: self._tree(repo),
            rf"POST /api/models/{name}/preupload/main": self._preupload,
            rf"POST /{name}.git/info/lfs/objects/batch": self._batch,
            r"PUT /large/([0-9a-f]{64})": self._put,
            rf"POST /api/models/{name}/commit/main": self._commit,
            rf"POST /api/models/{name}/tag/([0-9a-f]{{40}})": self._tag,
        }

    def _validate(self, body: bytes) -> tuple[int, Any]:
        if not json.loads(body)["content"].startswith("---\n"):
            return 400, {"errors": [{"message": "no front matter"}]}
        return 200, {"warnings": []}

    def _create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.repositories[name] = Repository(asked["visibility"])
        return 200, {"url": f"{self.url}/{name}", "id": name}

    def _info(self, repo: str) -> tuple[int, Any]:
        if repo not in self.repositories:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "sha": self.repositories[repo].head, "siblings": []}

    def _refs(self, repo: str) -> tuple[int, Any]:
        found = self.repositories[repo]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in found.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": found.head}
        return 200, {"branches": [main], "converts": [], "tags": tags}

    def _tree(self, repo: str) -> tuple[int, Any]:
        files = self.repositories[repo].commits[-1]
        return 200, [{"type": "file", "path": path, "size": len(data), "oid": path} for path, data in files.items()]

    def _preupload(self, body: bytes, repo: str) -> tuple[int, Any]:
        there = self.repositories[repo].commits[-1]
        files = []
        for one in json.loads(body)["files"]:
            known = there.get(one["path"])
            mode = "lfs" if one["size"] >= LARGE else "regular"
            oid = None if known is None else (_sha256(known) if mode == "lfs" else _git_oid(known))
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def _batch(self, body: bytes, _repo: str) -> tuple[int, Any]:
        objects = json.loads(body)["objects"]
        actions = [
            {"oid": one["oid"], "size": one["size"]}
            | (
                {}
                if one["oid"] in self.large
                else {"actions": {"upload": {"href": f"{self.url}/large/{one['oid']}", "header": {}}}}
            )
            for one in objects
        ]
        return 200, {"transfer": "basic", "objects": actions}

    def _put(self, body: bytes, oid: str) -> tuple[int, Any]:
        assert _sha256(body) == oid
        self.large[oid] = body
        return 200, {}

    def _commit(self, body: bytes, repo: str) -> tuple[int, Any]:
        found = self.repositories[repo]
        files = dict(found.commits[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        found.commits.append(files)
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{found.head}", "commitOid": found.head}

    def _tag(self, body: bytes, repo: str, commit: str) -> tuple[int, Any]:
        self.repositories[repo].tags[json.loads(body)["tag"]] = commit
        return 200, {}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                path = self.path.partition("?")[0]
                is_known = self.headers.get("authorization") == f"Bearer {TOKEN}" or path.startswith("/large/")
                status, value = hub.answer(self.command, path, body) if is_known else (401, {"error": "no token"})
                data = json.dumps(value).encode()
                self.send_response(status)
                if status == 404:
                    self.send_header("x-error-code", "RepoNotFound")
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_PUT = _answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()
