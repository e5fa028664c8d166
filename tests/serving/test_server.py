"""The command `t2i serve`: what it refuses before the model loads, and one run from start to end."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import httpx2
import pytest
from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.serving.gateway.loading import answer_while_loading
from t2i.pipelines.serving.server import ServerSettings, build_api, open_socket, serve

from t2i.commands.serving import ServedModelFlags, ServerFlags
from t2i.errors import InputError


def test_an_address_in_use_is_refused_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be listened on: .*choose another --port"):
            open_socket("127.0.0.1", port)


def test_a_host_that_is_no_name_is_refused_in_one_line():
    with pytest.raises(InputError, match="cannot be listened on"):
        open_socket("ä..b", 0)


def test_a_server_says_while_it_loads_that_it_does():
    with open_socket("127.0.0.1", 0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with answer_while_loading(listener), ExitStack() as silent:
            for _ in range(8):
                silent.enter_context(socket.create_connection(listener.getsockname()))
            start = time.monotonic()
            assert httpx2.get(f"{address}/health").status_code == 503 and time.monotonic() - start < 1
            for answer in (
                httpx2.get(f"{address}/ready"),
                httpx2.post(f"{address}/v1/images/edits", content=b"x" * 10**6),
            ):
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
                assert int(answer.headers["retry-after"]) > 0
        # Afterwards the socket is the server's
        assert listener.gettimeout() is None
        with socket.create_connection(listener.getsockname()), listener.accept()[0]:
            pass


def test_the_command_answers_while_its_model_loads(pipeline_folder, monkeypatch):
    listener, loading, asked = open_socket("127.0.0.1", 0), threading.Event(), threading.Event()

    def build_slowly(*arguments):
        loading.set()
        assert asked.wait(30)
        raise InputError("it cannot be loaded after all")

    monkeypatch.setattr("t2i.pipelines.serving.server.open_socket", lambda *_: listener)
    monkeypatch.setattr("t2i.pipelines.serving.server.build_api", build_slowly)
    with listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, ModelSource(str(pipeline_folder)), ServerSettings())
        assert loading.wait(30)
        answer = httpx2.get(f"http://127.0.0.1:{listener.getsockname()[1]}/ready")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
        asked.set()
        with pytest.raises(InputError, match="after all"):
            served.result(30)


def test_of_two_servers_that_load_their_models_the_second_is_refused():
    with open_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match="choose another --port"):
            open_socket("127.0.0.1", port)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("nothing", {}, "nothing"),
        ("empty", {}, "has neither a model_index.json nor a config.json"),
        ("cut", {}, "diffusion_pytorch_model.safetensors"),
        ("whole", {"aliases": ("a=b",)}, "names no model"),
        ("whole", {"models": (("one", "whole"), ("two", "nothing"))}, "nothing"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_listens(
    model, more, message, pipeline_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("t2i.pipelines.serving.server.open_socket", lambda *_: pytest.fail("it listens"))
    Path("empty").mkdir()
    for name in ("whole", "cut"):
        shutil.copytree(pipeline_folder, name)
    weights = Path("cut/decoder/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=message):
        serve(ModelSource(f"{tmp_path}/{model}"), ServerSettings(**more))


def test_an_alias_of_no_model_is_refused_before_a_model_loads():
    settings = ServerSettings(name="tiny", aliases=("dall-e-2", "other=big"))
    with pytest.raises(InputError, match="alias 'other=big' names no model; there are tiny"):
        build_api(ModelSource("no such folder"), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "host '0.0.0.0' lets other machines in, which needs --keys FILE"),
        ({"port": 70_000}, "port must be an integer from 0 to 65535"),
        ({"max_batch": 0}, "max-batch must be"),
        ({"drain": -1}, "drain must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ServerSettings(**settings)


def test_options_of_the_command_are_the_settings_of_the_server():
    assert ServerFlags().build(ServedModelFlags()) == ServerSettings(devices=("auto",))
    given = ServerFlags(aliases=["dall-e-2"], cors=["https://a.org"], port=9000)
    found = given.build(ServedModelFlags(device="cuda:0,cuda:1"))
    expected = {"aliases": ("dall-e-2",), "cors": ("https://a.org",), "port": 9000}
    assert found == ServerSettings(**expected, devices=("cuda:0", "cuda:1"))
    # Those of models and devices are of the command's other options, and `Limits` has none
    names = {field.name for field in fields(ServerSettings)} - {"models", "devices", "limits"}
    assert names == {field.name for field in fields(ServerFlags)}


@pytest.mark.slow
def test_the_server_draws_and_ends_by_a_signal(pipeline_folder: Path):
    command = [sys.executable, "-m", "t2i", "serve", "--model", str(pipeline_folder), "--port", "0", "--name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split()[-1]
        assert line.startswith("tiny is served on http://127.0.0.1:")
        body = {"prompt": "a red circle", "steps": 2, "prior_steps": 2}
        answer = httpx2.post(f"{address}/v1/images/generations", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["model"] == "tiny"
        assert httpx2.get(f"{address}/ready").json() == {"ready": True}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
