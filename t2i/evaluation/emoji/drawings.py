"""Scores of drawn emoji: each stage by itself and the whole way, and single words. `t2i eval emoji` prints them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.data import SampleText
from t2i.evaluation.contact_sheet import build_contact_sheet, build_labelled_rows, to_pil_images
from t2i.evaluation.emoji.artist import Artist, save_sheet
from t2i.evaluation.emoji.measures import PerceptualJudge, compute_psnr, compute_ssim
from t2i.evaluation.emoji.real_emoji import Question, RealEmoji
from t2i.evaluation.emoji.style_diffs import choose_style_diffs, score_style_diffs
from t2i.evaluation.results import check_result_folder, collect_package_versions, write_result_file

SHEET_IMAGES = 32  # images on the contact sheet of a split, the first ones
KIND_IMAGES = 5  # of each kind, on the sheet of all kinds
STAGES = {
    "autoencoder": "autoencoder",
    "decoder": "decoder, true z_i",
    "pipeline": "whole way",
}


def evaluate_emoji_drawings(
    pipeline: Any,
    folder: str | Path,
    out: str | Path,
    samples: int | None = None,
    judge: PerceptualJudge | None = None,
    differ: Any = None,
    batch_size: int = 32,
    **settings: Any,
) -> dict[str, Any]:
    """Draw emoji for their captions, for single keywords and for words that people type, and score the images.

    Writes `out/emoji.json` and contact sheets. samples: number of each; None: see `RealEmoji`. judge: measures the
    perceptual distance; without it the scores lack it. differ: the `TextDiffPipeline` of the same model, which changes
    the style of emoji where the data has several. `settings` go to the pipeline, which has the defaults.
    """
    # Open the data, and refuse what cannot work, before anything is drawn
    out = Path(out)
    check_result_folder(out)
    real = RealEmoji(folder)
    chosen = real.choose_captions(samples)
    out.mkdir(parents=True, exist_ok=True)
    artist = Artist(pipeline, batch_size, settings)

    # Captions, by stage and kind. Those of each split have seeds of their own.
    held_out = chosen.pop("held_out")
    needed = {record.index: record for records in chosen.values() for record in records}.values()
    drawn = [[record for record in needed if record.split == split] for split in ("train", "held_out")]
    pictures: dict[int, dict[str, Tensor]] = {}
    measures: dict[int, dict[str, dict[str, float]]] = {}
    for records in drawn:
        drawings = draw_stages(artist, real, records)
        measures |= measure_stages(real, records, drawings, judge)
        for i, record in enumerate(records):
            pictures[record.index] = {stage: images[i] for stage, images in drawings.items()}
    # Scores by split, and by kind and stage
    splits = {"train": chosen.pop("train"), "held_out": held_out}
    whole = {index: stages["pipeline"] for index, stages in measures.items()}
    scores: dict[str, Any] = {
        split: {"captions": len(records)}
        | average_measures([whole[one.index] for one in records], "exact", "same_name")
        for split, records in splits.items()
    }
    scores["kinds"] = {
        kind: {"captions": len(records)}
        | {stage: average_measures([measures[one.index][stage] for one in records]) for stage in STAGES}
        for kind, records in chosen.items()
    }
    draw_caption_sheets(real, splits, chosen, pictures, out)

    # Single words
    scores |= score_words(artist, real, {"keywords": real.choose_keywords(samples), **real.read_words(samples)}, out)

    # Changes of style
    if differ is not None and (diffs := choose_style_diffs(real, samples)):
        scores["style_diffs"] = score_style_diffs(Artist(differ, batch_size, {}), real, diffs, out)
    scores |= {"samples": samples, "settings": settings, "first_seed": 0, "versions": collect_package_versions()}
    write_result_file(scores, out / "emoji.json")
    return scores


def draw_stages(artist: Artist, real: RealEmoji, records: list[SampleText]) -> dict[str, Tensor]:
    """Return the images of each stage, (N, 3, 128, 128) in [-1, 1]."""
    captions = [record.text for record in records]
    return {
        "autoencoder": artist.reconstruct(real.load_images(records)),
        "decoder": artist.draw(captions, real.load_seen_images(records, artist.pipeline.clip)),
        "pipeline": artist.draw(captions),
    }


def measure_stages(
    real: RealEmoji, records: list[SampleText], drawings: dict[str, Tensor], judge: PerceptualJudge | None
) -> dict[int, dict[str, dict[str, float]]]:
    """Return the measures of each image, by the emoji's index and by stage.

    exact: 1 if the nearest real emoji is the right one, else 0. same_name: 1 if it has the same name up to the
    modifier, such as "waving hand", in any style.
    """
    targets = real.load_images(records)
    measures: dict[int, dict[str, dict[str, float]]] = {record.index: {} for record in records}
    for stage, images in drawings.items():
        columns = {"psnr": compute_psnr(images, targets), "ssim": compute_ssim(images, targets)}
        if judge is not None:
            # A few at a time, because features take more memory than images
            parts = zip(images.split(32), targets.split(32))
            columns["perceptual"] = torch.cat([judge(image, target) for image, target in parts])
        values = {name: column.tolist() for name, column in columns.items()}
        for i, (record, nearest) in enumerate(zip(records, real.find_nearest(images))):
            same_name = real.find_name(record) == real.find_name(nearest)
            hits = {"exact": float(record.index == nearest.index), "same_name": float(same_name)}
            measures[record.index][stage] = hits | {name: column[i] for name, column in values.items()}
    return measures


def average_measures(rows: list[dict[str, float]], *names: str) -> dict[str, float]:
    """Return the mean of each measure, or of those with these `names`."""
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in names or rows[0]}


def score_words(
    artist: Artist, real: RealEmoji, lists: dict[str, list[Question]], out: Path
) -> dict[str, dict[str, Any]]:
    """Draw each list of prompts, write a sheet, and return how many are right and the emoji nearest to each drawing."""
    scores: dict[str, dict[str, Any]] = {}
    for name, questions in lists.items():
        if not questions:  # the data has no keywords, or no emoji of the words
            continue
        images = artist.draw([question.prompt for question in questions])
        nearest = real.find_nearest(images)
        right = [one.index in question.answers for question, one in zip(questions, nearest)]
        scores[name] = {
            "asked": len(questions),
            "right": round(sum(right) / len(questions), 4),
            "nearest": {question.prompt: one.text for question, one in zip(questions, nearest)},
            "wrong": [question.prompt for question, is_right in zip(questions, right) if not is_right],
        }
        captions = [
            f"{question.prompt}: {'right' if is_right else one.text}"
            for question, one, is_right in zip(questions, nearest, right)
        ]
        save_sheet(build_contact_sheet(to_pil_images(images), captions, columns=10), out / f"{name}.png")
    return scores


def draw_caption_sheets(
    real: RealEmoji,
    splits: dict[str, list[SampleText]],
    kinds: dict[str, list[SampleText]],
    pictures: dict[int, dict[str, Tensor]],
    out: Path,
) -> None:
    """Write a contact sheet of each split, and one of all kinds, in which each stage is a row below the real emoji."""
    for split, records in splits.items():
        shown = records[:SHEET_IMAGES]
        drawn = to_pil_images(torch.stack([pictures[record.index]["pipeline"] for record in shown]))
        save_sheet(build_contact_sheet(drawn, [record.text for record in shown]), out / f"{split}.png")
    shown = [record for records in kinds.values() for record in records[:KIND_IMAGES]]
    rows = {"real": to_pil_images(real.load_images(shown))}
    for stage, label in STAGES.items():
        rows[label] = to_pil_images(torch.stack([pictures[record.index][stage] for record in shown]))
    save_sheet(build_labelled_rows(rows, [record.text for record in shown]), out / "kinds.png")


def format_emoji_scores(scores: dict[str, Any]) -> list[str]:
    """Return the lines that the command prints."""
    lines = [
        f"{split}: of {score['captions']} captions, exact emoji for {score['exact']:.1%}, "
        f"same emoji, ignoring skin tone, hair and gender, for {score['same_name']:.1%}"
        for split, score in ((split, scores[split]) for split in ("train", "held_out"))
    ]
    lines += ["", f"{'kind':<11}{'n':>5}  {'stage':<18}{'exact':>7}{'name':>7}{'PSNR':>7}{'SSIM':>7}{'distance':>10}"]
    for kind, score in scores["kinds"].items():
        for stage, label in STAGES.items():
            part = score[stage]
            distance = f"{part['perceptual']:10.3f}" if "perceptual" in part else f"{'-':>10}"
            numbers = f"{part['exact']:7.1%}{part['same_name']:7.1%}{part['psnr']:7.2f}{part['ssim']:7.3f}{distance}"
            lines.append(f"{kind:<11}{score['captions']:>5}  {label:<18}{numbers}")
    titles = {"keywords": "single keywords", "words": "words that people type", "sentences": "words in a sentence"}
    lines += ["", *(f"{title}: {scores[name]['right']:.1%} of {scores[name]['asked']} right"
                    for name, title in titles.items() if name in scores)]  # fmt: skip
    if diffs := scores.get("style_diffs"):
        parts = f"style changed {diffs['style']:.1%}, emoji kept {diffs['kept']:.1%}, both {diffs['right']:.1%}"
        lines.append(f"text diffs of the style of {diffs['asked']} real emoji: {parts}")
    return lines
