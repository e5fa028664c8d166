"""Benchmarks of speed at toy size: they run, and what they compare agrees. Never how long anything takes."""

import importlib
import json
import re
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import peers, report, side_by_side
from benchmarks.__main__ import programs
from benchmarks.side_by_side import alternate, difference, flops, peak_memory, ratio, row, table, write
from t2i.condition import ImageCondition
from t2i.errors import InputError
from t2i.unet_decoder import UNetDecoder


@pytest.fixture(autouse=True)
def a_small_product_says_what_the_machine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "matrix_rate", lambda dtype=torch.float32: 1e9)


@pytest.mark.parametrize("name", programs())
def test_it_runs_at_toy_size_and_its_outputs_agree(name: str) -> None:
    try:
        rows = importlib.import_module(f"benchmarks.{name}").main(True)
    except InputError as missing:
        pytest.skip(str(missing))
    assert rows and all(len(one.seconds) == 2 and one.ratio.low > 0 for one in rows)


def test_works_take_turns_in_changing_order_and_the_first_rounds_do_not_count() -> None:
    called: list[str] = []
    times = alternate({"ours": lambda: called.append("a"), "peer": lambda: called.append("b")}, rounds=3)
    assert "".join(called) == "ba" + "abbaab"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"ours": 3, "peer": 3}


def test_a_ratio_is_of_the_same_rounds_with_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: Iterator[float] = iter([0, 1, 1, 3, 10, 14, 14, 16, 20, 21, 21, 24])  # a b, b a, a b
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    times = alternate({"ours": lambda: None, "peer": lambda: None}, rounds=3, warm=0)
    found = ratio(times, "peer")
    assert (found.median, found.low, found.high) == (2, 2, 3)
    memory = {"ours": 2**21, "peer": 2**22}
    one = row("what", times, at_least=2, flops={"ours": 1e8, "peer": 3e8}, memory=memory, note="why")
    assert one.against == "peer" and one.rate == {"ours": 0.1, "peer": 0.1}
    lines = table([one, row("bare", times)]).splitlines()
    assert lines[2] == "| what | peer | 1 | 3 | 2 (2-3) | 2 |  | 10% / 10% | 2 / 4 |"
    assert lines[3] == "| bare | peer | 1 | 3 | 2 (2-3) |  |  |  |  |" and lines[5:] == ["what, against peer: why"]


def test_outputs_that_differ_are_not_timed() -> None:
    assert difference(torch.zeros(3), torch.full((3,), 5e-5)) == pytest.approx(5e-5)
    with pytest.raises(AssertionError, match="outputs differ by 0.001, allowed is 0.0001"):
        difference(torch.zeros(3), torch.tensor([0, 1e-3, 0]))


def test_products_are_counted_and_memory_has_a_peak() -> None:
    assert flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
    peak = peak_memory(lambda: torch.ones(64, 1024, 1024).sum())
    assert peak is None or 250e6 < peak < 400e6


def test_convolutions_with_packed_weights_are_counted_as_all_others() -> None:
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    sizes = {"block_out_channels": [16, 24], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    decoder = UNetDecoder(8, 4, 8, kinds | sizes).eval().requires_grad_(False)
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), ImageCondition(torch.randn(2, 8))
    with torch.no_grad():
        prepared = decoder.prepare(condition)
        ahead = flops(lambda: decoder.prepare(condition))
        assert ahead + flops(lambda: decoder.step(x, t, prepared)) == flops(lambda: decoder(x, t, condition))


def test_what_is_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)
    times = alternate({"ours": lambda: None, "peer": lambda: None}, rounds=2)
    write("some", [row("what", times)], {"more": [1]})
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["rows"][0]["what"] == "what" and found["more"] == [1] and found["machine"]["versions"]["torch"]


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "NEEDED", ("no_such_peer",))
    with pytest.raises(InputError, match="^no_such_peer not installed: .*`make test`"):
        peers.dalle2_pytorch()


def test_the_page_of_speed_has_the_tables_that_the_results_make() -> None:
    assert report.PAGE.read_text() == report.written(report.PAGE.read_text())


def test_a_benchmark_without_its_peer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "dalle2_pytorch", None)  # as where it is not installed
    monkeypatch.setattr(sys, "argv", ["training_speed", "--quick"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(peers.__file__).with_name("training_speed.py")), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert re.fullmatch(r"training_speed: dalle2_pytorch not installed: .*\n", said.err)


def test_the_other_peer_is_measured_without_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from benchmarks import prior_speed

    monkeypatch.setitem(sys.modules, "dalle2_pytorch", None)
    assert [one.against for one in prior_speed.main(True, batches=(1, 8))] == ["diffusers", "diffusers"]
    assert re.fullmatch(r"dalle2_pytorch not installed: .*\n", capsys.readouterr().err)
