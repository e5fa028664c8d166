"""The routes of the images API, on Starlette."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from t2i.pipelines.serving.admission import Draining, QueueFull
from t2i.pipelines.serving.api.bodies import read_body
from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.api.fields import ROUTES, read_fields
from t2i.pipelines.serving.api.images import MEDIA_TYPES, encode_base64, encode_image
from t2i.pipelines.serving.api.requests import build_draw_request, check_known_model
from t2i.pipelines.serving.api.responses import (
    build_stream_events,
    describe_output,
    explain_failure,
    send_error,
    send_framework_error,
    send_internal_error,
)
from t2i.pipelines.serving.drawing import DrawnImage, EngineLost
from t2i.pipelines.serving.page_files import build_page_routes
from t2i.pipelines.serving.service import Job, Service
from t2i.pipelines.serving.store import ImageStore

MAX_RETRY_SECONDS = 60
KEEPALIVE_SECONDS = 10.0


class ImagesApi:
    """The routes for some services, by name; the first one is the default.

    aliases: other names of models, such as "dall-e-2". store: of images that responses return by `url`.
    """

    def __init__(self, services: dict[str, Service], store: ImageStore, aliases: dict[str, str] | None = None):
        self.services, self.store, self.aliases = services, store, aliases or {}
        self.ready = True

    def build_app(self) -> Starlette:
        """Return the application."""
        routes = [
            *(Route(f"/v1/images/{name}", partial(self.draw, route=name), methods=["POST"]) for name in ROUTES),
            # After the routes above, which have the same form: Starlette takes the first that fits
            Route("/v1/images/{name}", self.send_image),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/health", self.report_health),
            Route("/ready", self.report_readiness),
            *build_page_routes(),
        ]
        handlers: dict[Any, Any] = {
            ApiError: send_error,
            HTTPException: send_framework_error,
            Exception: send_internal_error,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    def close(self) -> None:
        """End all requests and engines."""
        for service in self.services.values():
            service.close()

    # Models and health

    async def list_models(self, request: Request) -> Response:
        models = [describe_model(service) for service in self.services.values()]
        return JSONResponse({"object": "list", "data": models})

    async def show_model(self, request: Request) -> Response:
        name = check_known_model({"model": request.path_params["name"]}, list(self.services), self.aliases)
        return JSONResponse(describe_model(self.services[name]))

    async def report_health(self, request: Request) -> Response:
        """Answer 200 while every engine is alive."""
        alive = all(service.is_alive for service in self.services.values())
        return JSONResponse({"status": "ok" if alive else "an engine does not answer"}, 200 if alive else 503)

    async def report_readiness(self, request: Request) -> Response:
        """Answer 200 while new requests are taken, and there is an engine for each model."""
        ready = self.ready and all(service.is_ready for service in self.services.values())
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def send_image(self, request: Request) -> Response:
        """Send an image that a response named by its url."""
        name = request.path_params["name"]
        if name in ROUTES:  # for other methods
            raise HTTPException(405, headers={"allow": "POST"})
        # In a thread, for a store may be on another machine
        found = await asyncio.to_thread(self.store.find, name)
        if found is None:
            raise ApiError(404, "not_found", "no such image; links to images end after a while")
        data, media_type = found
        return Response(data, media_type=media_type, headers={"cache-control": "private, max-age=3600"})

    # Drawing

    async def draw(self, request: Request, route: str) -> Response:
        """Draw what a request asks for, and answer with the images, or with events."""
        given, images, mask = await read_body(request, route)
        values = read_fields(route, given)
        service = self.services[check_known_model(values, list(self.services), self.aliases)]
        # Images are decoded and encoded in threads, while the event loop answers others
        drawn = await asyncio.to_thread(build_draw_request, route, values, images, mask)
        job = start_job(service, drawn)
        if values.get("stream"):
            events = self.stream_events(request, route, service, job, values)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        finished = await self.wait_for_end(request, service, job)
        return await asyncio.to_thread(self.build_response, request, values, finished, service)

    async def wait_for_end(self, request: Request, service: Service, job: Job) -> list[DrawnImage]:
        """Return a job's images; cancel it if the client goes away. Raises ApiError for what went wrong."""
        gone = asyncio.create_task(wait_for_disconnect(request))
        try:
            while True:
                event = asyncio.create_task(job.events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    service.cancel(job)
                # A cancelled job ends with an event too, "failed"
                found = await event
                if found.kind == "failed":
                    raise explain_failure(found.data["error"])
                if found.kind == "done":
                    return found.data["images"]
        finally:
            gone.cancel()
            # Some servers end this task when the client goes away. A job that has ended takes no harm.
            service.cancel(job)

    def build_response(
        self, request: Request, values: dict[str, Any], images: list[DrawnImage], service: Service
    ) -> Response:
        """Return the answer with all images."""
        data = [self.describe_image(request, values, drawn) for drawn in images]
        body = {"created": int(time.time()), "data": data, "model": service.name, **describe_output(values, images)}
        return JSONResponse(body)

    def describe_image(self, request: Request, values: dict[str, Any], drawn: DrawnImage) -> dict[str, Any]:
        """Return an image as `data` lists it: its bytes, or a link to them, and its seed."""
        output_format = values.get("output_format", "png")
        content = encode_image(drawn, output_format, values.get("output_compression"))
        if values.get("response_format") != "url":
            return {"b64_json": encode_base64(content), "seed": drawn.seed}
        name = self.store.add(content, MEDIA_TYPES[output_format])
        return {"url": str(request.base_url.replace(path=f"/v1/images/{name}")), "seed": drawn.seed}

    async def stream_events(
        self, request: Request, route: str, service: Service, job: Job, values: dict[str, Any]
    ) -> AsyncIterator[str]:
        """Yield the events of a job, as server-sent events; a client that goes away cancels it."""
        kind = "image_generation" if route == "generations" else "image_edit"
        ended = False
        try:
            while not ended:
                try:
                    event = await asyncio.wait_for(job.events.get(), KEEPALIVE_SECONDS)
                except TimeoutError:
                    # A comment of the protocol, so that no proxy takes silence for the end
                    yield ": keepalive\n\n"
                    continue
                ended = event.kind in ("done", "failed")
                for name, data in await asyncio.to_thread(build_stream_events, kind, event, job, values):
                    yield f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"
        finally:
            # Starlette closes this generator when the client has gone away
            if not ended:
                service.cancel(job)


def start_job(service: Service, drawn: Any) -> Job:
    """Start drawing. Raises ApiError if the queue is full, and while the server shuts down."""
    try:
        return service.submit(drawn)
    except QueueFull as error:
        seconds = min(MAX_RETRY_SECONDS, max(1, round(error.retry_after)))
        raise ApiError(429, "queue_full", str(error), headers={"retry-after": str(seconds)}) from error
    except EngineLost as error:
        raise explain_failure(error) from error
    except Draining as error:
        raise ApiError(503, "shutting_down", str(error), headers={"x-should-retry": "true"}) from error


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def describe_model(service: Service) -> dict[str, Any]:
    """Return a model as /v1/models lists it."""
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "t2i"}
