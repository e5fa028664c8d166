"""Uses of CLIP alone: classification of images by labels, and search for images by a text or an image.

Radford et al. 2021, section 3.1: a label is represented by the embedding of a sentence with it, or better by the mean
over several sentences (a prompt ensemble). Nothing is trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.bulk import BulkJob
from t2i.checks import check_integer, check_texts
from t2i.data.cache import CachedPairs, read_finished_cache
from t2i.data.picture_files import compute_picture_digest, find_images
from t2i.data.pictures import Resizing, open_image, to_tensor
from t2i.errors import InputError
from t2i.files.atomic import check_writable_folder
from t2i.files.tensor_file import read_tensor_file, write_tensor_file
from t2i.networks.clip import CLIP
from t2i.progress import Progress
from t2i.texts import normalize_text, wrap_text

BATCH_SIZE = 64
INDEX_FILE = ".t2i-index.safetensors"  # in a folder that was searched
INDEX_KIND = "index of images"
INDEX_TENSORS = ("image_embeds", "digests", "names", "name_offsets")


# Labels


def normalize_labels(labels: str | list[str]) -> list[str]:
    """Return the labels; refuse fewer than two, empty labels and repeated ones."""
    if not labels:
        raise InputError("no labels; give at least two, such as --labels cat,dog")
    labels = wrap_text(labels)
    check_texts("label", labels, empty=False)
    labels = [normalize_text(label) for label in labels]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(f"the label {twice[0]!r} is given twice; labels must differ")
    if len(labels) < 2:
        raise InputError(f"one label, {labels[0]!r}, leaves no choice; give at least two")
    return labels


def check_label_templates(templates: str | list[str]) -> list[str]:
    """Return the templates; refuse a template without exactly one {} for the label."""
    templates = wrap_text(templates)
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"a template must contain {{}} once, for the label, got {template!r:.80}")
    return templates


@torch.no_grad()
def embed_labels(clip: CLIP, labels: str | list[str], templates: str | Sequence[str] = "{}") -> Tensor:
    """Return the mean z_t of each label's sentences, one for each template: (L, D), unit length, fp32."""
    labels, templates, embeds = wrap_text(labels), wrap_text(templates), []
    for start in range(0, len(labels), BATCH_SIZE):
        part, rows = labels[start : start + BATCH_SIZE], []
        for template in templates:
            sentences = [template.replace("{}", label) for label in part]
            rows.append(F.normalize(clip.encode_text(sentences).embedding.float(), dim=-1))
        # A mean of unit vectors is shorter than one
        embeds.append(F.normalize(torch.stack(rows).mean(dim=0), dim=-1))
    return torch.cat(embeds)


def classify_image_embeds(
    clip: CLIP, z_i: Tensor, labels: str | list[str], templates: str | Sequence[str] = "{}"
) -> Tensor:
    """Return the probability of each label, (N, L), fp32, for z_i (N, D): a softmax over scaled cosines."""
    if not isinstance(clip, CLIP):
        raise InputError("the CLIP of a public pipeline has no logit scale; give an open_clip model, or train a CLIP")
    scale = clip.compute_logit_scale().detach().float()
    cosines = z_i @ embed_labels(clip, labels, templates).to(z_i.device).T
    return (scale.to(z_i.device) * cosines).softmax(dim=-1)


def embed_image_files(clip: CLIP, paths: Sequence[Path]) -> Tensor:
    """Return z_i of image files, (N, D), unit length, fp32, on the CPU. Raises InputError for other files."""
    return stack_embeds(clip, [row for _, row in iterate_image_embeds(clip, paths, BulkJob())])


def stack_embeds(clip: CLIP, rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, clip.embed_dim)


def embed_usable_files(clip: CLIP, paths: Sequence[Path], job: BulkJob) -> tuple[list[Path], Tensor]:
    """Return the image files that can be used, and their z_i. Raises InputError if there is none."""
    rows = list(iterate_image_embeds(clip, paths, job))
    job.check_any_left()
    return [path for path, _ in rows], torch.stack([row for _, row in rows])


@torch.no_grad()
def iterate_image_embeds(clip: CLIP, paths: Sequence[Path], job: BulkJob) -> Iterator[tuple[Path, Tensor]]:
    """Yield each image file that can be used with its z_i, (D,), unit length, fp32, on the CPU."""
    resizing = Resizing.for_clip(clip)
    with Progress("embedding", len(paths)) as progress:
        for start in range(0, len(paths), BATCH_SIZE):
            batch: list[tuple[Path, Tensor]] = []
            part = paths[start : start + BATCH_SIZE]
            for path in part:
                with job.skip_bad_input(path, OSError):
                    batch.append((path, to_tensor(open_image(path), resizing)))
            if batch:
                pictures = torch.stack([picture for _, picture in batch]).to(clip.device, clip.dtype)
                z_i = F.normalize(clip.encode_image(pictures).float(), dim=-1).cpu()
                yield from ((path, row) for (path, _), row in zip(batch, z_i))
            progress.update(len(part))


