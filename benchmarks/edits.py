"""How well pictures come back from their bipartite latents, and how well text diffs edit them.

    python -m benchmarks.edits data/emoji [--model models/emoji] [--out docs/images]

Reconstruction: of 20 held-out pictures and 20 of the training split, in PSNR: what DDIM draws from a picture's own
(z_i, x_T), and the best, for each picture, of eight variations from new noise; both against the picture itself and
against what the autoencoder alone makes of it, which is as near as latents can come.

Edits: 25 held-out pictures and 25 of the training split, each turned from its own name to the name of another emoji of
its subgroup, drawn by lot. An edit counts if cosine(picture, target) - cosine(picture, source), by the model's CLIP, is
larger than that of the picture drawn without an edit (theta 0); and, by a measure that no CLIP has a part in, if the
picture comes nearer to the real emoji of the target (`t2i.evaluation.emoji.compute_pixel_features`).

Prints one JSON line; --out writes a strip of pictures for each kind.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from t2i.pipelines import ImageVariationPipeline, InterpolationPipeline, TextDiffPipeline
from t2i.pipelines.inputs import read_images
from torch import Generator, Tensor

from t2i.data.pictures import open_image
from t2i.evaluation.contact_sheet import build_labelled_rows
from t2i.evaluation.emoji import compute_pixel_features

REAL, EDITS, PLAIN, BATCH = 20, 25, 8, 25  # of each split, of each split, of each picture, at a time
STEPS = (25, 50)  # of inversion and drawing
THETAS = (0.2, 0.3, 0.35, 0.4, 0.5)
ETAS = (0.0, 0.5, 1.0)
SHOWN = (0.0, 0.2, 0.3, 0.35, 0.4, 0.5)
EXAMPLES = (
    ("red apple", "green apple"),
    ("cat face", "dog face"),
    ("man cook: medium skin tone", "woman cook: medium skin tone"),
)


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N,), dB."""
    return -10 * (found - wanted).square().flatten(1).mean(dim=1).log10()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) | {"folder": folder} for line in (folder / "metadata.jsonl").read_text().splitlines()]


