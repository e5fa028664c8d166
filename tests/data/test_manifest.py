"""The manifest and the report: what a check writes, and what training accepts."""

import hashlib
import json
import os
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2i import cli
from t2i.commands.doctor import REQUIRED_PACKAGES
from t2i.config import DataConfig
from t2i.data import CaptionedPictures, iterate_batches
from t2i.data import manifest as manifest_module
from t2i.data.manifest import (
    MANIFEST_SCHEMA,
    MANIFEST_VERSION,
    METADATA_KEY,
    get_default_manifest_folder,
    open_manifest,
    write_manifest,
)
from t2i.data.reasons import RejectedSample
from t2i.errors import InputError
from tests.helpers.samples import COLORS, add, checked, picture, reasons


def folder_of(path, names, size=(16, 16)):
    path.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (path / f"{name}.png").write_bytes(picture(COLORS[number % len(COLORS)], size=(size[0], size[1] + number)))
        (path / f"{name}.txt").write_text(f"image {name}")
    return path


def test_every_sample_is_a_row_and_the_report_agrees(tmp_path):
    folder_of(tmp_path, "abcdefgh")
    (tmp_path / "c.png").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "d.txt").unlink()
    (tmp_path / "e.png").write_bytes(picture("red", size=(7, 100)))
    (tmp_path / "f.png").write_bytes(b"")
    report = write_manifest(tmp_path, held_out=0, quiet=True)
    rows = checked(tmp_path / "t2i/manifest.parquet")
    assert reasons(rows) == {
        "c.png": "not_a_picture",
        "d.png": "no_caption",
        "e.png": "too_small",
        "f.png": "empty_file",
    }
    assert (report.indexed, report.ok, report.rejected_count) == (8, 4, 4) and len(rows) == 8
    written = json.loads((tmp_path / "t2i/report.json").read_text())
    assert written["indexed"] == written["ok"] + sum(reason["count"] for reason in written["rejected"].values())
    assert written["rejected"]["too_small"]["examples"] == [{"key": "e.png", "detail": "7 x 100"}]
    text = "\n".join(report.format_lines())
    for name in ("rejected: 4 of 8", "not_a_picture: 1", "c.png  a web page", "no d.txt"):
        assert name in text
    assert (rows["a.png"]["width"], rows["b.png"]["height"], rows["a.png"]["size"]) == (16, 17, len(picture("red")))
    with Image.open(tmp_path / "t2i/sizes.png") as sizes:
        assert sizes.size == (1080, 420) and len(sizes.getcolors(10_000)) > 10
    assert write_manifest(tmp_path, held_out=0, quiet=True).indexed == 8  # what a check wrote is not a source


def test_copies_are_reported_held_out_together_and_dropped_on_request(tmp_path):
    folder_of(tmp_path, [f"{number:03}" for number in range(200)])
    for number in range(0, 200, 10):
        (tmp_path / f"copy{number:03}.png").write_bytes((tmp_path / f"{number:03}.png").read_bytes())
        (tmp_path / f"copy{number:03}.txt").write_text("a copy")
    report = write_manifest(tmp_path, held_out=0.3, quiet=True)
    rows = checked(tmp_path / "t2i/manifest.parquet")
    assert (report.duplicates.groups, report.duplicates.copies, report.duplicates.in_both_splits) == (20, 20, 0)
    assert ["000.png", "copy000.png"] in report.duplicates.examples or len(report.duplicates.examples) == 3
    assert 35 < report.held_out < 100
    assert all(rows[f"{n:03}.png"]["split"] == rows[f"copy{n:03}.png"]["split"] for n in range(0, 200, 10))
    report = write_manifest(tmp_path, held_out=0.3, drop_duplicates=True, quiet=True)
    assert report.reasons == {"duplicate": 20} and report.ok == 200 and report.duplicates.groups == 0
    assert set(reasons(checked(tmp_path / "t2i/manifest.parquet"))) == {f"copy{n:03}.png" for n in range(0, 200, 10)}


@pytest.mark.parametrize("place", ["folder", "folder/t2i", "folder/t2i/manifest.parquet"])
def test_training_finds_the_manifest(tmp_path, place):
    folder_of(tmp_path / "folder", "abc")
    write_manifest(tmp_path / "folder", held_out=0, quiet=True)
    dataset = CaptionedPictures(DataConfig(str(tmp_path / place), 16, 0))
    assert [dataset.get_sample_key(index) for index in range(3)] == ["a.png", "b.png", "c.png"]
    assert list(dataset.iterate_texts()) == ["image a", "image b", "image c"]
    assert sum(len(part) for part in dataset.iterate_images(2, 1)) == 2


