"""The gateway: keys, hosts, origins, ids, the log, metrics, and the end of a server."""

import json
import logging
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import anyio
import httpx2
import pytest
from PIL import Image
from t2i.pipelines.serving.api.responses import Answer
from t2i.pipelines.serving.gateway.access import Access, Keys, read_keys
from t2i.pipelines.serving.gateway.log import REQUEST_LOG, open_request_log

from t2i.errors import InputError
from tests.serving.servers import GatedDrawer, PaintDrawer, build_paint_api, encode_png, run_server

ANN, BOB = "a" * 20, "b" * 20


def draw(port: int, key: str = "", timeout: float = 60, **body) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"http://127.0.0.1:{port}/v1/images/generations"
    return httpx2.post(url, json={"prompt": "a cat", **body}, headers=headers, timeout=timeout)


@contextmanager
def catch_log():
    """Collect the lines of the log."""
    lines: list[dict] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(record.getMessage()))
    level = REQUEST_LOG.level
    REQUEST_LOG.addHandler(handler)
    REQUEST_LOG.setLevel(logging.INFO)
    yield lines
    REQUEST_LOG.removeHandler(handler)
    REQUEST_LOG.setLevel(level)


def wait_for(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Keys


def test_a_file_of_keys_has_names_or_none(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# of the team\nann: {ANN}\n\n{BOB}\n")
    path.chmod(0o600)
    keys = read_keys(path)
    assert [keys.find_name(key) for key in (ANN, BOB, "c" * 20, "", "\udcff")] == ["ann", "key-2", None, None, None]


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("ann: " + ANN, 0o644, "is open to others .mode 644.; `chmod 600`"),
        ("ann: " + ANN, 0o660, "is open to others"),
        ("ann: short", 0o600, "line 1: a key has 16 to 256 visible ASCII characters"),
        (f"a b: {ANN}", 0o600, "line 1: a name has 1 to 64 letters"),
        (f"ann: {ANN}\nann: {BOB}", 0o600, "line 2: the name is there twice"),
        (f"ann: {ANN}\nbob: {ANN}", 0o600, "line 2: the key is there twice"),
        ("# none\n", 0o600, "has no key; write one"),
        ("ann: \xff".encode("latin-1"), 0o600, "is not UTF-8 text"),
        (None, 0, "cannot be read: No such file"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, mode, message):
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
    with pytest.raises(InputError, match=message) as caught:
        read_keys(path)
    assert "\n" not in str(caught.value) and ANN not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": "0.0.0.0"}, "host '0.0.0.0' lets other machines in, which needs --keys FILE"),
        ({"host": "example.org"}, "needs --keys FILE"),
        ({"public_url": "images.example.org"}, "public-url must be an address"),
        ({"public_url": "https://a.org/?b"}, "public-url must be an address"),
        ({"cors": ("*",)}, "cors must be an address"),
        ({"cors": ("https://a.org/page",)}, "cors must be a scheme and a host"),
    ],
)
def test_rules_that_let_in_too_many_are_refused(given, message):
    rules = {"host": "127.0.0.1", "keys": None, "public_url": None, "cors": ()} | given
    with pytest.raises(InputError, match=message):
        Access.build(**rules)


def test_the_model_needs_a_key_and_links_and_health_do_not():
    access = Access(keys=Keys({"ann": ANN, "bob": BOB}))
    with catch_log() as lines, run_server(build_paint_api(access=access)) as server:
        refused = [draw(server.port, key) for key in ("", BOB + "x")]
        assert [answer.status_code for answer in refused] == [401, 401]
        assert {answer.json()["error"]["code"] for answer in refused} == {"invalid_api_key"}
        assert refused[0].headers["www-authenticate"] == "Bearer"
        link = draw(server.port, BOB, response_format="url").json()["data"][0]["url"]
        assert httpx2.get(link).headers["content-type"] == "image/png"
        assert httpx2.get(f"http://127.0.0.1:{server.port}/v1/models").status_code == 401
        for path in ("/health", "/ready", "/metrics", "/"):
            assert httpx2.get(f"http://127.0.0.1:{server.port}{path}").status_code == 200
    assert [line.get("key") for line in lines[:3]] == [None, None, "bob"]
    assert BOB not in json.dumps(lines)


