"""The emoji's data set: keywords of public lists, packages that are read without unpacking, concepts and kinds."""

import io
import json
import os
import sys
import tarfile

import pytest
from PIL import Image, features

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.emoji import packages as packages_module
from t2i.data.emoji import rendering
from t2i.data.emoji import styles as styles_module
from t2i.data.emoji.keywords import (
    CLDR_FOLDER,
    KEYWORD_LISTS,
    choose_keyword_lists,
    clean_keywords,
    find_keywords,
    merge_keywords,
    read_keyword_list,
)
from t2i.data.emoji.names import Emoji, read_emoji_names
from t2i.data.emoji.noto import FONT_FILE
from t2i.data.emoji.packages import Package, fetch_package, read_package_files
from t2i.data.emoji.rendering import render_emoji
from t2i.data.emoji.styles import STYLES, StyledDrawings, choose_split, choose_styles, render_drawing
from t2i.data.labels import Labels, read_labels
from t2i.data.manifest import find_manifest
from t2i.errors import InputError
from t2i.evaluation.emoji.real_emoji import RealEmoji

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


def square(color):
    path = f'<path fill="{color}" d="M0 0h32v32H0z"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{path}</svg>'


def encode(color):
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), color).save(file, "WEBP", lossless=True)
    return file.getvalue()


def icons(color, names, **more):
    body = f'<path fill="{color}" d="M0 0h32v32H0z"/>'
    content = {"icons": {name: {"body": body} for name in names}, "width": 32, "height": 32, **more}
    return json.dumps(content).encode()


STYLE_NAMES = """# group: Food & Drink
# subgroup: food
1F355 ; fully-qualified # x E0.6 pizza
# group: People & Body
# subgroup: hands
1F44B ; fully-qualified # x E0.6 waving hand
1F44B 1F3FB ; fully-qualified # x E1.0 waving hand: light skin tone
# group: Symbols
# subgroup: heart
2764 FE0F ; fully-qualified # x E0.6 red heart
# group: Flags
# subgroup: flags
1F1EB 1F1F7 ; fully-qualified # x E0.6 flag: France
"""


@pytest.fixture
def style_archives(tmp_path):
    """Each set as one colour: 3D red with a transparent heart, flat green, outline by aliases, Noto's by names."""
    folder = tmp_path / "packages"
    files = {
        "3d": {"package/assets/1f355.webp": encode("red"), "package/assets/2764-fe0f.webp": encode((0, 0, 0, 0)),
               "package/assets/1f1eb-1f1f7.webp": encode("red"), "package/assets/x.webp": b"no"},
        "flat": {"package/icons.json": icons("lime", ["a", "b"]),
                 "package/chars.json": b'{"1f355": "a", "1f44b": "b"}'},
        "outline": {"package/icons.json": icons("currentColor", ["a"], aliases={"b": {"parent": "a", "hFlip": True}}),
                    "package/chars.json": b'{"1f355": "b"}'},
        "blob": {"package/icons.json": icons("blue", ["waving-hand", "red-heart"]), "package/chars.json": b"{}"},
        "twemoji": {"package/2764.svg": square("#ff0").encode(), "package/1f44b-1f3fb.svg": square("#ff0").encode()},
    }  # fmt: skip
    for name, contents in files.items():
        write_archive(folder, STYLES[name].package, contents)
    return folder


@pytest.fixture
def emoji(tmp_path):
    (tmp_path / "names.txt").write_text(STYLE_NAMES)
    found = read_emoji_names(tmp_path / "names.txt")
    for item in found:
        item.keywords = ["thing"]
    return found


def test_each_set_is_found_by_code_point_or_name_without_skin_tones_and_flags(style_archives, emoji):
    pytest.importorskip("resvg_py", reason="needs the extra styles")
    colors = {}
    for name, style in STYLES.items():
        for item, image in StyledDrawings(style, emoji, style_archives).render(16):
            assert image.size == (16, 16) and image.getpixel((0, 0)) == image.getpixel((15, 8))
            colors[name, item.text] = image.getpixel((8, 8))
    assert colors == {
        ("3d", "pizza"): (255, 0, 0),
        ("3d", "red heart"): (255, 255, 255),
        ("flat", "pizza"): (0, 255, 0),
        ("flat", "waving hand"): (0, 255, 0),
        ("outline", "pizza"): (0, 0, 0),
        ("blob", "waving hand"): (0, 0, 255),
        ("blob", "red heart"): (0, 0, 255),
        ("twemoji", "red heart"): (255, 255, 0),
    }


