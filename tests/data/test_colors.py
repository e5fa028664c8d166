"""Colours: profiles are converted to sRGB, values of every depth keep their range, and old manifests their images."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms
from t2i.pipelines.inputs import read_images, read_masks

from t2i.config import DataConfig
from t2i.data import CaptionedPictures, open_image
from t2i.data.manifest import METADATA_KEY, write_manifest
from t2i.data.picture_files import compute_picture_digest
from t2i.data.pictures import Reading, decode_image, is_converted, silence_pillow
from t2i.errors import InputError
from t2i.evaluation.picture_sets import FolderPictures
from t2i.sampling.steering import read_image_tensor
from tests.helpers.profiles import SRGB, cmyk_profile, decode, gamma, grey_profile, lab_to_srgb, p3_to_srgb, rgb_profile

GREEN = (100, 180, 90)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(data: bytes) -> list[int]:
    return list(decode_image(data).getpixel((0, 0)))


@pytest.mark.parametrize("color", [GREEN, (255, 255, 255), (0, 0, 0), (200, 120, 100), (255, 0, 0), (13, 200, 250)])
def test_display_p3_becomes_srgb_as_the_matrices_say(color):
    for curve in (decode, gamma):
        data = encode(Image.new("RGB", (4, 4), color), icc_profile=rgb_profile(decode=curve))
        np.testing.assert_allclose(pixel(data), p3_to_srgb(color, curve), atol=1)


def test_a_green_of_a_phone():
    """With the curve of sRGB, which Apple's profile has, and with a gamma of 2.2."""
    assert (p3_to_srgb(GREEN), p3_to_srgb(GREEN, gamma)) == ([65, 182, 77], [64, 184, 76])


def test_every_reader_converts(tmp_path):
    path = tmp_path / "green.png"
    path.write_bytes(encode(Image.new("RGB", (16, 16), GREEN), icc_profile=rgb_profile()))
    expected = (torch.tensor([65, 182, 77]) / 127.5 - 1)[:, None, None].expand(3, 16, 16)
    (tmp_path / "green.txt").write_text("green")
    write_manifest(tmp_path, held_out=0, quiet=True)
    with Image.open(path) as opened:
        pictures = [
            CaptionedPictures(DataConfig(str(tmp_path), 16, 0)).load_image(0),
            read_images(path)[0],
            read_images(opened, 16)[0],
            FolderPictures(tmp_path).get_images([0])[0],
            read_image_tensor(path)[0],
        ]
        again = read_images(open_image(path))[0]  # what was converted is not converted twice
    for picture in [*pictures, again]:
        torch.testing.assert_close(picture, expected, atol=1.01 / 127.5, rtol=0)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L"])
def test_transparency_and_palettes_keep_their_meaning(mode):
    image = Image.new("RGB", (4, 4), GREEN).convert("RGBA")
    image.putpixel((3, 3), (0, 0, 0, 0))
    image = image.convert(mode)
    profile = grey_profile(1.8) if mode in ("L", "LA") else rgb_profile()
    shown = decode_image(encode(image, icc_profile=profile))
    grey = Image.new("RGB", (1, 1), GREEN).convert("L").getpixel((0, 0))
    light = (grey / 255) ** 1.8
    expected = [(1.055 * light ** (1 / 2.4) - 0.055) * 255] * 3 if mode in ("L", "LA") else p3_to_srgb(GREEN)
    np.testing.assert_allclose(shown.getpixel((0, 0)), expected, atol=2)
    if mode in ("RGBA", "LA"):
        assert shown.getpixel((3, 3)) == (255, 255, 255)


def test_deep_grey_is_scaled_before_its_profile_is_applied():
    values = np.array([[0, 257 * 128], [257 * 200, 65535]], np.uint16)
    shown = decode_image(encode(Image.fromarray(values), icc_profile=grey_profile(1.0)))
    light = np.array([0, 128, 200, 255]) / 255
    expected = np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, light * 12.92) * 255
    np.testing.assert_allclose([value for value, *_ in shown.get_flattened_data()], expected, atol=1.5)


def test_ink_is_converted_by_its_profile():
    inks = [(62.0, -20.0, -30.0), (50.0, 40.0, 5.0), (85.0, 0.0, 50.0), (20.0, 0.0, 0.0)]
    profile = cmyk_profile(inks)
    assert pixel(encode(Image.new("CMYK", (8, 8)), "TIFF", icc_profile=profile)) == [255, 255, 255]
    for number, lab in enumerate(inks):
        ink = tuple(255 * (i == number) for i in range(4))
        shown = pixel(encode(Image.new("CMYK", (8, 8), ink), "TIFF", icc_profile=profile))
        np.testing.assert_allclose(shown, lab_to_srgb(lab), atol=3)  # the profile's own steps are of one byte


