"""Benchmarks of speed at toy size: they run, and what they compare agrees. Never how long anything takes."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as every
from benchmarks import peers, prior_speed, report, side_by_side, starting, training_speed
from benchmarks.side_by_side import (
    Ratio,
    Row,
    build_row,
    check_all_equal,
    check_equal,
    compute_ratio,
    count_operations,
    measure_peak_memory,
    time_in_turns,
)
from benchmarks.training_step import BATCHES, RandomEncodings
from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.networks.unet_decoder import UNetDecoder


@pytest.fixture(autouse=True)
def a_small_product_says_what_the_machine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (side_by_side, report):
        monkeypatch.setattr(module, "measure_matrix_rate", lambda dtype=torch.float32: 1e9)


@pytest.mark.parametrize("name", every.PROGRAMS)
def test_it_runs_at_toy_size_and_its_outputs_agree(name: str) -> None:
    try:
        rows = importlib.import_module(f"benchmarks.{name}").main(True)
    except InputError as missing:
        if not re.search("^[a-z0-9_, ]+ not installed: ", str(missing)):
            raise
        pytest.skip(str(missing))
    assert rows and all(len(one.seconds or one.memory) == 2 and one.ratio.low > 0 for one in rows)


def test_works_take_turns_in_changing_order_and_the_first_rounds_do_not_count() -> None:
    called: list[str] = []
    times = time_in_turns({"ours": lambda: called.append("a"), "peer": lambda: called.append("b")}, rounds=3)
    assert "".join(called) == "ba" + "abbaab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"ours": 3, "peer": 3}


def test_a_ratio_is_of_the_same_rounds_with_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: Iterator[float] = iter([0, 1, 1, 3, 10, 14, 14, 16, 20, 21, 21, 24])  # a b, b a, a b
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    times = time_in_turns({"ours": lambda: None, "peer": lambda: None}, rounds=3, warm=0)
    found = compute_ratio(times, "ours", "peer")
    assert (found.median, found.low, found.high) == (2, 2, 3)
    memory = {"ours": 2**21, "peer": 2**22}
    one = build_row("what", times, at_least=2, operations={"ours": 1e8, "peer": 3e8}, memory=memory, note="why")
    assert one.against == "peer" and one.rate == {"ours": 0.1, "peer": 0.1}
    lines = report.format_table([one, build_row("bare", times), one]).splitlines()
    assert lines[2] == lines[4] == "| what [1] | peer | 1 | 3 | 2 (2-3) | 2 | 10% / 10% | 2 / 4 |"
    assert lines[3] == "| bare | peer | 1 | 3 | 2 (2-3) |  |  |  |" and lines[6:] == ["1. why"]


def test_outputs_that_differ_are_not_timed() -> None:
    assert check_equal(torch.zeros(3), torch.full((3,), 5e-5)) == pytest.approx(5e-5)
    with pytest.raises(AssertionError, match="outputs differ by 0.001, allowed is 0.0001"):
        check_equal(torch.zeros(3), torch.tensor([0, 1e-3, 0]))


def test_products_are_counted_and_memory_has_a_peak() -> None:
    assert count_operations(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
    peak = measure_peak_memory(lambda: torch.ones(64, 1024, 1024).sum())
    assert peak is None or 250e6 < peak < 400e6


def test_convolutions_with_packed_weights_are_counted_as_all_others() -> None:
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    sizes = {"block_out_channels": [16, 24], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    decoder = UNetDecoder(8, 4, 8, kinds | sizes).eval().requires_grad_(False)
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), ImageCondition(torch.randn(2, 8))
    with torch.no_grad():
        prepared = decoder.prepare(condition)
        ahead = count_operations(lambda: decoder.prepare(condition))
        assert ahead + count_operations(lambda: decoder.step(x, t, prepared)) == count_operations(
            lambda: decoder(x, t, condition)
        )


def test_what_is_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    times = time_in_turns({"ours": lambda: None, "peer": lambda: None}, rounds=2)
    report.write_result("some", [build_row("what", times)])
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["rows"][0]["what"] == "what" and found["machine"]["versions"]["torch"]


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "NEEDED", ("no_such_peer",))
    with pytest.raises(InputError, match="^no_such_peer not installed: .*`make test`"):
        peers.import_dalle2_pytorch()


def test_versions_are_told_once_if_they_are_the_same() -> None:
    one, two = ({"command": name, "machine": {"versions": {"torch": "1", "numpy": "2"}}} for name in "ab")
    assert report.format_versions([one, two]) == "Versions: torch 1, numpy 2."
    two["machine"]["versions"] = {"torch": "3"}
    lines = report.format_versions([one, two]).splitlines()
    assert lines == ["Versions of `a`: torch 1, numpy 2.", "Versions of `b`: torch 3."]


def test_the_page_of_speed_has_the_tables_that_the_results_make() -> None:
    assert report.PAGE.read_text() == report.update_page(report.PAGE.read_text())


def test_a_benchmark_that_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(quick: bool) -> list[Row]:
        raise InputError("two processes need two cores")

    monkeypatch.setattr(sys, "argv", ["some", "--quick"])
    with pytest.raises(SystemExit) as ended:
        report.run("some", main)
    assert ended.value.code == 2 and capsys.readouterr() == ("", "some: two processes need two cores\n")


@pytest.mark.parametrize(
    ("status", "said"), [(2, "cannot run here, for the reason above: starting"), (1, "failed: starting")]
)
def test_a_benchmark_that_cannot_run_here_does_not_fail_all_of_them_and_one_that_fails_does(
    status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess:
        asked.append(command[2:])
        return subprocess.CompletedProcess(command, status if "benchmarks.starting" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick"])
    with pytest.raises(SystemExit) as ended:
        every.main()
    assert ended.value.code == (status == 1) and capsys.readouterr().err == said + "\n"
    assert asked == [[f"benchmarks.{name}", "--quick"] for name in every.PROGRAMS]


@pytest.mark.parametrize("has", [True, False])
def test_the_rate_in_bf16_is_measured_where_the_machine_computes_in_it(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "can_compute_bf16", lambda device: has)
    monkeypatch.setattr(report, "measure_product_rate", lambda multiply: 1e9)
    assert ("bf16" in report.describe_machine()["matrix_gflops"]) == has


@pytest.mark.parametrize(("name", "settings"), [("prior_speed", {"batches": (1, 8)}), ("training_speed", {})])
def test_the_other_peer_is_measured_without_it(
    name: str, settings: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "dalle2_pytorch", None)
    found = importlib.import_module(f"benchmarks.{name}").main(True, **settings)
    assert [one.against for one in found] == ["diffusers", "diffusers"]
    assert re.fullmatch(r"dalle2_pytorch not installed: .*\n", capsys.readouterr().err)


def test_gradients_are_compared_relative_to_their_size() -> None:
    small = {"weight": torch.tensor([2e-9, -1e-9]), "unused": torch.zeros(2)}
    assert check_all_equal(small, small) == 0
    assert check_all_equal(small | {"weight": torch.tensor([2e-9, -1.0001e-9])}, small) < 1e-4
    for wrong in ({name: 0 * one for name, one in small.items()}, small | {"unused": torch.tensor([0, 1e-12])}):
        with pytest.raises(AssertionError, match="differs by .* of the largest value"):
            check_all_equal(wrong, small)
    with pytest.raises(AssertionError, match=r"only one side has \['unused'\]"):
        check_all_equal({"weight": small["weight"]}, small)


def test_a_prior_without_gradients_is_not_timed() -> None:
    source = RandomEncodings([2, 3], width=32)
    _, prior = training_speed.build_our_step(source, 64, 1)
    prior.blocks[0].mlp[0].weight.register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(AssertionError, match="blocks.0.mlp.0.weight differs by 1"):
        training_speed.build_diffusers_step(source, prior)


def test_made_up_steps_have_captions_of_other_lengths_each_time() -> None:
    source = RandomEncodings([5 + i % 16 for i in range(64)], width=4)
    texts = [source.__getitems__([]).text for _ in range(2 * BATCHES)]
    rows = [int(text.mask.sum()) for text in texts if text is not None]
    assert len(set(rows[:BATCHES])) > BATCHES / 2 and rows[:BATCHES] == rows[BATCHES:]
    assert texts[1] is not None and not texts[1].states[~texts[1].mask].any()
    assert len(RandomEncodings([7, 7], width=4).batches) == 1  # which all have the same shape


def test_a_row_of_memory_has_no_seconds_and_what_is_missed_says_so() -> None:
    less = Row(
        "loading", "its weights", Ratio(0.8, 0.7, 0.9), 1 / 1.2, {}, memory={"ours": 5 * 2**20, "weights": 2**22}
    )
    assert report.format_table([less]).splitlines() == [
        "| what | against | ratio | goal | MiB, t2i / peer |",
        "|---|---|---|---|---|",
        "| loading | its weights | 0.8 (0.7-0.9): missed | 0.833 | 5 / 4 |",
    ]


def test_steps_that_were_not_run_are_told_by_the_line_through_two_times() -> None:
    once, twice = [1.0 + 2 * 3, 1.5 + 2 * 3], [1.0 + 2 * 6, 1.5 + 2 * 6]  # 1 or 1.5 seconds, and 2 a step
    assert prior_speed.extrapolate(once, twice, 3) == pytest.approx([1 + 2 * 25, 1.5 + 2 * 25])


def test_memory_that_is_not_told_is_no_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(starting, "run_python", lambda code, folder: "None\n100\n")
    assert starting.measure_loading("some model", Path(), 2) is None
    assert capsys.readouterr().err.startswith("memory of loading some model is not measured: ")


def test_the_gallery_draws_every_picture_of_its_page() -> None:
    docs = report.PAGE.parents[1]
    spec = importlib.util.spec_from_file_location("gallery", docs / "gallery.py")
    assert spec is not None and spec.loader is not None
    gallery = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = gallery  # which its dataclass looks itself up in
    spec.loader.exec_module(gallery)
    assert set(re.findall(r"images/gallery-(\w+)\.png", (docs / "gallery.md").read_text())) == set(gallery.DRAWINGS)
