"""Clients of the API, unmodified: openai for Python and for JavaScript, Open WebUI's requests, curl."""

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import ExifTags, Image

from t2i.files.known_words import KnownWords

SIDE = 32
FEW = {"seed": 7, "steps": 3, "prior_steps": 2}


def encode(color: tuple[int, ...], mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (SIDE, SIDE), color).save(buffer, "PNG")
    return buffer.getvalue()


def decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


RED, BLUE = encode((200, 30, 30)), encode((30, 30, 200))


def test_the_asynchronous_client_draws_edits_and_streams(address):
    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            drawn, mixed = await asyncio.gather(
                client.images.generate(prompt="red", extra_body=FEW),
                client.images.edit(
                    image=[RED, BLUE], prompt="green", extra_body=FEW | {"weights": [[1, 0, 0], [0, 1, 1]]}
                ),
            )
            assert drawn.data[0].seed == 7 and drawn.model == "tiny" and drawn.usage.total_tokens == 0
            assert len(mixed.data) == 2 and decode(mixed.data[1].b64_json).size == (SIDE, SIDE)
            stream = await client.images.generate(prompt="red", stream=True, partial_images=1, extra_body=FEW)
            kinds = [event.type async for event in stream]
            assert kinds == ["image_generation.partial_image", "image_generation.completed"]

    asyncio.run(work())


def test_progress_tells_stages_steps_and_the_time_left(client):
    asked = FEW | {"progress": True, "upsample": 1}
    for _ in range(2):  # the first request shows how long the stages take
        events = list(client.images.generate(prompt="red", stream=True, extra_body=asked))
    assert events[-1].type == "image_generation.completed"
    progress = [event.model_dump() for event in events[:-1]]
    assert {event["type"] for event in progress} == {"t2i.progress"}
    last = {event["stage"]: event for event in progress}
    assert last["upsampler"]["step"] == last["upsampler"]["steps"] == 4 and last["upsampler"]["seconds_left"] == 0
    assert list(last) == sorted(last, key=["prior", "decoder", "upsampler"].index)
    assert last["decoder"]["seconds_left"] > 0 and last["decoder"]["position"] == 0


def test_a_client_asks_again_while_the_queue_is_full(client, service, monkeypatch):
    monkeypatch.setattr(service.admission, "seconds_per_image", 0.01)  # the client waits as long as it is told to
    held = [service.admission.enter(16), service.admission.enter(16)]
    refused = []

    def free_the_queue(response: httpx2.Response) -> None:
        refused.append((response.status_code, response.headers.get("retry-after")))
        while held:
            service.admission.leave(held.pop())

    with httpx2.Client(event_hooks={"response": [free_the_queue]}) as http:
        answer = client.with_options(http_client=http, max_retries=2).images.generate(prompt="red", extra_body=FEW)
    assert answer.data[0].seed == 7
    assert [status for status, _ in refused] == [429, 200] and 1 <= int(refused[0][1]) <= 60


