"""Packages of npm, read as archives: no code in them runs, and nothing is unpacked."""

import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from t2i.errors import InputError
from t2i.files.untrusted import check_no_stand_in

MAX_MEMBER_BYTES = 2**24  # of a file that is read
MAX_PACKAGE_BYTES = 2**30  # of all files of a package, unpacked: a small archive may hold any number of zeros
DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class Package:
    """A published version of a package, and the licence of what is read from it."""

    name: str
    version: str
    licence: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch_package(package: Package, folder: Path) -> Path:
    """Return the archive of a package in `folder`; npm downloads one that is not there.

    Raises InputError if npm is not installed or cannot get it.
    """
    file = folder / package.archive
    if file.is_file():
        return file
    source = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        command = f"`npm pack {source} --pack-destination {folder}`"
        raise InputError(f"no {str(file)!r}, and npm is not installed to download it; {command} writes it elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever scripts a package has, npm runs none of them
    arguments = [npm, "pack", source, "--pack-destination", str(folder), "--ignore-scripts"]
    try:
        result = subprocess.run(
            arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DOWNLOAD_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"npm cannot download {source!r} ({error})") from error
    if result.returncode or not file.is_file():
        reasons = [line for line in result.stderr.splitlines() if line.startswith("npm error")] or ["no reason given"]
        raise InputError(f"npm cannot download {source!r} ({reasons[0][:200]})")
    return file


def read_package_files(file: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the ordinary files of a package's archive that are wanted, in its order.

    Raises InputError for a damaged archive, or one whose files are larger than a package's.
    """
    check_no_stand_in(file)
    total = 0
    try:
        # As a stream, so that sizes are counted before more is unpacked
        with tarfile.open(file, "r|gz") as archive:
            for member in archive:
                total += member.size
                if total > MAX_PACKAGE_BYTES:
                    raise InputError(f"{str(file)!r} holds more than {MAX_PACKAGE_BYTES:,} bytes")
                # No links and no devices
                if not member.isreg() or not is_wanted(member.name):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    limit = f"at most {MAX_MEMBER_BYTES:,} are read"
                    raise InputError(f"{member.name!r} in {str(file)!r} has {member.size:,} bytes; {limit}")
                content = archive.extractfile(member)
                assert content is not None, "an ordinary file has a content"
                yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{str(file)!r} is not a whole .tgz archive ({error})") from error


def read_package_file(file: Path, name: str) -> bytes:
    """Return the content of one file of a package's archive. Raises InputError if it is not there."""
    for _, content in read_package_files(file, lambda member: member == name):
        return content
    raise InputError(f"{str(file)!r} has no file {name!r}; it is another package or version")
