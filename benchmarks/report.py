"""The tables of docs/speed.md, from what the benchmarks wrote: `python -m benchmarks.report`, last of `make bench`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import RESULTS, Ratio, Row, table

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
BEGIN, END = "<!-- python -m benchmarks.report writes from here on -->", "<!-- to here -->"


def report() -> str:
    """A section for each program whose rows are there."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return "\n\n".join(section(result) for result in found if "rows" in result)


def section(result: dict[str, Any]) -> str:
    machine = result["machine"]
    rates = ", ".join(f"{rate} GFLOP/s in {name}" for name, rate in machine["matrix_gflops"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    about = (
        f"{machine['device']}, {machine['threads']} threads, {machine['date']}; matrix products: {rates}; {versions}."
    )
    rows = [Row(**row | {"ratio": Ratio(**row["ratio"])}) for row in result["rows"]]
    return f"### `{result['command']}`\n\n{about}\n\n{table(rows)}"


def written(page: str) -> str:
    """The page with these tables in the place of those that it has."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{report()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
