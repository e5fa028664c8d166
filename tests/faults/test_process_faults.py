"""Numbers that are not finite, and processes that die, hang or disagree (faults D of the study)."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from t2i.training.common.checkpoint import find_newest_checkpoint, load_checkpoint

from t2i.errors import InputError, RunError
from tests.faults import tiny_run
from tests.faults.record import fault, record
from tests.faults.test_checkpoint_faults import contents, finish, launch, start, wait_for


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, averages and optimizer after a step, by name."""
    checkpoint = load_checkpoint(folder / "checkpoints" / f"step-{step:08}")
    groups = checkpoint.tensors.items()
    return {f"{group}.{name}": value.clone() for group, tensors in groups for name, value in tensors.items()}


@pytest.mark.parametrize("value", ["nan", "inf"])
@fault("D1 NaN or infinity in one sample")
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_samples(tmp_path, value):
    tiny_run.run(tmp_path, f"{value}:0:5", "save_every=1", "keep=99")
    before, after = state(tmp_path, 4), state(tmp_path, 5)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], value) for name, value in state(tmp_path, 6).items())
    assert all(value.isfinite().all() for value in state(tmp_path, 12).values())
    [row] = rows(tmp_path / "skipped.jsonl")
    assert row["step"] == 5 and row["not_finite"] == "loss"
    assert len(row["keys"]) == 3 and all(key.startswith("number-") for key in row["keys"])


@fault("D1 NaN on one of two processes")
def test_nan_on_one_process_is_skipped_by_both(tmp_path):
    status, output = finish(start(tmp_path, "nan:1:5", "save_every=1", "keep=99", processes=2))
    assert status == 0, output
    before, after = state(tmp_path, 4), state(tmp_path, 5)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in state(tmp_path, 12).values())
    [row] = rows(tmp_path / "skipped.jsonl")
    assert row["step"] == 5 and len(row["keys"]) == 3  # those of process 1 alone


@fault("D1 ten steps in a row")
def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_with_what_it_saw(tmp_path):
    with pytest.raises(RunError, match=r"10 steps in a row .* with the samples number-\d+, .*skipped\.jsonl"):
        tiny_run.run(tmp_path, "nans:0:4", "steps=40")
    assert [row["step"] for row in rows(tmp_path / "skipped.jsonl")] == list(range(4, 14))
    path, problems = find_newest_checkpoint(tmp_path / "checkpoints")
    assert not problems and all(value.isfinite().all() for value in load_checkpoint(path).tensors["model"].values())


@fault("D3 a gradient or loss that overflows under fp16's loss scaling", 2)
def test_a_scaled_loss_that_overflows_changes_nothing_and_lowers_the_scale(tmp_path):
    status, output = finish(start(tmp_path, "scaler=1", "huge:0:5", "save_every=1", "keep=99"))
    assert status == 0, output
    before, after = state(tmp_path, 4), state(tmp_path, 5)
    assert all(torch.equal(before[name], after[name]) for name in before)
    scales = [load_checkpoint(tmp_path / f"checkpoints/step-{n:08}").state["scaler"]["scale"] for n in (4, 5, 6)]
    assert scales[1] < scales[0] and scales[2] == scales[1]
    assert any(not torch.equal(after[name], value) for name, value in state(tmp_path, 6).items())
    status, output = finish(start(tmp_path / "nans", "scaler=1", "nans:0:4", "steps=40"))
    assert status == 1 and "10 steps in a row" in output, output  # a smaller scale does not help a loss of NaN


@fault("D2 a loss of a hundred times")
def test_a_spike_of_the_loss_is_seen_and_survived(tmp_path):
    tiny_run.run(tmp_path, "spike:0:5")
    losses = [row["loss"] for row in rows(tmp_path / "metrics.jsonl")]
    assert losses[4] > 20 * max(losses[:4]) and losses[-1] < 3 * max(losses[:4])


