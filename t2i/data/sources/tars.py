"""WebDataset tars, as img2dataset writes them: indexed once, never unpacked, read by offset.

The key of a member is its name up to the first dot of the last part. Members are grouped by key, within one shard:
whatever is missing or damaged, a caption is never paired with the image of another key.
"""

import json
import re
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple

from t2i.data.reasons import Reason, RejectedSample
from t2i.data.sources.samples import (
    CAPTION_COLUMNS,
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_TEXT_SIZE,
    OTHER_CAPTION_COLUMNS,
    UNSUPPORTED_SUFFIXES,
    Columns,
    Sample,
    Source,
    SourceNotes,
    check_name,
    escape_name,
    infer_splits,
    open_inside_root,
    parse_caption_bytes,
    parse_captions,
)
from t2i.errors import InputError
from t2i.files.untrusted import describe_stand_in

MAX_HEADER_SIZE = 2**20  # bytes of a header with its names and PAX records
MAX_JSON_SIZE = 2**20
COMPRESSION_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tar(file: Path) -> bool:
    return file.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))


def is_compressed(file: Path) -> bool:
    """Return True for a compressed tar, by its name or its first bytes."""
    if not is_tar(file) or not file.is_file():
        return False
    with open(file, "rb") as start:
        return file.name.lower().endswith(COMPRESSED_SUFFIXES) or start.read(6).startswith(COMPRESSION_MAGIC)


def has_images(file: Path) -> bool:
    """Return True if a tar contains an image, or is compressed, for then it is refused later."""
    if is_compressed(file):
        return True
    try:
        with open_inside_root(file.parent, file.name) as opened:
            shard = TarShard(file.name, opened, SourceNotes())
            shard.index_members()
            return any(group.picture for group in shard.members.values())
    except RejectedSample:
        return False


def open_tars(root: Path, files: list[Path], columns: Columns, notes: SourceNotes | None = None) -> Source:
    """Return the source of shards with captions in .txt or .json. Raises InputError for a compressed shard."""
    columns.check_unset("image", reason="tars contain images as files")
    columns.check_unset("label", reason="tars contain no labels")
    notes = notes or SourceNotes()
    shards = [file for file in files if is_tar(file)]
    for shard in shards:
        if is_compressed(shard):
            remedy = "decompress it to a plain .tar"
            raise InputError(f"{str(shard)!r} is compressed and cannot be read by offset; {remedy}")

    # img2dataset writes statistics beside each shard: they are read later, not ignored
    notes.count_ignored(file for file in files if not is_tar(file) and not file.name.endswith("_stats.json"))
    names = [shard.relative_to(root).as_posix() for shard in shards]
    notes.shards += find_shard_gaps(names)

    def iterate_samples(scratch_folder: Path) -> Iterator[Sample]:
        for name, split in zip(names, infer_splits(names)):
            try:
                with open_inside_root(root, check_name(name)) as file:
                    shard = TarShard(name, file, notes)
                    shard.index_members()
                    yield from shard.iterate_samples(columns.caption, split)
                    compare_with_stats(root, name, len(shard.members), notes)
            except RejectedSample as error:
                notes.shards.append(f"{escape_name(name)}: {error}")

    return Source(root, iterate_samples, notes)


def find_shard_gaps(names: list[str]) -> list[str]:
    """Return a line for each series of numbered shards in which numbers are missing."""
    numbers: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d{1,12})\.tar", name):
            numbers[match[1], len(match[2])].add(int(match[2]))
    missing = []
    for (prefix, digits), present in numbers.items():
        count = max(present) - min(present) + 1 - len(present)
        if count:
            first = next(number for number in range(min(present), max(present)) if number not in present)
            more = f" and {count - 1} more" if count > 1 else ""
            missing.append(f"{prefix}{first:0{digits}}.tar{more}: missing between the first and the last shard")
    return missing


def compare_with_stats(root: Path, name: str, count: int, notes: SourceNotes) -> None:
    """Compare the number of samples with the one that img2dataset wrote beside the shard."""
    stats = name.removesuffix(".tar") + "_stats.json"
    try:
        with open_inside_root(root, stats) as file:
            expected = json.loads(file.read(MAX_JSON_SIZE)).get("successes")
    except (RejectedSample, ValueError, AttributeError, RecursionError):
        return
    if isinstance(expected, int) and expected != count:
        notes.shards.append(f"{name}: {count:,} samples, {PurePosixPath(stats).name} counts {expected:,}")