def test_captions_and_keywords_name_the_style_and_one_in_sixteen_is_held_out():
    row = Emoji("\U0001f355", "pizza", "Food & Drink", "food", ["slice"], style="3D").build_row()
    assert row["text"] == ["pizza, 3D", "3D pizza"] and row["keywords"] == ["3D slice"]
    assert (row["file_name"], row["concept"], row["kind"]) == ("3d-1f355.png", "pizza, 3D", "things")
    items = [Emoji("x", f"emoji {i}", "Objects", "") for i in range(1600)]
    held_out = {
        style: {item.text for item in items if choose_split(item, STYLES[style]) == "held_out"} for style in STYLES
    }
    assert all(70 < len(texts) < 130 for texts in held_out.values())
    assert len(held_out["3d"] & held_out["flat"]) < 30  # each is seen in other styles


def test_what_is_held_out_in_the_first_style_is_in_no_style(style_archives, emoji):
    emoji[0].split = "held_out"
    drawings = StyledDrawings(STYLES["3d"], emoji, style_archives)
    assert [item.text for item in drawings.emoji.values()] == ["red heart"]


def test_unknown_styles_and_drawings_that_are_more_than_drawings_are_refused(style_archives, emoji, monkeypatch):
    assert choose_styles("all") == list(STYLES.values()) and choose_styles("Flat, 3D") == [STYLES["flat"], STYLES["3d"]]
    with pytest.raises(
        InputError, match="styles must be all, or some of 3d, flat, outline, blob, twemoji, got 'apple'"
    ):
        choose_styles("apple")
    with pytest.raises(ValueError, match="its SVG is more than a drawing"):
        render_drawing(b'<svg><image href="/etc/passwd"/></svg>', 16)
    write_archive(style_archives, STYLES["3d"].package, {"package/1f355.webp": b"damaged"})
    with pytest.raises(InputError, match="'pizza' in .* cannot be drawn") as caught:
        list(StyledDrawings(STYLES["3d"], emoji, style_archives).render(16))
    assert "\n" not in str(caught.value)
    write_archive(style_archives, STYLES["flat"].package, {"package/icons.json": b"[]", "package/chars.json": b"{}"})
    with pytest.raises(InputError, match="holds no drawings as expected"):
        StyledDrawings(STYLES["flat"], emoji, style_archives)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"resvg-py is not installed .*; pip install 't2i\[styles\]'"):
        StyledDrawings(STYLES["twemoji"], emoji, style_archives)


@pytest.mark.skipif(not FONT_FILE.exists(), reason="needs the package fonts-noto-color-emoji")
@pytest.mark.skipif(not features.check("raqm"), reason="needs the package libfribidi0")
@pytest.mark.skipif(not CLDR_FOLDER.exists(), reason="needs the package unicode-cldr-core")
def test_styles_are_a_column_and_evaluated_by_style(tmp_path, style_archives, emoji, monkeypatch):
    monkeypatch.setattr(styles_module, "choose_split", lambda item, _: "held_out" if item.text == "pizza" else "train")
    monkeypatch.setattr(rendering, "mark_held_out", lambda emoji: setattr(emoji[2], "split", "held_out"))
    render_emoji(tmp_path / "data", 32, names=tmp_path / "names.txt", styles=[STYLES["3d"]], packages=style_archives)
    manifest = find_manifest(tmp_path / "data")
    assert read_labels(manifest, "style") == {
        **dict.fromkeys(["1f355.png", "1f44b.png", "1f44b-1f3fb.png", "2764-fe0f.png", "1f1eb-1f1f7.png"], "noto"),
        **dict.fromkeys(["3d-1f355.png", "3d-2764-fe0f.png"], "3D"),
    }
    emoji_of = read_labels(manifest, "emoji")
    assert emoji_of["1f355.png"] == emoji_of["3d-1f355.png"] == "pizza"
    assert emoji_of["1f44b-1f3fb.png"] == "waving hand"
    real = RealEmoji(tmp_path / "data")
    chosen = {kind: [record.text for record in records] for kind, records in real.choose_captions().items()}
    assert chosen["held-out styles"] == ["pizza, 3D"] and chosen["3D"] == ["red heart, 3D"]
    assert sorted(chosen["train"]) == ["flag: France", "pizza", "red heart", "waving hand"]
    assert chosen["held_out"] == ["waving hand: light skin tone"]
    styled, plain = (next(one for one in real.records if one.text == text) for text in ("pizza, 3D", "pizza"))
    assert real.find_name(styled) == real.find_name(plain) == "pizza"
