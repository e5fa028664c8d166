"""Draw the images of docs/gallery.md with the shipped models: `make gallery`.

Or some of them: python docs/gallery.py [--data data/emoji] [--out docs/images] [--only NAME ...]
"""

import argparse
import random
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

from t2i.data.emoji.styles import STYLES
from t2i.data.pictures import open_image, to_tensor
from t2i.diffusion.guidance import Guidance
from t2i.evaluation.contact_sheet import build_labelled_rows, build_similarity_matrix, to_pil_images
from t2i.evaluation.emoji.real_emoji import RealEmoji
from t2i.files.model_folder import load_model
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.sampling.steering import Steering, load_classifier

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
PROMPTS = ["a cat", "red apple", "sunflower", "waving hand: dark skin tone", "snowman", "red heart"]
CAT, APPLE, ROCKET, SNOWMAN, FOX, RAINBOW = "1f431", "1f34e", "1f680", "26c4", "1f98a", "1f308"  # emoji in data/emoji
NAMES = ["cat face", "red apple", "rocket", "snowman", "fox", "rainbow"]
# By name; all six images of each were in training
STYLED = {
    "dog face": "1f436",
    "red apple": APPLE,
    "house": "1f3e0",
    "mushroom": "1f344",
    "fox": FOX,
    "rainbow": RAINBOW,
}
PAIRS, PAIR_COLUMNS, PAIR_SIDE = 64, 6, 64  # of the sheet of drawn and real emoji; sides in pixels
MAX_BYTES = 300_000  # of one image in the documents
SUFFIXES = {"Noto": ""} | {style.word: f", {style.word}" for style in STYLES.values()}  # of captions, by style
Rows = dict[str, list[Image.Image | None]]


@dataclass
class Gallery:
    """The shipped pipeline, the folder of emoji, and the seed of each first image."""

    data: Path
    pipeline: Text2ImagePipeline
    seed: int = 0

    def generators(self, count: int) -> list[Generator]:
        return [Generator().manual_seed(self.seed + i) for i in range(count)]

    def draw(self, prompts: list[str], **options: Any) -> list[Image.Image]:
        return list(self.pipeline(prompts, generator=self.generators(len(prompts)), **options).images)

    def steer(self, steering: Steering) -> Image.Image:
        """Draw one image from no condition at all, towards what `steering` measures."""
        unconditional = torch.zeros(1, self.pipeline.clip.embed_dim)
        return self.pipeline(image_embeds=unconditional, generator=self.generators(1), steering=steering).images[0]

    def emoji(self, *codes: str) -> list[Image.Image]:
        """Open images of the data by the code points in their file names."""
        return [open_image(self.data / f"{code}.png") for code in codes]


def draw_text(gallery: Gallery) -> Image.Image:
    rows: Rows = {"seed 0 on": [*gallery.draw(PROMPTS)]}
    rows["seed 100 on"] = [*Gallery(gallery.data, gallery.pipeline, seed=100).draw(PROMPTS)]
    return build_labelled_rows(rows, PROMPTS)


def draw_priors(gallery: Gallery) -> Image.Image:
    autoregressive = load_model(AutoregressivePrior, MODELS / "emoji-prior-autoregressive").eval()
    rows: Rows = {"diffusion prior": [*gallery.draw(PROMPTS)]}
    for name, prior in {"autoregressive": autoregressive, "none": None}.items():
        pipeline = Text2ImagePipeline.from_pipe(gallery.pipeline, prior=prior, prior_scheduler=None)
        rows[name] = [*Gallery(gallery.data, pipeline).draw(PROMPTS)]
    return build_labelled_rows(rows, PROMPTS)


def draw_candidates(gallery: Gallery) -> Image.Image:
    rows: Rows = {f"{count} candidates": [*gallery.draw(PROMPTS, prior_candidates=count)] for count in (1, 2, 8)}
    return build_labelled_rows(rows, PROMPTS)


