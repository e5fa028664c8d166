"""Tests 10, 12, 13 and 15, which are tests of pytest: their rows are its results."""

import re
import subprocess
import sys
from pathlib import Path

from tests.serving.load.scale import Row

ROOT = Path(__file__).resolve().parents[3]
SUITES = {
    "10": ("malformed forms and JSON", ["test_gateway.py", "api/test_fields.py"]),
    "12": ("the end of servers and workers", ["test_faults.py", "test_engine.py", "test_workers.py"]),
    "13": ("unmodified clients", ["api"]),
    "15": ("the page in Chromium", ["browser", "page"]),
}


def run_suite(name: str) -> list[Row]:
    """Run tests by pytest; some that were skipped have not passed."""
    what, paths = SUITES[name]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "not deploy"]
    command += [f"tests/serving/{path}" for path in paths]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", (ended.stdout.strip().splitlines() or [""])[-1])
    passed = ended.returncode == 0 and not any("skipped" in count for count in counts)
    if not passed:
        print(ended.stdout, file=sys.stderr)
    return [Row(f"{name} {what}", "all pass", ", ".join(counts), passed)]