class GuardedFile:
    """A file with a limit on each read, for the sizes in a tar's headers may be hostile."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_SIZE:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


class ByteRange(NamedTuple):
    """A part of a file. All text members of a shard are in memory: a `TarInfo` takes far more."""

    offset: int
    size: int


@dataclass
class MemberGroup:
    """The members of one key in a shard."""

    picture: tarfile.TarInfo | None = None
    texts: dict[str, ByteRange] = field(default_factory=dict)  # by suffix
    problem: RejectedSample | None = None


class TarShard:
    """An open tar. All complete files in it are counted; links are not followed, nothing is unpacked or unpickled."""

    def __init__(self, name: str, file: BinaryIO, notes: SourceNotes):
        self.name, self.file, self.notes = name, file, notes
        self.size = file.seek(0, 2)
        self.members: dict[str, MemberGroup] = {}
        notes.containers[name] = self.size

    def index_members(self) -> None:
        """Group the members by key, and note damage of the shard."""
        # Read the headers one after the other
        self.file.seek(0)
        end = 0  # of the last member
        try:
            guarded: IO[bytes] = GuardedFile(self.file)  # type: ignore[assignment]
            with tarfile.open(fileobj=guarded, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # A hostile size could lead back to a header that was read, without end
                    if tar.offset <= end or member.size < 0:
                        raise tarfile.ReadError(f"{escape_name(member.name)!r} has a size of {member.size:,}")
                    end = tar.offset
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                    self.add_member(member)
                    if end > self.size:
                        break
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
            self.file.seek(0)
            fault = describe_stand_in(self.file.read(64)) if end <= 0 else None
            fault = fault or f"not a tar, or damaged, at byte {end:,} of {self.size:,} ({error})"
            self.notes.shards.append(f"{self.name}: {fault}")
            return

        # Look for the mark of the end, which is zeros, and for anything else behind it
        self.file.seek(min(end, self.size))
        if self.file.read(512) != bytes(512):
            place = f"byte {min(end, self.size):,} of {self.size:,}"
            self.notes.shards.append(f"{self.name}: truncated or damaged at {place}, without an end-of-archive mark")
        elif any(block.strip(b"\0") for block in iter(lambda: self.file.read(MAX_HEADER_SIZE), b"")):
            place = f"byte {end:,} of {self.size:,}"
            self.notes.shards.append(f"{self.name}: ends at {place}; what follows, such as another tar, is not read")

    def add_member(self, member: tarfile.TarInfo) -> None:
        """Add a member to the group of its key; other files are counted as ignored."""
        path = PurePosixPath(member.name)
        if member.isdir():
            return
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            self.notes.ignored["links and devices in tars"] += 1
            return
        # The key ends at the first dot, the suffix begins at the last: cat.seg.png is an image of the key cat
        stem, _, suffixes = path.name.partition(".")
        suffix = PurePosixPath("x." + suffixes.lower()).suffix
        if suffix not in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, ".json") or not stem:
            self.notes.ignored[suffix or "no suffix"] += 1
            return
        # Letters with accents are composed, for the files of one sample may come from different systems
        key = unicodedata.normalize("NFC", str(path.with_name(stem)))
        group = self.members.setdefault(key, MemberGroup())
        if path.is_absolute() or ".." in path.parts:
            group.problem = RejectedSample(Reason.outside_folder, escape_name(member.name))
        elif suffix in IMAGE_SUFFIXES:
            if group.picture is not None:
                detail = f"{escape_name(group.picture.name)}, then {escape_name(member.name)}"
                group.problem = RejectedSample(Reason.repeated_key, detail)
            group.picture = member
        elif suffix in group.texts:
            group.problem = RejectedSample(Reason.repeated_key, f"two files {escape_name(member.name)}")
        else:
            group.texts[suffix] = ByteRange(member.offset_data, member.size)

    def iterate_samples(self, column: str | None, split: str | None) -> Iterator[Sample]:
        """Yield a sample for each key; `column` is the key of the captions in .json files."""
        for key, group in self.members.items():
            sample = Sample(f"{self.name}/{escape_name(key)}", split=split)
            try:
                check_name(key)
                if group.problem:
                    raise group.problem
                if group.picture is None:
                    raise RejectedSample(Reason.no_picture)
                if PurePosixPath(group.picture.name).suffix.lower() in UNSUPPORTED_SUFFIXES:
                    raise RejectedSample(Reason.unsupported_format, PurePosixPath(group.picture.name).suffix)
                sample.file, sample.offset, sample.size = self.name, group.picture.offset_data, group.picture.size
                if sample.offset + sample.size > self.size:
                    raise RejectedSample(Reason.truncated, "the shard ends within the image")
                sample.captions = self.read_captions(group, column)
            except RejectedSample as error:
                sample.problem = error
            yield sample

    def read_captions(self, group: MemberGroup, column: str | None) -> list[str]:
        """Return the captions in the text file of a sample, else in its JSON. Raises RejectedSample."""
        for suffix in CAPTION_SUFFIXES:
            if suffix in group.texts and column is None:
                return parse_caption_bytes(self.read_text(group.texts[suffix], MAX_TEXT_SIZE + 1))
        if ".json" not in group.texts:
            raise RejectedSample(Reason.no_caption, "no .txt and no .json in the shard")
        try:
            row: Any = json.loads(self.read_text(group.texts[".json"], MAX_JSON_SIZE))
        except (ValueError, RecursionError) as error:
            raise RejectedSample(Reason.bad_row, f"its .json does not parse: {error}"[:200]) from error
        # The first usual name that has a value
        row = row if isinstance(row, dict) else {}
        names = [column] if column else [*CAPTION_COLUMNS, *OTHER_CAPTION_COLUMNS]
        values = [row.get(name) for name in names]
        return parse_captions(next((value for value in values if value is not None), None))

    def read_text(self, place: ByteRange, limit: int) -> bytes:
        if place.offset + place.size > self.size:
            raise RejectedSample(Reason.truncated, "the shard ends within the caption")
        try:
            self.file.seek(place.offset)
            return self.file.read(min(place.size, limit))
        except OSError as error:
            raise RejectedSample(Reason.unreadable, str(error)) from error
