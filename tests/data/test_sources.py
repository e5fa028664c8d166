"""Every kind of source comes to the same samples, and says what it leaves out and why."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.manifest import write_manifest
from t2i.data.sources.samples import Columns, parse_captions, parse_split
from t2i.errors import InputError
from t2i.texts import read_lines
from tests.helpers.samples import COLORS, add, checked, color_of, picture, reasons


def check(source, **options):
    """The manifest of a source as {key: row}, and the report."""
    report = write_manifest(source, held_out=0, quiet=True, **options)
    return checked(Path(report.manifest)), report


def assert_paired(folder):
    """Every sample of a folder's manifest shows the colour that its caption names."""
    dataset = CaptionedPictures(DataConfig(str(folder), 16, 0), split=None)
    for index in range(len(dataset)):
        assert color_of(dataset.load_image(index)) == dataset.get_record(index).text.split()[-1]
    return len(dataset)


def sidecars(folder):
    for color in COLORS:
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        (folder / f"deep/{color}.v1.JPG").write_bytes(picture(color, "JPEG"))
        (folder / f"deep/{color}.v1.txt").write_text(f"all {color}\n\n a square of {color} \n")


def test_pictures_with_text_files(tmp_path):
    sidecars(tmp_path)
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    (tmp_path / "blue.caption").write_text("only blue")
    (tmp_path / "deep/red.v1.caption").write_text("not this: .txt wins")
    (tmp_path / "lone.txt").write_text("no image")
    (tmp_path / "table.xlsx").write_text("?")
    (tmp_path / ".DS_Store").write_text("?")
    rows, report = check(tmp_path)
    assert rows["deep/red.v1.JPG"]["captions"] == ["all red", "a square of red"]
    assert rows["blue.png"]["captions"] == ["only blue"]
    assert (report.ok, report.indexed, report.captions) == (len(COLORS) + 1, len(COLORS) + 2, 2 * len(COLORS) + 1)
    assert reasons(rows) == {"lone.txt": "no_picture"}
    unread = "text files of images that have another"
    assert report.notes.ignored == {".xlsx": 1, "hidden files": 1, unread: 1}
    assert f"1 {unread}" in "\n".join(report.format_lines())
    assert assert_paired(tmp_path) == report.ok


