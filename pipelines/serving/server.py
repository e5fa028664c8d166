"""The process of `t2i serve`: the model, the application, and uvicorn around it."""

import itertools
import logging
import socket
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from t2i.pipelines.jobs.planning import ModelSource, check_model_files
from t2i.pipelines.serving.admission import Admission
from t2i.pipelines.serving.api.fields import MAX_COUNT
from t2i.pipelines.serving.app import ImagesApi
from t2i.pipelines.serving.drawing import load_drawer
from t2i.pipelines.serving.gateway.access import Access
from t2i.pipelines.serving.gateway.draining import DrainingServer, end_process_after
from t2i.pipelines.serving.gateway.limits import Limits
from t2i.pipelines.serving.gateway.loading import answer_while_loading
from t2i.pipelines.serving.gateway.log import open_request_log
from t2i.pipelines.serving.service import AnyDrawer, Service
from t2i.pipelines.serving.store import ImageStore
from t2i.pipelines.serving.workers import RemoteDrawer

from t2i.checks import check_integer, check_range
from t2i.errors import InputError
from t2i.runtime.devices import resolve_device_name
from t2i.runtime.memory import return_large_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server.

    Args:
        host, port: where it listens; port 0 takes a free one.
        max_batch: images that are drawn at the same time; see also `count_spare_images`.
        max_queue: images that wait for their turn, beyond which requests are refused; max_queue_per_key: of one key.
        queue_timeout: seconds that a request waits for its turn at most.
        drain: seconds that requests have to finish when the server shuts down.
        name: of the model in the API; None is that of its folder.
        aliases: other names of the first model, or of another one as ALIAS=NAME.
        models: names and folders of several models, instead of the source's.
        devices: of each model, which has a worker process on each of them; none are the source's.
        workers: processes of each model on each device. One in all is none: the server draws itself.
        max_n: images that a request may draw.
        max_pixels: of all images that a request draws, or gives to a pass of the upsampler, so that none keeps the
            machine for hours. None is `MAX_SQUARES` times the model's square.
        public_url: under which clients reach the server, for links to images; None is the address of each request.
        keys: file of the keys of clients; without it the server listens to this machine alone. See `read_keys`.
        cors: see `Access`.
        log_file: of requests; None is stderr. log_prompts: write prompts to it.
        limits: of clients.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    max_queue: int = 64
    queue_timeout: float = 300.0
    drain: float = 30.0
    name: str | None = None
    aliases: tuple[str, ...] = ()
    models: tuple[tuple[str, str], ...] = ()
    devices: tuple[str, ...] = ()
    workers: int = 1
    max_n: int = 10
    max_pixels: int | None = None
    public_url: str | None = None
    max_queue_per_key: int | None = None
    keys: str | Path | None = None
    cors: tuple[str, ...] = ()
    log_file: str | Path | None = None
    log_prompts: bool = False
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        check_integer("port", self.port, 0, 65_535)
        check_integer("max-batch", self.max_batch, 1, 1024)
        check_integer("max-queue", self.max_queue, 0, 100_000)
        check_range("queue-timeout", self.queue_timeout, 0.1, 86_400)
        check_range("drain", self.drain, 0, 3600)
        check_integer("workers", self.workers, 1, 64)
        check_integer("max-n", self.max_n, 1, MAX_COUNT)
        if self.max_pixels is not None:
            check_integer("max-pixels", self.max_pixels, 1, 10**9)
        if self.max_queue_per_key is not None:
            check_integer("max-queue-per-key", self.max_queue_per_key, 0, self.max_queue)
        self.build_access()  # checks the rest

    def build_access(self) -> Access:
        """Return who may send requests. Raises InputError for files and addresses that cannot be used."""
        return Access.build(self.host, self.keys, self.public_url, self.cors)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises InputError for an address that is in use, or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Else a port would be taken for a while after a server on it has ended
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # At once, while the model loads: of two that are bound and do not listen, none is refused
        listener.listen()
    except (OSError, TypeError, UnicodeError) as error:  # the last two of a name that is none
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port} cannot be listened on: {reason}; choose another --port") from error
    return listener


def list_models(source: ModelSource, settings: ServerSettings) -> dict[str, str]:
    """Return the names and folders of the models."""
    return dict(settings.models) or {settings.name or Path(source.model).resolve().name: source.model}


def build_services(source: ModelSource, settings: ServerSettings) -> dict[str, Service]:
    """Load the models, each in its processes at the same time, and return their services by name, warmed up."""
    models = list_models(source, settings)
    devices = [resolve_device_name(device) for device in settings.devices or (source.device,)]
    places = [device for device in devices for _ in range(settings.workers)]
    build = RemoteDrawer if len(models) * len(places) > 1 else load_drawer
    processes = len(models) * settings.workers
    drawers: dict[str, list[AnyDrawer]] = {name: [] for name in models}
    try:
        for (name, model), device in itertools.product(models.items(), places):
            drawers[name].append(build(replace(source, model=model, device=device), settings.max_batch, processes))
        for drawer in itertools.chain(*drawers.values()):
            drawer.wait_until_ready()
    except BaseException:
        for drawer in itertools.chain(*drawers.values()):
            drawer.close()
        raise
    counts = settings.max_batch, settings.max_queue, settings.max_queue_per_key, len(places)
    return {
        name: Service(
            *(name, found, Admission(*counts, settings.limits.held_bytes)), settings.queue_timeout, settings.max_pixels
        )
        for name, found in drawers.items()
    }


def check_models(source: ModelSource, settings: ServerSettings) -> None:
    """Raise InputError for aliases of no model, and for models that cannot be loaded, by the heads of their files."""
    models = list_models(source, settings)
    find_aliases(settings, models)
    for device in settings.devices or (source.device,):
        for model in models.values():
            check_model_files(replace(source, model=model, device=device))


def find_aliases(settings: ServerSettings, names: Collection[str]) -> dict[str, str]:
    """Return the models that aliases stand for. Raises InputError for one that stands for no model."""
    aliases = {}
    for text in settings.aliases:
        alias, _, name = text.partition("=")
        aliases[alias] = name or next(iter(names))
        if aliases[alias] not in names:
            raise InputError(f"alias {text!r} names no model; there are {', '.join(names)}")
    return aliases


def build_api(source: ModelSource, settings: ServerSettings, store: ImageStore | None = None) -> ImagesApi:
    """Load a model and return the routes that serve it. store: None keeps images in this process."""
    aliases = find_aliases(settings, list_models(source, settings))  # refused before a model loads
    services = build_services(source, settings)
    store = ImageStore() if store is None else store
    access = settings.build_access()
    return ImagesApi(services, store, aliases, settings.max_n, access, settings.limits, settings.log_prompts)


def serve(source: ModelSource, settings: ServerSettings) -> None:
    """Load a model, listen, and answer requests until the process is told to stop."""
    return_large_memory()
    # Refuse what is wrong before anything listens
    open_request_log(settings.log_file)
    check_models(source, settings)
    listener = open_socket(settings.host, settings.port)
    with answer_while_loading(listener):
        api = build_api(source, settings)
    host, port = listener.getsockname()[:2]
    names = f"{', '.join(api.services)} {'is' if len(api.services) == 1 else 'are'} served"
    print(f"{names} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    try:
        DrainingServer(api, settings.limits, settings.drain).run(sockets=[listener])
    finally:
        with end_process_after(settings.limits.exit_seconds):
            api.close()