@fault("D4 out of memory")
def test_running_out_of_memory_says_what_takes_less(tmp_path):
    least = r", or with train\.gradient_checkpointing=true\. The last checkpoint is kept"
    advice = rf"the same samples a step take less with train\.batch_size=1 train\.gradient_accumulation=3{least}"
    amounts = {"memory": "2.50 GiB", "allocator": "4194304.00 GiB", "python": "an unknown amount"}
    amounts["kernel"] = amounts["python"]
    for name, amount in amounts.items():  # of a device, of torch's allocator, of Python, of a kernel's
        said = rf"with train\.batch_size=3: it needs {amount} more at once, [\d.]+ GiB of [\d.]+ GiB are free; {advice}"
        with pytest.raises(RunError, match=said):
            tiny_run.run(tmp_path / name, f"{name}:0:5")
    with pytest.raises(RuntimeError, match="^a size does not match"):  # what is no lack of memory stays what it is
        tiny_run.run(tmp_path / "broken", "broken:0:5")


def test_more_than_one_percent_of_bad_samples_stops_the_run_with_the_counts(tmp_path):
    with pytest.raises(RunError, match=r"\d+ of the \d+ samples .* more than 1%: \d+ x gone; .*rejected\.jsonl"):
        tiny_run.run(tmp_path, "rejected=0.05", "steps=1000", "save_every=1000")
    assert len(rows(tmp_path / "rejected.jsonl")) >= 10
    with pytest.raises(RunError, match="of the 12 samples read so far are bad"):
        tiny_run.run(tmp_path / "all", "rejected=1")


def test_less_than_one_percent_of_bad_samples_is_logged(tmp_path):
    tiny_run.run(tmp_path, "rejected=0.003", "steps=400", "save_every=1000")
    assert 1 <= len(rows(tmp_path / "rejected.jsonl")) <= 10
    assert {"step", "key", "reason"} == set(rows(tmp_path / "rejected.jsonl")[0])


@fault("D5 a process is killed")
def test_a_killed_process_ends_the_run_within_ten_seconds_by_number(tmp_path):
    process = launch(tmp_path, "die:1:5", "stall_timeout=60", processes=2)
    while not (tmp_path / "died").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    died = time.monotonic()
    status, output = finish(process, 40)
    seconds = time.monotonic() - died
    assert status != 0 and seconds < 10, (seconds, output)
    assert re.search(r"error: process 1 of 2 died, as seen by process 0\. .*step-00000003 is kept", output), output


@fault("D10 processes disagree, or are more than samples", 3)
def test_processes_that_disagree_or_are_too_many_are_refused_before_step_1(tmp_path):
    status, output = finish(start(tmp_path / "a", "disagree:1:1", processes=2))
    assert status != 0 and "process 1 has data='other', process 0 has '0'" in output
    status, output = finish(start(tmp_path / "b", "size=1", processes=2))
    assert status != 0 and "there are 2 processes for 1 samples" in output
    status, output = finish(start(tmp_path / "a", "twist:1:1", processes=2))
    assert status != 0 and "process 1 has twist=1, process 0 has 0" in output
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@fault("A15 SIGTERM to one of two processes, bit for bit")
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path):
    status, output = finish(start(tmp_path, "signal:1:5", processes=2))
    assert status != 0 and "stopped at step 5 of 12" in output
    path, problems = find_newest_checkpoint(tmp_path / "checkpoints")
    assert path.name == "step-00000005" and not problems
    status, _ = finish(start(tmp_path, processes=2))
    assert status == 0
    assert finish(start(tmp_path / "unbroken", processes=2))[0] == 0
    assert contents(tmp_path) == contents(tmp_path / "unbroken")


def test_looking_at_a_run_does_not_change_it(tmp_path):
    """Validation, images, and both on two processes and in shards: the same checkpoint, bit for bit."""
    tiny_run.run(tmp_path / "plain")
    tiny_run.run(tmp_path / "seen", "validate_every=1", "sample_every=2")
    assert contents(tmp_path / "seen") == contents(tmp_path / "plain")
    values = [row["validation_loss"] for row in rows(tmp_path / "seen/metrics.jsonl")]
    assert len(values) == 12 and values[-1] < values[0]
    names = sorted(path.name for path in (tmp_path / "seen/samples").iterdir())
    assert names == [f"picture-{step:08}.png" for step in range(2, 13, 2)]
    for more in ([], ["sharded=1"]):
        plain, seen = (tmp_path / f"{name}{len(more)}" for name in ("plain", "seen"))
        assert finish(start(plain, "steps=6", *more, processes=2))[0] == 0
        status, output = finish(start(seen, "steps=6", "validate_every=1", "sample_every=2", *more, processes=2))
        assert status == 0, output
        assert contents(seen, 6) == contents(plain, 6)


