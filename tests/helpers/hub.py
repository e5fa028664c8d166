"""A hub of Hugging Face on this machine: the few routes that an upload needs, over HTTP."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = 1_000  # bytes, from which on a file goes to the store of large files


class Hub(ThreadingHTTPServer):
    """Repositories by name: "private", and "files" by path. tokens: of the requests. refuse: a status for all."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}  # large files, by their SHA-256
        self.tokens: set[str | None] = set()
        self.refuse: int | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        if not path.startswith("/store/"):
            self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuse:
            return self.answer({"error": "no"}, self.server.refuse)
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
                self.server.repositories[name] = {"private": private, "files": {}}
                return self.answer({"url": f"{self.server.address}/{name}"})
            case ["api", "validate-yaml"]:
                return self.answer({"errors": [], "warnings": []})
            case ["store", oid]:
                self.server.stored[oid] = body
                return self.answer({})
            case [_, _, "info", "lfs", "objects", "batch"]:
                return self.answer(self.list_stores(json.loads(body)))
        name = "/".join(parts[2:4])
        if name not in self.server.repositories:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        match parts[4:]:
            case []:
                private = self.server.repositories[name]["private"]
                return self.answer({"id": name, "private": private, "siblings": [], "tags": [], "downloads": 0})
            case ["preupload", _]:
                files = json.loads(body)["files"]
                modes = ["lfs" if file["size"] >= LARGE else "regular" for file in files]
                rows = [{"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                        for file, mode in zip(files, modes)]  # fmt: skip
                return self.answer({"files": rows})
            case ["commit", _]:
                self.commit(name, [json.loads(line) for line in body.splitlines()])
                url = f"{self.server.address}/{name}/commit/1"
                return self.answer({"success": True, "commitOid": "1", "commitUrl": url, "hookOutput": ""})
        return self.answer({"error": f"no route {path}"}, 500)

    def list_stores(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for one in asked["objects"]:
            upload = {"href": f"{self.server.address}/store/{one['oid']}"}
            objects.append({"oid": one["oid"], "size": one["size"], "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
