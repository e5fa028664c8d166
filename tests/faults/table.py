"""The table of `make faults`: which faults were injected, how often, and how often they were survived."""

import json
import sys
from pathlib import Path


def table(lines: list[str]) -> str:
    rows = [json.loads(line) for line in lines]
    injected: dict[str, int] = {}
    survived: dict[str, int] = {}
    for row in rows:
        injected[row["fault"]] = injected.get(row["fault"], 0) + row["injected"]
        survived[row["fault"]] = survived.get(row["fault"], 0) + row["survived"]
    width = max(map(len, injected), default=5)
    found = [f"{'fault':{width}}  injected  survived"]
    found += [f"{fault:{width}}  {count:8,}  {survived[fault]:8,}" for fault, count in sorted(injected.items())]
    total = f"{'all':{width}}  {sum(injected.values()):8,}  {sum(survived.values()):8,}"
    return "\n".join([*found, total])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()))