def test_data_sets_of_one_name_have_folders_of_their_own():
    names = ("hub:one/birds", "two/birds", "hub:birds")
    assert [str(get_default_manifest_folder(name)) for name in names] == [
        "data/one--birds",
        "data/two--birds",
        "data/birds",
    ]


def test_data_without_a_manifest_of_ours_is_refused(tmp_path):
    folder_of(tmp_path / "folder", "abc")
    with pytest.raises(InputError, match="no manifest in .*folder'; `t2i data check .*folder` writes one"):
        open_manifest(tmp_path / "folder")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "folder/manifest.parquet")
    with pytest.raises(InputError, match="no manifest in"):
        open_manifest(tmp_path / "folder")
    for about in (
        {"version": MANIFEST_VERSION + 1, "root": ".", "containers": {}},
        {"version": MANIFEST_VERSION},
        [],
        None,
    ):
        schema = MANIFEST_SCHEMA.with_metadata({METADATA_KEY: json.dumps(about)})
        pq.write_table(schema.empty_table(), tmp_path / "folder/manifest.parquet")
        with pytest.raises(InputError, match="has version .*, and this program reads|is not a complete manifest"):
            open_manifest(tmp_path / "folder")
    schema = MANIFEST_SCHEMA.with_metadata(
        {METADATA_KEY: json.dumps({"version": MANIFEST_VERSION, "root": ".", "containers": {}})}
    )
    pq.write_table(schema.empty_table(), tmp_path / "folder/manifest.parquet")
    with pytest.raises(InputError, match="no images of split 'train'"):
        open_manifest(tmp_path / "folder")


def test_a_manifest_cannot_lead_out_of_its_root(tmp_path):
    folder_of(tmp_path / "folder", "ab")
    write_manifest(tmp_path / "folder", held_out=0, quiet=True)
    file = tmp_path / "folder/t2i/manifest.parquet"
    table = pq.read_table(file)
    (tmp_path / "secret.png").write_bytes(picture("red"))
    names = pa.array(["../secret.png", str(tmp_path / "secret.png")])
    table = table.set_column(table.schema.get_field_index("file"), "file", names)
    about = pq.read_metadata(file).metadata[METADATA_KEY]
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: about}), file)
    dataset = CaptionedPictures(DataConfig(str(tmp_path / "folder"), 16, 0))
    with pytest.raises(InputError, match="2 outside_folder"):
        dataset.__getitems__([(0, 0)])


