"""The engine: requests in threads share calls of the networks, and each draws what it draws alone."""

import copy
import threading
import time
from collections.abc import Callable

import pytest
import torch
from t2i.pipelines import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    Text2ImagePipeline,
    TextDiffPipeline,
)
from t2i.pipelines.serving.draw_request import ModelFacts
from t2i.pipelines.serving.engine import Cancelled, StepEngine
from t2i.pipelines.serving.rows import (
    GATHERING_SECONDS,
    MAX_HELD_ROUNDS,
    MAX_PAUSED_ROUNDS,
    Drawing,
    PreparedCondition,
    StepCall,
    round_up_rows,
    take_ready_steps,
)
from torch import Generator, Tensor

from t2i.diffusion.guidance import Guidance
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.regression_prior import RegressionPrior
from t2i.sampling.steering import Steering
from tests.helpers.pipelines import tiny_upsampler  # noqa: F401

Draw = Callable[[Text2ImagePipeline], Tensor]


def draw_text(prompt: str, seed: int, **options) -> Draw:
    return lambda pipeline: (
        pipeline(
            prompt, generator=Generator().manual_seed(seed), output_type="pt", **{"num_inference_steps": 4} | options
        ).images
    )


def draw_image(kind: type, image: Tensor, **options) -> Draw:
    return lambda pipeline: (
        kind.from_pipe(pipeline)(
            image=image, generator=Generator().manual_seed(5), output_type="pt", num_inference_steps=4, **options
        ).images
    )


def draw_together(engine: StepEngine, draws: list[Draw]) -> list[Tensor | BaseException]:
    """Draw each in a thread of its own; an error stands in the place of a picture."""
    results: list = [None] * len(draws)

    def work(number: int) -> None:
        try:
            with engine.join() as drawing:
                results[number] = draws[number](drawing.pipeline)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(draws))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a request hangs"
    return results


@pytest.fixture
def engine(pipeline):
    with StepEngine(pipeline) as engine:
        yield engine