def test_two_pictures_cannot_share_a_text_file(tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "b.jpg", "c.png"):
        (tmp_path / name).write_bytes(picture("red"))
    (tmp_path / "a.txt").write_text("red")
    (tmp_path / "c.txt").write_text("red")
    assert reasons(check(tmp_path)[0]) == {
        "a.jpg": "repeated_key",
        "a.png": "repeated_key",
        "b.jpg": "no_caption",
        "b.png": "no_caption",
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_pictures_with_metadata(tmp_path, kind):
    rows = []
    for color in COLORS:
        (tmp_path / f"{color}.png").write_bytes(picture(color))
        rows.append({"file_name": f"{color}.png", "text": f"all {color}", "keywords": "plain, bright"})
    if kind == "jsonl":
        rows = [row | {"keywords": ["plain", "bright"]} for row in rows]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        with open(tmp_path / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    (tmp_path / "unnamed.png").write_bytes(picture("red"))
    manifest, report = check(tmp_path)
    assert manifest["red.png"]["captions"] == ["all red"]
    assert manifest["red.png"]["keywords"] == ["plain", "bright"]
    assert reasons(manifest) == {"unnamed.png": "no_caption"} and report.indexed == len(COLORS) + 1
    assert assert_paired(tmp_path) == len(COLORS)


def test_several_captions_in_a_list_and_a_column_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "no", "said": ["one", "two"]}')
    rows, _ = check(tmp_path, columns=Columns(caption="said"))
    assert rows["a.png"]["captions"] == ["one", "two"]


@pytest.mark.parametrize("kind", ["sidecars", "metadata.jsonl", "a.tar"])
def test_columns_that_say_nothing_are_refused(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "a.txt").write_text("red")
    if kind == "metadata.jsonl":
        (tmp_path / kind).write_text('{"file_name": "a.png", "text": "red"}')
    elif kind == "a.tar":
        shard(tmp_path / kind, COLORS)
    for columns in [Columns(image="x")] + [Columns(caption="x")] * (kind == "sidecars"):
        with pytest.raises(InputError, match="-column 'x' does not apply|no column 'x'"):
            check(tmp_path, columns=columns)
    assert check(tmp_path)[1].ok


def test_metadata_in_folders_of_splits(tmp_path):
    for folder, color in (("train", "red"), ("validation", "blue")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(picture(color))
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,caption\nx.png,{color}\n")
    rows, report = check(tmp_path)
    assert {key: row["split"] for key, row in rows.items()} == {"train/x.png": "train", "validation/x.png": "held_out"}
    assert report.format_lines()[1] == "  1 to train on, 1 held out, by the source's splits"


def test_a_caption_cut_by_a_comma_and_a_repeated_column_are_not_read(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture("red"))
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,red, not blue\nb.png,"red, not blue"\n')
    rows, report = check(tmp_path)
    assert rows["metadata.csv:2"]["status"] == "bad_row" and "quotes" in rows["metadata.csv:2"]["detail"]
    assert rows["b.png"]["captions"] == ["red, not blue"] and report.ok == 1
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na.png,red,blue\n")
    with pytest.raises(InputError, match="several columns 'text'"):
        check(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_spreadsheets_are_read(tmp_path, delimiter, encoding):
    (tmp_path / "a.png").write_bytes(picture("red"))
    rows = [["path", "caption", "note"], ["a.png", "ein rötlicher Hund; sitzend, braun", "1,5"]]
    table = io.StringIO()
    csv.writer(table, delimiter=delimiter).writerows(rows)
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python writes the mark of utf-16 and utf-8-sig alone
    (tmp_path / "metadata.csv").write_bytes((mark + table.getvalue()).encode(encoding))
    assert check(tmp_path)[0]["a.png"]["captions"] == [rows[1][1]]


def test_text_of_two_bytes_a_character_is_read_where_a_mark_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "a.txt").write_text("röter\r\nHund", encoding="utf-16")
    assert check(tmp_path)[0]["a.png"]["captions"] == ["röter", "Hund"]
    assert read_lines(tmp_path / "a.txt", "prompts") == ["röter", "Hund"]
    (tmp_path / "a.txt").write_bytes("rot".encode("utf-16-le"))
    assert reasons(check(tmp_path)[0]) == {"a.png": "caption_not_text"}
    row = json.dumps({"file_name": "a.png", "text": "röter Hund"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"{row}\n", encoding="utf-16")
    assert check(tmp_path)[0]["a.png"]["captions"] == ["röter Hund"]
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.csv")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,röt".encode("cp1252"))
    with pytest.raises(InputError, match="metadata.csv' is not CSV in UTF-8 or UTF-16.*CSV UTF-8"):
        check(tmp_path)


def test_captions_end_at_line_ends_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "a.txt").write_bytes("a\fb\u2028c\x85d\r\nnext\n".encode())
    assert check(tmp_path)[0]["a.png"]["captions"] == ["a b c d", "next"]


def test_splits_are_known_in_any_case():
    assert [parse_split(name) for name in ("Train", "TEST", "Validation", "")] == [
        "train",
        "held_out",
        "held_out",
        None,
    ]


def test_bad_rows_of_metadata_are_left_out_by_name(tmp_path):
    for name in ("ok.png", "twice.png", "b.png", "c.png", "d.png", "e.svg"):
        (tmp_path / name).write_bytes(picture("red"))
    (tmp_path / "folder.png").mkdir()
    lines = [
        '{"file_name": "ok.png", "text": "fine"}',
        '{"file_name": "twice.png", "text": "once"}',
        '{"file_name": "./twice.png", "text": "again"}',
        "not json",
        "[" * 100_000,
        '{"text": "no name"}',
        '{"file_name": "../x.png", "text": "x"}',
        '{"file_name": "/etc/passwd", "text": "x"}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "nul\\u0000.png", "text": "x"}',
        '{"file_name": "b.png", "text": " "}',
        '{"file_name": "c.png", "text": 5}',
        '{"file_name": "d.png", "text": "x", "split": "third"}',
        '{"file_name": "e.svg", "text": "x"}',
        '{"file_name": "folder.png", "text": "x"}',
        '{"file_name": "long.png", "text": "' + "x" * 2**20 + '"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    _, report = check(tmp_path)
    assert report.indexed == len(lines) and report.ok == 1
    found = [(row["key"], row["status"]) for row in pq.read_table(report.manifest).to_pylist()]
    assert found == [
        ("ok.png", "ok"),
        ("twice.png", "repeated_key"),
        ("twice.png", "repeated_key"),
        ("metadata.jsonl:4", "bad_row"),
        ("metadata.jsonl:5", "bad_row"),
        ("metadata.jsonl:6", "bad_row"),
        ("metadata.jsonl:7", "outside_folder"),
        ("metadata.jsonl:8", "outside_folder"),
        ("gone.png", "missing_file"),
        ("nul\\0.png", "bad_name"),
        ("b.png", "empty_caption"),
        ("c.png", "caption_not_text"),
        ("d.png", "bad_row"),
        ("e.svg", "unsupported_format"),
        ("folder.png", "not_a_file"),
        ("metadata.jsonl:16", "bad_row"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "a.png", "text": "x", "caption": "y"}', "several columns.*file_name, text, caption"),
        ('{"file_name": "a.png", "title": "x"}', "no column for the caption.*file_name, title"),
        ('{"name": "a.png", "text": "x"}', "no column file_name.*name, text"),
    ],
)
def test_columns_that_are_missing_or_ambiguous_are_listed(tmp_path, content, message):
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        check(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.jsonl"]


def shard(path, colors, last="txt"):
    with tarfile.open(path, "w") as tar:
        for number, color in enumerate(colors):
            add(tar, f"{number:04}.jpg", picture(color, "JPEG"))
            add(tar, f"{number:04}.json", json.dumps({"caption": f"all {color}", "url": "x"}).encode())
            if last == "txt":
                add(tar, f"{number:04}.txt", f"a patch of {color}".encode())


def test_tars_are_read_by_offset_and_paired_by_name_within_a_shard(tmp_path):
    shard(tmp_path / "00000.tar", COLORS)
    shard(tmp_path / "00001.tar", COLORS[::-1], last="json")
    shard(tmp_path / "00004.tar", COLORS[:2])
    (tmp_path / "00000_stats.json").write_text('{"successes": 9}')
    (tmp_path / "00001_stats.json").write_text(json.dumps({"successes": len(COLORS)}))
    (tmp_path / "00000.parquet").write_text("what img2dataset writes beside a shard")
    rows, report = check(tmp_path)
    assert not reasons(rows) and report.ok == 2 * len(COLORS) + 2
    assert rows["00000.tar/0000"]["captions"] == [f"a patch of {COLORS[0]}"]
    assert rows["00001.tar/0000"]["captions"] == [f"all {COLORS[-1]}"]
    assert report.notes.shards == [
        "00002.tar and 1 more: missing between the first and the last shard",
        f"00000.tar: {len(COLORS)} samples, 00000_stats.json counts 9",
    ]
    assert assert_paired(tmp_path) == report.ok


def test_files_of_a_sample_need_not_be_neighbours_but_must_be_one_of_a_kind(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for color in ("red", "blue"):
            add(tar, f"{color}.jpg", picture(color, "JPEG"))
        for color in ("red", "blue"):
            add(tar, f"{color}.txt", color.encode())
        for name in ("two.jpg", "two.png", "again.txt", "again.txt", "my.photo.1.jpg", "my.photo.2.jpg"):
            add(tar, name, picture("red"))
        add(tar, "lone.txt", b"lone")
        add(tar, "bare.png", picture("red"))
    rows, report = check(tmp_path / "a.tar")
    assert reasons(rows) == {
        "a.tar/two": "repeated_key",
        "a.tar/again": "repeated_key",
        "a.tar/my": "repeated_key",
        "a.tar/lone": "no_picture",
        "a.tar/bare": "no_caption",
    }
    assert Path(report.manifest) == tmp_path / "a-t2i/manifest.parquet"
    assert assert_paired(tmp_path / "a.tar") == 2


def test_a_tar_behind_a_tar_is_reported(tmp_path):
    shard(tmp_path / "a.tar", COLORS[:1])
    shard(tmp_path / "b.tar", COLORS[1:2])
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(both)
    _, report = check(tmp_path)
    assert report.ok == 2 and len(report.notes.shards) == 1
    assert f"of {len(both):,}; what follows, such as another tar, is not read" in report.notes.shards[0]


def test_a_stray_tar_or_table_beside_pairs_is_passed_over_and_one_of_pictures_is_read(tmp_path):
    sidecars(tmp_path)
    with tarfile.open(tmp_path / "backup.tar", "w") as tar:
        add(tar, "notes.txt", b"none")
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "numbers.parquet")
    _, report = check(tmp_path)
    assert report.ok == len(COLORS) and report.notes.ignored == {".tar": 2, ".parquet": 1}
    shard(tmp_path / "backup.tar", COLORS[:2])
    assert check(tmp_path)[1].ok == 2


def test_a_check_that_finds_no_sample_says_what_is_there_and_keeps_the_manifest(tmp_path):
    shard(tmp_path / "a.tar", COLORS)
    before = Path(check(tmp_path)[1].manifest)
    (tmp_path / "a.tar").write_bytes(b"no tar")
    (tmp_path / "a.png").write_bytes(picture("red"))
    with pytest.raises(
        InputError, match=r"no images in .*, read from a\.tar; a\.tar: not a tar.*; ignored files: 1 \.png"
    ):
        check(tmp_path)
    assert len(checked(before)) == len(COLORS)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar"])
def test_compressed_tars_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        add(tar, "a.jpg", picture("red"))
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="compressed"):
            check(source)


def table(colors, struct=True, **more):
    pictures = [picture(color) for color in colors]
    image = [{"bytes": data, "path": None} for data in pictures] if struct else pictures
    return pa.table({"image": image, "text": [f"all {color}" for color in colors], **more})


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_files(tmp_path, struct):
    source = tmp_path / "source"
    (source / "data").mkdir(parents=True)
    pq.write_table(table(COLORS, struct, other=[1] * len(COLORS)), source / "data/train-00000-of-00001.parquet")
    pq.write_table(table(COLORS[:2], struct), source / "data/test-00000-of-00001.parquet")
    rows, report = check(source)
    assert report.ok == len(COLORS) + 2 and report.held_out == 2
    assert rows["data/train-00000-of-00001.parquet/0"]["captions"] == [f"all {COLORS[0]}"]
    os.rename(source, tmp_path / "moved")  # what the check wrote moves with it
    assert assert_paired(tmp_path / "moved") == report.ok


def test_parquet_files_that_the_disk_cannot_hold_are_refused(tmp_path, monkeypatch):
    rows = table(COLORS, ignored=[b"x" * 10_000] * len(COLORS))
    pq.write_table(rows, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    needed = sum(len(picture(color)) for color in COLORS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=r"copied uncompressed into .*: that takes 0\.0 GB, and 0\.0 GB are free"):
        check(tmp_path, columns=Columns("image"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * needed))
    assert check(tmp_path, columns=Columns("image"))[1].ok == len(COLORS)


def test_rows_without_a_picture_or_a_caption_are_left_out(tmp_path):
    image = [{"bytes": picture("red"), "path": None}, None, {"bytes": None, "path": "/etc/passwd"}, {"bytes": b""}]
    image += [{"bytes": picture("blue"), "path": None}]
    kinds = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    captions = [["one", "two"], ["x"], ["x"], ["x"], None]
    pq.write_table(pa.table({"image": pa.array(image, kinds), "caption": captions}), tmp_path / "a.parquet")
    rows, _ = check(tmp_path / "a.parquet")
    assert rows["a.parquet/0"]["captions"] == ["one", "two"]
    names = ["no_picture", "no_picture", "empty_file", "no_caption"]
    assert reasons(rows) == {f"a.parquet/{number}": name for number, name in enumerate(names, start=1)}


def test_text_in_parquet_that_is_not_utf8_costs_its_row_alone(tmp_path):
    text = pa.array([b"red", b"caf\xe9", b"blue"], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [picture("red")] * 3, "text": text}), tmp_path / "a.parquet")
    rows, _ = check(tmp_path / "a.parquet")
    assert reasons(rows) == {"a.parquet/1": "caption_not_text"} and rows["a.parquet/2"]["captions"] == ["blue"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"url": ["x"], "text": ["x"]}, "no column.*contains images.*url, text"),
        ({"image": [b"x"], "mask": [b"x"], "picture": [b"x"], "text": ["x"]}, "several columns.*image, mask, picture"),
        ({"image": [b"x"], "label": [1]}, "no column for the caption.*image, label"),
    ],
)
def test_parquet_columns_are_found_or_listed(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        check(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'nothing'"):
        check(tmp_path / "a.parquet", columns=Columns("nothing", "nothing"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_what_datasets_loads_is_read_from_its_cache_by_offset(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    pq.write_table(table(COLORS), tmp_path / "set/train-00000-of-00001.parquet")
    pq.write_table(table(COLORS[:3]), tmp_path / "set/validation-00000-of-00001.parquet")
    rows, report = check(f"hub:{tmp_path / 'set'}", out=tmp_path / "out")
    assert report.ok == len(COLORS) + 3 and report.held_out == 3
    assert {Path(row["file"]).suffix for row in rows.values()} == {".arrow"}
    assert assert_paired(tmp_path / "out") == report.ok


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no_caption"),
        ([], "no_caption"),
        ("", "empty_caption"),
        (["", " "], "empty_caption"),
        (3, "caption_not_text"),
        (["x", 3], "caption_not_text"),
        ("a\0b", "caption_not_text"),
        ("\ud800", "caption_not_text"),
        ("x" * 4097, "caption_too_long"),
        (["x" * 4000] * 20, "caption_too_long"),
    ],
)
def test_captions_that_cannot_be_used_have_a_reason(value, reason):
    with pytest.raises(InputError) as caught:
        parse_captions(value)
    assert caught.value.reason.name == reason
    assert parse_captions("x" * 4096) == ["x" * 4096]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_caption"),
        (b" \n\n", "empty_caption"),
        (b"a\0b", "caption_not_text"),
        (b"caf\xe9", "caption_not_text"),
        (b"x" * 2**20, "caption_too_long"),
        (b"x\n" * 40_000, "caption_too_long"),
        (b"x" * 4097, "caption_too_long"),
        (b"\xef\xbb\xbfcaf\xc3\xa9\r\n", "ok"),
    ],
)
def test_text_files_that_cannot_be_used_have_a_reason(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "a.txt").write_bytes(content)
    rows, _ = check(tmp_path)
    assert rows["a.png"]["status"] == reason
    assert reason != "ok" or rows["a.png"]["captions"] == ["café"]


def test_a_source_that_is_not_there_or_holds_no_pictures_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no file or folder"):
        check(tmp_path / "none")
    with pytest.raises(InputError, match="the name after hub: is empty"):
        check("hub:")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(InputError, match="no file or folder"):  # not looked for on the hub
        check(f"{tmp_path.name}/typo")
    with pytest.raises(InputError, match="no images in"):
        check(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="neither a .tar nor a .parquet"):
        check(tmp_path / "a.zip")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        check(tmp_path / "a.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "a.zip"]


def test_a_picture_in_an_arrow_file_lies_where_the_manifest_says(tmp_path):
    pq.write_table(table(COLORS), tmp_path / "a.parquet")
    rows, report = check(tmp_path / "a.parquet")
    for color, row in zip(COLORS, rows.values()):
        data = (Path(report.manifest).parent / row["file"]).read_bytes()[row["offset"] :][: row["size"]]
        assert data == picture(color) and Image.open(io.BytesIO(data)).size == (16, 16)


@pytest.mark.parametrize("kind", ["splits", "one"])
def test_what_datasets_saved_to_a_folder_is_read_by_offset(tmp_path, kind):
    import datasets

    datasets.disable_progress_bars()
    parts = {"train": COLORS, "test": COLORS[:3]} if kind == "splits" else {"": COLORS}
    tables = {name: datasets.Dataset(table(colors)) for name, colors in parts.items()}
    saved = datasets.DatasetDict(tables) if kind == "splits" else tables[""]
    saved.save_to_disk(tmp_path / "set", **({} if kind == "splits" else {"num_shards": 2}))
    rows, report = check(tmp_path / "set", out=tmp_path / "out")
    assert report.ok == sum(map(len, parts.values()))
    if kind == "splits":
        assert report.held_out == 3
    assert {Path(row["file"]).suffix for row in rows.values()} == {".arrow"}
    assert assert_paired(tmp_path / "out") == report.ok
    state = next((tmp_path / "set").rglob("state.json"))
    state.write_text(json.dumps({"_data_files": [{"filename": "../evil.arrow"}]}))
    with pytest.raises(InputError, match="must be a plain name"):
        check(tmp_path / "set", out=tmp_path / "other")


@pytest.mark.parametrize("name", ["train.parquet", "00000.tar", "a.png"])
def test_pointers_of_git_lfs_in_place_of_data_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (tmp_path / "a.txt").write_text("a cat")
    if name == "a.png":
        assert "git lfs pull" in check(tmp_path)[0]["a.png"]["detail"]
        return
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=f"{name}'?:? .*a Git LFS pointer"):
        check(tmp_path)
