"""What users of diffusers, Kandinsky and kohya do: rows of docs/reference/for-diffusers-users.md, and their tests."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.stages import seeds

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "for-diffusers-users.md"
PRIOR = {"prior_num_inference_steps": 2}
LATENTS = PRIOR | {"num_inference_steps": 4, "output_type": "latent"}
QUICK = PRIOR | {"num_inference_steps": 2, "output_type": "pt"}
TESTS: dict[str, tuple[str, Callable[..., None]]] = {}  # what a user does -> the page's word, and what shows it


def read_rows() -> dict[str, str]:
    """Of the page: what a user does -> "works" or "differs"."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == 2 for row in cells)
    rows = [(what, here.split()[0].rstrip(":;")) for what, here in cells if not what.startswith("**")]
    # What differs says what to do
    assert all(":" in here for _, here in cells if here.startswith("differs"))
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def shows(verdict: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the test of a row. It gets the fixtures that its parameters name."""

    def register(test: Callable[..., None]) -> Callable[..., None]:
        assert what not in TESTS
        TESTS[what] = (verdict, test)
        return test

    return register


works, differs = functools.partial(shows, "works"), functools.partial(shows, "differs")


def draw(pipe: Any, seed: int = 1, **settings: Any) -> Any:
    return pipe("red circle", generator=seeds(seed)[0], **{**QUICK, **settings}).images


def same(found: Any, expected: Any, atol: float = 2e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=atol, rtol=0)


def other(found: Tensor, expected: Tensor, at_least: float = 1e-4) -> None:
    assert found.isfinite().all() and (found - expected).abs().max() > at_least


def refuse(pipe: Any, **settings: Any) -> None:
    for name in settings:
        with pytest.raises(TypeError, match=f"unknown argument '{name}'"):
            draw(pipe, **settings)


def photo(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
