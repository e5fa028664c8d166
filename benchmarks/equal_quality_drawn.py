"""Are the pictures as good? Draws every caption by each way of `benchmarks.equal_quality`, and judges them in pairs.

    python -m benchmarks.equal_quality_drawn 2 [--folder data/emoji] [--out out/equal_quality]
    python -m benchmarks.equal_quality_drawn 2 --first 10 --only ten-guided    # judged again, on other seeds

2: seeds a caption, of 200 training captions and all that were held out. The prior draws z_i once for a caption and a
seed; each way gets the same z_i and the same noise. Features are kept in `--out`, a file for 32 pictures, and what is
there is not drawn again. Writes results/equal_quality_drawn.json, or equal_quality_drawn_again.json.

A choice of ours is of equal quality (written down before a picture was drawn) if

- `very emoji` and `same name` (`t2i eval emoji`) are not lower by more than 1 point, also not at the end of the
  interval of two standard errors, those of the differences of captions, each the mean of its seeds;
- the Frechet and the kernel distance (`t2i eval quality --features clip:models/emoji/clip`) to all real emoji are not
  higher by more than 2 %, or by more than the standard error of the difference (by drawing captions again);
- the CLIP score is not lower by more than 1 %.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from t2i.pipelines.options import DecoderOptions, PriorOptions
from torch import Generator, Tensor

from benchmarks.equal_quality import CHOICES, PEER, STEPS, emoji, ways
from benchmarks.side_by_side import RESULTS, machine
from t2i.data import Record
from t2i.diffusion.denoiser import generate_noise
from t2i.evaluation.emoji import (
    choose_emoji_captions,
    compute_pixel_features,
    iterate_emoji_batches,
    open_emoji_dataset,
    strip_name_modifier,
)
from t2i.evaluation.features import CLIPFeatures
from t2i.evaluation.metrics import MetricSettings, compare_feature_sets, compute_feature_moments
from t2i.evaluation.quality import compute_clip_scores
from t2i.files.tensor_file import read_tensor_file, write_tensor_file
from t2i.sampling.sample import split_generators

KIND, BATCH = "features of drawn emoji", 32
TENSORS = ("nearest", "features", "cosine")  # the real emoji that is nearest; CLIP's, (B, D); with the caption
POINT, DISTANCE, SCORE = 0.01, 0.02, 0.01  # of the criterion
RESAMPLED = 100


@dataclass
class Drawn:
    """Of one way: shares and cosines by caption and seed, (captions, seeds); CLIP's features, (captions, seeds, D)."""

    exact: Tensor
    same_name: Tensor
    cosine: Tensor
    features: Tensor


class Judge:
    """The captions, and the real emoji that their pictures are compared with."""

    def __init__(self, folder: Path, captions: int | None = None):
        """captions: of each split, for a test; None is all that `t2i eval emoji` draws."""
        self.pipeline = emoji()
        dataset, self.records = open_emoji_dataset(folder)
        self.chosen: list[Record] = [
            one for part in choose_emoji_captions(self.records).values() for one in part[:captions]
        ]
        extract = CLIPFeatures(self.pipeline.clip, str(self.pipeline.device))
        seen = [
            (compute_pixel_features(batch), extract(batch)) for batch in iterate_emoji_batches(dataset, self.records)
        ]
        self.real, self.real_features = (torch.cat(part) for part in zip(*seen))
        self.extract = extract

    def draw(self, seed: int, out: Path, names: list[str]) -> None:
        """All captions by these ways, but for what is in `out`."""
        drawn = {name: way for name, way in ways().items() if name in names}
        for start in range(0, len(self.chosen), BATCH):
            if all(part(out, name, seed, start).exists() for name in drawn):
                continue
            begun, records = time.perf_counter(), self.chosen[start : start + BATCH]
            captions = [record.text for record in records]
            own = [Generator().manual_seed(1_000_000 * seed + start + i) for i in range(len(records))]
            prior, decoder = split_generators(own, len(records))
            text = self.pipeline.encode_prompt(captions)
            z_i = self.pipeline.sample_image_embeds(text, None, PriorOptions(), prior, DecoderOptions())
            noise = generate_noise(self.pipeline.latent_shape, decoder, z_i.device)
            for name, way in drawn.items():
                if not part(out, name, seed, start).exists():
                    pictures = self.pipeline.decode_images(way(z_i, noise)).clamp(-1, 1)
                    about = {"kind": KIND, "captions": captions}
                    write_tensor_file(part(out, name, seed, start), self.seen(pictures, captions), about)
            print(f"seed {seed}, captions from {start}: {time.perf_counter() - begun:.0f} s", flush=True)

    def seen(self, pictures: Tensor, captions: list[str]) -> dict[str, Tensor]:
        nearest = torch.cdist(compute_pixel_features(pictures.cpu()), self.real).argmin(dim=1)
        found = (nearest, self.extract(pictures), compute_clip_scores(self.pipeline.clip, pictures, captions))
        return dict(zip(TENSORS, found))

    def read(self, name: str, seeds: range, out: Path) -> Drawn:
        held = []
        for seed in seeds:
            starts = range(0, len(self.chosen), BATCH)
            files = [read_tensor_file(part(out, name, seed, start), KIND, TENSORS)[0] for start in starts]
            held.append({key: torch.cat([one[key] for one in files]) for key in TENSORS})
        nearest, embeds, cosine = (torch.stack([one[key] for one in held], dim=1) for key in TENSORS)
        wanted = torch.tensor([self.records.index(record) for record in self.chosen])[:, None]
        names = [strip_name_modifier(record.text) for record in self.records]
        number = torch.tensor([names.index(one) for one in names])
        return Drawn((nearest == wanted).double(), (number[nearest] == number[wanted]).double(), cosine, embeds)

    def distances(self, drawn: Drawn, captions: Tensor) -> dict[str, float]:
        """Of the pictures of these captions, (n,), which may repeat, to all real emoji."""
        settings = MetricSettings(("fd", "kid"), kid_subset_size=500, kid_subsets=10)
        return compare_feature_sets(
            drawn.features[captions].flatten(0, 1), self.real_features, self.moments(), settings
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "held"):
            self.held = compute_feature_moments(self.real_features)
        return self.held