def test_a_dry_run_tells_the_cost_and_writes_nothing(tmp_path, capsys):
    tiny_run.run(tmp_path / "run", "dry_run=true")
    out = capsys.readouterr().out
    assert "parameters: 553 trained of 553" in out and "samples: 40, 3 a step; 12 steps see each 0.9 x" in out
    assert re.search(r"memory: [\d.]+ GB a process", out) and re.search(r"time: [\d.e-]+ s a step, \d+ s for all", out)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match=r"out of memory with train\.batch_size=3"):
        tiny_run.run(tmp_path / "run", "dry_run=true", "memory:0:2")


@fault("A11 a configuration that changed")
def test_a_run_goes_on_with_the_configuration_that_it_was_trained_with_or_not_at_all(tmp_path):
    tiny_run.run(tmp_path, "steps=3")
    with pytest.raises(InputError, match="was trained with kind='plain', now 'other'"):
        tiny_run.run(tmp_path, "kind=other")
    with pytest.raises(InputError, match="was trained with train.seed=0, now 1"):
        tiny_run.run(tmp_path, "seed=1")


@fault("A15 SIGTERM to every process of a tree", 2)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_whole_tree_saves_too(tmp_path, processes):
    """As systemd and Slurm send it: to the launcher, the processes and their workers at once."""
    process = (launch if processes > 1 else start)(tmp_path, "workers=1", "steps=2000", processes=processes)
    wait_for(lambda: (tmp_path / "checkpoints/step-00000003").exists(), process)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGTERM)
    status, output = finish(process, 60)
    assert status == (75 if processes == 1 else status) and status != 0 and "stopped at step" in output, output
    stopped = int(re.search(r"stopped at step (\d+)", output)[1])
    path, problems = find_newest_checkpoint(tmp_path / "checkpoints")
    assert path.name == f"step-{stopped:08}" and not problems


@pytest.mark.faults
@fault("D6 a process raises")
def test_the_error_of_one_process_is_shown_first(tmp_path):
    begun = time.monotonic()
    status, output = finish(launch(tmp_path, "raise:1:5", processes=2))
    assert status != 0 and time.monotonic() - begun < 60
    assert output.index("error: the image of process 1 is bad") < output.index("error: process 1 of 2 died")


@pytest.mark.faults
def test_data_that_do_not_divide_by_the_processes_never_hang_one(tmp_path):
    ended = 0
    for size in (37, 41, 43):
        ended += finish(launch(tmp_path / str(size), f"size={size}", "steps=40", processes=2), 60)[0] == 0
    record("D7 samples that do not divide by processes and batches", 3, ended)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("what", "word", "own_store"),
    [
        ("sleep:1:5", "process 1 of 2", "1"),
        ("sleep:0:5", "process 0 of 2", "1"),
        ("stop:1:5", "process 1", "1"),
        ("stop:0:5", "process 0", "1"),
        ("stop:0:5", "process 0", "0"),  # the launcher keeps the store
    ],
)
@fault("D8 a process hangs")
def test_a_process_that_hangs_is_named(tmp_path, what, word, own_store):
    process = launch(tmp_path, what, "stall_timeout=5", processes=2, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=own_store)
    status, output = finish(process, 150)  # the launcher itself waits 30 s for one that does not react
    assert status != 0 and f"error: {word}" in output and "did not arrive within 5 s" in output, output


@pytest.mark.faults
def test_a_restarted_group_of_processes_ends_bit_for_bit_like_an_undisturbed_one(tmp_path):
    assert finish(launch(tmp_path / "unbroken", processes=2))[0] == 0
    survived = 0
    for i in range(15):
        folder = tmp_path / str(i)
        status, output = finish(launch(folder, f"die:{i % 2}:{3 + i % 7}", processes=2, restarts=1))
        assert status == 0, output
        survived += contents(folder) == contents(tmp_path / "unbroken")
    record("D9 a killed process, restarted by the launcher, bit for bit", 15, survived)


@pytest.mark.faults
@fault("D11 a port in use")
def test_a_port_in_use_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", tiny_run.__file__]
        result = subprocess.run([sys.executable, *command, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "EADDRINUSE" in result.stderr and str(port) in result.stderr
