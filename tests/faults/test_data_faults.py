"""Faults of data: files that are cut, swapped, hostile or no files at all, and what a check makes of them."""

import io
import json
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.manifest import open_manifest, write_manifest
from t2i.data.pictures import decode_image, silence_pillow
from t2i.data.reasons import RejectedSample
from t2i.errors import InputError
from tests.faults.record import record
from tests.helpers.processes.forked import run_program
from tests.helpers.samples import COLORS, add, checked, color_of, picture, reasons

ROOT = Path(__file__).resolve().parents[2]
OPENED: list[str] | None = None  # names of files that were opened, while a test listens


def listen(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(listen)


def check(source, **options):
    report = write_manifest(source, held_out=0, quiet=True, **options)
    assert report.ok + report.rejected_count == report.indexed == pq.read_metadata(report.manifest).num_rows
    return checked(Path(report.manifest)), report


def mispaired(folder) -> int:
    """Samples of a manifest whose image is not of the colour that the caption names."""
    try:
        dataset = CaptionedPictures(DataConfig(str(folder), 16, 0), split=None)
    except InputError as error:
        assert "no images" in str(error)
        return 0
    captions = (dataset.get_record(index).text for index in range(len(dataset)))
    return sum(color_of(dataset.load_image(index)) != text for index, text in enumerate(captions))


def shard(path: Path, colors: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """A tar of images and captions; (key, end of the image, end of the caption) of each sample."""
    with tarfile.open(path, "w") as tar:
        for number, color in enumerate(colors):
            add(tar, f"{number:03}.jpg", picture(color, "JPEG"))
            add(tar, f"{number:03}.txt", color.encode())
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    return [(f"{path.name}/{n:03}", *ends[2 * n : 2 * n + 2]) for n in range(len(colors))]


def test_a_shard_cut_anywhere_never_pairs_a_picture_with_another_caption(tmp_path):
    """C1: at every 512-byte edge and in the middle of blocks; the next shard has the same keys."""
    samples = shard(tmp_path / "000.tar", COLORS[:4])
    shard(tmp_path / "001.tar", COLORS[3::-1])
    whole = (tmp_path / "000.tar").read_bytes()
    with tarfile.open(tmp_path / "000.tar") as tar:
        mark = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    edges = range(0, len(whole) + 1, 512)
    cuts = sorted({*edges, *(edge + 100 for edge in edges[:-1])})
    survived = 0
    for cut in cuts:
        (tmp_path / "000.tar").write_bytes(whole[:cut])
        rows, report = check(tmp_path)
        ok = {key for key in rows if key.startswith("000") and rows[key]["status"] == "ok"}
        reported = any(line.startswith("000.tar: ") for line in report.notes.shards)
        survived += (
            mispaired(tmp_path) == 0
            and ok == {key for key, _, caption in samples if caption <= cut}
            and sum(key.startswith("001") for key in rows) == 4
            and set(reasons(rows).values()) <= {"truncated", "no_caption"}
            and reported == (cut < mark + 512)
        )
    record("C1 tar cut at every edge and inside blocks", len(cuts), survived)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_a_picture_cut_at_two_hundred_places_is_refused_or_whole(kind):
    """C2"""
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((120, 90)).save(file, kind)
    data = file.getvalue()
    whole = decode_image(data).tobytes()
    cuts = sorted({*(len(data) * number // 195 for number in range(195)), *range(len(data) - 5, len(data))})
    survived = 0
    for cut in cuts:
        try:
            survived += decode_image(data[:cut]).tobytes() == whole  # only what follows the pixels is missing
        except RejectedSample as error:
            reasons = ("truncated", "damaged", "empty_file", "not_a_picture")
            survived += error.reason.name in reasons or cut < 12  # so little can be of any format
    record(f"C2 {kind} cut at {len(cuts)} places", len(cuts), survived)


def test_what_is_no_picture_has_a_reason_and_some_is_never_opened(tmp_path):
    """C2: web pages, other formats under false names; EPS and SVG by their names are not even opened."""
    global OPENED
    sentinel = tmp_path / "sentinel"
    postscript = (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({sentinel}) (w) file closefile\nshowpage\n".encode()
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    has_heif = find_spec("pillow_heif") is not None
    files = {
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not_a_picture"),
        "text.png": (b"hello", "not_a_picture"),
        "empty.webp": (b"", "empty_file"),
        "eps.jpg": (postscript, "unsupported_format"),
        "svg.png": (svg, "unsupported_format"),
        "xml.png": (b'<?xml version="1.0"?>' + svg, "unsupported_format"),
        "psd.png": (b"8BPS\0\1" + bytes(100), "unsupported_format"),
        "heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(100), "damaged" if has_heif else "unsupported_format"),
        "video.jpg": (b"\0\0\0\x18ftypisom" + bytes(100), "unsupported_format"),
        "real.eps": (postscript, "unsupported_format"),
        "real.svg": (svg, "unsupported_format"),
        "real.psd": (b"8BPS\0\1", "unsupported_format"),
    }
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    OPENED = []
    rows, _ = check(folder)
    opened, OPENED = {Path(name).name for name in OPENED}, None
    assert "page.jpg" in opened  # the listener hears
    survived = sum(rows[name]["status"] == reason for name, (_, reason) in files.items())
    record("C2 no image, or of another format", len(files), survived)
    never = [name for name in files if name.startswith("real.")]
    record("C2 EPS, SVG, PSD never opened", len(never), sum(name not in opened for name in never))
    assert not sentinel.exists()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = pixels or zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    packer = zlib.compressobj(1)
    real = b"".join(packer.compress(bytes(13_001)) for _ in range(13_000)) + packer.flush()
    text = [chunk(b"zTXt", b"k%d\0\0" % number + zlib.compress(bytes(10**6))) for number in range(64)]
    huge = zlib.compress(bytes(10**8))
    return {
        "header.png": png(50_000, 50_000),
        "above.png": png(10_000, 10_000),  # where Pillow only warns
        "limit.png": png(2**31 - 1, 2**31 - 1),
        "real.png": png(13_000, 13_000, pixels=real),
        "texts.png": png(9, 9, *text),
        "text.png": png(9, 9, chunk(b"zTXt", b"k\0\0" + huge)),
        "utf8.png": png(9, 9, chunk(b"iTXt", b"k\0\1\0\0\0" + huge)),
        "profile.png": png(9, 9, chunk(b"iCCP", b"k\0\0" + huge)),
        "header.gif": b"GIF89a\xff\xff\xff\xff\0\0\0" + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x4c\x01\0;",
        "header.bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    }


MEASURE = """
import re, sys, time
from pathlib import Path
from t2i.data.pictures import decode_image, silence_pillow
from t2i.data.reasons import RejectedSample
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
def attempt(data):
    try:
        with silence_pillow():
            decode_image(data)
        return "ok"
    except RejectedSample as error:
        return error.reason.name
for warm in ("PNG", "GIF"):
    attempt(b"\\x89PNG" + bytes(100))
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory("VmRSS"), time.perf_counter()
    reason = attempt(data)
    print(Path(path).name, reason, memory("VmHWM") - before, time.perf_counter() - start)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peaks of memory")
def test_bombs_are_refused_from_the_header_in_little_time_and_memory(tmp_path):
    """C3"""
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-W", "error::UserWarning", "-c", MEASURE, *map(str, sorted(tmp_path.iterdir()))]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {reason for name, reason, *_ in lines if "header" in name or name == "real.png"} == {"too_many_pixels"}
    survived = sum(reason != "ok" and int(growth) < 20 and float(seconds) < 0.5 for _, reason, growth, seconds in lines)
    record("C3 bombs: pixels, text, profiles", len(bombs()), survived)


def hostile_members() -> dict[str, list[tarfile.TarInfo]]:
    def member(name, kind=tarfile.REGTYPE, **more):
        info = tarfile.TarInfo(name)
        info.type = kind
        for key, value in more.items():
            setattr(info, key, value)
        return info

    return {
        "symbolic link": [member("x.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), member("x.txt")],
        "hard link": [member("x.jpg", tarfile.LNKTYPE, linkname="good.jpg"), member("x.txt")],
        "character device": [member("x.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5)],
        "block device": [member("x.jpg", tarfile.BLKTYPE, devmajor=8)],
        "pipe": [member("x.jpg", tarfile.FIFOTYPE)],
        "folder": [member("x.jpg", tarfile.DIRTYPE)],
        "parent folder": [member("../x.jpg"), member("../x.txt")],
        "absolute name": [member("/tmp/x.jpg"), member("/tmp/x.txt")],
        "hidden parent": [member("a/../../x.jpg"), member("a/../../x.txt")],
        "PAX size of 8 EB": [member("x.jpg", pax_headers={"size": str(2**63 - 1)})],
        "PAX size below zero": [member("x.jpg", pax_headers={"size": "-512"})],
        "PAX size that is no number": [member("x.jpg", pax_headers={"size": "many"})],
        "sparse file": [member("x.jpg", pax_headers={"GNU.sparse.size": str(2**60), "GNU.sparse.map": "0,1"})],
        "long name of 8 EB": [member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2**62)],
        "PAX header of 8 EB": [member("x", tarfile.XHDTYPE, size=2**62)],
        "global header of 1 TB": [member("x", tarfile.XGLTYPE, size=2**40)],
        "size below zero": [member("x.jpg", size=-1024)],
        "name of 900 KB": [member("x" * 900_000 + ".jpg")],
        "name with NUL and colour": [member("x\x1b[31m.jpg", pax_headers={"path": "x\0\x1b[31m.jpg"})],
        "name that is not UTF-8": [member("x\udcff.jpg"), member("x\udcff.txt")],
    }


def test_hostile_members_of_a_tar_are_not_followed_written_or_believed(tmp_path):
    """C4"""
    survived, members = 0, hostile_members()
    for number, (what, infos) in enumerate(members.items()):
        folder = tmp_path / f"{number:02}"
        folder.mkdir()
        kind = tarfile.GNU_FORMAT if any(info.size for info in infos) else tarfile.PAX_FORMAT
        with tarfile.open(folder / "0.tar", "w", format=kind, errors="surrogateescape") as tar:
            add(tar, "good.jpg", picture("red", "JPEG"))
            add(tar, "good.txt", b"red")
            for info in infos:
                tar.fileobj.write(info.tobuf(kind, "utf-8", "surrogateescape"))
                tar.offset = tar.fileobj.tell()
        start = time.perf_counter()
        rows, report = check(folder)
        seconds = time.perf_counter() - start
        assert [row["status"] for row in rows.values()].count("ok") == 1, what
        assert rows["0.tar/good"]["status"] == "ok" and seconds < 5, what
        survived += sorted(path.name for path in folder.iterdir()) == ["0.tar", "t2i"] and mispaired(folder) == 0
        assert "\x1b" not in "\n".join(report.format_lines())
    assert not Path("/tmp/x.jpg").exists() and sorted(tmp_path.iterdir())[-1].name == f"{len(members) - 1:02}"
    record("C4 hostile members of tars", len(members), survived)


def test_links_devices_and_sockets_in_a_folder_are_not_read(tmp_path):
    """C4, in folders; a pipe hangs whoever opens it (C10), so this runs in a process with a time limit."""
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture("red"))
    (tmp_path / "outside.txt").write_text("red")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "good.png").write_bytes(picture("red"))
    (folder / "link.png").symlink_to(outside)
    (folder / "broken.png").symlink_to(tmp_path / "nothing")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "up.png").symlink_to("../outside.png")
    os.mkfifo(folder / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "socket.png"))
    server.close()
    names = ["good", "link", "broken", "circle", "device", "up", "pipe", "socket", "caption", "text"]
    for name in names[:-2]:
        (folder / f"{name}.txt").write_text("red")
    for name in names[-2:]:
        (folder / f"{name}.png").write_bytes(picture("red"))
    os.mkfifo(folder / "caption.txt")
    (folder / "text.txt").symlink_to("/etc/passwd")
    (folder / "loop").symlink_to(folder)
    tars = tmp_path / "tars"
    tars.mkdir()
    shard(tars / "0.tar", COLORS)
    os.mkfifo(tars / "1.tar")
    (tars / "2.tar").symlink_to("/dev/zero")
    code = "import sys; from t2i.cli import main\nfor name in sys.argv[1:]:\n sys.argv[1:] = ['data', 'check', name]\n"
    code += " try: main()\n except SystemExit as end: assert not end.code"
    result = run_program(["-c", code, folder, tars], 120)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = {"link.png": "outside_folder", "broken.png": "missing_file", "circle.png": "unreadable"}
    expected |= {"device.png": "outside_folder", "up.png": "outside_folder", "pipe.png": "not_a_file"}
    expected |= {"socket.png": "not_a_file", "caption.png": "not_a_file", "text.png": "outside_folder"}
    found = reasons(checked(folder / "t2i/manifest.parquet"))
    record("C4 links, devices, sockets, pipes", len(expected), sum(found.get(k) == v for k, v in expected.items()))
    shards = json.loads((tars / "t2i/report.json").read_text())
    assert shards["ok"] == len(COLORS)
    named = [any(line.startswith(name) for line in shards["shards"]) for name in ("1.tar", "2.tar")]
    record("C10 pipe or device as a shard", 2, sum(named))


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def test_pickles_in_disguise_are_never_loaded(tmp_path):
    """C5"""
    sentinel = tmp_path / "sentinel"
    payload = pickle.dumps(Payload(sentinel))
    folder = tmp_path / "tars"
    folder.mkdir()
    suffixes = [
        "pyd",
        "pkl",
        "pickle",
        "pt",
        "pth",
        "npy",
        "npz",
        "bin",
        "cbor",
        "mp",
        "ten",
        "jpg",
        "png",
        "json",
        "txt",
    ]
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, suffix in enumerate(suffixes):
            others = {"jpg": picture("red"), "txt": b"red"}
            for name, data in {**others, suffix: payload}.items():
                add(tar, f"{number:02}.{name}", data)
    rows, report = check(folder)
    assert report.ok >= len(suffixes) - 4 and len(rows) == len(suffixes)
    record("C5 pickles in tars", len(suffixes), 0 if sentinel.exists() or mispaired(folder) else len(suffixes))
    pickle.loads(payload)
    assert sentinel.exists()  # the payload works


def test_shards_that_are_empty_missing_or_no_tars_are_named_and_the_rest_is_read(tmp_path):
    """C8"""
    shard(tmp_path / "0000.tar", COLORS)
    shard(tmp_path / "0005.tar", COLORS)
    (tmp_path / "0001.tar").write_bytes(b"")
    (tmp_path / "0002.tar").write_bytes(b"<!DOCTYPE html>" + bytes(2000))
    with tarfile.open(tmp_path / "0003.tar", "w"):
        pass
    _, report = check(tmp_path)
    assert report.ok == report.indexed == 2 * len(COLORS)
    named = [line.split(":")[0] for line in report.notes.shards]
    record("C8 empty, missing or no tar", 3, sum(name in named for name in ("0001.tar", "0002.tar", "0004.tar")))
    assert "0003.tar" not in named  # it holds nothing, and says so


def test_data_that_is_all_bad_stops_at_once_with_the_counts(tmp_path):
    """C9"""
    for number in range(300):
        (tmp_path / f"{number}.png").write_bytes(picture("red"))
        (tmp_path / f"{number}.txt").write_text("red")
    check(tmp_path)
    dataset = CaptionedPictures(DataConfig(str(tmp_path), 16, 0))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(picture("blue"))
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"100 images in a row cannot be read \(100 changed\)"):
        dataset.__getitems__([(number, 0) for number in range(8)])
    record("C9 every image bad", 300, 300 if time.perf_counter() - start < 5 else 0)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_every_flipped_bit_of_a_picture_is_noticed_when_it_is_read(tmp_path, kind):
    """C11"""
    names = {}
    if kind == "tar":
        shard(tmp_path / "0.tar", COLORS)
    else:
        for color in COLORS:
            (tmp_path / f"{color}.png").write_bytes(picture(color))
            (tmp_path / f"{color}.txt").write_text(color)
    names, _ = check(tmp_path)
    dataset = CaptionedPictures(DataConfig(str(tmp_path), 16, 0))
    rng, flips, noticed = random.Random(0), 300, 0
    for _ in range(flips):
        index = rng.randrange(len(dataset))
        row = names[dataset.get_sample_key(index)]
        path = tmp_path / row["file"]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[row["offset"] + rng.randrange(row["size"])] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        batch = dataset.__getitems__([(index, 0)])
        noticed += batch.rejected == [(dataset.get_sample_key(index), "changed")] and batch.index.item() != index
        path.write_bytes(whole)
    assert not dataset.__getitems__([(index, 0) for index in range(len(dataset))]).rejected
    record(f"C11 flipped bits in a {kind}", flips, noticed)


def test_a_replaced_shard_is_refused_by_name_or_noticed(tmp_path):
    """C11: of another size at the start, of the same size when it is read, and by the digest after another check."""
    shard(tmp_path / "0.tar", COLORS)
    check(tmp_path)
    config = DataConfig(str(tmp_path), 16, 0)
    before, dataset = CaptionedPictures(config).compute_digest(), CaptionedPictures(config)
    shard(tmp_path / "0.tar", COLORS[::-1])
    survived = 0
    survived += dataset.__getitems__([(0, 0)]).rejected[0] == ("0.tar/000", "changed")
    shard(tmp_path / "0.tar", COLORS * 9)
    with pytest.raises(InputError, match=r"0\.tar' is another file"):
        open_manifest(tmp_path)
    survived += 1
    shard(tmp_path / "0.tar", COLORS[::-1])
    check(tmp_path)
    survived += CaptionedPictures(config).compute_digest() != before
    record("C11 shard replaced", 3, survived)


def test_damaged_tars_and_pictures_are_always_accounted_for(tmp_path):
    """C12: whatever random damage does, rejected and accepted samples add up, and nothing is paired wrongly."""
    shard(tmp_path / "0.tar", COLORS)
    whole = (tmp_path / "0.tar").read_bytes()
    rng, tries, survived = random.Random(1), 150, 0
    for _ in range(tries):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "0.tar").write_bytes(data)
        try:
            _, report = check(tmp_path)  # asserts that the numbers add up
        except InputError as error:  # nothing is left of the shard
            survived += "no images in" in str(error)
            continue
        survived += report.indexed <= len(COLORS) and "Traceback" not in "\n".join(report.format_lines())
    record("C12 damaged tars accounted for", tries, survived)


def test_damaged_pictures_never_raise_anything_else(tmp_path):
    """C12"""
    rng, tries, survived = random.Random(2), 0, 0
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM"):
        file = io.BytesIO()
        Image.radial_gradient("L").convert("RGB").resize((60, 40)).save(file, kind)
        for _ in range(150):
            data = bytearray(file.getvalue())
            for _ in range(rng.randrange(1, 12)):
                data[rng.randrange(min(len(data), rng.choice((40, len(data)))))] = rng.randrange(256)
            tries += 1
            try:
                with silence_pillow():
                    survived += decode_image(bytes(data)).mode == "RGB"
            except RejectedSample as error:
                survived += bool(error.reason.name)
    record("C12 damaged images have a reason", tries, survived)
