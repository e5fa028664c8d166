"""Every benchmark of speed, one after the other: `python -m benchmarks [--quick]`, or `make bench`."""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import CANNOT_RUN


def programs() -> list[str]:
    """The modules of this package that compare side by side: those with a `main(quick: bool)`."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if "\ndef main(quick: bool" in file.read_text()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether they run; writes nothing")
    options = ["--quick"] * parser.parse_args().quick
    # Each in its own process, so that none finds memory that another left; one that fails does not stop the others.
    names = [*programs(), *([] if options else ["report"])]
    ended = {name: subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options]).returncode for name in names}
    failed = [name for name, status in ended.items() if status not in (0, CANNOT_RUN)]
    skipped = [name for name, status in ended.items() if status == CANNOT_RUN]
    for what, those in (("cannot run here, why is said above", skipped), ("failed", failed)):
        if those:
            print(f"{what}: {', '.join(those)}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