@pytest.mark.parametrize("prefix", ["", "/t2i"])
def test_the_model_needs_a_key_behind_a_prefix_too(prefix):
    app = build_paint_api(access=Access(keys=Keys({"bob": BOB}))).build_app()

    async def ask(path: str, **headers: str) -> int:
        transport = httpx2.ASGITransport(app, root_path=prefix)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get(f"{prefix}{path}", headers=headers)).status_code

    with catch_log() as lines:
        assert anyio.run(ask, "/v1/models") == 401
        assert anyio.run(partial(ask, "/v1/models", authorization=f"Bearer {BOB}")) == 200
        assert anyio.run(ask, "/ready") == 200
    assert [line["route"] for line in lines] == ["/v1/models", "/v1/models", "/ready"]


def test_a_key_that_asks_for_much_does_not_keep_others_waiting():
    access = Access(keys=Keys({"ann": ANN, "bob": BOB}))
    drawer = GatedDrawer()
    api = build_paint_api(drawer, running=1, queued=32, access=access)
    with run_server(api) as server, ThreadPoolExecutor(16) as pool:
        flood = [pool.submit(draw, server.port, ANN, seed=number) for number in range(8)]
        wait_for(lambda: api.count_jobs() == 8)
        late = pool.submit(draw, server.port, BOB, seed=99)
        wait_for(lambda: api.count_jobs() == 9)
        drawer.opened.set()
        assert {future.result().status_code for future in (*flood, late)} == {200}
    # After the one that drew, and one of the key whose turn it was
    assert [request.seed for request in drawer.finished].index(99) <= 2


# Hosts and origins


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, None),
        ({"host": "localhost:1"}, None),
        ({"host": "evil.example"}, "unknown_host"),
        ({"host": "127.0.0.1.evil.example"}, "unknown_host"),
        ({"host": "images.example.org"}, None),
        ({"origin": "http://127.0.0.1:{port}"}, None),
        ({"origin": "https://images.example.org"}, None),
        ({"origin": "http://127.0.0.1:1"}, "foreign_origin"),
        ({"origin": "https://evil.example"}, "foreign_origin"),
        ({"origin": "null"}, "foreign_origin"),
        ({"origin": "https://friend.example"}, None),
    ],
)
def test_pages_of_other_sites_are_refused(guarded, headers, code):
    headers = {name: value.format(port=guarded) for name, value in headers.items()}
    answer = httpx2.get(f"http://127.0.0.1:{guarded}/v1/models", headers=headers)
    assert answer.status_code == (403 if code else 200)
    assert not code or answer.json()["error"]["code"] == code
    allowed = "https://friend.example" if headers.get("origin") == "https://friend.example" else None
    assert answer.headers.get("access-control-allow-origin") == allowed


@pytest.fixture(scope="module")
def guarded():
    """The port of a server behind a proxy, which lets pages of one other site in."""
    access = Access.build("127.0.0.1", None, "https://Images.example.org/t2i/", ("https://Friend.example",))
    with run_server(build_paint_api(access=access)) as server:
        yield server.port


def test_browsers_ask_before_and_probes_come_under_any_name(guarded):
    url = f"http://127.0.0.1:{guarded}/v1/images/generations"
    asks = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    answer = httpx2.options(url, headers=asks | {"access-control-request-headers": "authorization"})
    assert answer.status_code == 204 and answer.headers["access-control-allow-headers"] == "authorization"
    assert httpx2.options(url, headers=asks | {"origin": "https://evil.example"}).status_code == 403
    assert httpx2.get(f"http://127.0.0.1:{guarded}/ready", headers={"host": "10.0.0.7:8000"}).status_code == 200


def test_links_have_the_public_address(guarded):
    link = draw(guarded, response_format="url").json()["data"][0]["url"]
    assert link.lower().startswith("https://images.example.org/t2i/v1/images/")


# The log, ids and metrics


def test_a_request_has_an_id_and_a_line_without_its_prompt():
    with catch_log() as lines, run_server(build_paint_api()) as server:
        url = f"http://127.0.0.1:{server.port}/v1/models"
        assert httpx2.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        made = httpx2.get(url, headers={"x-request-id": "no id"}).headers["x-request-id"]
        assert made.startswith("req_")
        assert draw(server.port, prompt="a secret", n=2).status_code == 200
        assert draw(server.port, prompt="a secret", n="many").status_code == 400
    assert [line["id"] for line in lines[:2]] == ["mine-1", made]
    drawn, wrong = lines[2:]
    assert drawn["route"] == "/v1/images/generations" and drawn["status"] == 200 and drawn["images"] == 2
    assert set(drawn["ms"]) == {"receive", "read", "queue", "draw", "send"} and drawn["model"] == "tiny"
    assert wrong["status"] == 400 and wrong["error"] == "invalid_value"
    assert "secret" not in json.dumps(lines)