def part(out: Path, name: str, seed: int, start: int) -> Path:
    return out / f"{name}-{seed}-{start:04}.safetensors"


def shares(mine: Drawn, peer: Drawn) -> dict[str, dict[str, float]]:
    """Of each figure of single pictures: ours, the peer's, the difference and its standard error."""
    found = {}
    for key in ("exact", "same_name", "cosine"):
        ours, theirs = getattr(mine, key).double(), getattr(peer, key).double()
        differs = (ours - theirs).mean(dim=1)
        error = differs.std() / len(differs) ** 0.5
        found[key] = figure(ours.mean().item(), theirs.mean().item(), error.item())
    return found


def figure(ours: float, theirs: float, error: float) -> dict[str, float]:
    return {"ours": ours, "theirs": theirs, "difference": ours - theirs, "standard_error": error}


def sets(judge: Judge, mine: Drawn, peer: Drawn, resampled: int = RESAMPLED) -> dict[str, dict[str, float]]:
    """The same of distances of sets of pictures."""
    every = torch.arange(len(mine.exact))
    ours, theirs = judge.distances(mine, every), judge.distances(peer, every)
    generator = Generator().manual_seed(0)
    again = []
    for _ in range(resampled):
        captions = torch.randint(len(every), (len(every),), generator=generator)
        one, other = judge.distances(mine, captions), judge.distances(peer, captions)
        again.append({key: one[key] - other[key] for key in one})
    keys = ("frechet_distance", "kernel_distance")
    errors = {key: torch.tensor([one[key] for one in again]).std().item() for key in keys}
    return {key: figure(ours[key], theirs[key], errors[key]) for key in keys}


def failures(found: dict[str, dict[str, float]]) -> list[str]:
    """Where a choice falls short of the criterion above."""
    short = []
    for key, one in found.items():
        worse, error = one["difference"], one["standard_error"]
        if key.endswith("distance"):
            equal = worse <= max(DISTANCE * one["theirs"], error)
        elif key == "cosine":
            equal = worse >= -SCORE * one["theirs"]
        else:
            equal = worse - 2 * error >= -POINT
        if not equal:
            short.append(key)
    return short


def verdict(found: dict[str, dict[str, float]], captions: int, seeds: int) -> str:
    names = {"exact": "very emoji", "same_name": "same name", "cosine": "CLIP score"}
    names |= {"frechet_distance": "Fréchet distance", "kernel_distance": "kernel distance"}
    said = [f"{names[key]} {one['ours']:.4g}, theirs {one['theirs']:.4g}" for key, one in found.items()]
    short = [names[key] for key in failures(found)]
    outcome = f"not shown to be of equal quality ({', '.join(short)})" if short else "equal quality"
    return f"{outcome}, {captions} captions x {seeds} seeds: {'; '.join(said)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int)
    parser.add_argument("--first", type=int, default=0, help="number of the first seed")
    parser.add_argument("--only", choices=CHOICES, help="one choice of ours, on seeds that it was not chosen by")
    parser.add_argument("--folder", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("out/equal_quality"))
    given = parser.parse_args()
    judge, seeds = Judge(given.folder), range(given.first, given.first + given.seeds)
    names = [given.only] if given.only else list(CHOICES)
    for seed in seeds:
        judge.draw(seed, given.out, [PEER, *names])
    peer, choices = judge.read(PEER, seeds, given.out), {}
    for name in names:
        mine = judge.read(name, seeds, given.out)
        found = shares(mine, peer) | sets(judge, mine, peer)
        said = verdict(found, len(judge.chosen), given.seeds)
        choices[name] = {"drawn by": str(CHOICES[name]), "verdict": said, "figures": found}
        print(f"{CHOICES[name]}: {said}", flush=True)
    options = f" --first {given.first} --only {given.only}" if given.only else ""
    about = {"command": f"python -m benchmarks.equal_quality_drawn {given.seeds}{options}", "machine": machine()}
    result = about | {"peer": f"{PEER}, {STEPS} steps", "choices": choices}
    file = f"equal_quality_drawn{'_again' if given.only else ''}.json"
    (RESULTS / file).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
