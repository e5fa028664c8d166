"""Starting: from the command to the picture on disk beside the imports alone, and the memory that loading takes.

    python -m benchmarks.starting

Every run is a process of its own, as a user starts it; files are in the page cache, since the first round of each does
not count.
"""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.side_by_side import Row, alternate, ratio, row, run
from t2i.commands import SHIPPED

IMPORTS = "import torch; from diffusers import DiffusionPipeline"
COMMAND = "from t2i.cli import main; main()"
LOADING = """
import sys
from benchmarks.side_by_side import peak_memory
from pipelines.generation import load_pipeline
kept = []
print(peak_memory(lambda: kept.append(load_pipeline(sys.argv[1], "cpu"))))
models = [part for part in kept[0].components.values() if hasattr(part, "parameters")]
print(sum(one.numel() * one.element_size() for model in models for one in model.parameters()))
"""


def main(quick: bool = False) -> list[Row]:
    """`t2i generate` of the shipped model beside the imports of torch and diffusers."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def generate() -> None:
            out = Path(folder) / f"{next(numbers)}.png"
            python(COMMAND, "generate", "a cat", "--seed", "1", "--out", str(out))
            assert out.is_file(), "the picture is on disk"

        works = {"ours": generate, "the imports": lambda: python(IMPORTS)}
        times = alternate(works, rounds=1 if quick else 5, warm=0 if quick else 1)
    peak, weights = loading(SHIPPED)
    note = f"{1 / ratio(times, 'the imports').median:.2f} times as long as the imports; at most 1.5 is wanted. "
    note += f"Loading takes {peak / weights:.2f} times the weights, {weights:,} bytes, above the imports"
    memory = {"ours": peak, "the imports": 0}
    return [row("t2i generate, cold, to the file", times, at_least=0.67, memory=memory, note=note)]


def loading(folder: Path) -> tuple[int, int]:
    """Bytes at the peak of loading a pipeline, above the imports; and those of its weights as they are computed with.

    The shipped ones are stored in half precision and loaded in single.
    """
    peak, weights = python(LOADING, str(folder)).split()[-2:]
    return int(peak), int(weights)


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    run("starting", main)