def draw_samplers(gallery: Gallery) -> Image.Image:
    steps = (4, 8, 25)
    rows: Rows = {
        name: [gallery.draw(["a cat"], sampler=name, num_inference_steps=count)[0] for count in steps]
        for name in ("ddim", "ddpm", "dpmsolver++", "unipc", "ode", "sde")
    }
    return build_labelled_rows(rows, [f"{count} steps" for count in steps])


def draw_guidance(gallery: Gallery) -> Image.Image:
    """Draw one prompt with several scales and intervals of guidance."""
    scales = {
        "1 (off)": 1.0,
        "1.5": 1.5,
        "8": 8.0,
        "8, interval 0.2 to 0.8": Guidance(8.0, interval=(0.2, 0.8)),
        "8, rescaled": Guidance(8.0, rescale=0.8),
        "8, thresholded": Guidance(8.0, threshold=0.995),
        "8, projected": Guidance(8.0, parallel=0.0, norm=0.5, momentum=-0.5),
    }
    columns = [gallery.draw(PROMPTS[:3], guidance_scale=scale) for scale in scales.values()]
    rows: Rows = {prompt: [images[i] for images in columns] for i, prompt in enumerate(PROMPTS[:3])}
    return build_labelled_rows(rows, list(scales))


def draw_negatives(gallery: Gallery) -> Image.Image:
    prompts, negative = ["a cat", "heart", "man: light skin tone"], ["orange", "red", "beard"]
    rows: Rows = {
        "none": [*gallery.draw(prompts)],
        "in the prior": [*gallery.draw(prompts, negative_prompt=negative)],
        "in the decoder": [*gallery.draw(prompts, decoder_negative_prompt=negative, guidance_scale=3.0)],
    }
    return build_labelled_rows(rows, [f"{prompt}, not {other}" for prompt, other in zip(prompts, negative)])


def draw_classifier(gallery: Gallery) -> Image.Image:
    classifier, scales = load_classifier(MODELS / "emoji-classifier"), (0.0, 1.0, 4.0, 16.0)
    rows: Rows = {
        name: [gallery.steer(Steering(scale, classifier, class_name=name)) for scale in scales]
        for name in ("Animals & Nature", "Food & Drink", "Flags", "Travel & Places")
    }
    return build_labelled_rows(rows, [f"gradient scale {scale:g}" for scale in scales])


def draw_clip(gallery: Gallery) -> Image.Image:
    scales = (0.0, 0.5, 2.0, 8.0)
    rows: Rows = {text: [gallery.steer(Steering(scale, text=text)) for scale in scales] for text in PROMPTS[:2]}
    return build_labelled_rows(rows, [f"gradient scale {scale:g}" for scale in scales])


def draw_variations(gallery: Gallery) -> Image.Image:
    pipeline = ImageVariationPipeline.from_pipe(gallery.pipeline)
    pictures = gallery.emoji(CAT, APPLE, ROCKET, SNOWMAN, FOX)
    rows: Rows = {"picture": [*pictures]}
    for eta in (0.0, 0.5, 1.0):
        rows[f"inverted, eta {eta:g}"] = pipeline(pictures, eta=eta, generator=gallery.generators(5)).images
    rows["new noise"] = pipeline(pictures, generator=gallery.generators(5)).images
    return build_labelled_rows(rows, NAMES[:5])


def draw_interpolation(gallery: Gallery) -> Image.Image:
    pipeline = InterpolationPipeline.from_pipe(gallery.pipeline)
    pairs = {"image to image": gallery.emoji(CAT, FOX), "text to text": ["red apple", "sunflower"]}
    rows: Rows = {
        name: pipeline(anchors, frames=7, generator=gallery.generators(1)[0]).images for name, anchors in pairs.items()
    }
    return build_labelled_rows(rows, [f"{i}/6" for i in range(7)])


