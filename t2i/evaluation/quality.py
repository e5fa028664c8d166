"""Comparison of drawn images with real ones: `t2i eval quality`.

Runs in any number of processes. Image i belongs to process i modulo the number of processes, so each image counts
exactly once.
"""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from t2i import __version__
from t2i.data.pictures import Resizing
from t2i.errors import InputError
from t2i.evaluation.features import FeatureExtractor
from t2i.evaluation.metrics import MetricSettings, Moments, compare_feature_sets, compute_feature_moments
from t2i.evaluation.picture_sets import FolderPictures, PictureSet, SourcePictures
from t2i.files.atomic import check_writable_folder
from t2i.files.tensor_file import read_tensor_file, write_tensor_file
from t2i.networks.clip import CLIP
from t2i.progress import Progress, follow_batch
from t2i.runtime.processes import run_on_main_process

STATISTICS_KIND = "statistics of images"
STATISTICS_TENSORS = ("features", "mean", "covariance")
BATCH_SIZE = 32
VERSIONED_PACKAGES = (
    "torch",
    "torchvision",
    "torch-fidelity",
    "open_clip_torch",
    "diffusers",
    "transformers",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class ReferenceStatistics:
    """Features of real images, (N, D), fp32, with their mean and covariance."""

    features: Tensor
    moments: Moments
    source_facts: dict[str, Any]


def read_reference_statistics(path: Path, expected: dict[str, Any]) -> ReferenceStatistics:
    """Read stored statistics. Raises InputError if they are not complete, or not of `expected`.

    expected: the extractor, the size of the images and the digest of their files.
    """
    tensors, about = read_tensor_file(path, STATISTICS_KIND, STATISTICS_TENSORS)
    for key, kind in (("extractor", "extractor"), ("image_size", "image size"), ("digest", "set of images")):
        stored = about.get(key)
        if key in expected and stored != expected[key]:
            values = f"{stored!r}; this {kind} is {expected[key]!r}"
            raise InputError(f"{str(path)!r} contains statistics of another {kind}, {values}")
    features, mean, covariance = (tensors[name] for name in STATISTICS_TENSORS)
    dim = features.shape[-1]
    if features.ndim != 2 or mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise InputError(f"{str(path)!r} is not complete; delete it to compute it anew")
    return ReferenceStatistics(features, (mean, covariance), about)


def measure_reference_statistics(
    pictures: SourcePictures | FolderPictures,
    extractor: FeatureExtractor,
    size: int,
    path: Path | None,
    state: PartialState,
) -> ReferenceStatistics:
    """Read the statistics of a reference from a file, or compute them in all processes and write them.

    path: the file; None: a hidden one in the folder of the images. Raises InputError if it is of anything else.
    """
    # Read them, if they were computed before
    default_name = f".t2i-statistics-{extractor.identity}-{size}-{pictures.digest}.safetensors"
    target = path or pictures.folder / default_name
    expected = {"extractor": extractor.identity, "image_size": size, "digest": pictures.digest}

    def read_stored() -> ReferenceStatistics | None:
        check_writable_folder(target.parent)
        return read_reference_statistics(target, expected) if target.exists() else None

    stored = run_on_main_process(state, read_stored)
    if stored is not None:
        return stored

    # Compute and write them
    features = extract_set_features(pictures, extractor, state, "reference")[0]
    mean, covariance = compute_feature_moments(features)
    about = {
        "kind": STATISTICS_KIND,
        "format": 1,
        "version": __version__,
        **describe_used_images(pictures, len(features)),
        **expected,
    }
    tensors = dict(zip(STATISTICS_TENSORS, (features, mean, covariance)))
    run_on_main_process(state, lambda: write_tensor_file(target, tensors, about))
    return ReferenceStatistics(features, (mean, covariance), about)


@torch.no_grad()
def extract_set_features(
    pictures: PictureSet, extractor: FeatureExtractor, state: PartialState, kind: str, scorer: CLIP | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the features of all images, (N, D), and, with a `scorer`, the cosines with their captions, (N,).

    All processes return the same; image i is the work of process i modulo the number of processes. Images that cannot
    be read have no row.
    """
    # Round robin: processes differ by one image at most
    mine = list(range(state.process_index, len(pictures), state.num_processes))
    rows, cosines = [torch.zeros(0, extractor.dim)], [torch.zeros(0)]
    with Progress(f"measuring the {kind} images", len(mine), ""):
        for start in range(0, len(mine), BATCH_SIZE):
            part = mine[start : start + BATCH_SIZE]
            with follow_batch(len(part)):
                if scorer is None:
                    rows.append(extractor(pictures.get_images(part)))
                    continue
                batch, seen = pictures.get_views(part, Resizing.for_clip(scorer))
                rows.append(extractor(batch))
                captions = [str(pictures.captions[index]) for index in part]
                cosines.append(compute_clip_scores(scorer, seen, captions))
    usable = torch.tensor([index not in pictures.left_out for index in mine], dtype=torch.float32)
    kept = gather_process_rows(usable, len(pictures), state).bool()
    features = gather_process_rows(torch.cat(rows), len(pictures), state)[kept]
    if not features.isfinite().all():
        raise InputError(f"features of the {kind} images are not finite; the extractor or its precision fails")
    return features, None if scorer is None else gather_process_rows(torch.cat(cosines), len(pictures), state)[kept]


def compute_clip_scores(clip: CLIP, pictures: Tensor, captions: str | list[str]) -> Tensor:
    """Return the cosine of each image with its caption, (B,)."""
    z_i = clip.encode_image(pictures.to(clip.device, clip.dtype)).float()
    z_t = clip.encode_text(captions).embedding.float()
    return (F.normalize(z_i, dim=-1) * F.normalize(z_t, dim=-1)).sum(dim=-1).cpu()


def describe_used_images(pictures: PictureSet, used: int) -> dict[str, Any]:
    """Return the facts about a set, with the number of images that could be read if not all could."""
    left_out = len(pictures) - used
    return pictures.describe_source() | ({"count": used, "left_out": left_out} if left_out else {})


def gather_process_rows(mine: Tensor, count: int, state: PartialState) -> Tensor:
    """Return the rows of all processes as one tensor of `count` rows, in the order of the images."""
    if state.num_processes == 1:
        return mine
    # Gathering needs equal numbers of rows: pad, interleave, and cut the padding off
    rows = -(-count // state.num_processes)
    padded = torch.zeros(rows, *mine.shape[1:])
    padded[: len(mine)] = mine
    gathered = gather(padded.to(state.device)).cpu().unflatten(0, (state.num_processes, rows))
    return gathered.transpose(0, 1).flatten(0, 1)[:count]


def measure_quality(
    drawn: PictureSet,
    reference: ReferenceStatistics,
    extractor: FeatureExtractor,
    settings: MetricSettings,
    state: PartialState,
    scorer: CLIP | None = None,
    conditioning: str | None = None,
) -> dict[str, Any]:
    """Compute all figures, as JSON, in every process.

    scorer: the CLIP of the CLIP score, which is the mean cosine of images and captions. conditioning: the identity of
    the CLIP that the images were drawn with, if known. Its own score flatters the images; the result records that.
    """
    if scorer is not None and not all(drawn.captions):
        missing = sum(not caption for caption in drawn.captions)
        raise InputError(f"{missing:,} of {len(drawn):,} images have no caption, which a CLIP score needs")
    settings.check_image_counts({"drawn": len(drawn), "reference": len(reference.features)}, extractor.dim)
    # All processes draw and extract; the first one compares
    features, cosines = extract_set_features(drawn, extractor, state, "drawn", scorer)
    # Again, without the images that could not be read
    settings.check_image_counts({"drawn": len(features), "reference": len(reference.features)}, extractor.dim)
    result: dict[str, Any] = run_on_main_process(
        state, lambda: compare_feature_sets(features, reference.features, reference.moments, settings)
    )
    if scorer is not None and cosines is not None:
        result["clip_score"] = cosines.double().mean().item()
        result["clip_score_by"] = {
            "clip": scorer.identity,
            "is_conditioning_clip": None if conditioning is None else scorer.identity == conditioning,
        }
    return {
        "metrics": result,
        "extractor": extractor.identity,
        "settings": asdict(settings),
        "drawn": describe_used_images(drawn, len(features)),
        "reference": reference.source_facts,
        "processes": state.num_processes,
        "versions": {"t2i": __version__, **{name: version(name) for name in VERSIONED_PACKAGES}},
    }
