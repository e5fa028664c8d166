"""Write frames as a video: MP4 with the extra `video`, animated WebP, PNG and GIF without it."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i.checks import check_range
from t2i.errors import InputError
from t2i.files.atomic import create_file_atomically
from t2i.progress import Progress

# Pillow's options. GIF has 256 colours a frame, the others keep every pixel.
ANIMATION_OPTIONS: dict[str, dict[str, Any]] = {".webp": {"lossless": True}, ".png": {}, ".gif": {}}
VIDEO_SUFFIXES = (".mp4", *ANIMATION_OPTIONS)


def write_video(frames: list[Image.Image], path: str | Path, fps: float = 12.0) -> Path:
    """Write frames of one size as a video of the format that the path's suffix names. An older file is replaced.

    Animations repeat forever. MP4 is H.264 with 4:2:0 colours, which every player plays: it loses some detail, and a
    side of an odd number of pixels gets one more. GIF rounds durations to hundredths of a second, the other animations
    to thousandths.

    Raises:
        InputError: for no frames, frames of several sizes, an unknown suffix, fps outside 0.1 to 100, and for MP4
            without the extra.
    """
    path = Path(path)
    check_video_format(path)
    check_range("fps", fps, 0.1, 100)
    if not frames:
        raise InputError(f"no frames for {str(path)!r}; a video needs at least one")
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise InputError(f"the frames of {str(path)!r} have different sizes, {sizes[0]} and {sizes[1]}; give one size")
    frames = [frame.convert("RGB") for frame in frames]
    suffix = path.suffix.lower()
    with Progress("writing the video", len(frames), "frames") as progress, create_file_atomically(path) as unfinished:
        if suffix == ".mp4":
            write_mp4(progress.iterate(frames), frames[0].size, unfinished, fps)
        else:
            options = {"append_images": frames[1:], "loop": 0, "duration": 1000 / fps, **ANIMATION_OPTIONS[suffix]}
            # The format is given by name, for the name of an unfinished file has another suffix.
            with progress.follow_batch(len(frames)):
                frames[0].save(unfinished, suffix[1:].upper(), save_all=True, **options)
    return path


def check_new_video(path: Path) -> None:
    """Raise InputError if a video cannot be written under this name, before any frame is drawn."""
    if path.exists():
        raise InputError(f"{str(path)!r} exists and is not overwritten; give another name")
    check_video_format(path)


def check_video_format(path: Path) -> None:
    """Raise InputError for an unknown suffix, and for MP4 without the extra."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(f"a video's name must end in {', '.join(VIDEO_SUFFIXES)}; got {str(path)!r}")
    if path.suffix.lower() != ".mp4":
        return
    try:
        import av  # noqa: F401
    except ImportError as error:
        others = ", ".join(ANIMATION_OPTIONS)
        raise InputError(
            f"{str(path)!r} needs the extra video: pip install 't2i[video]'; without it, {others} can be written"
        ) from error


def write_mp4(frames: Iterable[Image.Image], size: tuple[int, int], path: Path, fps: float) -> None:
    """Write frames of one size, (width, height), as H.264; odd sides get one more pixel."""
    import av

    width, height = size
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    # "faststart" puts the index first, so that players on the web start before the file has loaded
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for frame in frames:
            # 4:2:0 needs even sides
            pixels = np.pad(np.asarray(frame), odd, mode="edge")
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