def test_requests_of_any_kind_draw_together_what_they_draw_alone(pipeline):
    image = torch.rand(1, 3, 32, 32, generator=Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    draws = [
        draw_text("a red circle", 0),
        draw_text("a blue square", 1, num_inference_steps=6, guidance_scale=3.0),
        draw_text("a green circle", 2, guidance_scale=1.0, prior_num_inference_steps=3),
        draw_text("two", 3, sampler="unipc", num_images_per_prompt=3),
        draw_text("three", 4, sampler="dpmsolver++", guidance_scale=Guidance(2.0, interval=(0.2, 0.8))),
        draw_text("four", 5, sampler="ddpm", negative_prompt="a circle"),
        draw_image(ImageVariationPipeline, image),
        draw_image(InpaintPipeline, image, mask_image=mask, prompt="a red circle"),
        draw_image(ImageToImagePipeline, image, prompt="a blue square", strength=0.5),
        draw_image(TextDiffPipeline, image, source="a red circle", target="a blue square", direction="prior"),
    ]
    alone = [draw(pipeline) for draw in draws]
    with StepEngine(pipeline) as engine:
        together = draw_together(engine, draws)
        counts = engine.counts
    for expected, found in zip(alone, together):
        assert isinstance(found, Tensor), found
        assert (found - expected).abs().max() < 1e-4
    assert counts.calls < counts.rows / 3, "calls are shared"
    # The networks have their own methods again
    assert torch.equal(draws[0](pipeline), alone[0]) and "step" not in vars(pipeline.decoder)


@pytest.mark.parametrize("kind", (AutoregressivePrior, RegressionPrior, EclipsePrior))
def test_priors_without_a_scheduler_draw_in_the_engine_what_they_draw_alone(pipeline, kind):
    clip, sizes = pipeline.clip, {} if kind is RegressionPrior else {"width": 8, "depth": 1, "heads": 2}
    sizes |= {"components": 4} if kind is AutoregressivePrior else {}
    sizes |= {} if kind is RegressionPrior else {"context_length": clip.context_length}
    prior = kind(clip.embed_dim, clip.text_width, **sizes, clip_fingerprint=clip.identity).eval()
    assert ModelFacts.find(pipeline, 1).prior_has_steps
    pipeline.register_modules(prior=prior, prior_scheduler=None)
    assert not ModelFacts.find(pipeline, 1).prior_has_steps  # so that the page offers no sampler
    draws = [draw_text("a red circle", 0), draw_text("two", 1, num_images_per_prompt=2, prior_guidance_scale=1.0)]
    alone = [draw(pipeline) for draw in draws]
    with StepEngine(pipeline) as engine:
        engine.warm_up((1, 2))
        together = draw_together(engine, draws)
    for expected, found in zip(alone, together):
        assert isinstance(found, Tensor) and (found - expected).abs().max() < 1e-4, found


def test_threads_that_did_not_join_draw_as_before(pipeline, engine):
    expected = draw_text("a red circle", 0)(pipeline)
    assert engine.counts.calls == 0
    assert (draw_together(engine, [draw_text("a red circle", 0)])[0] - expected).abs().max() < 1e-4


def test_steps_with_gradients_do_not_wait_for_the_engine(pipeline, engine):
    image = torch.rand(1, 3, 32, 32, generator=Generator().manual_seed(1))
    steering = Steering(image=image, scale=2.0)
    draws = [draw_text("a red circle", 0, steering=steering), draw_text("a blue square", 1)]
    for draw, found in zip(draws, draw_together(engine, draws)):
        assert (found - draw(pipeline)).abs().max() < 1e-4


def test_a_cancelled_request_ends_between_two_steps_and_harms_nobody(pipeline, engine):
    reached, results = threading.Event(), {}

    def stop_at_third(pipe, step, t, tensors):
        if step == 2:
            reached.set()
        return {}

    def work() -> None:
        with engine.join() as drawing:
            results["drawing"] = drawing
            try:
                draw_text("long", 0, num_inference_steps=500, callback_on_step_end=stop_at_third)(drawing.pipeline)
            except Cancelled as error:
                results["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(30)
    other = threading.Thread(
        target=lambda: results.update(other=draw_together(engine, [draw_text("a blue square", 1)])[0])
    )
    other.start()
    engine.cancel(results["drawing"].cancelled)
    thread.join(10)
    other.join(30)
    assert isinstance(results["error"], Cancelled) and not engine.drawings
    assert (results["other"] - draw_text("a blue square", 1)(pipeline)).abs().max() < 1e-4


def test_a_request_that_fails_fails_alone(pipeline, engine):
    step = engine.methods["decoder"][1]

    def fail_for_marked_rows(x: Tensor, t: Tensor, context) -> Tensor:
        if (x > 1e6).any():
            raise ValueError("bad rows")
        return step(x, t, context)

    engine.methods["decoder"] = (engine.methods["decoder"][0], fail_for_marked_rows)
    bad = torch.full((1, *pipeline.latent_shape), 1e9)
    draws = [draw_text("a red circle", 0), draw_text("bad", 1, latents=bad), draw_text("a blue square", 2)]
    good, failed, also_good = draw_together(engine, draws)
    assert isinstance(failed, ValueError) and "bad rows" in str(failed)
    for draw, found in ((draws[0], good), (draws[2], also_good)):
        assert (found - draw(pipeline)).abs().max() < 1e-4


def test_a_request_that_fails_between_two_steps_lets_the_others_take_theirs(pipeline, engine):
    def fail(pipe, step, t, tensors):
        raise ValueError("a fault of the caller's")

    others = [draw_text("a blue square", seed) for seed in (1, 2)]
    failed, *drawn = draw_together(engine, [draw_text("a red circle", 0, callback_on_step_end=fail), *others])
    later = draw_together(engine, others)
    assert isinstance(failed, ValueError) and not engine.turn.locked()
    for draw, *found in zip(others, drawn, later, strict=True):
        assert max((image - draw(pipeline)).abs().max() for image in found) < 1e-4


def make_drawings(**waiting_for: int) -> dict[str, list[Drawing]]:
    """Return as many requests that wait for a step of a network, or are `idle`, as the arguments tell."""
    drawings: dict[str, list[Drawing]] = {}
    for name, count in waiting_for.items():
        drawings[name] = [Drawing(None, threading.Event(), threading.Condition()) for _ in range(count)]
        for drawing in drawings[name] if name != "idle" else []:
            drawing.has_stepped = name != "new"
            wait_for_step(drawing, "prior" if name == "new" else name)
    return drawings


def wait_for_step(drawing: Drawing, network: str) -> None:
    drawing.waiting = StepCall(network, torch.zeros(1), torch.zeros(1), PreparedCondition(drawing, None), ())


def take_networks(drawings: dict[str, list[Drawing]], seconds: float = 1.0) -> list[str]:
    """Return the networks of the steps that are taken so long after the requests joined."""
    everyone = [drawing for group in drawings.values() for drawing in group]
    return [call.denoiser for call in take_ready_steps(everyone, everyone[0].joined + seconds)]


def test_no_step_is_taken_while_a_request_is_between_two():
    drawings = make_drawings(decoder=2, idle=1)
    drawings["idle"][0].is_stepping = True
    assert take_networks(drawings) == []
    drawings.pop("idle")
    assert take_networks(drawings) == ["decoder"] * 2
    assert all(drawing.waiting is None for drawing in drawings["decoder"])


def test_prior_steps_go_first_so_that_all_share_the_decoder():
    drawings = make_drawings(decoder=2, prior=1)
    assert [take_networks(drawings) for _ in range(2)] == [["prior"], ["decoder"] * 2]


def test_newcomers_wait_until_they_are_as_many_as_the_others():
    assert take_networks(make_drawings(decoder=2, new=1)) == ["decoder"] * 2
    drawings = make_drawings(prior=2, decoder=1, new=2)
    assert take_networks(drawings) == ["prior"] * 2
    assert all(drawing.waiting is None for drawing in drawings["prior"])
    assert all(drawing.waiting is not None for drawing in drawings["new"])
    assert take_networks(make_drawings(decoder=2, new=2)) == ["prior"] * 2
    assert take_networks(make_drawings(new=1)) == ["prior"]


def test_newcomers_wait_for_a_limited_number_of_rounds():
    drawings, taken = make_drawings(decoder=2, new=1), []
    for _ in range(MAX_HELD_ROUNDS + 1):
        for drawing in drawings["decoder"]:
            wait_for_step(drawing, "decoder")
        taken.append(take_networks(drawings)[0])
    assert taken == ["decoder"] * MAX_HELD_ROUNDS + ["prior"]


def test_decoder_steps_are_passed_over_for_a_limited_number_of_rounds():
    drawings, taken = make_drawings(decoder=1, prior=1), []
    for _ in range(MAX_PAUSED_ROUNDS + 1):
        wait_for_step(drawings["prior"][0], "prior")
        taken.append(take_networks(drawings))
    assert taken[:-1] == [["prior"]] * MAX_PAUSED_ROUNDS and sorted(taken[-1]) == ["decoder", "prior"]


def test_newcomers_wait_a_moment_for_a_request_that_begins_or_ends():
    drawings = make_drawings(new=1, idle=1)
    assert take_networks(drawings, GATHERING_SECONDS / 2) == []
    assert take_networks(drawings, GATHERING_SECONDS * 2) == ["prior"]


def test_a_newcomer_does_not_wait_longer_because_another_came_later():
    drawings = make_drawings(new=2, idle=1)
    drawings["new"][1].joined += GATHERING_SECONDS
    assert take_networks(drawings, GATHERING_SECONDS * 1.5) == ["prior"] * 2


def test_a_request_without_a_prior_takes_its_first_step_with_the_decoders():
    drawings = make_drawings(decoder=3)
    drawings["decoder"][0].has_stepped = False
    assert take_networks(drawings) == ["decoder"] * 3


def test_the_engine_computes_with_its_cores_and_requests_with_one(pipeline):
    threads: dict[str, int] = {}

    def count_threads(latents: Tensor, t: Tensor, context) -> Tensor:
        threads["engine"] = torch.get_num_threads()
        return latents

    with StepEngine(pipeline, cores=2) as engine:
        engine.methods["decoder"] = engine.methods["decoder"][0], count_threads
        with engine.join() as drawing:
            drawing.pipeline("a cat", output_type="latent")
            threads["request"] = torch.get_num_threads()
    assert threads == {"engine": 2, "request": 1}


def limit_rows(engine: StepEngine, name: str, limit: int) -> list[int]:
    """Let a network run out of memory beyond so many rows; return the list that gets the rows of its calls."""
    prepare, step = engine.methods[name]
    sizes: list[int] = []

    def take_few_rows(x: Tensor, t: Tensor, context) -> Tensor:
        sizes.append(len(x))
        if len(x) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return step(x, t, context)

    engine.methods[name] = prepare, take_few_rows
    return sizes


def test_calls_that_run_out_of_memory_are_halved(pipeline, engine):
    sizes = limit_rows(engine, "decoder", 2)
    draws = [draw_text(f"number {seed}", seed, guidance_scale=1.0) for seed in range(4)]
    for draw, found in zip(draws, draw_together(engine, draws)):
        assert isinstance(found, Tensor), found
        assert (found - draw(pipeline)).abs().max() < 1e-4
    assert max(sizes) > 2


def test_a_call_of_one_request_is_halved_too(pipeline):
    draw = draw_text("many", 0, num_images_per_prompt=3, guidance_scale=2.0, prior_candidates=4)
    alone = draw(pipeline)
    with StepEngine(pipeline, max_rows=8) as engine:
        of_prior, of_decoder = limit_rows(engine, "prior", 100), limit_rows(engine, "decoder", 2)
        (found,) = draw_together(engine, [draw])
    assert isinstance(found, Tensor) and (found - alone).abs().max() < 1e-4
    # The prior's 12 candidates are more than a batch; the decoder's 6 rows are what does not fit
    assert max(of_prior) <= 8 and len(of_prior) > 4
    assert max(of_decoder) == 6 and {1, 2} & set(of_decoder)


def test_the_steps_of_an_upsampler_are_halved_too(pipeline, tiny_upsampler):  # noqa: F811
    upsampler, scheduler = copy.deepcopy(tiny_upsampler)
    pipeline = Text2ImagePipeline.from_pipe(pipeline, upsampler=upsampler, upsampler_scheduler=scheduler)
    draw = draw_text("many", 0, num_images_per_prompt=3, upsample=1)
    alone = draw(pipeline)
    with StepEngine(pipeline) as engine:
        sizes = limit_rows(engine, "upsampler", 1)
        (found,) = draw_together(engine, [draw])
    assert isinstance(found, Tensor) and (found - alone).abs().max() < 1e-4
    assert sizes[:5] == [3, 2, 1, 1, 1] and set(sizes) == {1, 2, 3}
    # Calls outside of the engine's thread are counted too
    assert sum(engine.counts.seconds_spread["upsampler"]) == sizes.count(1) and engine.counts.seconds["upsampler"] > 0


def test_a_request_that_needs_too_much_memory_for_one_row_fails(engine):
    limit_rows(engine, "decoder", 0)
    (error,) = draw_together(engine, [draw_text("a red circle", 0)])
    assert isinstance(error, RuntimeError) and "allocate memory" in str(error)


def test_contexts_end_with_their_requests(engine):
    draw_together(engine, [draw_text(f"number {seed}", seed) for seed in range(2)])
    end = time.monotonic() + 10
    while engine.contexts.kept:
        assert time.monotonic() < end, "they stay"
        time.sleep(0.01)


def test_a_step_hangs_by_what_its_size_may_take(pipeline, engine):
    reached, released = threading.Event(), threading.Event()
    prepare, step = engine.methods["decoder"]

    def wait(x: Tensor, t: Tensor, context) -> Tensor:
        reached.set()
        released.wait(30)
        return step(x, t, context)

    engine.methods["decoder"] = prepare, wait
    # A row of the model's own size takes a second; four times the cells take at most 16
    engine.rates["decoder"] = 1 / torch.Size(pipeline.latent_shape[1:]).numel() ** 2
    for side, alive in ((pipeline.image_size, False), (2 * pipeline.image_size, True)):
        draw = draw_text("large", 0, guidance_scale=1.0, height=side, width=side)
        thread = threading.Thread(target=draw_together, args=(engine, [draw]))
        thread.start()
        assert reached.wait(30)
        engine.last_heartbeat -= 50
        assert engine.is_alive == alive
        released.set()
        thread.join(30)
        assert engine.is_alive
        reached.clear()
        released.clear()


def test_a_request_that_does_something_else_holds_nobody_up(engine):
    released, finished = threading.Event(), threading.Event()

    def preview(seen) -> None:
        if seen.stage == "decoder" and seen.step == 1:
            with engine.step_aside():
                released.wait(30)

    def slow() -> None:
        draw_together(engine, [draw_text("slow", 0, on_preview=preview, preview_every=1)])
        finished.set()

    thread = threading.Thread(target=slow)
    thread.start()
    while not any(not drawing.is_stepping for drawing in engine.drawings):
        time.sleep(0.01)
    assert isinstance(draw_together(engine, [draw_text("a red circle", 0)])[0], Tensor)
    assert not finished.is_set()
    released.set()
    thread.join(30)
    assert finished.is_set()


def test_closing_the_engine_ends_requests(pipeline):
    engine, started = StepEngine(pipeline), threading.Event()

    def begin(pipe, step, t, tensors):
        started.set()
        return {}

    results: list = []
    long = draw_text("long", 0, num_inference_steps=500, callback_on_step_end=begin)
    thread = threading.Thread(target=lambda: results.extend(draw_together(engine, [long])))
    thread.start()
    assert started.wait(30)
    engine.close()
    thread.join(10)
    assert isinstance(results[0], Cancelled) and not engine.thread.is_alive()


def test_rows_are_rounded_up_to_counts_that_were_warmed_up(pipeline, engine):
    assert [round_up_rows(rows) for rows in (1, 5, 7, 13, 64, 65)] == [1, 5, 8, 16, 64, 65]
    engine.warm_up(counts=(1, 3))
    assert engine.counts.rows == 8 and not engine.drawings
