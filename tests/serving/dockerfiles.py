"""Dockerfiles, read as instructions and run in a bare root, for machines without Docker."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Instruction:
    """An instruction, such as RUN, its flags, such as {"from": "build"}, and the rest of it."""

    name: str
    flags: dict[str, str]
    value: str

    @property
    def words(self) -> list[str]:
        """The words of the form that is a JSON list."""
        return json.loads(self.value)


def read_dockerfile(path: Path) -> Iterator[Instruction]:
    """Yield the instructions."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            flags = {}
            while match := re.match(r"--([\w-]+)=(\S+)\s+", rest):
                flags[match[1]], rest = match[2], rest[match.end() :]
            yield Instruction(name, flags, rest.strip())


@dataclass
class Stage:
    """A root folder as a Dockerfile's stage leaves it, and what holds for its commands."""

    root: Path
    arguments: dict[str, str] = field(default_factory=dict)  # of ARG, while it is built
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH, "HOME": "/root"})
    folder: str = "/"
    user: str = "0"

    def build_command(self, words: list[str], mounts: dict[Path, str] | None = None, sealed: bool = False) -> list[str]:
        """Return the command that runs words inside the root, in processes that end with it.

        mounts: folders of this machine, to be read, by their names in the root. sealed: only /tmp can be written to.
        """
        root = shlex.quote(str(self.root))
        lines = [f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for outside, inside in (mounts or {}).items():
            (self.root / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
            lines += [
                f"mount --bind {shlex.quote(str(outside))} {root}{inside}",
                f"mount -o remount,bind,ro {root}{inside}",
            ]
        if sealed:
            lines += [f"mount -t tmpfs tmpfs {root}/tmp", f"mount -o remount,bind,ro {root}"]
        variables = [f"{name}={value}" for name, value in (self.arguments | self.environment).items()]
        inner = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "env", "-i", *variables]
        inner += ["sh", "-c", 'cd "$0" && exec "$@"', self.folder, *words]
        outer = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*outer, "sh", "-ec", "\n".join([*lines, 'exec "$@"']), "sh", *inner]

    def run(self, words: list[str], mounts: dict[Path, str] | None = None) -> None:
        """Run a command in the root."""
        result = subprocess.run(self.build_command(words, mounts), capture_output=True, text=True, timeout=3600)
        assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


def build_stages(
    dockerfile: Path, context: Path, base: Path, folder: Path, variables: dict[str, str], mounts: dict[Path, str]
) -> Stage:
    """Run a Dockerfile in roots below `folder` and return its last stage.

    base: a tar file of a root, in the place of every base image. variables: for its RUN steps. mounts: see
    `Stage.build_command`.
    """
    stages: dict[str, Stage] = {}
    stage = Stage(folder)  # of the arguments before the first FROM
    for step in read_dockerfile(dockerfile):
        if step.name == "FROM":
            stage = stages[step.value.split()[-1]] = Stage(folder / f"stage-{len(stages)}")
            stage.arguments |= variables
            stage.root.mkdir(parents=True)
            subprocess.run(["tar", "--extract", "--file", base, "--directory", stage.root], check=True)
            # How this machine reaches others
            for path in ("etc/resolv.conf", "etc/hosts"):
                shutil.copy(f"/{path}", stage.root / path)
        elif step.name == "ARG":
            name, _, default = step.value.partition("=")
            stage.arguments[name] = default
        elif step.name == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", step.value):
                stage.environment[name] = value.replace("$PATH", stage.environment["PATH"])
        elif step.name == "WORKDIR":
            stage.folder = step.value
            (stage.root / step.value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.name == "USER":
            stage.user = step.value
        elif step.name == "COPY":
            origin = stages[step.flags["from"]].root if "from" in step.flags else context
            copy_files(step.value.split(), origin, stage)
        elif step.name == "RUN":
            stage.run(["sh", "-c", step.value], mounts)
    return stage


def copy_files(words: list[str], origin: Path, stage: Stage) -> None:
    """Copy files as COPY does: the contents of folders, into the last one of the words."""
    *sources, target = words
    place = stage.root / os.path.join(stage.folder, target).lstrip("/")
    for source in sources:
        found = origin / source.lstrip("/")
        if found.is_dir():
            shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True)
        else:
            path = place / found.name if target.endswith("/") else place
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, path)
