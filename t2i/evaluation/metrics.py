"""Distances between two sets of images by their features, with the arithmetic of torch-fidelity.

Frechet distance (Heusel et al. 2017: FID on Inception features), kernel distance (Binkowski et al. 2018: KID),
precision and recall (Kynkaanniemi et al. 2019). Features are (N, D), float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i.checks import check_choice, check_integer
from t2i.errors import InputError

METRICS = ("fd", "kid", "prc")  # Frechet distance; kernel distance; precision and recall
BLOCK_ROWS = 2_000  # rows of a matrix of distances at a time

Moments = tuple[Tensor, Tensor]  # mean (D,), covariance (D, D)


@dataclass(frozen=True)
class MetricSettings:
    """The metrics to compute, and their parameters."""

    metrics: tuple[str, ...] = METRICS
    kid_subset_size: int = 1000  # images in each random subset
    kid_subsets: int = 100
    neighbours: int = 3  # the ball of an image, in precision and recall, reaches to this neighbour
    seed: int = 0  # of the subsets

    def __post_init__(self) -> None:
        if not self.metrics:
            raise InputError(f"no metrics; give at least one of {', '.join(METRICS)}")
        for metric in self.metrics:
            check_choice("metrics", metric, METRICS)
        check_integer("kid-subset-size", self.kid_subset_size, 2, 100_000)
        check_integer("kid-subsets", self.kid_subsets, 1, 100_000)
        check_integer("neighbours", self.neighbours, 1, 1_000)
        check_integer("seed", self.seed, 0, 2**32 - 1)

    def check_image_counts(self, counts: dict[str, int], dim: int) -> None:
        """Refuse sets of images that are too small for the metrics; `counts`: images by name, `dim`: features."""
        # With fewer images than features the covariance is singular, and its distance is biased
        for name, count in counts.items():
            if "fd" in self.metrics and count <= dim:
                needed = f"a covariance of {dim} features needs {dim + 1:,} for full rank"
                raise InputError(f"{name}: {count:,} images are too few, {needed}; or leave fd out of --metrics")
            if "kid" in self.metrics and count < self.kid_subset_size:
                needed = f"--kid-subset-size is {self.kid_subset_size:,}"
                raise InputError(f"{name}: {count:,} images are too few, {needed}; give more, or a smaller size")
            if "prc" in self.metrics and count <= self.neighbours:
                raise InputError(f"{name}: {count:,} images are too few for {self.neighbours} neighbours each")


def import_torch_fidelity() -> Any:
    """Import torch-fidelity. Raises InputError if the extra is not installed."""
    try:
        import torch_fidelity
        import torch_fidelity.metric_fid
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
    except ImportError as error:
        raise InputError(f"torch-fidelity is not installed ({error}); pip install 't2i[eval]'") from error
    return torch_fidelity


def compute_feature_moments(features: Tensor) -> Moments:
    moments = import_torch_fidelity().metric_fid.fid_features_to_statistics(features.float())
    return torch.as_tensor(moments["mu"]), torch.as_tensor(moments["sigma"])


def compute_frechet_distance(drawn: Moments, real: Moments) -> float:
    """Return |mean - mean'|^2 + trace(C + C' - 2 (C C')^(1/2))."""
    # torch-fidelity's statistics are dicts of numpy arrays
    first, second = ({"mu": mean.numpy(), "sigma": covariance.numpy()} for mean, covariance in (drawn, real))
    result = import_torch_fidelity().metric_fid.fid_statistics_to_metric(first, second, verbose=False)
    return result["frechet_inception_distance"]


def compute_kernel_distance(drawn: Tensor, real: Tensor, settings: MetricSettings) -> tuple[float, float]:
    """Return mean and standard deviation, over the subsets, of the squared maximum mean discrepancy."""
    result = import_torch_fidelity().metric_kid.kid_features_to_metric(
        drawn,
        real,
        kid_subsets=settings.kid_subsets,
        kid_subset_size=settings.kid_subset_size,
        rng_seed=settings.seed,
        verbose=False,
    )
    return result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]


def compute_precision_recall(drawn: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """Return the fraction of drawn images within the balls of real ones, and of real images within those of drawn.

    Computed in float64, for distances of similar images are nearly equal.
    """
    settings = {"prc_neighborhood": neighbours, "prc_batch_size": BLOCK_ROWS, "save_cpu_ram": True, "verbose": False}
    result = import_torch_fidelity().metric_prc.prc_features_to_metric(drawn.double(), real.double(), **settings)
    return result["precision"], result["recall"]


def compare_feature_sets(
    drawn: Tensor, real: Tensor, real_moments: Moments, settings: MetricSettings
) -> dict[str, float]:
    """Compute all metrics in `settings.metrics`, by name."""
    result: dict[str, float] = {}
    if "fd" in settings.metrics:
        result["frechet_distance"] = compute_frechet_distance(compute_feature_moments(drawn), real_moments)
    if "kid" in settings.metrics:
        result["kernel_distance"], result["kernel_distance_std"] = compute_kernel_distance(drawn, real, settings)
    if "prc" in settings.metrics:
        result["precision"], result["recall"] = compute_precision_recall(drawn, real, settings.neighbours)
    return result
