"""What steering does to the emoji model, told nothing else: python -m benchmarks.steering data/emoji CLASSIFIER

Classes: how often a picture's nearest real emoji is of the class, and how different the pictures of a class are,
against gamma. Nearest is meant in colours and edges (`t2i.evaluation.emoji.compute_pixel_features`), of which the
classifier knows
nothing; diversity is one minus the mean cosine of CLIP's embeddings, for a distance in colours grows with the contrast
alone. Texts: CLIP's own cosine, and how near the picture is to the real emoji of that caption, in the same features.
Writes docs/steering.json, and the plot and the pictures of docs/steering.md. Picture i of every row has seed i.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from t2i.pipelines.jobs.generation import load_pipeline
from t2i.pipelines.text2image import Text2ImagePipeline
from torch import Generator, Tensor

from t2i.commands import SHIPPED_MODEL
from t2i.evaluation.contact_sheet import build_labelled_rows, to_pil_images
from t2i.evaluation.emoji import compute_pixel_features, iterate_emoji_batches, open_emoji_dataset
from t2i.sampling.steering import Steering, load_classifier

GAMMAS = (0, 1, 2, 4, 8, 16)
SCALES = (0, 0.5, 2)  # of CLIP
TEXTS = ("red heart", "pizza", "sunflower", "soccer ball", "blue circle", "cat face", "house", "green apple")


class Bench:
    def __init__(self, data: Path, model: str, classifier: Path, steps: int):
        self.pipeline: Text2ImagePipeline = load_pipeline(model, "cpu")
        self.classifier, self.steps = load_classifier(classifier), steps
        self.pipeline.set_progress_bar_config(disable=True)
        dataset, self.records = open_emoji_dataset(data)
        self.real = torch.cat([compute_pixel_features(batch) for batch in iterate_emoji_batches(dataset, self.records)])
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
        self.group = {row["file_name"]: row["group"] for row in rows}

    def draw(self, count: int, steering: Steering) -> tuple[Tensor, float]:
        """(count, 3, H, W) in [-1, 1] of a decoder that is told nothing; seconds a picture."""
        start = time.perf_counter()
        images = self.pipeline(
            image_embeds=torch.zeros(count, self.pipeline.clip.embed_dim),
            generator=[Generator().manual_seed(i) for i in range(count)],
            guidance_scale=1.0,
            num_inference_steps=self.steps,
            steering=steering,
            output_type="pt",
        ).images
        return images.float() * 2 - 1, (time.perf_counter() - start) / count

    def towards_classes(self, gamma: float, each: int) -> tuple[dict[str, Any], Tensor]:
        """Figures, and the first picture of each class."""
        classes: list[str] = self.classifier.config.classes
        right: list[float] = []
        spread: list[Tensor] = []
        contrast: list[Tensor] = []
        first: list[Tensor] = []
        seconds = 0.0
        for name in classes:
            pictures, took = self.draw(each, Steering(gamma, self.classifier, name))
            seen = compute_pixel_features(pictures)
            nearest = torch.cdist(seen, self.real).argmin(dim=1).tolist()
            right.append(sum(self.group[self.records[i].key] == name for i in nearest) / each)
            z_i = self.pipeline.encode_image(pictures)
            others = (each * each - (z_i @ z_i.T).sum()) / (each * (each - 1))  # one minus the cosine, of all pairs
            spread.append(others)
            contrast.append(F.pdist(seen).mean())
            first.append(pictures[0])
            seconds += took / len(classes)
        figures = {"gamma": gamma, "accuracy": sum(right) / len(right), "diversity": float(torch.stack(spread).mean())}
        figures["colours"] = float(torch.stack(contrast).mean())
        figures |= {"by_class": dict(zip(classes, right)), "seconds_a_picture": seconds}
        return rounded(figures), torch.stack(first)

    @torch.no_grad()
    def towards_texts(self, scale: float, noise_aware: bool) -> tuple[dict[str, Any], Tensor]:
        judge = self.classifier if noise_aware else None
        pictures, took = self.draw(len(TEXTS), Steering(scale, judge, text=list(TEXTS)))
        target = self.pipeline.clip.encode_text(list(TEXTS)).embedding
        cosine = (self.pipeline.encode_image(pictures) * target).sum(dim=1).mean()
        goal = [next(record.index for record in self.records if record.text == text) for text in TEXTS]
        distances = torch.cdist(compute_pixel_features(pictures), self.real)
        near = (distances < distances.gather(1, torch.tensor(goal)[:, None])).float().mean()
        kind = "noise-aware" if noise_aware else "denoised estimate"
        figures = {"gradient": kind, "scale": scale, "cosine": float(cosine), "nearer_emoji": float(near)}
        return rounded({**figures, "seconds_a_picture": took}), pictures


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and diversity against gamma, side by side."""
    sheet = Image.new("RGB", (900, 320), "white")
    font = ImageFont.load_default(size=15)
    panels = (
        ("accuracy", "class of the nearest real emoji is right", "#2a6f4e"),
        ("diversity", "diversity in a class", "#a03d2e"),
    )
    for left, (name, title, color) in zip((60, 510), panels):
        pen, right, top, bottom = ImageDraw.Draw(sheet), left + 340, 50, 260
        most = max(row[name] for row in rows) if name == "diversity" else 1.0
        pen.text((left, 15), title, fill="#222222", font=font)
        for share in (0, 0.5, 1):
            y = bottom - share * (bottom - top)
            pen.line((left, y, right, y), fill="#dddddd")
            pen.text((left - 8, y), f"{share * most:.3g}", fill="#555555", font=font, anchor="rm")
        step = (right - left - 40) / (len(rows) - 1)
        points = [(left + 20 + i * step, bottom - row[name] / most * (bottom - top)) for i, row in enumerate(rows)]
        pen.line(points, fill=color, width=3)
        for (x, y), row in zip(points, rows):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)
            pen.text((x, bottom + 16), f"{row['gamma']:g}", fill="#555555", font=font, anchor="mm")
        pen.text(((left + right) / 2, bottom + 40), "gamma", fill="#555555", font=font, anchor="mm")
    sheet.quantize(32).save(path, optimize=True)


