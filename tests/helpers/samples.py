"""Images of one colour, which know their caption, and what a check says of them."""

import io
import json
import random
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageColor
from torch import Tensor

COLORS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black")


@cache
def picture(color: str, kind: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def color_of(image: Tensor) -> str:
    """The colour of a (3, H, W) image."""
    shown = (image.mean(dim=(1, 2)) + 1) * 127.5
    return min(COLORS, key=lambda name: sum(abs(a - b) for a, b in zip(shown.tolist(), ImageColor.getrgb(name))))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def checked(manifest: Path) -> dict[str, dict[str, Any]]:
    """The rows of a manifest by key."""
    return {row["key"]: row for row in pq.read_table(manifest, partitioning=None).to_pylist()}


def reasons(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Why samples were left out, by key."""
    return {key: row["status"] for key, row in rows.items() if row["status"] != "ok"}


def write_mixed_pictures(folder: Path, sizes: list[tuple[int, int]], held_out: int = 0) -> None:
    """Write captioned images of noise, (width, height) each, of which the last ones are held out, and check them."""
    from t2i.data.manifest import write_manifest

    rows = []
    for number, (width, height) in enumerate(sizes):
        image = Image.frombytes("RGB", (width, height), random.Random(number).randbytes(3 * width * height))
        image.save(folder / f"{number:02}.png")
        split = "held_out" if number >= len(sizes) - held_out else "train"
        rows.append(json.dumps({"file_name": f"{number:02}.png", "text": f"noise {number}", "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    write_manifest(folder, quiet=True)
