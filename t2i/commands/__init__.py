"""Commands of `t2i`, by topic. Only `t2i.cli` imports them."""

from t2i.shipped import find_shipped_folder

SHIPPED_MODEL = find_shipped_folder("models") / "emoji"
