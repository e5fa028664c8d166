"""Starting: from the command to the picture on disk beside the imports alone, and the memory that loading takes.

    python -m benchmarks.starting

Every run is a process of its own, as a user starts it; files are in the page cache, since the first round of each does
not count.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from t2i.pipelines import Text2ImagePipeline
from torch import nn

from benchmarks.side_by_side import Ratio, Row, alternate, ratio, row, run
from t2i.commands import SHIPPED_MODEL
from t2i.networks.prior import Prior

IMPORTS = "import torch; from diffusers import DiffusionPipeline"
COMMAND = "from t2i.cli import main; main()"
LOADING = """
import sys
from benchmarks.side_by_side import peak_memory
from t2i.pipelines.jobs.generation import load_pipeline
kept = []
print(peak_memory(lambda: kept.append(load_pipeline(sys.argv[1], "cpu"))))
models = [part for part in kept[0].components.values() if hasattr(part, "parameters")]
print(sum(one.numel() * one.element_size() for model in models for one in model.parameters()))
"""


LARGE, TINY = (896, 20), (192, 2)  # width and depth of a prior: 400 MB in fp16, and for tests


def main(quick: bool) -> list[Row]:
    """`t2i generate` of the shipped model beside the imports of torch and diffusers; what loading takes."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def generate() -> None:
            out = Path(folder) / f"{next(numbers)}.png"
            python(COMMAND, "generate", "a cat", "--seed", "1", "--out", str(out))
            assert out.is_file(), "the picture is on disk"

        works = {"ours": generate, "the imports": lambda: python(IMPORTS)}
        times = alternate(works, rounds=1 if quick else 5, warm=0 if quick else 1)
        note = f"{1 / ratio(times, 'the imports').median:.2f} times as long as the imports; at most 1.5 is wanted"
        rows = [row("t2i generate, cold, to the file", times, at_least=1 / 1.5, note=note)]
        larger = Path(folder) / "larger"
        save_larger(larger, *(TINY if quick else LARGE))
        folders = {} if quick else {"the shipped model": SHIPPED_MODEL}
        folders["the shipped model with a larger prior"] = larger
        rounds = 1 if quick else 3
        return rows + [one for what, at in folders.items() if (one := loading_row(what, at, rounds)) is not None]


def save_larger(folder: Path, width: int, depth: int) -> None:
    """The shipped pipeline with a prior of random weights, in fp16 as the shipped one is stored."""
    pipeline = Text2ImagePipeline.from_pretrained(SHIPPED_MODEL)
    of = pipeline.prior.config
    prior = Prior(
        of.embed_dim, of.text_width, of.context_length, width, depth, width // 64, of.null_length, of.clip_fingerprint
    )
    nn.init.normal_(prior.query, std=0.02)
    pipeline.register_modules(prior=prior)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.half()
    pipeline.save_pretrained(folder)


def loading_row(what: str, folder: Path, rounds: int) -> Row | None:
    """Weights over the peak of loading; None where the system does not tell the peak."""
    found = [loading(folder) for _ in range(rounds)]
    peaks, weights = [peak for peak, _ in found if peak], found[0][1]
    if not peaks:
        print(
            f"what loading {what} takes is not measured: this system does not tell the peak of memory", file=sys.stderr
        )
        return None
    peak = statistics.median(peaks)
    note = f"{peak / weights:.2f} times its weights at the peak, above the imports; at most 1.2 is wanted. Weights are "
    note += f"{weights:,} bytes as they are computed with, fp32; stored in fp16. The ratio is weights over peak"
    less = Ratio(weights / peak, weights / max(peaks), weights / min(peaks))
    memory = {"ours": int(peak), "its weights": weights}
    return Row(f"memory of loading {what}", "its weights", less, 1 / 1.2, {}, memory=memory, note=note)


def loading(folder: Path) -> tuple[int | None, int]:
    """Bytes at the peak of loading a pipeline, above the imports; and those of its weights as they are computed with.

    The shipped ones are stored in half precision and loaded in single.
    """
    peak, weights = python(LOADING, str(folder)).split()[-2:]
    return None if peak == "None" else int(peak), int(weights)


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    run("starting", main)
