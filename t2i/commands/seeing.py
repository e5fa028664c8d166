"""What CLIP sees: `t2i classify`, `t2i search`, `t2i similarity`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from t2i.commands import SHIPPED_MODEL
from t2i.commands import flags as options
from t2i.errors import InputError

if TYPE_CHECKING:
    from t2i.networks.clip import CLIP

app = typer.Typer()

Clip = Annotated[str, Option(help="A folder, or a public NAME:TAG.")]
Template = Annotated[list[str] | None, Option(help="A sentence with {} for the label; again and again for several.")]


def load_clip_model(clip: str, device: str) -> "CLIP":
    from t2i.interop.by_name import load_clip
    from t2i.runtime.devices import resolve_device_name

    return load_clip(clip).to(resolve_device_name(device)).eval()


@app.command()
def classify(
    pictures: Annotated[list[Path], Argument(help="Files.")],
    labels: Annotated[str | None, Option(help="With commas between them.")] = None,
    labels_file: Annotated[Path | None, Option(help="A file with a label a line.")] = None,
    template: Template = None,
    top: Annotated[int, Option(help="Labels to show of each picture.")] = 3,
    as_json: Annotated[bool, Option("--json", help="All probabilities, a line of JSON a picture.")] = False,
    clip: Clip = str(SHIPPED_MODEL / "clip"),
    device: options.Device = "auto",
) -> None:
    """Name pictures: the probability of each label, which nothing was trained for."""
    from t2i.checks import check_integer
    from t2i.evaluation.retrieval import check_label_templates, check_labels, embed_image_files
    from t2i.evaluation.retrieval import classify_image_embeds as classify_pictures

    names = check_labels(read_labels(labels, labels_file))
    templates = check_label_templates(template or ["{}"])
    check_integer("top", top, 1, 10_000)
    model = load_clip_model(clip, device)
    probabilities = classify_pictures(model, embed_image_files(model, pictures), names, templates)
    for path, row in zip(pictures, probabilities.tolist()):
        order = sorted(zip(row, names), reverse=True)
        if as_json:
            print(json.dumps({"picture": str(path), "labels": {name: value for value, name in order}}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {value:.1%}" for value, name in order[:top]))


def read_labels(labels: str | None, file: Path | None) -> list[str]:
    """Those of the command line and those of a file."""
    found = [] if labels is None else [label.strip() for label in labels.split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the labels in {str(file)!r} ({error}); it is a text file") from error
        found += [line.strip() for line in lines if line.strip()]
    return found


@app.command()
def search(
    text: Annotated[str | None, Argument(help="What to look for.", show_default=False)] = None,
    where: Annotated[str, Option("--in", help="A folder of pictures, or a cache that `t2i data cache` made.")] = ".",
    picture: Annotated[Path | None, Option(help="Look for what is like this picture, instead of a text.")] = None,
    top: Annotated[int, Option(help="Pictures to show.")] = 10,
    index: Annotated[Path | None, Option(help="File of the folder's embeddings, if not in the folder.")] = None,
    clip: Clip = str(SHIPPED_MODEL / "clip"),
    device: options.Device = "auto",
) -> None:
    """Find pictures by a text or by another picture; prints cosines and names.

    A folder is embedded once: its index is kept in the folder, and only new pictures are added.
    """
    from t2i.checks import check_integer
    from t2i.data.pictures import open_image
    from t2i.evaluation.retrieval import open_image_index
    from t2i.evaluation.retrieval import search_image_index as search_index

    if (text is None) == (picture is None):
        raise InputError("give a text or a --picture to look for, " + ("got none" if text is None else "got both"))
    if text is not None and not text.strip():
        raise InputError(f"the text must not be empty, got {text!r}")
    check_integer("top", top, 1, 10_000)
    if picture is not None:
        open_image(picture)
    model = load_clip_model(clip, device)
    for name, cosine in search_index(model, open_image_index(model, where, index), text, picture, top):
        print(f"{cosine:.4f}  {name}")


@app.command()
def similarity(
    pictures: Annotated[list[Path], Argument(help="Files.")],
    text: Annotated[list[str] | None, Option(help="A row; again and again. Without any, pictures by pictures.")] = None,
    out: Annotated[Path, Option(help="A new .png.")] = Path("similarity.png"),
    clip: Clip = str(SHIPPED_MODEL / "clip"),
    device: options.Device = "auto",
) -> None:
    """Draw the cosines of pictures with texts, or with each other, as a matrix."""
    import torch

    from t2i.checks import check_texts
    from t2i.data.pictures import open_image, to_tensor
    from t2i.evaluation.contact_sheet import build_similarity_matrix, to_pil_images
    from t2i.evaluation.retrieval import embed_image_files, embed_labels

    if out.suffix != ".png" or out.exists():
        what = "exists and is not overwritten" if out.exists() else "does not end in .png"
        raise InputError(f"out is {str(out)!r}, which {what}; give another name")
    check_texts("text", text or [], empty=False)
    images = to_pil_images(torch.stack([to_tensor(open_image(path), 64) for path in pictures]))
    model = load_clip_model(clip, device)
    z_i = embed_image_files(model, pictures)
    rows = embed_labels(model, text).cpu() if text else z_i
    what = "text and picture" if text else "two pictures"
    names = text or [path.stem for path in pictures]
    out.parent.mkdir(parents=True, exist_ok=True)
    build_similarity_matrix(rows @ z_i.T, images, names, f"cosine of {what}", paired=False).save(out)
    print(out)