@pytest.mark.parametrize(
    "profile",
    [b"no profile", rgb_profile()[:300], grey_profile(1.8), cmyk_profile([(50.0, 0.0, 0.0)] * 4), b"\0" * 4000],
)
def test_a_profile_that_is_broken_or_of_another_kind_is_ignored(profile):
    assert pixel(encode(Image.new("RGB", (4, 4), GREEN), "JPEG", quality=100, icc_profile=profile)) == pixel(
        encode(Image.new("RGB", (4, 4), GREEN), "JPEG", quality=100)
    )


def test_a_profile_of_srgb_changes_no_value():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for profile in (rgb_profile(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert decode_image(encode(image, icc_profile=profile)).tobytes() == image.tobytes()


# The digest of data


def write_pictures(folder: Path, profile: bytes | None) -> None:
    folder.mkdir()
    for number, color in enumerate([GREEN, (10, 20, 30)]):
        given = {"icc_profile": profile} if profile and number == 0 else {}
        (folder / f"{number}.png").write_bytes(encode(Image.new("RGB", (16, 16), color), **given))
        (folder / f"{number}.txt").write_text("a color")


def forget_reading(folder: Path) -> None:
    """Make the manifest one that an older version wrote."""
    file = folder / "t2i/manifest.parquet"
    table = pq.read_table(file, partitioning=None)
    about = json.loads(pq.read_metadata(file).metadata[METADATA_KEY])
    del about["reading"]
    detail = [
        None if status == "ok" else text for status, text in zip(*(table[c].to_pylist() for c in ("status", "detail")))
    ]
    table = table.set_column(table.column_names.index("detail"), "detail", [[text or "" for text in detail]])
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), file)


def test_an_older_manifest_reads_pictures_as_they_were_checked_and_keeps_its_digest(tmp_path):
    found = {}
    for name, profile in (("plain", None), ("srgb", rgb_profile(SRGB)), ("p3", rgb_profile())):
        write_pictures(tmp_path / name, profile)
        report = write_manifest(tmp_path / name, held_out=0, quiet=True)
        new = CaptionedPictures(DataConfig(str(tmp_path / name), 16, 0))
        forget_reading(tmp_path / name)
        old = CaptionedPictures(DataConfig(str(tmp_path / name), 16, 0))
        found[name] = (report.converted, new.compute_digest() == old.compute_digest())
        green = torch.tensor(GREEN) / 127.5 - 1
        torch.testing.assert_close(old.load_image(0)[:, 0, 0], green)
        assert torch.equal(new.load_image(0)[:, 0, 0], green) == (name != "p3")
    assert found == {"plain": (0, True), "srgb": (0, True), "p3": (1, False)}


def test_what_is_stored_by_the_digest_of_a_file_stays_valid_where_nothing_is_converted(tmp_path):
    profiles = {"plain": {}, "srgb": {"icc_profile": rgb_profile(SRGB)}, "p3": {"icc_profile": rgb_profile()}}
    for name, given in profiles.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(encode(Image.new("RGB", (4, 4), GREEN), **given))
        same = compute_picture_digest(path) == hashlib.sha256(path.read_bytes()).digest()
        assert same == (name != "p3")
    (tmp_path / "inverted.tif").write_bytes(tiff(RAMP.astype("<u2"), photometric=0))
    assert is_converted(tmp_path / "inverted.tif")
    (tmp_path / "no.png").write_bytes(b"no image")
    assert not is_converted(tmp_path / "no.png")


def test_larger_pictures_are_read_where_the_check_allowed_them(tmp_path, monkeypatch):
    monkeypatch.setattr("t2i.limits.MAX_PIXELS", 100)
    write_pictures(tmp_path / "data", None)
    report = write_manifest(tmp_path / "data", held_out=0, quiet=True)
    assert report.reasons == {"too_many_pixels": 2}
    assert report.examples["too_many_pixels"][0]["detail"] == "16 x 16, at most 0.0001 million"
    write_manifest(tmp_path / "data", held_out=0, quiet=True, reading=Reading(max_pixels=256))
    assert CaptionedPictures(DataConfig(str(tmp_path / "data"), 16, 0)).load_image(1).shape == (3, 16, 16)


# Values of every depth

