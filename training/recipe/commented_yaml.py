"""YAML with a comment beside a value, which no library writes from plain dictionaries."""

import math
from typing import Any

import yaml


def document(head: str, values: dict[str, Any]) -> str:
    """YAML with comments, of (value, comment) in nested dictionaries."""
    return "".join(f"# {line}\n" for line in head.splitlines()) + "".join(lines_of(values, ""))


def plain(values: dict[str, Any], **why: str) -> dict[str, Any]:
    """Nested values, those with a comment here with it."""
    return {
        name: plain(value, **why) if isinstance(value, dict) else (value, why.get(name, ""))
        for name, value in values.items()
    }


def lines_of(values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:\n", *lines_of(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {flow(value[0])}{f' # {value[1]}' if value[1] else ''}\n")
    return lines


class Plain(yaml.SafeDumper):
    """Without names for lists that are there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.dump(
        [value], Dumper=Plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )[1:-2]