def show(rows: dict[str, Tensor], labels: list[str], path: Path) -> None:
    small = {name: F.interpolate(row, size=72, mode="area") for name, row in rows.items()}
    sheet = build_labelled_rows({name: to_pil_images(row) for name, row in small.items()}, labels)
    sheet.quantize(64).save(path, optimize=True)


def main(data: Path, classifier: Path, model: str, docs: Path, each: int, steps: int) -> None:
    bench = Bench(data, model, classifier, steps)
    print("| gamma | class right | diversity | colours | s a picture |\n|---|---|---|---|---|")
    by_gamma: list[dict[str, Any]] = []
    sheets: dict[str, Tensor] = {}
    for gamma in GAMMAS:
        row, first = bench.towards_classes(gamma, each)
        print(
            f"| {gamma:g} | {row['accuracy']:.1%} | {row['diversity']:.3f} | {row['colours']:.2f} "
            f"| {row['seconds_a_picture']:.2f} |",
            flush=True,
        )
        by_gamma.append(row)
        sheets[f"{gamma:g}"] = first
    plot(by_gamma, docs / "images/steering.png")
    show(sheets, list(bench.classifier.config.classes), docs / "images/steering-classes.png")
    texts: list[dict[str, Any]] = []
    write(docs, bench, each, by_gamma, texts)
    print("| gradient | scale | CLIP cosine | real emoji that are nearer | s a picture |\n|---|---|---|---|---|")
    rows: dict[str, Tensor] = {}
    for noise_aware in (False, True):
        for scale in SCALES[1:] if noise_aware else SCALES:
            row, pictures = bench.towards_texts(scale, noise_aware)
            cells = f"{row['cosine']:.3f} | {row['nearer_emoji']:.1%} | {row['seconds_a_picture']:.2f}"
            print(f"| {row['gradient']} | {scale:g} | {cells} |", flush=True)
            texts.append(row)
            rows[f"{'noisy' if noise_aware else 'clean'} {scale:g}"] = pictures
    show(rows, list(TEXTS), docs / "images/steering-texts.png")
    write(docs, bench, each, by_gamma, texts)


def write(docs: Path, bench: Bench, each: int, classes: list[dict[str, Any]], texts: list[dict[str, Any]]) -> None:
    settings = {"pictures_a_class": each, "steps": bench.steps, "torch": torch.__version__}
    report = {"settings": settings, "classes": classes, "texts": texts}
    (docs / "steering.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("classifier", type=Path)
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--each", type=int, default=12)
    parser.add_argument("--steps", type=int, default=25)
    main(**vars(parser.parse_args()))
