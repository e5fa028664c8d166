"""Interpolation on the sphere, for embeddings and noise (DALL-E 2, section 3.2).

A straight line between two embeddings leaves the sphere where all embeddings lie, and one between two noises leaves the
shell where noise lies. Here directions follow great circles and lengths are interpolated linearly, so that unit vectors
stay unit vectors, and noise keeps the length of noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.errors import InputError

MAX_ITERATIONS = 100  # of the spherical mean; it converges in a few
MIN_SINE = 1e-7  # sine of an angle below which the tangent has no reliable direction


def slerp(start: Tensor, end: Tensor, fraction: float | Tensor) -> Tensor:
    """Return the point at a fraction of the way from `start` to `end`, (..., D), on the great circle.

    fraction: a number from 0 to 1, or (...). Between opposite vectors, where every half circle is a shortest way, the
    same one is always taken.
    """
    fraction = torch.as_tensor(fraction, dtype=torch.float64, device=start.device)[..., None]
    start_length, end_length = (vector.double().norm(dim=-1, keepdim=True) for vector in (start, end))
    point = F.normalize(start.double(), dim=-1)
    moved = exp_map(point, fraction * log_map(point, F.normalize(end.double(), dim=-1)))
    return (moved * torch.lerp(start_length, end_length, fraction)).to(start.dtype)


def compute_spherical_mean(points: Tensor, weights: Tensor) -> Tensor:
    """Return the point, (D,), with the least weighted sum of squared angles to K points, (K, D), (K,).

    Buss and Fillmore 2001, algorithm A1; slerp for two points. Where the points do not determine it, such as opposite
    ones, the iteration from the first point decides. Raises InputError for weights as `normalize_weights` does.
    """
    weights = normalize_weights(weights, len(points)).to(points.device)
    length = (weights[:, None] * points.double().norm(dim=-1, keepdim=True)).sum()
    # Anchors without weight must not decide where the iteration starts
    used = weights > 0
    directions, weights = F.normalize(points.double(), dim=-1)[used], weights[used]
    # Start from successive slerps: exact for two points, near for more.
    mean, total = directions[0], weights[0]
    for direction, weight in zip(directions[1:], weights[1:]):
        total = total + weight
        mean = slerp(mean, direction, weight / total)
    # Algorithm A1: to the mean of the tangents, until that is zero
    if len(directions) > 2:
        for _ in range(MAX_ITERATIONS):
            step = (weights[:, None] * log_map(mean.expand_as(directions), directions)).sum(dim=0)
            mean = exp_map(mean, step)
            if step.norm() < 1e-12:
                break
    return (mean * length).to(points.dtype)


def normalize_weights(weights: Tensor, count: int) -> Tensor:
    """Normalize weights to a sum of 1, (K,), fp64. Raises InputError unless there are `count` and all are valid."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    shown = ", ".join(f"{weight:g}" for weight in weights.flatten()[:8].tolist())
    if weights.shape != (count,):
        raise InputError(f"weights has {weights.numel()} numbers ({shown}) for {count} anchors; give one for each")
    if not weights.isfinite().all() or (weights < 0).any():
        raise InputError(f"weights must be finite and not negative, got {shown}")
    if not weights.sum() > 0:
        raise InputError(f"weights must have a positive sum, got {shown}")
    return weights / weights.sum()


def log_map(point: Tensor, other: Tensor) -> Tensor:
    """Return the tangent at `point` that leads to `other`, both unit vectors (..., D), as long as their angle."""
    cosine = (point * other).sum(dim=-1, keepdim=True)
    across = other - cosine * point
    across = across - (point * across).sum(dim=-1, keepdim=True) * point  # twice: once leaves a rounding error
    sine = across.norm(dim=-1, keepdim=True)
    angle = torch.atan2(sine, cosine)
    return angle * torch.where(sine > MIN_SINE, across / sine.clamp(min=MIN_SINE), find_orthogonal_vector(point))


def exp_map(point: Tensor, tangent: Tensor) -> Tensor:
    """Return the unit vectors that tangents at `point`, (..., D), lead to: the inverse of `log_map`."""
    angle = tangent.norm(dim=-1, keepdim=True)
    return F.normalize(angle.cos() * point + angle.sin() * F.normalize(tangent, dim=-1), dim=-1)


def find_orthogonal_vector(point: Tensor) -> Tensor:
    """Return a unit vector orthogonal to each unit vector, (..., D), from the axis of its smallest component."""
    axis = F.one_hot(point.abs().argmin(dim=-1), point.shape[-1]).to(point.dtype)
    return F.normalize(axis - (axis * point).sum(dim=-1, keepdim=True) * point, dim=-1)
