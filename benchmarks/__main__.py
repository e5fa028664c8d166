"""Every benchmark of speed, one after the other: `python -m benchmarks [--quick]`, or `make bench`."""

import subprocess
import sys
from pathlib import Path


def programs() -> list[str]:
    """The modules of this package that compare side by side: those with a `main(quick: bool)`."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if "\ndef main(quick: bool" in file.read_text()]


if __name__ == "__main__":
    # Each in its own process, so that none finds memory that another left; one that fails does not stop the others.
    # growth compares with what is counted and not with a peer.
    names = [*programs(), "growth"]
    commands = [[sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]] for name in names]
    if "--quick" not in sys.argv:  # which writes nothing
        commands.append([sys.executable, "-m", "benchmarks.report"])
    sys.exit(any([subprocess.run(command).returncode for command in commands]))