RAMP = np.array([[0, 64, 128, 255]], np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP),
        Image.fromarray(RAMP.astype(np.uint16) * 257),
        Image.fromarray(RAMP.astype(np.int32)),  # of bytes, as Pillow's own convert("I") has them
        Image.fromarray(RAMP.astype(np.int32) * 257),
        Image.fromarray(RAMP.astype(np.float32)),
        Image.fromarray(RAMP.astype(np.float32) / 255),
        Image.fromarray(RAMP).convert("I"),
        Image.fromarray(RAMP).convert("F"),
    ],
    ids=lambda image: f"{image.mode} to {max(np.asarray(image).ravel()):g}",
)
def test_pillows_deep_modes_have_their_own_ranges(image):
    expected = torch.from_numpy(RAMP).float() / 127.5 - 1
    assert torch.equal(read_images(image)[0], expected[None].expand(3, 1, 4))
    assert read_masks(image, 1, (1, 4)).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("values", [[[-1.0, 3.0]], [[0.0, 70_000.0]], [[0.0, float("nan")]]])
def test_values_out_of_range_are_named(values):
    with pytest.raises(Exception, match="image cannot be read: .* of values from .*, not from 0 to"):
        read_images(Image.fromarray(np.array(values, np.float32)))


def tiff(values: np.ndarray, photometric: int = 1, sample_format: int = 1, bits: int | None = None) -> bytes:
    """A grey TIFF of one strip, written tag by tag."""
    import struct

    bits = bits or values.itemsize * 8
    data = values.tobytes()
    height, width = values.shape[0], values.shape[1] * values.itemsize * 8 // bits
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1)
        + struct.pack("<HH" if kind == 3 else "<I", *([value, 0] if kind == 3 else [value]))
        for tag, kind, value in tags
    )
    data += bytes(len(data) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (255 - RAMP, {"photometric": 0}),
        ((255 - RAMP).astype("<u2") * 257, {"photometric": 0}),
        (RAMP.astype("<u2") * 257, {}),
        ((RAMP.astype(int) - 128).astype(np.int8), {"sample_format": 2}),
        ((RAMP.astype(int) * 257 - 32768).astype("<i2"), {"sample_format": 2}),
    ],
    ids=["inverted", "inverted 16", "16", "signed", "signed 16"],
)
def test_inverted_and_signed_tiffs_show_what_they_mean(values, options):
    assert [value for value, *_ in decode_image(tiff(values, **options)).get_flattened_data()] == RAMP[0].tolist()


def test_twelve_bits_fill_the_range():
    packed = np.array([[0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00]], np.uint8)  # 0, 4095, 2048, 0
    with silence_pillow():
        shown = decode_image(tiff(packed, bits=12))
    assert [value for value, *_ in shown.get_flattened_data()] == [0, 255, 128, 0]


# Masks


def test_a_mask_of_bfloat16_is_read():
    mask = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert read_masks(mask.to(dtype), 1, (1, 4)).flatten().tolist() == [0, 0, 1, 1]


def test_alpha_is_a_mask_on_request_and_white_otherwise(tmp_path):
    picture = Image.new("RGBA", (4, 1), (255, 255, 255, 255))
    picture.putalpha(Image.fromarray(np.array([[255, 200, 90, 0]], np.uint8)))
    picture.save(tmp_path / "hole.png")
    for form in (picture, tmp_path / "hole.png"):
        assert read_masks(form, 1, (1, 4), channel="alpha").flatten().tolist() == [0, 0, 1, 1]
    with pytest.raises(Exception, match="mask_image.* needs an image with transparency, got mode RGB"):
        read_masks(picture.convert("RGB"), 1, (1, 4), channel="alpha")
    with pytest.raises(Exception, match="mask_channel must be one of luminance, alpha; got 'red'"):
        read_masks(picture, 1, (1, 4), channel="red")


def test_a_masks_profile_changes_nothing(tmp_path):
    mask = Image.fromarray(RAMP)
    mask.save(tmp_path / "mask.png", icc_profile=grey_profile(3.0))
    assert read_masks(tmp_path / "mask.png", 1, (1, 4)).flatten().tolist() == [0, 0, 1, 1]


def test_a_broken_exif_tells_nothing():
    data = encode(Image.new("RGB", (8, 8), GREEN), "JPEG", quality=100, exif=b"Exif\0\0no TIFF header")
    assert decode_image(data).size == (8, 8)
    with Image.open(io.BytesIO(data)) as opened:
        assert read_images(opened).shape == (1, 3, 8, 8)


def test_a_pil_picture_is_turned_upright_as_its_exif_says():
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encode(image, exif=exif)))
    upright = read_images(opened)[0]
    assert upright.shape == (3, 20, 10) and upright[0, 2, 5] == -1 and upright[0, 17, 5] == 1
    assert opened.size == (20, 10)  # the caller's image stays as it was
    assert read_masks(opened, 1, (20, 10))[0, 0, 17, 5] == 1


def test_a_file_of_floating_point_values_is_refused_with_what_to_do(tmp_path):
    Image.fromarray(RAMP).convert("F").save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="TIFF of mode F; a file does not state .* save it with 8 or 16 bits"):
        open_image(tmp_path / "a.tiff")