def test_the_requests_of_open_webui_are_answered(address):
    """As `backend/open_webui/routers/images.py` of Open WebUI 0.6 and later builds them."""
    headers = {"Authorization": "Bearer sk-none", "Content-Type": "application/json"}
    body = {"model": "dall-e-2", "prompt": "red", "n": 1, "size": f"{SIDE}x{SIDE}", "response_format": "b64_json"}
    url = f"{address}/v1/images/generations?api-version=2025-04-01-preview"
    answer = httpx2.post(url, json=body | FEW, headers=headers, timeout=60).json()
    assert decode(answer["data"][0]["b64_json"]).size == (SIDE, SIDE)
    # Links, for models that its pattern knows, are fetched with the key
    body = {"model": "tiny", "prompt": "red", "n": 1, "size": f"{SIDE}x{SIDE}", "response_format": "url"}
    link = httpx2.post(url, json=body | FEW, headers=headers, timeout=60).json()["data"][0]["url"]
    fetched = httpx2.get(link, headers={"Authorization": "Bearer sk-none"})
    assert fetched.headers["content-type"] == "image/png"
    # Edits are a form of texts, with one image as `image`, and several as `image[]`
    for files in ([("image", RED)], [("image[]", RED), ("image[]", BLUE)]):
        texts = {"model": "", "prompt": "blue", "n": "1", "size": f"{SIDE}x{SIDE}", "response_format": "b64_json"}
        parts = [(name, (f"image-{number}.png", data, "image/png")) for number, (name, data) in enumerate(files)]
        url = f"{address}/v1/images/edits?api-version=2025-04-01-preview"
        few = {name: str(value) for name, value in FEW.items()}
        answer = httpx2.post(
            url, data=texts | few, files=parts, headers={"Authorization": "Bearer sk-none"}, timeout=60
        )
        assert decode(answer.json()["data"][0]["b64_json"]).size == (SIDE, SIDE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_sends_lists_by_repetition(address, tmp_path: Path):
    (tmp_path / "red.png").write_bytes(RED)
    command = [
        "curl",
        "-sS",
        f"{address}/v1/images/edits",
        "-F",
        "image=@red.png",
        "-F",
        "source=red",
        "-F",
        "target=blue",
    ]
    command += ["-F", "theta=0", "-F", "theta=0.5", "-F", "steps=2", "-F", "response_format=url"]
    answer = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=True).stdout)
    assert [len(item["url"].rpartition("/")[2]) >= 20 for item in answer["data"]] == [True, True]


SCRIPT = """
import fs from "node:fs";
import OpenAI, { toFile } from "openai";
const [address, folder] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const few = { seed: 7, steps: 3, prior_steps: 2 };
const found = { statuses: [] };
const watchedFetch = async (...asked) => {
  const answer = await fetch(...asked);
  found.statuses.push(answer.status);
  if (answer.status === 429) fs.writeFileSync(`${folder}/refused`, "");
  return answer;
};
const patient = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 2, fetch: watchedFetch });
await patient.images.generate({ prompt: "red", ...few });
const drawn = await client.images.generate({ prompt: "red", n: 2, ...few });
found.seeds = drawn.data.map(({ seed }) => seed);
const image = await toFile(Buffer.from(fs.readFileSync(`${folder}/red.png`)), "red.png", { type: "image/png" });
const streamed = fs.createReadStream(`${folder}/blue.png`);  // in chunks, without a length
const edited = await client.images.edit({ image: [image, streamed], prompt: "green", weights: [1, 2, 1], ...few });
found.edited = edited.data.length;
found.events = [];
for await (const event of await client.images.generate({ prompt: "red", stream: true, partial_images: 1, ...few })) {
  found.events.push(event.type);
}
found.models = (await client.models.list()).data.map(({ id }) => id);
try {
  await client.images.generate({ prompt: "red", size: "33x33" });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.param, error.code, error.type];
}
console.log(JSON.stringify(found));
"""


# npm's packages, which `.ci/run` installs
NODE_MODULES = Path(os.environ.get("T2I_NODE_MODULES", Path(__file__).parents[3] / "build" / "npm" / "node_modules"))


def find_node() -> str | None:
    """The node that came by npm, or the system's: version 7 of the client needs node 22."""
    own = NODE_MODULES / ".bin" / "node"
    return str(own) if own.is_file() else shutil.which("node")


