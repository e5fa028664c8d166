"""Changes that libraries make to a model from outside: torch.compile wraps it, and peft adds adapters."""

from typing import Any


def unwrap_compiled(model: Any) -> Any:
    """Return the model inside a `torch.compile`, which wraps a module in another; any other object as it is."""
    return getattr(model, "_orig_mod", model)


def has_adapters(model: Any) -> bool:
    """Return True if peft has put adapters into a model: it then has their configuration."""
    return hasattr(model, "peft_config")
