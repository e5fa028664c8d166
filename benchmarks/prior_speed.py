"""The prior's sampling beside diffusers' and dalle2-pytorch's: 25 steps with guidance, captions of 5 to 20 tokens.

    python -m benchmarks.prior_speed [--quick]

diffusers: its Kandinsky 2.2 prior pipeline, whole but for the text encoder, with the same weights (ours, converted),
noise and generators. dalle2-pytorch: a prior as wide, of about as many parameters, for which ours has more layers;
other arithmetic, so outputs are compared in `tests/test_interop_dalle2.py`, where its weights are converted. Both pad
captions to 77 tokens, as they do.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import KandinskyV22PriorPipeline, UnCLIPScheduler
from torch import Generator, Tensor, nn

from benchmarks.peers import dalle2_pytorch, is_there
from benchmarks.side_by_side import Row, Times, alternate, device, difference, flops, generators, peaks, row, run
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.interop.prior_transformer import to_prior_transformer
from t2i.networks.prior import Prior
from t2i.sampling.sample import sample_prior

STEPS, SCALE, PADDED = 25, 4.0, 77
AT_LEAST = {"diffusers": {1: 5.0, 8: 16.0, 32: 20.0}, "dalle2-pytorch": {1: 5.0, 8: 12.0, 32: 15.0}}
# By batch: all of a peer's steps, or so many and twice as many, where 25 take minutes; the whole takes seven.
PEER_STEPS = {"diffusers": {1: STEPS, 8: STEPS, 32: 2}, "dalle2-pytorch": {1: STEPS, 8: 3, 32: 1}}
ROUNDS = {"diffusers": {1: 5, 8: 2, 32: 2}, "dalle2-pytorch": {1: 3, 8: 3, 32: 3}}
SCHEDULE = {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 10.0}


class GivenCaptions(KandinskyV22PriorPipeline):
    """diffusers' pipeline of captions that are encoded already."""

    def given(self, text: TextEncoding, negative: TextEncoding) -> "GivenCaptions":
        both = negative.cat(text)
        missing = PADDED - both.mask.shape[1]
        states = nn.functional.pad(both.states, (0, 0, 0, missing))
        self.encoded = both.embedding, states, nn.functional.pad(both.mask, (0, missing))
        return self

    def _encode_prompt(self, *_: Any) -> tuple[Tensor, ...]:
        return self.encoded

    def get_zero_embed(self, *_: Any, **__: Any) -> None:
        return None


def make_prior(width: int, depth: int, embed_dim: int) -> Prior:
    """A prior with random weights, of a CLIP as public ones are."""
    torch.manual_seed(0)
    prior = Prior(embed_dim, embed_dim, PADDED, width, depth, width // 64 or 1, unit_length=False, usual_guidance=SCALE)
    nn.init.normal_(prior.query, std=0.02)
    prior.set_embed_statistics(captions(1, embed_dim, (2, 2)), torch.zeros(embed_dim), torch.ones(embed_dim))
    return prior.eval().requires_grad_(False).to(device())


def captions(count: int, width: int, lengths: tuple[int, int] = (5, 20)) -> TextEncoding:
    """Encodings of nothing, of lengths within a range, trimmed to the longest."""
    generator = Generator().manual_seed(count)
    drawn = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator)
    drawn[0] = lengths[1]
    mask = torch.arange(lengths[1]) < drawn[:, None]
    states = torch.randn(*mask.shape, width, generator=generator) * mask[..., None]
    return TextEncoding(torch.randn(count, width, generator=generator), states, mask).to(device())


def ours(prior: Prior, text: TextEncoding, noise: Tensor, steps: int = STEPS) -> Tensor:
    return sample_prior(
        prior, UnCLIPRespacedScheduler(**SCHEDULE), text, None, steps, SCALE, generators(len(text)), noise
    )


def diffusers_loop(prior: Prior, text: TextEncoding, noise: Tensor) -> Any:
    """steps -> z_i, by diffusers' pipeline with this prior's weights."""
    parts = dict.fromkeys(("image_encoder", "text_encoder", "tokenizer", "image_processor"))
    theirs = to_prior_transformer(prior).to(device())
    pipe = GivenCaptions(prior=theirs, scheduler=UnCLIPScheduler(**SCHEDULE), **parts)
    pipe.given(text, prior.null(len(text))).set_progress_bar_config(disable=True)

    def draw(steps: int) -> Tensor:
        prompts = [""] * len(text)
        settings = {"num_inference_steps": steps, "guidance_scale": SCALE, "generator": generators(len(text))}
        return pipe(prompts, latents=noise, **settings).image_embeds

    return draw


