"""How good drawn pictures are beside real ones: `t2i eval quality`.

Runs in any number of processes, each with its share of the pictures (index modulo processes); every picture counts
exactly once, whatever their number.
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
from tqdm import tqdm

from t2i import __version__
from t2i.errors import InputError
from t2i.evaluation.features import FeatureExtractor
from t2i.evaluation.metrics import MetricSettings, Moments, compare_feature_sets, compute_feature_moments
from t2i.evaluation.picture_sets import FolderPictures, PictureSet, SourcePictures
from t2i.files.atomic import check_writable_folder
from t2i.files.tensor_file import read_tensor_file, write_tensor_file
from t2i.networks.clip import CLIP
from t2i.runtime.processes import run_on_main_process

STATISTICS_KIND = "statistics of pictures"
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
    """Real pictures as an extractor sees them: features (N, D), fp32, and their mean and covariance."""

    features: Tensor
    moments: Moments
    source_facts: dict[str, Any]


def check_reference_statistics(about: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuse statistics of another extractor, another size of the pictures, or other pictures."""
    for key, what in (("extractor", "extractor"), ("image_size", "image size"), ("digest", "set of pictures")):
        if key in wanted and about.get(key) != wanted[key]:
            raise InputError(
                f"{str(path)!r} holds statistics of another {what}, {about.get(key)!r}; this one is {wanted[key]!r}"
            )


def read_reference_statistics(path: Path, wanted: dict[str, Any]) -> ReferenceStatistics:
    """Statistics that were kept. Raises InputError if they are not of what is `wanted`, or not whole."""
    tensors, about = read_tensor_file(path, STATISTICS_KIND, STATISTICS_TENSORS)
    check_reference_statistics(about, wanted, path)
    features, mean, covariance = (tensors[name] for name in STATISTICS_TENSORS)
    dim = features.shape[-1]
    if features.ndim != 2 or mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise InputError(f"{str(path)!r} is not whole; delete it, and it is made anew")
    return ReferenceStatistics(features, (mean, covariance), about)


def get_statistics_path(pictures: SourcePictures | FolderPictures, extractor: FeatureExtractor, size: int) -> Path:
    """Where the statistics of a reference are kept, if nothing else is said: a hidden file in its folder."""
    return pictures.folder / f".t2i-statistics-{extractor.identity}-{size}-{pictures.digest}.safetensors"


def measure_reference_statistics(
    pictures: SourcePictures | FolderPictures,
    extractor: FeatureExtractor,
    size: int,
    path: Path | None,
    state: PartialState,
) -> ReferenceStatistics:
    """The statistics of a reference, from `path` where they were kept, else computed by all processes and kept there.

    path: a file to use and to write, else `get_statistics_path`. Raises InputError if it holds statistics of
    anything else.
    """
    target = path or get_statistics_path(pictures, extractor, size)
    wanted = {"extractor": extractor.identity, "image_size": size, "digest": pictures.digest}

    def kept() -> ReferenceStatistics | None:
        check_writable_folder(target.parent)
        return read_reference_statistics(target, wanted) if target.exists() else None

    if (found := run_on_main_process(state, kept)) is not None:
        return found
    features = extract_set_features(pictures, extractor, state, "reference")[0]
    mean, covariance = compute_feature_moments(features)
    about = {"kind": STATISTICS_KIND, "format": 1, "version": __version__, **pictures.source_facts(), **wanted}

    def keep() -> None:
        write_tensor_file(target, dict(zip(STATISTICS_TENSORS, (features, mean, covariance))), about)

    run_on_main_process(state, keep)
    return ReferenceStatistics(features, (mean, covariance), about)


@torch.no_grad()
def extract_set_features(
    pictures: PictureSet, extractor: FeatureExtractor, state: PartialState, what: str, scorer: CLIP | None = None
) -> tuple[Tensor, Tensor | None]:
    """Features of all pictures, (N, D), and, by a `scorer`, the cosine of each with its caption, (N,); everywhere.

    Picture i is the work of process i modulo the number of processes.
    """
    mine = list(range(state.process_index, len(pictures), state.num_processes))
    rows, cosines = [torch.zeros(0, extractor.dim)], [torch.zeros(0)]
    for start in tqdm(range(0, len(mine), BATCH_SIZE), desc=what, disable=None if state.is_main_process else True):
        part = mine[start : start + BATCH_SIZE]
        batch = pictures.get_images(part)
        rows.append(extractor(batch))
        if scorer is not None:
            cosines.append(compute_clip_scores(scorer, batch, [str(pictures.captions[index]) for index in part]))
    features = gather_process_rows(torch.cat(rows), len(pictures), state)
    if not features.isfinite().all():
        raise InputError(f"the {what} pictures have features that are not finite; the extractor or its precision fails")
    return features, None if scorer is None else gather_process_rows(torch.cat(cosines), len(pictures), state)


def compute_clip_scores(clip: CLIP, pictures: Tensor, captions: list[str]) -> Tensor:
    """(B,): the cosine of each picture with its caption."""
    z_i = clip.encode_image(pictures.to(clip.device, clip.dtype)).float()
    z_t = clip.encode_text(captions).embedding.float()
    return (F.normalize(z_i, dim=-1) * F.normalize(z_t, dim=-1)).sum(dim=-1).cpu()


def gather_process_rows(mine: Tensor, count: int, state: PartialState) -> Tensor:
    """Every process's rows as one tensor of `count`, in the order of the pictures; none twice, none left out."""
    if state.num_processes == 1:
        return mine
    each = -(-count // state.num_processes)
    padded = torch.zeros(each, *mine.shape[1:])
    padded[: len(mine)] = mine
    gathered = gather(padded.to(state.device)).cpu().unflatten(0, (state.num_processes, each))
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
    """All figures, in JSON, on every process.

    scorer: the CLIP of the CLIP score, the mean cosine of pictures and captions. conditioning: the identity of the CLIP
    that the pictures were drawn with, where it is known: a score by that one flatters them, which the result says.
    """
    if scorer is not None and not all(drawn.captions):
        missing = sum(not caption for caption in drawn.captions)
        raise InputError(f"{missing:,} of {len(drawn):,} pictures know no caption, which a CLIP score needs")
    settings.check_image_counts({"drawn": len(drawn), "reference": len(reference.features)}, extractor.dim)
    features, cosines = extract_set_features(drawn, extractor, state, "drawn", scorer)
    result: dict[str, Any] = run_on_main_process(
        state, lambda: compare_feature_sets(features, reference.features, reference.moments, settings)
    )
    if scorer is not None and cosines is not None:
        result["clip_score"] = cosines.double().mean().item()
        result["clip_score_by"] = {
            "clip": scorer.identity,
            "is_conditioning_clip": is_same_clip(scorer.identity, conditioning),
        }
    return {
        "metrics": result,
        "extractor": extractor.identity,
        "settings": asdict(settings),
        "drawn": drawn.source_facts(),
        "reference": reference.source_facts,
        "processes": state.num_processes,
        "versions": {"t2i": __version__, **{name: version(name) for name in VERSIONED_PACKAGES}},
    }


def is_same_clip(scorer: str, conditioning: str | None) -> bool | None:
    """Whether it is the same CLIP; None if nobody knows."""
    return None if conditioning is None else scorer == conditioning
