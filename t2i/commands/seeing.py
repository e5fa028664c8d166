"""Commands that use CLIP alone: `t2i classify`, `search` and `similarity`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2i.bulk import BulkJob
from t2i.commands import SHIPPED_MODEL, flags
from t2i.commands.flags import argument, option
from t2i.errors import InputError
from t2i.terminal import print_line
from t2i.texts import normalize_text, read_lines

if TYPE_CHECKING:
    from t2i.networks.clip import CLIP

app = typer.Typer()

Clip = Annotated[str, option("CLIP's folder, or a public NAME:TAG of open_clip.", "models/emoji/clip")]


def load_clip_model(clip: str, device: str) -> "CLIP":
    from t2i.interop.by_name import load_clip
    from t2i.progress import show_loading
    from t2i.runtime.devices import resolve_device_name

    with show_loading(clip):
        return load_clip(clip).to(resolve_device_name(device)).eval()


@app.command()
def classify(
    images: flags.ImageFiles,
    labels: Annotated[str | None, option("Comma-separated labels.")] = None,
    labels_file: Annotated[Path | None, option("Text file with one label per line.")] = None,
    template: Annotated[
        list[str] | None, option("Sentence with {} for the label. Repeatable for a mean.", "{}", metavar="SENTENCE")
    ] = None,
    top: Annotated[int | None, option("Number of labels to print for each image.", "3")] = None,
    as_json: Annotated[bool, option("Print all probabilities, one line of JSON per image.", None, "--json")] = False,
    clip: Clip = str(SHIPPED_MODEL / "clip"),
    device: flags.Device = "auto",
) -> None:
    """Classify images among any labels, without training, and print the probability of each label."""
    from t2i.checks import check_integer
    from t2i.evaluation.retrieval import (
        check_label_templates,
        classify_image_embeds,
        embed_usable_files,
        normalize_labels,
    )

    # Check everything that needs no model
    names = normalize_labels(read_labels(labels, labels_file))
    templates = check_label_templates(template or ["{}"])
    if as_json and top is not None:
        raise InputError(f"--top {top} does not apply to --json, which prints all labels")
    top = 3 if top is None else top
    check_integer("top", top, 1, 10_000)

    # Classify and print
    model = load_clip_model(clip, device)
    job = BulkJob(len(images))
    usable, z_i = embed_usable_files(model, images, job)
    for path, row in zip(usable, classify_image_embeds(model, z_i, names, templates).tolist()):
        ranked = sorted(zip(row, names), reverse=True)
        if as_json:
            print(json.dumps({"picture": str(path), "labels": {name: value for value, name in ranked}}))
        else:
            print_line(f"{path}: " + ", ".join(f"{name} {value:.1%}" for value, name in ranked[:top]))
    job.finish()


def read_labels(labels: str | None, file: Path | None) -> list[str]:
    """Return the labels of the command line, then those of the file."""
    names = [] if labels is None else [label.strip() for label in labels.split(",")]
    return names + (read_lines(file, "labels") if file is not None else [])


@app.command()
def search(
    text: Annotated[str | None, argument("Text to search for.")] = None,
    where: Annotated[str, option("Folder of images, or a cache that `t2i data cache` wrote.", None, "--in")] = ".",
    image: Annotated[
        Path | None, option("Image file to search for, instead of a text.", None, "--image", "--picture")
    ] = None,
    top: Annotated[int, option("Number of images to print.")] = 10,
    index: Annotated[Path | None, option("File that stores the folder's embeddings.", "in the folder")] = None,
    clip: Clip = str(SHIPPED_MODEL / "clip"),
    device: flags.Device = "auto",
) -> None:
    """Search images by a text or by another image, and print cosine similarities and file names.

    The embeddings of a folder are stored in it. Later searches embed only new images.
    """
    from t2i.checks import check_integer
    from t2i.data.pictures import open_image
    from t2i.evaluation.retrieval import open_image_index, search_image_index

    # Check everything that needs no model
    if (text is None) == (image is None):
        raise InputError(f"give a text or an --image to search for, got {'none' if text is None else 'both'}")
    if text is not None and not normalize_text(text):
        raise InputError(f"the text must not be empty, got {text!r}")
    check_integer("top", top, 1, 10_000)
    if image is not None:
        open_image(image)

    # Search
    model = load_clip_model(clip, device)
    job = BulkJob(0)
    for name, cosine in search_image_index(model, open_image_index(model, where, index, job), text, image, top):
        print_line(f"{cosine:.4f}  {name}")
    job.finish()


@app.command()
def similarity(
    images: flags.ImageFiles,
    text: Annotated[
        list[str] | None, option("Text to compare with, repeatable; without it, each other.", metavar="TEXT")
    ] = None,
    out: Annotated[Path, option("PNG file to write. It must not exist.")] = Path("similarity.png"),
    clip: Clip = str(SHIPPED_MODEL / "clip"),
    device: flags.Device = "auto",
) -> None:
    """Draw a matrix of cosine similarities of images with texts, or with each other, and print its path."""
    import torch

    from t2i.checks import check_texts
    from t2i.data.pictures import open_image, to_tensor
    from t2i.evaluation.contact_sheet import build_similarity_matrix, to_pil_images
    from t2i.evaluation.retrieval import embed_image_files, embed_labels

    # Check everything that needs no model
    if out.suffix != ".png" or out.exists():
        reason = "exists and is not overwritten" if out.exists() else "does not end in .png"
        raise InputError(f"out is {str(out)!r}, which {reason}; give another name")
    check_texts("text", text or [], empty=False)
    job, thumbnails = BulkJob(len(images)), []
    for path in images:
        with job.skip_bad_input(path, OSError):
            thumbnails.append((path, to_tensor(open_image(path), 64)))
    job.check_any_left()
    images = [path for path, _ in thumbnails]

    # Compare
    model = load_clip_model(clip, device)
    z_i = embed_image_files(model, images)
    rows = embed_labels(model, text).cpu() if text else z_i
    names = text or [path.stem for path in images]
    title = f"cosine of {'text and image' if text else 'two images'}"
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = to_pil_images(torch.stack([thumbnail for _, thumbnail in thumbnails]))
    build_similarity_matrix(rows @ z_i.T, shown, names, title, paired=False).save(out)
    print_line(out)
    job.finish()
