"""Every field of the API, wrong: one line with the field's name, and nothing is drawn."""

import io
from typing import Any

import pytest
from PIL import Image
from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.api.fields import FIELDS, PATHS, name_field, read_fields
from t2i.pipelines.serving.api.requests import add_images, plan_draw_request
from t2i.pipelines.serving.api.uploads import Upload
from t2i.pipelines.serving.api.values import Anything, Choice, Flag, Number, Numbers, Size, Text, Texts, Weights
from t2i.pipelines.serving.gateway.forms import read_form_values

NESTED: list[Any] = []
for _ in range(800):
    NESTED = [NESTED]
NO_NUMBERS = ["x", "1e999", "nan", [1], {"a": 1}, True, 10**400, "0x10", NESTED]
WRONG: dict[type, list[Any]] = {
    Text: [5, True, ["a"], {"a": 1}, "a" * 4097, "  ", "\ud800", NESTED],
    Texts: [5, ["a", 5], ["a", ""], ["a"] * 65, [["a"]], {"a": 1}],
    Flag: [1, "yes", [True], 2.0, {"a": True}, NESTED],
    Number: NO_NUMBERS,
    Numbers: [value for value in NO_NUMBERS if value != [1]] + [[1, "x"], [0] * 65, "0,x", "[0,", [[0]]],
    Weights: [5, "x", [1, "x"], [[1], 2], [[1, "x"]], [-1, 1], [[]], [[1]] * 65, [True, 1], "[[1,", NESTED],
    Choice: ["other", 5, ["png"], {"a": 1}, "PNG ", NESTED],
    Size: ["33", "0x32", "32X32", "-1x32", "5000x32", "32x32x3", 32, ["32x32"], "१२x12", NESTED],
}


def list_wrong_values() -> list[tuple[str, str, Any]]:
    """Each path, field and wrong value."""
    rows = []
    for name, field in FIELDS.items():
        kind = field.kind
        if isinstance(kind, Anything):
            continue
        wrong = list(WRONG[type(kind)])
        limits = kind.each if isinstance(kind, Numbers) else kind
        if isinstance(limits, Number):
            wrong += [limits.low - 1, limits.high + 1] + (
                [limits.low + 0.5, str(limits.low + 0.5)] if limits.whole else []
            )
        rows += [(path, name, value) for path, letter in PATHS.items() if letter in field.routes for value in wrong]
    return rows


def test_a_wrong_value_of_any_field_is_named():
    rows = list_wrong_values()
    assert {name for _, name, _ in rows} == {n for n, field in FIELDS.items() if not isinstance(field.kind, Anything)}
    for path, name, value in rows:
        with pytest.raises(ApiError) as caught:
            read_fields(path, {name: value})
        error = caught.value
        assert (error.status, error.param) == (400, name), (path, name, value)
        assert error.message.startswith(name) and "\n" not in error.message and len(error.message) < 400


def test_a_field_of_another_path_is_refused_and_those_of_the_path_are_listed():
    for path, letter in PATHS.items():
        for name in [name for name, field in FIELDS.items() if letter not in field.routes] + ["colour", "a\nb"]:
            with pytest.raises(ApiError, match="it takes ") as caught:
                read_fields(path, {name: "1"})
            assert (caught.value.param, caught.value.code) == (name, "unknown_parameter")


@pytest.mark.parametrize("value", [None, "", {}, []])
def test_values_that_say_nothing_count_as_absent(value):
    for path in PATHS:
        assert read_fields(path, dict.fromkeys(FIELDS, value)) == {}


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("n", "3", 3),
        ("n", 3.0, 3),
        ("seed", str(2**53 - 1), 2**53 - 1),
        ("stream", "true", True),
        ("guidance_scale", "1.5", 1.5),
        ("size", "auto", None),
        ("size", "64x32", (64, 32)),
        ("theta", 0.5, 0.5),
        ("theta", "0.5", 0.5),
        ("theta", "0,0.5", [0, 0.5]),
        ("theta", ["0", "0.5"], [0, 0.5]),
        ("weights", "1,2", [1, 2]),
        ("weights", ["1", "2"], [1, 2]),
        ("weights", "[[1,0],[0,1]]", [[1, 0], [0, 1]]),
        ("weights", ["1,0", "0,1"], [[1, 0], [0, 1]]),
        ("texts", "a, b", ["a, b"]),
    ],
)
def test_values_of_json_and_of_forms_are_read_alike(name, given, value):
    read = read_fields("/v1/images/edits", {name: given})
    assert read == ({} if value is None else {name: value}) and all(type(v) is type(value) for v in read.values())


