"""Images as arguments of pipelines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.pipelines.inputs import read_images

from t2i.errors import InputError


def picture(width: int = 32, height: int = 32) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_picture_is_the_same_in_every_form(tmp_path: Path):
    image = picture()
    path = tmp_path / "one.png"
    image.save(path)
    values = np.asarray(image)
    tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
    expected = (tensor.double() / 127.5 - 1).float()[None]
    for form in (image, path, str(path), values, values / 255, values[None], tensor, tensor.float() / 255):
        torch.testing.assert_close(read_images(form, 32), expected, rtol=0, atol=1e-6)
    together = read_images([image, path, values, tensor[None]], 32)
    torch.testing.assert_close(together, expected.expand(4, -1, -1, -1), rtol=0, atol=1e-6)


def test_what_a_pipeline_returns_can_be_given_to_the_next():
    shown = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(read_images(shown, 16), shown * 2 - 1)
    torch.testing.assert_close(read_images(shown.permute(0, 2, 3, 1).numpy(), 16), shown * 2 - 1)


def test_the_short_side_is_resized_and_the_middle_cut_out():
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste((0, 0, 255), (24, 0, 40, 16))
    for form in (wide, np.asarray(wide), torch.from_numpy(np.array(wide)).permute(2, 0, 1) / 255):
        middle = read_images(form, 8)[0, :, :, 2:6]
        torch.testing.assert_close(
            middle, torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 8, 4), atol=0.02, rtol=0
        )


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (read_images(clear, 8) == 1).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "image has no images; give one or more"),
        (None, "image must be an image or a list of images, got NoneType"),
        (7, "image must be an image or a list of images, got int"),
        (torch.zeros(8, 8), r"image has the shape \(8, 8\); an array is \(H, W, 3\)"),
        (torch.zeros(8, 8, 3), r"image has the shape \(8, 8, 3\)"),
        (np.zeros((3, 8, 8)), r"image has the shape \(3, 8, 8\)"),
        (torch.zeros(3, 0, 8), "image is 8 x 0: it has no pixels"),
        (torch.full((3, 8, 8), -1.0), r"image has values from -1 to -1; an image of floats has values in \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), "image has values from nan to nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "image is of torch.int64; give uint8"),
        ([picture(), "no-such.png"], "no-such.png"),
        ([picture(), torch.ones(3, 8, 8) * 255], "image 2 has values from 255 to 255"),
        (torch.zeros(1, 1, 1).expand(3, 10_000, 10_000), "image is 10000 x 10000; at most 40 million pixels"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(images: object, message: str):
    with pytest.raises((InputError, FileNotFoundError), match=message) as caught:
        read_images(images, 8)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
