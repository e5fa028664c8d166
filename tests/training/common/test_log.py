"""The log of a run: what it writes, what a resumed run drops, and what trackers get."""

import json
import math
import os
import time
from importlib import metadata

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from t2i.training.common.log import MetricsLog, check_trackers, drop_rows, resolve_run_code
from t2i.training.common.loop import build_accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2i.config import TRACKERS, TrainConfig
from t2i.errors import InputError
from t2i.terminal import format_duration


def config_of(folder, **settings) -> TrainConfig:
    return TrainConfig(**{"output": str(folder), "steps": 20, "log_every": 5, "trackers": []} | settings)


def run(config: TrainConfig, first: int, last: int, loss=float, **more) -> None:
    """Steps `first` to `last`, whose loss is a function of the step, 8 samples each."""
    log = MetricsLog(Accelerator(cpu=True), config, first - 1, 8)
    log.open()
    for step in range(first, last + 1):
        log.add_micro_batch({"loss": torch.tensor(loss(step)), "half": torch.tensor(loss(step) / 2)})
        log.step(step, 0.1, torch.tensor(3.0), more.get(f"at_{step}"))
    log.close()


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_holds_the_means_since_the_last_one_and_the_last_step_has_one(tmp_path):
    run(config_of(tmp_path, steps=12), 1, 12)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [5, 10, 12]
    assert [row["loss"] for row in found] == [3.0, 8.0, 11.5] and [row["half"] for row in found] == [1.5, 4.0, 5.75]
    assert all(row["learning_rate"] == 0.1 and row["gradient_norm"] == 3.0 for row in found)


def test_speed_memory_and_time_left_are_those_of_the_process(tmp_path):
    config = config_of(tmp_path, steps=40)
    log = MetricsLog(Accelerator(cpu=True), config, 0, 8)
    log.open()
    began = time.perf_counter()
    for step in range(1, 11):
        time.sleep(0.02)
        log.add_micro_batch({"loss": torch.tensor(1.0)})
        log.step(step, 0.1, None)
    took = time.perf_counter() - began
    log.close()
    row = rows(tmp_path)[-1]
    assert row["seconds_left"] == pytest.approx(took / 10 * 30, rel=0.2)
    assert row["samples_per_second"] == pytest.approx(80 / took, rel=0.5)
    assert 0.05 < row["memory_gb"] < 100 and "gradient_norm" not in row


def test_what_is_said_of_one_step_gets_a_row_of_its_own(tmp_path):
    run(config_of(tmp_path), 1, 8, at_7={"validation_loss": 0.25})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(5, 3.0), (7, 6.5)]
    assert rows(tmp_path)[1]["validation_loss"] == 0.25 and "validation_loss" not in rows(tmp_path)[0]


def test_numbers_that_are_not_finite_are_null_and_large_steps_are_exact(tmp_path):
    config = config_of(tmp_path, steps=12_345_679, log_every=1)
    run(config, 12_345_678, 12_345_679, loss=lambda step: math.nan if step % 2 else math.inf)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in "".join(lines) and "Infinity" not in "".join(lines)
    assert [(row["step"], row["loss"]) for row in map(json.loads, lines)] == [(12_345_678, None), (12_345_679, None)]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    config = config_of(tmp_path)
    run(config, 1, 15)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "lo')  # killed in the middle of a line
    run(config, 8, 20)
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 15, 20]
    assert rows(tmp_path)[1]["loss"] == 9.0  # of steps 8 to 10, which were done again


def test_a_run_that_starts_over_forgets_the_rows_before(tmp_path):
    run(config_of(tmp_path), 1, 15)
    run(config_of(tmp_path), 1, 5)
    assert [row["step"] for row in rows(tmp_path)] == [5]


def test_rows_are_dropped_only_where_they_must_be(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_rows(path, 5)
    assert not path.exists()
    content = b'{"step": 5}\n[]\nno json\n{"step": null}\n{"step": 6}\n'
    path.write_bytes(content)
    drop_rows(path, 6)
    assert path.read_bytes() == b'{"step": 5}\n{"step": 6}\n'
    before = os.stat(path).st_ino
    drop_rows(path, 6)
    assert os.stat(path).st_ino == before and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_pictures_are_whole_files_named_by_step(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), config_of(tmp_path), 0, 8)
    log.open()
    for color in ("red", "blue"):
        log.save_images(7, {"pictures": Image.new("RGB", (6, 4), color), "more": Image.new("RGB", (2, 2))})
    log.close()
    assert sorted(os.listdir(tmp_path / "samples")) == ["more-00000007.png", "pictures-00000007.png"]
    with Image.open(tmp_path / "samples/pictures-00000007.png") as image:
        assert image.size == (6, 4) and image.getpixel((0, 0)) == (0, 0, 255)


def test_tensorboard_has_every_row_once_after_a_resume_and_the_pictures(tmp_path):
    config = config_of(tmp_path, trackers=["tensorboard"])
    run(config, 1, 15)
    run(config, 8, 20)
    log = MetricsLog(Accelerator(cpu=True), config, 20, 8)
    log.open()
    log.save_images(20, {"pictures": Image.new("RGB", (6, 4), "red")})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 3), (10, 9), (15, 13), (20, 18)]
    assert {"learning_rate", "gradient_norm", "samples_per_second", "memory_gb"} <= set(events.Tags()["scalars"])
    (picture,) = events.Images("pictures")
    assert (picture.step, picture.width, picture.height) == (20, 6, 4)
    said = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"steps": 20' in said and str(tmp_path) in said


def test_no_trackers_leave_the_rows_alone(tmp_path):
    run(config_of(tmp_path), 1, 5)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path):
    check_trackers(["tensorboard"])
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    missing = [name for name in TRACKERS if name not in installed]
    if not missing:
        pytest.skip("all trackers are installed")
    for name in missing:
        with pytest.raises(InputError, match=rf"'{name}', which is not installed; pip install 't2i\[{name}\]'"):
            check_trackers(["tensorboard", name])
    with pytest.raises(InputError, match="not installed"):
        build_accelerator(config_of(tmp_path / "run", trackers=missing[:1]))
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_and_one_named_twice_is_one():
    with pytest.raises(InputError, match="train.trackers must be one of tensorboard, wandb, trackio; got 'mlflow'"):
        config_of("run", trackers=["tensorboard", "mlflow"])
    assert config_of("run", trackers=["wandb", "wandb"]).trackers == ["wandb"]


def test_a_run_keeps_its_code_when_it_resumes(tmp_path):
    first = resolve_run_code(tmp_path, 0)
    assert len(first) == 8 and resolve_run_code(tmp_path, 10) == first
    assert resolve_run_code(tmp_path, 0) != first


def test_time_is_told_in_two_units_at_most():
    told = {0: "0 s", 45: "45 s", 59.6: "1 min", 720: "12 min", 3599: "1 h 0 min", 7500: "2 h 5 min"}
    told |= {86_399: "1 d 0 h", 100_800: "1 d 4 h"}
    assert {seconds: format_duration(seconds) for seconds in told} == told