@dataclass(frozen=True)
class ImageIndex:
    """Names of images and their embeddings, (N, D), unit length, fp32."""

    names: list[str]
    image_embeds: Tensor

    def find_nearest_images(self, query: Tensor, count: int) -> list[tuple[str, float]]:
        """Return names and cosines of the images nearest to a query, (D,), nearest first."""
        cosines = self.image_embeds @ F.normalize(query.float().cpu(), dim=-1)
        best = cosines.topk(min(count, len(self.names)))
        return [(self.names[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist())]


def open_image_index(
    clip: CLIP, folder: str | Path, file: Path | None = None, job: BulkJob | None = None
) -> ImageIndex:
    """Return the index of the images of a folder or of a cache.

    Embeddings of a folder are stored in `file`, by default .t2i-index.safetensors in the folder, by the images'
    SHA-256 and the CLIP's fingerprint: only new and changed images are embedded, and what an interrupted call has
    embedded is kept. job: notes the images that cannot be used; None raises InputError for them.

    Raises InputError for a cache or a `file` of another CLIP.
    """
    folder = Path(folder)
    if (folder / "key.json").is_file():
        if file is not None:
            raise InputError(f"{str(folder)!r} is a cache, which needs no index {str(file)!r}")
        return read_cache_index(clip, folder)
    return index_image_folder(clip, folder, file, job or BulkJob())


def read_cache_index(clip: CLIP, folder: Path) -> ImageIndex:
    """Return the index of all splits of a cache. Raises InputError if it was made with another CLIP."""
    finished = read_finished_cache(folder)
    stored = (finished["clip"] or {}).get("identity")
    if stored != clip.identity:
        fault = "contains no embeddings" if stored is None else f"was made with the CLIP {stored}"
        raise InputError(f"the cache {str(folder)!r} {fault}, this is {clip.identity}; give --clip")
    names, embeds = [], []
    for split in finished["splits"]:
        cached = CachedPairs(folder, split, latents=False, text=False)
        names += [cached.get_sample_key(index) for index in range(len(cached))]
        embeds += [cached.open_shard(number)["image_embeds"].float() for number in range(len(cached.rows))]
    return ImageIndex(names, F.normalize(torch.cat(embeds), dim=-1))


def index_image_folder(clip: CLIP, folder: Path, file: Path | None, job: BulkJob) -> ImageIndex:
    """Return the index of the images of a folder, and update the file with it; see `open_image_index`."""
    # Find the images that the stored index does not contain
    paths = find_images(folder)
    job.total = job.total or len(paths)
    target = folder / INDEX_FILE if file is None else file
    stored = read_index_file(clip, target, own=file is None) if target.exists() else {}
    digests: dict[Path, bytes] = {}
    with Progress("reading", len(paths)) as progress:
        for path in progress.iterate(paths):
            with job.skip_bad_input(path, OSError):
                digests[path] = compute_picture_digest(path)
    new = {digest: path for path, digest in digests.items() if digest not in stored}
    if new:
        check_writable_folder(target.parent)

    # Embed them, and store what is known if it differs from the stored index, also after Ctrl-C
    before = set(stored)
    try:
        for path, row in iterate_image_embeds(clip, list(new.values()), job):
            stored[digests[path]] = row
    finally:
        known = {path: digest for path, digest in digests.items() if digest in stored}
        embeds = stack_embeds(clip, [stored[digest] for digest in known.values()])
        index = ImageIndex([path.relative_to(folder).as_posix() for path in known], embeds)
        if known and set(known.values()) != before:
            write_index_file(clip, target, index, list(known.values()))

    # Name the copies of images that cannot be used
    for path, digest in digests.items():
        if path not in known and new[digest] != path:
            with job.skip_bad_input(path):
                raise InputError(f"{str(path)!r}: the same bytes as {str(new[digest])!r}, which cannot be used")
    job.check_any_left()
    return index


def write_index_file(clip: CLIP, target: Path, index: ImageIndex, digests: list[bytes]) -> None:
    """Write an index, with the SHA-256 of each image in its order."""
    # File names need not be UTF-8
    encoded = [name.encode(errors="surrogateescape") for name in index.names]
    tensors = {
        "image_embeds": index.image_embeds,
        "digests": torch.tensor([list(digest) for digest in digests], dtype=torch.uint8),
        "names": torch.tensor(list(b"".join(encoded)), dtype=torch.uint8),
        "name_offsets": torch.tensor([0, *map(len, encoded)]).cumsum(0),
    }
    write_tensor_file(target, tensors, {"kind": INDEX_KIND, "format": 1, "clip": clip.identity})


def read_index_file(clip: CLIP, path: Path, own: bool) -> dict[bytes, Tensor]:
    """Return stored embeddings by the images' digests; none if a file of our `own` is of another CLIP."""
    try:
        tensors, about = read_tensor_file(path, INDEX_KIND, INDEX_TENSORS)
    except InputError as error:
        raise InputError(f"{error}; delete it, and the next search makes the index anew") from error
    if about.get("clip") != clip.identity:
        # Our own file is made anew; one that the user named is not overwritten
        if own:
            return {}
        raise InputError(f"{str(path)!r} is an index of the CLIP {about.get('clip')}, this is {clip.identity}")
    digests, embeds = tensors["digests"], tensors["image_embeds"]
    if digests.shape != (len(embeds), 32) or embeds.shape[1:] != (clip.embed_dim,):
        raise InputError(f"{str(path)!r} is not a complete index; delete it, and the next search makes it anew")
    return {bytes(digest.tolist()): row for digest, row in zip(digests, embeds.float())}


def search_image_index(
    clip: CLIP, index: ImageIndex, text: str | None, image: Path | None, count: int
) -> list[tuple[str, float]]:
    """Return names and cosines of the images nearest to a text or an image."""
    check_integer("top", count, 1, 10_000)
    if image is not None:
        return index.find_nearest_images(embed_image_files(clip, [image])[0], count)
    assert text is not None, "either a text or an image is given"
    return index.find_nearest_images(embed_labels(clip, [text])[0], count)
