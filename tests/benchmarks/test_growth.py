"""How cost grows: what is counted, what is fitted, and that the page says what was measured."""

import json
import os
from dataclasses import asdict

import pytest
import torch

from benchmarks import growth, growth_page, side_by_side
from benchmarks.counting import count
from benchmarks.growth import FIGURES, VARIED, Curve, grow, slope
from benchmarks.growth_page import FAR, PAGE, PLOT, page, picture
from benchmarks.plot import decades


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    assert slope([(x, 0.3 * x**1.7) for x in (1, 2, 5, 40)]) == pytest.approx(1.7)
    assert slope([(1, 5.0), (10, 5.0)]) == pytest.approx(0)
    assert slope([(1, 1.0), (2, 2.2), (4, 3.9)]) == pytest.approx(0.98, abs=0.01)  # least squares, not the ends


def test_operations_calls_and_living_tensors_are_counted() -> None:
    x, weight = torch.ones(4, 8), torch.ones(16, 8)

    def work() -> None:
        y = x @ weight.t()  # 4 x 16, and a view of what was there before
        y = y.relu()  # both are alive once: 2 x 256 bytes
        y.add_(1)
        y.view(8, 8)

    counts = count(work)
    assert counts.operations == 2 * 4 * 8 * 16 and counts.attention == 0
    assert counts.calls == 5 and counts.tensors == 2 * 4 * 4 * 16


def test_attention_is_counted_apart() -> None:
    x = torch.ones(2, 3, 5, 8)
    counts = count(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x))
    assert counts.attention == counts.operations == 2 * 2 * (2 * 3 * 5 * 5 * 8)


def test_marks_enclose_a_range_and_there_are_not_too_many() -> None:
    assert decades(3, 40) == [2, 5, 10, 20, 50] and decades(1, 1) == [1, 2]
    assert decades(0.99, 4e4) == pytest.approx([1, 10, 100, 1000, 10_000, 100_000])


def test_every_curve_runs_at_toy_size_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "matrix_rate", lambda dtype=torch.float32: 1e9)
    curves = [asdict(one) for one in grow(quick=True)]
    assert [(one["model"], one["varied"]) for one in curves] == [(name, one) for name in VARIED for one in VARIED[name]]
    for curve in curves:
        first, last = curve["points"]
        assert last["operations"] > first["operations"] > 0 and first["seconds"] > 0
        assert last["tensors"] >= last["weights"] > 0
    by_name = {(one["model"], one["varied"]): one["slopes"] for one in curves}
    assert by_name["decoder", "batch"]["operations"] == pytest.approx(1, abs=0.05)
    assert by_name["decoder", "width"]["operations"] == pytest.approx(2, abs=0.2)
    result = {"machine": side_by_side.machine(), "curves": curves}
    text = page(result)
    assert text.count("\n## ") == len(curves) and picture(result).width > 1000


def test_a_slope_that_is_not_as_counted_has_a_reason_that_was_measured() -> None:
    """What is said between the slopes and the limits names a figure of this curve, put together here once more."""
    told = 0
    for curve in json.loads(FIGURES.read_text())["curves"]:
        points = (curve["points"][0], curve["points"][-1])
        if abs(curve["slopes"]["seconds"] - curve["slopes"]["operations"]) <= FAR:
            continue
        told += 1
        why = growth_page.why_time(curve).partition(": ")[2].partition(". With limits")[0]
        rates = [(point["operations"] - point["attention"]) / point["alone"] / 1e9 for point in points]
        calls = [point["calls"] * curve["call"] for point in points]
        same = [point["expected"] - point["alone"] - called for point, called in zip(points, calls)]
        rest = [point["seconds"] - point["expected"] for point in points]
        if "not explained" in why:  # parts that are more than the whole are told in milliseconds, not as shares
            shares = [part / point["seconds"] for each in (calls, same, rest) for part, point in zip(each, points)]
            shares += [point["alone"] / point["seconds"] for point in points]
            assert min(shares) < -0.2 or max(shares) > 1.2
            numbers = [f"calls of operators {growth_page.rounded(1e3 * called, 3)} ms" for called in calls]
            assert all(number in why for number in numbers) and "%" not in why
            continue
        causes = [f"reach {rates[0]:.0f} GFLOP/s alone"]
        for part in (calls, same, rest):
            first, last = (seconds / point["seconds"] for seconds, point in zip(part, points))
            causes.append(f": {first:.0%} of the time at {points[0]['at']}, {last:.0%} at {points[1]['at']}")
        assert any(cause in why for cause in causes), (curve["model"], curve["varied"], why)
    assert told > 0


