"""How often CLIP names the group of an emoji, of which it was never told: python -m benchmarks.zero_shot data/emoji

The groups and subgroups are Unicode's; CLIP was trained on names and keywords. Prints a table for docs/clip.md.
"""

import json
import sys
from pathlib import Path

import torch

from t2i.commands import SHIPPED_MODEL
from t2i.evaluation.retrieval import classify_image_embeds, embed_image_files
from t2i.interop.by_name import load_clip

TEMPLATES = {
    "the label alone": ["{}"],
    "a {}": ["a {}"],
    "five": ["{}", "a {}", "an emoji of {}", "{} symbol", "picture of {}"],
}


def words(label: str) -> str:
    """A group's name as a caption would have it: lower case, without joining signs."""
    return label.lower().replace("&", "and").replace("-", " ")


def main(folder: Path, clip_name: str) -> None:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    clip = load_clip(clip_name).eval()
    z_i = embed_image_files(clip, [folder / row["file_name"] for row in rows])
    print("| labels | templates | accuracy | mean over labels | random | of |\n|---|---|---|---|---|---|")
    for kind in ("group", "subgroup"):
        labels = sorted({row[kind] for row in rows})
        truth = torch.tensor([labels.index(row[kind]) for row in rows])
        for name, templates in TEMPLATES.items():
            found = (
                classify_image_embeds(clip, z_i, [words(label) for label in labels], templates).argmax(dim=1) == truth
            )
            by_label = torch.stack([found[truth == i].float().mean() for i in range(len(labels))])
            scores = f"{found.float().mean():.1%} | {by_label.mean():.1%} | {1 / len(labels):.1%}"
            print(f"| {len(labels)} {kind}s | {name} | {scores} | {len(rows)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else str(SHIPPED_MODEL / "clip"))
