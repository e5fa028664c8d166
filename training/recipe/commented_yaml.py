"""YAML with a comment beside a value, which no library writes from plain dictionaries."""

import math
from typing import Any

import yaml


def format_document(head: str, values: dict[str, Any]) -> str:
    """YAML with comments, of (value, comment) in nested dictionaries."""
    return "".join(f"# {line}\n" for line in head.splitlines()) + "".join(format_lines(values, ""))


def add_comments(values: dict[str, Any], **why: str) -> dict[str, Any]:
    """Nested values, those with a comment here with it."""
    return {
        name: add_comments(value, **why) if isinstance(value, dict) else (value, why.get(name, ""))
        for name, value in values.items()
    }


def format_lines(values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:\n", *format_lines(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {format_inline(value[0])}{f' # {value[1]}' if value[1] else ''}\n")
    return lines


class NoAliasDumper(yaml.SafeDumper):
    """Without names for lists that are there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def format_inline(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.dump(
        [value], Dumper=NoAliasDumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )[1:-2]
