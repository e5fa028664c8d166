"""Openly licensed sets of emoji in other styles, read from packages of npm by code point or name."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from t2i.data.emoji.keywords import get_code
from t2i.data.emoji.names import Emoji, is_chosen
from t2i.data.emoji.packages import Package, fetch_package, read_package_file, read_package_files
from t2i.data.pictures import decode_image
from t2i.data.reasons import RejectedSample
from t2i.errors import InputError

UNSTYLED_KINDS = ("flags", "skin tones")  # not taken from other sets: they are half of all emoji and show no style
HELD_OUT_ONE_IN = 16
FORBIDDEN_SVG = re.compile(rb"<image|<feImage|<script|<!", re.IGNORECASE)  # could read other files, or grow without end

Drawing = tuple[str, bytes]  # an emoji, as `get_code` gives it, and its WebP or SVG file
Reader = Callable[[Path, dict[str, Emoji]], Iterator[Drawing]]  # of an archive; which emoji are wanted


@dataclass(frozen=True)
class Style:
    """A set of drawings: the word for its style in captions, its package, and what reads it."""

    word: str
    package: Package
    read: Reader


class StyledDrawings:
    """The drawings of a set, of all emoji in training but flags and skin tones, with captions that name the style.

    About every 16th is held out: its emoji is in training in another style, its style with other emoji.
    """

    def __init__(self, style: Style, emoji: list[Emoji], packages: Path):
        """Read the archive, which npm puts into `packages` if it is missing. Raises InputError."""
        self.file = fetch_package(style.package, packages)
        wanted = {
            get_code(item.characters): item
            for item in emoji
            if item.kind not in UNSTYLED_KINDS and item.split == "train"
        }
        try:
            self.files = dict(style.read(self.file, wanted))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{str(self.file)!r} holds no drawings as expected ({error!r})") from error
        # Say now that resvg is missing, not after the other emoji are drawn
        if any(map(is_svg, self.files.values())):
            import_resvg()
        self.emoji = {
            code: replace(item, style=style.word, split=choose_split(item, style))
            for code, item in wanted.items()
            if code in self.files
        }

    def render(self, size: int) -> Iterator[tuple[Emoji, Image.Image]]:
        """Yield the emoji and their images, `size` x `size` pixels on white."""
        for code, item in self.emoji.items():
            try:
                yield item, render_drawing(self.files[code], size)
            except (RejectedSample, ValueError) as error:
                raise InputError(f"{item.text!r} in {str(self.file)!r} cannot be drawn ({error})") from error


def choose_split(item: Emoji, style: Style) -> str:
    return "held_out" if is_chosen(f"{style.word} {item.text}", HELD_OUT_ONE_IN) else "train"


def read_image_files(archive: Path, wanted: dict[str, Emoji], suffix: str) -> Iterator[Drawing]:
    """Yield the files whose names are code points, such as 1f44b.svg."""

    def find_code(name: str) -> str:
        stem = name.rsplit("/", 1)[-1].removesuffix(suffix)
        is_named = name.endswith(suffix) and re.fullmatch(r"[0-9a-f]{2,5}(-[0-9a-f]{2,5})*", stem)
        return get_code("".join(chr(int(part, 16)) for part in stem.split("-"))) if is_named else ""

    for name, content in read_package_files(archive, lambda name: find_code(name) in wanted):
        yield find_code(name), content


def read_icons(archive: Path, wanted: dict[str, Emoji]) -> Iterator[Drawing]:
    """Yield the drawings of a set of Iconify, which finds them by code point, or else by Unicode's name."""
    icons = json.loads(read_package_file(archive, "package/icons.json"))
    names = {
        get_code("".join(chr(int(part, 16)) for part in code.split("-"))): name
        for code, name in json.loads(read_package_file(archive, "package/chars.json")).items()
    }
    for code, item in wanted.items():
        name = names.get(code) or re.sub("[^a-z0-9]+", "-", item.text.lower()).strip("-")
        if svg := build_icon_svg(icons, name):
            yield code, svg


def build_icon_svg(icons: dict[str, Any], name: str) -> bytes | None:
    """Return the SVG of an icon or of an alias, which may be its mirror image; None if there is none."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    # Those of the icon, or of the set, or else Iconify's default
    width, height = (int(icon.get(side, icons.get(side, 16))) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'.encode()


def render_drawing(data: bytes, size: int) -> Image.Image:
    """Return the image of a WebP or SVG file, on white. Raises ValueError or RejectedSample."""
    if is_svg(data):
        if FORBIDDEN_SVG.search(data):
            raise ValueError("its SVG is more than a drawing")
        # By height; a drawing that is wider than high is reduced below
        drawn = import_resvg().svg_to_bytes(
            svg_string=data.decode(), background="white", height=size, skip_system_fonts=True
        )
        image = Image.open(BytesIO(drawn), formats=["PNG"]).convert("RGB")
    else:
        image = decode_image(data)
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def is_svg(data: bytes) -> bool:
    return data.lstrip().startswith(b"<svg")


def import_resvg() -> Any:
    """Import resvg-py. Raises InputError if the extra is not installed."""
    try:
        import resvg_py
    except ImportError as error:
        raise InputError(f"resvg-py is not installed ({error}); pip install 't2i[styles]'") from error
    return resvg_py


STYLES = {
    style.word.lower(): style
    for style in (
        Style("3D", Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"), partial(read_image_files, suffix=".webp")),
        Style("flat", Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"), read_icons),
        Style("outline", Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"), read_icons),
        Style("blob", Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"), read_icons),
        # Graphics by Twitter and contributors, to be credited
        Style("twemoji", Package("@twemoji/svg", "15.0.0", "CC-BY-4.0"), partial(read_image_files, suffix=".svg")),
    )
}


def choose_styles(names: str) -> list[Style]:
    """Return the styles in a text with commas; "all" stands for every style. Raises InputError for an unknown one."""
    chosen = list(STYLES) if names == "all" else [name.strip().lower() for name in names.split(",")]
    for name in chosen:
        if name not in STYLES:
            raise InputError(f"styles must be all, or some of {', '.join(STYLES)}, got {name!r}")
    return [STYLES[name] for name in dict.fromkeys(chosen)]
