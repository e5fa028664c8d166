"""Print and store the rows of a benchmark, and write the tables of the page on speed: `python -m benchmarks.report`."""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from benchmarks import CANNOT_RUN
from benchmarks.side_by_side import Ratio, Row, device, measure_matrix_rate, measure_product_rate
from t2i.errors import InputError
from t2i.runtime.devices import can_compute_bf16

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "speed.md"
BEGIN, END = "<!-- python -m benchmarks.report writes from here on -->", "<!-- to here -->"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "dalle2-pytorch", "numpy")
COLUMNS = ["what", "against", "t2i, s", "peer, s", "ratio", "goal", "difference", "matrix rate", "MiB, t2i / peer"]


def run(name: str, main: Callable[[bool], list[Row]]) -> None:
    """Run a benchmark as a program: print its table, and write `results/NAME.json` unless `--quick` is given.

    A benchmark that cannot run here prints one line and ends with a status that `python -m benchmarks` accepts.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run, and do outputs agree")
    quick = parser.parse_args().quick
    try:
        rows = main(quick)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(CANNOT_RUN)
    if quick:
        print(format_table(rows))
    else:
        write_result(name, rows)


def write_result(name: str, rows: list[Row]) -> None:
    """Print a table and write `results/NAME.json`: the command, the machine and the rows."""
    machine = describe_machine()
    result = {"command": f"python -m benchmarks.{name}", "machine": machine, "rows": [asdict(row) for row in rows]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {machine['device']}, {machine['threads']} threads, {machine['date']}\n\n{format_table(rows)}\n")


def describe_machine() -> dict[str, Any]:
    """Return the date, the device, its rates in matrix products, and the versions of the packages."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    rates = {"fp32": measure_matrix_rate()}
    if can_compute_bf16(device().type):  # elsewhere ten large products would take minutes
        rates["bf16"] = measure_matrix_rate(torch.bfloat16)
    if device().type == "cpu":
        rates["fp32 of torch's own product"] = measure_product_rate(torch.matmul)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else describe_processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "matrix_gflops": {name: round(rate / 1e9) for name, rate in rates.items()},
    }


def describe_processor() -> str:
    """Return the processor's name, with its family and model where the system gives them."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":")[::2] for line in info.read_text().splitlines()] if info.exists() else []
    facts = {key.strip(): value.strip() for key, value in reversed(lines)}
    if "model name" not in facts:
        return platform.machine()
    family = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return facts["model name"] + family


def format_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table without empty columns; rows of the same note share its number."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    table = [list(COLUMNS)]
    for row in rows:
        missed = ": missed" if row.at_least is not None and row.ratio.median < row.at_least else ""
        seconds = [f"{value:.3g}" for value in row.seconds.values()] or ["", ""]
        mark = f" [{notes.index(row.note) + 1}]" if row.note else ""
        cells = [row.what + mark, row.against, seconds[0], seconds[-1], f"{row.ratio}{missed}"]
        cells.append("" if row.at_least is None else f"{row.at_least:.3g}")
        cells.append("" if row.difference is None else f"{row.difference:.0e}")
        cells.append(" / ".join(f"{fraction:.0%}" for fraction in row.rate.values()))
        cells.append(" / ".join(f"{peak / 2**20:.0f}" for peak in row.memory.values()))
        table.append(cells)
    filled = [any(cells[column] for cells in table[1:]) for column in range(len(COLUMNS))]
    lines = ["| " + " | ".join(compress(cells, filled)) + " |" for cells in table]
    lines.insert(1, "|---" * sum(filled) + "|")
    numbered = ["", *(f"{number}. {note}" for number, note in enumerate(notes, start=1))]
    return "\n".join([*lines, *numbered] if notes else lines)


def format_section(result: dict[str, Any]) -> str:
    """Return the heading, the machine and the table of a stored result."""
    about = "{device}, {threads} threads, {date}".format(**result["machine"])
    rows = [Row(**row | {"ratio": Ratio(**row["ratio"])}) for row in result["rows"]]
    return f"### `{result['command']}`\n\n{about}.\n\n{format_table(rows)}"


def format_versions(results: list[dict[str, Any]]) -> str:
    """Return a line for each set of package versions that the results were measured with."""
    commands: dict[str, list[str]] = {}
    for result in results:
        versions = ", ".join(map(" ".join, result["machine"]["versions"].items()))
        commands.setdefault(versions, []).append(f"`{result['command']}`")
    named = {versions: f" of {', '.join(names)}" * (len(commands) > 1) for versions, names in commands.items()}
    return "\n".join(f"Versions{names}: {versions}." for versions, names in named.items())


def update_page(page: str) -> str:
    """Return the page with the tables of all stored results in place of those that it has."""
    before, rest = page.split(BEGIN)
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    tables = "\n\n".join([format_versions(results), *map(format_section, results)])
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(update_page(PAGE.read_text()))
