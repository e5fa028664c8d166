"""Run load and soak tests of `t2i serve`, and print what was wanted and what was measured.

    python -m tests.serving.load                   all tests, ten minutes of soak: about an hour
    python -m tests.serving.load 1 3 7             some of them: a long run can be done in parts
    python -m tests.serving.load --seconds 20 1 4  short forms

10, 12, 13 and 15 are tests of pytest. Exit status 1 if any failed. Ratios hold on a machine that does other things
too; seconds hold on one that does not.
"""

import argparse
import asyncio
import sys
import time
import traceback
from dataclasses import fields, replace

from tests.serving.load.checks import TESTS, run_test
from tests.serving.load.scale import Row, Scale


def print_row(test: str, wanted: str, measured: str, ok: str) -> None:
    print(f"{test:<66} {wanted:>16} {measured:>24}  {ok}", flush=True)


def run_one(name: str, model: str, scale: Scale) -> list[Row]:
    """Return the rows of a test; one that ends by an error has a row too, and the next ones run."""
    try:
        return asyncio.run(run_test(name, model, scale))
    except Exception as error:
        traceback.print_exc()
        return [Row(f"{name} ended by an error", "rows", type(error).__name__, False)]


def main() -> int:
    """Run the tests that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=[], metavar="TEST", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--model", default="models/emoji")
    for field in fields(Scale):
        kind = type(getattr(Scale, field.name))
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=getattr(Scale, field.name))
    arguments = parser.parse_args()
    if unknown := set(arguments.tests) - set(TESTS):
        parser.error(f"no test {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
    scale = replace(Scale(), **{field.name: getattr(arguments, field.name) for field in fields(Scale)})
    print_row("test", "wanted", "measured", "ok")
    failed, began = [], time.perf_counter()
    for name in arguments.tests or TESTS:
        start = time.perf_counter()
        rows = run_one(name, arguments.model, scale)
        for row in rows:
            print_row(row.test, row.wanted, row.measured, "yes" if row.passed else "NO")
        failed += [row for row in rows if not row.passed]
        print(f"  (test {name}: {time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(failed)} rows failed in {time.perf_counter() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
