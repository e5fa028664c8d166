"""The prior's sampling beside diffusers' and dalle2-pytorch's: 25 steps with guidance, captions of 5 to 20 tokens.

    python -m benchmarks.prior_speed [--quick]

diffusers: its Kandinsky 2.2 prior pipeline, whole but for the text encoder, with the same weights (ours, converted),
noise and generators. dalle2-pytorch: a prior of as many layers and as wide; other arithmetic, so outputs are compared
in `tests/test_interop_dalle2.py`, where its weights are converted. Both pad captions to 77 tokens, as they do.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import KandinskyV22PriorPipeline, UnCLIPScheduler
from torch import Generator, Tensor, nn

from benchmarks.peers import dalle2_pytorch
from benchmarks.side_by_side import Row, alternate, device, difference, flops, peak_memory, row, run
from t2i.condition import TextEncoding
from t2i.errors import InputError
from t2i.interop.prior_transformer import to_prior_transformer
from t2i.interop.scheduler import UnCLIPRespacedScheduler
from t2i.prior import Prior
from t2i.sampling import sample_prior

STEPS, SCALE, PADDED = 25, 4.0, 77
AT_LEAST = {"diffusers": {1: 5.0, 8: 16.0, 32: 20.0}, "dalle2-pytorch": {1: 5.0, 8: 12.0, 32: 15.0}}
# A peer's steps all cost the same: so many of the 25 are run, and the time is multiplied.
PEER_STEPS, ROUNDS = {1: 5, 8: 3, 32: 2}, {1: 5, 8: 4, 32: 2}
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
    prior.set_encodings(captions(1, embed_dim, (2, 2)), torch.zeros(embed_dim), torch.ones(embed_dim))
    return prior.eval().requires_grad_(False).to(device())


def captions(count: int, width: int, lengths: tuple[int, int] = (5, 20)) -> TextEncoding:
    """Encodings of nothing, of lengths within a range, trimmed to the longest."""
    generator = Generator().manual_seed(count)
    drawn = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator)
    drawn[0] = lengths[1]
    mask = torch.arange(lengths[1]) < drawn[:, None]
    states = torch.randn(*mask.shape, width, generator=generator) * mask[..., None]
    return TextEncoding(torch.randn(count, width, generator=generator), states, mask).to(device())


def generators(count: int) -> list[Generator]:
    return [Generator().manual_seed(i) for i in range(count)]


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
    timed, found, memory = PEER_STEPS[batch], {}, {}

    def first(draw: Any, steps: int) -> int:
        return flops(lambda: found.update({draw: draw(steps)}))

    counts = {"ours": float(first(mine, STEPS)), name: 0.0}
    memory["ours"] = peak_memory(lambda: mine(STEPS)) or 0
    memory[name] = peak_memory(lambda: counts.update({name: first(theirs, timed) * STEPS / timed})) or 0
    worst = difference(mine(timed), found[theirs]) if same else None
    works = {"ours": lambda: mine(STEPS), name: lambda: theirs(timed)}
    times = alternate(works, 1 if quick else ROUNDS[batch], warm=0)  # both have run
    times.seconds[name] = [STEPS / timed * seconds for seconds in times.seconds[name]]
    note = "; ".join(filter(None, (note, f"{timed} of the peer's {STEPS} steps timed")))
    what = f"prior, {STEPS} steps with guidance, batch {batch}"
    return row(what, times, AT_LEAST[name][batch], worst, counts, memory, note)


def is_there() -> bool:
    """Whether dalle2-pytorch is installed; if not, says so, and the other peer is measured without it."""
    try:
        dalle2_pytorch()
    except InputError as missing:
        print(missing, file=sys.stderr)
        return False
    return True


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
            other = dalle2_prior(width, depth)
            sizes = [sum(one.numel() for one in model.parameters()) / 1e6 for model in (prior, other)]
            note = f"{sizes[0]:.0f} M and {sizes[1]:.0f} M parameters"
            rows.append(compare("dalle2-pytorch", batch, mine, dalle2_loop(other, text), False, quick, note))
    return rows


if __name__ == "__main__":
    run("prior_speed", main)
