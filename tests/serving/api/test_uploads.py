"""Uploads over HTTP: bombs and counts are refused before a pixel is decoded, keys take turns, files alone wait."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from PIL import Image
from t2i.pipelines.inputs import read_images
from t2i.pipelines.serving.api import uploads
from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.api.images import GivenImage, StoredImage
from t2i.pipelines.serving.api.requests import plan_draw_request
from t2i.pipelines.serving.api.uploads import Upload, UploadReader

from tests.serving.images import BOMBS, LARGE, UNUSUAL, build_png
from tests.serving.servers import GatedDrawer, build_paint_api, encode_png, run_server

SMALL = encode_png(Image.new("RGB", (32, 32), "teal"))


@pytest.fixture(scope="module")
def port():
    with run_server(build_paint_api()) as server:
        yield server.port


def edit(port: int, *images: bytes, route: str = "edits", mask: bytes | None = None, **fields) -> httpx2.Response:
    files = [("image[]", ("a.png", image)) for image in images]
    files += [] if mask is None else [("mask", ("m.png", mask))]
    return httpx2.post(f"http://127.0.0.1:{port}/v1/images/{route}", data=fields, files=files, timeout=30)


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_no_image_to_decode_is_refused_and_names_its_field(port, name):
    error = edit(port, BOMBS[name], prompt="a").json()["error"]
    assert error["code"] == "invalid_image" and error["param"] == "image" and "\n" not in error["message"]
    masked = edit(port, SMALL, mask=BOMBS[name], prompt="a")
    assert masked.status_code == 400 and masked.json()["error"]["param"] == "mask"


def test_images_of_any_kind_are_decoded(port):
    kinds = UNUSUAL | LARGE
    assert {name: edit(port, kinds[name], prompt="a").status_code for name in kinds} == dict.fromkeys(kinds, 200)


def refuse_to_decode(field, data):
    raise AssertionError("no image was to be decoded")


def test_many_large_images_are_refused_before_one_is_decoded(port, monkeypatch):
    monkeypatch.setattr(uploads, "read_image", refuse_to_decode)
    answer = edit(port, *[build_png(4000)] * 16, prompt="a", weights=[1.0] * 17)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "payload_too_large"
    answer = edit(port, *[SMALL] * 16, route="variations")
    assert answer.status_code == 400 and "must be one file" in answer.json()["error"]["message"]


def test_what_the_fields_forbid_is_refused_before_an_image_is_decoded():
    with pytest.raises(ApiError, match="at most 10"):
        plan_draw_request("edits", {"prompt": "a", "n": 11}, [Upload("a", b"text")])


def test_files_and_fields_are_counted(port):
    mask = encode_png(Image.new("RGBA", (32, 32)))
    found = {
        "17 images": edit(port, *[SMALL] * 17, prompt="a"),
        "17 images and a mask": edit(port, *[SMALL] * 17, mask=mask, prompt="a"),
        "65 fields": edit(port, SMALL, **{f"a{number}": "1" for number in range(65)}),
    }
    assert {answer.status_code for answer in found.values()} == {400}
    messages = [answer.json()["error"]["message"] for answer in found.values()]
    assert messages == [
        "image must be at most 16 files, got 17",
        "a form takes at most 17 files",
        "a form takes at most 64 fields",
    ]
    assert edit(port, *[SMALL] * 16, prompt="a").status_code == 200


def test_a_full_queue_is_noticed_before_an_image_is_decoded(monkeypatch):
    drawer = GatedDrawer()
    with run_server(build_paint_api(drawer, running=1, queued=0)) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(edit, server.port, SMALL, prompt="a")
        assert drawer.began.wait(30)
        monkeypatch.setattr(uploads, "read_image", refuse_to_decode)
        refused = edit(server.port, SMALL, prompt="a")
        drawer.opened.set()
        assert first.result().status_code == 200
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


@pytest.mark.parametrize("keys", [("ann", "ann", "bob"), ("", "", "")])
def test_who_sends_many_images_keeps_others_waiting_for_one(monkeypatch, keys):
    order = []

    def read(field, data):
        order.append(data)
        return GivenImage(Image.new("RGB", (1, 1)), None)

    monkeypatch.setattr(uploads, "read_image", read)
    monkeypatch.setattr(uploads, "count_upload_pixels", lambda field, data: 100)

    async def run() -> None:
        reader, files = UploadReader(2000), [[b"first"] * 4, [b"second"] * 4, [b"third"]]
        given = [[Upload("", data) for data in request] for request in files]
        await asyncio.gather(*(reader.read(each, None, key, lambda: None) for each, key in zip(given, keys)))

    asyncio.run(run())
    # Without keys every request takes turns
    assert order.index(b"third") <= 2 and len(order) == 9
    assert (b"second" in order[:2]) == (keys[1] == "")


def test_an_image_that_a_pipeline_makes_smaller_stays_a_file():
    drawn = Image.effect_noise((96, 64), 90).convert("RGB")
    image = Upload("a.png", encode_png(drawn)).image.pixels
    for _ in range(2):  # for the decoder and for CLIP
        assert torch.equal(read_images(image, 32), read_images(drawn, 32)) and isinstance(image, StoredImage)
    assert image.convert("L").tobytes() == drawn.convert("L").tobytes() and isinstance(image, StoredImage)


def test_requests_that_wait_hold_files_and_are_drawn_from_the_same_pixels():
    drawer = GatedDrawer()
    drawn, mask = Image.effect_noise((32, 32), 90).convert("RGB"), Image.new("RGBA", (32, 32))
    mask.paste((0, 0, 0, 255), (0, 0, 8, 32))
    api = build_paint_api(drawer, running=1)
    with run_server(api) as server, ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(edit, server.port, encode_png(drawn), mask=encode_png(mask), prompt="a") for _ in range(2)]
        while len(api.services["tiny"].jobs) < 2:
            time.sleep(0.01)
        waiting = [job.request for job in api.services["tiny"].jobs]
        given = [(request.image, request.mask) for request in waiting]
        assert all(isinstance(image, StoredImage) for images in given for image in images)
        assert {request.input_bytes for request in waiting} == {2 * 4 * 32 * 32}
        drawer.opened.set()
        assert [answer.result().status_code for answer in sent] == [200] * 2
    for image, hole in given:
        assert image.tobytes() == drawn.tobytes() and type(image) is Image.Image
        assert hole.crop((0, 0, 8, 32)).getextrema() == (0, 0) and hole.getpixel((8, 0)) == 255
    # Those that have ended hold nothing, whoever still refers to them
    assert [(request.inputs, request.mask) for request in waiting] == 2 * [([], None)]