@pytest.mark.parametrize("package", ["openai", "openai-6"])
def test_the_javascript_client_draws_edits_and_streams(address, service, monkeypatch, tmp_path: Path, package):
    node = find_node()
    if node is None or not (NODE_MODULES / package).is_dir():
        pytest.skip("needs node, and npm's packages in build/npm: see .ci/run")
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "openai").symlink_to(NODE_MODULES / package)
    (tmp_path / "client.mjs").write_text(SCRIPT)
    monkeypatch.setattr(service.admission, "seconds_per_image", 0.01)  # the client waits as long as it is told to
    held = [service.admission.enter(16), service.admission.enter(16)]
    command = [node, "client.mjs", address, str(tmp_path)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # The queue is full until the client has seen that it is
        while not (tmp_path / "refused").exists() and process.poll() is None:
            time.sleep(0.05)
        for ticket in held:
            service.admission.leave(ticket)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found = json.loads(output)
    assert found["statuses"] == [429, 200]
    assert found["seeds"] == [7, 8] and found["edited"] == 1 and found["models"] == ["tiny"]
    assert found["events"] == ["image_generation.partial_image", "image_generation.completed"]
    assert found["error"] == ["BadRequestError", 400, "size", "invalid_value", "invalid_request_error"]


def test_unknown_words_are_told_and_refused_if_asked(client, caplog):
    answer = client.images.generate(prompt="a round cirkle", extra_body=FEW)
    assert answer.unknown_words == [
        {"word": "round", "near": ["red circle"], "is_keyword": True},
        {"word": "cirkle", "near": ["circle"], "is_keyword": False},
    ]
    with pytest.raises(openai.BadRequestError, match='unknown words: "cirkle"') as caught:
        client.images.generate(prompt="a round cirkle", extra_body=FEW | {"strict": True})
    assert caught.value.param == "prompt"
    assert client.images.generate(prompt="a round circle", extra_body=FEW | {"strict": True}).data
    assert "round" not in caplog.text and "cirkle" not in caplog.text  # prompts are not for the log
    # Without drawing
    found = client.post("/texts", body={"texts": ["red zebra", "blue"]}, cast_to=dict)
    assert found["knows_words"] is True
    assert [[word["word"] for word in text["unknown_words"]] for text in found["data"]] == [["zebra"], []]
    with pytest.raises(openai.BadRequestError, match="texts is missing"):
        client.post("/texts", body={}, cast_to=dict)


def test_unknown_words_are_sought_once_a_request(client, service, monkeypatch):
    sought, find = [], KnownWords.find_unknown_words
    monkeypatch.setattr(KnownWords, "find_unknown_words", lambda *given: sought.append(given[1:]) or find(*given))
    asked = FEW | {"negative_prompt": "blue zebra"}
    answer = client.images.generate(prompt="a round cirkle", extra_body=asked)
    assert [word["word"] for word in answer.unknown_words] == ["round", "cirkle", "zebra"]
    assert sought == [("a round cirkle", "blue zebra")]
    # By a model that is served with --strict
    monkeypatch.setattr(service.drawer, "facts", replace(service.facts, is_strict=True))
    with pytest.raises(openai.BadRequestError, match='unknown words: "cirkle"'):
        client.images.generate(prompt="a round cirkle", extra_body=FEW)


def test_settings_without_effect_are_told(client):
    answer = client.images.generate(
        prompt="red", extra_body=FEW | {"negative_prompt": "blue", "prior_guidance_scale": 1, "safety_identifier": "me"}
    )
    assert answer.notes == ["negative_prompt has no effect: it guides the prior, which is not guided or not used here"]
    cut = client.images.generate(prompt="red " * 200, extra_body=FEW)
    assert "longer than" in cut.notes[0] and "this was cut" in cut.notes[0]
    assert answer.safety_identifier == "me" and answer.timings["total_seconds"] > 0


def test_a_model_says_what_it_takes(client):
    model = client.models.retrieve("dall-e-2")
    assert (model.id, model.size, model.upsample, model.max_n) == ("tiny", [SIDE, SIDE], 2, 10)
    assert model.defaults["steps"] == 25 and "weights" in model.fields["edits"] and "unipc" in model.samplers


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_have_their_settings_in_exif(client, output_format):
    asked = {"prompt": "red é", "output_format": output_format, "output_compression": 50}
    answer = client.images.generate(**asked, extra_body=FEW)
    exif = decode(answer.data[0].b64_json).getexif()
    record = json.loads(exif[ExifTags.Base.ImageDescription].encode("latin-1"))
    assert (record["prompt"], record["seed"], record["num_inference_steps"]) == ("red é", 7, 3)
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0") and comment[8:].decode("utf-16-be").startswith("red é\nSteps: 3, ")
