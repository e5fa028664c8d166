"""HEIC and JPEG XL, by packages that may be missing."""

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from t2i.data.extra_formats import read_jxl_size
from t2i.data.manifest import write_manifest
from t2i.data.pictures import PILLOW_FORMATS, Reading, decode_image, open_image
from t2i.data.reasons import Reason, RejectedSample
from t2i.errors import InputError
from tests.helpers.samples import checked

PACKAGES = {"HEIF": "pillow_heif.HeifImagePlugin", "JXL": "pillow_jxl"}


def encode(kind: str, size: tuple[int, int] = (40, 20), **options: object) -> bytes:
    """An image whose left half is blue, and its right half red."""
    pytest.importorskip(PACKAGES[kind])
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, 0, size[0] // 2, size[1]))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_picture_is_read_as_its_encoder_wrote_it(kind, tmp_path):
    (tmp_path / "picture").write_bytes(encode(kind))
    image = open_image(tmp_path / "picture")
    assert image.mode == "RGB" and image.size == (40, 20)
    for place, color in (((5, 10), (0, 0, 255)), ((35, 10), (255, 0, 0))):
        assert max(abs(a - b) for a, b in zip(image.getpixel(place), color)) < 12


@pytest.mark.parametrize("size", [(40, 20), (256, 256), (7, 300), (1600, 900), (1023, 513), (40, 24)])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded(size):
    exif = Image.Exif()
    exif[0x010E] = "\u00ff\n" * 20  # looks like the beginning of a codestream
    for options in ({}, {"exif": exif.tobytes()}):
        assert read_jxl_size(encode("JXL", size, **options)) == size
    assert read_jxl_size(b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(100)) is None
    with pytest.raises(RejectedSample, match=f"{size[0]} x {size[1]}, at most 0.0001") as caught:
        decode_image(encode("JXL", size), Reading(max_pixels=100))
    assert caught.value.reason is Reason.too_many_pixels


def test_a_jpeg_xl_is_not_turned_a_second_time():
    """Its decoder turns it; the EXIF is that of the file before."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode("JXL", exif=exif.tobytes())).size == (40, 20)


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_damaged_one_is_named_in_one_line(kind):
    with pytest.raises(RejectedSample) as caught:
        decode_image(encode(kind)[:-30])
    assert caught.value.reason in (Reason.damaged, Reason.truncated) and "libjxl" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
        (b"\xff\x0a" + bytes(100), "JPEG XL"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL"),
    ],
)
def test_without_its_package_the_extra_is_named(data, name, tmp_path, monkeypatch):
    for module in ("pillow_heif", "pillow_heif.HeifImagePlugin", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(Image, "OPEN", {key: value for key, value in Image.OPEN.items() if key not in PACKAGES})
    (tmp_path / "photo.heic").write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}; `pip install 't2i\[formats\]'` reads it") as caught:
        open_image(tmp_path / "photo.heic")
    assert "\n" not in str(caught.value)


def test_other_pictures_import_neither_package(shapes, monkeypatch):
    monkeypatch.setattr("t2i.data.pictures.register_extra_format", lambda name: pytest.fail(name))
    open_image(next(Path(shapes).glob("*.png")))
    assert not set(PILLOW_FORMATS) & set(PACKAGES)


def test_a_folder_of_heic_is_checked_as_one_of_jpeg(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.heic").write_bytes(encode("HEIF"))
        (tmp_path / f"{name}.txt").write_text("two halves")
    assert write_manifest(tmp_path, quiet=True).ok == 2
    assert {row["width"] for row in checked(tmp_path / "t2i/manifest.parquet").values()} == {40}
