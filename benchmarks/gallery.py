"""A page with a picture for everything that the pipelines can do, drawn by the shipped model.

make gallery, or: python -m benchmarks.gallery [--data data/emoji] [--out docs] [--only NAME ...]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from t2i.pipelines import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    InterpolationPipeline,
    OutpaintPipeline,
    Text2ImagePipeline,
    TextDiffPipeline,
    UpsamplePipeline,
)
from torch import Generator

from t2i.data.pictures import open_image, to_tensor
from t2i.diffusion.guidance import Guidance
from t2i.evaluation.contact_sheet import build_labelled_rows, build_similarity_matrix
from t2i.files.model_folder import load_model
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.sampling.steering import Steering, load_classifier

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
PROMPTS = ["a cat", "red apple", "sunflower", "waving hand: dark skin tone", "snowman", "red heart"]
MAX_BYTES = 300_000
Rows = dict[str, list[Image.Image | None]]


@dataclass
class Shown:
    """One picture of the page: rows of pictures with a caption under each column."""

    title: str
    text: str
    rows: Rows
    captions: list[str]
    code: str


@dataclass
class Gallery:
    """What the rows draw with."""

    data: Path
    pipeline: Text2ImagePipeline
    seed: int = 0

    def seeds(self, count: int) -> list[Generator]:
        return [Generator().manual_seed(self.seed + i) for i in range(count)]

    def draw(self, prompts: list[str], **settings: Any) -> list[Image.Image]:
        return self.pipeline(prompts, generator=self.seeds(len(prompts)), **settings).images

    def emoji(self, *codes: str) -> list[Image.Image]:
        """Pictures of the data, by the code points in their names."""
        return [open_image(self.data / f"{code}.png") for code in codes]


def text(gallery: Gallery) -> Shown:
    rows: Rows = {}
    for seed in (0, 100):
        gallery.seed = seed
        rows[f"seed {seed} on"] = list(gallery.draw(PROMPTS))
    gallery.seed = 0
    return Shown("Text to image", "Default settings, uncurated.", rows, PROMPTS, 't2i generate "a cat" --seed 0')


def priors(gallery: Gallery) -> Shown:
    rows: Rows = {"diffusion prior": list(gallery.draw(PROMPTS))}
    autoregressive = MODELS / "emoji-prior-autoregressive"
    if autoregressive.exists():
        prior = load_model(AutoregressivePrior, autoregressive).eval()
        other = Text2ImagePipeline.from_pipe(gallery.pipeline, prior=prior, prior_scheduler=None)
        drawn = other(PROMPTS, generator=gallery.seeds(len(PROMPTS)))
        rows["autoregressive"] = list(drawn.images)
    none = Text2ImagePipeline.from_pipe(gallery.pipeline, prior=None, prior_scheduler=None)
    rows["none"] = list(none(PROMPTS, generator=gallery.seeds(len(PROMPTS))).images)
    return Shown(
        "Priors",
        "The same captions and seeds through each prior; without one, the decoder gets the caption's own embedding, "
        "which it was not trained with. Figures: [priors.md](priors.md).",
        rows,
        PROMPTS,
        "Text2ImagePipeline.from_pipe(pipeline, prior=..., prior_scheduler=None)",
    )


def candidates(gallery: Gallery) -> Shown:
    rows = {f"{count} candidates": list(gallery.draw(PROMPTS, prior_candidates=count)) for count in (1, 2, 8)}
    return Shown(
        "Re-ranked candidates",
        "The prior draws several embeddings and keeps the one whose dot product with the caption's is largest "
        "(DALL-E 2, section 2.2).",
        dict(rows),
        PROMPTS,
        't2i generate "a cat" --candidates 2',
    )


def samplers(gallery: Gallery) -> Shown:
    names, counts = ("ddim", "ddpm", "dpmsolver++", "unipc", "ode", "sde"), (4, 8, 25)
    rows: Rows = {
        name: [gallery.draw(["a cat"], sampler=name, num_inference_steps=count)[0] for count in counts]
        for name in names
    }
    return Shown(
        "Samplers",
        "One prompt and seed; quality against time is in [samplers.md](samplers.md).",
        rows,
        [f"{count} steps" for count in counts],
        't2i generate "a cat" --sampler unipc --steps 8',
    )


def guidance(gallery: Gallery) -> Shown:
    scales = {
        "1 (off)": 1.0,
        "1.5": 1.5,
        "8": 8.0,
        "8, interval 0.2 to 0.8": Guidance(8.0, interval=(0.2, 0.8)),
        "8, rescaled": Guidance(8.0, rescale=0.8),
        "8, thresholded": Guidance(8.0, threshold=0.995),
        "8, projected": Guidance(8.0, parallel=0.0, norm=0.5, momentum=-0.5),
    }
    prompts = PROMPTS[:3]
    drawn = [gallery.draw(prompts, guidance_scale=scale) for scale in scales.values()]
    rows: Rows = {prompt: [images[i] for images in drawn] for i, prompt in enumerate(prompts)}
    return Shown(
        "Classifier-free guidance and what tames it",
        "Of the decoder; the prior takes the same.",
        rows,
        list(scales),
        "pipeline(prompt, guidance_scale=Guidance(8.0, interval=(0.2, 0.8)))",
    )


def negatives(gallery: Gallery) -> Shown:
    prompts = ["a cat", "heart", "man: light skin tone"]
    away = ["orange", "red", "beard"]
    plain = gallery.draw(prompts)
    prior = gallery.draw(prompts, negative_prompt=away)
    decoder = gallery.draw(prompts, decoder_negative_prompt=away, guidance_scale=3.0)
    return Shown(
        "Negative prompts",
        "In the prior, and in the decoder (guidance 3), which moves away from what the prior imagines of them.",
        {"none": list(plain), "in the prior": list(prior), "in the decoder": list(decoder)},
        [f"{prompt}, not {other}" for prompt, other in zip(prompts, away)],
        't2i generate "a cat" --negative-prompt orange',
    )


def classifier(gallery: Gallery) -> Shown | None:
    folder = MODELS / "emoji-classifier"
    if not folder.exists():
        return None
    judge, scales = load_classifier(folder), [0.0, 1.0, 4.0, 16.0]
    rows: Rows = {}
    for name in ("Animals & Nature", "Food & Drink", "Flags", "Travel & Places"):
        rows[name] = [steer(gallery, Steering(scale, judge, class_name=name)) for scale in scales]
    return Shown(
        "Classifier guidance",
        "Of the decoder without any condition, towards a class; figures in [steering.md](steering.md).",
        rows,
        [f"gradient scale {scale:g}" for scale in scales],
        "pipeline(image_embeds=torch.zeros(1, 192), steering=Steering(4, classifier, class_name=...))",
    )


def clip(gallery: Gallery) -> Shown:
    scales = [0.0, 0.5, 2.0, 8.0]
    rows: Rows = {
        name: [steer(gallery, Steering(scale, text=name)) for scale in scales] for name in ("a cat", "red apple")
    }
    return Shown(
        "CLIP guidance",
        "Of the decoder without any condition, towards a text: in every step CLIP sees the decoded clean estimate.",
        rows,
        [f"gradient scale {scale:g}" for scale in scales],
        'pipeline(image_embeds=torch.zeros(1, 192), steering=Steering(0.5, text="a cat"))',
    )


def steer(gallery: Gallery, steering: Steering) -> Image.Image:
    nothing = torch.zeros(1, gallery.pipeline.clip.embed_dim)
    return gallery.pipeline(image_embeds=nothing, generator=gallery.seeds(1), steering=steering).images[0]


def variations(gallery: Gallery) -> Shown:
    pipeline = ImageVariationPipeline.from_pipe(gallery.pipeline)
    pictures = gallery.emoji("1f431", "1f34e", "1f680", "26c4", "1f98a")
    rows: Rows = {"picture": list(pictures)}
    for eta in (0.0, 0.5, 1.0):
        images = pipeline(pictures, eta=eta, generator=gallery.seeds(len(pictures))).images
        rows[f"inverted, eta {eta:g}"] = list(images)
    rows["new noise"] = list(pipeline(pictures, generator=gallery.seeds(len(pictures))).images)
    return Shown(
        "Variations",
        "A picture's own (z_i, x_T), by DDIM inversion, draws it again; eta says how far to roam. From new noise only "
        "what CLIP sees is kept (DALL-E 2, section 3.1). Figures: [edits.md](edits.md).",
        rows,
        ["cat face", "red apple", "rocket", "snowman", "fox"],
        "t2i variations cat.png --eta 0.5",
    )


def interpolation(gallery: Gallery) -> Shown:
    pipeline = InterpolationPipeline.from_pipe(gallery.pipeline)
    pairs = {"picture to picture": gallery.emoji("1f431", "1f98a"), "text to text": ["red apple", "sunflower"]}
    rows: Rows = {
        name: list(pipeline(anchors, frames=7, generator=gallery.seeds(1)[0]).images) for name, anchors in pairs.items()
    }
    return Shown(
        "Interpolation",
        "On the great circles of z_i and of x_T (DALL-E 2, section 3.2).",
        rows,
        [f"{i}/6" for i in range(7)],
        "t2i interpolate cat.png fox.png --frames 7 --strip",
    )


def diffs(gallery: Gallery) -> Shown:
    pipeline = TextDiffPipeline.from_pipe(gallery.pipeline)
    edits = [
        ("1f44b", "waving hand", "waving hand: dark skin tone"),
        ("1f34e", "red apple", "green apple"),
        ("1f431", "cat face", "fox"),
        ("2764-fe0f", "red heart", "blue heart"),
    ]
    rows: Rows = {"picture": list(gallery.emoji(*(code for code, _, _ in edits)))}
    for theta in (0.2, 0.35, 0.5):
        drawn = pipeline(
            rows["picture"],
            source=[source for _, source, _ in edits],
            target=[target for _, _, target in edits],
            theta=theta,
            generator=gallery.seeds(len(edits)),
        )
        rows[f"theta {theta:g}"] = list(drawn.images)
    return Shown(
        "Text diffs",
        "A picture is turned by the direction from one caption to another (DALL-E 2, section 3.3).",
        rows,
        [f"{source} -> {target}" for _, source, target in edits],
        't2i edit hand.png --from "waving hand" --to "waving hand: dark skin tone"',
    )


def inpainting(gallery: Gallery) -> Shown:
    pipeline = InpaintPipeline.from_pipe(gallery.pipeline)
    pictures, prompts = gallery.emoji("1f431", "1f34e", "2764-fe0f"), ["fox", "green apple", "blue heart"]
    side = pictures[0].width
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (0, side // 2, side, side))
    rows: Rows = {"picture": list(pictures), "mask": [mask.convert("RGB")] * len(pictures)}
    rows["painted"] = list(pipeline(pictures, mask, prompts, generator=gallery.seeds(len(pictures))).images)
    rows["as it was"] = list(pipeline(pictures, mask, generator=gallery.seeds(len(pictures))).images)
    return Shown(
        "Inpainting",
        "White is painted anew, for a prompt or as what the picture shows; the rest comes back pixel for pixel.",
        rows,
        prompts,
        "t2i inpaint cat.png mask.png --prompt fox",
    )


def outpainting(gallery: Gallery) -> Shown:
    pipeline = OutpaintPipeline.from_pipe(gallery.pipeline)
    pictures, half = gallery.emoji("1f431", "1f308", "1f3e0"), 64
    margins = {"left": half, "right": half, "top": half, "bottom": half}
    drawn = pipeline(pictures, **margins, generator=gallery.seeds(len(pictures))).images
    return Shown(
        "Outpainting",
        "By 64 pixels on each side, in nine overlapping windows. The model has only seen emoji on white.",
        {"picture": list(pictures), "twice as wide": list(drawn)},
        ["cat face", "rainbow", "house"],
        "t2i outpaint cat.png --left 64 --right 64 --top 64 --bottom 64",
    )


def redrawing(gallery: Gallery) -> Shown:
    pipeline = ImageToImagePipeline.from_pipe(gallery.pipeline)
    pictures, prompts = gallery.emoji("1f431", "1f34e", "1f680"), ["fox", "orange", "satellite"]
    rows: Rows = {"picture": list(pictures)}
    for strength in (0.3, 0.6, 0.9):
        images = pipeline(pictures, prompts, strength=strength, generator=gallery.seeds(len(pictures))).images
        rows[f"strength {strength:g}"] = list(images)
    return Shown(
        "Image to image", "Started from a picture's latents.", rows, prompts, "t2i image-to-image cat.png --prompt fox"
    )


def previews(gallery: Gallery) -> Shown:
    seen: dict[str, list[Image.Image | None]] = {"prior": [], "decoder": []}

    def keep(preview: Any) -> None:
        seen[preview.stage].append(preview.images()[0])

    gallery.draw(["a cat"], on_preview=keep, preview_every=5, prior_candidates=1)
    return Shown(
        "Previews",
        "What each stage expects to end with, every five steps: of the prior, as the decoder draws it in four steps.",
        dict(seen),
        [f"step {step}" for step in (5, 10, 15, 20, 25)],
        "pipeline(prompt, on_preview=show, preview_every=5)",
    )


def upsampling(gallery: Gallery) -> Shown | None:
    folder = MODELS / "emoji-upsampler"
    if not folder.exists():
        return None
    pictures = gallery.emoji("1f431", "1f34e", "1f680", "26c4")
    small = [picture.resize((64, 64), Image.Resampling.BICUBIC) for picture in pictures]
    drawn = UpsamplePipeline.from_pretrained(folder)(small, generator=gallery.seeds(len(small))).images
    return Shown(
        "Upsampling",
        "From 64 x 64 to 128 x 128; figures in [upsampling.md](upsampling.md).",
        {
            "64 x 64, enlarged": [one.resize((128, 128), Image.Resampling.BICUBIC) for one in small],
            "upsampler": list(drawn),
            "picture": list(pictures),
        },
        ["cat face", "red apple", "rocket", "snowman"],
        "t2i upsample cat.png",
    )


def similarity(gallery: Gallery) -> Image.Image:
    clip, captions = gallery.pipeline.clip, ["cat face", "red apple", "rocket", "snowman", "fox", "rainbow"]
    pictures = gallery.emoji("1f431", "1f34e", "1f680", "26c4", "1f98a", "1f308")
    seen = torch.stack([to_tensor(one, clip.size) for one in pictures])
    with torch.no_grad():
        cosines = clip.encode_text(captions).embedding @ clip.encode_image(seen).T
    return build_similarity_matrix(cosines, pictures, captions, "cosine of caption and picture")


ROWS: tuple[Callable[[Gallery], Shown | None], ...] = (
    text, priors, candidates, samplers, guidance, negatives, classifier, clip, variations, interpolation, diffs,
    inpainting, outpainting, redrawing, previews, upsampling,
)  # fmt: skip


def save(image: Image.Image, path: Path) -> None:
    """As a PNG of at most MAX_BYTES: of fewer colours if it has to be."""
    for colors in (None, 256, 128, 64):
        (image if colors is None else image.quantize(colors, dither=Image.Dither.NONE)).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return
    raise SystemExit(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--only", nargs="*", default=[], help="names of rows to draw again; the page needs all")
    arguments = parser.parse_args()
    pipeline = Text2ImagePipeline.from_pretrained(MODELS / "emoji")
    pipeline.set_progress_bar_config(disable=True)
    gallery, page = Gallery(arguments.data, pipeline), [HEAD]
    for row in ROWS:
        name = row.__name__
        if arguments.only and name not in arguments.only:
            continue
        if (shown := row(gallery)) is None:
            print(f"{name}: left out, its model is not in {MODELS}")
            continue
        path = arguments.out / "images" / f"gallery-{name}.png"
        save(build_labelled_rows(shown.rows, shown.captions), path)
        page.append(f"## {shown.title}\n\n{shown.text}\n\n    {shown.code}\n\n![{shown.title}](images/{path.name})\n")
        print(path)
    if not arguments.only:
        save(similarity(gallery), arguments.out / "images" / "gallery-similarity.png")
        page.append(SIMILARITY)
        (arguments.out / "gallery.md").write_text("\n".join(page), encoding="utf-8")


HEAD = """# Gallery

Everything that the pipelines can do, drawn by `make gallery` with the models in `models/` on pictures of `data/emoji`
(`t2i data emoji data/emoji`). The seeds are 0, 1, ..., not selected; the prompts are ones that
the model knows, which are not all: [its card](../models/emoji/README.md).
"""
SIMILARITY = """## CLIP at work

Cosines of captions with pictures; naming and searching pictures is in [clip.md](clip.md).

    t2i similarity cat.png apple.png --text "cat face" --text "red apple" --out matrix.png

![Cosines of captions with pictures](images/gallery-similarity.png)
"""

if __name__ == "__main__":
    main()
