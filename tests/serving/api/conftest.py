"""A server of the tiny model with an upsampler, which knows few words."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from t2i.pipelines import Text2ImagePipeline
from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.serving.admission import Admission
from t2i.pipelines.serving.app import ImagesApi
from t2i.pipelines.serving.drawing import Drawer
from t2i.pipelines.serving.engine import StepEngine
from t2i.pipelines.serving.service import Service
from t2i.pipelines.serving.store import ImageStore

from t2i.files.known_words import KnownWords
from tests.helpers.pipelines import tiny_upsampler  # noqa: F401
from tests.serving.servers import run_server

WORDS = KnownWords(frozenset({"red", "blue", "green", "circle", "square"}), {"round": "red circle"})


@pytest.fixture(scope="package")
def service(pipeline_folder: Path, tiny_upsampler: Any) -> Iterator[Service]:  # noqa: F811
    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder)
    upsampler, scheduler = copy.deepcopy(tiny_upsampler)
    pipeline.register_modules(upsampler=upsampler, upsampler_scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.clip.tokenizer.known_words = WORDS
    drawer = Drawer(StepEngine(pipeline), ModelSource(str(pipeline_folder)))
    service = Service("tiny", [drawer], Admission(max_running=16, max_queued=16))
    yield service
    service.close()


@pytest.fixture(scope="package")
def address(service: Service) -> Iterator[str]:
    """The address of a server in a thread."""
    api = ImagesApi({"tiny": service}, ImageStore(), {"dall-e-2": "tiny"})
    with run_server(api, api.limits) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    """The unmodified client, which sends nothing twice; its connections end with it."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client