def choose(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` of each split, by lot."""
    lot = random.Random(seed)
    return [
        one for split in ("held_out", "train") for one in lot.sample([r for r in rows if r["split"] == split], count)
    ]


def pictures_of(rows: list[dict[str, Any]]) -> Tensor:
    """(N, 3, H, W) in [0, 1]."""
    return read_images([row["folder"] / row["file_name"] for row in rows], 128) / 2 + 0.5


def batched(values: list[str]) -> list[list[str]]:
    return [values[start : start + BATCH] for start in range(0, len(values), BATCH)]


def measure_reconstruction(pipeline: ImageVariationPipeline, originals: Tensor) -> dict[str, Any]:
    ceiling = pipeline.decode(pipeline.encode_latents(2 * originals - 1), "pt")

    def scores(found: Tensor, each: int = 1) -> dict[str, list[float]]:
        """Of the best of `each`, a mean for all, held-out and training pictures."""
        result = {}
        for name, wanted in {"picture": originals, "autoencoder": ceiling}.items():
            best = psnr(found, wanted.repeat_interleave(each, dim=0)).unflatten(0, (-1, each)).amax(dim=1)
            means = (best.mean(), *(half.mean() for half in best.chunk(2)))
            result[name] = [round(mean.item(), 2) for mean in means]
        return result

    new = torch.cat([plain(pipeline, part) for part in originals.split(4)])
    drawn = {"best of eight from new noise": scores(new, PLAIN)}
    for steps in STEPS:
        settings = {"eta": 0.0, "num_inference_steps": steps, "output_type": "pt"}
        own = torch.cat([pipeline(part, **settings)[0] for part in originals.split(BATCH)])
        drawn[f"from its own noise, {steps} steps"] = scores(own)
    return {"autoencoder alone": scores(ceiling)["picture"], **drawn}


def plain(pipeline: ImageVariationPipeline, pictures: Tensor) -> Tensor:
    """PLAIN variations of each with the pipeline's own settings."""
    return pipeline(pictures, num_images_per_prompt=PLAIN, generator=Generator().manual_seed(0), output_type="pt")[0]


def measure_edits(pipeline: TextDiffPipeline, rows: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = [(one, other_of(one, rows)) for one in choose(rows, EDITS, seed=1)]
    originals, wanted = (pictures_of(list(side)) for side in zip(*pairs))
    sources, targets = ([row["text"] for row in side] for side in zip(*pairs))
    z_source, z_target = (
        F.normalize(pipeline.encode_prompt(one).embedding.float(), dim=-1) for one in (sources, targets)
    )

    inverted = [pipeline.invert(part) for part in originals.split(BATCH)]

    def judged(theta: float) -> tuple[Tensor, Tensor, Tensor]:
        texts = zip(inverted, batched(sources), batched(targets))
        found = torch.cat([pipeline(*one, theta, output_type="pt")[0] for one in texts])
        score = (pipeline.encode_image(2 * found - 1) * (z_target - z_source)).sum(dim=-1)
        away = (compute_pixel_features(2 * found - 1) - compute_pixel_features(2 * wanted - 1)).norm(dim=-1)
        return score, away, psnr(found, originals)

    score, away, kept = judged(0.0)
    result = {"0": {"score": round(score.mean().item(), 3), "PSNR": round(kept.mean().item(), 2)}}
    for theta in THETAS:
        now, now_away, kept = judged(theta)
        result[str(theta)] = {
            "moved to the target": share(now > score),
            "nearer to the target's caption than to the source's": share(now > 0),
            "nearer to the real target": share(now_away < away),
            "score": round(now.mean().item(), 3),
            "PSNR": round(kept.mean().item(), 2),
        }
    return result


def share(which: Tensor) -> float:
    return round(which.float().mean().item(), 2)


def other_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Another of its subgroup, by a lot that depends on the row alone."""
    others = [one for one in rows if one["subgroup"] == row["subgroup"] and one["text"] != row["text"]]
    return random.Random(row["file_name"]).choice(others)


def write_strips(pipeline: ImageVariationPipeline, rows: list[dict[str, Any]], out: Path) -> None:
    """A strip of pictures for each of the three pipelines."""
    named = {row["text"]: row["folder"] / row["file_name"] for row in rows}
    strips = {}
    names = ("red apple", "cat face", "man cook: medium skin tone")
    strip = {}
    for name in names:
        own = [pipeline(named[name], eta=eta, generator=Generator().manual_seed(0)).images[0] for eta in ETAS]
        strip[name] = [
            open_image(named[name]),
            *own,
            *pipeline(named[name], num_images_per_prompt=3, generator=Generator().manual_seed(0)).images,
        ]
    strips["variations"] = build_labelled_rows(
        strip, ["the picture", *(f"own noise, eta {eta:g}" for eta in ETAS), *["new noise"] * 3]
    )

    between = InterpolationPipeline.from_pipe(pipeline)
    strip = {}
    for anchors in (("red apple", "tennis"), ("cat face", "dog face"), ("red apple", "a blue heart")):
        known = [named.get(one, one) for one in anchors]
        strip[" to ".join(anchors)] = between(known, frames=8, generator=Generator().manual_seed(0)).images
    strips["interpolation"] = build_labelled_rows(strip, [f"{i / 7:.2f}" for i in range(8)])

    edit = TextDiffPipeline.from_pipe(pipeline)
    strip = {}
    for source, target in EXAMPLES:
        strip[f"{source} to {target}"] = [edit(named[source], source, target, theta).images[0] for theta in SHOWN]
    strips["edits"] = build_labelled_rows(strip, [f"theta {theta:g}" for theta in SHOWN])

    for name, picture in strips.items():  # of few colours, to be small
        picture.quantize(128).save(out / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="models/emoji")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    begun, rows = time.process_time(), read_rows(given.folder)
    pipeline = ImageVariationPipeline.from_pretrained(given.model)
    pipeline.set_progress_bar_config(disable=True)
    result = {
        "reconstruction": measure_reconstruction(pipeline, pictures_of(choose(rows, REAL, seed=0))),
        "edits": measure_edits(TextDiffPipeline.from_pipe(pipeline), rows),
        "seconds of a core": round(time.process_time() - begun),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    if given.out is not None:
        write_strips(pipeline, rows, given.out)


if __name__ == "__main__":
    main()
