"""Public unCLIP models behind the contracts of this project's own."""
