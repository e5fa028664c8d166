"""Run load and soak tests of `t2i serve`, and print what was wanted and what was measured.

    python -m tests.serving.load                   all tests, ten minutes of soak
    python -m tests.serving.load --seconds 20 1 4  short forms of two of them

Exit status 1 if any failed. Ratios hold on a machine that does other things too; seconds hold on one that does not.
"""

import argparse
import asyncio
import sys
import time
from dataclasses import fields, replace

from tests.serving.load.checks import ON_ONE_SERVER, Row, Scale, run_test

TESTS = ("1", *ON_ONE_SERVER)


def print_row(row: Row) -> None:
    result = "pass" if row.passed else "FAIL"
    print(f"{row.test:<66} {row.wanted:>14} {row.measured:>18} {result:>5}", flush=True)


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
    print_row(Row("test", "wanted", "measured", True))
    passed = True
    for name in arguments.tests or TESTS:
        start = time.perf_counter()
        for row in asyncio.run(run_test(name, arguments.model, scale)):
            print_row(row)
            passed &= row.passed
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
