"""Buckets: which shapes there are, which image gets which, and what is cropped away."""

import numpy as np
import pytest

from t2i.config import DataConfig
from t2i.data.buckets import (
    assign_buckets,
    compute_lost_fractions,
    format_losses,
    format_shapes_line,
    list_bucket_shapes,
    list_image_shapes,
)
from t2i.errors import InputError

# Sides in steps of 64. Their product is from 48 to 64. 7 x 7 and 6 x 8 are left out: a larger shape has nearly their
# ratio; 5 x 11 is longer than 2 : 1.
OF_512 = [(5, 10), (6, 10), (6, 9), (7, 9), (7, 8)]


def test_the_shapes_of_a_known_size():
    tall = [(64 * long, 64 * short) for short, long in OF_512]
    assert list_bucket_shapes(512, 64, 2.0) == [*tall, (512, 512), *((width, height) for height, width in tall[::-1])]
    assert list_bucket_shapes(128, 32, 2.0) == [(160, 96), (128, 96), (128, 128), (96, 128), (96, 160)]
    assert list_bucket_shapes(64, 16, 1.4) == [(64, 48), (64, 64), (48, 64)]


@pytest.mark.parametrize(
    ("size", "step", "most"), [(512, 64, 2), (1024, 64, 4), (256, 8, 3), (96, 16, 1.5), (768, 32, 2)]
)
def test_shapes_have_the_squares_pixels_and_no_two_are_alike(size, step, most):
    shapes = list_bucket_shapes(size, step, most)
    assert len(shapes) > 2 and (size, size) in shapes and sorted(shapes) == sorted((w, h) for h, w in shapes)
    ratios = np.array([width / height for height, width in shapes])
    assert (np.diff(np.log(ratios)) > np.log(1.0999)).all() and ratios.max() <= most
    assert all(side % step == 0 for shape in shapes for side in shape)
    assert all(0.75 * size**2 <= height * width <= size**2 for height, width in shapes)


def test_a_picture_gets_the_shape_of_which_least_is_cropped_away():
    shapes = list_bucket_shapes(512, 64, 2.0)
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(20, 2000, 500), rng.integers(20, 2000, 500)
    numbers = assign_buckets(heights, widths, shapes)
    lost = compute_lost_fractions(heights, widths, shapes, numbers)
    for height, width, number, fraction in zip(heights, widths, numbers, lost):
        # The largest part of the image that has the shape
        parts = [min(height, width * h / w) * min(width, height * w / h) for h, w in shapes]
        assert parts[number] == pytest.approx(max(parts))
        assert fraction == pytest.approx(1 - max(parts) / (height * width), abs=1e-9)
    known = {(400, 600): (384, 576), (3000, 4000): (448, 576), (1080, 1920): (384, 640), (10, 1000): (320, 640)}
    height, width = (np.array(sides) for sides in zip(*known))
    assert [shapes[number] for number in assign_buckets(height, width, shapes)] == list(known.values())


def test_the_square_alone_loses_what_a_square_loses():
    heights, widths = np.array([30, 20, 10]), np.array([30, 30, 100])
    numbers = assign_buckets(heights, widths, [(64, 64)])
    assert numbers.tolist() == [0, 0, 0]
    lost = compute_lost_fractions(heights, widths, [(64, 64)], numbers)
    np.testing.assert_allclose(lost, [0, 1 / 3, 0.9])
    (line,) = format_losses(lost, "; data.buckets=true keeps shapes")
    assert line == "crops take 41% of the images, and more than 20% of 2 of 3; data.buckets=true keeps shapes"
    assert format_losses(lost[:1]) == []


def test_the_lines_count_pictures_by_shape():
    shapes = list_bucket_shapes(64, 16, 1.4)
    line = "shapes: 1 of 64 x 64, 2 of 64 x 48"
    assert format_shapes_line(shapes, np.array([2, 1, 2])) == line
    assert format_shapes_line(shapes, np.array([2, 1, 2]), 2) == line + "; a step of 2 images repeats some of 64 x 64"
    crops = format_losses(np.array([0.0, 0.3, 0.0]))
    assert crops == ["crops take 10% of the images, and more than 20% of 1 of 3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "data.image_size must be a multiple of 64, got 100"),
        ({"image_size": 64}, "data.bucket_step=64 and data.max_ratio=2 leave no shape but the square"),
        ({"image_size": 512, "max_ratio": 1.05}, "data.max_ratio=1.05 leave no shape"),
        ({"max_ratio": 0.5}, "data.max_ratio must be from 1 to 16"),
        ({"max_crop": 2.0}, "data.max_crop must be from 0 to 1"),
        ({"crop": "left"}, "data.crop must be one of center, random"),
    ],
)
def test_settings_that_make_no_buckets_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        list_image_shapes(DataConfig("x", buckets=True, **settings))


def test_a_ratio_of_buckets_needs_buckets():
    with pytest.raises(InputError, match="data.max_ratio=3 needs data.buckets=true"):
        DataConfig("x", max_ratio=3)
    DataConfig("x", max_ratio=3, buckets=True)