def test_prompts_are_logged_where_that_is_asked_for(tmp_path):
    path = tmp_path / "log"
    open_request_log(path)
    try:
        with run_server(build_paint_api(log_prompts=True)) as server:
            draw(server.port, prompt="a secret")
    finally:
        open_request_log(None)
        REQUEST_LOG.handlers.clear()
    assert json.loads(path.read_text())["prompt"] == "a secret"
    with pytest.raises(InputError, match="log-file .* cannot be written"):
        open_request_log(tmp_path / "none" / "log")


def test_metrics_count_what_happened():
    with run_server(build_paint_api()) as server:
        draw(server.port, n=3)
        draw(server.port, colour="red")
        for route in ("texts", "images/upsamplings"):
            httpx2.post(f"http://127.0.0.1:{server.port}/v1/{route}", json={})
        text = httpx2.get(f"http://127.0.0.1:{server.port}/metrics").text
    assert 't2i_requests_total{route="/v1/images/generations",status="200"} 1.0' in text
    assert 't2i_requests_total{route="/v1/images/generations",status="400"} 1.0' in text
    for route, status in (("texts", 400), ("images/upsamplings", 415)):
        assert f't2i_requests_total{{route="/v1/{route}",status="{status}"}} 1.0' in text
    assert "t2i_pictures_total 3.0" in text and 't2i_queue_pictures{model="tiny"} 0.0' in text
    assert 't2i_batch_rows_bucket{le="+Inf",model="tiny"} 0.0' in text
    assert "t2i_queue_seconds_count 1.0" in text and "t2i_wasted_rows_total" in text


class BrokenDrawer(PaintDrawer):
    """A drawer that fails where nobody expects it."""

    def check(self, request):
        raise ValueError("NaN")


def test_a_fault_of_the_server_is_not_sent_again():
    with run_server(build_paint_api(BrokenDrawer())) as server:
        answer = draw(server.port)
        assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


def test_a_fault_inside_a_stream_is_an_event_and_no_success(monkeypatch):
    def fail(answer, event):
        raise ValueError("NaN")

    monkeypatch.setattr(Answer, "build_events", fail)
    with catch_log() as lines, run_server(build_paint_api()) as server:
        events = draw(server.port, stream=True).text.splitlines()
        metrics = httpx2.get(f"http://127.0.0.1:{server.port}/metrics").text
    assert events[0] == "event: error" and '"code": "internal"' in events[1]
    assert lines[0]["error"] == "internal" and "t2i_pictures_total 0.0" in metrics


# The end


def test_a_server_that_is_told_to_stop_answers_those_it_has_and_refuses_others():
    drawer = GatedDrawer()
    with run_server(build_paint_api(drawer), drain=30) as server, ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(draw, server.port, seed=number) for number in range(16)]
        wait_for(lambda: server.api.count_jobs() == 16)
        server.handle_exit(signal.SIGTERM, None)
        refused = draw(server.port)
        assert refused.status_code == 503 and refused.headers["x-should-retry"] == "true"
        assert refused.json()["error"]["code"] == "shutting_down"
        assert httpx2.get(f"http://127.0.0.1:{server.port}/ready").status_code == 503
        assert httpx2.get(f"http://127.0.0.1:{server.port}/health").status_code == 200
        drawer.opened.set()
        assert [future.result().status_code for future in futures] == [200] * 16
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("signals", [1, 2])
def test_beyond_its_time_or_told_twice_it_stops_requests_with_an_error(signals):
    drawer = PaintDrawer(steps=1000, step_seconds=0.05)
    with run_server(build_paint_api(drawer, running=1), drain=0.2 if signals == 1 else 600) as server:
        events: list[str] = []

        def listen():
            url = f"http://127.0.0.1:{server.port}/v1/images/generations"
            with httpx2.stream("POST", url, json={"prompt": "a cat", "stream": True}, timeout=30) as answer:
                events.extend(answer.iter_lines())

        streamed = threading.Thread(target=listen)
        streamed.start()
        with ThreadPoolExecutor(1) as pool:
            while server.api.count_jobs() < 1:
                time.sleep(0.01)
            waiting = pool.submit(draw, server.port)
            while server.api.count_jobs() < 2:
                time.sleep(0.01)
            for _ in range(signals):
                server.handle_exit(signal.SIGTERM, None)
            assert waiting.result().status_code == 503
        streamed.join(20)
        assert "event: error" in events and "shutting_down" in events[events.index("event: error") + 1]
        server.thread.join(10)
        assert not server.thread.is_alive()


