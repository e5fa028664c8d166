"""Cold start: from the command to the image on disk against the imports alone; the peak of memory of loading.

    python -m benchmarks.starting [--quick]

Every run is a process of its own, as a user starts it. Files are in the page cache: the first round does not count.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from t2i.pipelines import Text2ImagePipeline
from torch import nn

from benchmarks.report import run
from benchmarks.side_by_side import Ratio, Row, build_row, compute_ratio, time_in_turns
from t2i.commands import SHIPPED_MODEL
from t2i.networks.prior import Prior

IMPORTS = "import torch; from diffusers import DiffusionPipeline"
COMMAND = "from t2i.cli import main; main()"
LOADING = """
import sys
from benchmarks.side_by_side import measure_peak_memory
from t2i.pipelines.jobs.planning import ModelSource, load_pipeline
pipelines = []
print(measure_peak_memory(lambda: pipelines.append(load_pipeline(ModelSource(sys.argv[1], device="cpu")))))
models = [part for part in pipelines[0].components.values() if hasattr(part, "parameters")]
print(sum(each.numel() * each.element_size() for model in models for each in model.parameters()))
"""
LARGE, TINY = (896, 20), (192, 2)  # width and depth of a prior: 400 MB in fp16, and for tests
AT_MOST, MEMORY_AT_MOST = 1.1, 1.2  # times the imports; times the weights


def main(quick: bool) -> list[Row]:
    """Compare `t2i generate` of the shipped model with the imports of torch and diffusers; measure loading."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def generate() -> None:
            out = Path(folder) / f"{next(numbers)}.png"
            run_python(COMMAND, "generate", "a cat", "--seed", "1", "--out", str(out))
            assert out.is_file(), "the image is on disk"

        works = {"ours": generate, "the imports": lambda: run_python(IMPORTS)}
        seconds = time_in_turns(works, rounds=1 if quick else 5, warm=0 if quick else 1)
        times = 1 / compute_ratio(seconds, "ours", "the imports").median
        note = f"{times:.2f} times as long as the imports; goal: at most {AT_MOST}"
        started = build_row("t2i generate, cold, to the file", seconds, at_least=1 / AT_MOST, note=note)
        larger = Path(folder) / "larger"
        width, depth = TINY if quick else LARGE
        save_with_larger_prior(larger, width, depth)
        folders = {} if quick else {"the shipped model": SHIPPED_MODEL}
        folders["the shipped model with a larger prior"] = larger
        loading = (measure_loading(name, path, 1 if quick else 3) for name, path in folders.items())
        return [started, *(row for row in loading if row is not None)]


def save_with_larger_prior(folder: Path, width: int, depth: int) -> None:
    """Save the shipped pipeline with a prior of random weights, in fp16 as the shipped one is stored."""
    pipeline = Text2ImagePipeline.from_pretrained(SHIPPED_MODEL)
    config = dict(pipeline.prior.config) | {"width": width, "depth": depth, "heads": width // 64}
    prior = Prior.from_config(config)
    nn.init.normal_(prior.query, std=0.02)
    pipeline.register_modules(prior=prior)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.half()
    pipeline.save_pretrained(folder)


def measure_loading(name: str, folder: Path, rounds: int) -> Row | None:
    """Return the weights divided by the peak of loading; None where the system gives no peak."""
    outputs = [run_python(LOADING, str(folder)).split()[-2:] for _ in range(rounds)]
    peaks, weights = [int(peak) for peak, _ in outputs if peak != "None"], int(outputs[0][1])
    if not peaks:
        print(f"memory of loading {name} is not measured: this system gives no peak of memory", file=sys.stderr)
        return None
    peak = statistics.median(peaks)
    note = (
        f"The peak above the imports is {peak / weights:.2f} times the weights ({weights:,} bytes in fp32); goal: at "
        f"most {MEMORY_AT_MOST}. The ratio is weights over peak"
    )
    ratio = Ratio(weights / peak, weights / max(peaks), weights / min(peaks))
    memory = {"ours": int(peak), "its weights": weights}
    return Row(f"memory of loading {name}", "its weights", ratio, 1 / MEMORY_AT_MOST, {}, memory=memory, note=note)


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    run("starting", main)
