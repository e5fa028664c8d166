"""The emoji's data set: keywords of public lists, packages that are read without unpacking, concepts and kinds."""

import io
import json
import os
import tarfile

import pytest
from PIL import features

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.emoji import packages as packages_module
from t2i.data.emoji.keywords import (
    KEYWORD_LISTS,
    choose_keyword_lists,
    clean_keywords,
    find_keywords,
    merge_keywords,
    read_keyword_list,
)
from t2i.data.emoji.noto import CLDR_FOLDER, FONT_FILE, Emoji, render_emoji
from t2i.data.emoji.packages import Package, fetch_package, read_package_files
from t2i.data.labels import Labels, read_labels
from t2i.data.manifest import find_manifest
from t2i.errors import InputError

GEMOJI = """/** @type {Array<Gemoji>} */
export const gemoji = [
  {
    emoji: '\U0001f44b',
    names: ['wave', 'it\\'s_bye'],
    tags: ["goodbye"],
    description: 'waving hand'
  }
]
"""
CONTENTS = {
    "emojilib": json.dumps({"\U0001f44b": ["waving_hand", "Hello", ":D", "+1"]}),
    "gemoji": GEMOJI,
    "emoji-mart": json.dumps(
        {"emojis": {"wave": {"name": "Waving Hand", "keywords": ["palm"], "skins": [{"native": "\U0001f44b\ufe0f"}]}}}
    ),
    "emojibase": json.dumps([{"emoji": "\U0001f44b", "label": "waving hand", "tags": ["cya"]}]),
}
PHRASES = {
    "emojilib": ["waving hand", "hello"],
    "gemoji": ["wave", "it's bye", "goodbye"],
    "emoji-mart": ["waving hand", "palm"],
    "emojibase": ["waving hand", "cya"],
}


