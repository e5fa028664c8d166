"""Capacity of one engine of the server: seconds of an image, for requests that come one by one and together.

    python -m tests.serving.load.capacity [--model FOLDER] [--device cuda] [--steps N] [--together 1 8 16]

Every request draws one image in a thread of its own, as in `t2i serve`. "CPU" is the time of all threads, "networks"
that of the engine's thread; the rest is Python, CLIP and the autoencoder. Run it with OMP_NUM_THREADS=1 for the
seconds of one core, which hardly depend on what else the machine does. `docs/how-to/plan-capacity.md` reckons with it.
"""

import argparse
import threading
import time
from pathlib import Path

from t2i.pipelines import Text2ImagePipeline
from t2i.pipelines.serving.engine import StepEngine
from torch import Generator

from t2i.commands import SHIPPED_MODEL

PROMPTS = ("a cat", "a dog", "a red heart", "a house", "a tree", "a car", "a fish", "a star")


def read_thread_seconds(thread: threading.Thread) -> float:
    """Return the CPU seconds that a running thread has taken."""
    fields = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()
    return int(fields[0]) / 1e9


def draw_together(engine: StepEngine, count: int, steps: int | None) -> None:
    """Draw so many images in as many requests at the same time. steps: of both stages; None is the model's default."""
    options = {} if steps is None else {"num_inference_steps": steps, "prior_num_inference_steps": steps}

    def draw(number: int) -> None:
        with engine.join() as drawing:
            drawing.pipeline(PROMPTS[number % len(PROMPTS)], generator=Generator().manual_seed(number), **options)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.serving.load.capacity")
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="of both stages; default: the model's")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pipeline = Text2ImagePipeline.from_pretrained(options.model).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    print(f"{'together':>8} {'wall, s':>8} {'CPU, s':>8} {'networks, s':>12} {'rest, ms':>9}   (of an image)")
    with StepEngine(pipeline, max_rows=4 * max(options.together)) as engine:
        draw_together(engine, max(options.together), 2)  # code for these sizes is built
        for _ in range(options.rounds):
            for count in options.together:
                wall, cpu, networks = time.perf_counter(), time.process_time(), read_thread_seconds(engine.thread)
                draw_together(engine, count, options.steps)
                wall, cpu = (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count
                networks = (read_thread_seconds(engine.thread) - networks) / count
                rest = 1000 * (cpu - networks)
                print(f"{count:>8} {wall:>8.2f} {cpu:>8.2f} {networks:>12.2f} {rest:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
