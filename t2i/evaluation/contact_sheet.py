"""Sheets of many images, drawn with Pillow: with captions, in labelled rows, or as a matrix of similarities."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TEXT_COLOR, BLANK_COLOR, GREEN, RED, BLUE = (30, 30, 30), (244, 244, 244), (20, 140, 60), (200, 50, 40), (40, 90, 160)
MIN_CELL_SIZE, MAX_CELL_SIZE = 96, 256  # side of an image in `build_labelled_rows`: captions and screens must fit
MAX_COLUMNS = 10  # of a band in `build_labelled_rows`
GAP, LINE_HEIGHT = 8, 14
FONT = ImageFont.load_default(size=11)


def build_contact_sheet(images: list[Image.Image], captions: list[str], columns: int = 8) -> Image.Image:
    """Draw images of one size in rows on white, each above its caption."""
    width, height = images[0].size
    cell, line = width + 8, 13
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * (height + 2 * line + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        left, top = i % columns * cell + 4, i // columns * (height + 2 * line + 8) + 4
        sheet.paste(image, (left, top))
        paint_text_lines(pen, (left, top + height), wrap_text(caption, width), line, fill="black")
    return sheet


def build_labelled_rows(rows: Mapping[str, Sequence[Image.Image | None]], captions: list[str]) -> Image.Image:
    """Draw rows of images with the label of each row on the left and captions under the columns.

    Images are fitted into squares of one size. None, or a row that ends early, leaves blank cells. More than ten
    columns are divided into bands below each other.
    """
    side = next(max(image.size) for row in rows.values() for image in row if image is not None)
    shown = min(max(side, MIN_CELL_SIZE), MAX_CELL_SIZE)
    gutter, cell = 120, shown + GAP
    # Bands of equal length, rather than a last one of a single column
    bands = -(-len(captions) // MAX_COLUMNS)
    columns = -(-len(captions) // bands)
    footer = max(len(wrap_text(caption, shown, 3)) for caption in captions) * LINE_HEIGHT + GAP
    sheet = Image.new("RGB", (gutter + columns * cell + GAP, GAP + bands * (len(rows) * cell + footer)), "white")
    pen = ImageDraw.Draw(sheet)
    # A band of at most ten columns: all rows, then the captions
    for start in range(0, len(captions), columns):
        top = GAP + start // columns * (len(rows) * cell + footer)
        part = captions[start : start + columns]
        for label, row in rows.items():
            lines = wrap_text(label, gutter - 2 * GAP, 4)
            paint_text_lines(pen, (GAP, top + (shown - len(lines) * LINE_HEIGHT) // 2), lines)
            for i in range(len(part)):
                corner = (gutter + i * cell, top)
                image = row[start + i] if start + i < len(row) else None
                if image is None:
                    pen.rectangle((*corner, corner[0] + shown - 1, top + shown - 1), fill=BLANK_COLOR)
                else:
                    sheet.paste(resize_to_square(image, shown), corner)
            top += cell
        for i, caption in enumerate(part):
            paint_text_lines(pen, (gutter + i * cell, top - GAP // 2), wrap_text(caption, shown, 3))
    return sheet


def build_similarity_matrix(
    cosines: Tensor, images: Sequence[Image.Image], captions: list[str], label: str, paired: bool = True
) -> Image.Image:
    """Draw cosines, (M, N), of M captions (rows) and N images (columns) as shades of blue.

    paired: caption i belongs to image i, and M = N; their cosine gets a frame, green if it is the largest of its row,
    else red. Not paired: the largest of each row gets a frame. label: name of the comparison. images: may be empty.
    """
    # Layout
    values = cosines.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0)
    rows, columns = values.shape
    cell = min(64, max(20, 1024 // max(rows, columns)))
    left, top = 170, (cell if images else 0) + 2 * GAP
    sheet = Image.new("RGB", (left + columns * cell + GAP, top + rows * cell + 3 * LINE_HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        sheet.paste(resize_to_square(image, cell - 4), (left + i * cell + 2, GAP))

    # Cells, a row for each caption
    low, high = values.min().item(), values.max().item()
    shades = ((values - low) / max(high - low, 1e-6)).tolist()
    nearest = values.argmax(dim=1).tolist()
    for i, caption in enumerate(captions):
        lines = wrap_text(caption, left - 2 * GAP, 1 if cell < 2 * LINE_HEIGHT else 2)
        paint_text_lines(pen, (GAP, top + i * cell + (cell - len(lines) * LINE_HEIGHT) // 2), lines)
        for j in range(columns):
            x, y = left + j * cell, top + i * cell
            color = tuple(round(255 + (ink - 255) * shades[i][j]) for ink in BLUE)
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=color)
            if cell >= 40:
                ink = "white" if shades[i][j] > 0.6 else TEXT_COLOR
                pen.text((x + cell / 2, y + cell / 2), f"{values[i, j]:z.2f}", fill=ink, font=FONT, anchor="mm")
        framed = i if paired else nearest[i]
        frame = (left + framed * cell, top + i * cell, left + (framed + 1) * cell - 2, top + (i + 1) * cell - 2)
        pen.rectangle(frame, outline=GREEN if nearest[i] == framed else RED, width=3)

    # Legend
    legend = f"{label}: {low:z.2f} (white) to {high:z.2f} (blue); "
    hits = sum(nearest[i] == i for i in range(rows))
    legend += f"{hits} of {rows} captions are nearest to their image" if paired else "the largest of a row is framed"
    paint_text_lines(pen, (GAP, top + rows * cell + GAP), wrap_text(legend, sheet.width - 2 * GAP, 2))
    return sheet


def to_pil_images(pictures: Sequence[Tensor]) -> list[Image.Image]:
    """Convert (3, H, W) each in [-1, 1], clamped; values that are not finite become black."""
    images = []
    for picture in pictures:
        pixels = (picture.detach().float() / 2 + 0.5).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        images.append(Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()))
    return images


def resize_to_square(image: Image.Image, side: int) -> Image.Image:
    """Resize to fit a square of this side, with margins where it is no square; enlarged pixels stay sharp squares."""
    longest = max(image.size)
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.NEAREST if longest < side else Image.Resampling.LANCZOS)
    if size == (side, side):
        return image
    square = Image.new("RGB", (side, side), BLANK_COLOR)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def paint_text_lines(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: list[str],
    spacing: int = LINE_HEIGHT,
    fill: object = TEXT_COLOR,
) -> None:
    for i, text in enumerate(lines):
        pen.text((corner[0], corner[1] + i * spacing), text, fill=fill, font=FONT)  # type: ignore[arg-type]


def wrap_text(text: str, width: int, lines: int = 2) -> list[str]:
    """Break a text into at most `lines` lines of this width in pixels; an ellipsis stands for the rest."""
    wrapped = [""]
    for word in text.encode(errors="replace").decode().split():
        longer = f"{wrapped[-1]} {word}".strip()
        if not wrapped[-1] or FONT.getlength(longer[:500]) <= width:
            wrapped[-1] = longer
        elif len(wrapped) < lines:
            wrapped.append(word)
        else:
            wrapped[-1] += "…"
            break
    return [shorten_line(line, width) for line in wrapped]


def shorten_line(line: str, width: int) -> str:
    """Return the line if it fits, else its beginning and an ellipsis."""
    line = line[:500]  # more fits in no image
    if FONT.getlength(line) <= width:
        return line
    while line and FONT.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
