"""Files are found by the names that other systems wrote, and names that look alike are told apart in messages."""

import json
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i.data.manifest import write_manifest
from t2i.data.sources.names import describe_names, fold_name
from t2i.data.sources.samples import Columns
from t2i.errors import InputError
from tests.helpers.samples import add, checked, picture, reasons

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def check(folder: Path, **options):
    report = write_manifest(folder, held_out=0, quiet=True, **options)
    return checked(Path(report.manifest)), report


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = name.encode() if name.lower().endswith((".txt", ".caption")) else picture("red")
        (folder / name).write_bytes(content)


def list_pictures(folder: Path, *names: str, column: str = "file_name") -> None:
    rows = [json.dumps({column: name, "text": f"image {i}"}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def test_names_are_folded_to_one_form():
    assert fold_name(f"a/{DECOMPOSED}.JPG") == f"a/{COMPOSED}.jpg"
    assert fold_name("A.b/C") == "A.b/C"
    assert describe_names("a.png", "b.png") == "'a.png', 'b.png'"
    assert describe_names(f"{COMPOSED}.png", f"{DECOMPOSED}.png") == r"'caf\xe9.png', 'cafe\u0301.png'"


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        (f"{COMPOSED}.png", f"{DECOMPOSED}.png"),
        (f"{DECOMPOSED}.png", f"{COMPOSED}.png"),
        ("a.png", "a.PNG"),
        ("a.PNG", "a.png"),
        (r"deep\a.png", "deep/a.png"),
        ("./deep//a.png", "deep/a.png"),
    ],
)
def test_a_listed_picture_is_found_by_another_spelling_and_counted_once(tmp_path, listed, file):
    write(tmp_path, file, "other.png")
    list_pictures(tmp_path, listed, "other.png")
    rows, report = check(tmp_path)
    assert rows[file]["captions"] == ["image 0"] and rows[file]["file"] == file
    assert (report.indexed, report.ok) == (2, 2)


def test_the_very_name_comes_first_and_a_choice_is_refused(tmp_path):
    write(tmp_path, f"{COMPOSED}.png", f"{DECOMPOSED}.png", "x.PNG", "x.Png")
    list_pictures(tmp_path, f"{COMPOSED}.png", f"{DECOMPOSED}.png", "x.png")
    rows, report = check(tmp_path)
    assert rows[f"{DECOMPOSED}.png"]["captions"] == ["image 1"] and report.ok == 2
    assert rows["metadata.jsonl:3"]["status"] == "repeated_key"
    assert rows["metadata.jsonl:3"]["detail"] == "'x.png', 'x.PNG', 'x.Png': which file is meant?"


def test_names_that_only_look_alike_are_one_sample_whose_message_shows_the_difference(tmp_path):
    write(tmp_path, "Photo 1.png", "b.png")
    list_pictures(tmp_path, "photo\u00a01.png", "b.png")
    rows, report = check(tmp_path)
    assert reasons(rows) == {"metadata.jsonl:1": "missing_file"} and report.indexed == 2
    assert rows["metadata.jsonl:1"]["detail"] == r"'photo\xa01.png', 'Photo 1.png': listed, then in the folder"


def test_absolute_paths_inside_the_folder_are_its_pictures(tmp_path):
    write(tmp_path / "data", "a.png", "deep/b.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "outside.png").write_bytes(picture("blue"))
    data = (tmp_path / "data").resolve()
    names = [str(data / "a.png"), str(tmp_path / "link/deep/b.png"), str(tmp_path / "outside.png"), "/a\0/b.png"]
    list_pictures(tmp_path / "data", *names, str(data / "../outside.png"))
    rows, report = check(tmp_path / "data")
    assert rows["a.png"]["captions"] == ["image 0"] and rows["deep/b.png"]["captions"] == ["image 1"]
    assert list(reasons(rows).values()) == ["outside_folder"] * 3 and report.ok == 2


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("a.png.txt", "a.png"),
        ("a.PNG.txt", "a.png"),
        ("a.Txt", "a.png"),
        (f"{COMPOSED}.txt", f"{DECOMPOSED}.png"),
        (f"{DECOMPOSED}.JPG.TXT", f"{COMPOSED}.jpg"),
    ],
)
def test_a_text_file_is_found_beside_its_picture(tmp_path, text, file):
    write(tmp_path, text, file, "b.png", "b.txt")
    rows, report = check(tmp_path)
    assert rows[file]["captions"] == [text] and (report.indexed, report.ok) == (2, 2)


def test_each_picture_of_a_name_has_its_own_text_file(tmp_path):
    write(
        tmp_path, "a.jpg", "a.png", "a.jpg.txt", "a.png.txt", "b.png", "b.txt", "b.png.txt", "c.png", "c.jpg", "c.txt"
    )
    rows, report = check(tmp_path)
    captions = {key: row["captions"] for key, row in rows.items() if row["status"] == "ok"}
    assert captions == {"a.jpg": ["a.jpg.txt"], "a.png": ["a.png.txt"], "b.png": ["b.png.txt"]}
    assert reasons(rows) == {"c.jpg": "repeated_key", "c.png": "repeated_key"} and report.indexed == 5


def test_a_text_file_whose_name_only_looks_alike_is_named(tmp_path):
    write(tmp_path, "Photo.png", "photo.txt", "b.png", "b.txt")
    rows, report = check(tmp_path)
    assert reasons(rows) == {"Photo.png": "no_caption"} and report.indexed == 2
    assert rows["Photo.png"]["detail"] == "'Photo.png', 'photo.txt': their names differ"


def test_the_files_of_a_sample_in_a_tar_may_come_from_different_systems(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, f"{DECOMPOSED}.JPG", picture("red", "JPEG"))
        add(tar, f"{COMPOSED}.Txt", b"red")
        add(tar, "b.png", picture("blue"))
        add(tar, "b.json", b'{"prompt": "blue"}')
    rows, report = check(tmp_path)
    assert {key: row["captions"] for key, row in rows.items()} == {f"0.tar/{COMPOSED}": ["red"], "0.tar/b": ["blue"]}
    assert report.ok == 2


def test_headers_with_blanks_and_other_names_of_the_columns(tmp_path):
    for number, header in enumerate(
        (" file_name , text ", "filename,prompt", "image_path, caption", "PATH,Description")
    ):
        folder = tmp_path / str(number)
        write(folder, "a.png")
        (folder / "metadata.csv").write_text(f"{header}\na.png,a cat\n")
        rows, _ = check(folder)
        assert rows["a.png"]["captions"] == ["a cat"]


def test_the_column_of_the_names_can_be_given(tmp_path):
    write(tmp_path, "a.png")
    pq.write_table(pa.table({"where": ["a.png"], " said ": ["a cat"]}), tmp_path / "metadata.parquet")
    with pytest.raises(InputError, match="no column file_name in .*; its columns: where, said"):
        check(tmp_path)
    rows, _ = check(tmp_path, columns=Columns("where", "said"))
    assert rows["a.png"]["captions"] == ["a cat"]


def test_lines_of_metadata_end_as_in_an_editor(tmp_path):
    write(tmp_path, "a.png", "b.png")
    rows = ['{"file_name": "a.png", "text": "a\u2028cat"}', '{"file_name": "b.png", "text": "a dog"}']
    (tmp_path / "metadata.jsonl").write_bytes("\r".join(rows).encode())
    assert {row["captions"][0] for row in check(tmp_path)[0].values()} == {"a cat", "a dog"}
