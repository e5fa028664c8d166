"""Ways between vectors whose direction is what they say: embeddings and noise (DALL-E 2, section 3.2).

A straight line between two embeddings leaves the sphere where all embeddings lie, and one between two noises leaves the
shell where noise lies; these keep to great circles. Directions follow the circle; lengths are interpolated linearly, so
that unit vectors stay unit vectors, and noise stays as long as noise is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.errors import InputError

MAX_ITERATIONS = 100  # of the spherical mean, at most; it converges in a few
MIN_SINE = 1e-7  # sine of an angle below which no direction is left to go along


def slerp(start: Tensor, end: Tensor, share: float | Tensor) -> Tensor:
    """(..., D), (..., D) -> (..., D): a share of the way from one to the other, 0 to 1, on the great circle.

    share: a number, or (...). Between opposite vectors, where any half circle is a shortest way, it is always the same
    one.
    """
    share = torch.as_tensor(share, dtype=torch.float64, device=start.device)[..., None]
    lengths = [one.double().norm(dim=-1, keepdim=True) for one in (start, end)]
    point = F.normalize(start.double(), dim=-1)
    moved = exp_map(point, share * log_map(point, F.normalize(end.double(), dim=-1)))
    return (moved * torch.lerp(*lengths, share)).to(start.dtype)


def compute_spherical_mean(points: Tensor, weights: Tensor) -> Tensor:
    """(K, D), (K,) -> (D,): the point whose squared angles to the points, weighted, are least in sum.

    For two points it is slerp. Buss and Fillmore 2001, algorithm A1; where the points do not determine it (opposite
    ones, say), it is the one that is found from the first point on, so always the same. Raises InputError for weights
    as `check_weights` does.
    """
    weights = check_weights(weights, len(points)).to(points.device)
    length = (weights[:, None] * points.double().norm(dim=-1, keepdim=True)).sum()
    used = weights > 0
    directions, weights = F.normalize(points.double(), dim=-1)[used], weights[used]
    mean, done = directions[0], weights[0]
    for direction, weight in zip(directions[1:], weights[1:]):  # exact for two, near for more
        done = done + weight
        mean = slerp(mean, direction, weight / done)
    if len(directions) > 2:
        for _ in range(MAX_ITERATIONS):
            step = (weights[:, None] * log_map(mean.expand_as(directions), directions)).sum(dim=0)
            mean = exp_map(mean, step)
            if step.norm() < 1e-12:
                break
    return (mean * length).to(points.dtype)


def check_weights(weights: Tensor, count: int) -> Tensor:
    """(K,) -> (K,), fp64, summing to 1. Raises InputError unless there are `count`, none negative, some positive."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    shown = ", ".join(f"{weight:g}" for weight in weights.flatten()[:8].tolist())
    if weights.shape != (count,):
        raise InputError(f"weights are {weights.numel()} ({shown}) for {count} anchors; give one for each")
    if not weights.isfinite().all() or (weights < 0).any():
        raise InputError(f"weights must be finite and not negative, got {shown}")
    if not weights.sum() > 0:
        raise InputError(f"weights must sum to something positive, got {shown}")
    return weights / weights.sum()


def log_map(point: Tensor, other: Tensor) -> Tensor:
    """Unit vectors (..., D) -> the tangent at `point` that leads to `other`, as long as the angle between them."""
    cosine = (point * other).sum(dim=-1, keepdim=True)
    across = other - cosine * point
    across = across - (point * across).sum(dim=-1, keepdim=True) * point  # again, for what rounding has left
    sine = across.norm(dim=-1, keepdim=True)
    angle = torch.atan2(sine, cosine)
    return angle * torch.where(sine > MIN_SINE, across / sine.clamp(min=MIN_SINE), find_orthogonal_vector(point))


def exp_map(point: Tensor, tangent: Tensor) -> Tensor:
    """Unit vectors (..., D) and tangents -> where these lead to, unit vectors: the reverse of `log_map`."""
    angle = tangent.norm(dim=-1, keepdim=True)
    return F.normalize(angle.cos() * point + angle.sin() * F.normalize(tangent, dim=-1), dim=-1)


def find_orthogonal_vector(point: Tensor) -> Tensor:
    """Unit vectors (..., D) -> a unit vector at right angles to each, from the axis that it has least of."""
    axis = F.one_hot(point.abs().argmin(dim=-1), point.shape[-1]).to(point.dtype)
    return F.normalize(axis - (axis * point).sum(dim=-1, keepdim=True) * point, dim=-1)
