"""The decoder's steps compiled (`compile=True`) against the same steps as they are, and what the warm-up takes."""

from t2i.pipelines import Text2ImagePipeline
from torch import Generator, Tensor

from benchmarks.side_by_side import Row, alternate, device, difference, row, run
from t2i.commands import SHIPPED_MODEL
from t2i.runtime.compiling import compile_steps

PROMPTS = ["a red apple", "a grinning face", "a blue heart", "a dog"]


def main(quick: bool) -> list[Row]:
    steps, rounds = (1, 1) if quick else (25, 5)
    plain, compiled = (Text2ImagePipeline.from_pretrained(SHIPPED_MODEL).to(device()) for _ in range(2))
    step = compile_steps(compiled.decoder, "eager" if quick else "inductor")  # what a compiler writes takes its time
    worst = difference(draw(compiled, steps), draw(plain, steps))
    times = alternate({"ours": lambda: draw(compiled, steps), "not compiled": lambda: draw(plain, steps)}, rounds)
    note = f"the first step took {max(step.warm_up.values()):.0f} s"
    return [row(f"emoji, {len(PROMPTS)} prompts, the decoder compiled", times, difference=worst, note=note)]


def draw(pipeline: Text2ImagePipeline, steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    own = [Generator().manual_seed(number) for number in range(len(PROMPTS))]
    return pipeline(PROMPTS, generator=own, num_inference_steps=steps, output_type="pt").images


if __name__ == "__main__":
    run("compiled", main)