@pytest.mark.parametrize("change", ["write", "write_and_restore_time", "move", "delete", "link"])
def test_pictures_are_hashed_once_and_again_after_every_change(tmp_path, monkeypatch, change):
    folder, other = folder_of(tmp_path / "folder", "ab"), tmp_path / "other.png"
    write_manifest(folder, held_out=0, quiet=True)
    monkeypatch.setattr(manifest_module, "time", SimpleNamespace(time_ns=lambda: 2**62))  # the files are old by then
    manifest, whole, hashed = open_manifest(folder), (folder / "a.png").read_bytes(), []
    counting = SimpleNamespace(sha256=lambda data: hashed.append(data) or hashlib.sha256(data))
    monkeypatch.setattr(manifest_module, "hashlib", counting)
    assert [manifest.read_image(0) for _ in range(3)] == [whole] * 3 and len(hashed) == 1
    before = (folder / "a.png").stat()
    other.write_bytes(whole[:-1] + b"x")
    if change == "move":
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.rename(folder / "a.png")
    elif change.startswith("write"):
        (folder / "a.png").write_bytes(other.read_bytes())
        if change == "write_and_restore_time":
            os.utime(folder / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        (folder / "a.png").unlink()
        if change == "link":
            (folder / "a.png").symlink_to(other)
    with pytest.raises(RejectedSample) as caught:
        manifest.read_image(0)
    expected = {"delete": "missing_file", "link": "outside_folder"}
    assert caught.value.reason.name == expected.get(change, "changed")


def test_other_peoples_folders_are_never_replaced(tmp_path):
    folder_of(tmp_path / "folder", "abc")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    for out, message in ((tmp_path / "mine", "not empty"), (tmp_path / "mine/thesis.txt", "is a file"),
                         (tmp_path / "mine/thesis.txt/x", "cannot be written")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            write_manifest(tmp_path / "folder", out, quiet=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mine"]


def test_a_folder_of_ours_that_holds_the_source_or_anything_else_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    write_manifest(folder_of(tmp_path / "folder", "abc"), out, quiet=True)
    write_manifest(tmp_path / "folder", out, quiet=True)
    folder_of(out / "pictures", "abc")
    for source, target, message in (
        (out / "pictures", out, "is or contains the source"),
        (tmp_path / "folder", tmp_path / "folder", "is or contains the source"),
        (tmp_path / "folder", out, "contains 'pictures', which no check wrote"),
    ):
        with pytest.raises(InputError, match=message):
            write_manifest(source, target, quiet=True)
    assert len(list((out / "pictures").iterdir())) == 6 and (out / "manifest.parquet").exists()


def test_a_check_that_fails_leaves_what_was_there(tmp_path):
    pq.write_table(pa.table({"image": [picture("red")], "text": ["red"]}), tmp_path / "a.parquet")
    write_manifest(tmp_path, quiet=True)
    before = (tmp_path / "t2i/manifest.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[100:])  # its footer is whole
    with pytest.raises(InputError, match=r"b\.parquet.*cannot be read"):
        write_manifest(tmp_path, quiet=True)
    assert (tmp_path / "t2i/manifest.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "t2i"]


def test_the_command_prints_the_report_and_complains_when_nothing_is_left(tmp_path, monkeypatch, capsys):
    folder_of(tmp_path / "folder", "abc")
    monkeypatch.setattr(sys, "argv", ["t2i", "data", "check", str(tmp_path / "folder"), "--held-out", "0"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and "3 images with 3 captions" in capsys.readouterr().out
    for text in (tmp_path / "folder").glob("*.txt"):
        text.write_text(" ")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == 2 and "empty_caption: 3" in captured.out
    assert captured.err.startswith("error: none of 3 samples") and len(captured.err.splitlines()) == 1
    assert json.loads((tmp_path / "folder/t2i/report.json").read_text())["ok"] == 0
    for option, value in (("--held-out", "nan"), ("--held-out", "0.9"), ("--min-size", "0")):
        monkeypatch.setattr(sys, "argv", ["t2i", "data", "check", str(tmp_path / "folder"), option, value])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2 and option[2:] in capsys.readouterr().err


def test_the_report_shows_no_control_characters(tmp_path):
    folder_of(tmp_path, ["\x1b[31mred\x07"])
    (tmp_path / "\x1b[31mred\x07.png").write_bytes(b"")
    assert "\x1b" not in "\n".join(write_manifest(tmp_path, quiet=True).format_lines())


def test_memory_stays_flat_over_a_thousand_steps_on_a_hundred_thousand_rows(tmp_path):
    count = 100_000
    columns = {
        "key": [f"{i:05}.tar/{i:09}" for i in range(count)],
        "file": ["00000.tar"] * count,
        "offset": range(count),
        "size": [1] * count,
        "sha256": [i.to_bytes(32) for i in range(count)],
        "captions": [[f"an image of the number {i}", f"number {i}"] for i in range(count)],
        "keywords": [["number"]] * count,
        "split": ["train"] * count,
        "width": [64] * count,
        "height": [64] * count,
        "status": ["ok"] * count,
        "detail": [""] * count,
    }
    about = json.dumps({"version": MANIFEST_VERSION, "root": ".", "containers": {}})
    schema = MANIFEST_SCHEMA.with_metadata({METADATA_KEY: about})
    pq.write_table(pa.table(columns, schema), tmp_path / "manifest.parquet")
    del columns
    dataset = CaptionedPictures(DataConfig(str(tmp_path), 16, 0))
    dataset.reads_images = False
    assert len(dataset) == count and dataset.manifest.table.nbytes < 40e6
    loader = iterate_batches(dataset, 0, batch_size=32, seed=0)
    for _ in range(10):
        next(loader)
    before = psutil.Process().memory_info().rss
    for _ in range(1_000):
        assert len(next(loader).captions) == 32
    assert psutil.Process().memory_info().rss - before < 20e6


def test_the_doctor_asks_for_every_package_that_the_project_needs():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert sorted(REQUIRED_PACKAGES) == sorted(line.split(">=")[0] for line in project["dependencies"])


def test_pictures_are_checked_in_order_with_few_in_memory(tmp_path, monkeypatch):
    from t2i.data import manifest

    under_way, most = 0, 0

    def items():
        nonlocal under_way, most
        for number in range(500):
            under_way += 1
            most = max(most, under_way)
            yield number

    for expected, result in enumerate(manifest.map_in_order(lambda number: number, items())):
        under_way -= 1
        assert result == expected
    assert most <= 4 * os.cpu_count() and under_way == 0


def test_a_shard_that_changed_is_refused_by_name_before_training(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", picture("red"))
        add(tar, "a.txt", b"red")
    write_manifest(tmp_path, held_out=0, quiet=True)
    assert len(open_manifest(tmp_path)) == 1
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:-512])
    with pytest.raises(InputError, match=r"0\.tar' is another file"):
        open_manifest(tmp_path)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(InputError, match=r"0\.tar.*does not exist"):
        open_manifest(tmp_path)
