"""The command that serves a model: `t2i serve`."""

from typing import Annotated

import typer

from t2i.commands import flags
from t2i.commands.flags import option
from t2i.errors import InputError

app = typer.Typer()


@app.command()
@flags.share_options
def serve(
    source: flags.ModelFlags,
    upsampling: flags.UpsamplerFlags,
    host: Annotated[str, option("Address to listen on. Only this machine's own are taken.")] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on. 0 takes a free one.")] = 8000,
    max_batch: Annotated[int, option("Images that are drawn at the same time.")] = 8,
    max_queue: Annotated[int, option("Images that wait for their turn. Beyond them, requests are refused.")] = 64,
    queue_timeout: Annotated[float, option("Seconds that a request waits for its turn.")] = 300,
    drain: Annotated[float, option("Seconds that requests have to end when the server is told to stop.")] = 30,
    name: Annotated[str | None, option("Name of the model in the API.", "that of its folder")] = None,
    alias: Annotated[list[str] | None, option("Another name of the model, such as dall-e-2. Repeatable.")] = None,
) -> None:
    """Serve a model to clients of the OpenAI images API, until the process is told to stop.

    Requests that come at the same time are drawn together. An image is the one that `t2i generate` draws with the same
    seed and settings.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"t2i serve needs {error.name}; pip install 't2i[serve]' brings it") from error
    from t2i.pipelines.serving.server import ServerSettings
    from t2i.pipelines.serving.server import serve as run_server

    # The flags are shared with commands that draw, where --upsample holds for all images
    if upsampling.upsample is not None:
        raise InputError(f"--upsample {upsampling.upsample} is chosen by each request; leave it out")
    settings = ServerSettings(host, port, max_batch, max_queue, queue_timeout, drain, name, tuple(alias or ()))
    run_server(source.build(upsampler=upsampling.upsampler), settings)
