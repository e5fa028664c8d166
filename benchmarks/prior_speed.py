"""Sampling of the prior against diffusers and dalle2-pytorch: 25 steps with guidance, captions of 5 to 20 tokens.

    python -m benchmarks.prior_speed [--quick]

- diffusers: its Kandinsky 2.2 prior pipeline without the text encoder, with the same weights (ours, converted), noise
  and generators.
- dalle2-pytorch: a prior of the same width and about as many parameters, for which ours has more layers. Its arithmetic
  differs; `tests/interop/test_dalle2.py` compares outputs with converted weights.

Both peers pad captions to 77 tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import KandinskyV22PriorPipeline, UnCLIPScheduler
from torch import Generator, Tensor, nn

from benchmarks import side_by_side
from benchmarks.peers import has_dalle2_pytorch, import_dalle2_pytorch
from benchmarks.report import run
from benchmarks.side_by_side import Row
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.sampling_loop import Sampling
from t2i.interop.prior_transformer import to_prior_transformer
from t2i.networks.prior import Prior
from t2i.sampling.sample import sample_prior

STEPS, SCALE, PADDED = 25, 4.0, 77
AT_LEAST = {"diffusers": {1: 5.0, 8: 16.0, 32: 20.0}, "dalle2-pytorch": {1: 5.0, 8: 12.0, 32: 15.0}}
# By batch: the steps of a peer that are timed, where 25 would take minutes. All rows together take seven.
PEER_STEPS = {"diffusers": {1: STEPS, 8: STEPS, 32: 2}, "dalle2-pytorch": {1: STEPS, 8: 3, 32: 1}}
ROUNDS = {"diffusers": {1: 5, 8: 2, 32: 2}, "dalle2-pytorch": {1: 3, 8: 3, 32: 3}}
Draw = Callable[[int], Tensor]  # steps -> z_i
SCHEDULE = {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 10.0}


class EncodedPriorPipeline(KandinskyV22PriorPipeline):
    """diffusers' pipeline for captions that are encoded already."""

    def set_captions(self, text: TextEncoding, negative: TextEncoding) -> None:
        both = negative.cat(text)
        padding = PADDED - both.mask.shape[1]
        states = nn.functional.pad(both.states, (0, 0, 0, padding))
        self.encoded = both.embedding, states, nn.functional.pad(both.mask, (0, padding))

    def _encode_prompt(self, *_: Any) -> tuple[Tensor, ...]:
        return self.encoded

    def get_zero_embed(self, *_: Any, **__: Any) -> None:
        return None


def make_prior(width: int, depth: int) -> Prior:
    """Return a prior with random weights for z_t and z_i of `width`, as published ones are."""
    torch.manual_seed(0)
    prior = Prior(width, width, PADDED, width, depth, width // 64 or 1, unit_length=False, default_guidance_scale=SCALE)
    nn.init.normal_(prior.query, std=0.02)
    prior.set_embed_statistics(make_captions(1, width, (2, 2)), torch.zeros(width), torch.ones(width))
    return prior.eval().requires_grad_(False).to(side_by_side.device())


def make_captions(count: int, width: int, lengths: tuple[int, int] = (5, 20)) -> TextEncoding:
    """Return random encodings of captions of `lengths[0]` to `lengths[1]` tokens, trimmed to the longest."""
    generator = Generator().manual_seed(count)
    drawn = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator)
    drawn[0] = lengths[1]
    mask = torch.arange(lengths[1]) < drawn[:, None]
    states = torch.randn(*mask.shape, width, generator=generator) * mask[..., None]
    return TextEncoding(torch.randn(count, width, generator=generator), states, mask).to(side_by_side.device())


def draw(prior: Prior, text: TextEncoding, noise: Tensor, steps: int = STEPS) -> Tensor:
    sampling = Sampling(steps, side_by_side.generators(len(text)), SCALE, noise=noise)
    return sample_prior(prior, UnCLIPRespacedScheduler(**SCHEDULE), text, None, sampling)


def build_diffusers_loop(prior: Prior, text: TextEncoding, noise: Tensor) -> Draw:
    """Return steps -> z_i by diffusers' pipeline with the weights of `prior`."""
    parts = dict.fromkeys(("image_encoder", "text_encoder", "tokenizer", "image_processor"))
    peer = to_prior_transformer(prior).to(side_by_side.device())
    pipe = EncodedPriorPipeline(prior=peer, scheduler=UnCLIPScheduler(**SCHEDULE), **parts)
    pipe.set_captions(text, prior.null(len(text)).expand())
    pipe.set_progress_bar_config(disable=True)

    def draw_by_peer(steps: int) -> Tensor:
        prompts = [""] * len(text)
        settings = {
            "num_inference_steps": steps,
            "guidance_scale": SCALE,
            "generator": side_by_side.generators(len(text)),
        }
        return pipe(prompts, latents=noise, **settings).image_embeds

    return draw_by_peer