def test_a_form_gives_lists_by_brackets_and_by_repetition():
    assert read_form_values({"a": ["1"], "b[]": ["1"], "c": ["1", "2"], "d[][]": ["1", "2"]}) == {
        "a": "1",
        "b": ["1"],
        "c": ["1", "2"],
        "d": [["1", "2"]],
    }
    with pytest.raises(ApiError, match="given twice"):
        read_form_values({"a": ["1"], "a[]": ["1"]})
    with pytest.raises(ApiError, match="seed must be an integer"):
        read_fields("/v1/images/edits", read_form_values({"seed": ["1", "2"]}))


def encode(*colors: tuple[int, ...], size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Upload:
    image = Image.new(mode, size)
    for number, color in enumerate(colors):
        image.paste(color, (number * size[0] // len(colors), 0, *size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Upload("a.png", buffer.getvalue())


def build_draw_request(route, values, images, mask=None):
    request = plan_draw_request(route, values, images, mask)
    add_images(request, values, images, mask)
    return request


RED = encode((200, 0, 0))
HOLE = encode((0, 0, 0, 0), (0, 0, 0, 255), mode="RGBA")
CLEAR, FULL = encode((0, 0, 0, 0), mode="RGBA"), encode((0, 0, 0, 255), mode="RGBA")


@pytest.mark.parametrize(
    ("route", "values", "images", "mask", "param", "message"),
    [
        ("generations", {}, [], None, "prompt", "missing"),
        ("generations", {"prompt": "a", "weights": [1.0]}, [], None, "weights", "two inputs or more"),
        (
            "generations",
            {"prompt": "a", "texts": ["b"], "weights": [1.0]},
            [],
            None,
            "weights",
            "1 numbers .* 2 anchors",
        ),
        ("generations", {"prompt": "a", "texts": ["b"], "weights": [0.0, 0.0]}, [], None, "weights", "positive sum"),
        ("generations", {"prompt": "a", "texts": ["b"], "frames": 3, "n": 2}, [], None, "n", "must be 1"),
        ("generations", {"prompt": "a", "texts": ["b"], "frames": 11}, [], None, "frames", "11 images.*at most 10"),
        (
            "generations",
            {"prompt": "a", "texts": ["b"], "frames": 3, "weights": [1.0, 1.0]},
            [],
            None,
            "frames",
            "leave",
        ),
        ("generations", {"prompt": "a", "texts": ["b"], "negative_prompt": "c"}, [], None, "negative_prompt", "a mix"),
        ("generations", {"prompt": "a", "n": 11}, [], None, "n", "at most 10"),
        ("edits", {"prompt": "a"}, [], None, "image", "missing"),
        ("edits", {"prompt": "a"}, [RED] * 17, None, "image", "at most 16 files, got 17"),
        ("edits", {}, [RED], None, "prompt", "missing"),
        ("edits", {"prompt": "a"}, [Upload("a", b"text")], None, "image", "cannot be read"),
        ("edits", {"prompt": "a"}, [RED], RED, "mask", "no transparency.*mask_mode=white"),
        ("edits", {"prompt": "a"}, [RED], CLEAR, "mask", "all is transparent"),
        ("edits", {"prompt": "a"}, [RED], FULL, "mask", "nothing is transparent"),
        ("edits", {"prompt": "a", "mask_mode": "white"}, [RED], RED, "mask", "nothing is white"),
        (
            "edits",
            {"prompt": "a"},
            [RED],
            encode((0, 0, 0, 0), (0, 0, 0, 255), size=(16, 32), mode="RGBA"),
            "mask",
            "16 x 32",
        ),
        ("edits", {"prompt": "a"}, [RED], Upload("m", b""), "mask", "cannot be read"),
        ("edits", {"prompt": "a", "mask_mode": "white"}, [RED], None, "mask_mode", "no meaning"),
        ("edits", {"prompt": "a", "left": 8}, [RED], HOLE, "mask", "does not go with left"),
        ("edits", {"prompt": "a"}, [RED, RED], HOLE, "mask", "several.*do not go with mask; send one"),
        ("edits", {"prompt": "a", "left": 8, "source": "b"}, [RED], None, "left", "does not go with source"),
        ("edits", {"prompt": "a", "left": 8}, [RED, RED], None, "image", "several.*do not go with left; send one"),
        ("edits", {"prompt": "a", "strength": 0.5, "left": 8}, [RED], None, "strength", "outpainting"),
        ("edits", {"prompt": "a", "size": (32, 32), "strength": 0.5}, [RED, RED], None, "strength", "a mix"),
        ("edits", {"prompt": "a", "inverted": False}, [RED], None, "inverted", "no meaning"),
        ("edits", {"source": "a"}, [RED], None, "target", "missing"),
        ("edits", {"target": "a"}, [RED], None, "source", "missing"),
        ("edits", {"theta": 0.0, "prompt": "a"}, [RED], None, "source", "missing"),
        ("edits", {"source": "a", "target": "b", "prompt": "c"}, [RED], None, "prompt", "differ"),
        ("edits", {"source": "a", "target": "b", "n": 2}, [RED], None, "n", "an image for each theta"),
        ("edits", {"direction": "prior", "prompt": "a"}, [RED], None, "source", "missing"),
        ("edits", {"source": "a", "target": "b", "theta": [0.0] * 11}, [RED], None, "theta", "11 images"),
        ("edits", {"source": "a", "target": "b", "negative_prompt": "c"}, [RED], None, "negative_prompt", "no meaning"),
        ("variations", {}, [], None, "image", "missing"),
        ("variations", {}, [RED, RED], None, "image", "one file"),
        ("upsamplings", {}, [RED, RED], None, "image", "one file"),
    ],
)
def test_fields_and_files_that_do_not_go_together_are_named(route, values, images, mask, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        build_draw_request(route, values, images, mask)
    assert caught.value.status == 400 and caught.value.param == param and "\n" not in caught.value.message


def test_margins_of_0_ask_for_nothing():
    assert build_draw_request("edits", {"prompt": "a", "left": 0}, [RED]).task == "image_to_image"


def test_images_of_a_strip_are_counted():
    mix = build_draw_request("edits", {"frames": 4, "prompt": "a"}, [RED, RED])
    assert mix.count == 7 and mix.settings["weights"][1] == pytest.approx([2 / 3, 1 / 3, 0])
    flat = build_draw_request("edits", {"weights": [[1.0, 0.0, 0.5, 0.5]]}, [RED, RED])
    assert flat.count == 2 and flat.settings["weights"] == [[1, 0], [0.5, 0.5]]
    assert build_draw_request("edits", {"source": "a", "target": "b", "theta": [0.0, 1.0]}, [RED]).count == 2


def test_a_turned_image_is_painted_where_it_is_transparent_upright():
    image = Image.new("RGBA", (48, 32), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 48, 8))  # above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is above comes to the right
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    request = build_draw_request("edits", {"prompt": "a"}, [Upload("a.png", buffer.getvalue())])
    assert request.task == "inpaint" and request.mask is not None and request.mask.size == (32, 48)
    assert request.mask.getbbox() == (24, 0, 32, 48)


def test_messages_of_pipelines_name_the_field():
    assert name_field("num_inference_steps must be 1") == ("steps", "steps must be 1")
    assert name_field("height must be a multiple of 8, got 33") == ("size", "height must be a multiple of 8, got 33")
    assert name_field("mask_image is all white") == ("mask", "mask_image is all white")
    assert name_field("this CLIP embeds both identically") == (None, "this CLIP embeds both identically")
