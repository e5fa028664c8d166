"""Accuracy of drawn emoji: an emoji is drawn for its caption and compared with all real emoji."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms.functional import to_pil_image

from t2i.config import DataConfig
from t2i.data import CaptionedPictures, SampleText
from t2i.errors import InputError
from t2i.evaluation.contact_sheet import build_contact_sheet
from t2i.evaluation.results import check_result_folder, collect_package_versions, write_result_file

EMOJI_SIZE = 128
TRAINING_CAPTIONS = 200
SHEET_IMAGES = 32  # pictures on a contact sheet, the first ones


def compute_pixel_features(images: Tensor) -> Tensor:
    """Return features, (B, 1152), of pictures (B, 3, H, W) in [-1, 1], to be compared by Euclidean distance.

    They are the colours, averaged over a 16 x 16 grid, and the absolute horizontal and vertical gradients of the
    32 x 32 reduction, averaged over an 8 x 8 grid.
    """
    # Reductions, so that a shift by a pixel or two changes little
    small = F.adaptive_avg_pool2d(images, 32)
    color = F.adaptive_avg_pool2d(images, 16).flatten(1)
    horizontal = F.pad((small[..., :, 1:] - small[..., :, :-1]).abs(), (0, 1))
    vertical = F.pad((small[..., 1:, :] - small[..., :-1, :]).abs(), (0, 0, 0, 1))
    edges = [F.adaptive_avg_pool2d(gradient, 8).flatten(1) for gradient in (horizontal, vertical)]
    return torch.cat([color, *edges], dim=1)


def strip_name_modifier(text: str) -> str:
    """Return the name up to the modifier; after "flag:" and "keycap:" follows the content, not a modifier."""
    return text if text.startswith(("flag: ", "keycap: ")) else text.split(": ")[0]


def open_emoji_dataset(folder: str | Path) -> tuple[CaptionedPictures, list[SampleText]]:
    """Open the data set of all real emoji, of both splits. Raises InputError without a manifest."""
    dataset = CaptionedPictures(DataConfig(str(folder), EMOJI_SIZE, 0), split=None)
    return dataset, [dataset.get_record(index) for index in range(len(dataset))]


def choose_emoji_captions(records: list[SampleText], count: int = TRAINING_CAPTIONS) -> dict[str, list[SampleText]]:
    """Return the captions to draw: `count` of the training split, always the same, and all that are held out."""
    training = [record for record in records if record.split == "train"]
    held_out = [record for record in records if record.split == "held_out"]
    if not training or not held_out:
        raise InputError(f"{len(training)} training and {len(held_out)} held-out pictures; both kinds are needed")
    return {"train": random.Random(0).sample(training, min(count, len(training))), "held_out": held_out}


def evaluate_emoji_drawings(
    pipeline: Any,
    folder: str | Path,
    out: str | Path,
    true_embeddings: bool = False,
    batch_size: int = 32,
    **settings: Any,
) -> dict[str, Any]:
    """Draw one picture for each chosen caption, with seeds 0, 1, ..., and score the pictures.

    Writes `out/emoji.json` and a contact sheet for each split. `true_embeddings` draws the z_i of each real emoji
    instead of the prior's, which measures the decoder alone. `settings` go to the pipeline, which has the defaults.
    """
    # Open the data, and refuse what cannot work, before anything is drawn
    out = Path(out)
    check_result_folder(out)
    dataset, records = open_emoji_dataset(folder)
    captions = choose_emoji_captions(records)
    out.mkdir(parents=True, exist_ok=True)

    # Draw and score each split
    real = torch.cat([compute_pixel_features(batch) for batch in iterate_emoji_batches(dataset, records)])
    scores: dict[str, Any] = {}
    for split, chosen in captions.items():
        images = torch.cat(list(draw_emoji_batches(pipeline, dataset, chosen, true_embeddings, batch_size, settings)))
        distances = torch.cdist(compute_pixel_features(images * 2 - 1), real)
        nearest = [records[i] for i in distances.argmin(dim=1).tolist()]
        scores[split] = compare_emoji(chosen, nearest)
        pictures = [to_pil_image(image) for image in images[:SHEET_IMAGES]]
        sheet = build_contact_sheet(pictures, [record.text for record in chosen])
        sheet.quantize(256).save(out / f"{split}.png", optimize=True)  # a fifth of the size, without a visible change
    scores |= {
        "true_embeddings": true_embeddings,
        "settings": settings,
        "first_seed": 0,
        "versions": collect_package_versions(),
    }
    write_result_file(scores, out / "emoji.json")
    return scores


def draw_emoji_batches(
    pipeline: Any,
    dataset: CaptionedPictures,
    records: list[SampleText],
    true_embeddings: bool,
    batch_size: int,
    settings: dict[str, Any],
) -> Iterator[Tensor]:
    """Yield drawings, (B, 3, H, W) in [0, 1] at a time; caption i has seed i."""
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        inputs: dict[str, Any] = {"prompt": [record.text for record in part]}
        if true_embeddings:
            pictures = next(iterate_emoji_batches(dataset, part))
            with torch.no_grad():
                inputs["image_embeds"] = pipeline.clip.encode_image(pictures.to(pipeline.device, pipeline.clip.dtype))
        seeds = [Generator().manual_seed(start + i) for i in range(len(part))]
        yield pipeline(**inputs, generator=seeds, output_type="pt", **settings).images.float().cpu()


def iterate_emoji_batches(
    dataset: CaptionedPictures, records: list[SampleText], batch_size: int = 256
) -> Iterator[Tensor]:
    for start in range(0, len(records), batch_size):
        yield torch.stack([dataset.load_image(record.index) for record in records[start : start + batch_size]])


def compare_emoji(chosen: list[SampleText], nearest: list[SampleText]) -> dict[str, float]:
    """Return the fractions of captions whose drawing has its own emoji, or a related one, as the nearest real emoji.

    same_name: an emoji with the same name up to the modifier, such as "waving hand".
    """
    exact = [record.index == other.index for record, other in zip(chosen, nearest)]
    names = [[strip_name_modifier(record.text) for record in records] for records in (chosen, nearest)]
    fractions = {"exact": exact, "same_name": [name == other for name, other in zip(*names)]}
    count = max(1, len(chosen))
    return {"captions": len(chosen), **{name: round(sum(hits) / count, 4) for name, hits in fractions.items()}}
