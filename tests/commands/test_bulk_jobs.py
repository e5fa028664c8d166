"""Commands over many images: a bad one is named and left out, the others are done, and the exit status says so."""

import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from safetensors import safe_open

from t2i import cli
from t2i.bulk import BulkJob
from t2i.errors import InputError
from t2i.evaluation import retrieval
from t2i.evaluation.retrieval import INDEX_FILE, open_image_index
from tests.commands.test_cli import run
from tests.networks.test_clip import make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and between them a web page, an empty file and a copy of it."""
    root = tmp_path / "pictures"
    root.mkdir()
    for name, color in {"a": "red", "d": "lime", "f": "blue"}.items():
        Image.new("RGB", (40, 40), color).save(root / f"{name}.png")
    (root / "b.jpg").write_text("<!DOCTYPE html>\n")
    (root / "c.png").touch()
    (root / "e.png").touch()
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "clip"
    make().save_pretrained(path)
    return path


def test_a_job_names_what_it_leaves_out_and_a_single_input_is_refused_at_once(capsys):
    job = BulkJob(3, "files")
    with job.skip_bad_input("a"):
        raise InputError("'a' is damaged")
    with job.skip_bad_input("b", OSError):
        raise PermissionError("denied")
    assert capsys.readouterr().err == "left out: 'a' is damaged\nleft out: 'b': denied\n"
    with job.skip_bad_input("c"):
        pass
    job.check_any_left()
    with pytest.raises(InputError, match="2 of 3 files were left out, all others done; the first: 'a' is damaged"):
        job.finish()
    with pytest.raises(RuntimeError), job.skip_bad_input("c"):
        raise RuntimeError
    with pytest.raises(InputError, match="^damaged$"), BulkJob(1).skip_bad_input("a"):
        raise InputError("damaged")
    BulkJob(2).finish()
    job = BulkJob(2)
    for name in "ab":
        with job.skip_bad_input(name):
            raise InputError(f"{name} is damaged")
    with pytest.raises(InputError, match="none of 2 images can be used; the first: a is damaged"):
        job.finish()


def test_a_search_leaves_out_bad_pictures_every_time_and_keeps_the_others(monkeypatch, capsys, folder, clip):
    for _ in range(2):
        status, out, err = run(
            monkeypatch, capsys, "search", "--picture", folder / "d.png", "--in", folder, "--clip", clip
        )
        assert status == 2 and out.startswith("1.0000  d.png\n") and len(out.splitlines()) == 3
        lines = err.splitlines()
        assert len(lines) == 4 and lines[-1].startswith("error: 3 of 6 images were left out")
        assert "b.jpg" in lines[0] and "a web page" in lines[0]
        assert {"c.png", "e.png"} <= set(" ".join(lines[1:3]).replace("'", "/").split("/"))
    with safe_open(folder / INDEX_FILE, "pt") as file:
        assert len(file.get_tensor("image_embeds")) == 3
    for name in "adf":
        (folder / f"{name}.png").unlink()
    with pytest.raises(InputError, match="none of 3 images can be used"):
        open_image_index(make(), folder, job=BulkJob(0))


def test_the_largest_picture_is_set_for_all_commands_that_read_some(monkeypatch, capsys, folder, clip):
    monkeypatch.setenv("T2I_MAX_PIXELS", "1599")  # one pixel less than the three have
    for name in ("b.jpg", "c.png", "e.png"):
        (folder / name).unlink()
    command = ["classify", *sorted(folder.glob("*.png")), "--labels", "cat,dog", "--clip", clip]
    status, _, err = run(monkeypatch, capsys, *command)
    assert status == 2 and "an image of more pixels than --max-megapixels allows" in err
    assert run(monkeypatch, capsys, *command, "--max-megapixels", "0.0016")[0] == 0
    assert run(monkeypatch, capsys, "--max-megapixels", "0.0015", *command)[0] == 2
    status, _, err = run(monkeypatch, capsys, *command, "--max-megapixels", "500")
    assert status == 2 and "max-megapixels must be from 0.001 to 178, got 500" in err
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a cat")
    report = run(monkeypatch, capsys, "data", "check", folder, "--max-megapixels", "0.0015")
    assert "3 x an image of more pixels than --max-megapixels allows" in report[1]


def test_commands_that_take_images_take_the_largest_size():
    taking = {"pictures", "picture", "image", "anchors", "steer_image", "control_image"}
    group = typer.main.get_command(cli.app)
    commands = [one for one in cli.list_commands_below(group) if taking & {parameter.name for parameter in one.params}]
    assert {one.name for one in commands} - {"show"} <= cli.READING_COMMANDS  # `show` reads what is written beside them
    assert {one.name for one in cli.list_commands_below(group)} >= cli.READING_COMMANDS


def test_an_interrupted_search_keeps_what_it_has_embedded(monkeypatch, folder):
    def stop_after_two(clip, paths, job):
        rows = original(clip, paths, job)
        yield next(rows)
        yield next(rows)
        raise KeyboardInterrupt

    original = retrieval.iterate_image_embeds
    monkeypatch.setattr(retrieval, "iterate_image_embeds", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        open_image_index(make(), folder, job=BulkJob(0))
    embedded: list[Path] = []

    def count(clip, paths, job):
        embedded.extend(paths)
        return original(clip, paths, job)

    monkeypatch.setattr(retrieval, "iterate_image_embeds", count)
    assert len(open_image_index(make(), folder, job=BulkJob(0)).names) == 3
    assert [path.name for path in embedded if path.name in ("a.png", "d.png", "f.png")] == ["f.png"]


def test_a_damaged_index_says_how_to_make_it_anew(folder):
    (folder / INDEX_FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match="delete it, and the next search makes the index anew"):
        open_image_index(make(), folder)


def test_labels_and_similarities_are_those_of_the_good_pictures(monkeypatch, capsys, folder, clip, tmp_path):
    paths = [folder / name for name in ("a.png", "b.jpg", "nowhere.png", "f.png")]
    command = ["classify", *paths, "--labels", "cat,dog", "--json", "--clip", clip]
    status, out, err = run(monkeypatch, capsys, *command)
    assert status == 2 and "2 of 4 images were left out" in err
    assert [json.loads(line)["picture"] for line in out.splitlines()] == [str(paths[0]), str(paths[3])]
    both = run(monkeypatch, capsys, "classify", paths[0], paths[3], *command[5:])
    assert both == (0, out, "")
    command = ["similarity", *paths, "--out", tmp_path / "m.png", "--clip", clip]
    status, out, err = run(monkeypatch, capsys, *command)
    assert status == 2 and out == f"{tmp_path / 'm.png'}\n" and "2 of 4" in err
    with Image.open(tmp_path / "m.png") as image:
        assert image.size == (170 + 2 * 64 + 8, 64 + 16 + 2 * 64 + 42)


def test_variations_are_drawn_of_the_good_pictures_with_the_seeds_of_their_places(
    monkeypatch, capsys, folder, pipeline_folder, tmp_path
):
    paths = [folder / name for name in ("a.png", "b.jpg", "f.png")]
    options = ["--model", pipeline_folder, "--steps", 2, "--count", 2, "--seed", 7]
    status, out, err = run(monkeypatch, capsys, "variations", *paths, *options, "--out", tmp_path / "out")
    assert status == 2 and "1 of 3 images were left out" in err
    assert [Path(line).name for line in out.splitlines()] == [
        "a-png-7.png",
        "a-png-8.png",
        "f-png-11.png",
        "f-png-12.png",
    ]
    status, out, err = run(monkeypatch, capsys, "variations", *2 * [paths[1]], *options, "--out", tmp_path / "none")
    assert status == 2 and not out and "none of 2 images can be used" in err and not (tmp_path / "none").exists()


def test_a_picture_that_is_too_large_to_upsample_does_not_keep_the_others(monkeypatch, capsys, tmp_path):
    from t2i.pipelines.jobs import generation

    def check(upsampler, width, height, times):
        if width > 40:
            raise InputError(f"{width} x {height} is too large")

    class Pipeline:
        upsampler = None

        def __call__(self, image, times, generator, **settings):
            return type("Output", (), {"images": [image]})

    monkeypatch.setattr(generation, "check_upsampled_size", check)
    monkeypatch.setattr(generation, "load_pipeline", lambda source, kind: Pipeline())
    for name, side in {"a": 40, "b": 41, "c": 39}.items():
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    status, out, err = run(monkeypatch, capsys, "upsample", *paths, "--out", tmp_path / "out", "--seed", 1)
    assert status == 2 and [Path(line).name for line in out.splitlines()] == ["a-1.png", "c-3.png"]
    assert f"left out: '{paths[1]}': 41 x 41 is too large" in err
