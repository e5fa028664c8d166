"""The routes of the images API: what each task answers, what is refused, and what ends with its client."""

import asyncio
import base64
import io
import json
import threading
import urllib.request

import httpx2
import openai
import pytest
from PIL import Image
from t2i.pipelines.serving.app import ImagesApi
from t2i.pipelines.serving.store import ImageStore
from torch import Generator

from tests.serving.servers import encode_png

SIDE = 32  # of the tiny model's images


def open_image(answer, index: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer.data[index].b64_json)))


FEW_STEPS = {"seed": 7, "steps": 3, "prior_steps": 3}
RED = Image.new("RGB", (SIDE, SIDE), (200, 30, 30))


def test_images_are_those_of_their_seeds_and_say_how_they_were_drawn(client, service):
    answer = client.images.generate(model="tiny", prompt="a red circle", n=2, extra_body=FEW_STEPS)
    assert [item.seed for item in answer.data] == [7, 8] and answer.size == f"{SIDE}x{SIDE}"
    for index, seed in enumerate((7, 8)):
        found = open_image(answer, index)
        drawn = service.drawer.engine.pipeline(
            "a red circle",
            num_inference_steps=3,
            prior_num_inference_steps=3,
            generator=Generator().manual_seed(seed),
        ).images[0]
        worst = max(abs(a - b) for a, b in zip(found.tobytes(), drawn.tobytes()))
        assert worst <= 1
        record = json.loads(found.info["t2i"])
        assert record["prompt"] == "a red circle" and record["seed"] == seed
        assert record["num_inference_steps"] == 3 and record["weights"] == service.drawer.identities[False][1]


