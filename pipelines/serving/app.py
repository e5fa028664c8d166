"""The routes of the images API, on Starlette."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from t2i.pipelines.serving.admission import Draining, QueueFull
from t2i.pipelines.serving.api.errors import ApiError, build_field_error
from t2i.pipelines.serving.api.fields import ROUTES, list_fields, name_field, read_fields
from t2i.pipelines.serving.api.requests import add_images, check_known_model, plan_draw_request
from t2i.pipelines.serving.api.responses import (
    Answer,
    check_each_text,
    describe_unknown_words,
    explain_failure,
)
from t2i.pipelines.serving.api.uploads import UploadReader
from t2i.pipelines.serving.draw_request import DrawRequest
from t2i.pipelines.serving.drawing import CheckedRequest, DrawnImage, EngineLost
from t2i.pipelines.serving.gateway.access import Access
from t2i.pipelines.serving.gateway.bodies import read_json
from t2i.pipelines.serving.gateway.forms import read_body
from t2i.pipelines.serving.gateway.limits import Limits
from t2i.pipelines.serving.gateway.log import LogEntry, find_entry
from t2i.pipelines.serving.gateway.metrics import Metrics
from t2i.pipelines.serving.gateway.middleware import Gateway
from t2i.pipelines.serving.gateway.refusals import send_error, send_framework_error
from t2i.pipelines.serving.pace import Forecast
from t2i.pipelines.serving.page_files import build_page_routes
from t2i.pipelines.serving.service import Job, Service
from t2i.pipelines.serving.store import ImageStore

from t2i.diffusion.samplers import SAMPLERS
from t2i.errors import InputError

KEEPALIVE_SECONDS = 10.0


class ImagesApi:
    """The routes for some services, by name; the first one is the default.

    Args:
        aliases: other names of models, such as "dall-e-2".
        store: of images that responses return by `url`.
        max_count: images that a request may draw.
        access, limits: of clients; None are the defaults.
        log_prompts: write prompts to the log.
    """

    def __init__(
        self,
        services: dict[str, Service],
        store: ImageStore,
        aliases: dict[str, str] | None = None,
        max_count: int = 10,
        access: Access | None = None,
        limits: Limits | None = None,
        log_prompts: bool = False,
    ):
        self.services, self.store, self.aliases = services, store, aliases or {}
        self.max_count, self.log_prompts = max_count, log_prompts
        self.access, self.limits = access or Access(), limits or Limits()
        self.metrics = Metrics(self.services.values)
        self.ready = True
        self.uploads = UploadReader(self.limits.held_bytes)
        self.checking_words = asyncio.Semaphore(1)

    def build_app(self) -> Starlette:
        """Return the application."""
        routes = [
            *(Route(f"/v1/images/{name}", partial(self.draw, route=name), methods=["POST"]) for name in ROUTES),
            # After the routes above, which have the same form: Starlette takes the first that fits
            Route("/v1/images/{name}", self.send_image),
            Route("/v1/texts", self.check_texts, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/health", self.report_health),
            Route("/ready", self.report_readiness),
            Route("/metrics", self.report_metrics),
            *build_page_routes(),
        ]
        # The gateway answers for errors that nobody expected
        handlers: dict[Any, Any] = {ApiError: send_error, HTTPException: send_framework_error}
        gateway = Middleware(
            Gateway, self.access, self.limits, self.metrics, lambda: not self.ready, log_prompts=self.log_prompts
        )
        app = Starlette(routes=routes, exception_handlers=handlers, middleware=[gateway])
        app.router.redirect_slashes = False  # an unknown path gets an error in the API's shape
        return app

    def drain(self) -> None:
        """Refuse new requests; those that wait and those that draw go on."""
        self.ready = False
        for service in self.services.values():
            service.admission.drain()

    def count_jobs(self) -> int:
        """Return the number of requests that wait or draw."""
        return sum(len(service.jobs) for service in self.services.values())

    def cancel_all(self) -> None:
        """End all requests before their next step."""
        for service in self.services.values():
            for job in list(service.jobs):
                job.is_stopped = True
            service.cancel_all()

    def close(self) -> None:
        """End all requests and engines."""
        for service in self.services.values():
            service.close()

    # Models and health

    async def list_models(self, request: Request) -> Response:
        models = [self.describe_model(service) for service in self.services.values()]
        return JSONResponse({"object": "list", "data": models})

    def describe_model(self, service: Service) -> dict[str, Any]:
        """Return a model as /v1/models lists it, with what pages and programs want to know of it."""
        facts = service.facts
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "t2i",
            "size": [facts.image_size, facts.image_size],
            "size_multiple": facts.size_multiple,
            "defaults": facts.defaults,
            "samplers": list(SAMPLERS),
            "prior_samplers": list(SAMPLERS) if facts.prior_has_steps else [],
            "max_n": self.max_count,
            "max_pixels": service.max_pixels,
            # By which factor a pass enlarges; 0 without an upsampler
            "upsample": facts.upsampler_factor if facts.upsampler_factor > 1 else 0,
            "reads_texts": facts.reads_texts,
            "knows_words": facts.known_words is not None,
            "fields": {route: list_fields(f"/v1/images/{route}") for route in ROUTES},
        }

    async def show_model(self, request: Request) -> Response:
        service = self.find_service({"model": request.path_params["name"]})
        return JSONResponse(self.describe_model(service))

    async def report_health(self, request: Request) -> Response:
        """Answer 200 while every engine is alive."""
        alive = all(service.is_alive for service in self.services.values())
        return JSONResponse({"status": "ok" if alive else "an engine does not answer"}, 200 if alive else 503)

    async def report_readiness(self, request: Request) -> Response:
        """Answer 200 while new requests are taken, and there is an engine for each model."""
        ready = self.ready and all(service.is_ready for service in self.services.values())
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def report_metrics(self, request: Request) -> Response:
        """Send what Prometheus reads."""
        return Response(self.metrics.render(), media_type=self.metrics.content_type)

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
        entry = find_entry(request)
        given, images, mask = await read_body(request, route, self.limits)
        entry.mark("receive")
        values = read_fields(f"/v1/images/{route}", given)
        service = self.find_service(values)
        # What takes long runs in threads, while the event loop answers others
        drawn = await asyncio.to_thread(plan_draw_request, route, values, images, mask, self.max_count)
        entry.model, entry.images, entry.prompt = service.name, drawn.count, values.get("prompt")
        try:
            with service.admission.expect(drawn.count, entry.key):
                if images:
                    finish = partial(add_images, drawn, values, images, mask)
                    await self.uploads.read(images, mask, entry.key, finish)
                    # While the request waits it alone holds the files, and while it draws its images in their place
                    del finish, images, mask
                else:
                    add_images(drawn, values, images, mask)
                checked = await service.check(drawn)
                answer = await asyncio.to_thread(self.build_answer, request, route, values, service, drawn, checked)
            entry.mark("read")
            job = service.submit(drawn, entry.key)
        except (QueueFull, Draining, EngineLost, InputError) as error:
            raise explain_failure(error) from error
        if values.get("stream"):
            events = self.stream_events(service, job, answer, entry)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        finished = await self.wait_for_end(request, service, job)
        return JSONResponse(await asyncio.to_thread(answer.build_body, finished))

    def find_service(self, values: dict[str, Any]) -> Service:
        """Return the service of the model that a request names. Raises ApiError for an unknown one."""
        return self.services[check_known_model(values, list(self.services), self.aliases)]

    def build_answer(
        self,
        request: Request,
        route: str,
        values: dict[str, Any],
        service: Service,
        drawn: DrawRequest,
        checked: CheckedRequest,
    ) -> Answer:
        """Return what answers a request that is allowed."""
        facts: dict[str, Any] = {"model": service.name}
        facts |= {"safety_identifier": values["safety_identifier"]} if "safety_identifier" in values else {}
        facts |= {"unknown_words": describe_unknown_words(checked.unknown_words)}
        facts |= {"notes": [name_field(note)[1] for note in checked.notes]}
        address = self.access.public_url or str(request.base_url)

        def keep(data: bytes, media_type: str) -> str:
            return f"{address.rstrip('/')}/v1/images/{self.store.add(data, media_type)}"

        is_usual = drawn.find_size(service.facts) == (service.facts.image_size,) * 2
        forecast = Forecast(service.pace if is_usual else None, checked.stages)
        return Answer(route, values, forecast, keep, facts)

    async def check_texts(self, request: Request) -> Response:
        """Answer with the words of texts that a model never saw, without drawing."""
        values = read_fields("/v1/texts", await read_json(request, self.limits))
        if "texts" not in values:
            raise build_field_error("texts", "texts is missing; give a list", "missing_required_parameter")
        service = self.find_service(values)
        known = service.facts.known_words
        # One at a time: many threads would keep the engine's from its turn
        async with self.checking_words:
            data = await asyncio.to_thread(check_each_text, known, values["texts"])
        return JSONResponse({"model": service.name, "knows_words": known is not None, "data": data})

    async def wait_for_end(self, request: Request, service: Service, job: Job) -> list[DrawnImage]:
        """Return a job's images; cancel it if the client goes away. Raises ApiError for what went wrong."""
        entry, gone = find_entry(request), asyncio.create_task(wait_for_disconnect(request))
        try:
            while True:
                event = asyncio.create_task(job.events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    service.cancel(job)
                # A cancelled job ends with an event too, "failed"
                found = await event
                if found.kind in ("done", "failed"):
                    entry.mark_job(job.ticket)
                if found.kind == "failed":
                    raise explain_failure(found.data["error"])
                if found.kind == "done":
                    return found.data["images"]
        finally:
            gone.cancel()
            # Some servers end this task when the client goes away. A job that has ended takes no harm.
            service.cancel(job)

    async def stream_events(self, service: Service, job: Job, answer: Answer, entry: LogEntry) -> AsyncIterator[str]:
        """Yield the events of a job, as server-sent events; a client that goes away cancels it."""
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
                if ended:
                    entry.mark_job(job.ticket)
                for name, data in await asyncio.to_thread(answer.build_events, event):
                    entry.note_event(event.kind, data)
                    yield format_event(name, data)
        except Exception as error:
            # The status is sent: only an event can tell the client that no image follows
            shown = explain_failure(error)
            entry.error = shown.code
            yield format_event("error", shown.body)
        finally:
            # Starlette closes this generator when the client has gone away
            if not ended:
                service.cancel(job)


def format_event(name: str, data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
