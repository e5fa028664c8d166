"""A process that imports the libraries once, and forks for each program that it is asked for. See `forked`.

It is started with the number of a socket that listens, and ends with its standard input. Nothing of this project may
be imported here: a program begins without.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = """
torch torch.utils.data torch.distributed.fsdp torch._dynamo torchvision scipy.stats accelerate.accelerator peft timm
diffusers diffusers.models.autoencoders.autoencoder_kl diffusers.models.unets.unet_2d_condition
diffusers.pipelines.pipeline_utils diffusers.schedulers.scheduling_ddpm transformers.models.clip.modeling_clip open_clip
omegaconf PIL.Image PIL.PngImagePlugin PIL.ImageCms psutil pyarrow.parquet pyarrow.compute safetensors.torch typer
"""
sys.path.pop(0)  # the folder of this file


def import_libraries() -> None:
    """Import what most programs of this project do."""
    for name in LIBRARIES.split():
        importlib.import_module(name)


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each request. Returns in a fork alone: what it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return fork_program(connection)
        connection.close()


def fork_program(connection: socket.socket) -> dict[str, Any]:
    """Fork a program, and tell the client its number and then its exit status. Returns in the program alone."""
    message, prints, _, _ = socket.recv_fds(connection, 2**16, 2)
    while not message.endswith(b"\n"):
        message += connection.recv(2**16)
    program = os.fork()
    if program == 0:
        connection.close()
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *prints)):
            os.dup2(file, number)
            os.close(file)
        return json.loads(message)
    for file in prints:
        os.close(file)
    connection.sendall(b"%d\n" % program)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        connection.sendall(b"%d\n" % status)
    finally:
        os._exit(0)


def run_as_main(arguments: list[str]) -> None:
    """Run what `python` would run with these arguments."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if kind == "-c":
        code, path = rest[0], "<string>"
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
    else:
        code, path = Path(kind).read_text(), kind
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).resolve().parent))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = path
    exec(compile(code, path, "exec"), main.__dict__)


def run_to_end(arguments: list[str]) -> int:
    """Return the exit status."""
    try:
        run_as_main(arguments)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end_process(status: int) -> NoReturn:
    """End as Python does, but without taking the libraries apart, which takes as long as a test."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    import_libraries()
    assert "t2i" not in sys.modules, "a program begins without modules of this project"
    gc.collect()
    gc.freeze()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request["own_group"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = request["paths"]
    end_process(run_to_end(request["arguments"]))
