"""Emoji drawn with the Noto Color Emoji font."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from t2i.errors import InputError

FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BITMAP_SIZE = 109  # the only size of the font's bitmaps, which are 136 x 128 pixels


def load_font(font: Path) -> ImageFont.FreeTypeFont:
    """Load the font. Raises InputError if it is missing, or Pillow lacks raqm."""
    if not font.is_file():
        raise InputError(f"no file {str(font)!r}; install it (apt-get install fonts-noto-color-emoji)")
    if not features.check("raqm"):  # joins the characters of a sequence; Pillow's wheels have it, but not fribidi
        raise InputError("Pillow does not find raqm; install libfribidi0 (apt-get install libfribidi0)")
    return ImageFont.truetype(str(font), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)


def render_character(characters: str, face: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """Draw an emoji, centred on a white square."""
    left, top, right, bottom = (int(edge) for edge in face.getbbox(characters))
    # No smaller than a bitmap's width, so that narrow emoji keep their size relative to others
    side = max(right - left, bottom - top, 136)
    canvas = Image.new("RGB", (side, side), "white")
    corner = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(canvas).text(corner, characters, font=face, embedded_color=True)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)
