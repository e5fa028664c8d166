"""Files of images that servers must refuse, and some that they must take."""

import io
import struct
import zlib

from PIL import Image


def build_png(side: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of one bit a pixel, all black, with further chunks before its pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 2) * min(side, 5000)))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    lines = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(lines)


def save(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turn(image: Image.Image) -> bytes:
    """Return a JPEG that says of itself to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(image, "JPEG", exif=exif)


RED = Image.new("RGB", (8, 8), "red")
SMALL = save(Image.new("RGB", (32, 32), "teal"), "PNG")
# Files that are refused before a pixel is decoded
BOMBS = {
    "6300 x 6300 pixels": build_png(6300),
    "20000 x 20000 pixels": build_png(20_000),
    "an animation": save(
        Image.new("RGB", (8, 8)), "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    ),
    "a text of 8 MB": build_png(32, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**23)))),
    "half a file": SMALL[: len(SMALL) // 2],
    "a program for printers": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
}
UNUSUAL = {
    "CMYK": save(Image.new("CMYK", (32, 32)), "JPEG"),
    "16 bits": save(Image.new("I;16", (32, 32)), "PNG"),
    "turned": turn(Image.new("RGB", (32, 16))),
}
LARGE = {"4000 x 4000 pixels": build_png(4000)}
