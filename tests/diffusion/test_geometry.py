"""Great circles: what slerp and the spherical mean are known to be."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.diffusion.geometry import compute_spherical_mean, slerp
from t2i.errors import InputError


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    return torch.acos((F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1).clamp(-1, 1))


def test_slerp_is_the_formula_of_shoemake():
    a, b = unit(5, 16), unit(5, 16, seed=1)
    between = angle(a, b)[:, None]
    for share in (0.0, 0.25, 0.7, 1.0):
        expected = (torch.sin((1 - share) * between) * a + torch.sin(share * between) * b) / torch.sin(between)
        torch.testing.assert_close(slerp(a, b, share), expected)


def test_slerp_turns_by_its_share_of_the_angle_and_stays_on_the_sphere():
    a, b = unit(7, 192), unit(7, 192, seed=1)
    share = torch.linspace(0, 1, 7, dtype=torch.float64)
    found = slerp(a, b, share)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(angle(a, found), share * angle(a, b), atol=1e-6, rtol=0)


def test_slerp_of_noise_is_as_long_as_noise_where_a_straight_line_is_too_short():
    a, b = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    assert slerp(a, b, 0.5).norm().item() == pytest.approx((a.norm() + b.norm()).item() / 2, rel=1e-5)
    assert torch.lerp(a, b, 0.5).norm() < 0.75 * a.norm()
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


def test_between_opposite_vectors_slerp_follows_one_half_circle():
    a = unit(3, 8)
    middle = slerp(a, -a, 0.5)
    torch.testing.assert_close((a * middle).sum(dim=-1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(middle.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(middle, slerp(a, -a, 0.5))
    torch.testing.assert_close(slerp(a, -a, 1.0), -a)


def test_between_a_vector_and_itself_nothing_moves():
    a = unit(3, 8).float()
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(torch.zeros(3), torch.zeros(3), 0.3), torch.zeros(3))


def test_the_mean_of_two_is_slerp():
    a, b = unit(2, 16)
    torch.testing.assert_close(compute_spherical_mean(torch.stack([a, b]), torch.tensor([3.0, 1.0])), slerp(a, b, 0.25))


def test_the_mean_of_three_axes_is_the_diagonal_and_of_one_is_itself():
    torch.testing.assert_close(compute_spherical_mean(torch.eye(3), torch.ones(3)), torch.full((3,), 3**-0.5))
    torch.testing.assert_close(compute_spherical_mean(torch.eye(3), torch.tensor([0.0, 5.0, 0.0])), torch.eye(3)[1])


def test_the_mean_is_where_the_weighted_squared_angles_are_least():
    points, weights = unit(4, 6) * 0.6 + unit(1, 6, seed=9), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    points = F.normalize(points, dim=-1)
    mean = compute_spherical_mean(points, weights)

    def cost(at: Tensor) -> float:
        return float((weights * angle(at.expand_as(points), points).square()).sum())

    for i in range(50):
        assert cost(mean) < cost(F.normalize(mean + 0.01 * unit(6, seed=i), dim=-1))


def test_the_mean_of_opposite_points_is_a_point():
    a = unit(8)
    mean = compute_spherical_mean(torch.stack([a, -a, a, -a]), torch.ones(4))
    assert mean.isfinite().all()
    assert mean.norm().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0], "weights has 2 numbers .1, 1. for 3 anchors; give one for each"),
        ([0.0, 0.0, 0.0], "weights must have a positive sum, got 0, 0, 0"),
        ([1.0, -1.0, 2.0], "weights must be finite and not negative, got 1, -1, 2"),
        ([1.0, math.nan, 2.0], "weights must be finite and not negative, got 1, nan, 2"),
    ],
)
def test_weights_that_make_no_mean_are_refused_in_one_line(weights: list[float], message: str):
    with pytest.raises(InputError, match=message):
        compute_spherical_mean(torch.eye(3), torch.tensor(weights))
