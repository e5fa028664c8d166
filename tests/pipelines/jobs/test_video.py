"""Videos: what is written can be read again, frame by frame, and what cannot be written is refused in one line."""

import sys

import numpy as np
import pytest
from PIL import Image
from t2i.pipelines.jobs.video import write_video

from t2i.errors import InputError


def frames(count: int = 5, size: tuple[int, int] = (18, 12)) -> list[Image.Image]:
    """A bright bar that walks to the right."""
    pictures = []
    for i in range(count):
        pixels = np.full((size[1], size[0], 3), 40 + i, dtype=np.uint8)
        pixels[:, 3 * i : 3 * i + 3] = (200, 220, 240)
        pictures.append(Image.fromarray(pixels))
    return pictures


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_animations_keep_every_pixel_and_the_time(suffix, tmp_path):
    given = frames()
    path = write_video(given, tmp_path / "new" / f"walk.{suffix}", fps=20)
    with Image.open(path) as found:
        assert found.n_frames == 5 and found.size == (18, 12)
        for i, frame in enumerate(given):
            found.seek(i)
            found.load()
            assert found.info["duration"] == 50
            assert (np.asarray(found.convert("RGB")) == np.asarray(frame)).all()
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_gif_has_all_frames_and_repeats(tmp_path):
    with Image.open(write_video(frames(), tmp_path / "walk.GIF", fps=10)) as found:
        assert (found.n_frames, found.info["duration"], found.info["loop"]) == (5, 100, 0)


@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_an_mp4_shows_the_frames_at_the_rate(size, tmp_path):
    av = pytest.importorskip("av")
    given = frames(size=size)
    with av.open(str(write_video(given, tmp_path / "walk.mp4", fps=12.5))) as file:
        assert file.streams.video[0].average_rate == 12.5
        found = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert [frame.shape for frame in found] == [(48, 64, 3)] * 5
    for ours, theirs in zip(given, found):
        assert np.abs(np.asarray(ours).mean(axis=2) - theirs[: size[1], : size[0]].mean(axis=2)).mean() < 6


def test_an_mp4_without_the_extra_is_refused_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 't2i\[video\]'; without it, .webp, .png, .gif can be written"):
        write_video(frames(), tmp_path / "walk.mp4")


@pytest.mark.parametrize(
    ("given", "name", "fps", "message"),
    [
        ([], "a.webp", 12, "no frames"),
        ([*frames(1), *frames(1, (20, 12))], "a.webp", 12, "different sizes, \\(18, 12\\) and \\(20, 12\\)"),
        (frames(1), "a.avi", 12, "must end in .mp4, .webp, .png, .gif; got"),
        (frames(1), "a.webp", 0, "fps must be from 0.1 to 100, got 0"),
        (frames(1), "a.webp", float("nan"), "fps must be a number from"),
    ],
)
def test_what_is_no_video_is_refused_in_one_line(given, name, fps, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        write_video(given, tmp_path / name, fps)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
