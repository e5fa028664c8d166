"""Connections of silent, slow and never-reading clients are closed, and others do not notice."""

import asyncio
import json
import time
from contextlib import ExitStack

import httpx2
import pytest
from starlette.responses import StreamingResponse
from t2i.pipelines.serving.gateway.limits import Limits

from tests.serving.servers import SHORT, RawClient, build_paint_api, run_server

POST = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HEAD = POST + "Content-Length: 100\r\n\r\n"


@pytest.fixture(scope="module")
def port():
    with run_server(build_paint_api(limits=SHORT)) as server:
        yield server.port


def draw(port: int) -> httpx2.Response:
    return httpx2.post(f"http://127.0.0.1:{port}/v1/images/generations", json={"prompt": "a cat"})


def test_silent_and_slow_clients_are_closed_while_others_are_answered(port):
    with ExitStack() as stack:
        silent, part_of_head, part_of_body, trickle = (
            [stack.enter_context(RawClient(port)) for _ in range(10)] for _ in range(4)
        )
        for client in part_of_head:
            client.send("POST /v1/images/generations HTTP/1.1\r\nHost: 127")
        for client in part_of_body:
            client.send(HEAD + '{"prompt"')
        start = time.monotonic()
        assert draw(port).status_code == 200
        assert time.monotonic() - start < 5
        # A byte now and then is no reason to wait
        for _ in range(10):
            time.sleep(0.08)
            for client in trickle:
                try:
                    client.send("P")
                except OSError:
                    break
        assert [client.read_to_end() for client in (*silent, *part_of_head)] == [b""] * 20
        errors = [client.read_error() for client in part_of_body]
        assert {(status, error["code"]) for status, error in errors} == {(400, "too_slow")}
        for client in trickle:
            client.read_to_end()
        assert time.monotonic() - start < 9


def test_a_connection_without_a_further_request_is_closed(port):
    with RawClient(port) as client:
        client.send("GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert client.read_to_end().startswith(b"HTTP/1.1 200") and time.monotonic() - client.began < 9


def test_a_second_request_has_its_own_time_for_its_head(port):
    with RawClient(port) as client:
        for _ in range(3):
            time.sleep(0.3)
            client.send("GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert client.read_until(b"}").startswith(b"HTTP/1.1 200")
        client.send("GET /he")
        start = time.monotonic()
        assert client.read_to_end() == b"" and 0.4 < time.monotonic() - start < 9


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 60_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_in_the_apis_shape(port, data):
    with RawClient(port) as client:
        client.send(data)
        head, _, body = client.read_to_end().partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert head.startswith(b"HTTP/1.1 400") and b"\r\nx-request-id: req_" in head
    assert error["code"] == "invalid_request" and error["type"] == "invalid_request_error"


def test_a_body_of_broken_chunks_is_refused(port):
    with RawClient(port) as client:
        client.send(POST + "Transfer-Encoding: chunked\r\n\r\n")
        time.sleep(0.05)
        client.send("no number\r\n")
        assert client.read_error()[0] == 400
    assert draw(port).status_code == 200


def test_a_client_that_holds_all_connections_keeps_nobody_out():
    limits = Limits(connections=8)
    with run_server(build_paint_api(limits=limits), limits) as server, ExitStack() as stack:
        silent = [stack.enter_context(RawClient(server.port)) for _ in range(20)]
        assert draw(server.port).status_code == 200
        # The oldest made room
        assert silent[0].read_to_end() == b""
        # With a request in each there is none
        with ExitStack() as busy:
            clients = [busy.enter_context(RawClient(server.port)) for _ in range(8)]
            for client in clients:
                client.send(HEAD)
            time.sleep(0.2)
            with RawClient(server.port) as late:
                assert late.read_error()[1]["code"] == "overloaded"


class EndlessApi:
    """Routes that send bytes for as long as they are taken."""

    sent = 0

    def close(self):
        pass

    def build_app(self):
        async def generate():
            while True:
                yield bytes(65536)
                self.sent += 65536
                await asyncio.sleep(0)

        async def app(scope, receive, send):
            if scope["type"] == "http":
                await StreamingResponse(generate())(scope, receive, send)

        return app


def test_a_client_that_never_reads_is_closed_and_what_it_was_sent_is_bounded():
    api = EndlessApi()
    with run_server(api) as server, RawClient(server.port) as client:
        client.socket.setsockopt(1, 8, 4096)  # SO_RCVBUF
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.2)
        sent = api.sent
        deadline = time.monotonic() + 5
        while server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not server.server_state.connections
        # What the system's own buffers hold, and no more
        assert api.sent - sent < 2**20 and api.sent < 16 * 2**20


# Bodies


def test_a_body_that_falls_silent_is_ended_however_much_came_before(port):
    with RawClient(port) as client:
        # By the pace of slow lines these bytes would be allowed half a minute
        client.send(POST + f"Content-Length: {2**20}\r\n\r\n" + "a" * 2**19)
        status, error = client.read_error()
        assert status == 400 and error["code"] == "too_slow" and time.monotonic() - client.began < 5


def test_a_request_that_alone_takes_too_much_is_not_sent_again():
    limits = Limits(held_bytes=2**16)
    with run_server(build_paint_api(limits=limits), limits) as server:
        answer = httpx2.post(f"http://127.0.0.1:{server.port}/v1/images/generations", json={"prompt": "a" * 2**16})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "payload_too_large"


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(port):
    with RawClient(port) as client:
        client.send(POST + f"Content-Length: {2**30}\r\nExpect: 100-continue\r\n\r\n")
        status, error = client.read_error()
    assert status == 413 and error["code"] == "payload_too_large"


@pytest.mark.parametrize("kind", ["json", "file", "field"])
def test_a_body_without_a_length_is_read_to_its_limit_and_not_beyond(kind):
    limits = Limits(json_bytes=2**17, file_bytes=2**17, field_bytes=2**17, body_bytes=2**18)
    with run_server(build_paint_api(limits=limits), limits) as server, RawClient(server.port) as client:
        route, content_type, start = "generations", "application/json", b'{"prompt": "'
        if kind != "json":
            route, content_type = "edits", "multipart/form-data; boundary=x"
            file = b'; filename="a.png"' if kind == "file" else b""
            start = b'--x\r\nContent-Disposition: form-data; name="image"' + file + b"\r\n\r\n"
        head = f"POST /v1/images/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
        client.send(head + f"Transfer-Encoding: chunked\r\n\r\n{len(start):x}\r\n".encode().decode())
        client.send(start + b"\r\n")
        sent, answer = 0, b""
        client.socket.settimeout(0.02)
        while sent < 2**22 and not answer:
            try:
                client.send(b"4000\r\n" + b"a" * 2**14 + b"\r\n")
                sent += 2**14
                answer = client.read_until(b"}}")
            except TimeoutError:
                pass
    assert sent <= 2**17 + 2**16
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert b" 413 " in head and b"connection: close" in head and error["code"] == "payload_too_large"
    assert error["param"] == (None if kind == "json" else "image")


def test_bodies_of_all_clients_together_are_bounded():
    limits = Limits(held_bytes=2**17)
    with run_server(build_paint_api(limits=limits), limits) as server, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(3)]
        for client in clients:
            client.send(POST + f"Content-Length: {2**16}\r\n\r\n" + "a" * (2**16 - 10))
            time.sleep(0.05)
        status, error = clients[2].read_error()
        assert status == 503 and error["code"] == "overloaded"
        for client in clients[:2]:
            client.send("a" * 10)
            assert b"invalid_json" in client.read_until(b"}}")
        # And are free again
        assert draw(server.port).status_code == 200
