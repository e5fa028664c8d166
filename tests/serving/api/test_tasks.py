"""Every image of the API is the one that the command of its task draws with the same seed, with the same record."""

import base64
import io
import json
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from t2i.pipelines import Text2ImagePipeline
from t2i.pipelines.jobs import frames, generation
from t2i.pipelines.jobs.planning import ModelSource, add_shipped_upsampler
from t2i.pipelines.serving.api.fields import name_field
from t2i.pipelines.serving.draw_request import DrawRequest
from t2i.pipelines.serving.drawing import Drawer
from t2i.pipelines.serving.engine import StepEngine
from typer.testing import CliRunner

from t2i import InputError
from t2i.cli import app

ROOT = Path(__file__).resolve().parents[3]
SIDE = 32
STEPS = {"steps": 3, "seed": 7}
PRIOR = STEPS | {"prior_steps": 2}
RECORDED = ("--steps", "3", "--seed", "7")
PRIOR_RECORDED = (*RECORDED, "--prior-steps", "2")


def draw_image(*colors: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    """An image with a stripe of each color."""
    image = Image.new(mode, (SIDE, SIDE))
    for number, color in enumerate(colors):
        image.paste(color, (number * SIDE // len(colors), 0, SIDE, SIDE))
    return image


FILES = {
    "red.png": draw_image((200, 30, 30), (90, 60, 30)),
    "blue.png": draw_image((30, 30, 200), (200, 200, 200)),
    "hole.png": draw_image((0, 0, 0, 0), (0, 0, 0, 255), mode="RGBA"),
    "white.png": draw_image((255, 255, 255), (0, 0, 0)),
    "torn.png": draw_image((200, 30, 30, 255), (90, 60, 30, 0), mode="RGBA"),
}

# The route, its fields, its files, and the command with its arguments
CASES = {
    "text": (
        "generations",
        PRIOR | {"prompt": "a red circle", "n": 2, "negative_prompt": "blue", "guidance_scale": 2, "candidates": 1},
        {},
        ["generate", "a red circle", "-n", "2", "--negative-prompt", "blue", "--guidance-scale", "2"]
        + ["--candidates", "1", *PRIOR_RECORDED],
    ),
    "text of another size and sampler, upsampled": (
        "generations",
        PRIOR | {"prompt": "a red circle", "size": "40x32", "sampler": "unipc", "quality": "low"},
        {},
        ["generate", "a red circle", "--width", "40", "--height", "32", "--sampler", "unipc", *PRIOR_RECORDED],
    ),
    "variations": (
        "variations",
        STEPS | {"n": 2},
        {"image": "red.png"},
        ["variations", "red.png", "-n", "2", *RECORDED],
    ),
    "near variations": (
        "variations",
        STEPS | {"eta": 0.4},
        {"image": "red.png"},
        ["variations", "red.png", "--eta", "0.4", *RECORDED],
    ),
    "the whole image": (
        "edits",
        STEPS | {"prompt": "blue", "strength": 0.7},
        {"image": "red.png"},
        ["image-to-image", "red.png", "--prompt", "blue", "--strength", "0.7", *RECORDED],
    ),
    "a mask": (
        "edits",
        STEPS | {"prompt": "blue"},
        {"image": "red.png", "mask": "hole.png"},
        ["inpaint", "red.png", "hole.png", "--mask-channel", "alpha", "--prompt", "blue", *RECORDED],
    ),
    "a white mask": (
        "edits",
        STEPS | {"prompt": "blue", "mask_mode": "white"},
        {"image": "red.png", "mask": "white.png"},
        ["inpaint", "red.png", "white.png", "--prompt", "blue", *RECORDED],
    ),
    "a transparent part": (
        "edits",
        STEPS | {"prompt": "blue"},
        {"image": "torn.png"},
        ["inpaint", "torn.png", "torn.png", "--mask-channel", "alpha", "--prompt", "blue", *RECORDED],
    ),
    "margins": (
        "edits",
        STEPS | {"prompt": "blue", "left": 8, "top": 0},
        {"image": "red.png"},
        ["outpaint", "red.png", "--left", "8", "--prompt", "blue", *RECORDED],
    ),
    "a text diff": (
        "edits",
        {"steps": 3, "prompt": "blue square", "source": "red circle", "theta": 0.3},
        {"image": "red.png"},
        ["edit", "red.png", "--from", "red circle", "--to", "blue square", "--theta", "0.3", "--steps", "3"],
    ),
    "a text diff by the prior": (
        "edits",
        PRIOR | {"source": "red circle", "target": "blue square", "direction": "prior", "candidates": 1},
        {"image": "red.png"},
        ["edit", "red.png", "--from", "red circle", "--to", "blue square", "--direction", "prior"]
        + ["--candidates", "1", *PRIOR_RECORDED],
    ),
    "a mix": (
        "edits",
        PRIOR | {"prompt": "green", "weights": [1, 2, 0.5]},
        {"image": ["red.png", "blue.png"]},
        ["interpolate", "red.png", "blue.png", "green", "--weights", "1,2,0.5", *PRIOR_RECORDED],
    ),
    "a mix of texts": (
        "generations",
        PRIOR | {"prompt": "red", "texts": ["blue"], "weights": [1, 3]},
        {},
        ["interpolate", "red", "blue", "--weights", "1,3", *PRIOR_RECORDED],
    ),
    "upsampling": (
        "upsamplings",
        {"seed": 7, "steps": 2, "level": 0.1},
        {"image": "red.png"},
        ["upsample", "red.png", "--steps", "2", "--level", "0.1", "--seed", "7"],
    ),
}


def send(address: str, route: str, fields: dict, files: dict, folder: Path) -> list[Image.Image]:
    """Send a request, and return its images."""
    url = f"{address}/v1/images/{route}"
    if route == "generations":
        answer = httpx2.post(url, json=fields, timeout=60)
    else:
        parts = [
            (name, item) for name, items in files.items() for item in ([items] if isinstance(items, str) else items)
        ]
        opened = [(name, (item, (folder / item).read_bytes())) for name, item in parts]
        texts = {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in fields.items()}
        answer = httpx2.post(url, data=texts, files=opened, timeout=60)
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in answer.json()["data"]]


@pytest.fixture
def folder(tmp_path: Path, service, monkeypatch) -> Path:
    """A folder with the files, in which commands draw with the server's model."""
    for name, image in FILES.items():
        image.save(tmp_path / name)
    for module in (generation, frames):
        monkeypatch.setattr(
            module, "load_pipeline", lambda source, kind: kind.from_pipe(service.drawer.engine.pipeline)
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_images_and_records_are_those_of_the_command(case, address, folder, service):
    route, fields, files, command = CASES[case]
    images = send(address, route, fields, files, folder)
    result = CliRunner().invoke(app, [*command, "--model", service.drawer.source.model, "--out", "out"])
    assert result.exit_code == 0, result.output
    drawn = [
        Image.open(path) for path in sorted((folder / "out").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    ]
    assert len(images) == len(drawn)
    for found, expected in zip(images, drawn):
        assert json.loads(found.info["t2i"]) == json.loads(expected.info["t2i"])
        difference = np.asarray(found).astype(int) - np.asarray(expected).astype(int)
        assert found.size == expected.size and abs(difference).max() <= 1


def test_records_name_an_upsampler_beside_the_model_only_where_it_enlarges(pipeline_folder, service):
    """As those of `t2i generate` do, which loads it for `--upsample` alone."""
    source = ModelSource("models/tiny", upsampler="models/larger")
    drawer = Drawer(service.drawer.engine, source)

    def build_record(drawer: Drawer, **settings) -> dict:
        request = DrawRequest("text", settings, 7, inputs=["red"], names=["red"])
        return drawer.plan(drawer.engine.pipeline, request).build_records()[0]

    with StepEngine(Text2ImagePipeline.from_pretrained(pipeline_folder)) as engine:  # has no upsampler
        expected = build_record(Drawer(engine, ModelSource("models/tiny")))
    assert build_record(drawer) == expected and "upsampler" not in expected
    enlarged = build_record(drawer, upsample=1)
    assert enlarged["upsampler"] == "larger" and enlarged["weights"] != expected["weights"]
    # Of a model with its own upsampler, the digest has that of all its parts, as the commands' has
    [own, own_enlarged] = [build_record(service.drawer, **more)["weights"] for more in ({}, {"upsample": 1})]
    assert own == own_enlarged == enlarged["weights"]


def build_change(**settings) -> DrawRequest:
    """A change of an image, with the settings under their names in records."""
    settings = {"source": "red circle", "target": "blue square", "num_inference_steps": 2} | settings
    thetas = settings.get("theta", 1.0)
    count = len(thetas) if isinstance(thetas, list) else 1
    return DrawRequest("text_diff", settings, 7, count, inputs=[FILES["red.png"]], names=["red.png"])


def test_each_place_of_a_strip_is_what_its_theta_alone_draws(service):
    settings = {"direction": "prior", "prior_num_inference_steps": 2, "upsample": 1}
    strip = service.drawer.draw(build_change(**settings, theta=[0.0, 0.5, 1.0]))
    for drawn, theta in zip(strip, (0.0, 0.5, 1.0), strict=True):
        [alone] = service.drawer.draw(build_change(**settings, theta=theta))
        assert drawn.record == alone.record and drawn.record["theta"] == theta and drawn.seed == 7
        assert abs(np.asarray(drawn.image).astype(int) - np.asarray(alone.image)).max() <= 1


def test_what_does_nothing_without_the_direction_of_the_prior_is_noted(service):
    settings = {"prior_num_inference_steps": 2}
    noted = service.drawer.check(build_change(direction="text", **settings))
    assert noted.notes == ["prior_num_inference_steps has no effect without direction='prior'"]
    assert list(noted.stages) == ["inversion", "decoder"]
    checked = service.drawer.check(build_change(direction="prior", **settings))
    assert checked.notes == [] and checked.stages == {"inversion": 2, "prior": 2, "decoder": 2}


def test_the_direction_of_the_prior_is_refused_where_there_is_none(pipeline_folder):
    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder)
    pipeline.register_modules(prior=None, prior_scheduler=None)
    with StepEngine(pipeline) as engine:
        drawer = Drawer(engine, ModelSource("models/tiny"))
        assert "candidates" not in drawer.facts.defaults  # by which the page knows
        with pytest.raises(InputError, match="this model has no prior") as caught:
            drawer.check(build_change(direction="prior"))
    assert name_field(str(caught.value))[0] == "direction"


def test_the_shipped_model_is_served_with_the_shipped_upsampler(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("models/emoji", str(ROOT / "models/emoji")):
        found = add_shipped_upsampler(ModelSource(name))
        assert found == ModelSource(name, upsampler=str(ROOT / "models/emoji-upsampler"))
    given = (ModelSource("models/emoji", upsampler="other"), ModelSource("models/emoji-upsampler"), ModelSource("a/b"))
    assert [add_shipped_upsampler(source) for source in given] == list(given)
