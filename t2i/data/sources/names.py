"""Names of files as different systems write them: the listed name and the name on the disk need not be the same bytes.

macOS decomposes letters with accents, Windows separates folders by backslashes, cameras write suffixes in capitals.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from t2i.data.reasons import Reason, RejectedSample
from t2i.data.sources.samples import escape_name


def fold_name(name: str) -> str:
    """Return a name in the one form that all its spellings have: letters composed, the suffix in lower case."""
    name = unicodedata.normalize("NFC", name)
    stem_length = len(name) - len(PurePosixPath(name).suffix)
    return name[:stem_length] + name[stem_length:].lower()


def describe_names(*names: str) -> str:
    """Return names for a message; those that look alike with their other characters as codes."""
    folded = {unicodedata.normalize("NFKC", name).casefold() for name in names}
    return ", ".join(ascii(name) if len(folded) < len(names) else escape_name(repr(name)) for name in names)


class FolderNames:
    """The names of files below a folder, to be found by a listed name.

    Args:
        root: the folder, without links.
        names: of its files, relative to it.
    """

    def __init__(self, root: Path, names: Iterable[str]):
        self.root, self.names = root, set(names)
        self.by_folded, self.by_look = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for name in sorted(self.names):
            self.by_folded[fold_name(name)].append(name)
            self.by_look[fold_look(name)].append(name)

    def find_file(self, folder: PurePosixPath, listed: str) -> str:
        """Return the name, relative to the root, of the file that is listed in a folder below it.

        A file of this very name comes first. Where there is no file, the result is the listed name.

        Raises RejectedSample for a name that leads out of the root, that several files match, or that no file has but
        one looks alike.
        """
        if "\\" in listed and not self.is_file(folder, listed):
            listed = listed.replace("\\", "/")
        path = PurePosixPath(listed)
        if ".." in path.parts:
            raise RejectedSample(Reason.outside_folder, escape_name(listed))
        name = self.make_relative(path) if path.is_absolute() else (folder / path).as_posix()
        if name in self.names:
            return name
        if len(found := self.by_folded.get(fold_name(name), [])) == 1:
            return found[0]
        if found:
            raise RejectedSample(Reason.repeated_key, f"{describe_names(name, *found)}: which file is meant?")
        if (alike := self.by_look.get(fold_look(name))) and not os.path.isfile(self.root / name):
            raise LookalikeName(name, alike)
        return name

    def is_file(self, folder: PurePosixPath, listed: str) -> bool:
        return (folder / listed).as_posix() in self.names

    def make_relative(self, path: PurePosixPath) -> str:
        """Return the name, relative to the root, of an absolute path into it."""
        # The folder may have been listed by a name that links to it
        for candidate in (str(path), os.path.join(os.path.realpath(str(path.parent).replace("\0", "")), path.name)):
            if PurePosixPath(candidate).is_relative_to(self.root):
                return PurePosixPath(candidate).relative_to(self.root).as_posix()
        raise RejectedSample(Reason.outside_folder, escape_name(str(path)))


class LookalikeName(RejectedSample):
    """No file has the listed name, but other files have names that look alike."""

    def __init__(self, name: str, alike: list[str]):
        super().__init__(Reason.missing_file, f"{describe_names(name, *alike)}: listed, then in the folder")
        self.alike = alike


def fold_look(name: str) -> str:
    """Return what a name looks like, more or less: without differences of case, of width and of spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