# Bodies of every form


async def call_app(app, path: str, content_type: str, body: bytes) -> tuple[int, dict]:
    """Return the status and the JSON of an answer, without a network."""
    parts = [body[start : start + 1000] for start in range(0, len(body), 1000)] or [b""]
    sent: list[dict] = []

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await anyio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", content_type.encode("latin-1"))]
    headers.append((b"content-length", str(len(body)).encode()))
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
    scope |= {
        "query_string": b"",
        "http_version": "1.1",
        "scheme": "http",
        "server": ("localhost", 80),
        "root_path": "",
    }
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def check_answers(cases: list[tuple[str, str, bytes]], wrong: bool = False) -> None:
    """Check that each body gets its images, or an error in the API's shape, and never one of the server."""
    api = build_paint_api()
    app = api.build_app()

    async def run():
        for path, content_type, body in cases:
            with anyio.fail_after(20):
                status, answer = await call_app(app, path, content_type, body)
            shown = (body[:300], answer)
            assert status in (200, 400, 404, 413, 415), shown
            assert not (wrong and status == 200), shown
            if status != 200:
                assert set(answer["error"]) == {"message", "type", "param", "code"}, shown
                assert answer["error"]["type"] == "invalid_request_error" and "\n" not in answer["error"]["message"]

    anyio.run(run)
    api.close()


GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def test_json_that_is_wrong_is_refused():
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bodies = [
        *(
            b"",
            b"null",
            b"[]",
            b'"a"',
            b"{",
            b'{"prompt": NaN}',
            b'{"prompt": 1e999}',
            b'{"prompt": "a", "seed": 1e999}',
        ),
        *(b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "a", "n": -1}'),
        *(deep, b'{"user": ' + b"[" * 40 + b"]" * 40 + b', "prompt": "a"}', b"\xff\xfe", b'{"prompt": "\xff"}'),
        *(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": {"a": 1}}', b'{"prompt": true}'),
    ]
    check_answers([(GENERATIONS, "application/json", body) for body in bodies], wrong=True)


def build_form() -> bytes:
    parts = [(b'name="prompt"', b"a cat"), (b'name="image"; filename="a.png"', encode_png(Image.new("RGB", (32, 32))))]
    lines = [b"--xyz\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts]
    return b"".join(lines) + b"--xyz--\r\n"


def test_forms_that_are_wrong_are_refused():
    form = build_form()
    named = b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--xyz--\r\n'
    files = b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="image[]"; filename="a"\r\n\r\na\r\n' for _ in range(18)
    )
    fields = b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="a%d"\r\n\r\na\r\n' % number for number in range(66)
    )
    kind = "multipart/form-data; boundary="
    cases = [(kind + "xyz", form[:length]) for length in range(0, len(form) - 10, 7)]
    cases += [(kind, form), ("multipart/form-data", form), (kind + "other", form), (kind + "x" * 300, form)]
    cases += [
        (kind + "xyz", body) for body in (named % (b"prompt", b"\xff"), named % (b"\xff", b"a"), named % (b"", b"a"))
    ]
    cases += [(kind + "xyz", named % (b"image", b"as text")), (kind + "xyz", files + b"--xyz--\r\n")]
    cases += [(kind + "xyz", fields + b"--xyz--\r\n"), (kind + "xyz", form.replace(b'name="prompt"', b"prompt"))]
    cases += [(kind + "xyz", form.replace(b"a cat", b"a" * 70_000)), (kind + "xyz", form.replace(b"\x89PNG", b"%!PS"))]
    check_answers([(EDITS, content_type, body) for content_type, body in cases], wrong=True)


def test_random_changes_of_bodies_are_answered():
    generator = random.Random(0)
    given = json.dumps({"prompt": "a cat", "n": 1, "size": "auto", "user": ["a", {"b": None}]}).encode()
    cases = []
    for number in range(60):
        path, kind = ((GENERATIONS, "application/json"), (EDITS, "multipart/form-data; boundary=xyz"))[number % 2]
        body = bytearray(given if path == GENERATIONS else build_form())
        for _ in range(generator.randint(1, 6)):
            start = generator.randrange(len(body))
            end = start + generator.randint(0, 4)
            body[start:end] = generator.randbytes(generator.randint(0, 4)) if generator.random() < 0.7 else body[:9]
        cases.append((path, kind, bytes(body)))
    check_answers(cases)
