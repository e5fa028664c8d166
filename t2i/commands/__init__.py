"""The commands of `t2i` by what they are for: drawing, measuring. Only `t2i.cli` imports them."""

from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "emoji"