def make_dalle2_prior(width: int, depth: int) -> Any:
    package = import_dalle2_pytorch()
    package.tqdm = lambda steps, **_: steps
    sizes = {"depth": depth, "dim_head": 64, "heads": width // 64 or 1}
    net = package.DiffusionPriorNetwork(width, num_timesteps=1000, max_text_len=PADDED, **sizes)
    prior = package.DiffusionPrior(net, image_embed_dim=width, cond_drop_prob=0.1)
    return prior.eval().requires_grad_(False).to(side_by_side.device())


def build_dalle2_loop(prior: Any, text: TextEncoding) -> Draw:
    condition = {"text_embed": text.embedding, "text_encodings": text.states}

    def draw_by_peer(steps: int) -> Tensor:
        # Its DDIM runs the network once less than its timesteps.
        shape = (len(text), text.embedding.shape[1])
        return prior.p_sample_loop(shape, text_cond=condition, cond_scale=SCALE, timesteps=steps + 1)

    return draw_by_peer


def compare(name: str, batch: int, ours: Draw, peer: Draw, same_weights: bool, quick: bool, note: str = "") -> Row:
    """Return the row of a batch; a peer that takes minutes is timed in fewer steps."""
    few, rounds = PEER_STEPS[name][batch], 1 if quick else ROUNDS[name][batch]
    most = min(2 * few, STEPS)  # that the peer runs
    results: dict[str, Tensor] = {}
    counts = {"ours": float(side_by_side.count_operations(lambda: ours(STEPS)))}

    def draw_and_count() -> None:  # all products of a peer are in its steps
        counts[name] = side_by_side.count_operations(lambda: results.update(peer=peer(most))) * STEPS / most

    memory = side_by_side.measure_peaks({"ours": lambda: ours(STEPS), name: draw_and_count})
    worst = side_by_side.check_equal(ours(most), results["peer"]) if same_weights else None
    works = {"ours": lambda: ours(STEPS), name: lambda: peer(few)}
    if few < STEPS:
        works["twice"] = lambda: peer(most)
    seconds = side_by_side.time_in_turns(works, rounds, warm=0)  # both have run
    if few < STEPS:
        note += f"; of the peer {few} and {most} steps are timed, and {STEPS} follow from the line through both"
        seconds[name] = extrapolate(seconds[name], seconds.pop("twice"), few)
    what = f"prior, {STEPS} steps with guidance, batch {batch}"
    more = {"difference": worst, "memory": memory, "note": note.removeprefix("; ")}
    return side_by_side.build_row(what, seconds, AT_LEAST[name][batch], counts, **more)


def extrapolate(once: list[float], twice: list[float], steps: int) -> list[float]:
    """Return the seconds of all STEPS, round by round, from those of `steps` and of twice as many."""
    slopes = [max(0.0, more - less) / steps for less, more in zip(once, twice)]  # noise exceeds a step at toy size
    return [less + (STEPS - steps) * slope for less, slope in zip(once, slopes)]


@torch.no_grad()
def main(quick: bool, batches: Sequence[int] = (1, 8, 32)) -> list[Row]:
    width, depth = (16, 2) if quick else (768, 12)
    prior, rows = make_prior(width, depth), []
    has_dalle2 = has_dalle2_pytorch()
    for batch in batches:
        text = make_captions(batch, width)
        noise = torch.randn(batch, width, generator=Generator().manual_seed(batch)).to(side_by_side.device())
        ours = partial(draw, prior, text, noise)
        rows.append(compare("diffusers", batch, ours, build_diffusers_loop(prior, text, noise), True, quick))
        if has_dalle2:
            deeper = make_prior(width, depth + depth // 6)  # ours has smaller layers
            other = make_dalle2_prior(width, depth)
            size, other_size = (sum(one.numel() for one in model.parameters()) / 1e6 for model in (deeper, other))
            note = (
                f"{size:.0f} M parameters, {depth + depth // 6} x {width}; peer {other_size:.0f} M, {depth} x {width}"
            )
            ours, peer = partial(draw, deeper, text, noise), build_dalle2_loop(other, text)
            rows.append(compare("dalle2-pytorch", batch, ours, peer, False, quick, note))
    return rows


if __name__ == "__main__":
    run("prior_speed", main)