def check_measured_together(result: dict) -> None:
    """The points and the parts of their times are of one machine in one state, as far as figures can show it."""
    same: dict[tuple, list[float]] = {}
    for curve in result["curves"]:
        assert curve["threads"] == result["machine"]["threads"], (curve["model"], curve["varied"])
        for point in (curve["points"][0], curve["points"][-1]):
            called = point["calls"] * curve["call"]
            parts = [point["alone"], called, point["expected"] - point["alone"] - called]
            shares = [part / point["seconds"] for part in (*parts, point["seconds"] - point["expected"])]
            # Products alone have calls too, which are among all calls once more: of small models the rest is negative.
            assert min(shares) >= -0.35 and max(shares) <= 1.2, (curve["model"], curve["varied"], point["at"], shares)
        for point in curve["points"]:
            sizes = {**curve["sizes"], curve["varied"]: point["at"]}
            same.setdefault((curve["model"], *sorted(sizes.items())), []).append(point["seconds"])
    assert max(map(len, same.values())) > 1
    for what, seconds in same.items():
        assert max(seconds) <= 1.5 * min(seconds), (what, seconds)


def test_the_figures_were_measured_together() -> None:
    result = json.loads(FIGURES.read_text())
    check_measured_together(result)


def made_up(**changes: float) -> dict:
    """Two curves that share a point, whose time is put together of parts."""
    point = {"seconds": 1.0, "alone": 0.5, "expected": 0.7, "calls": 100, "operations": 8e9, "attention": 0, "rows": 64}
    curves = []
    for varied, other in (("batch", "steps"), ("steps", "batch")):
        points = [{"at": 1, **point}, {"at": 2, **point, "seconds": 1.1}]
        slopes = {"seconds": 0.14, "operations": 1.0, "expected": 0.1}
        curves.append(
            {"model": "prior", "varied": varied, "sizes": {other: 1}, "call": 2e-3, "threads": 2, "points": points}
            | {"slopes": slopes}
        )
    curves[1] |= {name: value for name, value in changes.items() if name in curves[1]}
    curves[1]["points"][0] |= {name: value for name, value in changes.items() if name in point}
    return {"machine": {"threads": 2}, "curves": curves}


def test_figures_that_were_not_measured_together_are_found() -> None:
    check_measured_together(made_up())
    check_measured_together(made_up(seconds=1.4))
    for wrong in (
        {"threads": 1},
        {"seconds": 1.6},
        {"expected": 1.4},
        {"call": 13e-3},
        {"alone": 1.3, "expected": 1.3},
    ):
        with pytest.raises(AssertionError):
            check_measured_together(made_up(**wrong))


def test_parts_that_are_more_than_the_whole_are_no_reason() -> None:
    good, bad = made_up()["curves"][1], made_up(call=28e-3, expected=3.3)["curves"][1]
    assert "not explained" not in growth_page.why_time(good)
    why = growth_page.why_time(bad)
    assert "not explained by calls and products: 1000 ms at 1, where products alone take 500 ms" in why
    assert "calls of operators 2800 ms" in why and "%" not in why


def curve_of_all_threads() -> Curve:
    return Curve("prior", "batch", {}, 0.0, [], torch.get_num_threads())


@pytest.mark.parametrize("options", [[], ["--only", "prior: batch"], ["--quick"]])
def test_one_run_with_all_cores_is_written_and_nothing_else(options, tmp_path, monkeypatch) -> None:
    figures, rates = tmp_path / "growth.json", []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    monkeypatch.setattr(growth, "FIGURES", figures)
    monkeypatch.setattr(growth, "write_page", lambda result: None)
    monkeypatch.setattr(growth, "grow", lambda quick, only: iter([curve_of_all_threads()]))
    monkeypatch.setattr(growth, "machine", lambda: rates.append(torch.get_num_threads()) or {"threads": rates[-1]})
    monkeypatch.setattr("sys.argv", ["growth", *options])
    before = torch.get_num_threads()
    torch.set_num_threads(cores + 1)  # as somebody's OMP_NUM_THREADS may have it
    try:
        growth.main()
    finally:
        torch.set_num_threads(before)
    assert figures.exists() == (not options)
    if not options:
        result = json.loads(figures.read_text())
        assert rates == [cores] and result["machine"]["threads"] == result["curves"][0]["threads"] == cores


def test_limits_that_are_not_as_the_time_are_told_with_the_profilers_shares() -> None:
    for curve in json.loads(FIGURES.read_text())["curves"]:
        far = [abs(curve["slopes"]["seconds"] - curve["slopes"][name]) > FAR for name in ("operations", "expected")]
        assert ("With limits" in growth_page.why_time(curve)) == any(far)
        assert not far[1] or "torch's profiler finds" in growth_page.profile(curve)


def test_the_page_says_what_was_measured() -> None:
    assert PAGE.read_text() == page(json.loads(FIGURES.read_text())), "python -m benchmarks.growth --page"
    assert 0 < PLOT.stat().st_size <= 300_000
