"""The application of `t2i serve` under Ray Serve, which runs copies of it on many machines:

    serve run t2i.pipelines.serving.ray_app:build_app model=models/emoji max_replicas=4 gpus=1

Ray Serve starts and replaces the replicas, adds some while requests wait, and sends each request to one of them. The
replica does everything else as `t2i serve` does.
"""

import logging
import threading
from dataclasses import dataclass, fields
from typing import Any, get_args

from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.serving.gateway.log import open_request_log
from t2i.pipelines.serving.server import ServerSettings, build_api
from t2i.pipelines.serving.store import ImageStore

from t2i.checks import check_integer, check_range
from t2i.errors import InputError
from t2i.shipped import find_shipped_folder

logger = logging.getLogger(__name__)

# Requests in a replica beside those that draw or wait for their turn: refused ones, and those for models and images
SPARE_REQUESTS = 64
IMAGE_SECONDS = 30.0  # for an image between two machines
METRICS_SECONDS = 10.0  # between two reports of the metrics to Ray
# Settings of the server that Ray Serve decides, or that have no meaning for replicas of one model
NOT_ARGUMENTS = ("port", "models", "devices", "workers", "limits")

TYPE_WORDS = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a text or a list of texts",
    type(None): "null",
}


@dataclass(frozen=True)
class RaySettings(ServerSettings):
    """Settings of the replicas: those of the server, each replica for itself, and those below.

    `host` says where Ray Serve listens, for others than this machine's own need keys. `NOT_ARGUMENTS` are left out.

    Args:
        model: a folder that every machine has, or a repository on the hub; None is the shipped model.
        device: of the model, such as "cuda".
        dtype: of the weights, such as "bf16".
        min_replicas, max_replicas: Ray Serve keeps their number between these.
        cpus, gpus: that Ray reserves for each replica.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("max_replicas", self.max_replicas, 1, 10_000)
        check_integer("min_replicas", self.min_replicas, 1, self.max_replicas)
        check_range("cpus", self.cpus, 0, 1024)
        check_range("gpus", self.gpus, 0, 64)


def read_arguments(arguments: dict[str, Any]) -> RaySettings:
    """Return the settings of `serve run`'s NAME=VALUE arguments. Raises InputError for a name or value not allowed."""
    known = {field.name: field for field in fields(RaySettings) if field.name not in NOT_ARGUMENTS}
    for name in arguments:
        if name not in known:
            raise InputError(f"no argument {name!r}; there are {', '.join(known)}")
    return RaySettings(**{name: read_value(name, known[name].type, value) for name, value in arguments.items()})


def read_value(name: str, kind: Any, value: Any) -> Any:
    """Return the value of an argument for a setting of this type. Raises InputError for one of another type.

    On a command line all values are texts, read as YAML; those of a YAML file have their types.
    """
    is_list = kind == tuple[str, ...]
    kinds = (list,) if is_list else get_args(kind) or (kind,)
    if is_list and isinstance(value, str) and not value.startswith("["):
        value = [value] if value else []  # one text needs no brackets
    elif isinstance(value, str) and str not in kinds:
        value = parse_yaml(name, value)
    # An integer is as good as a number with a fraction
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits or (is_list and not all(isinstance(text, str) for text in value)):
        allowed = " or ".join(TYPE_WORDS[part] for part in kinds if part in TYPE_WORDS)
        raise InputError(f"{name} must be {allowed}, got {value!r:.200}")
    return tuple(value) if is_list else value


def parse_yaml(name: str, text: str) -> Any:
    """Return the value of a text of YAML. Raises InputError."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{name} cannot be read as YAML: {text!r:.200}") from error


class SharedStore(ImageStore):
    """An image store in a Ray actor, so that each replica finds the images of the others. Call it from threads."""

    def __init__(self, actor: Any):
        self.actor = actor

    def add(self, data: bytes, media_type: str) -> str:
        return self.actor.add.remote(data, media_type).result(timeout_s=IMAGE_SECONDS)

    def find(self, name: str) -> tuple[bytes, str] | None:
        return self.actor.find.remote(name).result(timeout_s=IMAGE_SECONDS)


class Replica:
    """One copy of the server, with its own model."""

    def __init__(self, settings: RaySettings, images: Any):
        model = settings.model or str(find_shipped_folder("models") / "emoji")
        source = ModelSource(model, device=settings.device, dtype=settings.dtype)
        self.api = build_api(source, settings, SharedStore(images))
        open_request_log(settings.log_file)
        # The route of the metrics would show those of any replica
        self.closed = threading.Event()
        threading.Thread(target=report_metrics, args=(self.api.metrics.registry, self.closed), daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application, for Ray Serve."""
        return self.api.build_app()

    def check_health(self) -> None:
        """Raise RuntimeError if an engine does not answer, for Ray Serve to replace the replica."""
        if not all(service.is_alive for service in self.api.services.values()):
            raise RuntimeError("an engine does not answer")

    def __del__(self) -> None:
        # Ray Serve has waited for the requests before
        if hasattr(self, "closed"):
            self.closed.set()
            self.api.close()


def report_metrics(registry: Any, closed: threading.Event) -> None:
    """Hand the metrics to Ray again and again, until `closed`. Its machines export them, named ray_t2i_..., by replica.

    All are gauges there; counters and histograms keep their values and the endings of their names.
    """
    from ray.serve.metrics import Gauge

    gauges: dict[str, Any] = {}
    while not closed.wait(METRICS_SECONDS):
        try:
            for metric in registry.collect():
                for sample in metric.samples:
                    if sample.name not in gauges:
                        gauges[sample.name] = Gauge(sample.name, metric.documentation, tag_keys=tuple(sample.labels))
                    gauges[sample.name].set(sample.value, tags=dict(sample.labels))
        except Exception:
            # The next report may succeed
            logger.exception("the metrics could not be reported to Ray")


def build_app(arguments: dict[str, Any]) -> Any:
    """Return the application of Ray Serve, for `serve run`; the arguments are fields of `RaySettings`.

    Raises InputError for arguments that are not allowed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise InputError("Ray Serve is not installed; pip install 't2i[ray]' brings it") from error
    settings = read_arguments(arguments)
    # A replica refuses requests beyond its own queue, in the API's shape. Ray Serve's refusal is the last fence.
    requests = settings.max_batch + settings.max_queue + SPARE_REQUESTS
    replicas = serve.deployment(
        name="t2i",
        max_ongoing_requests=requests,
        max_queued_requests=requests,
        backpressure_config={"status_code": 429, "retry_after_s": 5},
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=10,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            # A full batch draws fastest; what waits beyond it is work for another replica
            "target_ongoing_requests": settings.max_batch,
        },
    )(serve.ingress()(Replica))
    images = serve.deployment(
        name="images", max_ongoing_requests=requests, ray_actor_options={"num_cpus": 0, "num_gpus": 0}
    )(ImageStore)
    return replicas.bind(settings, images.bind())
