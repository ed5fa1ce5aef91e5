"""A stand-in of the hub's HTTP API, as much as a push needs: repositories with branches of files, and an LFS store."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER, TOKEN = "someone", "hf_stand_in"
LARGE = (".safetensors",)


@dataclass
class Repository:
    """Branches by name, each with its files by name; and what was committed."""

    name: str
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """Listens on a free port until it is left."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        body, path = self.body(), unquote(urlsplit(self.path).path)
        if path.startswith("/store/"):
            self.server.large[path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [self.place(each) for each in json.loads(body)["objects"]]})
        _, _, _, owner, name, *what = path.split("/")
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.answer({"error": "Repository not found"}, 404)
        if not what:
            return self.answer({"id": f"{owner}/{name}", "private": repository.private, "tags": []})
        return getattr(self, what[0])(repository, "/".join(what[1:]), body)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - names of the library

    def create(self, asked):
        owner = asked.get("organization") or OWNER
        if owner != OWNER:
            return self.answer({"error": f"You don't have the rights to create a model under the namespace {owner}"}, 403)
        name = f"{owner}/{asked['name']}"
        there = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository(name, asked.get("visibility") == "private"))
        url = {"url": f"{self.server.url}/{name}", "name": name, "id": "0"}
        return self.answer({**url, "error": "You already created this model repo"}, 409) if there else self.answer(url)

    def place(self, asked):
        upload = {"href": f"{self.server.url}/store/{asked['oid']}"}
        return {**asked, **({} if asked["oid"] in self.server.large else {"actions": {"upload": upload}})}

    def branch(self, repository, name, body):
        if name in repository.branches:
            return self.answer({"error": "Reference already exists"}, 409)
        repository.branches[name] = dict(repository.branches["main"])
        return self.answer({})

    def tree(self, repository, branch, body):
        files = repository.branches[branch]
        return self.answer([{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files])

    def preupload(self, repository, branch, body):
        asked = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in asked}
        return self.answer({"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in asked]})

    def commit(self, repository, branch, body):
        files = repository.branches[branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        return self.answer({"commitUrl": f"{self.server.url}/{repository.name}/commit/1", "commitOid": "1" * 40})
