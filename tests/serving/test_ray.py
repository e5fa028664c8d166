"""The server under Ray Serve: its arguments, and two replicas that draw on this machine (`make test-deploy`)."""

import base64
import io
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from PIL import Image
from prometheus_client.core import GaugeMetricFamily
from t2i.pipelines import Text2ImagePipeline
from t2i.pipelines.serving.ray_app import RaySettings, read_arguments, report_metrics
from torch import Generator

from t2i.errors import InputError

# What `serve run` does, with a small cluster and a free port
CLUSTER = """
import sys
import ray
from ray import serve
from t2i.pipelines.serving.ray_app import build_app

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(build_app(dict(pair.split("=") for pair in sys.argv[2:])))
print("metrics", ray.nodes()[0]["MetricsExportPort"], flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
SAMPLE = r'^ray_t2i_running_pictures{.*replica="([^"]+)"'  # of a replica; searched for line by line
FEW_STEPS = {"prompt": "a red circle", "seed": 7, "steps": 3, "prior_steps": 3}
LONG = {"prompt": "a red circle", "steps": 900, "stream": True, "progress": True}


def test_arguments_are_read_by_the_types_of_the_settings():
    given = {"model": "123", "max_batch": "4", "cpus": "0.5", "gpus": "1", "log_prompts": "yes", "max_replicas": 3}
    expected = RaySettings(model="123", max_batch=4, cpus=0.5, gpus=1, log_prompts=True, max_replicas=3)
    assert read_arguments(given) == expected


@pytest.mark.parametrize("name, text", [("aliases", "dall-e-2"), ("cors", "https://example.org:8443")])
def test_one_text_is_a_list_of_one(name, text):
    for given, expected in ((text, (text,)), (f"[{text}]", (text,)), ([text, text], (text, text)), ("[]", ())):
        assert getattr(read_arguments({name: given}), name) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modell": "a"}, "no argument 'modell'; there are .*model"),
        ({"max_batch": "many"}, "max_batch must be an integer, got 'many'"),
        ({"max_replicas": 0}, "max_replicas must be an integer from 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas must be an integer from 1 to 2"),
        ({"gpus": "-1"}, "gpus must be from 0"),
        ({"host": "0.0.0.0"}, "0.0.0.0"),
        ({"max_batch": "[1"}, r"max_batch cannot be read as YAML: '\[1'"),
        ({"max_batch": True}, "max_batch must be an integer, got True"),
        ({"log_prompts": "maybe"}, "log_prompts must be true or false, got 'maybe'"),
        ({"name": 2026}, "name must be a text or null, got 2026"),
        ({"aliases": [1]}, r"aliases must be a text or a list of texts, got \[1\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        read_arguments(arguments)


def test_a_report_of_metrics_that_fails_is_not_the_last(monkeypatch, caplog):
    reported, closed = [], threading.Event()

    class Registry:
        """Metrics that cannot be read at first."""

        reads = 0

        def collect(self):
            self.reads += 1
            if self.reads == 1:
                raise RuntimeError("changed during iteration")
            closed.set()
            return [GaugeMetricFamily("t2i_queue_pictures", "Images that wait.", value=3)]

    def build_gauge(name, *arguments, **options):
        return SimpleNamespace(set=lambda value, tags: reported.append((name, value)))

    for name in ("ray", "ray.serve", "ray.serve.metrics"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Gauge=build_gauge))
    monkeypatch.setattr("t2i.pipelines.serving.ray_app.METRICS_SECONDS", 0.01)
    report_metrics(Registry(), closed)
    assert reported == [("t2i_queue_pictures", 3)] and "could not be reported" in caplog.text


@contextmanager
def run_cluster(**arguments: object):
    """Run a Ray cluster with the application, until the end of the block. Yields its address, and that of metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-c", CLUSTER, str(port), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        # Ray itself prints to it too
        metrics = next(line.split()[1] for line in process.stdout if line.startswith("metrics "))
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics"
        process.communicate(timeout=120)
        assert process.returncode == 0


def hold_stream(streams: ExitStack, url: str) -> Iterator[str]:
    """Start a long drawing, wait for its first event, and return the others.

    Ray may need some tries to find a replica that is free.
    """
    for _ in range(50):
        answer = streams.enter_context(httpx2.stream("POST", url, json=LONG, timeout=120))
        if answer.status_code == 200:
            # The end of the iterator closes the stream
            lines = answer.iter_lines()
            assert next(lines) == "event: t2i.progress"
            return lines
        time.sleep(0.2)
    pytest.fail("no replica is free")


@pytest.mark.deploy
def test_two_replicas_draw_share_their_links_refuse_what_is_too_much_and_end_what_nobody_waits_for(
    pipeline_folder: Path,
):
    pytest.importorskip("ray", reason="Ray is not installed")
    limits = {"max_batch": 1, "max_queue": 0, "min_replicas": 2, "max_replicas": 2, "cpus": 0.5, "drain": 1}
    with run_cluster(model=pipeline_folder, name="tiny", **limits) as (address, metrics):
        url = f"{address}/v1/images/generations"

        # An image is that of its seed
        [item] = httpx2.post(url, json=FEW_STEPS, timeout=60).json()["data"]
        found = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
        pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder)
        steps = {"num_inference_steps": 3, "prior_num_inference_steps": 3}
        [drawn] = pipeline(FEW_STEPS["prompt"], generator=Generator().manual_seed(7), **steps).images
        assert max(abs(a - b) for a, b in zip(found.tobytes(), drawn.tobytes())) <= 1

        # A link leads to the image from whichever replica
        [item] = httpx2.post(url, json=FEW_STEPS | {"response_format": "url"}, timeout=60).json()["data"]
        assert {httpx2.get(item["url"], timeout=60).content[:4] for _ in range(6)} == {b"\x89PNG"}

        # Each replica draws one image at a time, and refuses the next one
        with ExitStack() as streams:
            held = [hold_stream(streams, url) for _ in range(2)]
            refused = httpx2.post(url, json=FEW_STEPS, timeout=60)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert all(next(lines).startswith("data: ") for lines in held)

        # The replicas of clients that went away draw for others
        end = time.monotonic() + 60
        while httpx2.post(url, json=FEW_STEPS, timeout=60).status_code == 429:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert httpx2.get(f"{address}/health", timeout=60).status_code == 200

        # Metrics of each replica
        while len(set(re.findall(SAMPLE, httpx2.get(metrics, timeout=60).text, re.MULTILINE))) != 2:
            assert time.monotonic() < end + 60
            time.sleep(1)
