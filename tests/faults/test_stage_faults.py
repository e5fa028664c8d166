"""Every stage, stopped and resumed, ends bit for bit like the unbroken run; and a model that is trained in shards."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from t2i.training.common.checkpoint import find_newest_checkpoint

from t2i import STAGES
from tests.faults import tiny_run
from tests.faults.record import record
from tests.faults.test_checkpoint_faults import contents, finish, start, wait_for
from tests.helpers.stages import arguments

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


def launch(stage: str, data: Path, folder: Path, runs: Path, processes: int, workers: int, **more: object):
    """A stage's own script, as a user starts it."""
    settings = {"train.save_every": 10, "train.gradient_accumulation": 2, "train.batch_size": 4, "train.log_every": 1}
    settings |= {"data.num_workers": workers, "train.output": folder, **more}
    script = [str(ROOT / f"training/train_{stage}.py"), *arguments(stage, data, runs, STEPS, **settings)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_stopped_ends_bit_for_bit_like_the_unbroken_run(
    stage, workers, processes, shapes, runs, tmp_path
):
    status, output = finish(launch(stage, shapes, tmp_path / "unbroken", runs, processes, workers), 300)
    assert status == 0, output
    survived = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        folder = tmp_path / number.name
        process = launch(stage, shapes, folder, runs, processes, workers)
        wait_for(lambda folder=folder: (folder / "checkpoints/step-00000010").exists(), process)
        launched = psutil.Process(process.pid)
        # A launcher that is killed leaves its processes behind, which train on: the whole tree goes.
        for one in [launched, *(launched.children(recursive=True) if number == signal.SIGKILL else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        status, output = finish(process, 120)
        if processes == 1:
            assert status == (75 if number == signal.SIGTERM else -9), output
        path, problems = find_newest_checkpoint(folder / "checkpoints")
        assert not problems and path.name < f"step-{STEPS:08}", "it was over before it was stopped"
        status, output = finish(launch(stage, shapes, folder, runs, processes, workers), 300)
        assert status == 0 and "resuming from" in output, output
        survived += contents(folder, STEPS) == contents(tmp_path / "unbroken", STEPS)
    record(f"A11 {stage} stopped and resumed bit for bit: {processes} processes, {workers} workers", 2, survived)
    other = launch(stage, shapes, tmp_path / "other", runs, processes, workers, **{"train.seed": 1})
    assert finish(other, 300)[0] == 0 and contents(tmp_path / "other", STEPS) != contents(tmp_path / "unbroken", STEPS)


def test_a_model_trained_in_shards_is_saved_whole_and_resumes_bit_for_bit(tmp_path):
    """FSDP2 on two processes, against DDP: the same numbers up to rounding, the same files."""
    settings = ["sharded=1", "steps=8"]
    status, output = finish(start(tmp_path / "unbroken", *settings, processes=2))
    assert status == 0, output
    assert finish(start(tmp_path / "broken", *settings, "signal:1:5", processes=2))[0] != 0
    status, output = finish(start(tmp_path / "broken", *settings, processes=2))
    assert status == 0 and "resuming from" in output, output
    assert contents(tmp_path / "broken", 8) == contents(tmp_path / "unbroken", 8)
    whole = load_file(tmp_path / "unbroken/checkpoints/step-00000008/ema.safetensors")
    model = tiny_run.Layers(scaled=False)
    model.load_state_dict(whole)  # names and shapes of the whole model
    exported = float((tmp_path / "unbroken/exported.txt").read_text())
    assert model(torch.ones(1, 8)).sum().item() == pytest.approx(exported, abs=1e-5)