def test_models_are_listed_and_aliases_name_them(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("dall-e-2").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'big'") as caught:
        client.images.generate(model="big", prompt="a cat")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_links_lead_to_the_images_for_a_while(client, address):
    answer = client.images.generate(prompt="a red circle", response_format="url", extra_body=FEW_STEPS)
    with urllib.request.urlopen(answer.data[0].url) as found:
        assert found.headers["content-type"] == "image/png" and Image.open(found).size == (SIDE, SIDE)
    with pytest.raises(openai.NotFoundError, match="no such image"):
        client.get("/images/other", cast_to=object)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_are_sent_where_they_are_asked_for(client, output_format):
    answer = client.images.generate(prompt="a red circle", output_format=output_format, extra_body=FEW_STEPS)
    assert open_image(answer).format == output_format.upper() and answer.output_format == output_format


@pytest.mark.filterwarnings("ignore:deprecated")  # by the client, for OpenAI has no variations any more
def test_variations_and_edits_of_every_kind(client):
    small = {"seed": 3, "steps": 3}
    assert open_image(client.images.create_variation(image=encode_png(RED), n=2, extra_body=small), 1).size == RED.size
    # A mask's transparent part is painted; all other pixels stay as they are
    mask = RED.convert("RGBA")
    mask.putalpha(Image.new("L", RED.size, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 8, SIDE))
    painted = open_image(
        client.images.edit(image=encode_png(RED), mask=encode_png(mask), prompt="blue", extra_body=small)
    )
    kept = (8, 0, SIDE, SIDE)
    assert painted.crop(kept).tobytes() == RED.crop(kept).tobytes() and painted.tobytes() != RED.tobytes()
    # The transparent part of the image itself
    alone = open_image(client.images.edit(image=encode_png(mask), prompt="blue", extra_body=small))
    assert alone.crop(kept).tobytes() == RED.crop(kept).tobytes()
    # As a whole, around it, and along a direction
    assert open_image(client.images.edit(image=[encode_png(RED)], prompt="blue", extra_body=small)).size == RED.size
    wide = open_image(client.images.edit(image=encode_png(RED), prompt="blue", extra_body=small | {"left": 8}))
    assert wide.size == (SIDE + 8, SIDE)
    moved = small | {"source": "red", "target": "blue", "theta": 0.5}
    assert open_image(client.images.edit(image=encode_png(RED), prompt="blue", extra_body=moved)).size == RED.size


def test_events_show_previews_then_the_images(client):
    stream = client.images.generate(
        prompt="a red circle", n=2, stream=True, partial_images=2, extra_body=FEW_STEPS | {"steps": 12}
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[-2:] == ["image_generation.completed"] * 2
    assert set(kinds[:-2]) == {"image_generation.partial_image"}
    assert [event.image_index for event in events[-2:]] == [0, 1]
    for event in events:
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (SIDE, SIDE)


def test_a_failure_after_the_stream_began_is_an_event(client, service, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(service.drawer, "draw", fail)
    stream = client.images.generate(prompt="a red circle", stream=True, extra_body=FEW_STEPS)
    with pytest.raises(openai.APIError, match="drawing failed"):
        list(stream)


def test_settings_that_cannot_be_drawn_are_refused_before_a_stream_begins(client):
    with pytest.raises(openai.BadRequestError, match="height must be a multiple of 8") as caught:
        client.images.generate(prompt="a red circle", stream=True, size="33x33", extra_body=FEW_STEPS)
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a" * 5000}, "prompt"),
        ({"prompt": "a cat", "n": 11}, "n"),
        ({"prompt": "a cat", "n": True}, "n"),
        ({"prompt": "a cat", "size": "big"}, "size"),
        ({"prompt": "a cat", "size": "33x33"}, "size"),
        ({"prompt": "a cat", "size": "264x256"}, "size"),  # more than 64 times the model's square
        ({"prompt": "a cat", "n": 10, "size": "96x80"}, "size"),
        ({"prompt": "\0"}, "prompt"),
        ({"prompt": "a cat", "steps": 0}, "steps"),
        ({"prompt": "a cat", "steps": 2.5}, "steps"),
        ({"prompt": "a cat", "guidance_scale": "much"}, "guidance_scale"),
        ({"prompt": "a cat", "sampler": "best"}, "sampler"),
        ({"prompt": "a cat", "background": "transparent"}, "background"),
        ({"prompt": "a cat", "theta": 0.5}, "theta"),
        ({"prompt": "a cat", "colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named_in_the_apis_shape(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/images/generations", body=body, cast_to=object)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert "\n" not in caught.value.message


def test_fields_that_clients_leave_empty_count_as_absent(client):
    body = {"prompt": "a red circle", "n": 0, "response_format": {}, "style": "vivid", "user": "me", **FEW_STEPS}
    assert client.post("/images/generations", body=body, cast_to=dict)["data"][0]["seed"] == 7


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("POST", "/v1/images/generations", b"{", {"content-type": "application/json"}, 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"[NaN]", {"content-type": "application/json"}, 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"prompt=a", {}, 415, "unsupported_media_type"),
        ("POST", "/v1/images/edits", b"{}", {"content-type": "application/json"}, 415, "unsupported_media_type"),
        ("POST", "/v1/images/edits", b"x", {"content-type": "multipart/form-data"}, 400, "invalid_form"),
        ("GET", "/v1/images/generations", b"", {}, 405, "method_not_allowed"),
        ("GET", "/v2/images", b"", {}, 404, "not_found"),
        ("POST", "/v1/images/generations/", b"{}", {}, 404, "not_found"),
    ],
)
def test_other_faults_have_the_apis_shape_too(address, method, path, content, headers, status, code):
    answer = httpx2.request(method, address + path, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


def test_a_full_queue_is_said_with_the_time_to_wait(service, client):
    held = service.admission.enter(16), service.admission.enter(16)
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="a red circle", extra_body=FEW_STEPS)
        assert caught.value.code == "queue_full" and 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    finally:
        for ticket in held:
            service.admission.leave(ticket)


def test_a_client_that_goes_away_ends_its_drawing(service, address):
    body = {"prompt": "long", "steps": 1000, "prior_steps": 1000, "n": 4, "stream": True, "progress": True}
    with httpx2.stream("POST", f"{address}/v1/images/generations", json=body) as answer:
        next(answer.iter_lines())
        assert len(service.jobs) == 1
    for _ in range(500):
        if not service.jobs and not service.drawer.engine.drawings:
            return
        threading.Event().wait(0.02)
    pytest.fail("the drawing goes on")


def test_a_server_that_ends_the_task_of_a_request_ends_its_drawing(service):
    app = ImagesApi({"tiny": service}, ImageStore()).build_app()
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    path = "/v1/images/generations"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    body = json.dumps({"prompt": "long", "steps": 900}).encode()

    async def run() -> None:
        messages: asyncio.Queue = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        task = asyncio.create_task(app(scope, messages.get, messages.put))
        while not service.jobs:
            await asyncio.sleep(0.01)
        task.cancel()
        async with asyncio.timeout(10):
            while service.jobs:
                await asyncio.sleep(0.01)

    asyncio.run(run())