def draw_diffs(gallery: Gallery) -> Image.Image:
    pipeline = TextDiffPipeline.from_pipe(gallery.pipeline)
    pictures = gallery.emoji("1f44b", APPLE, CAT, "2764-fe0f")
    source = ["waving hand", "red apple", "cat face", "red heart"]
    target = ["waving hand: dark skin tone", "green apple", "fox", "blue heart"]
    rows: Rows = {"picture": [*pictures]}
    for direction, theta in (("text", 0.2), ("text", 0.35), ("prior", 0.5), ("prior", 1)):
        way = {"direction": direction, "theta": theta, "generator": gallery.generators(4)}
        rows[f"{direction}, theta {theta:g}"] = pipeline(pictures, source=source, target=target, **way).images
    return build_labelled_rows(rows, [f"{before} -> {after}" for before, after in zip(source, target)])


def draw_styles(gallery: Gallery) -> Image.Image:
    """Draw captions in each style, and images of one style in others, with the model of six styles."""
    pipeline = Text2ImagePipeline.from_pretrained(MODELS / "emoji-styles")
    pipeline.set_progress_bar_config(disable=True)
    styled = Gallery(gallery.data.with_name("emoji-styles"), pipeline, gallery.seed)
    rows: Rows = {style: [*styled.draw([name + suffix for name in STYLED])] for style, suffix in SUFFIXES.items()}
    pictures = gallery.emoji(*STYLED.values())
    rows["image"] = [*pictures]
    edit = TextDiffPipeline.from_pipe(pipeline)
    for style in ("3D", "outline"):
        target = [name + SUFFIXES[style] for name in STYLED]
        way = {"direction": "prior", "theta": 1.0, "generator": gallery.generators(len(STYLED))}
        rows[f"to {style}"] = edit(pictures, source=[*STYLED], target=target, **way).images
    between = InterpolationPipeline.from_pipe(pipeline)
    ends = zip(pictures, styled.emoji(*(f"3d-{code}" for code in STYLED.values())))
    # The middle of three frames from one style to the other
    rows["halfway to real 3D"] = [
        between([*pair], frames=3, generator=generator).images[1]
        for pair, generator in zip(ends, gallery.generators(len(STYLED)))
    ]
    return build_labelled_rows(rows, [*STYLED])


