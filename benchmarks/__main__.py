"""Run every benchmark of speed, one after the other: `python -m benchmarks [--quick]`, or `make bench`."""

import argparse
import subprocess
import sys

from benchmarks import CANNOT_RUN

PROGRAMS = ("pipeline_speed", "prior_speed", "starting", "training_speed")  # each has main(quick) -> rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="toy sizes: do they run; writes nothing")
    options = ["--quick"] if parser.parse_args().quick else []
    # Each has a process of its own, so that none finds memory that another left; one that fails does not stop others.
    names = PROGRAMS if options else (*PROGRAMS, "report")
    statuses = {
        name: subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options]).returncode for name in names
    }
    skipped = [name for name, status in statuses.items() if status == CANNOT_RUN]
    failed = [name for name, status in statuses.items() if status not in (0, CANNOT_RUN)]
    for what, named in (("cannot run here, for the reason above", skipped), ("failed", failed)):
        if named:
            print(f"{what}: {', '.join(named)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
