"""The middleware around the routes: ids, access, limits of bodies, the log and the metrics of every request."""

import asyncio
import logging
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from t2i.pipelines.serving.admission import Draining
from t2i.pipelines.serving.api.errors import ApiError, build_size_error
from t2i.pipelines.serving.api.fields import PATHS
from t2i.pipelines.serving.api.responses import explain_failure
from t2i.pipelines.serving.gateway.access import Access
from t2i.pipelines.serving.gateway.limits import Limits
from t2i.pipelines.serving.gateway.log import CLIENT_GONE, LogEntry, choose_request_id
from t2i.pipelines.serving.gateway.metrics import Metrics

logger = logging.getLogger(__name__)

# Routes as logs and metrics name them: those that begin with one of these, and end in anything
COLLECTIONS = ("/v1/images/", "/v1/models/", "/page/")
ROUTES = ("/", "/health", "/ready", "/metrics", "/v1/models", *PATHS)
# What machines ask for at addresses of their own, and what holds no secret
OPEN_TO_ANY_HOST = ("/health", "/ready", "/metrics")


class Gateway:
    """An ASGI application around another one, for all requests.

    Args:
        access, limits: what is allowed.
        metrics: that count requests.
        is_draining: returns whether the server shuts down, and takes no new work.
        log_prompts: write prompts to the log.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        limits: Limits,
        metrics: Metrics,
        is_draining: Callable[[], bool],
        log_prompts: bool = False,
    ):
        self.app, self.access, self.limits, self.metrics = app, access, limits, metrics
        self.is_draining, self.log_prompts = is_draining, log_prompts
        self.held = 0  # bytes of bodies that requests hold now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(self, scope, receive, send)
        try:
            await exchange.run()
        finally:
            self.held -= exchange.received
            entry, seconds = exchange.entry, time.monotonic() - exchange.entry.began
            entry.mark("send")
            entry.write(self.log_prompts)
            self.metrics.count(entry, seconds)


class Exchange:
    """A request and its answer, on their way through the gateway."""

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send):
        self.gateway, self.scope, self.inner_receive, self.inner_send = gateway, scope, receive, send
        self.headers = Headers(scope=scope)
        request_id = choose_request_id(self.headers.get("x-request-id"))
        self.path = find_route_path(scope)
        self.entry = LogEntry(request_id, scope["method"], name_route(self.path))
        # The routes add what they know
        scope.setdefault("state", {})["entry"] = self.entry
        self.body_until = time.monotonic() + gateway.limits.body_seconds
        self.received = 0  # bytes of the body
        # Only a body has one of these
        self.is_complete = not {"content-length", "transfer-encoding"} & set(self.headers.keys())
        self.has_answered = self.has_ended = self.is_gone = False

    async def run(self) -> None:
        """Answer the request, whatever happens."""
        try:
            response = self.check()
            app = self.gateway.app if response is None else response
            await app(self.scope, self.receive, self.send)
        except ClientDisconnect:
            self.is_gone = True
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.error("request %s failed", self.entry.id, exc_info=error)
            await self.send_error(error)
        finally:
            if self.is_gone:
                self.entry.status = CLIENT_GONE

    def check(self) -> Response | None:
        """Refuse what is not allowed, before a byte of the body is read; return an answer that needs no route."""
        access, limits, path, method = self.gateway.access, self.gateway.limits, self.path, self.entry.method
        if path not in OPEN_TO_ANY_HOST:
            access.check_host(self.headers)
        access.check_origin(self.headers)
        # Browsers ask without the key whether they may send it
        if method == "OPTIONS" and "access-control-request-method" in self.headers:
            return Response(status_code=204)
        if needs_key(path, method):
            self.entry.key = access.find_key_name(self.headers)
        if method == "POST" and self.gateway.is_draining():
            raise explain_failure(Draining("the server is shutting down"))
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.body_bytes:
            raise build_size_error("the body", limits.body_bytes)
        return None

    async def send_error(self, error: Exception) -> None:
        """Send an error that no route has sent, if no answer has begun."""
        if self.has_answered:
            self.entry.error = self.entry.error or "internal"
            raise error
        if not isinstance(error, ApiError):
            what = f"the server failed; its log has the reason under {self.entry.id}"
            error = ApiError(500, "internal", what, headers={"x-should-retry": "false"})
        self.entry.error = error.code
        await JSONResponse(error.body, error.status, headers=error.headers)(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        """Return the next part of the body. Raises ApiError beyond a limit."""
        if self.is_complete:
            message = await self.inner_receive()
        else:
            message = await self.receive_in_time()
            self.count_bytes(message)
        if message["type"] == "http.disconnect":
            # Servers report it after every answer too
            self.is_gone = not self.has_ended
        return message

    async def receive_in_time(self) -> Message:
        """Return the next part of a body that comes fast enough."""
        try:
            return await asyncio.wait_for(self.inner_receive(), self.body_until - time.monotonic())
        except TimeoutError as error:
            # Clients send after a status 408 again, to no avail
            raise ApiError(400, "too_slow", "the body of the request came too slowly") from error

    def count_bytes(self, message: Message) -> None:
        """Count a part of the body. Raises ApiError beyond a limit."""
        limits, size = self.gateway.limits, len(message.get("body", b""))
        self.received += size
        self.gateway.held += size
        most = min(limits.body_bytes, limits.held_bytes)
        if self.received > most:
            raise build_size_error("the body", most)
        if self.gateway.held > limits.held_bytes:
            what = "requests hold too many images at the moment; try again later"
            raise ApiError(503, "overloaded", what, headers={"retry-after": "5"})
        # Bytes win time, but none beyond body_seconds: many that came at once allow no longer silence than few
        latest = time.monotonic() + limits.body_seconds
        self.body_until = min(self.body_until + size / limits.body_pace, latest)
        self.is_complete = not message.get("more_body", False)

    async def send(self, message: Message) -> None:
        """Send a part of the answer, with the headers of all answers."""
        if message["type"] == "http.response.start":
            self.has_answered = True
            self.entry.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.entry.id
            headers["x-content-type-options"] = "nosniff"
            headers.update(self.gateway.access.build_cors_headers(self.headers))
            if not self.is_complete:
                # Else the server would go on to read a body that nobody wants
                headers["connection"] = "close"
        elif not message.get("more_body", False):
            self.has_ended = True
        await self.inner_send(message)


def find_route_path(scope: Scope) -> str:
    """Return the path of a request as Starlette's routes see it: without the prefix of a server in front."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if path == root or path.startswith(f"{root}/") else path


def needs_key(path: str, method: str) -> bool:
    """Return True for requests that use the model. Links to images have names that cannot be guessed."""
    is_link = path.startswith("/v1/images/") and method in ("GET", "HEAD")
    return path.startswith("/v1/") and not is_link


def name_route(path: str) -> str:
    """Return a path for logs and metrics, of which there are few."""
    if path in ROUTES:
        return path
    return next((f"{start}{{name}}" for start in COLLECTIONS if path.startswith(start)), "other")