def dalle2_prior(width: int, depth: int) -> Any:
    package = dalle2_pytorch()
    package.tqdm = lambda steps, **_: steps
    sizes = {"depth": depth, "dim_head": 64, "heads": width // 64 or 1}
    net = package.DiffusionPriorNetwork(width, num_timesteps=1000, max_text_len=PADDED, **sizes)
    prior = package.DiffusionPrior(net, image_embed_dim=width, cond_drop_prob=0.1)
    return prior.eval().requires_grad_(False).to(device())


def dalle2_loop(prior: Any, text: TextEncoding) -> Any:
    condition = {"text_embed": text.embedding, "text_encodings": text.states}

    def draw(steps: int) -> Tensor:
        # Its DDIM runs the network once less than it is asked for.
        shape = (len(text), text.embedding.shape[1])
        return prior.p_sample_loop(shape, text_cond=condition, cond_scale=SCALE, timesteps=steps + 1)

    return draw


def compare(name: str, batch: int, mine: Any, theirs: Any, same: bool, quick: bool, note: str = "") -> Row:
    """mine and theirs: steps -> z_i. same: the weights are, so the outputs must be."""
    part, rounds = PEER_STEPS[name][batch], 1 if quick else ROUNDS[name][batch]
    most = min(2 * part, STEPS)  # that the peer runs
    found: dict[str, Tensor] = {}
    counts = {"ours": float(flops(lambda: mine(STEPS)))}

    def counted() -> None:  # all of a peer's products are in its steps
        counts[name] = flops(lambda: found.update(theirs=theirs(most))) * STEPS / most

    memory = peaks({"ours": lambda: mine(STEPS), name: counted})
    if name not in counts:  # the system does not tell how much memory
        counted()
    worst = difference(mine(most), found["theirs"]) if same else None
    works = {"ours": lambda: mine(STEPS), name: lambda: theirs(part)}
    if part < STEPS:
        works["twice"] = lambda: theirs(most)
    times = alternate(works, rounds, warm=0)  # both have run
    if part < STEPS:
        note += f"; of the peer {part} and {most} steps timed, and {STEPS} told by the line through both"
        times = Times(
            {"ours": times.seconds["ours"], name: extrapolated(times.seconds[name], times.seconds["twice"], part)}
        )
    what = f"prior, {STEPS} steps with guidance, batch {batch}"
    return row(what, times, AT_LEAST[name][batch], worst, counts, memory, note.removeprefix("; "))


def extrapolated(once: list[float], twice: list[float], part: int) -> list[float]:
    """Seconds of all steps, round by round, from those of `part` and of twice as many: what is fixed counts once."""
    slopes = [max(0.0, more - less) / part for less, more in zip(once, twice)]  # at toy size noise is more than a step
    return [less + (STEPS - part) * slope for less, slope in zip(once, slopes)]


@torch.no_grad()
def main(quick: bool, batches: Sequence[int] = (1, 8, 32), peers: Sequence[str] = tuple(AT_LEAST)) -> list[Row]:
    width, depth = (16, 2) if quick else (768, 12)
    prior, rows = make_prior(width, depth, width), []
    peers = [one for one in peers if one != "dalle2-pytorch" or is_there()]
    for batch in batches:
        text = captions(batch, width)
        noise = torch.randn(batch, width, generator=Generator().manual_seed(batch)).to(device())
        mine = partial(ours, prior, text, noise)
        if "diffusers" in peers:
            rows.append(compare("diffusers", batch, mine, diffusers_loop(prior, text, noise), True, quick))
        if "dalle2-pytorch" in peers:
            rows.append(beside_dalle2(width, depth, batch, text, noise, quick))
    return rows


def beside_dalle2(width: int, depth: int, batch: int, text: TextEncoding, noise: Tensor, quick: bool) -> Row:
    """Ours is deeper, for its layers are smaller."""
    deeper = depth + depth // 6
    prior, other = make_prior(width, deeper, width), dalle2_prior(width, depth)
    mine, theirs = (sum(one.numel() for one in model.parameters()) / 1e6 for model in (prior, other))
    note = f"{mine:.0f} M parameters, {deeper} x {width}; theirs {theirs:.0f} M, {depth} x {width}"
    draw = partial(ours, prior, text, noise)
    return compare("dalle2-pytorch", batch, draw, dalle2_loop(other, text), False, quick, note)


if __name__ == "__main__":
    run("prior_speed", main)
