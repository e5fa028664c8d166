"""The command that serves a model: `t2i serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from t2i.commands import flags
from t2i.commands.flags import option
from t2i.errors import InputError

if TYPE_CHECKING:
    from t2i.pipelines.jobs.planning import ModelSource
    from t2i.pipelines.serving.server import ServerSettings

app = typer.Typer()

MODEL_HELP = "Model folder, or repository on the hub. Repeatable as NAME=FOLDER, which serves several models."
DEVICE_HELP = "Device to run on: auto, cpu, cuda or mps. Several, such as cuda:0,cuda:1, share the requests."
UPSAMPLER_DEFAULT = "the model's; the shipped model uses models/emoji-upsampler"
WORKERS_HELP = "Processes that load each model on each device. With two or more in total, one that dies is restarted."

KEYS_HELP = (
    "File of the keys that clients send (Authorization: Bearer KEY): a line `NAME: KEY`, or a key alone, of at least "
    "16 characters. Names are for the log and for turns in the queue. Its group may read the file; others must not."
)
MAX_PIXELS_HELP = "Most pixels of all images that a request draws, or gives to a pass of the upsampler."
ALIAS_HELP = "Another name of the first model, such as dall-e-2, or ALIAS=NAME. Repeatable."
CORS_HELP = "Origin of another site whose pages may use the server, such as https://example.org. Repeatable."


@dataclass
class ServedModelFlags(flags.ModelFlags):
    model: Annotated[list[str] | None, option(MODEL_HELP, "models/emoji")] = None  # type: ignore[assignment]
    device: Annotated[str, option(DEVICE_HELP, None, "--device", "--devices")] = "auto"
    upsampler: Annotated[
        str | None, option("Folder that `t2i train upsampler` wrote, or a model with an upsampler.", UPSAMPLER_DEFAULT)
    ] = None

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.device.split(","))

    @property
    def named_models(self) -> tuple[tuple[str, str], ...]:
        """The names and folders of several models; nothing for one without a name. Raises InputError."""
        models = [split_name(text) for text in self.model or ()]
        if len(models) == 1 and not models[0][0]:
            return ()
        for name, folder in models:
            if not name:
                raise InputError(
                    f"model {folder!r} has no name; give NAME={folder}, as for every one of several models"
                )
            if [other for other, _ in models].count(name) > 1:
                raise InputError(f"model {name!r} is given twice; give each a name of its own")
        return tuple(models)

    def build(self, **more: Any) -> "ModelSource":
        """Return the first model, on the first device."""
        folder = split_name(self.model[0])[1] if self.model else None
        one = {**vars(self), "model": folder, "device": self.devices[0]}
        upsampler = one.pop("upsampler")
        return flags.ModelFlags(**one).build(upsampler=upsampler, **more)


@dataclass
class ServerFlags:
    """Options of the names that the fields of `ServerSettings` have."""

    panel: ClassVar[str] = "Server"
    host: Annotated[str, option("Address to listen on. Others than this machine's own need --keys.")] = "127.0.0.1"
    port: Annotated[int, option("Port to listen on. 0 takes a free one.")] = 8000
    max_batch: Annotated[
        int, option("Images that are drawn at the same time. A client with no running request may use a quarter more.")
    ] = 8
    max_queue: Annotated[int, option("Images that wait for their turn. Beyond them, requests are refused.")] = 64
    queue_timeout: Annotated[float, option("Seconds that a request waits for its turn.")] = 300
    drain: Annotated[float, option("Seconds that requests have to finish after a stop signal.")] = 30
    name: Annotated[str | None, option("Name of the model in the API.", "that of its folder")] = None
    aliases: Annotated[list[str] | None, option(ALIAS_HELP, None, "--alias")] = None
    workers: Annotated[int, option(WORKERS_HELP)] = 1
    max_n: Annotated[int, option("Images that a request may draw.")] = 10
    max_pixels: Annotated[int | None, option(MAX_PIXELS_HELP, "64 times those of the model's size")] = None
    public_url: Annotated[str | None, option("Address in links to images, behind a proxy.", "that of each request")] = (
        None
    )
    keys: Annotated[Path | None, option(KEYS_HELP, "everyone who reaches the server may use it")] = None
    max_queue_per_key: Annotated[int | None, option("Images of one key that wait.", "as --max-queue")] = None
    cors: Annotated[list[str] | None, option(CORS_HELP, "none")] = None
    log_file: Annotated[Path | None, option("File for the log, a line of JSON for each request.", "stderr")] = None
    log_prompts: Annotated[bool, option("Write prompts to the log. They are private otherwise.")] = False

    def build(self, source: ServedModelFlags) -> "ServerSettings":
        """Return the settings of a server of these models. Raises InputError."""
        from t2i.pipelines.serving.server import ServerSettings

        lists = {name: tuple(vars(self)[name] or ()) for name in ("aliases", "cors")}
        return ServerSettings(**vars(self) | lists, models=source.named_models, devices=source.devices)


def split_name(text: str) -> tuple[str, str]:
    """Return the name and the folder of NAME=FOLDER; a folder alone has no name."""
    name, equals, folder = text.partition("=")
    # A folder may have the sign in its name too
    return (name, folder) if equals and "/" not in name and not Path(text).exists() else ("", text)


def check_packages() -> None:
    """Raise InputError without the packages of the extra `serve`."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"t2i serve needs {error.name}; pip install 't2i[serve]' brings it") from error


@app.command()
@flags.share_options
def serve(source: ServedModelFlags, server: ServerFlags) -> None:
    """Serve a model to clients of the OpenAI images API, until the process is told to stop.

    Requests that come at the same time are drawn together. An image is the one that `t2i generate` draws with the same
    seed and settings.

    /health, /ready and /metrics (for Prometheus) answer without a key: they hold counts and the names of models, and
    neither prompts nor names of clients. Links to images, which cannot be guessed, do so too. A first SIGTERM or Ctrl-C
    lets requests finish, a second one stops them.
    """
    check_packages()
    from t2i.pipelines.serving.server import serve as run_server

    run_server(source.build(), server.build(source))