def write_archive(folder, package, files):
    """Write an npm archive of these contents by name; None makes a link."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / package.archive, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
                continue
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / package.archive


@pytest.fixture
def archives(tmp_path):
    for name, source in KEYWORD_LISTS.items():
        write_archive(tmp_path / "packages", source.package, {"x": b"1", source.file: CONTENTS[name].encode()})
    return tmp_path / "packages"


@pytest.mark.parametrize("name", KEYWORD_LISTS)
def test_each_list_gives_its_words_by_emoji_and_no_emoticons(archives, name):
    assert read_keyword_list(KEYWORD_LISTS[name], archives) == {"\U0001f44b": PHRASES[name]}


def test_a_skin_tone_has_the_words_of_its_emoji_and_no_word_comes_twice():
    lists = [{"\U0001f44b": ["hello", "bye"]}, {"\U0001f44b\U0001f3fb": ["pale"], "\U0001f44b": ["bye", "palm"]}]
    words = find_keywords("\U0001f44b\U0001f3fb\ufe0f", lists)
    assert words == ["hello", "bye", "pale", "bye", "palm"]
    assert merge_keywords(["Hello", "hand"], words) == ["Hello", "hand", "bye", "pale", "palm"]
    assert merge_keywords(["OK", "OK"], []) == ["OK", "OK"]  # without lists CLDR's stay as they are


def test_words_are_cleaned_as_prompts_are():
    assert list(clean_keywords(["Hot_Dog", " crème  brûlée ", ":)", "", "x" * 61, "100", "t-rex", "a;b"])) == [
        "hot dog", "crème brûlée", "100", "t-rex"]  # fmt: skip


def test_unknown_lists_and_broken_ones_are_refused_in_one_line(archives):
    assert choose_keyword_lists("all") == list(KEYWORD_LISTS.values())
    assert choose_keyword_lists("gemoji, emojilib") == [KEYWORD_LISTS["gemoji"], KEYWORD_LISTS["emojilib"]]
    with pytest.raises(InputError, match="keywords must be all, or some of emojilib, .*, got 'openmoji'"):
        choose_keyword_lists("emojilib,openmoji")
    for name, content in {"emojilib": "[1]", "gemoji": "export const x = 1", "emoji-mart": '{"emojis": []}',
                          "emojibase": '[{"emoji": "x", "label": 1}]'}.items():  # fmt: skip
        source = KEYWORD_LISTS[name]
        write_archive(archives, source.package, {source.file: content.encode()})
        with pytest.raises(InputError, match="is no list of keywords as expected") as caught:
            read_keyword_list(source, archives)
        assert "\n" not in str(caught.value)


def test_archives_are_read_in_bounds_and_links_never(tmp_path, monkeypatch):
    package = Package("@some/thing", "1.0.0", "MIT")
    assert package.archive == "some-thing-1.0.0.tgz"
    file = write_archive(tmp_path, package, {"a": b"1", "b": None, "../c": b"22"})
    assert list(read_package_files(file, lambda name: True)) == [("a", b"1"), ("../c", b"22")]  # nothing is unpacked
    monkeypatch.setattr(packages_module, "MAX_MEMBER_BYTES", 1)
    with pytest.raises(InputError, match=r"'../c' in .* has 2 bytes; at most 1 are read"):
        list(read_package_files(file, lambda name: True))
    monkeypatch.setattr(packages_module, "MAX_PACKAGE_BYTES", 2)
    with pytest.raises(InputError, match="holds more than 2 bytes"):
        list(read_package_files(file, lambda name: False))
    for damage in (b"", b"\x1f\x8bno", file.read_bytes()[:60]):
        file.write_bytes(damage)
        with pytest.raises(InputError) as caught:
            list(read_package_files(file, lambda name: True))
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    package = Package("@some/thing", "1.0.0", "MIT")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="npm is not installed to download it; `npm pack @some/thing@1.0.0 --pack-des"):
        fetch_package(package, tmp_path / "new")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\necho 'npm error more' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with pytest.raises(InputError, match=r"npm cannot download '@some/thing@1.0.0' \(npm error code E404\)$"):
        fetch_package(package, tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "group", "concept", "kind"),
    [
        ("pizza", "Food & Drink", "pizza", "things"),
        ("waving hand: light skin tone", "People & Body", "waving hand", "skin tones"),
        ("man: dark skin tone, red hair", "People & Body", "man: red hair", "skin tones"),
        ("man: red hair", "People & Body", "man: red hair", "people"),
        ("flag: Chad", "Flags", "flag: Chad", "flags"),
        ("keycap: 1", "Symbols", "keycap: 1", "symbols"),
    ],
)
def test_a_concept_is_an_emoji_with_all_its_tones(name, group, concept, kind):
    emoji = Emoji("x", name, group, "")
    assert (emoji.concept, emoji.kind) == (concept, kind)


@pytest.mark.skipif(not FONT_FILE.exists(), reason="needs the package fonts-noto-color-emoji")
@pytest.mark.skipif(not features.check("raqm"), reason="needs the package libfribidi0")
@pytest.mark.skipif(not CLDR_FOLDER.exists(), reason="needs the package unicode-cldr-core")
def test_wider_keywords_change_the_words_and_not_the_pictures(tmp_path, archives):
    names = tmp_path / "names.txt"
    names.write_text("# group: People & Body\n# subgroup: hands\n1F44B ; fully-qualified # x E0.6 waving hand\n"
                     "1F44B 1F3FB ; fully-qualified # x E1.0 waving hand: light skin tone\n")  # fmt: skip
    render_emoji(tmp_path / "plain", 32, names=names)
    render_emoji(tmp_path / "wide", 32, names=names, lists=choose_keyword_lists("all"), packages=archives)
    rows = [json.loads(line) for line in (tmp_path / "wide/metadata.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (tmp_path / "plain/metadata.jsonl").read_text().splitlines()]
    for row, other in zip(rows, plain):
        assert (tmp_path / "wide" / row["file_name"]).read_bytes() == (
            tmp_path / "plain" / row["file_name"]
        ).read_bytes()
        assert row["keywords"][: len(other["keywords"])] == other["keywords"]
        assert {"hello", "palm", "cya"} <= set(row["keywords"]) and len(set(row["keywords"])) == len(row["keywords"])
    # Training samples by any column of labels; the first is that of classifiers
    manifest = find_manifest(tmp_path / "wide")
    assert read_labels(manifest, "concept") == dict.fromkeys(["1f44b.png", "1f44b-1f3fb.png"], "waving hand")
    assert read_labels(manifest, "kind") == {"1f44b.png": "people", "1f44b-1f3fb.png": "skin tones"}
    assert set(read_labels(manifest, "group").values()) == {"People & Body"}
    with pytest.raises(InputError, match="no column 'color' in .*; it has group, subgroup, concept, kind; `t2i data"):
        read_labels(manifest, "color")
    with pytest.raises(InputError, match="has 1 classes"):
        Labels(manifest)
    data = [CaptionedPictures(DataConfig(str(tmp_path / name), 32, 0)).compute_digest() for name in ("plain", "wide")]
    assert data[0] != data[1]