def draw_inpainting(gallery: Gallery) -> Image.Image:
    pipeline = InpaintPipeline.from_pipe(gallery.pipeline)
    pictures, prompts = gallery.emoji(CAT, APPLE, "2764-fe0f"), ["fox", "green apple", "blue heart"]
    side = pictures[0].width
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (0, side // 2, side, side))
    rows: Rows = {"picture": [*pictures], "mask": [mask.convert("RGB")] * 3}
    rows["painted"] = pipeline(pictures, mask, prompts, generator=gallery.generators(3)).images
    rows["as it was"] = pipeline(pictures, mask, generator=gallery.generators(3)).images
    return build_labelled_rows(rows, prompts)


def draw_outpainting(gallery: Gallery) -> Image.Image:
    pipeline = OutpaintPipeline.from_pipe(gallery.pipeline)
    pictures = gallery.emoji(CAT, RAINBOW, "1f3e0")
    margins = dict.fromkeys(("left", "right", "top", "bottom"), 64)
    drawn = pipeline(pictures, **margins, generator=gallery.generators(3)).images
    return build_labelled_rows({"picture": [*pictures], "twice as wide": drawn}, ["cat face", "rainbow", "house"])


def draw_redrawing(gallery: Gallery) -> Image.Image:
    pipeline = ImageToImagePipeline.from_pipe(gallery.pipeline)
    pictures, prompts = gallery.emoji(CAT, APPLE, ROCKET), ["fox", "orange", "satellite"]
    rows: Rows = {"picture": [*pictures]}
    for strength in (0.3, 0.6, 0.9):
        drawn = pipeline(pictures, prompts, strength=strength, generator=gallery.generators(3))
        rows[f"strength {strength:g}"] = drawn.images
    return build_labelled_rows(rows, prompts)


def draw_previews(gallery: Gallery) -> Image.Image:
    rows: Rows = {"prior": [], "decoder": []}

    def keep(preview: Any) -> None:
        rows[preview.stage].append(preview.images()[0])

    steps = {"num_inference_steps": 25, "prior_num_inference_steps": 25}
    gallery.draw(["a cat"], on_preview=keep, preview_every=5, prior_candidates=1, **steps)
    return build_labelled_rows(rows, [f"step {step}" for step in (5, 10, 15, 20, 25)])


def draw_upsampling(gallery: Gallery) -> Image.Image:
    drawn = gallery.draw(PROMPTS[:4])
    rows: Rows = {"drawn, enlarged": [image.resize((256, 256), Image.Resampling.BICUBIC) for image in drawn]}
    pipeline = UpsamplePipeline.from_pretrained(MODELS / "emoji-upsampler")
    rows["upsampler"] = pipeline(drawn, generator=gallery.generators(4)).images
    return build_labelled_rows(rows, PROMPTS[:4])


def draw_pairs(gallery: Gallery) -> Image.Image:
    """Draw 64 things, each beside the real one, and print which of each pair was drawn: the order is random."""
    real = RealEmoji(gallery.data)
    things = [record for record in real.records if real.kinds[record.index] == "things" and record.split == "train"]
    random.Random(0).shuffle(things)
    sides, gap = random.Random(1), PAIR_SIDE // 16
    width, height = 2 * PAIR_SIDE + 6 * gap, PAIR_SIDE + 4 * gap
    sheet = Image.new("RGB", (PAIR_COLUMNS * width, -(-PAIRS // PAIR_COLUMNS) * height), "white")
    drawn = gallery.draw([record.text for record in things[:PAIRS]])
    is_left = [sides.random() < 0.5 for _ in drawn]
    for i, pair in enumerate(zip(drawn, to_pil_images(real.load_images(things[:PAIRS])))):
        row, column = divmod(i, PAIR_COLUMNS)
        for side, one in enumerate(pair if is_left[i] else pair[::-1]):
            place = (column * width + 2 * gap + side * (PAIR_SIDE + gap), row * height + 2 * gap)
            sheet.paste(one.resize((PAIR_SIDE, PAIR_SIDE), Image.Resampling.LANCZOS), place)
    print("drawn:", " ".join("left" if left else "right" for left in is_left))
    return sheet


@torch.no_grad()
def draw_similarity(gallery: Gallery) -> Image.Image:
    clip, pictures = gallery.pipeline.clip, gallery.emoji(CAT, APPLE, ROCKET, SNOWMAN, FOX, RAINBOW)
    images = torch.stack([to_tensor(picture, clip.size) for picture in pictures])
    cosines = clip.encode_text(NAMES).embedding @ clip.encode_image(images).T
    return build_similarity_matrix(cosines, pictures, NAMES, "cosine of caption and image")


DRAWINGS: dict[str, Callable[[Gallery], Image.Image]] = {
    name.removeprefix("draw_"): function for name, function in list(globals().items()) if name.startswith("draw_")
}


def save_png(image: Image.Image, path: Path) -> None:
    """Save a PNG of at most MAX_BYTES, in fewer colours where that is needed."""
    for colors in (None, 256, 128, 64):
        (image if colors is None else image.quantize(colors, dither=Image.Dither.NONE)).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return
    raise SystemExit(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--only", nargs="*", choices=list(DRAWINGS), default=list(DRAWINGS))
    arguments = parser.parse_args()
    pipeline = Text2ImagePipeline.from_pretrained(MODELS / "emoji")
    pipeline.set_progress_bar_config(disable=True)
    for name in arguments.only:
        path = arguments.out / f"gallery-{name}.png"
        save_png(DRAWINGS[name](Gallery(arguments.data, pipeline)), path)
        print(path)


if __name__ == "__main__":
    main()
