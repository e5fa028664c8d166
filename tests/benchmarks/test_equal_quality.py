"""When two ways to draw are called equally good, and how well that is known."""

import pytest
import torch
from torch import Tensor

from benchmarks.equal_quality_drawn import Drawn, failures, figure, shares, verdict

EQUAL = {
    "exact": figure(0.60, 0.60, 0.001),
    "same_name": figure(0.90, 0.90, 0.001),
    "cosine": figure(0.70, 0.70, 0.001),
    "frechet_distance": figure(3.0, 3.0, 0.01),
    "kernel_distance": figure(0.02, 0.02, 0.0001),
}


def drawn(exact: Tensor) -> Drawn:
    return Drawn(exact, exact, exact, torch.zeros(*exact.shape, 4))


def test_a_difference_is_known_as_well_as_the_captions_agree_on_it() -> None:
    peer = torch.ones(4, 2, dtype=torch.float64)
    mine = peer.clone()
    mine[0] = 0  # both seeds of one caption of four: they are not two witnesses
    found = shares(drawn(mine), drawn(peer))["exact"]
    assert found["ours"] == 0.75 and found["difference"] == -0.25
    assert found["standard_error"] == pytest.approx(0.25)  # sqrt(mean square, 3 / 16 of 4 - 1) over 2 = 0.5 / 2


def test_what_differs_in_nothing_is_of_equal_quality() -> None:
    assert not failures(EQUAL)
    assert verdict(EQUAL, 4, 2).startswith("equal quality, 4 captions x 2 seeds: very emoji 0.6, theirs 0.6;")


@pytest.mark.parametrize(
    ("key", "worse", "equal"),
    [
        ("exact", figure(0.585, 0.60, 0.001), figure(0.593, 0.60, 0.001)),  # a point
        ("same_name", figure(0.90, 0.90, 0.006), figure(0.90, 0.90, 0.004)),  # two standard errors reach it
        ("cosine", figure(0.69, 0.70, 0.1), figure(0.694, 0.70, 0.1)),
        ("frechet_distance", figure(3.07, 3.0, 0.01), figure(3.05, 3.0, 0.01)),  # two hundredths
        ("kernel_distance", figure(0.021, 0.02, 0.0005), figure(0.021, 0.02, 0.002)),  # or its error
    ],
)
def test_each_figure_can_fail_alone(key: str, worse: dict[str, float], equal: dict[str, float]) -> None:
    assert failures(EQUAL | {key: worse}) == [key]
    assert not failures(EQUAL | {key: equal})


def test_what_is_better_is_never_a_failure() -> None:
    better = {key: figure(2.0, 1.0, 0.0) for key in ("exact", "same_name", "cosine")}
    assert not failures(better | {key: figure(1.0, 2.0, 0.0) for key in ("frechet_distance", "kernel_distance")})
