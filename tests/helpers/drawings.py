"""Captioned drawings of shapes in colours, and changes of their metadata."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw


def draw_shapes(folder: Path) -> None:
    """Fill a new folder with 36 captioned drawings, 4 of them held out."""
    from t2i.data.manifest import write_manifest

    folder.mkdir()
    rows = []
    for i in range(36):
        color, shape = ("red", "green", "blue")[i % 3], ("circle", "square")[i // 3 % 2]
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        box = (4 + i // 6, 4, 20 + i // 6, 20)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=color)
        image.save(folder / f"{i:02}.png")
        split = "held_out" if i % 9 == 8 else "train"
        row = {"file_name": f"{i:02}.png", "text": f"{color} {shape}", "keywords": [color, shape, "drawing"]}
        rows.append(json.dumps(row | {"split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    write_manifest(folder, quiet=True)


def relabel(folder: Path, change: Callable[[dict, int], object]) -> Path:
    """Call `change(row, number)` for every row of a folder's metadata and write the rows."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        change(row, number)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def colored(shapes: Path, target: Path) -> Path:
    """Copy the drawings; the metadata of the copy names their colours."""
    shutil.copytree(shapes, target, ignore=shutil.ignore_patterns("t2i"))
    return relabel(target, lambda row, number: row.update(color=row["text"].split()[0]))
