"""HEIC and JPEG XL, which packages of the extra `formats` decode. They are imported for the first such image."""

from contextlib import suppress
from importlib import import_module

ADVICE = "`pip install 't2i[formats]'` reads it"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
JXL_BOX = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
JXL_RATIOS = (1, 12 / 10, 4 / 3, 3 / 2, 16 / 9, 5 / 4, 2)  # width / height, by number from 1 on
JXL_SIZE_BITS = (9, 13, 18, 30)
MODULES = {"HEIF": "pillow_heif.HeifImagePlugin", "JXL": "pillow_jxl"}  # each registers with Pillow when imported


def find_extra_format(data: bytes) -> str | None:
    """Return Pillow's name of a format in `MODULES` by the first bytes of a file; None for any other."""
    # A bare codestream, or one in boxes
    if data[:2] == b"\xff\x0a" or data[:12] == JXL_BOX:
        return "JXL"
    return "HEIF" if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS else None


def register_extra_format(name: str) -> None:
    """Let Pillow read a format of `MODULES`, if its package is installed."""
    with suppress(ImportError):
        import_module(MODULES[name])


def format_name(name: str) -> str:
    return {"HEIF": "HEIC", "JXL": "JPEG XL"}[name]


def read_jxl_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height by the header of a JPEG XL (ISO 18181-1, SizeHeader); None if it has none.

    Its plugin decodes an image as it opens it, so the size has to be known before.
    """
    start = find_jxl_codestream(data)
    if start is None:
        return None
    # Fields follow each other from the lowest bit on; 16 bytes hold all of them
    bits, place = int.from_bytes(data[start + 2 : start + 18], "little"), 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return bits >> (place - count) & ((1 << count) - 1)

    is_small = read(1)

    def read_side() -> int:
        return 8 * (read(5) + 1) if is_small else read(JXL_SIZE_BITS[read(2)]) + 1

    height = read_side()
    # It gives the width, unless it is 0: then the width follows
    ratio = read(3)
    return (int(height * JXL_RATIOS[ratio - 1]) if ratio else read_side()), height


def find_jxl_codestream(data: bytes) -> int | None:
    """Return where the codestream begins, in the file itself or in one of its boxes; None if it is not found."""
    start, kind = 0, b""
    while data[start : start + 2] != b"\xff\x0a":
        size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        header = 8
        # 1 says that a size of eight bytes comes after the kind
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16]), 16
        if kind in (b"jxlc", b"jxlp"):
            return start + header + (4 if kind == b"jxlp" else 0)  # a part begins with its number
        start += size
        # A box of size 0 is the last one, and a smaller one than its header is damaged
        if size < header or start >= len(data):
            return None
    return start
