"""Calls of one pipeline in several threads: each draws what it draws alone, and ends by its own interruption."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from t2i.pipelines import Interrupted

from t2i import Text2ImagePipeline
from t2i.diffusion.ddim import build_scheduler_like
from tests.helpers.stages import seeds

QUICK = {"prior_num_inference_steps": 3, "num_inference_steps": 4, "output_type": "latent"}


def run_together(*works: Callable[[], Any]) -> list[Any]:
    """Return what functions return, or raise, in a thread each."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a call hangs"
    return results


@pytest.mark.parametrize("kind", [None, DPMSolverMultistepScheduler, PNDMScheduler])
def test_calls_in_threads_draw_what_they_draw_alone(pipeline, kind):
    if kind is not None:  # they keep predictions of earlier steps
        scheduler = build_scheduler_like(kind, pipeline.decoder_scheduler)
        pipeline = Text2ImagePipeline.from_pipe(pipeline, decoder_scheduler=scheduler)
    meeting = threading.Barrier(2)

    def wait_for_the_other(_: Any) -> None:
        meeting.wait(30)

    def draw(seed: int, **options: Any) -> torch.Tensor:
        return pipeline("red circle", generator=seeds(seed), **QUICK, **options).images

    alone = [draw(seed) for seed in (1, 2)]
    # Their steps alternate
    found = run_together(lambda: draw(1, on_preview=wait_for_the_other), lambda: draw(2, on_preview=wait_for_the_other))
    for one, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-6, rtol=0)


def test_a_callback_interrupts_its_own_call_and_another_thread_all(pipeline):
    meeting = threading.Barrier(2)

    def draw(on_preview: Callable[[Any], None]) -> Any:
        return pipeline("red circle", generator=seeds(1), on_preview=on_preview, **QUICK)

    def interrupt_own(_: Any) -> None:
        meeting.wait(30)
        pipeline.interrupt()

    met = iter([meeting.wait])
    ended, drawn = run_together(lambda: draw(interrupt_own), lambda: draw(lambda _: [wait(30) for wait in met]))
    assert isinstance(ended, Interrupted) and drawn.images.isfinite().all()

    both, go_on = threading.Barrier(3), threading.Event()

    def wait(_: Any) -> None:
        if not go_on.is_set():
            both.wait(30)
            go_on.wait(30)

    def interrupt_all() -> None:
        both.wait(30)
        pipeline.interrupt()
        # A new call takes nothing of it back
        pipeline("red circle", generator=seeds(1), **QUICK)
        go_on.set()

    *found, _ = run_together(lambda: draw(wait), lambda: draw(wait), interrupt_all)
    assert all(isinstance(one, Interrupted) for one in found), found


def test_the_guidance_that_a_callback_sets_is_its_own_calls(pipeline):
    meeting = threading.Barrier(2)

    def draw(scale: float | None) -> torch.Tensor:
        def change(pipe: Any, step: int, t: Any, tensors: dict) -> dict:
            if meeting.parties > 1:
                meeting.wait(30)
            if scale is not None:
                pipe._guidance_scale = scale
            return tensors

        options = {"callback_on_step_end": change, "guidance_scale": 3.0, "image_embeds": torch.eye(1, z_size)}
        return pipeline(generator=seeds(1), num_inference_steps=4, output_type="latent", **options).images

    z_size = pipeline.clip.embed_dim
    together = run_together(lambda: draw(1.0), lambda: draw(None))
    meeting = threading.Barrier(1)
    for one, scale in zip(together, (1.0, None), strict=True):
        torch.testing.assert_close(one, draw(scale), atol=1e-6, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3
