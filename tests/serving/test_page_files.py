"""The files of the page: a fixed list with types and a policy, and nothing beside it."""

import asyncio
import re
from typing import Any

import pytest
from starlette.applications import Starlette
from t2i.pipelines.serving.admission import Draining
from t2i.pipelines.serving.api.responses import explain_failure
from t2i.pipelines.serving.drawing import EngineLost
from t2i.pipelines.serving.engine import Cancelled
from t2i.pipelines.serving.page_files import FOLDER, build_page_routes

APP = Starlette(routes=build_page_routes())


def ask(path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return the status, the headers and the body of a path, as the application answers without a server."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    asyncio.run(APP(scope | {"headers": given, "root_path": ""}, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent)


def test_every_file_is_sent_with_its_type_and_a_policy_without_foreign_sources():
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == set(types)
    for path in files:
        status, headers, body = ask(f"/page/{path.relative_to(FOLDER).as_posix()}")
        assert (status, body) == (200, path.read_bytes())
        assert headers["content-type"].partition(";")[0] == types[path.suffix]
        assert "'unsafe" not in headers["content-security-policy"] and "http" not in headers["content-security-policy"]
        # The policy refuses what such markup would do
        assert path.suffix != ".html" or not any(mark in body for mark in (b" style=", b" onclick=", b"<script>"))
    assert ask("/")[2] == (FOLDER / "index.html").read_bytes()


def test_a_browser_that_has_a_file_is_told_to_keep_it():
    tag = ask("/page/main.js")[1]["etag"]
    assert ask("/page/main.js", if_none_match=tag)[::2] == (304, b"")
    assert ask("/page/main.js", if_none_match='"other"')[0] == 200


@pytest.mark.parametrize(
    "path", ["/page/", "/page/..", "/page/../app.py", "/page//etc/passwd", "/page/tools", "/page/MAIN.JS"]
)
def test_nothing_beside_the_list_is_sent(path):
    assert ask(path)[0] == 404


def test_the_page_sends_a_request_again_after_the_errors_that_the_server_says_may_pass():
    passing = {
        error.code
        for error in map(explain_failure, (Draining("it ends"), Cancelled("it was ended"), EngineLost("it is gone")))
        if error.headers["x-should-retry"] == "true"
    }
    listed = re.search(r"PASSING_CODES = \[(.*)\]", (FOLDER / "retries.js").read_text())
    assert listed is not None and set(re.findall(r"\w+", listed[1])) == passing
